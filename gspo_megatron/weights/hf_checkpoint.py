"""Hugging Face safetensors folders: reading tensor by tensor, proving completeness, writing atomically."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gspo_megatron.errors import UserError
from gspo_megatron.types import NamedTensor
from gspo_megatron.weights.rules import TensorSpec

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)

# Integers and eight-bit floats are quantized weights: without their scales they mean nothing.
_WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")


class HFCheckpoint:
    """The weights of one folder. Opens files lazily; `read` returns one tensor."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._open_files: dict[str, Any] = {}
        self.file_of = self._locate()
        self.bytes_read = 0

    def _locate(self) -> dict[str, str]:
        """File name of each tensor."""
        index = self.folder / INDEX
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
                names = {str(name): str(file) for name, file in weight_map.items()}
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise UserError(f"{index} is no safetensors index: {error!r}") from None
            for file in set(names.values()):
                if Path(file).name != file or not (self.folder / file).is_file():
                    raise UserError(f"{index} names {file!r}, which is not a file of {self.folder}")
            return names
        if (self.folder / SINGLE).is_file():
            return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        raise UserError(
            f"{self.folder} holds no weights ({SINGLE} or {INDEX}); "
            'set model.init="random" to start from random weights'
        )

    def _file(self, name: str) -> Any:
        if name not in self._open_files:
            try:
                self._open_files[name] = safe_open(self.folder / name, framework="pt", device="cpu")
            except (SafetensorError, OSError, struct.error) as error:
                raise UserError(f"{self.folder / name} is no readable safetensors file: {error}") from None
        return self._open_files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the file's header."""
        return tuple(self._header(name).get_shape())

    def _header(self, name: str) -> Any:
        try:
            return self._file(self.file_of[name]).get_slice(name)
        except SafetensorError as error:
            raise UserError(f"{self.folder / self.file_of[name]} lacks {name}: {error}") from None

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        tensor = self._file(self.file_of[name]).get_tensor(name)
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def verify(self, specs: Sequence[TensorSpec], *, left_out: tuple[str, ...] = ()) -> None:
        """Raise UserError unless the folder holds exactly the tensors of the specs, in their shapes, as numbers.

        `left_out`: prefixes of tensors that may be there and are not read (`ModelFields.left_out`)."""
        expected = {name: shape for s in specs for name, shape in zip(s.hf, s.hf_shapes, strict=True)}
        # A tied model may be stored with or without its head's copy of the embedding.
        tied = {"lm_head.weight"} if "lm_head.weight" not in expected else set()
        missing = sorted(expected.keys() - self.file_of.keys())
        extra = sorted(n for n in self.file_of.keys() - expected.keys() - tied if not n.startswith(left_out))
        if missing or extra:
            raise UserError(
                f"{self.folder} does not match its config.json: missing {_listing(missing)}; "
                f"unexpected {_listing(extra)}"
            )
        wrong = [
            f"{name} is {list(self.shape(name))}, config.json implies {list(shape)}"
            for name, shape in expected.items()
            if self.shape(name) != shape
        ]
        stored = {name: self._header(name).get_dtype() for name in expected}
        wrong += [
            f"{name} is stored as {dtype}, but weights must be one of {', '.join(_WEIGHT_DTYPES)}"
            for name, dtype in stored.items()
            if dtype not in _WEIGHT_DTYPES
        ]
        if wrong:
            raise UserError(
                f"{self.folder}: {'; '.join(wrong[:5])}" + (f"; and {len(wrong) - 5} more" * (len(wrong) > 5))
            )


def _listing(names: list[str], most: int = 8) -> str:
    if not names:
        return "none"
    return f"{len(names)} ({', '.join(names[:most])}{', …' if len(names) > most else ''})"


def save_hf_folder(
    folder: Path, tensors: Iterable[NamedTensor], *, companions_from: Path, shard_bytes: int = 4 * 2**30
) -> None:
    """Write weights and the config and tokenizer files of `companions_from`.

    The folder appears under its name only when complete. Raises UserError if it exists.
    """
    if folder.exists():
        raise UserError(f"{folder} exists; choose another folder or remove it")
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    shards: list[list[str]] = []
    dtypes: Counter[torch.dtype] = Counter()
    total, pending_bytes = 0, 0
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        nonlocal pending, pending_bytes
        save_file(pending, partial / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending, pending_bytes = {}, 0

    for item in tensors:
        size = item.tensor.numel() * item.tensor.element_size()
        dtypes[item.tensor.dtype] += size
        if pending and pending_bytes + size > shard_bytes:
            flush()
        pending[item.name] = item.tensor.detach().to("cpu", copy=True).contiguous()
        pending_bytes, total = pending_bytes + size, total + size
    flush()
    if len(shards) == 1:
        (partial / "shard-0").rename(partial / SINGLE)
    else:
        weight_map: dict[str, str] = {}
        for i, names in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            (partial / f"shard-{i}").rename(partial / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / INDEX).write_text(json.dumps(index, indent=1))
    for name in COMPANIONS:
        if (companions_from / name).is_file():
            shutil.copy(companions_from / name, partial / name)
    _state_dtype(partial / "config.json", dtypes)
    partial.rename(folder)


def _state_dtype(config: Path, dtypes: Counter[torch.dtype]) -> None:
    """Make config.json name the dtype that most was saved in, where it names another."""
    if not dtypes or not config.is_file():
        return
    content = json.loads(config.read_text())
    saved = str(dtypes.most_common(1)[0][0]).removeprefix("torch.")
    stated = {key: saved for key in ("dtype", "torch_dtype") if content.get(key) not in (None, saved)}
    if stated:
        config.write_text(json.dumps(content | stated, indent=2) + "\n")


def random_tensor(name: str, shape: tuple[int, ...], *, std: float, seed: int) -> Tensor:
    """Initial value of a tensor, a function of its name: the same in every parallel layout.

    Norm weights are one, biases and other vectors zero, all else is normal(0, std). float32.
    """
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("norm.weight") else torch.zeros(shape)
    digest = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    generator = torch.Generator().manual_seed((digest ^ seed * 0x9E3779B97F4A7C15) % 2**63)
    return torch.randn(shape, generator=generator) * std
