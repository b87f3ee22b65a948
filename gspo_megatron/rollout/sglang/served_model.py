"""Whether a server serves the model that is trained, and holds the trainer's weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gspo_megatron.errors import UserError
from gspo_megatron.rollout.sglang.address import ServerAddress
from gspo_megatron.weights.checksum import Checksum, DeviceChecksum, HostChecksum
from gspo_megatron.weights.gather import GatheredBucket
from gspo_megatron.weights.reshard import ReshardPlan
from gspo_megatron.weights.rules import TensorSpec
from gspo_megatron.weights.server_layout import ServerLayout, ServerParameter, server_piece

# Of config.json: what decides the parameters' names and shapes, and what the same weights compute with them.
_MODEL_KEYS = (
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
    "tie_word_embeddings",
    "rms_norm_eps",
)
_CPU_MLP_MULTIPLE = 32  # SGLang on a CPU pads a rank's share of an MLP to it


@dataclass(frozen=True)
class ServedModel:
    """What a server said about itself."""

    address: ServerAddress
    layout: ServerLayout
    dtype: torch.dtype
    on_gpu: bool
    model_path: str
    sglang_version: str


def read_served_model(address: ServerAddress, model: dict[str, Any], server: dict[str, Any]) -> ServedModel:
    """From the answers of /model_info and /server_info.

    Raises:
        UserError: the server is laid out in a way that updates can't reach.
    """
    for name in ("pp_size", "dp_size"):
        if server.get(name, 1) != 1:
            raise UserError(
                f"{address.url} runs with {name}={server[name]}; weight updates reach {name}=1 only; start "
                "several servers instead"
            )
    if server.get("quantization"):
        raise UserError(
            f"{address.url} quantizes its weights ({server['quantization']}); start it without --quantization"
        )
    device, dtype = str(server.get("device")), str(server.get("dtype"))
    on_gpu = device != "cpu"
    if dtype == "auto":  # of the folder it loaded
        config = _read_config(str(model.get("model_path"))) or {}
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"{address.url} runs in {dtype}; start it with --dtype float32 or bfloat16")
    return ServedModel(
        address,
        ServerLayout(server.get("tp_size", 1), server.get("ep_size", 1), 1 if on_gpu else _CPU_MLP_MULTIPLE),
        getattr(torch, dtype),
        on_gpu,
        str(model.get("model_path")),
        str(server.get("version", "of unknown version")),
    )


def check_same_model(
    served: ServedModel,
    model: dict[str, Any],
    names: Iterable[str],
    parameters: Sequence[ServerParameter],
    folder: Path,
) -> None:
    """Raise UserError unless the server serves the architecture of `folder`, with exactly these parameters.

    Shapes are compared through the server's config.json where it can be read from here.
    """
    url = served.address.url
    ours = _read_config(str(folder)) or {}
    if model.get("model_type") not in (None, ours.get("model_type")):
        raise UserError(
            f'{url} serves a "{model["model_type"]}" model, but model.path={folder} is a "{ours.get("model_type")}"; '
            "start the server with the same model"
        )
    theirs = _read_config(served.model_path)
    if theirs is not None:
        different = [k for k in _MODEL_KEYS if k in ours and k in theirs and ours[k] != theirs[k]]
        if different:
            said = ", ".join(f"{k}={theirs[k]!r} instead of {ours[k]!r}" for k in different)
            raise UserError(
                f"{url} serves {served.model_path}, which is another model than model.path={folder}: {said}; start the "
                "server with the same model"
            )
    wanted, found = {p.name for p in parameters}, set(names)
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    if missing or extra:
        raise UserError(
            f"{url} has other parameters than model.path={folder}: it lacks {_some(missing)}, and has {_some(extra)} "
            "that are not trained; start it with the same model, and without options that change its weights"
        )


def _read_config(folder: str) -> dict[str, Any] | None:
    try:
        content = json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else "none"


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
        whole = [torch.empty(shape, dtype=plan.dtype, device="meta") for shape in spec.hf_shapes]
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
