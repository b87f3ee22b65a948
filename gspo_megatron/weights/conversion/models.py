"""One view of a model in either format: its tensors by their Hugging Face names."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from gspo_megatron.errors import UserError
from gspo_megatron.weights.conversion.hf_layout import HFLayout, read_layout
from gspo_megatron.weights.families import IMPOSSIBLE, read_fields, read_hf_config
from gspo_megatron.weights.families.base import Family, ModelFields
from gspo_megatron.weights.hf_checkpoint import INDEX, SINGLE, HFCheckpoint, check_companions
from gspo_megatron.weights.rules import Copy, TensorSpec, Vocabulary
from gspo_megatron.weights.torch_dist.checksums import CHECKSUMS, find_damage
from gspo_megatron.weights.torch_dist.description import DESCRIPTION, HF_FOLDER, Description, read_description
from gspo_megatron.weights.torch_dist.keys import KeyTable, Place, megatron_shape
from gspo_megatron.weights.torch_dist.reader import COMMON, TorchDistCheckpoint, is_torch_dist

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")  # how keys of the model begin, not of its optimizer

T = TypeVar("T")


class Model(Protocol):
    """What both formats offer. All names are Hugging Face's."""

    folder: Path
    config: dict[str, Any]
    architecture: Architecture
    left_out: list[str]  # tensors that are there and belong to no rule: layers that predict further tokens

    @property
    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> Tensor:
        """May be a view of a file: don't write to it."""
        ...


@dataclass(frozen=True)
class Architecture:
    """What a config.json says, and the tensors that follow from it."""

    config: dict[str, Any]
    family: Family
    fields: ModelFields
    specs: list[TensorSpec]
    origins: dict[str, tuple[TensorSpec, int]] = field(repr=False)  # by HF name: spec, number among its HF tensors

    @property
    def exported(self) -> list[TensorSpec]:
        return [spec for spec in self.specs if not spec.load_only]


def read_architecture(folder: Path) -> Architecture:
    """Of a folder with config.json. Raises UserError that names the file."""
    config = read_hf_config(folder)
    path = folder / "config.json"

    def guarded(make: Callable[[], T]) -> T:
        try:
            return make()
        except UserError as error:
            message = str(error)
            raise UserError(message if str(folder) in message else f"{path}: {message}") from None
        except IMPOSSIBLE as error:
            raise UserError(f"{path} describes no possible model: {type(error).__name__}: {error}") from None

    family, fields = guarded(lambda: read_fields(config, path))
    specs = guarded(lambda: family.specs(fields))
    guarded(lambda: [megatron_shape(spec) for spec in specs])
    origins = {name: (spec, i) for spec in specs if not spec.load_only for i, name in enumerate(spec.hf)}
    return Architecture(config, family, fields, specs, origins)


class HFModel:
    """A Hugging Face folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        check_companions(folder)
        self.architecture = read_architecture(folder)
        self.config = self.architecture.config
        self.checkpoint = HFCheckpoint(folder)
        left_out = self.architecture.fields.left_out
        self.checkpoint.verify(self.architecture.specs, left_out=left_out)
        scales = set(self.checkpoint.scales.values())
        self.left_out = sorted(n for n in self.checkpoint.file_of if n not in scales and n.startswith(left_out or "\0"))
        self.has_tied_head = HEAD in self.checkpoint.file_of and HEAD not in self.architecture.origins

    @property
    def names(self) -> list[str]:
        return [*self.architecture.origins, *([HEAD] if self.has_tied_head else [])]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._widened(name) or self.checkpoint.dtype(name)

    def read(self, name: str) -> Tensor:
        return self.checkpoint.read(name).to(self.dtype(name))

    def _widened(self, name: str) -> torch.dtype | None:
        """What a rule keeps in a wider dtype than it is stored in."""
        origin = self.architecture.origins.get(name)
        wanted = origin[0].dtype if origin else None
        return wanted if wanted is not None and wanted.itemsize > self.checkpoint.dtype(name).itemsize else None

    def check_tied_head(self) -> None:
        """Raise UserError where a tied head is stored and is not the embedding."""
        if self.has_tied_head and not (
            self.shape(HEAD) == self.shape(EMBEDDING) and torch.equal(self.read(HEAD), self.read(EMBEDDING))
        ):
            raise UserError(
                f"{self.folder}: {HEAD} is not {EMBEDDING}, though config.json says tie_word_embeddings=true; "
                "one of them is wrong"
            )


class TorchDistModel:
    """A folder of Megatron's dist_checkpointing with our description and the model's config beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.description: Description = read_description(folder)
        if (folder / CHECKSUMS).is_file() and (damage := find_damage(folder, sizes_only=True)):
            raise UserError("; ".join(damage[:5]))
        check_companions(folder / HF_FOLDER)
        self.architecture = read_architecture(folder / HF_FOLDER)
        self.config = self.architecture.config
        self.checkpoint = TorchDistCheckpoint(folder)
        if os.path.lexists(folder / COMMON):  # nothing of it is needed: it is read to refuse what another would run
            self.checkpoint.common()
        self.left_out: list[str] = []
        self.layout: HFLayout | None = read_layout(folder)
        self.places = self._places()
        self.has_tied_head = (
            self.layout is not None and HEAD not in self.architecture.origins and HEAD in self.layout.names
        )
        self._check_layout()

    def _places(self) -> dict[str, Place]:
        """Of each parameter by Megatron's name; UserError unless the checkpoint holds exactly the model's."""
        stored = self.checkpoint.tensors
        fields, specs = self.architecture.fields, self.architecture.specs
        stacked = any(key.startswith("decoder.layers.") and not key.split(".")[2].isdigit() for key in stored)
        table = KeyTable.of(fields, specs, stacks_layers=stacked)
        places = {spec.megatron: table.place(spec) for spec in self.architecture.exported}
        wanted = {place.key for place in places.values()}
        missing = sorted(wanted - stored.keys())
        extra = sorted(key for key in stored.keys() - wanted if key.startswith(MODEL_KEYS))
        if missing or extra:
            raise UserError(
                f"{self.folder} does not match its {HF_FOLDER}/config.json: missing {_some(missing)}; "
                f"unexpected {_some(extra)}"
            )
        for spec in self.architecture.exported:
            place = places[spec.megatron]
            shape, found = (*place.sizes, *megatron_shape(spec)), stored[place.key].shape
            padded = isinstance(spec.codec, Vocabulary) and found[1:] == shape[1:] and found[:1] > shape[:1]
            if found != shape and not padded:
                raise UserError(
                    f"{self.folder}: {place.key} is {list(found)}, {HF_FOLDER}/config.json implies {list(shape)}"
                )
        return places

    def _check_layout(self) -> None:
        if self.layout is None:
            return
        names = set(self.names)
        if set(self.layout.names) != names or len(self.layout.names) != len(names):
            wrong = sorted(set(self.layout.names) ^ names)
            raise UserError(f"{self.layout.path} does not list the model's tensors, each once: {_some(wrong)}")

    @property
    def names(self) -> list[str]:
        return [*self.architecture.origins, *([HEAD] if self.has_tied_head else [])]

    def origin(self, name: str) -> tuple[TensorSpec, int]:
        """Where a tensor comes from. A tied head is the embedding."""
        return self.architecture.origins[EMBEDDING if name == HEAD and self.has_tied_head else name]

    @property
    def others(self) -> list[str]:
        """Keys of stored tensors that are not the model's: the optimizer's state."""
        return sorted(key for key in self.checkpoint.tensors if not key.startswith(MODEL_KEYS))

    def shape(self, name: str) -> tuple[int, ...]:
        spec, i = self.origin(name)
        return spec.hf_shapes[i]

    def dtype(self, name: str) -> torch.dtype:
        spec, _ = self.origin(name)
        return self.checkpoint.tensors[self.places[spec.megatron].key].dtype

    def read_parameter(self, spec: TensorSpec) -> list[Tensor]:
        """All HF tensors of a parameter."""
        place = self.places[spec.megatron]
        whole = self.checkpoint.read(place.key, place.index)
        if type(spec.codec) is Copy:
            return [whole]
        targets = [torch.empty(shape, dtype=whole.dtype) for shape in spec.hf_shapes]
        spec.codec.place(whole, None, 0, 1, targets)
        return targets

    def read(self, name: str) -> Tensor:
        spec, i = self.origin(name)
        return self.read_parameter(spec)[i]


def open_model(folder: Path) -> HFModel | TorchDistModel:
    """A folder of either format. Raises UserError where it is neither, or damaged."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give a Hugging Face model or a torch_dist checkpoint")
    if is_torch_dist(folder) or (folder / DESCRIPTION).exists():
        return TorchDistModel(folder)
    if (folder / INDEX).exists() or (folder / SINGLE).exists() or (folder / "config.json").exists():
        return HFModel(folder)
    raise UserError(
        f"{folder} is neither a Hugging Face model ({SINGLE} or {INDEX}) nor a torch_dist checkpoint ({DESCRIPTION})"
    )


def _some(names: list[str], most: int = 5) -> str:
    return f"{len(names)} ({', '.join(names[:most])}{', …' if len(names) > most else ''})" if names else "none"
