"""Verdicts by the pre-written rules, on results made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.errors import UserError
from gspo_megatron.stability.benchmark.cells import Plan
from gspo_megatron.stability.benchmark.figure import panel_lines
from gspo_megatron.stability.benchmark.report import write_report
from gspo_megatron.stability.benchmark.results import Result
from gspo_megatron.stability.benchmark.spec import Spec
from gspo_megatron.stability.benchmark.verdicts import Verdict, judge
from tests.unit.stability.benchmark.benchmark_setup import SPEC, read_json, result, write_root


def results(plan: Plan, gspo: list[float], grpo: list[float], doubled: list[float]) -> dict[str, Result]:
    """Clip fractions by seed of the three kinds of runs."""
    found = {}
    for i, seed in enumerate((11, 12)):
        for arm, mini_batches, values in (("gspo", 4, gspo), ("grpo", 4, grpo), ("gspo", 8, doubled)):
            selector = {"arm": arm, "algorithm.mini_batches": mini_batches, "seed": seed}
            for name in plan.experiments:
                for placed in plan.find(name, selector):
                    found[placed.cell.id] = result(clip_fraction_token=[values[i]] * 3, time_step_s=[1.0] * 3)
    return found


def verdicts(root: Path, *values: list[float]) -> tuple[Spec, Plan, dict[str, Verdict]]:
    spec, plan = write_root(root)
    return spec, plan, {v.claim.name: v for v in judge(spec, plan, results(plan, *values))}


def test_supported(tmp_path: Path) -> None:
    _, _, found = verdicts(tmp_path, [0.20, 0.21], [0.01, 0.0105], [0.40, 0.42])
    gap = found["gap"]
    assert gap.verdict == "supported" and gap.by_seed == pytest.approx({11: 20.0, 12: 20.0})
    assert gap.p == 0.5, "the least that two seeds can give"
    assert gap.sides == {11: pytest.approx((0.20, 0.01)), 12: pytest.approx((0.21, 0.0105))}
    assert found["slope"].verdict == "supported" and found["slope"].by_seed == pytest.approx({11: 1.0, 12: 1.0})


def test_a_contrary_result_is_contradicted(tmp_path: Path) -> None:
    _, _, found = verdicts(tmp_path, [0.01, 0.0101], [0.20, 0.20], [0.0025, 0.0026])
    assert found["gap"].verdict == "contradicted" and found["slope"].verdict == "contradicted"


def test_a_null_result_is_undecided(tmp_path: Path) -> None:
    _, _, found = verdicts(tmp_path, [0.5, 0.005], [0.01, 0.01], [0.5, 0.005])
    assert found["gap"].verdict == "undecided", "50 times and half as much"
    assert found["gap"].estimate is not None
    assert found["gap"].estimate.mean == pytest.approx(5.0), "the geometric mean"


def test_zero_counts_as_the_floor_and_is_said(tmp_path: Path) -> None:
    _, _, found = verdicts(tmp_path, [0.2, 0.2], [0.0, 0.0], [0.4, 0.4])
    assert found["gap"].by_seed == pytest.approx({11: 2e4, 12: 2e4})
    assert any("counted as 1e-05" in note for note in found["gap"].notes)


def test_a_missing_seed_is_named_and_one_seed_decides_nothing(tmp_path: Path) -> None:
    spec, plan = write_root(tmp_path)
    found = results(plan, [0.2, 0.2], [0.01, 0.01], [0.4, 0.4])
    for placed in plan.find("first", {"arm": "grpo", "seed": 12}):
        del found[placed.cell.id]
    gap = judge(spec, plan, found)[0]
    assert gap.verdict == "undecided" and list(gap.by_seed) == [11]
    assert gap.planned_seeds == 2 and any("has no result" in note for note in gap.notes)


def test_a_seed_that_ran_and_gave_no_value_leaves_no_verdict(tmp_path: Path) -> None:
    text = SPEC.replace("seeds = [11, 12]", "seeds = [11, 12, 13]")
    spec, plan = write_root(tmp_path, text)
    found = results(plan, [0.2, 0.2], [0.01, 0.01], [0.4, 0.4])
    assert judge(spec, plan, found)[0].verdict == "supported", "seed 13 has not run: what is there is judged"
    lost = plan.find("first", {"arm": "grpo", "seed": 13})[0].cell.id
    failed = judge(spec, plan, found, {lost})[0]
    assert failed.verdict == "undecided" and "no verdict without seed 13" in failed.notes[0]
    # Its cells are done, but one has not measured the metric.
    for arm in ("gspo", "grpo"):
        cell = plan.find("first", {"arm": arm, "seed": 13})[0].cell
        found[cell.id] = result(clip_fraction_token=[None if arm == "grpo" else 0.2] * 3, time_step_s=[1.0] * 3)
    assert judge(spec, plan, found)[0].verdict == "undecided"


def test_a_ratio_of_two_floors_is_none(tmp_path: Path) -> None:
    text = SPEC.replace("at_least = 10", "at_least = 0.5\nat_most = 2")
    spec, plan = write_root(tmp_path, text)
    gap = judge(spec, plan, results(plan, [0.0, 0.0], [0.0, 0.0], [0.4, 0.4]))[0]
    assert gap.verdict == "undecided" and not gap.by_seed and any("floor" in note for note in gap.notes)


def test_equal_seeds_are_said_to_be_no_certainty(tmp_path: Path) -> None:
    _, _, found = verdicts(tmp_path, [0.2, 0.2], [0.01, 0.01], [0.4, 0.4])
    assert any("all seeds equal" in note for note in found["gap"].notes)


def test_no_collapse_in_two_seeds_is_not_never(tmp_path: Path) -> None:
    text = SPEC.replace('kind = "ratio"', 'kind = "difference"').replace('reduce = "mean"', 'reduce = "collapsed"')
    spec, plan = write_root(tmp_path, text.replace("at_least = 10", "at_least = 0"))
    found = results(plan, [0.2, 0.2], [0.01, 0.01], [0.4, 0.4])
    gap = judge(spec, plan, found)[0]
    assert gap.estimate is not None and gap.estimate.mean == 0 and gap.estimate.high > 0.5
    assert gap.verdict == "undecided" and gap.notes[0].startswith("0 against 0 of 2")


def test_a_rule_that_no_count_could_meet_is_refused(tmp_path: Path) -> None:
    text = SPEC.replace('kind = "ratio"', 'kind = "difference"').replace('reduce = "mean"', 'reduce = "collapsed"')
    with pytest.raises(UserError, match=r"that of 2 against 0 begins at 0\.07"):
        write_root(tmp_path, text.replace("at_least = 10", "at_least = 0.5"))


def test_no_results_are_no_verdict(tmp_path: Path) -> None:
    spec, plan = write_root(tmp_path)
    assert {v.verdict for v in judge(spec, plan, {})} == {"undecided"}
    assert all(v.estimate is None for v in judge(spec, plan, {}))


def test_an_arm_keeps_its_name_and_colour_before_everything_is_done(tmp_path: Path) -> None:
    spec, plan = write_root(tmp_path)
    experiment = spec.experiments[0]
    found = results(plan, [0.2, 0.2], [0.01, 0.01], [0.4, 0.4])
    done = {p.cell.id: found[p.cell.id] for p in plan.find("first", {"arm": "grpo"})}
    for some, names in ((found, ["GSPO", "GRPO"]), (done, ["GRPO"])):
        lines = panel_lines(spec, experiment, experiment.panels[0], plan, some)
        assert [line.label for line in lines] == names and lines[-1].arm == 1


def test_the_report_states_verdicts_rules_and_what_is_missing(tmp_path: Path) -> None:
    spec, plan, _ = verdicts(tmp_path, [0.01, 0.0101], [0.20, 0.20], [0.02, 0.02])
    found = results(plan, [0.01, 0.0101], [0.20, 0.20], [0.02, 0.02])
    lost = plan.find("second", {"algorithm.mini_batches": 8, "seed": 12})[0].cell
    broken = plan.find("second", {"algorithm.mini_batches": 8, "seed": 11})[0].cell
    del found[lost.id], found[broken.id]
    failures = {broken.id: {"reason": "exit code 1", "log": ["a", "error: it is broken"]}}
    paths, _ = write_report(spec, plan, found, failures, {"processor": "a <fast> one"}, tmp_path / "report")
    page, png, text, data = paths
    assert png.read_bytes().startswith(b"\x89PNG")
    for content in (page.read_text(), text.read_text()):
        assert "contradicted" in content and "at or above 10" in content
        assert "exit code 1" in content and "it is broken" in content and lost.title in content
        assert "can&#x27;t give a p below 0.5" in content or "can't give a p below 0.5" in content
    assert "&lt;fast&gt;" in page.read_text() and "http" not in page.read_text(), "self-contained"
    claims = {c["name"]: c for c in read_json(data)["claims"]}
    assert claims["gap"]["verdict"] == "contradicted" and claims["slope"]["verdict"] == "undecided"
    assert claims["gap"]["mean"] == pytest.approx(0.0502, abs=1e-3)
