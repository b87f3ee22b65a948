"""Hugging Face → torch_dist: the plan, and the bytes of each file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from gspo_megatron.errors import UserError
from gspo_megatron.weights.conversion.execute import MANIFEST, OutputFile
from gspo_megatron.weights.conversion.hf_layout import HFLayout, write_layout
from gspo_megatron.weights.conversion.identity import identity_of, names_of
from gspo_megatron.weights.conversion.models import EMBEDDING, HFModel
from gspo_megatron.weights.hf_checkpoint import INDEX, copy_companions, list_left_behind, state_storage
from gspo_megatron.weights.rules import TensorSpec
from gspo_megatron.weights.torch_dist.checksums import FileSum, write_checksums
from gspo_megatron.weights.torch_dist.description import HF_FOLDER, Description, write_description
from gspo_megatron.weights.torch_dist.keys import KeyTable
from gspo_megatron.weights.torch_dist.records import record
from gspo_megatron.weights.torch_dist.writer import (
    CHUNK_BYTES,
    DistcpFile,
    Parameter,
    parameters_of,
    plan_files,
    write_structure,
)

FILE_BYTES = 128 * 2**20  # of a file, or more in large models: a killed conversion goes on with the file it was in
_MOST_FILES = 256


class ToMegatron:
    """The conversion of one Hugging Face folder.

    Args:
        model: the source.
        dtype: of the weights that are written; None: as they are stored, eight-bit floats as bfloat16.
    """

    def __init__(
        self,
        model: HFModel,
        *,
        dtype: torch.dtype | None = None,
        file_bytes: int | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.model, self.source, self.requested = model, model.folder, dtype
        architecture = model.architecture
        model.check_tied_head()
        self.table = KeyTable.of(architecture.fields, architecture.specs)
        dtypes = {spec.megatron: self._dtype(spec) for spec in architecture.exported}
        parameters = parameters_of(self.table, architecture.specs, dtypes)
        self._check_dtypes(parameters)
        self.dtype = dtypes[architecture.origins[EMBEDDING][0].megatron]  # what the model as a whole is said to have
        total = sum(spec.numel * dtypes[spec.megatron].itemsize for spec in architecture.exported)
        size = file_bytes or max(FILE_BYTES, total // _MOST_FILES)
        self.distcp: list[DistcpFile] = plan_files(parameters, file_bytes=size, chunk_bytes=chunk_bytes)

    def _dtype(self, spec: TensorSpec) -> torch.dtype:
        if self.requested is not None:
            return spec.dtype or self.requested
        found = {self.model.dtype(name) for name in spec.hf}
        if len(found) > 1:
            raise UserError(
                f"{self.source}: {', '.join(spec.hf)} are one tensor in Megatron, but are stored as "
                f"{', '.join(sorted(map(str, found)))}; give --dtype"
            )
        return found.pop()

    def _check_dtypes(self, parameters: Sequence[Parameter]) -> None:
        by_key: dict[str, set[torch.dtype]] = {}
        for parameter in parameters:
            by_key.setdefault(parameter.place.key, set()).add(parameter.dtype)
        mixed = [key for key, dtypes in by_key.items() if len(dtypes) > 1]
        if mixed:
            raise UserError(f"{self.source}: what becomes {mixed[0]} is stored in several dtypes; give --dtype")

    @cached_property
    def files(self) -> list[OutputFile]:
        return [OutputFile(file.name, file.nbytes) for file in self.distcp]

    @property
    def dtypes(self) -> str:
        """Of what is written."""
        return names_of(entry.parameter.dtype for file in self.distcp for entry in file.entries)

    @property
    def memory_bytes(self) -> int:
        """What one thread may hold: a parameter's tensors, put together and converted."""
        largest = max(spec.numel for spec in self.model.architecture.exported)
        return 2 * largest * max(self.dtype.itemsize, 2)

    @property
    def identity(self) -> str:
        return identity_of(self.source, list(set(self.model.checkpoint.file_of.values())), self.files, self.requested)

    @property
    def left_behind(self) -> list[str]:
        """Files beside the weights that are neither converted nor copied."""
        checkpoint = self.model.checkpoint
        return list_left_behind(self.source, {*checkpoint.file_of.values(), *([INDEX] * checkpoint.is_indexed)})

    def content(self, number: int) -> Iterator[memoryview | bytes]:
        held: tuple[TensorSpec, Tensor] | None = None
        for entry in self.distcp[number].entries:
            spec = entry.parameter.spec
            if held is None or held[0] is not spec:
                held = None  # let go before the next is read
                held = spec, spec.codec.to_megatron([self.model.read(name) for name in spec.hf])
            block = held[1][entry.first_row : entry.first_row + entry.shape[0]] if entry.shape else held[1]
            block = block.to(entry.parameter.dtype).contiguous().view(entry.sizes)
            yield from record(entry.parameter.dtype, entry.sizes).encode(block)

    def finish(self, folder: Path, sums: Mapping[str, FileSum]) -> None:
        write_structure(folder, self.distcp, self.table)
        (folder / HF_FOLDER).mkdir()
        copy_companions(self.source, folder / HF_FOLDER)
        changed = self.requested is not None or self.model.checkpoint.scales
        state_storage(folder / HF_FOLDER / "config.json", self.dtype if changed else None)
        write_layout(folder, self._layout(folder))
        name = str(self.dtype).removeprefix("torch.")
        write_description(folder, Description(self.model.architecture.family.model_type, 0, name))
        write_checksums(folder, sums, skip={MANIFEST})

    def _layout(self, folder: Path) -> HFLayout:
        checkpoint, kept = self.model.checkpoint, set(self.model.names)
        files = {
            file: tuple(name for name in names if name in kept)
            for file, names in sorted(checkpoint.in_file_order().items())
        }
        files = {file: names for file, names in files.items() if names}
        index = None
        if checkpoint.is_indexed:
            found = json.loads((self.source / INDEX).read_bytes()).get("metadata", {})
            index = found if isinstance(found, dict) else {}
            stored = {
                spec: {checkpoint.stored_dtype(name) for name in spec.hf} for spec in self.model.architecture.exported
            }
            if self.model.left_out or any(dtypes != {self._dtype(spec)} for spec, dtypes in stored.items()):
                index |= self._sizes()
        return HFLayout(folder, files, {file: checkpoint.metadata(file) for file in files}, index)

    def _sizes(self) -> dict[str, int]:
        """What an index says of all tensors together."""
        origins = self.model.architecture.origins
        numbers = {name: torch.Size(self.model.shape(name)).numel() for name in self.model.names}
        itemsizes = {name: self._dtype(origins.get(name, origins[EMBEDDING])[0]).itemsize for name in numbers}
        return {"total_size": sum(count * itemsizes[name] for name, count in numbers.items())}
