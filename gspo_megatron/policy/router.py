"""What a MoE layer's router is told of a micro-batch, and the router's auxiliary losses.

Megatron hands a layer `packed_seq_params` and its router nothing of it. Here `PackedSequences` carries
`RouterInputs`, `Layer` hands them to `MoE` and `MoE` to `Router`, all as arguments: a layer, or a MoE layer alone,
that is computed again in the backward pass gets those of its own micro-batch, whatever else is in flight.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from gspo_megatron.groups import Group
from gspo_megatron.policy.routing import RoutePass, RouterCall, sequence_of
from gspo_megatron.types import MicroBatch


@dataclass
class RouterInputs:
    """What the routers of all layers know of a micro-batch besides the hidden states."""

    micro: MicroBatch
    num_global_sequences: int | None  # N of the optimizer step; None in a pass that trains nothing
    routes: RoutePass | None = None  # None: the routers choose, and nothing is written down

    @cached_property
    def sequence(self) -> Tensor:
        """[T] int64, place of each token's sequence in the pack; S for padding. Made when first asked for."""
        return sequence_of(self.micro)


@dataclass(frozen=True)
class RouterLosses:
    """Coefficients of the auxiliary losses, or their values. None: not computed."""

    aux: float | None = None
    z: float | None = None

    @property
    def is_on(self) -> bool:
        return bool(self.aux or self.z)


class AddLoss(torch.autograd.Function):
    """Passes an activation through; its backward starts that of a loss term, with gradient 1."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return activation

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        [gradient] = gradients
        return gradient, gradient.new_ones((), dtype=ctx.dtype)


class Router(TopKRouter):
    """Megatron's top-k router, with auxiliary losses that are the same in every parallel layout.

    Over the L_i real tokens of sequence i, prompt and response, with p the scores of all E experts in float32 (the
    softmax, or sigmoids divided by their sum) and k chosen experts a token:

        f_ie = E / (k·L_i) · (tokens of i that chose e)      P_ie = mean of p_te over the tokens of i
        aux = 1/N Σ_i Σ_e f_ie P_ie        (DeepSeek-V3, arXiv 2412.19437, equations 17-20; 1 if balanced)
        z = 1/N Σ_i 1/L_i Σ_t (log Σ_e exp logit_te)²        (ST-MoE, arXiv 2202.08906, equation 5)

    N counts all sequences of the optimizer step. Each MoE layer adds coefficient × value to the loss; f has no
    gradient. The ranks that share a sequence add up their token counts; everything else is a sum over tokens,
    of which each rank has its share.
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None, *, losses: RouterLosses
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.losses = losses
        self.router_replay: RouterCall | None = None  # that of the call in progress
        self.place = -1  # among this rank's routers, see `number_routers`
        self.observed: Tensor | None = None  # [2] float64, this rank's share of aux and z since `collect_losses`

    def routing(self, logits: Tensor, padding_mask: RouterInputs | None = None) -> tuple[Tensor, Tensor]:
        """logits [T/tp, 1, E] -> probabilities and chosen experts [T/tp, E]. Megatron hands the second argument of
        `forward` on by this name."""
        inputs = padding_mask
        if inputs is None or inputs.routes is None:
            probs, routing_map = super().routing(logits)
        else:
            self.router_replay = call = RouterCall(inputs.routes, self.place)
            try:
                probs, routing_map = super().routing(logits)
            finally:
                self.router_replay = None
            call.finish(routing_map, self._shares(logits.flatten(0, -2)) if inputs.routes.recording else None)
        if self.losses.is_on and torch.is_grad_enabled():
            assert inputs is not None
            probs = AddLoss.apply(probs, self._loss(logits.flatten(0, -2), routing_map, inputs))
        return probs, routing_map

    def _loss(self, logits: Tensor, routing_map: Tensor, inputs: RouterInputs) -> Tensor:
        """This rank's share of the weighted losses; `observed` gets the unweighted ones."""
        assert inputs.num_global_sequences is not None
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        sequence = self._own_tokens(inputs.sequence)
        lengths = F.pad(inputs.micro.lengths.clamp(min=1), (0, 1), value=1).to(logits.dtype)  # [S+1], last: padding
        is_real = sequence < lengths.numel() - 1
        mean = is_real / (lengths[sequence] * inputs.num_global_sequences)  # what each token weighs
        aux = z = logits.new_zeros(())
        if self.losses.aux:
            num_experts = logits.shape[-1]
            counts = logits.new_zeros(lengths.numel(), num_experts)
            counts = self._over_sequences(counts.index_add_(0, sequence, routing_map.to(logits.dtype)))
            load = counts * (num_experts / self.topk) / lengths[:, None]
            aux = (load[sequence] * self._shares(logits)).sum(-1) @ mean
        if self.losses.z:
            z = logits.logsumexp(-1).square() @ mean
        share = torch.stack([aux, z]).detach().double()
        self.observed = share if self.observed is None else self.observed + share
        return (self.losses.aux or 0) * aux + (self.losses.z or 0) * z

    def _shares(self, logits: Tensor) -> Tensor:
        """Each expert's share of a token's scores."""
        if self.score_function == "softmax":
            return logits.softmax(-1)
        scores = logits.sigmoid()
        return scores / scores.sum(-1, keepdim=True)

    def _own_tokens(self, values: Tensor) -> Tensor:
        """Of [T, …], the rows that this rank's router sees: with sequence parallelism one of tp equal runs."""
        return values.chunk(self.tp_group.size())[self.tp_group.rank()] if self.config.sequence_parallel else values

    def _over_sequences(self, sums: Tensor) -> Tensor:
        """Sums over this rank's tokens, added up over the ranks that share the micro-batch's sequences."""
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(sums, group=self.tp_cp_group)
        return sums


class MoE(MoELayer):
    """Megatron's MoE layer; its router gets RouterInputs."""

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: None = None, padding_mask: RouterInputs | None = None
    ) -> tuple[Tensor, None]:
        """hidden_states [T/tp, 1, H] -> the same shape, and no bias. Megatron's layer knows the third argument by this
        name."""
        assert intermediate_tensors is None
        inputs = padding_mask

        def compute(hidden_states: Tensor) -> Tensor:
            shared = self.shared_experts_compute(hidden_states)
            probs, routing_map = self.router(hidden_states, inputs)
            dispatched, probs = self.dispatch(*self.preprocess(hidden_states, probs, routing_map))
            output, _ = self.routed_experts_compute(dispatched, probs)
            return self.postprocess(self.combine(output), shared)

        if self.moe_layer_recompute:
            return checkpoint(compute, False, hidden_states), None
        return compute(hidden_states), None


class Layer(TransformerLayer):
    """Megatron's transformer layer, which hands its MoE layer the RouterInputs found in `packed_seq_params`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_moe_layer:
            # Built as Megatron builds its own class, to which alone it gives the process groups.
            self.mlp.__class__ = MoE

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """As Megatron's, called with packed_seq_params=PackedSequences."""
        hidden_states, context = self._forward_attention(*args, **kwargs)
        inputs = kwargs["packed_seq_params"].router_inputs if self.is_moe_layer else None
        return self._forward_mlp(hidden_states, padding_mask=inputs), context


def number_routers(modules: Iterable[torch.nn.Module]) -> tuple[int, ...]:
    """Count this rank's routers in the order of their layers; returns the layers' numbers in the model, from 0."""
    routers = sorted((m for m in modules if isinstance(m, Router)), key=lambda router: router.layer_number)
    for place, router in enumerate(routers):
        router.place = place
    return tuple(router.layer_number - 1 for router in routers)


def collect_losses(
    modules: Iterable[torch.nn.Module], losses: RouterLosses, *, num_layers: int, group: Group, device: torch.device
) -> RouterLosses:
    """Values of the losses since the last call, without coefficients: mean over sequences and over the `num_layers`
    MoE layers of the whole model. Collective over `group`, all ranks, unless the losses are off."""
    if not losses.is_on:
        return RouterLosses()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for module in modules:
        if isinstance(module, Router) and module.observed is not None:
            total += module.observed
            module.observed = None
    dist.all_reduce(total, group=group)
    aux, z = (total / num_layers).tolist()
    return RouterLosses(aux if losses.aux else None, z if losses.z else None)
