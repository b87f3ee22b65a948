"""What each rank does in the tests of the router's losses, and the definition they compare with."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer
from pytest import MonkeyPatch
from torch import Tensor

from gspo_megatron.config import ModelConfig, OptimizerConfig
from gspo_megatron.data.exchange import distribute
from gspo_megatron.policy import model as model_module
from gspo_megatron.policy import step as step_module
from gspo_megatron.policy.attention import packed_sequences
from gspo_megatron.policy.policy import MegatronPolicy
from gspo_megatron.policy.router import Router, RouterInputs, RouterLosses, collect_losses
from gspo_megatron.policy.step import forward_backward
from gspo_megatron.types import MicroBatch
from tests.distributed.cases import join, optimizer_step, scatter, step_sequences, whole_gradients


def plain_losses(logits: Tensor, chosen: Tensor, sequences: list[Tensor], num_sequences: int) -> tuple[Tensor, Tensor]:
    """The definition, one sequence after the other: aux and z of one layer.

    logits [T, E], chosen [T, E] bool; of each sequence, the places of its real tokens.
    """
    num_experts = logits.shape[1]
    aux, z = logits.new_zeros(()), logits.new_zeros(())
    for tokens in sequences:
        k = int(chosen[tokens][0].sum())
        load = num_experts / (k * len(tokens)) * chosen[tokens].double().sum(0)
        probability = logits[tokens].exp() / logits[tokens].exp().sum(1, keepdim=True)
        aux = aux + (load * probability.mean(0)).sum() / num_sequences
        z = z + logits[tokens].exp().sum(1).log().pow(2).mean() / num_sequences
    return aux, z


def alone(
    layout: dict[str, int], folder: str, vocab: int, token_budget: int, coefficients: dict[str, float]
) -> dict[str, Any]:
    """Gradients of all weights and values by the routers' losses alone; the same by the definition in float64, from
    the logits of a forward pass without them. One rank."""
    groups = join(layout)
    model = ModelConfig(path=folder, **coefficients)
    policy = MegatronPolicy(model, OptimizerConfig(), groups, seed=0, total_steps=10)
    [batch] = distribute(
        scatter(groups, step_sequences(vocab)),
        groups,
        mini_batches=1,
        token_budget=token_budget,
        pad_token_id=0,
        device=policy.device,
    )
    [chunk] = policy.chunks
    chunk.zero_grad_buffer()
    forward_backward(
        policy.chunks,
        batch.micro_batches,
        lambda logprobs, entropy, micro: ((logprobs * 0).sum(), None),
        groups,
        num_global_sequences=batch.num_global_sequences,
    )
    layers = len(policy.fields.moe_layers)
    where = {"num_layers": layers, "group": groups.world, "device": policy.device}
    values = collect_losses(chunk.modules(), policy.router_losses, **where)
    gradients = whole_gradients(policy)

    captured: list[tuple[Tensor, Tensor]] = []
    for module in chunk.modules():
        if isinstance(module, Router):
            module.losses = RouterLosses()
            module.register_forward_hook(lambda m, args, out: captured.append((_logits(m, args[0]), out[1])))
    parameters = policy.weights.parameters
    total = [torch.zeros_like(p) for p in parameters]
    aux = z = 0.0
    for micro in batch.micro_batches:
        captured.clear()
        packed = packed_sequences(micro.cu_seqlens, micro.max_seqlen, context_rank=0, context_size=1)
        chunk.module(
            micro.token_ids[None],
            micro.positions[None],
            None,
            labels=micro.targets[None],
            loss_mask=micro.response_tokens,
            packed_seq_params=packed,
        )
        bounds = micro.cu_seqlens.tolist()
        spans = [torch.arange(a, b) for a, b in itertools.pairwise(bounds)]
        terms = [plain_losses(logits, chosen, spans, batch.num_global_sequences) for logits, chosen in captured]
        loss = sum(coefficients["router_aux_loss"] * a + coefficients["router_z_loss"] * b for a, b in terms)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        total = [t if g is None else t + g for t, g in zip(total, found, strict=True)]
        aux += sum(float(a) for a, _ in terms) / layers
        z += sum(float(b) for _, b in terms) / layers
    by_parameter = {id(p): g for p, g in zip(parameters, total, strict=True)}
    local = {name: slot.of(by_parameter[id(slot.parameter)]) for name, slot in policy.weights.slots.items()}
    expected = {
        t.name: t.tensor.clone()
        for bucket in policy.weights.export(policy.weights.plan([[0]], dtype=torch.float32), local)
        for t in bucket
    }
    return {
        "gradients": gradients,
        "expected": expected,
        "values": (values.aux, values.z),
        "expected_values": (aux, z),
        "num_micro_batches": len(batch.micro_batches),
    }


def step(sabotage: str = "", **kwargs: Any) -> dict[str, Any]:
    """`optimizer_step`, with how often this rank computed the losses, and for how many routers and micro-batches.

    `sabotage`: "n" (N counts what is in the micro-batch), "reduction" (a rank's own token counts), "padding" (counts
    as tokens), "megatron" (Megatron's own layers and routers).
    """
    calls: list[int] = []
    compute = Router._loss

    def counted(router: Router, *args: Any) -> Tensor:
        calls.append(id(router))
        return compute(router, *args)

    with MonkeyPatch.context() as patch:
        patch.setattr(Router, "_loss", counted)
        if sabotage == "n":
            patch.setattr(
                step_module, "RouterInputs", lambda micro, n, told: RouterInputs(micro, _num_sequences(micro), told)
            )
        if sabotage == "reduction":
            patch.setattr(Router, "_over_sequences", lambda router, sums: sums)
        if sabotage == "padding":
            patch.setattr(step_module, "RouterInputs", _WithPadding)
        if sabotage == "megatron":
            patch.setattr(model_module, "_block_spec", _megatrons_spec)
        result = optimizer_step(**kwargs)
    return result | {"calls": len(calls), "routers": len(set(calls))}


def _logits(router: Router, hidden: Tensor) -> Tensor:
    return hidden.flatten(0, 1).double() @ router.weight.double().T


def _num_sequences(micro: MicroBatch) -> int:
    return max(1, int((micro.lengths > 0).sum()))


class _WithPadding(RouterInputs):
    @property
    def sequence(self) -> Tensor:  # type: ignore[override]
        cu_seqlens = self.micro.cu_seqlens.long()
        return torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff())


_our_spec = model_module._block_spec


def _megatrons_spec(*args: Any) -> Any:
    spec = _our_spec(*args)
    for layer in spec.layer_specs:
        layer.module = TransformerLayer
        layer.submodules.mlp.submodules.router = TopKRouter
    return spec
