"""What each rank does in the tests of recorded and replayed routes, and transformers with experts forced on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytest import MonkeyPatch
from torch import Tensor
from transformers import PreTrainedModel

from gspo_megatron.config import MemoryConfig, ModelConfig, OptimizerConfig
from gspo_megatron.data.exchange import distribute
from gspo_megatron.errors import CauseError
from gspo_megatron.groups import ProcessGroups
from gspo_megatron.policy import routing as routing_module
from gspo_megatron.policy.policy import MegatronPolicy
from gspo_megatron.policy.router import Router, RouterInputs
from gspo_megatron.policy.routing import RouterCall
from gspo_megatron.types import MicroBatch, RecordedRoutes, Sequence, StepBatch
from tests.distributed import cases
from tests.distributed.family_cases import token_weights
from tests.distributed.tiny_models import make_sequences

# -- transformers ------------------------------------------------------------------------------------------------------


def routers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """In the order of their layers. Each returns logits [T, E], gates [T, k], experts [T, k]."""
    return [m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]


def gates(router: Any, logits: Tensor, experts: Tensor) -> Tensor:
    """[T, k] what the family's router would weigh these experts by."""
    family = type(router).__name__
    if family.startswith("GptOss"):
        return logits.gather(1, experts).softmax(-1)
    if family.startswith(("Glm4", "Deepseek")):
        chosen = logits.sigmoid().gather(1, experts)
        return chosen / chosen.sum(-1, keepdim=True) * router.routed_scaling_factor
    chosen = logits.softmax(-1).gather(1, experts)
    return chosen / chosen.sum(-1, keepdim=True) if getattr(router, "norm_topk_prob", True) else chosen


@contextmanager
def observed(model: PreTrainedModel, forced: Tensor | None = None, valid: Tensor | None = None) -> Iterator[list[Any]]:
    """Of one sequence at a time: (experts taken [L, k], logits [L, E]) of each router. `forced` [L, layers, k] are
    taken where `valid` [L, layers]."""
    seen: list[Any] = [None] * len(routers(model))

    def hook(place: int, router: Any, out: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, experts = out
        if forced is not None and valid is not None:
            experts = torch.where(valid[:, place, None], forced[:, place].long(), experts)
            weights = gates(router, logits, experts)
        seen[place] = (experts, logits.detach())
        return logits, weights, experts

    def registered(place: int, router: torch.nn.Module) -> Any:
        return router.register_forward_hook(lambda module, args, out: hook(place, module, out))

    handles = [registered(i, router) for i, router in enumerate(routers(model))]
    yield seen
    for handle in handles:
        handle.remove()


# -- the policy --------------------------------------------------------------------------------------------------------


def places(micro: MicroBatch, first: int, rows: int) -> Tensor:
    """[rows, 2] Sequence.index (-1: padding) and position of tokens first … of the micro-batch."""
    at = torch.arange(first, first + rows)
    sequence = torch.searchsorted(micro.cu_seqlens.long(), at, right=True) - 1
    is_real = micro.positions[at] < micro.lengths[sequence]
    index = torch.where(is_real, micro.sequence_ids[sequence], -1)
    return torch.stack([index, micro.positions[at]], 1)


@contextmanager
def taken_experts(policy: MegatronPolicy) -> Iterator[list[Tensor]]:
    """Rows (Sequence.index, position, layer, experts ascending) of every real token of every router's call."""
    seen: list[Tensor] = []
    moe_layers = policy.fields.moe_layers

    def hook(router: Router, args: tuple[Tensor, RouterInputs], out: tuple[Tensor, Tensor]) -> None:
        rows = len(out[1])
        where = places(args[1].micro, policy.groups.coordinates.tensor * rows, rows)
        experts = out[1].nonzero()[:, 1].reshape(rows, -1)
        layer = torch.full((rows, 1), moe_layers.index(router.layer_number - 1))
        seen.append(torch.cat([where, layer, experts], 1)[where[:, 0] >= 0])

    modules = [m for chunk in policy.chunks for m in chunk.modules() if isinstance(m, Router)]
    handles = [m.register_forward_hook(hook) for m in modules]
    yield seen
    for handle in handles:
        handle.remove()


def recorded_rows(policy: MegatronPolicy, pairs: list[tuple[MicroBatch, RecordedRoutes | None]]) -> dict[str, Any]:
    """What was recorded of micro-batches, as `taken_experts` has it, and its sums over them."""
    rows, layers = [], policy.route_shape.layers
    entropy = torch.zeros(len(policy.fields.moe_layers), dtype=torch.float64)
    load = torch.zeros(len(entropy), policy.fields.num_experts or 0, dtype=torch.int64)
    for micro, recorded in pairs:
        assert recorded is not None and recorded.layers == layers
        where = places(micro, recorded.first_token, len(recorded.experts))
        assert torch.equal(where[:, 0] >= 0, recorded.is_real)
        for i, layer in enumerate(layers):
            parts = [where, torch.full((len(where), 1), layer), recorded.experts[:, i].long().sort(1).values]
            rows.append(torch.cat(parts, 1)[recorded.is_real])
        entropy[list(layers)] += recorded.entropy
        load[list(layers)] += recorded.load
    return {"rows": _joined(rows), "entropy": entropy, "load": load}


def _joined(rows: list[Tensor]) -> Tensor:
    return torch.cat(rows) if rows else torch.empty(0, 0, dtype=torch.int64)


def with_routes(sequences: list[Sequence], routes: dict[int, tuple[Tensor, Tensor]] | None) -> list[Sequence]:
    """The sequences as the engine would have returned them."""
    return [
        s if routes is None else dataclasses.replace(s, routes=routes[s.index][0], routes_valid=routes[s.index][1])
        for s in sequences
    ]


def replay(
    layout: dict[str, int], modes: dict[str, dict[int, tuple[Tensor, Tensor]] | None], **settings: Any
) -> dict[str, dict[str, Any]]:
    """`replay_mode` for each of the modes, with the routes that the engine returns."""
    groups = cases.join(layout)
    return {mode: replay_mode(groups, mode=mode, routes=routes, **settings) for mode, routes in modes.items()}


def replay_mode(
    groups: ProcessGroups,
    folder: str,
    perturbed: str,
    lengths: list[int],
    vocab: int,
    token_budget: int,
    mode: str,
    routes: dict[int, tuple[Tensor, Tensor]] | None,
    recompute: str = "none",
    mini_batches: int = 2,
    sabotage: str = "",
    checked_steps: int = 8,
) -> dict[str, Any]:
    """A rollout batch whose routers change between what is recorded and what is trained.

    The weights of `folder` are those of the old policy, or of the engine; those of `perturbed` train. Log-probabilities
    and gradients of the training passes, summed over optimizer steps that change no weight.
    """
    policy = MegatronPolicy(
        ModelConfig(path=folder, routing_replay=mode),  # type: ignore[arg-type]
        OptimizerConfig(),
        groups,
        seed=0,
        total_steps=10,
        memory=MemoryConfig(recompute=recompute),  # type: ignore[arg-type]
    )
    batches = distribute(
        cases.scatter(groups, with_routes(make_sequences(lengths, vocab, seed=3), routes)),
        groups,
        mini_batches=mini_batches,
        token_budget=token_budget,
        pad_token_id=0,
        device=policy.device,
        routes=policy.route_shape if routes else None,
    )
    micros = [micro for batch in batches for micro in batch.micro_batches]
    if mode == "r3":
        policy.weights.load(perturbed)
    policy.fill_old_logprobs(batches, record_routes=mode == "off")
    recorded = recorded_rows(policy, [(m, m.recorded) for m in micros]) if mode != "r3" else {}
    policy.weights.load(perturbed)
    gradients: dict[str, Tensor] = {}

    def keep_gradients() -> Any:
        for name, tensor in cases.whole_gradients(policy).items():
            gradients[name] = gradients.get(name, 0) + tensor
        return True, 0.0, None

    policy.optimizer.step = keep_gradients
    logprobs: dict[int, tuple[Tensor, Tensor]] = {}
    error, results = "", []
    with taken_experts(policy) as taken, MonkeyPatch.context() as patch:
        patch.setattr(routing_module, "CHECKED_STEPS", checked_steps)
        if sabotage == "ignored":
            patch.setattr(RouterCall, "get_replay_topk", lambda call, *args: args[-1](*args[:-1]))
        try:
            results = [policy.train_step(batch, _weighted_loss(lengths, logprobs)) for batch in batches]
        except CauseError as caught:
            error = str(caught)
    after = [r for batch in policy.routes(batches) for r in batch] if mode == "off" else []
    return {
        "logprobs": logprobs,
        "old": _old_logprobs(batches),
        "gradients": gradients,
        "taken": _joined(taken),
        "recorded": recorded,
        "after": recorded_rows(policy, list(zip(micros, after, strict=True))) if after else {},
        "replayed": [r.routing_replayed for r in results],
        "num_micro_batches": len(micros),
        "error": error,
    }


def _by_sequence(micro: MicroBatch, values: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(Sequence.index, positions, values) of the response tokens."""
    starts = micro.cu_seqlens.tolist()
    for i, index in enumerate(micro.sequence_ids.tolist()):
        if index >= 0:
            at = slice(starts[i], starts[i + 1])
            mask = micro.response_mask[at]
            yield index, micro.positions[at][mask], values[at][mask]


def _old_logprobs(batches: list[StepBatch]) -> dict[int, tuple[Tensor, Tensor]]:
    micros = [m for batch in batches for m in batch.micro_batches if m.old_logprobs is not None]
    return {
        index: (positions, values)
        for micro in micros
        for index, positions, values in _by_sequence(micro, micro.old_logprobs)  # type: ignore[arg-type]
    }


def _weighted_loss(lengths: list[int], logprobs: dict[int, tuple[Tensor, Tensor]]) -> Any:
    def loss(values: Tensor, entropy: Tensor, micro: MicroBatch) -> tuple[Tensor, None]:
        total = values.sum() * 0
        for index, positions, own in _by_sequence(micro, values):
            logprobs[index] = (positions, own.detach())
            total = total + own @ token_weights(index, lengths[index])[positions]
        return total, None

    return loss


def engine_gap(
    layout: dict[str, int], folder: str, sequences: list[Sequence], token_budget: int, mode: str
) -> dict[str, float]:
    """Mean k3 estimate of KL(engine, trainer) over the response tokens of sequences that an engine has sampled, and the
    share of (token, layer) pairs of theirs in which the trainer's routers choose other experts than the engine took."""
    groups = cases.join(layout)
    policy = MegatronPolicy(
        ModelConfig(path=folder, routing_replay=mode),  # type: ignore[arg-type]
        OptimizerConfig(),
        groups,
        seed=0,
        total_steps=10,
    )
    batches = distribute(
        sequences,
        groups,
        mini_batches=1,
        token_budget=token_budget,
        pad_token_id=0,
        device=policy.device,
        routes=policy.route_shape,
    )
    policy.fill_old_logprobs(batches, record_routes=True)
    total, tokens, differing, pairs = 0.0, 0, 0, 0
    for micro in batches[0].micro_batches:
        recorded = micro.recorded
        assert micro.old_logprobs is not None and recorded is not None
        assert micro.routes is not None and micro.routes_valid is not None
        gap = (micro.old_logprobs - micro.rollout_logprobs)[micro.response_mask].double()
        total, tokens = total + float((gap.expm1() - gap).sum()), tokens + len(gap)
        ours, theirs = (x[micro.routes_valid].sort(-1).values for x in (recorded.experts, micro.routes))
        differing, pairs = differing + int((ours != theirs).any(-1).sum()), pairs + ours.shape[0] * ours.shape[1]
    return {"kl": total / tokens, "tokens": tokens, "differing": differing / pairs}
