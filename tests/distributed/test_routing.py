"""Routes recorded and replayed, against transformers with the same experts forced on it.

The routers' weights change between what is recorded, or what the engine chose, and what trains: more than 5 % of the
expert sets would be others. Every training pass must take the recorded ones, with the gates of the new weights, and
give the routers their gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gspo_megatron.parallel import ParallelLayout
from tests.distributed import family_models
from tests.distributed.family_cases import token_weights
from tests.distributed.rank_pool import RankPool
from tests.distributed.routing_cases import observed, routers
from tests.distributed.test_families import check_gradients
from tests.distributed.test_parity import LAYOUTS, name_of
from tests.distributed.tiny_models import make_sequences

Ranks = Callable[[int], RankPool]
LENGTHS = [9, 14, 6, 21, 11, 8, 17, 5, 4, 10, 26, 7]
BUDGET = 27
Known = Callable[..., Any]
Routes = dict[int, tuple[Tensor, Tensor]]


class Truth:
    """A family's two models, and what transformers makes of them; the routes of a sequence are [L, layers, k]."""

    def __init__(self, family: str, base: Path) -> None:
        self.sequences = make_sequences(LENGTHS, family_models.VOCAB, seed=3)
        before, self.model = family_models.make(family), family_models.make(family)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for router in routers(self.model):
                router.weight += 0.1 * torch.randn(router.weight.shape, generator=generator)
        self.folder, self.perturbed, self.base = base / "before", base / "perturbed", base
        before.save_pretrained(self.folder)
        self.model.save_pretrained(self.perturbed)
        self.chosen, self.logits = self._choices(before)

    def _choices(self, model: PreTrainedModel) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Experts [L, layers, k] and logits [L, layers, E] of a model's routers, by sequence."""
        chosen, logits = {}, {}
        for s in self.sequences:
            with torch.no_grad(), observed(model) as seen:
                model(input_ids=s.token_ids[None])
            chosen[s.index], logits[s.index] = (torch.stack(list(x), 1) for x in zip(*seen, strict=True))
        return chosen, logits

    def own_choice(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Experts and logits of the perturbed model's routers."""
        return self._choices(self.model)

    def engine_routes(self) -> Routes:
        """What an engine would return: nothing of the last token, and here and there nothing either."""
        generator = torch.Generator().manual_seed(8)
        routes = {}
        for index, chosen in self.chosen.items():
            valid = torch.rand(len(chosen) - 1, generator=generator) > 0.2
            experts = torch.where(valid[:, None, None], chosen[:-1], 0)
            routes[index] = (experts.to(torch.int16), valid)
        twice, outside = routes[3], routes[10]
        twice[1][4], outside[1][7] = True, True
        twice[0][4, -1] = twice[0][4, -1, :1]  # one layer: one expert for all
        outside[0][7, 0, 0] = 200
        return routes

    def forced(self, routes: Routes | None) -> Routes:
        """[L, layers, k] experts and [L, layers] where they are forced; `routes` None: everywhere what was chosen."""
        if routes is None:
            return {i: (c, torch.ones(c.shape[:2], dtype=torch.bool)) for i, c in self.chosen.items()}
        forced = {}
        for index, (experts, valid) in routes.items():
            num_experts = self.logits[index].shape[-1]
            ordered = experts.long().sort(-1).values
            fits = (ordered[..., 1:] != ordered[..., :-1]).all(-1) & (ordered[..., -1] < num_experts)
            mask = torch.cat([valid[:, None] & fits, torch.zeros(1, fits.shape[1], dtype=torch.bool)])
            forced[index] = (torch.cat([experts.long().clamp(max=num_experts - 1), self.chosen[index][-1:]]), mask)
        return forced

    def trained(self, routes: Routes | None) -> dict[str, Any]:
        """Log-probabilities, gradients and expert sets of the perturbed model with experts forced."""
        self.model.zero_grad()
        logprobs, taken = {}, {}
        forced, own = self.forced(routes), self.own_choice()[0]
        before, after = (torch.cat(list(x.values())).sort(-1).values for x in (self.chosen, own))
        flipped = float((before != after).any(-1).float().mean())
        assert flipped >= 0.05, f"{flipped:.1%} of the sets change by themselves"
        for s in self.sequences:
            with observed(self.model, *forced[s.index]) as seen:
                logits = self.model(input_ids=s.token_ids[None]).logits[0]
            taken[s.index] = torch.stack([experts for experts, _ in seen], 1).sort(-1).values
            targets, mask = s.token_ids[1:], s.response_mask[1:]
            values = logits[:-1].log_softmax(-1).gather(1, targets[:, None])[:, 0]
            (values[mask] @ token_weights(s.index, len(s.token_ids))[:-1][mask]).backward()
            logprobs[s.index] = (mask.nonzero()[:, 0], values[mask].detach())
        state = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        gradients = family_models.gradients(self.model, self.base / "gradients")
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state[name])
        half = len(LENGTHS) // 2
        masks = [torch.cat([forced[i][1] for i in part]) for part in (range(half), range(half, 2 * half))]
        fractions = [float(mask.double().mean()) for mask in masks]  # of the two mini-batches
        return {"logprobs": logprobs, "taken": taken, "gradients": gradients, "fractions": fractions}


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Known:
    """truth(family) -> its Truth; truth(family, mode) -> its training pass under replay."""
    known: dict[str, Any] = {}

    def get(family: str, mode: str = "") -> Any:
        key = family + mode
        if key not in known and mode:
            of_family = get(family)
            known[key] = of_family.trained(of_family.engine_routes() if mode == "r3" else None)
        elif key not in known:
            known[key] = Truth(family, tmp_path_factory.mktemp(family))
        return known[key]

    return get


def train(
    of_family: Truth, ranks: Ranks, layout: dict[str, int], *modes: str, routes: Routes | None = None, **more: Any
) -> list[list[dict[str, Any]]]:
    """[mode][rank] what came of it; `routes` are those of the engine."""
    results = ranks(ParallelLayout(**layout).world_size).run(
        "tests.distributed.routing_cases:replay",
        layout=layout,
        modes={mode: (routes or of_family.engine_routes()) if mode == "r3" else None for mode in modes},
        folder=str(of_family.folder),
        perturbed=str(of_family.perturbed),
        lengths=LENGTHS,
        vocab=family_models.VOCAB,
        token_budget=BUDGET,
        **more,
    )
    return [[result[mode] for result in results] for mode in modes]


def differing_sets(parts: list[Tensor], expected: dict[int, Tensor], *, times: int = 1) -> float:
    """Share of the expert sets that all ranks saw that are not the expected ones; each (token, layer) must be there."""
    rows = torch.cat([part for part in parts if part.numel()])
    counts = {i: torch.zeros(x.shape[:2], dtype=torch.int64) for i, x in expected.items()}
    wrong = 0
    for index, position, layer, *experts in rows.tolist():
        counts[index][position, layer] += 1
        wrong += experts != expected[index][position, layer].tolist()
    assert all((c == times).all() for c in counts.values()), "a token is missing in a layer, or there too often"
    return wrong / len(rows)


def largest_gap(results: list[dict[str, Any]], expected: Routes, key: str = "logprobs") -> float:
    gap = 0.0
    seen = {i: torch.full((n,), torch.nan) for i, n in enumerate(LENGTHS)}
    for result in results:
        for index, (positions, values) in result[key].items():
            seen[index][positions] = values
    for index, (positions, values) in expected.items():
        assert torch.equal(seen[index].isfinite().nonzero()[:, 0], positions)
        gap = max(gap, float((seen[index][positions] - values).abs().max()))
    return gap


def check_recorded(parts: list[dict[str, Any]], chosen: Routes, logits: dict[int, Tensor]) -> None:
    """Experts, entropy and load are those that transformers' routers gave, each token and layer on one rank."""
    assert differing_sets([p["rows"] for p in parts], {i: c.sort(-1).values for i, c in chosen.items()}) == 0
    all_logits, all_chosen = (torch.cat(list(x.values())) for x in (logits, chosen))
    probs = all_logits.double().softmax(-1)
    entropy = -(probs * probs.log()).sum((0, 2))
    assert torch.allclose(sum(p["entropy"] for p in parts), entropy, rtol=1e-6)
    load = torch.stack([torch.bincount(c.flatten(), minlength=probs.shape[-1]) for c in all_chosen.unbind(1)])
    assert torch.equal(sum(p["load"] for p in parts), load)


def check(results: list[dict[str, Any]], expected: dict[str, Any], mode: str, *, times: int = 1) -> None:
    assert results[0]["error"] == ""
    assert differing_sets([r["taken"] for r in results], expected["taken"], times=times) == 0
    assert largest_gap(results, expected["logprobs"]) <= 1e-5
    if mode == "r3":
        assert largest_gap(results, expected["logprobs"], "old") <= 1e-5
    check_gradients(results[0]["gradients"], expected["gradients"])
    for result in results:
        assert result["replayed"] == pytest.approx(expected["fractions"], rel=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_training_takes_the_replayed_experts(layout: dict[str, int], truth: Known, ranks: Ranks) -> None:
    model = truth("qwen3_moe")
    r2, r3 = train(model, ranks, layout, "r2", "r3")
    assert r2[0]["num_micro_batches"] > 2
    check(r2, truth("qwen3_moe", "r2"), "r2")
    check(r3, truth("qwen3_moe", "r3"), "r3")
    check_recorded([r["recorded"] for r in r2], model.chosen, model.logits)


@pytest.mark.parametrize("recompute", ["full", "moe", "selective"])
@pytest.mark.parametrize(
    ("layout", "mode"),
    [
        ({"pipeline": 2, "virtual_pipeline": 2}, "r3"),
        ({"context": 2, "tensor": 2, "expert": 2, "expert_tensor": 2}, "r2"),
    ],
    ids=lambda x: x if isinstance(x, str) else name_of(x),
)
def test_layers_computed_again_take_them_too(
    layout: dict[str, int], mode: str, recompute: str, truth: Known, ranks: Ranks
) -> None:
    """Several micro-batches are in flight."""
    [results] = train(truth("qwen3_moe"), ranks, layout, mode, recompute=recompute)
    check(results, truth("qwen3_moe", mode), mode, times=1 if recompute == "selective" else 2)


@pytest.mark.parametrize("family", [f for f in family_models.CONFIGS if f not in ("qwen3", "qwen3_moe")])
def test_every_family(family: str, truth: Known, ranks: Ranks) -> None:
    """Softmax before and after the choice, sigmoids with a selection bias that is no part of the gates, groups."""
    for mode, results in zip(("r2", "r3"), train(truth(family), ranks, {}, "r2", "r3"), strict=True):
        check(results, truth(family, mode), mode)


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "data": 2, "expert": 2}], ids=name_of)
def test_without_replay_the_routers_choose(layout: dict[str, int], truth: Known, ranks: Ranks) -> None:
    model, replayed = truth("qwen3_moe"), truth("qwen3_moe", "r2")
    [results] = train(model, ranks, layout, "off")
    assert results[0]["replayed"] == [None, None]
    assert differing_sets([r["taken"] for r in results], replayed["taken"]) >= 0.05
    assert largest_gap(results, replayed["logprobs"]) > 1e-2
    check_recorded([r["recorded"] for r in results], model.chosen, model.logits)
    check_recorded([r["after"] for r in results], *model.own_choice())


def test_replay_without_effect_ends_the_run(truth: Known, ranks: Ranks) -> None:
    modes = ("r2", "r3")
    for mode, [result] in zip(modes, train(truth("qwen3_moe"), ranks, {}, *modes, sabotage="ignored"), strict=True):
        assert f'model.routing_replay="{mode}" has no effect' in result["error"]
        assert 'use routing_replay="off"' in result["error"]


def test_a_batch_without_any_route_ends_the_run(truth: Known, ranks: Ranks) -> None:
    model = truth("qwen3_moe")
    routes = {index: (experts, valid & False) for index, (experts, valid) in model.engine_routes().items()}
    [[result]] = train(model, ranks, {}, "r3", routes=routes)
    assert result["error"] == 'model.routing_replay="r3" has nothing to replay: no token of the rollouts has a route'


def test_only_the_first_steps_are_checked(truth: Known, ranks: Ranks) -> None:
    [[result]] = train(truth("qwen3_moe"), ranks, {}, "r2", sabotage="ignored", checked_steps=0)
    assert result["error"] == "" and result["replayed"] == [1, 1]
