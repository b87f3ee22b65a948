"""From a benchmark's file to its cells."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.errors import UserError
from gspo_megatron.stability.benchmark.cells import make_plan
from gspo_megatron.stability.benchmark.runner import Workplace, command_line
from gspo_megatron.stability.benchmark.spec import read_spec
from tests.unit.stability.benchmark.benchmark_setup import SPEC, write_root

ROOT = Path(__file__).parents[4]


def test_experiments_share_equal_cells_and_cold_starts(tmp_path: Path) -> None:
    _, plan = write_root(tmp_path)
    commands = [cell.command for cell in plan.cells.values()]
    # A seed: one cold start; gspo and grpo with 4 mini-batches, gspo with 8. gspo with 4 serves both experiments.
    assert commands.count("sft") == 2 and commands.count("train") == 6
    first = {p.cell.id for p in plan.find("first", {"arm": "gspo"})}
    assert first == {p.cell.id for p in plan.find("second", {"algorithm.mini_batches": 4})}
    assert len({cell.parent for cell in plan.cells.values() if cell.command == "train"}) == 2


def test_cells_come_by_seed_and_after_their_cold_start(tmp_path: Path) -> None:
    _, plan = write_root(tmp_path)
    cells = list(plan.cells.values())
    assert [c.settings["run.seed"] for c in cells] == [11] * 4 + [12] * 4
    places = {cell.id: i for i, cell in enumerate(cells)}
    assert all(places[c.parent] < places[c.id] for c in cells if c.parent)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("optimizer.lr = 1e-3", "optimizer.lr = 2e-3"),
        ('settings.algorithm.name = "gspo"', 'settings.algorithm.name = "gspo"\nsettings.algorithm.clip_low = 0.1'),
        ('title = "small model"\nbase = "model"', 'base = "model"\nconfig = { num_hidden_layers = 3 }'),
    ],
)
def test_whatever_decides_a_result_is_in_the_id(tmp_path: Path, old: str, new: str) -> None:
    assert old in SPEC
    _, before = write_root(tmp_path / "a")
    spec, after = write_root(tmp_path / "b", SPEC.replace(old, new))
    mine = next(p.cell for p in before.experiments["first"])
    other = next(p.cell for p in after.experiments["first"])
    # make_plan hashes the model's config.json and the spec's changes to it.
    assert mine.id != other.id, spec.models["small"]


def test_the_base_file_is_in_the_id_and_the_place_is_not(tmp_path: Path) -> None:
    _, a = write_root(tmp_path / "a")
    _, b = write_root(tmp_path / "b")
    assert list(a.cells) == list(b.cells)
    (tmp_path / "b" / "train.toml").write_text('[run]\nfolder = "x"\n[optimizer]\nbeta1 = 0.5\n')
    again = make_plan(read_spec(tmp_path / "b" / "spec.toml", tmp_path / "b"), tmp_path / "b")
    assert all((c in a.cells) == (cell.command == "sft") for c, cell in again.cells.items())


def test_the_command_line_of_a_cell(tmp_path: Path) -> None:
    spec, plan = write_root(tmp_path)
    place = Workplace(tmp_path / "runs", tmp_path, "python")
    cell = plan.find("second", {"algorithm.mini_batches": 8, "seed": 12})[0].cell
    words = command_line(spec, cell, place)
    assert words[:5] == ["python", "-m", "gspo_megatron", "train", "train.toml"]
    settings = dict(zip(words[5::2], words[6::2], strict=True))
    assert settings["--model.path"] == f"{tmp_path}/runs/cells/{cell.parent}/run/final"
    assert settings["--algorithm.mini_batches"] == "8" and settings["--optimizer.lr"] == "0.001"
    assert settings["--run.resume"] == "true"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('arms = ["gspo", "grpo"]', 'arms = ["gspo", "gropo"]', 'unknown arm "gropo". Did you mean "grpo"'),
        ('models = ["small"]', 'models = ["smal"]', 'unknown model "smal"'),
        ('of = { arm = "gspo" }', 'of = { arm = "dapo" }', "selects no cell"),
        ('over = "algorithm.mini_batches"\n', "", 'over names the factor of a "slope"'),
        ('kind = "slope"', 'kind = "slop"', 'must be one of value, ratio, difference, slope. Did you mean "slope"'),
        ("at_least = 10", "", "at_least or at_most must be set"),
        ("seeds = [11, 12]", "seeds = [11, 11]", "must be different integers"),
        ("seeds = [11, 12]", "seeds = [11, 12]\nbudget_minutes = -3", "budget_minutes=-3"),
        ("seeds = [11, 12]", "seeds = [11, 12]\nbudget_minutes = nan", "budget_minutes=nan"),
        ("number = 1", 'number = "one"', "must be of type int"),
        ('hypothesis = "The one."', "", "hypothesis must be set"),
        ('reduce = "last:2"', 'reduce = "last:2"\nreduces = 1', 'unknown key "reduces". Did you mean "reduce"'),
        ('train = "train.toml"', 'train = "gone.toml"', "gone.toml does not exist"),
        ('metric = "clip_fraction_token"', 'metric = "clip_fraction_tokn"', 'Did you mean "clip_fraction_token"'),
        ('metric = "clip_fraction_token"', 'metric = "clip_fraction_token_mini_batches"', "is a list; name one number"),
        ('reduce = "mean"', 'reduce = "meen"', 'reduce="meen" is no reduction'),
        ('reduce = "mean"', 'reduce = "last"', 'reduce="last" is no reduction'),
        ('reduce = "mean"', "", 'reduce="" is no reduction'),
        ('kind = "batches"', 'kind = "curve"', 'kind="curve" does not fit'),
        ('kind = "batches"', 'kind = "mini_batches"', "is no list"),
        ('command = "train"', 'command = "measure"', "a measurement has none"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in SPEC
    with pytest.raises(UserError) as error:
        write_root(tmp_path, SPEC.replace(old, new, 1))
    assert message in str(error.value)


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "stability").glob("*.toml")), ids=lambda p: p.stem)
def test_presets_resolve(path: Path) -> None:
    spec = read_spec(path, ROOT)
    plan = make_plan(spec, ROOT)
    assert spec.name == path.stem and plan.cells
    assert not {0, 1, 2} & {c.settings["run.seed"] for c in plan.cells.values()}, "seeds that served to choose settings"
    for name in ("machine", "gpus", "hours", "model"):
        assert name in spec.needs
