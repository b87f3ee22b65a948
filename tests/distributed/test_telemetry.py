"""Every telemetry value through the real policy, against brute force on everything that was gathered."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gspo_megatron.parallel import ParallelLayout
from tests.distributed import tiny_models
from tests.distributed.rank_pool import RankPool
from tests.distributed.telemetry_cases import LENGTHS, MINI_BATCHES, batch, engine_routes
from tests.distributed.test_training import MODEL

LAYOUTS: dict[str, dict[str, int]] = {
    "one rank": {},
    "TP2 x EP2": {"tensor": 2, "expert": 2},
    "PP2": {"pipeline": 2},
    "CP2 x DP2": {"context": 2, "data": 2, "expert": 2},
}
CLIP_LOW, CLIP_HIGH = 3e-3, 4e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.write(tmp_path_factory.mktemp("models") / "moe", "moe"))


Measure = Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def measure(folder: str, ranks: Callable[[int], RankPool], tmp_path_factory: pytest.TempPathFactory) -> Measure:
    """(row, what each rank saw) of the batch in a layout."""
    made: dict[str, Any] = {}

    def run(layout: dict[str, int], **settings: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        key = repr((layout, settings))
        if key not in made:
            run_folder = tmp_path_factory.mktemp("run")
            seen = ranks(ParallelLayout(**layout).world_size).run(
                "tests.distributed.telemetry_cases:measured_row",
                layout=layout,
                folder=folder,
                tokenizer=MODEL,
                run_folder=str(run_folder),
                vocab=tiny_models.VOCAB,
                **settings,
            )
            [line] = (run_folder / "metrics.jsonl").read_text().splitlines()
            made[key] = json.loads(line), seen
        return made[key]

    return run


def sequences(seen: list[dict[str, Any]]) -> dict[tuple[int, int], np.ndarray]:
    """By (mini-batch, sequence): [4, T] new, old, engine log-probabilities and entropies of its response tokens."""
    parts: dict[tuple[int, int], list[np.ndarray]] = defaultdict(list)
    for rank in seen:
        for item in rank["tokens"]:
            parts[item["mini_batch"], item["index"]].append(item["values"].numpy())
    return {key: np.concatenate(part, axis=1) for key, part in sorted(parts.items()) if key[1] >= 0}


def brute_force(seen: list[dict[str, Any]]) -> dict[str, Any]:
    """The row's telemetry, from one number a token and the definitions."""
    data = sequences(seen)
    assert len(data) == len(LENGTHS)
    advantage = {s.index: float(s.advantages) for s in batch(tiny_models.VOCAB)}
    real = {key: x for key, x in data.items() if x.shape[1]}
    log_s = {key: float((x[0] - x[1]).mean()) for key, x in real.items()}
    log_w = {key: float((x[0] - x[1]).sum()) for key, x in real.items()}
    row: dict[str, Any] = {
        "log_ratio_sequence_std": float(np.std(list(log_s.values()))),
        "log_weight_sequence_std": float(np.std(list(log_w.values()))),
        "log_ratio_sequence_max_abs": max(map(abs, log_s.values())),
        "log_ratio_length_slope": slope(log_s, real),
        "log_weight_length_slope": slope(log_w, real),
    }
    for q in (1, 50, 99):
        row[f"log_ratio_sequence_p{q:02d}"] = float(np.percentile(list(log_s.values()), q))
    for name, logs in (("sequence", log_s), ("weight", log_w)):
        w = np.exp(list(logs.values()))
        row[f"ess_fraction_{name}"] = float(w.sum() ** 2 / (len(w) * (w**2).sum()))

    new, old, engine, entropy = np.concatenate(list(real.values()), axis=1)
    row["entropy"] = float(entropy.mean())
    row["token_ratio_max"] = float(np.exp(new - old).max())
    row["rollout_trainer_correlation"] = float(np.corrcoef(old, engine)[0, 1])
    row["rollout_trainer_slope"] = float(np.polyfit(old, engine, 1)[0])
    row["sync_probe_max_abs"] = float(np.abs(old - engine).max())
    for name, p, q in (("kl_rollout_trainer", engine, old), ("kl_staleness", old, new), ("kl_total", engine, new)):
        row[f"{name}_k1"] = float((p - q).mean())
        row[name] = float((np.exp(q - p) - 1 - (q - p)).mean())

    clipped = {
        (j, i): (s > math.log(1 + CLIP_HIGH) and advantage[i] > 0) or (s < math.log(1 - CLIP_LOW) and advantage[i] < 0)
        for (j, i), s in log_s.items()
        if advantage[i] != 0
    }

    def share(keys: list[tuple[int, int]], weight: Callable[[tuple[int, int]], int]) -> float | None:
        total = sum(weight(k) for k in keys)
        return sum(weight(k) for k in keys if clipped[k]) / total if total else None

    def fractions(keys: list[tuple[int, int]]) -> dict[str, float | None]:
        return {
            "clip_fraction_token": share(keys, lambda k: real[k].shape[1]),
            "clip_fraction_sequence": share(keys, lambda k: 1),
            "clip_fraction_positive": share([k for k in keys if advantage[k[1]] > 0], lambda k: 1),
            "clip_fraction_negative": share([k for k in keys if advantage[k[1]] < 0], lambda k: 1),
        }

    row |= fractions(list(clipped))
    each = [fractions([k for k in clipped if k[0] == j]) for j in range(MINI_BATCHES)]
    row |= {f"{name}_mini_batches": [part[name] for part in each] for name in each[0]}
    row["grad_norm_max"] = max(seen[0]["grad_norms"])
    row |= routes(seen)
    norms = expert_norms(seen[0]["gradients"])
    layers = (norms.max(2) / np.median(norms, axis=2)).mean(0).tolist()
    row |= {"expert_gradient_spread_layers": layers, "expert_gradient_spread": max(layers)}
    return row


def routes(seen: list[dict[str, Any]]) -> dict[str, Any]:
    """Of every (token, layer) once: experts before and after the updates, the engine's, and what they come to."""
    before, after = ({row[:3]: row[3:] for rank in seen for row in rank["routes"][i]} for i in (0, 1))
    assert len(before) == sum(len(rank["routes"][0]) for rank in seen) == 4 * sum(LENGTHS)
    assert before.keys() == after.keys()
    changed = {key: before[key][0] != after[key][0] for key in before}
    differs, load = {}, np.zeros((4, 8))
    for (index, position, layer), (experts, _) in before.items():
        load[layer, experts] += 1
        given, valid = engine_routes(index)
        if position < len(valid) and valid[position]:
            differs[index, position, layer] = sorted(given[position, layer].tolist()) != experts
    entropy = {key: h for key, (_, h) in before.items()}
    row: dict[str, Any] = {}
    for name, values in (
        ("expert_change_fraction", changed),
        ("expert_mismatch_fraction", differs),
        ("router_entropy", entropy),
    ):
        row[name] = float(np.mean(list(values.values())))
        row[f"{name}_layers"] = [np.mean([x for key, x in values.items() if key[2] == n]) for n in range(4)]
    row["expert_load_max_layers"] = (load.max(1) / load.mean(1)).tolist()
    row["expert_load_max"] = max(row["expert_load_max_layers"])
    row["dead_experts_layers"] = (load == 0).sum(1).tolist()
    row["dead_experts"] = sum(row["dead_experts_layers"])
    return row


def slope(logs: dict[tuple[int, int], float], real: dict[tuple[int, int], np.ndarray]) -> float:
    """Weighted fit of log std against log T over half-octaves, mini-batch 0 left out."""
    bins: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for key in logs:
        if key[0] > 0:
            bins[math.floor(2 * math.log2(real[key].shape[1]))].append(key)
    points = []
    for keys in bins.values():
        if len(keys) >= 8:
            parts = [[logs[k] for k in keys if k[0] == j] for j in range(MINI_BATCHES)]
            squares = sum(len(p) * np.var(p) for p in parts if p)
            freedom = sum(len(p) - 1 for p in parts if p)
            at = np.mean([math.log(real[k].shape[1]) for k in keys])
            points.append((at, math.log(math.sqrt(squares / freedom)), math.sqrt(freedom)))
    assert len(points) >= 3
    x, y, w = zip(*points, strict=True)
    return float(np.polyfit(x, y, 1, w=w)[0])


def expert_norms(steps: list[dict[str, torch.Tensor]]) -> np.ndarray:
    """[steps, layers, experts]"""
    norms = []
    for gradients in steps:
        squares: dict[tuple[int, int], float] = defaultdict(float)
        for name, g in gradients.items():
            parts = name.split(".")
            if "experts" in parts:
                squares[int(parts[2]), int(parts[5])] += float(g.double().square().sum())
        norms.append(np.sqrt([[squares[layer, e] for e in range(8)] for layer in range(4)]))
    return np.array(norms)


def check_expert_norms(seen: list[dict[str, Any]]) -> None:
    """Every rank has the norms of all experts of the model."""
    truth = expert_norms(seen[0]["gradients"])
    assert truth.shape == (MINI_BATCHES, 4, 8) and truth.min() > 0
    for rank in seen:
        np.testing.assert_allclose(torch.stack(rank["expert_gradient_norms"]).numpy(), truth, rtol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_value_equals_brute_force(name: str, measure: Measure) -> None:
    row, seen = measure(LAYOUTS[name])
    expected = brute_force(seen)
    for key, value in expected.items():
        # log s is a float32 of the kernel; a token's ratio one of the loss.
        assert row[key] == pytest.approx(value, rel=2e-4, abs=1e-7), key
    assert 0.02 < expected["clip_fraction_negative"] < 0.98 and 0.02 < expected["clip_fraction_positive"] < 0.98
    assert expected["clip_fraction_sequence_mini_batches"][0] == 0
    assert expected["expert_gradient_spread"] > 1.2
    check_expert_norms(seen)
    assert 0.001 < expected["expert_change_fraction"] < 0.2
    assert 0.9 < expected["expert_mismatch_fraction"] < 1
    assert expected["kl_total"] > expected["kl_staleness"] > 1e-7


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_every_layout_measures_the_same(name: str, measure: Measure) -> None:
    truth, seen = measure(LAYOUTS["one rank"])
    row, _ = measure(LAYOUTS[name])
    for key in brute_force(seen):
        # The weights after an optimizer step differ by rounding, and a ratio is a small difference of them.
        assert row[key] == pytest.approx(truth[key], rel=2e-3, abs=1e-6), key


@pytest.mark.parametrize("layout", [{"data": 2}, {"tensor": 2, "expert_tensor": 2}], ids=["DP2", "TP2 x ETP2"])
def test_expert_gradients_without_the_distributed_optimizer(layout: dict[str, int], measure: Measure) -> None:
    """No shard has an owner: ranks that hold the same gradient count it once."""
    _, seen = measure(layout, distributed=False)
    check_expert_norms(seen)
