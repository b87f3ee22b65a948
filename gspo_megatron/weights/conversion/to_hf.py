"""torch_dist → Hugging Face: the plan, and the bytes of each file."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from gspo_megatron.errors import UserError
from gspo_megatron.weights.conversion.execute import OutputFile
from gspo_megatron.weights.conversion.identity import identity_of, names_of
from gspo_megatron.weights.conversion.models import EMBEDDING, TorchDistModel
from gspo_megatron.weights.hf_checkpoint import INDEX, SINGLE, copy_companions, list_left_behind, state_storage
from gspo_megatron.weights.safetensors_header import format_header
from gspo_megatron.weights.torch_dist.checksums import CHECKSUMS, FileSum, hash_file, read_checksums
from gspo_megatron.weights.torch_dist.description import HF_FOLDER
from gspo_megatron.weights.torch_dist.records import raw_bytes

SHARD_BYTES = 4 * 2**30  # of a file, where the model has no files of its own to go by


@dataclass(frozen=True)
class SafetensorsFile:
    """One file of the result."""

    name: str
    tensors: tuple[str, ...]
    header: bytes
    nbytes: int


class ToHF:
    """The conversion of one torch_dist folder.

    Args:
        model: the source.
        dtype: of the weights that are written; None: as they are stored.
        shard_bytes: of a file, at most, where the checkpoint has no hf_layout.json.
    """

    def __init__(
        self, model: TorchDistModel, *, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.model, self.source, self.requested = model, model.folder, dtype
        layout = model.layout
        files = layout.files if layout else self._cut(shard_bytes)
        metadata = layout.file_metadata if layout else {}
        self.index_metadata = layout.index_metadata if layout else ({} if len(files) > 1 else None)
        self.safetensors = []
        for file, names in files.items():
            described = [(name, self.dtype(name), model.shape(name)) for name in names]
            header, nbytes = format_header(described, metadata.get(file, {"format": "pt"}))
            self.safetensors.append(SafetensorsFile(file, tuple(names), header, nbytes))
        self._sums = read_checksums(self.source) if (self.source / CHECKSUMS).is_file() else {}
        self._checked: set[str] = set()
        self._lock = threading.Lock()

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor as it is written."""
        if self.requested is None:
            return self.model.dtype(name)
        return self.model.origin(name)[0].dtype or self.requested

    def _cut(self, shard_bytes: int) -> dict[str, Sequence[str]]:
        shards: list[list[str]] = [[]]
        size = 0
        for name in self.model.names:
            nbytes = math.prod(self.model.shape(name)) * self.dtype(name).itemsize
            if shards[-1] and size + nbytes > shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += nbytes
        if len(shards) == 1:
            return {SINGLE: shards[0]}
        count = len(shards)
        return {f"model-{i + 1:05d}-of-{count:05d}.safetensors": names for i, names in enumerate(shards)}

    @cached_property
    def files(self) -> list[OutputFile]:
        return [OutputFile(file.name, file.nbytes) for file in self.safetensors]

    @property
    def dtypes(self) -> str:
        """Of what is written."""
        return names_of(map(self.dtype, self.model.names))

    @property
    def memory_bytes(self) -> int:
        """What one thread may hold: a parameter, the tensors that it is taken apart into, one of them converted."""
        largest = max(spec.numel for spec in self.model.architecture.exported)
        return (
            3 * largest * 4
            if self.requested
            else 2 * largest * max(self.model.dtype(n).itemsize for n in self.model.names)
        )

    @property
    def identity(self) -> str:
        files = {chunk.file for tensor in self.model.checkpoint.tensors.values() for chunk in tensor.chunks}
        return identity_of(self.source, files, self.files, self.requested)

    @property
    def left_behind(self) -> list[str]:
        """Files beside the weights that are not copied."""
        return list_left_behind(self.source / HF_FOLDER, set())

    def content(self, number: int) -> Iterator[memoryview | bytes]:
        file = self.safetensors[number]
        yield file.header
        # Tensors of one parameter lie near each other: they are kept until the last one of the file is written.
        left = Counter(self.model.origin(name)[0].megatron for name in file.tensors)
        held: dict[str, list[Tensor]] = {}
        for name in file.tensors:
            spec, i = self.model.origin(name)
            if spec.megatron not in held:
                self._check_source(self.model.places[spec.megatron].key)
                held[spec.megatron] = self.model.read_parameter(spec)
            tensor = held[spec.megatron][i]
            left[spec.megatron] -= 1
            if not left[spec.megatron]:
                del held[spec.megatron]
            yield raw_bytes(tensor.to(self.dtype(name)).contiguous())

    def _check_source(self, key: str) -> None:
        """Files that a tensor comes from have their checksums; each is read once for that, shortly before its use."""
        with self._lock:  # nobody uses a file that is still being checked
            for file in sorted({chunk.file for chunk in self.model.checkpoint.tensors[key].chunks} & self._sums.keys()):
                if file not in self._checked and (found := hash_file(self.source / file)) != self._sums[file]:
                    raise UserError(
                        f"{self.source / file} is damaged: {found.size} bytes with xxh3-128 {found.xxh3_128}, should "
                        f"be {self._sums[file].size} with {self._sums[file].xxh3_128}"
                    )
                self._checked.add(file)

    def finish(self, folder: Path, sums: Mapping[str, FileSum]) -> None:
        copy_companions(self.source / HF_FOLDER, folder)
        state_storage(folder / "config.json", self._stated_dtype())
        if self.index_metadata is not None:
            metadata = dict(self.index_metadata)
            if self.requested is not None or not metadata:
                sizes = (math.prod(self.model.shape(name)) * self.dtype(name).itemsize for name in self.model.names)
                metadata["total_size"] = sum(sizes)
            weight_map = {name: file.name for file in self.safetensors for name in file.tensors}
            content = {"metadata": metadata, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")

    def _stated_dtype(self) -> torch.dtype | None:
        """What training has saved need not have the dtype of the config that it began with."""
        if self.requested is None and self.model.layout is None:
            return self.dtype(EMBEDDING)
        return self.requested
