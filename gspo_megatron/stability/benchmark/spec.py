"""What a benchmark is to measure: a TOML file of experiments, each with its hypothesis, measure and verdict rules.

The file is written before the runs; the report quotes it. Reading it needs nothing but the file.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gspo_megatron.errors import UserError, nearest

Settings = dict[str, Any]  # dotted key of a config -> value

COMMANDS = ("train", "measure")
KINDS = ("value", "ratio", "difference", "slope")
PANELS = ("batches", "seconds", "mini_batches", "factor", "curve")
AXES = ("linear", "log")


@dataclass(frozen=True)
class Model:
    """A model folder: a base whose config.json is changed in some keys."""

    name: str
    title: str
    base: str  # Hugging Face folder
    config: Settings  # keys of config.json that differ from the base's
    settings: Settings  # of its training runs and measurements
    seconds: float  # factor on the time of its cells, a guess until some are measured
    config_file: str  # config.json to check with where the base is not here; "": the base is here


@dataclass(frozen=True)
class Arm:
    """One of the things compared: settings of a training run under a name."""

    name: str
    title: str
    settings: Settings


@dataclass(frozen=True)
class Grid:
    """All combinations of models, arms and factors."""

    models: tuple[str, ...]
    arms: tuple[str, ...]
    factors: Mapping[str, tuple[Any, ...]]  # dotted key -> values
    seconds: float  # of one cell, a guess until some are measured


@dataclass(frozen=True)
class Claim:
    """A statement about the results, and the rule by which they support or contradict it.

    Its value, one a seed, is of cells chosen by `of` (and `against`): a metric ("value"), a quotient ("ratio"), a
    difference, or the slope of log metric over log factor ("slope").
    """

    name: str
    text: str
    kind: str
    metric: str  # name, or name[i] for an entry of a list
    reduce: str  # how the batches of a training run become one number; "" for a measurement
    of: Settings  # arm, model or factors -> value
    against: Settings
    over: str  # slope: the factor
    floor: float  # ratio, slope: smaller values count as this, which their logarithm needs
    low: float  # the claim holds where the value lies in [low, high]
    high: float
    paper: str  # what the paper says, "" where it gives no figure

    @property
    def rule(self) -> str:
        """The verdict rule in words."""
        if math.isinf(self.low):
            region, outside = f"at or below {self.high:g}", f"above {self.high:g}"
        elif math.isinf(self.high):
            region, outside = f"at or above {self.low:g}", f"below {self.low:g}"
        else:
            region, outside = f"between {self.low:g} and {self.high:g}", f"outside {self.low:g} to {self.high:g}"
        return (
            f"supported if the whole 95 % interval over seeds lies {region}; contradicted if all of it lies {outside}; "
            "else undecided"
        )


@dataclass(frozen=True)
class Panel:
    """One picture of an experiment."""

    kind: str
    title: str
    metrics: tuple[str, ...]
    x: str  # factor: its dotted key; curve: name of the curve's abscissa
    x_label: str
    y_label: str
    where: Settings
    x_scale: str
    y_scale: str
    labels: Mapping[str, str]  # of metrics


@dataclass(frozen=True)
class Experiment:
    """One question, what is run for it, and what would answer it."""

    name: str
    number: int
    title: str
    question: str  # for a reader who has not seen the project
    hypothesis: str
    measure: str
    command: str
    seeds: tuple[int, ...]
    settings: Settings
    grids: tuple[Grid, ...]
    claims: tuple[Claim, ...]
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Spec:
    """A whole benchmark."""

    name: str
    title: str
    needs: Mapping[str, Any]  # machine, gpus, hours, model: in words and numbers; options of SLURM
    cells_at_once: int  # 0: as many as the machine has cores
    budget_minutes: float  # 0: none
    train_base: str  # TOML file that every training run starts from
    sft_base: str  # of the cold start; "": models have weights already
    sft_seconds: float  # of a cold start, a guess until some are measured
    train: Settings
    sft: Settings
    models: Mapping[str, Model]
    arms: Mapping[str, Arm]
    experiments: tuple[Experiment, ...]
    text: str = field(repr=False)  # the file itself


class _Table:
    """A TOML table that is read key by key; what is left over at the end is refused."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise UserError(f"{where}={values!r} must be a table")
        self.values, self.where, self.read = values, where, set[str]()

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        self.read.add(key)
        if key not in self.values:
            if default is ...:
                raise UserError(f"{self.where}: {key} must be set")
            return default
        value = self.values[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            names = "/".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise UserError(f"{self.where}: {key}={value!r} must be of type {names}")
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: Any = ...) -> str:
        value = self.take(key, str, default)
        if value not in choices:
            hint = nearest(value, choices)
            raise UserError(f'{self.where}: {key}="{value}" must be one of {", ".join(choices)}.{hint}')
        return value

    def table(self, key: str, default: Any = ...) -> dict[str, Any]:
        return dict(self.take(key, dict, default))

    def end(self) -> None:
        unknown = sorted(self.values.keys() - self.read)
        if unknown:
            raise UserError(
                f'{self.where}: unknown key "{unknown[0]}".{nearest(unknown[0], self.read)} Known: '
                f"{', '.join(sorted(self.read))}"
            )


def flatten(table: Mapping[str, Any], prefix: str = "") -> Settings:
    """{"a": {"b": 1}} and {"a.b": 1} alike as {"a.b": 1}."""
    flat: Settings = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def read_spec(path: Path, root: Path) -> Spec:
    """Read a benchmark's file; paths in it are relative to `root`.

    Raises:
        UserError: the file is missing or malformed, or names something that it does not define.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except FileNotFoundError:
        raise UserError(f"benchmark file {path} does not exist") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"benchmark file {path} cannot be read: {error}") from None
    top = _Table(document, str(path))
    base = _Table(top.take("base", dict), f"{path}: [base]")
    seeds = _seeds(top)
    models = {name: _model(name, value, path) for name, value in top.table("models").items()}
    arms = {name: _arm(name, value, path) for name, value in top.table("arms").items()}
    spec = Spec(
        name=top.take("name", str),
        title=top.take("title", str),
        needs=top.table("needs"),
        cells_at_once=top.take("cells_at_once", int, 0),
        budget_minutes=float(top.take("budget_minutes", (int, float), 0)),
        train_base=base.take("train", str),
        sft_base=base.take("sft", str, ""),
        sft_seconds=float(base.take("sft_seconds", (int, float), 60)),
        train=flatten(top.table("train", {})),
        sft=flatten(top.table("sft", {})),
        models=models,
        arms=arms,
        experiments=tuple(
            sorted(
                (
                    _experiment(name, value, seeds, models, arms, path)
                    for name, value in top.table("experiments").items()
                ),
                key=lambda e: e.number,
            )
        ),
        text=text,
    )
    base.end()
    top.end()
    if not (spec.budget_minutes >= 0 and spec.cells_at_once >= 0):
        raise UserError(
            f"{path}: budget_minutes={spec.budget_minutes:g} and cells_at_once={spec.cells_at_once} must not be "
            "negative; 0: no limit, and as many cells as the machine has cores"
        )
    for file in filter(None, [spec.train_base, spec.sft_base]):
        if not (root / file).is_file():
            raise UserError(f"{path}: [base] {file} does not exist under {root}")
    return spec


def _seeds(table: _Table, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
    seeds = table.take("seeds", list, ... if default is None else list(default))
    if not seeds or len(set(seeds)) < len(seeds) or not all(type(s) is int and s >= 0 for s in seeds):
        raise UserError(f"{table.where}: seeds={seeds} must be different integers, at least one")
    return tuple(seeds)


def _model(name: str, values: Any, path: Path) -> Model:
    table = _Table(values, f"{path}: [models.{name}]")
    model = Model(
        name,
        table.take("title", str, name),
        table.take("base", str),
        table.table("config", {}),
        flatten(table.table("settings", {})),
        float(table.take("seconds", (int, float), 1)),
        table.take("config_file", str, ""),
    )
    table.end()
    return model


def _arm(name: str, values: Any, path: Path) -> Arm:
    table = _Table(values, f"{path}: [arms.{name}]")
    arm = Arm(name, table.take("title", str, name), flatten(table.table("settings", {})))
    table.end()
    return arm


def _known(names: list[str], known: Mapping[str, Any], what: str, where: str) -> tuple[str, ...]:
    for name in names:
        if name not in known:
            raise UserError(f'{where}: unknown {what} "{name}".{nearest(name, known)} Known: {", ".join(known)}')
    return tuple(names)


def _experiment(
    name: str, values: Any, seeds: tuple[int, ...], models: Mapping[str, Model], arms: Mapping[str, Arm], path: Path
) -> Experiment:
    where = f"{path}: [experiments.{name}]"
    table = _Table(values, where)
    experiment = Experiment(
        name=name,
        number=table.take("number", int),
        title=table.take("title", str),
        question=table.take("question", str),
        hypothesis=table.take("hypothesis", str),
        measure=table.take("measure", str),
        command=table.choice("command", COMMANDS),
        seeds=_seeds(table, seeds),
        settings=flatten(table.table("settings", {})),
        grids=tuple(_grid(g, f"{where} grid {i}", models, arms) for i, g in enumerate(table.take("grid", list), 1)),
        claims=tuple(_claim(c, f"{where} claim {i}") for i, c in enumerate(table.take("claims", list), 1)),
        panels=tuple(_panel(p, f"{where} panel {i}") for i, p in enumerate(table.take("panels", list, []), 1)),
    )
    table.end()
    return experiment


def _grid(values: Any, where: str, models: Mapping[str, Model], arms: Mapping[str, Arm]) -> Grid:
    table = _Table(values, where)
    factors = flatten(table.table("factors", {}))
    for key, levels in factors.items():
        if not isinstance(levels, list) or not levels:
            raise UserError(f"{where}: factor {key}={levels!r} must be a list of values")
    grid = Grid(
        models=_known(table.take("models", list), models, "model", where),
        arms=_known(table.take("arms", list), arms, "arm", where),
        factors={key: tuple(levels) for key, levels in factors.items()},
        seconds=float(table.take("seconds", (int, float))),
    )
    table.end()
    return grid


def _claim(values: Any, where: str) -> Claim:
    table = _Table(values, where)
    claim = Claim(
        name=table.take("name", str),
        text=table.take("text", str),
        kind=table.choice("kind", KINDS),
        metric=table.take("metric", str),
        reduce=table.take("reduce", str, ""),
        of=flatten(table.table("of", {})),
        against=flatten(table.table("against", {})),
        over=table.take("over", str, ""),
        floor=float(table.take("floor", (int, float), 0)),
        low=float(table.take("at_least", (int, float), -math.inf)),
        high=float(table.take("at_most", (int, float), math.inf)),
        paper=table.take("paper", str, ""),
    )
    table.end()
    if math.isinf(claim.low) and math.isinf(claim.high):
        raise UserError(f"{where}: at_least or at_most must be set: without a rule there is no verdict")
    if claim.low > claim.high:
        raise UserError(f"{where}: at_least={claim.low:g} must not exceed at_most={claim.high:g}")
    if (claim.kind in ("ratio", "difference")) != bool(claim.against):
        raise UserError(f'{where}: against is what a "ratio" or "difference" compares with, and nothing else')
    if (claim.kind == "slope") != bool(claim.over):
        raise UserError(f'{where}: over names the factor of a "slope", and of nothing else')
    return claim


def _panel(values: Any, where: str) -> Panel:
    table = _Table(values, where)
    panel = Panel(
        kind=table.choice("kind", PANELS),
        title=table.take("title", str),
        metrics=tuple(table.take("metrics", list)),
        x=table.take("x", str, ""),
        x_label=table.take("x_label", str, ""),
        y_label=table.take("y_label", str),
        where=flatten(table.table("where", {})),
        x_scale=table.choice("x_scale", AXES, "linear"),
        y_scale=table.choice("y_scale", AXES, "linear"),
        labels=table.table("labels", {}),
    )
    table.end()
    return panel
