"""Forward and backward over micro-batches, through Megatron's pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from gspo_megatron.groups import ProcessGroups
from gspo_megatron.ops.known_gradient import with_gradient
from gspo_megatron.policy.attention import packed_sequences
from gspo_megatron.policy.router import RouterInputs
from gspo_megatron.policy.routing import RoutePass
from gspo_megatron.types import MicroBatch

# (logprobs[T], entropy[T], micro_batch) -> (loss, whatever the caller wants to know about the micro-batch)
LossFunction = Callable[[Tensor, Tensor, MicroBatch], tuple[Tensor, Any]]


def forward_backward(
    chunks: Sequence[DistributedDataParallel],
    micro_batches: Sequence[MicroBatch],
    loss_function: LossFunction,
    groups: ProcessGroups,
    *,
    num_global_sequences: int,
    skip_zero_gradients: bool = False,
    routes: Sequence[RoutePass | None] | None = None,
) -> list[Any]:
    """Accumulate the gradient of the loss function summed over micro-batches and reduce it over all ranks.

    The loss carries its own global 1/N. Returning a token count of zero beside the loss keeps Megatron
    from rescaling it by micro-batches, data- or context-parallel ranks (`calculate_per_token_loss`).
    `num_global_sequences` is that N, for the routers' losses, whose gradients come on top.
    `skip_zero_gradients` leaves out the backward pass of a micro-batch whose tokens all have gradient 0. Only for
    layouts whose backward pass communicates between the tensor- and context-parallel ranks of one replica alone.
    `routes` says for each micro-batch what its routers are told.
    Returns the loss function's reports on the last pipeline stage, [] elsewhere.
    """

    def loss(output: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor, Any]:
        value, report = loss_function(output[0], output[1], micro)
        if skip_zero_gradients:
            value = _without_idle_backward(value, output, groups)
        return value, torch.zeros([], dtype=torch.int, device=value.device), report

    return _run(
        chunks,
        micro_batches,
        loss,
        groups,
        num_global_sequences=num_global_sequences,
        forward_only=False,
        routes=routes,
    )


def _without_idle_backward(value: Tensor, output: Tensor, groups: ProcessGroups) -> Tensor:
    """The loss, cut off from the model where its gradient by the model's output is 0 on all tensor- and
    context-parallel ranks of the replica."""
    (gradient,) = torch.autograd.grad(value, output)
    is_needed = gradient.any().int()
    for group in (groups.cp, groups.tp):
        if group.size() > 1:
            dist.all_reduce(is_needed, dist.ReduceOp.MAX, group=group)
    if is_needed:
        return with_gradient(output, value.detach(), gradient)
    return value.detach().requires_grad_().clone()  # Megatron may write over it: no leaf


def forward_only(
    chunks: Sequence[DistributedDataParallel],
    micro_batches: Sequence[MicroBatch],
    groups: ProcessGroups,
    *,
    routes: Sequence[RoutePass | None] | None = None,
) -> list[Tensor]:
    """[2, T] log-probabilities and entropies per micro-batch on the last pipeline stage, [] elsewhere; 0 at tokens
    outside the responses.

    Call under `torch.no_grad()`: the schedule itself would keep the graph.
    """

    def collect(output: Tensor, micro: MicroBatch) -> Tensor:
        return output.detach()

    return _run(chunks, micro_batches, collect, groups, num_global_sequences=None, forward_only=True, routes=routes)


def _run(
    chunks: Sequence[DistributedDataParallel],
    micro_batches: Sequence[MicroBatch],
    on_output: Callable[[Tensor, MicroBatch], Any],
    groups: ProcessGroups,
    *,
    num_global_sequences: int | None,
    forward_only: bool,
    routes: Sequence[RoutePass | None] | None,
) -> list[Any]:
    def forward_step(
        batches: Iterator[tuple[MicroBatch, RoutePass | None]], model: Any
    ) -> tuple[Tensor, Callable[..., Any]]:
        micro, told = next(batches)
        output = model(
            input_ids=micro.token_ids[None],
            position_ids=micro.positions[None],
            attention_mask=None,
            labels=micro.targets[None],
            loss_mask=micro.response_tokens,
            packed_seq_params=packed_sequences(
                micro.cu_seqlens,
                micro.max_seqlen,
                context_rank=groups.coordinates.context,
                context_size=groups.layout.context,
                router_inputs=RouterInputs(micro, num_global_sequences, told),
            ),
        )

        def after(output: Tensor, non_loss_data: bool = False) -> Any:
            return on_output(output, micro)

        return output, after

    # Each model chunk of the interleaved schedule reads every micro-batch, from an iterator of its own.
    routes = routes or [None] * len(micro_batches)
    iterators = [iter(zip(micro_batches, routes, strict=True)) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(micro_batches),
        seq_length=max(m.num_tokens for m in micro_batches),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
