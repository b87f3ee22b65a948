"""Routes as data: the experts that routers choose are written down, and chosen for them.

Megatron's top-k function asks a `router_replay` object for the experts and computes the gates from the scores at
those, so that the router keeps its gradient. Megatron's own such object is one for each layer, told by whoever calls
the model; with several micro-batches in flight and layers that are computed again it would have to know which one is
meant. Here each call of a router makes one, from what RouterInputs carries for the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.errors import CauseError
from gspo_megatron.groups import ProcessGroups
from gspo_megatron.ops.reference import sequence_of_token
from gspo_megatron.types import MicroBatch, RecordedRoutes, RouteShape

CHECKED_STEPS = 8
"""Optimizer steps at the start of a run whose passes are checked. With several mini-batches, also such after which the
routers would choose otherwise."""

Mode = Literal["off", "r2", "r3"]
TopK = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Replay:
    """Experts that the routers of this rank must take in a micro-batch; rows and layers as in RecordedRoutes."""

    experts: Tensor  # [T/tp, layers, k] int16
    valid: Tensor  # [T/tp, layers] bool; elsewhere the router chooses


@dataclass
class Recording:
    """What the routers of this rank choose in a micro-batch; by the router's place."""

    experts: dict[int, Tensor] = field(default_factory=dict)  # [T/tp, k] int16
    entropy: dict[int, Tensor] = field(default_factory=dict)  # [T/tp] of each token


@dataclass
class ReplayCheck:
    """Whether routers did as they were told, counted on the device."""

    wrong: Tensor  # [] int64, (token, layer) pairs that went to other experts than the replayed ones
    routers: set[int] = field(default_factory=set)  # places of those whose experts Megatron asked for


@dataclass
class RoutePass:
    """What the routers are told of routes in one pass over one micro-batch. Layers that are computed again in the
    backward pass are told the same."""

    replay: Replay | None = None
    recording: Recording | None = None
    check: ReplayCheck | None = None


class RouterCall:
    """One call of one router, in the place of Megatron's RouterReplay."""

    def __init__(self, told: RoutePass, place: int) -> None:
        self.told, self.place = told, place
        self.chosen: Tensor | None = None  # [T/tp, k] the router's own experts, most probable first

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, compute_topk: TopK
    ) -> tuple[Tensor, Tensor]:
        """Scores [T/tp, E] -> the scores and numbers of the experts to take, [T/tp, k] each."""
        values, self.chosen = compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        replay = self.told.replay
        if replay is None:
            return values, self.chosen
        valid = replay.valid[:, self.place, None]
        taken = torch.where(valid, replay.experts[:, self.place].to(self.chosen.dtype), self.chosen)
        return scores.gather(1, taken), taken

    def finish(self, routing_map: Tensor, shares: Tensor | None) -> None:
        """Write down what came of it: routing_map [T/tp, E] bool; the experts' shares of each token's scores [T/tp, E]
        if they are recorded."""
        recording, check, replay = self.told.recording, self.told.check, self.told.replay
        if recording is not None:
            assert self.chosen is not None and shares is not None, "Megatron did not ask for the router's experts"
            recording.experts[self.place] = self.chosen.to(torch.int16)
            recording.entropy[self.place] = -torch.xlogy(shares, shares).sum(-1)
        if check is not None:
            assert replay is not None
            if self.chosen is not None:
                check.routers.add(self.place)
            valid = replay.valid[:, self.place]
            experts = torch.where(valid[:, None], replay.experts[:, self.place].long(), 0)
            # A token has k places in the map, and the replayed experts are distinct: all there, they are the set.
            check.wrong += (valid & ~routing_map.gather(1, experts).all(1)).sum()


def sequence_of(micro: MicroBatch) -> Tensor:
    """[T] int64, place of each token's sequence in the pack; S for padding."""
    sequence = sequence_of_token(micro.cu_seqlens, micro.num_tokens)
    is_real = micro.positions < micro.lengths[sequence]
    return torch.where(is_real, sequence, micro.lengths.numel())


@dataclass(frozen=True)
class ReplayCounts:
    """Of one optimizer step, summed over all ranks, on the device."""

    counts: Tensor  # [3] float64: (real token, layer) pairs that were replayed, all of them, replayed in vain

    @property
    def replayed_fraction(self) -> float:
        """Share of the (real token, MoE layer) pairs whose experts were replayed; at the others the router chose."""
        replayed, total, _ = self.counts.tolist()
        return float(replayed / total)


class RoutingReplay:
    """Routes of a policy's micro-batches, from pass to pass.

    "r2": the training passes of a rollout batch take the experts that the pass for the old log-probabilities chose
    (Routing Replay; GSPO, arXiv 2507.18071, section 5.3). "r3": that pass and the training passes take the experts that
    the rollout engine chose (Rollout Routing Replay, arXiv 2510.11370). At a token without a route the router chooses.
    The reference model routes by itself.
    """

    def __init__(self, mode: Mode, groups: ProcessGroups, shape: RouteShape, num_experts: int) -> None:
        self.mode, self.groups, self.shape, self.num_experts = mode, groups, shape, num_experts
        self._steps = 0  # optimizer steps that have begun

    def logprob_passes(
        self, micro_batches: Sequence[MicroBatch], *, record: bool, replay: bool
    ) -> list[RoutePass | None]:
        """What the routers are told in a pass that trains nothing; None where there is nothing to tell."""
        record, replay = record or (replay and self.mode == "r2"), replay and self.mode == "r3"
        if not record and not replay:
            return [None] * len(micro_batches)
        return [
            RoutePass(self._of_engine(m) if replay else None, Recording() if record else None) for m in micro_batches
        ]

    def train_passes(self, micro_batches: Sequence[MicroBatch]) -> list[RoutePass | None]:
        """What the routers are told in a training pass."""
        if self.mode == "off":
            return [None] * len(micro_batches)
        self._steps += 1
        passes: list[RoutePass | None] = []
        for micro in micro_batches:
            replay = self._of_engine(micro) if self.mode == "r3" else self._of_old_policy(micro)
            check = ReplayCheck(torch.zeros_like(micro.lengths[0])) if self._steps <= CHECKED_STEPS else None
            passes.append(RoutePass(replay, None, check))
        return passes

    def recorded(self, micro: MicroBatch, told: RoutePass | None) -> RecordedRoutes | None:
        """What a pass over the micro-batch wrote down; None if it was not asked to."""
        if told is None or told.recording is None:
            return None
        is_real = self._is_real(micro)
        rows, layers = is_real.numel(), range(len(self.shape.layers))
        experts = torch.zeros(rows, len(layers), self.shape.experts_per_token, dtype=torch.int16, device=is_real.device)
        entropy = torch.zeros(len(layers), dtype=torch.float64, device=is_real.device)
        load = torch.zeros(len(layers), self.num_experts, dtype=torch.int64, device=is_real.device)
        for place in layers:
            chosen = told.recording.experts[place]
            experts[:, place] = chosen
            entropy[place] = torch.where(is_real, told.recording.entropy[place], 0).double().sum()
            load[place].scatter_add_(0, chosen.flatten().long(), is_real[:, None].expand_as(chosen).flatten().long())
        first_token = self.groups.coordinates.tensor * rows
        return RecordedRoutes(self.shape.layers, first_token, is_real, experts, entropy, load)

    def count(self, micro_batches: Sequence[MicroBatch], passes: Sequence[RoutePass | None]) -> ReplayCounts | None:
        """Of a training pass that has ended. Collective over all ranks, unless replay is off.

        Raises:
            CauseError: a check found that a router did not do as it was told.
        """
        if self.mode == "off":
            return None
        layers = len(self.shape.layers)
        total = torch.zeros(3, dtype=torch.float64, device=micro_batches[0].lengths.device)
        is_checked = False
        for micro, told in zip(micro_batches, passes, strict=True):
            assert told is not None and told.replay is not None
            is_real = self._is_real(micro)
            total[0] += (told.replay.valid & is_real[:, None]).sum()
            total[1] += is_real.sum() * layers
            if told.check is not None:
                is_checked = True
                total[2] += told.check.wrong + (layers - len(told.check.routers))
        dist.all_reduce(total, group=self.groups.world)
        if is_checked and total[2] > 0:
            raise CauseError(
                f'model.routing_replay="{self.mode}" has no effect: {int(total[2])} of {int(total[0])} (token, layer) '
                "pairs went to other experts than the replayed ones, or their router was not asked; this is a bug of "
                'gspo_megatron or of the installed Megatron-Core; use routing_replay="off"'
            )
        if is_checked and total[0] == 0:
            raise CauseError('model.routing_replay="r3" has nothing to replay: no token of the rollouts has a route')
        return ReplayCounts(total)

    def _is_real(self, micro: MicroBatch) -> Tensor:
        """[T/tp] bool: of the tokens that this rank's routers see, those that are no padding."""
        real = sequence_of(micro) < micro.lengths.numel()
        return real.chunk(self.groups.layout.tensor)[self.groups.coordinates.tensor]

    def _of_old_policy(self, micro: MicroBatch) -> Replay:
        recorded = micro.recorded
        assert recorded is not None, "the pass for the old log-probabilities has recorded no routes"
        return Replay(recorded.experts, recorded.is_real[:, None].expand(recorded.experts.shape[:2]))

    def _of_engine(self, micro: MicroBatch) -> Replay:
        """Experts that do not exist, or one twice, are no route: tokens would be dispatched out of bounds."""
        assert micro.routes is not None and micro.routes_valid is not None, "the rollouts carry no routes"
        ordered = micro.routes.sort(-1).values
        fits = (ordered[..., 0] >= 0) & (ordered[..., -1] < self.num_experts) & (ordered.diff(dim=-1) > 0).all(-1)
        return Replay(micro.routes, micro.routes_valid[:, None] & fits)
