"""Whether servers hold the trainer's weights: which parameters are compared after an update, and their checksums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gspo_megatron.rollout.sglang.served_model import ServedModel
from gspo_megatron.weights.checksum import Checksum, DeviceChecksum, HostChecksum
from gspo_megatron.weights.gather import GatheredBucket
from gspo_megatron.weights.reshard import ReshardPlan
from gspo_megatron.weights.rules import TensorSpec
from gspo_megatron.weights.server_layout import ServerLayout, ServerParameter, plan_check, server_piece

CHECK_EVERY = 8  # with sglang.check = "sampled" each update checks one layer in so many, another one each time


class WeightCheck:
    """What of the served model's parameters is checked after each update."""

    def __init__(self, check: str, parameters: Sequence[ServerParameter]) -> None:
        """`check`: sglang.check."""
        self.check, self.parameters = check, list(parameters)
        self._layers = sorted({int(p.name.split(".")[2]) for p in parameters if p.name.startswith("model.layers.")})
        self._plans: dict[tuple[object, ...], ReshardPlan] = {}

    def choose(self, turn: int, *, whole: bool) -> tuple[list[ServerParameter], list[str]]:
        """What is checked after an update, and parts of names that only other parameters have.

        Args:
            turn: number of updates before it.
            whole: check everything with "sampled" too, e.g. after the first update, where a wrong mapping shows.
        """
        if self.check == "off":
            return [], []
        if self.check == "full" or whole:
            return self.parameters, []
        every = min(CHECK_EVERY, len(self._layers))
        skipped = [f"model.layers.{i}." for i in self._layers if i % every != turn % every]
        return [p for p in self.parameters if not p.name.startswith(tuple(skipped))], skipped

    def plan(self, update: ReshardPlan, chosen: Sequence[ServerParameter]) -> ReshardPlan:
        """Which rank gets which of the chosen parameters whole; see `plan_check`."""
        key = (update.dtype, *(p.name for p in chosen))
        if key not in self._plans:
            self._plans[key] = plan_check(update, chosen)
        return self._plans[key]


class ServerChecksums:
    """Checksums that the servers' parameters must have, from buckets of a check plan."""

    def __init__(self, parameters: Sequence[ServerParameter], servers: Sequence[ServedModel], num_experts: int | None):
        self._of_spec = {i: p for p in parameters for i in p.specs}
        # Servers that are laid out alike hold the same.
        self._kinds = list(dict.fromkeys((s.layout, s.on_gpu) for s in servers))
        self._num_experts = num_experts
        self._open: dict[tuple[str, int, int], Checksum] = {}  # parameter, kind, server rank

    def add(self, bucket: GatheredBucket) -> None:
        """Take the specs of a bucket into account; each parameter's in order."""
        if bucket.bucket is None:
            return
        tensors = {item.name: item.tensor for item in bucket.assemble().tensors}
        for i in bucket.bucket.specs:
            spec = bucket.plan.specs[i]
            whole = [tensors[name] for name in spec.hf]
            for kind, (layout, on_gpu) in enumerate(self._kinds):
                for rank in range(layout.tensor):
                    piece = server_piece(spec, whole, layout, rank, num_experts=self._num_experts)
                    if piece is not None:
                        key = (self._of_spec[i].name, kind, rank)
                        if key not in self._open:
                            self._open[key] = self._new(bucket.plan, self._of_spec[i], layout, rank, on_gpu)
                        self._open[key].update(piece)

    def _new(
        self, plan: ReshardPlan, parameter: ServerParameter, layout: ServerLayout, rank: int, on_gpu: bool
    ) -> Checksum:
        if not on_gpu:
            return HostChecksum()
        return DeviceChecksum(sum(self._piece_bytes(plan, plan.specs[i], layout, rank) for i in parameter.specs))

    def _piece_bytes(self, plan: ReshardPlan, spec: TensorSpec, layout: ServerLayout, rank: int) -> int:
        whole = [torch.empty(shape, dtype=spec.dtype or plan.dtype, device="meta") for shape in spec.hf_shapes]
        piece = server_piece(spec, whole, layout, rank, num_experts=self._num_experts)
        return 0 if piece is None else piece.numel() * piece.element_size()

    def digests(self) -> dict[tuple[str, int, int], str]:
        """By parameter, kind of server and server rank: of the parameters whose buckets came to this rank."""
        return {key: checksum.hexdigest() for key, checksum in self._open.items()}

    def differing(
        self, expected: dict[tuple[str, int, int], str], server: ServedModel, ranks: Sequence[dict[str, Any]]
    ) -> list[str]:
        """Parameters that a server's ranks hold with another checksum than expected, or don't hold at all."""
        kind = self._kinds.index((server.layout, server.on_gpu))
        by_rank = {info["tp_rank"]: r["checksums"] for r in ranks for info in _infos(r)}
        return sorted(
            {
                name
                for (name, of_kind, rank), digest in expected.items()
                if of_kind == kind and by_rank.get(rank, {}).get(name) != digest
            }
        )


def _infos(rank: dict[str, Any]) -> list[dict[str, Any]]:
    """SGLang 0.5.23 sends one description a model runner; the served model's is the target's."""
    infos = rank["parallelism_info"]
    infos = infos if isinstance(infos, list) else [infos]
    return [info for info in infos if info.get("role", "target") == "target"]
