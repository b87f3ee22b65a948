"""From a benchmark's file to its cells: pure enumeration. A cell is one process with one result.

Two experiments that ask for the same run share its cell. A cell's name is a hash of everything that decides its
result, so that a result can never be taken for another's.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_megatron.errors import UserError
from gspo_megatron.stability.benchmark.names import check_names
from gspo_megatron.stability.benchmark.spec import Claim, Experiment, Grid, Settings, Spec, flatten
from gspo_megatron.stability.benchmark.statistics import share_difference

Labels = Mapping[str, Any]  # arm, model, seed and factors -> value


@dataclass(frozen=True)
class Cell:
    """One process: `python -m gspo_megatron COMMAND BASE --key value …`."""

    id: str
    command: str  # sft, train or measure
    base: str  # config file
    settings: Settings  # overrides, dotted, without run.folder and model.path
    model: str  # name of the spec's model
    parent: str  # id of the cold start whose weights it reads; "": the model's own
    seconds: float  # a guess
    title: str

    @property
    def group(self) -> str:
        """Cells that take equally long: all but the seed is the same."""
        return _hash([self.command, self.base, self.model, {k: v for k, v in self.settings.items() if k != "run.seed"}])


@dataclass(frozen=True)
class Placed:
    """A cell in an experiment, under the labels by which claims and panels find it."""

    cell: Cell
    labels: Labels


@dataclass(frozen=True)
class Plan:
    """Every cell once, parents before children, and where experiments use them."""

    cells: dict[str, Cell]
    experiments: dict[str, tuple[Placed, ...]]

    def find(self, experiment: str, selector: Settings) -> list[Placed]:
        """The experiment's cells whose labels equal the selector's, or are among them where it gives a list."""
        return [
            placed
            for placed in self.experiments[experiment]
            if all(_matches(placed.labels.get(key), value) for key, value in selector.items())
        ]


def _matches(label: Any, wanted: Any) -> bool:
    return label in wanted if isinstance(wanted, list) else label == wanted


def make_plan(spec: Spec, root: Path) -> Plan:
    """Enumerate the cells of all experiments. Reads the base files and models' config.json under `root`.

    Raises:
        UserError: a base or model can't be read, or a claim or panel selects nothing.
    """
    check_names(spec)
    contents = {file: _read_base(root / file) for file in filter(None, [spec.train_base, spec.sft_base])}
    models = {name: [_model_config(root, model.base), model.config] for name, model in spec.models.items()}
    cells: dict[str, Cell] = {}
    experiments: dict[str, tuple[Placed, ...]] = {}
    # By seed first: what a short budget leaves out is then whole seeds, of all experiments alike.
    for experiment in spec.experiments:
        placed = []
        for grid, seed in itertools.product(experiment.grids, experiment.seeds):
            for settings, labels in _combinations(experiment, grid, seed):
                cell, parent = _cell(spec, experiment, grid, settings, labels, contents, models)
                if parent is not None:
                    cells.setdefault(parent.id, parent)
                cells.setdefault(cell.id, cell)
                placed.append(Placed(cell, labels))
        experiments[experiment.name] = tuple(placed)
    rank = {seed: i for i, seed in enumerate(sorted({c.settings["run.seed"] for c in cells.values()}))}
    order = sorted(cells.values(), key=lambda c: (rank[c.settings["run.seed"]], c.command != "sft"))
    plan = Plan({cell.id: cell for cell in order}, experiments)
    _check_selectors(spec, plan)
    return plan


def _combinations(experiment: Experiment, grid: Grid, seed: int) -> Iterator[tuple[Settings, Labels]]:
    for model, arm, *levels in itertools.product(grid.models, grid.arms, *grid.factors.values()):
        factors = dict(zip(grid.factors, levels, strict=True))
        yield factors, {"arm": arm, "model": model, **factors, "seed": seed}


def _cell(
    spec: Spec,
    experiment: Experiment,
    grid: Grid,
    factors: Settings,
    labels: Labels,
    contents: Mapping[str, Any],
    models: Mapping[str, Any],
) -> tuple[Cell, Cell | None]:
    model, arm, seed = spec.models[labels["model"]], spec.arms[labels["arm"]], labels["seed"]
    settings = {**spec.train, **model.settings, **experiment.settings, **arm.settings, **factors, "run.seed": seed}
    parent = None
    if spec.sft_base:
        cold = {**spec.sft, "run.seed": seed}
        parent = Cell(
            id=f"sft-{_identity('sft', contents[spec.sft_base], cold, models[model.name], '')}",
            command="sft",
            base=spec.sft_base,
            settings=cold,
            model=model.name,
            parent="",
            seconds=spec.sft_seconds * model.seconds,
            title=f"cold start, {model.title}, seed {seed}",
        )
    origin = "" if parent is None else parent.id
    digest = _identity(experiment.command, contents[spec.train_base], settings, models[model.name], origin)
    shown = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in factors.items())
    cell = Cell(
        id=f"{experiment.command}-{digest}",
        command=experiment.command,
        base=spec.train_base,
        settings=settings,
        model=model.name,
        parent=origin,
        seconds=grid.seconds * model.seconds,
        title=", ".join(filter(None, [experiment.title, arm.title, model.title, shown, f"seed {seed}"])),
    )
    return cell, parent


def _identity(command: str, base: Settings, settings: Settings, model: Any, parent: str) -> str:
    """A hash of what decides a cell's result: resolved settings, the model's config, the cold start."""
    resolved = {key: value for key, value in {**base, **settings}.items() if key not in ("run.folder", "model.path")}
    return _hash([command, resolved, model, parent])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()[:12]


def _read_base(path: Path) -> Settings:
    try:
        return flatten(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"base config {path} cannot be read: {error}") from None


def _model_config(root: Path, base: str) -> Any:
    """The base model's config.json; its path where the model is not here."""
    try:
        return json.loads((root / base / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return base
    except (OSError, ValueError) as error:
        raise UserError(f"{root / base}/config.json cannot be read: {error}") from None


def _check_selectors(spec: Spec, plan: Plan) -> None:
    """Every claim finds exactly one cell a seed (a slope one a level), every panel at least one."""
    for experiment in spec.experiments:
        for claim in experiment.claims:
            _check_decidable(experiment, claim)
            for selector in filter(None, [claim.of or {"": None}, claim.against]):
                chosen = {} if selector == {"": None} else selector
                found = plan.find(experiment.name, chosen)
                keys = [(p.labels["seed"], p.labels.get(claim.over) if claim.over else None) for p in found]
                what = f'[experiments.{experiment.name}] claim "{claim.name}": {chosen}'
                if not found:
                    raise UserError(f"{what} selects no cell; use labels and values of the grid")
                if len(set(keys)) < len(keys):
                    raise UserError(f"{what} selects several cells of one seed; name further labels")
        for panel in experiment.panels:
            if not plan.find(experiment.name, panel.where):
                raise UserError(f'[experiments.{experiment.name}] panel "{panel.title}" selects no cell')


def _check_decidable(experiment: Experiment, claim: Claim) -> None:
    """A rule on counts of seeds that no result of so few could support is none."""
    if claim.kind != "difference" or claim.reduce != "collapsed":
        return
    seeds = len(experiment.seeds)
    counts = itertools.product(range(seeds + 1), range(seeds + 1))
    if not any(claim.low <= d.low and d.high <= claim.high for d in (share_difference(c, seeds) for c in counts)):
        raise UserError(
            f'[experiments.{experiment.name}] claim "{claim.name}": no collapses of {seeds} seeds can put the interval '
            f"into {claim.low:g} to {claim.high:g}: that of {seeds} against 0 begins at "
            f"{share_difference((seeds, 0), seeds).low:.2f}; give more seeds or a range that so many can decide"
        )
