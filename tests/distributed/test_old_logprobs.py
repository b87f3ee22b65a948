"""Engine log-probs as old ones: only behind the gate, in every layout, with the real engine and policy."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from gspo_megatron.parallel import ParallelLayout
from tests.distributed.rank_pool import RankPool
from tests.distributed.test_training import CONFIG, name_of

LAYOUTS = [{}, {"tensor": 2, "expert": 2}, {"pipeline": 2}, {"context": 2}]


def run(
    ranks: Callable[[int], RankPool],
    layout: dict[str, int],
    temperatures: list[float],
    resumed: int = 0,
    trained: tuple[float, ...] = (),
    telemetry_every: int = 0,
    **algorithm: Any,
) -> list[dict[str, Any]]:
    config = {
        **CONFIG,
        "algorithm": {**CONFIG["algorithm"], "old_logprobs_every": 3, **algorithm},
        "telemetry": {"every": telemetry_every},
    }
    return ranks(ParallelLayout(**layout).world_size).run(
        "tests.distributed.telemetry_cases:bypass",
        layout=layout,
        config=config,
        temperatures=temperatures,
        resumed=resumed,
        trained=list(trained),
    )


def sources(results: list[dict[str, Any]]) -> list[bool]:
    """Of each rollout batch, whether the engine's log-probs were used: the same on all ranks that hold some."""
    used = []
    for number in range(len(results[0]["batches"])):
        seen = {x for r in results for x in r["batches"][number]["is_engine"]}
        assert len(seen) == 1
        used.append(seen.pop())
        assert all((r["batches"][number]["saved_s"] is not None) == used[-1] for r in results)
        assert not any(x for r in results for x in r["batches"][number]["is_shared"]), "two fields, two tensors"
    return used


@pytest.mark.parametrize(
    ("layout", "mode"),
    [*((layout, "rollout") for layout in LAYOUTS), ({}, "auto")],
    ids=lambda x: x if isinstance(x, str) else name_of(x),
)
def test_the_engines_are_used_between_measurements(
    layout: dict[str, int], mode: str, ranks: Callable[[int], RankPool]
) -> None:
    results = run(ranks, layout, [1.0] * 5, old_logprobs=mode)
    assert sources(results) == [False, True, True, False, True]
    assert all(r["error"] is None and not r["logged"] for r in results)
    [rows] = [[b["row"] for b in r["batches"]] for r in results if r["batches"][0]["row"]]
    assert 0 <= rows[0]["kl_rollout_trainer"] < 1e-8
    for row, used in zip(rows, [False, True, True, False, True], strict=True):
        for key in ("kl_rollout_trainer", "kl_rollout_trainer_k1", "kl_staleness", "sync_probe_max_abs"):
            assert (key not in row) == used, key
        assert row["kl_total"] > 0
    assert 0 < rows[1]["time_logprobs_saved_s"] < rows[0]["time_logprobs_s"]


def test_telemetry_changes_nothing_of_the_training(ranks: Callable[[int], RankPool]) -> None:
    silent, measured = (run(ranks, {}, [1.0, 1.0, 1.1], old_logprobs="auto", telemetry_every=n) for n in (0, 1))
    assert sources(measured) == sources(silent) == [False, True, True]
    rows = [[b["row"] for b in r["batches"]] for r in (silent[0], measured[0])]
    assert [row["expert_change_fraction"] is not None for row in rows[1]] == [True] * 3
    assert [row["grad_norm"] for row in rows[0]] == [row["grad_norm"] for row in rows[1]]
    assert [b["saved_s"] for b in measured[0]["batches"]] == [None, 0.0, 0.0], "the pass was taken for the routes"


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_a_mismatch_ends_the_run_that_insists(layout: dict[str, int], ranks: Callable[[int], RankPool]) -> None:
    results = run(ranks, layout, [1.0, 1.0, 1.0, 1.1], old_logprobs="rollout")
    for r in results:
        assert len(r["batches"]) == 3 and r["error"] is not None
        assert 'algorithm.old_logprobs="rollout": in rollout batch 4 the engine\'s log-probs are' in r["error"]
        assert "clip_low=0.0003 bears over" in r["error"]
        assert 'Use algorithm.old_logprobs="auto" or "recompute", or a wider clip' in r["error"]
    assert len({r["error"] for r in results}) == 1, "all ranks measured the same"


def test_auto_recomputes_and_says_so_once(ranks: Callable[[int], RankPool]) -> None:
    factors = [1.1, 1.1, 1.1, 1.1, 1.0, 1.0, 1.0]
    results = run(ranks, {"tensor": 2, "expert": 2}, factors, old_logprobs="auto")
    # Recomputed as long as it fails; measured each time, so the engine's are used again once it passes.
    assert sources(results) == [False, False, False, False, False, True, False]
    assert [len(r["logged"]) for r in results] == [1, 0]
    assert "are recomputed from here on" in results[0]["logged"][0]


@pytest.mark.parametrize(
    ("factors", "used", "messages"),
    [
        ([1.0] * 5, [False, True, True, False, True], 0),  # as without the break
        ([1.0, 1.0, 1.1, 1.1, 1.0], [False, True, False, False, False], 1),  # another engine
        ([1.1] * 4 + [1.0], [False] * 5, 2),  # the new start says so too
    ],
    ids=["open", "closes", "closed"],
)
def test_a_resumed_run_measures_and_goes_on_as_it_was(
    factors: list[float], used: list[bool], messages: int, ranks: Callable[[int], RankPool]
) -> None:
    [result] = run(ranks, {}, factors, resumed=3, old_logprobs="auto")
    assert sources([result]) == used
    assert len(result["logged"]) == messages


def test_a_batch_that_trains_nothing_measures_nothing(ranks: Callable[[int], RankPool]) -> None:
    [result] = run(ranks, {}, [1.1, 1.1], trained=(0.0,), old_logprobs="rollout")
    assert len(result["batches"]) == 1 and "in rollout batch 2 the engine's log-probs are" in result["error"]


@pytest.mark.parametrize("layout", [{}, {"context": 2}], ids=name_of)
def test_only_responses_that_train_are_counted(layout: dict[str, int], ranks: Callable[[int], RankPool]) -> None:
    """A clip bears less KL over shorter responses; masked ones make none shorter."""
    result = run(ranks, layout, [1.1], trained=(0.25,), old_logprobs="rollout")[0]
    found = re.search(r"bears over (\d+) tokens", result["error"])
    assert found and 6 <= int(found[1]) <= 12


def test_the_limit_can_be_set(ranks: Callable[[int], RankPool]) -> None:
    [result] = run(ranks, {}, [1.1] * 2, old_logprobs="rollout", old_logprobs_max_kl=0.1)
    assert sources([result]) == [False, True]
    [result] = run(ranks, {}, [1.1], old_logprobs="rollout", old_logprobs_max_kl=1e-6)
    assert "more than the 1e-06 that algorithm.old_logprobs_max_kl allows" in result["error"]
