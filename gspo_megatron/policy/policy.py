"""The policy as the trainer sees it: log-probabilities, an optimizer step, weights in and out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from gspo_megatron.config import KernelsConfig, MemoryConfig, ModelConfig, OptimizerConfig
from gspo_megatron.device import DTYPES, current_device
from gspo_megatron.errors import CauseError
from gspo_megatron.groups import ProcessGroups
from gspo_megatron.policy.checkpoint import Snapshot, after_loading, blocks_to_load, take_snapshot
from gspo_megatron.policy.expert_gradients import expert_gradient_norms
from gspo_megatron.policy.model import build_model, mark_parallel, parameter_slots, transformer_config
from gspo_megatron.policy.optimizer import build_optimizer, build_schedule, wrap_ddp
from gspo_megatron.policy.router import RouterLosses, collect_losses, number_routers
from gspo_megatron.policy.routing import RoutePass, RoutingReplay
from gspo_megatron.policy.step import LossFunction, forward_backward, forward_only
from gspo_megatron.policy.weights import PolicyWeights, ReferenceWeights
from gspo_megatron.types import MicroBatch, RecordedRoutes, RouteShape, StepBatch
from gspo_megatron.weights.families import load_fields
from gspo_megatron.weights.gather import GatheredBucket
from gspo_megatron.weights.hf_checkpoint import save_hf_folder
from gspo_megatron.weights.reshard import ReshardPlan
from gspo_megatron.weights.torch_dist.blocks import read_blocks


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports."""

    reports: list[Any]  # the loss function's, one a micro-batch; [] but on the last pipeline stage
    grad_norm: float  # before clipping; may be NaN or infinite where the step was left out
    learning_rate: float
    router_losses: RouterLosses  # values; None where they are off
    expert_gradient_norms: torch.Tensor | None = None  # [MoE layers, experts], before clipping; None: not measured
    routing_replayed: float | None = None  # share of (real token, MoE layer) pairs replayed; None: replay is off
    is_skipped: bool = False  # the optimizer step was left out


class MegatronPolicy:
    """A model on Megatron-Core with its optimizer. Every method is collective over all ranks."""

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        groups: ProcessGroups,
        *,
        seed: int,
        total_steps: int,
        temperature: float = 1.0,
        keep_reference: bool = False,
        memory: MemoryConfig | None = None,
        kernels: KernelsConfig | None = None,
    ) -> None:
        memory, kernels = memory or MemoryConfig(), kernels or KernelsConfig()
        self.groups, self.source = groups, Path(model.path)
        self.family, self.fields = load_fields(model.path)
        config = transformer_config(self.fields, groups.layout, model, memory)
        chunks = build_model(self.fields, config, groups.layout, model)
        for chunk in chunks:
            chunk.temperature, chunk.kernels = temperature, kernels
        slots = list(parameter_slots(chunks, groups.layout, self.fields))
        self.weights = PolicyWeights(self.family, self.fields, groups, slots)
        mark_parallel(slots, self.weights.specs)
        if model.init == "weights":
            self.weights.load(model.path)
        else:
            self.weights.randomize(seed)
        self.settings, self.memory = optimizer, memory
        self.router_losses = RouterLosses(model.router_aux_loss, model.router_z_loss)
        self.chunks = wrap_ddp(chunks, config, optimizer)
        self.optimizer = build_optimizer(self.chunks, optimizer, memory, DTYPES[model.dtype])
        self.schedule = build_schedule(self.optimizer, optimizer, total_steps)
        # Elsewhere other ranks wait in collectives of the backward pass, or for its gradients: the ranks of a replica
        # decide together, and experts may be spread over no more than these.
        layout = groups.layout
        self.skip_zero_gradients = (
            kernels.skip_zero_gradients
            and layout.pipeline == 1
            and (layout.tensor * layout.context) % (layout.expert * layout.expert_tensor) == 0
            and not optimizer.overlap_grad_reduce
            and not self.router_losses.is_on
        )
        self.reference = ReferenceWeights(self.weights.parameters) if keep_reference else None
        self.routing = RoutingReplay(model.routing_replay, groups, self.route_shape, self.fields.num_experts or 0)

    @cached_property
    def route_shape(self) -> RouteShape:
        """Of which MoE layers this rank holds the routers, and so needs routes."""
        numbers = number_routers(module for chunk in self.chunks for module in chunk.modules())
        moe_layers = self.fields.moe_layers
        places = tuple(moe_layers.index(number) for number in numbers)
        return RouteShape(places, len(moe_layers), self.fields.experts_per_token or 0)

    def fill_old_logprobs(
        self, batches: Sequence[StepBatch], *, record_routes: bool = False, replay: bool = True
    ) -> None:
        """Set old_logprobs of every micro-batch, on the last pipeline stage, from a pass without gradient.

        `record_routes` sets `recorded` too, on every stage; routing replay "r2" does so by itself. Without `replay` the
        routers choose: for what is no rollout batch to train on.
        """
        for batch in batches:
            passes = self.routing.logprob_passes(batch.micro_batches, record=record_routes, replay=replay)
            for micro, logprobs in zip(batch.micro_batches, self._logprobs(batch.micro_batches, passes), strict=False):
                micro.old_logprobs = logprobs
            for micro, told in zip(batch.micro_batches, passes, strict=True):
                micro.recorded = self.routing.recorded(micro, told)

    def routes(self, batches: Sequence[StepBatch]) -> list[list[RecordedRoutes]]:
        """What `fill_old_logprobs` would record of each micro-batch now, by a forward pass of its own."""
        recorded = []
        for batch in batches:
            passes = self.routing.logprob_passes(batch.micro_batches, record=True, replay=True)
            self._logprobs(batch.micro_batches, passes)
            pairs = zip(batch.micro_batches, passes, strict=True)
            recorded.append([routes for micro, told in pairs if (routes := self.routing.recorded(micro, told))])
        return recorded

    def fill_reference_logprobs(self, batches: Sequence[StepBatch]) -> None:
        """Set reference_logprobs of every micro-batch, on the last pipeline stage."""
        assert self.reference is not None
        self._finish_parameters()
        with self.reference:
            for batch in batches:
                for micro, logprobs in zip(batch.micro_batches, self._logprobs(batch.micro_batches), strict=False):
                    micro.reference_logprobs = logprobs

    def _logprobs(
        self, micro_batches: Sequence[MicroBatch], routes: Sequence[RoutePass | None] | None = None
    ) -> list[torch.Tensor]:
        with torch.no_grad():  # Megatron's schedules leave that to the caller
            return [output[0] for output in forward_only(self.chunks, micro_batches, self.groups, routes=routes)]

    def train_step(
        self,
        batch: StepBatch,
        loss_function: LossFunction,
        *,
        measure_experts: bool = False,
        skip_above: float | None = None,
        name: str = "the optimizer step",
    ) -> StepResult:
        """One optimizer step on the loss summed over all micro-batches of all ranks.

        With `skip_above` the step is left out if the gradient norm is above it or not finite: weights, optimizer state
        and learning-rate schedule stay as they are. Messages call the step by its `name`.

        Raises:
            CauseError: routing replay has no effect on some router; or the gradient is not finite, and such steps are
                not left out.
        """
        for chunk in self.chunks:
            if self.memory.offload_gradients:
                chunk.restore_grad_buffers()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        passes = self.routing.train_passes(batch.micro_batches)
        reports = forward_backward(
            self.chunks,
            batch.micro_batches,
            loss_function,
            self.groups,
            num_global_sequences=batch.num_global_sequences,
            skip_zero_gradients=self.skip_zero_gradients,
            routes=passes,
        )
        counts = self.routing.count(batch.micro_batches, passes)
        experts = expert_gradient_norms(self.chunks, self.weights, self.groups) if measure_experts else None
        grad_norm, is_skipped = self._step(name, skip_above)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        router_losses = collect_losses(
            (module for chunk in self.chunks for module in chunk.modules()),
            self.router_losses,
            num_layers=len(self.fields.moe_layers),
            group=self.groups.world,
            device=self.device,
        )
        replayed = None if counts is None else counts.replayed_fraction
        return StepResult(reports, grad_norm, float(learning_rate), router_losses, experts, replayed, is_skipped)

    def _step(self, name: str, skip_above: float | None) -> tuple[float, bool]:
        """Step, or leave it out; the gradient norm before clipping, and whether it was left out."""
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        is_finite = math.isfinite(grad_norm)
        if skip_above is not None and self._is_any(not is_finite or grad_norm > skip_above):
            return grad_norm, True
        if not is_finite:
            raise CauseError(
                f"the gradient norm of {name} is {grad_norm}: the weights are as they were before it. Go on from the "
                'last checkpoint at a lower optimizer.lr; in train, watchdog.action="skip" leaves such steps out'
            )
        self.schedule.step(1)
        succeeded, _, _ = self.optimizer.step()
        assert succeeded, "an optimizer without loss scaling never fails a step"
        return grad_norm, False

    def _is_any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        most = torch.tensor(int(flag), device=self.device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX, group=self.groups.world)
        return bool(most)

    def export(self, plan: ReshardPlan) -> Iterator[GatheredBucket]:
        """The weights as HF-named tensors at the plan's senders, bucket by bucket (`weights.plan` makes the plan)."""
        self._finish_parameters()
        if self.memory.offload_gradients:
            for chunk in self.chunks:
                chunk.offload_grad_buffers()
        return self.weights.export(plan)

    def make_room(self) -> None:
        """Give up device memory that is needed again only in the next step, before an engine on the device takes it."""
        if self.memory.offload_gradients:
            for chunk in self.chunks:
                chunk.offload_grad_buffers()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _finish_parameters(self) -> None:
        """Wait for parameters whose gathering was left to the next forward pass."""
        if self.settings.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def save_hf(self, folder: Path) -> None:
        """Write the weights as a Hugging Face folder, from rank 0, bucket by bucket."""
        buckets = self.export(self.weights.plan([[0]]))
        tensors = (tensor for bucket in buckets for tensor in bucket)
        if self.groups.rank == 0:
            save_hf_folder(folder, tensors, companions_from=self.source)
        else:
            assert next(tensors, None) is None
        torch.distributed.barrier(group=self.groups.world)

    def snapshot(self) -> Snapshot:
        """This rank's share of a checkpoint: views of the weights and of the optimizer's state, and counts."""
        self._finish_parameters()
        return take_snapshot(self.chunks, self.optimizer, self.schedule)

    @property
    def gradient_buffers(self) -> list[torch.Tensor]:
        """Where gradients are summed: large, and no part of a checkpoint."""
        return [b.grad_data for chunk in self.chunks for b in chunk.buffers + chunk.expert_parallel_buffers]

    def restore(self, folder: Path, counts: Mapping[str, int], *, weights_only: bool = False) -> None:
        """Take over a checkpoint's state, whatever layout saved it. The reference model stays the initial one.

        `counts` are those of the snapshot; `weights_only` leaves the optimizer's state as new.

        Raises:
            UserError: the checkpoint lacks something, or is of another model.
        """
        read_blocks(folder, blocks_to_load(self.chunks, self.optimizer, weights_only=weights_only))
        after_loading(self.optimizer, self.schedule, counts, weights_only=weights_only)

    @property
    def device(self) -> torch.device:
        """Where micro-batches must be."""
        return current_device()
