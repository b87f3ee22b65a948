"""Each kind of cell held against the config's own checks, before anything runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

from gspo_megatron import config_io, preflight
from gspo_megatron.config import MeasureConfig, SftConfig, TrainConfig
from gspo_megatron.errors import UserError
from gspo_megatron.stability.benchmark.cells import Cell, Plan
from gspo_megatron.stability.benchmark.runner import Workplace, command_line
from gspo_megatron.stability.benchmark.spec import Spec

CONFIGS = {"train": TrainConfig, "measure": MeasureConfig, "sft": SftConfig}


def check(spec: Spec, plan: Plan, root: Path) -> list[str]:
    """One line for each kind of cell, and warnings. Raises UserError naming the cell that can't work."""
    lines: list[str] = []
    seen: set[str] = set()
    warnings: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        place = Workplace(Path(scratch), root)
        for cell in plan.cells.values():
            if cell.group in seen:
                continue
            seen.add(cell.group)
            try:
                for warning in _check_cell(spec, cell, place):
                    warnings.setdefault(warning, cell.title)
            except UserError as error:
                raise UserError(f"{cell.title} ({cell.id}): {error}") from None
            lines.append(f"ok      {cell.command:<8}{cell.title}")
    return lines + [f"warning ({title}): {text}" for text, title in warnings.items()]


def _check_cell(spec: Spec, cell: Cell, place: Workplace) -> list[str]:
    words = command_line(spec, dataclasses.replace(cell, parent=""), place)
    model = words.index("--model.path") + 1
    words[model] = _checkable_model(spec, cell, words[model], place)
    config = config_io.load_config(CONFIGS[cell.command], place.root / cell.base, words[5:])  # type: ignore[type-var]
    if isinstance(config, TrainConfig):
        return preflight.check_train(config, folder=False, here=False).warnings
    return preflight.check_sft(config, folder=False, here=False).warnings


def _checkable_model(spec: Spec, cell: Cell, folder: str, place: Workplace) -> str:
    """The model's folder, or for one that is elsewhere a folder with the config.json that the spec names."""
    path = place.root / folder
    stand_in = spec.models[cell.model].config_file
    if (path / "config.json").is_file() or not stand_in:
        return str(path)
    made = place.folder / "stand_ins" / cell.model
    made.mkdir(parents=True, exist_ok=True)
    shutil.copy(place.root / stand_in, made / "config.json")
    config = json.loads((made / "config.json").read_text(encoding="utf-8")) | dict(spec.models[cell.model].config)
    (made / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(made)
