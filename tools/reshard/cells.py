"""The cases in tools/reshard_models: models, training layouts, servers and links, as data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gspo_megatron.errors import UserError
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.weights.families import PLANNABLE
from gspo_megatron.weights.families.base import ModelFields
from gspo_megatron.weights.reshard import ReshardPlan, plan_reshard
from gspo_megatron.weights.rules import TensorSpec

FOLDER = Path(__file__).parents[1] / "reshard_models"
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Model:
    """A published model: its numbers and its tensors."""

    name: str
    fields: ModelFields
    specs: Sequence[TensorSpec]


@dataclass(frozen=True)
class Links:
    """The cluster: GPUs and NICs are numbered alike, so that a NIC serves the GPUs next to it."""

    gpus_per_node: int
    nics_per_node: int
    trainer_nic_gb_per_s: float
    server_nic_gb_per_s: float
    nvlink_gb_per_s: float
    source: str

    def node(self, rank: int) -> int:
        return rank // self.gpus_per_node

    def nic(self, rank: int) -> int:
        """The NIC of a rank, over all nodes."""
        return rank * self.nics_per_node // self.gpus_per_node


@dataclass(frozen=True)
class Call:
    """What a server needs for a bucket apart from moving its bytes."""

    seconds_per_call: float
    seconds_per_tensor: float
    source: str


@dataclass(frozen=True)
class Servers:
    """SGLang servers of `tensor` GPUs each."""

    tensor: int
    count: int


@dataclass(frozen=True)
class Cell:
    """A model on a training layout, and the servers it is sent to."""

    model: str
    layout: ParallelLayout
    servers: Servers
    source: str

    @property
    def gpus(self) -> int:
        return self.layout.world_size


@dataclass(frozen=True)
class Published:
    """A time that others report, and the layout it was measured on if that can be planned."""

    model: str
    seconds: str
    how: str
    source: str
    differs: str
    cell: Cell | None


@dataclass(frozen=True)
class Cases:
    """Everything in layouts.json."""

    links: Links
    call: Call
    bucket_bytes: int
    cells: Sequence[Cell]
    published: Sequence[Published]


def load_cases() -> Cases:
    """Read layouts.json."""
    data = json.loads((FOLDER / "layouts.json").read_text(encoding="utf-8"))
    return Cases(
        links=Links(**data["links"]),
        call=Call(**data["call"]),
        bucket_bytes=data["bucket_bytes"],
        cells=[_cell(entry) for entry in data["cells"]],
        published=[_published(entry) for entry in data["published"]],
    )


def _cell(entry: dict[str, Any]) -> Cell:
    layout = ParallelLayout(**entry["training"])
    assert entry.get("gpus", layout.world_size) == layout.world_size, entry
    return Cell(entry["model"], layout, Servers(**entry["servers"]), entry["source"])


def _published(entry: dict[str, Any]) -> Published:
    cell = _cell(entry) if "training" in entry else None
    return Published(entry["model"], entry["seconds"], entry["how"], entry["source"], entry["differs"], cell)


def load_model(name: str) -> Model:
    """A model by the name of its file. Its number of parameters is checked against the published one."""
    config = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    family = PLANNABLE[config["model_type"]]
    fields = family.fields(config)
    specs = family.specs(fields)
    count = sum(spec.numel for spec in specs if not spec.load_only)
    assert count == config["num_parameters"], f"{name}: {count:,} parameters, published {config['num_parameters']:,}"
    return Model(name, fields, specs)


def make_plan(model: Model, cell: Cell, bucket_bytes: int) -> ReshardPlan:
    """The broadcast to all servers: one feed, of all ranks."""
    return plan_reshard(
        model.specs,
        cell.layout,
        num_layers=model.fields.num_layers,
        num_experts=model.fields.num_experts,
        feeds=[range(cell.layout.world_size)],
        dtype=DTYPE,
        bucket_bytes=bucket_bytes,
    )


def choose(cells: Sequence[Cell], model: str | None, gpus: int | None) -> list[Cell]:
    """The cells that the command line asks for."""
    chosen = [c for c in cells if model in (None, c.model) and gpus in (None, c.gpus)]
    if not chosen:
        asked = f"--model {model}" * (model is not None) + f" --gpus {gpus}" * (gpus is not None)
        known = ", ".join(f"{c.model} on {c.gpus}" for c in cells)
        raise UserError(f"{asked.strip()}: there is no such cell; there are {known}")
    return chosen
