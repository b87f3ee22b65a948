"""Hugging Face safetensors folders: reading tensor by tensor, proving completeness, writing atomically."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import threading
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gspo_megatron.errors import UserError
from gspo_megatron.types import NamedTensor
from gspo_megatron.weights.families.base import FURTHER_TOKEN_MARK
from gspo_megatron.weights.rules import TensorSpec
from gspo_megatron.weights.safetensors_header import DTYPES, Header, StoredTensor, read_header, without_duplicates

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

MOST_COMPANION_BYTES = 16 * 2**20  # of a file that is not one of COMPANIONS
_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".npy", ".distcp",
)  # fmt: skip

SCALE = "_scale_inv"  # behind a weight's name: that of its scales
SCALE_BLOCK = 128  # rows and columns of a weight that share a scale

# Integers and eight-bit floats are quantized weights: without their scales they mean nothing.
_WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")


class HFCheckpoint:
    """The weights of one folder. Maps files lazily; `read` returns one tensor. Safe to use from several threads.

    Weights in 8-bit floats with a scale for each block, as DeepSeek-V3 is published, are read as bfloat16.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._headers: dict[str, Header] = {}
        self._maps: dict[str, memoryview] = {}
        self._lock = threading.Lock()
        self.file_of = self._locate()
        self.bytes_read = 0
        names = self.file_of.keys()
        self.scales = {name: name + SCALE for name in names if name + SCALE in names}

    def _locate(self) -> dict[str, str]:
        """File name of each tensor. One file goes before an index, as in transformers."""
        index = self.folder / INDEX
        if (self.folder / SINGLE).is_file():
            _check_link(self.folder, SINGLE)
            return dict.fromkeys(self._header_of(SINGLE).tensors, SINGLE)
        if index.is_file():
            try:
                weight_map = json.loads(index.read_bytes(), object_pairs_hook=without_duplicates)["weight_map"]
                names = {str(name): str(file) for name, file in weight_map.items()}
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise UserError(f"{index} is no safetensors index: {type(error).__name__}: {error}") from None
            for file in set(names.values()):
                if not _is_name(file) or not (self.folder / file).is_file():
                    raise UserError(f"{index} names {file!r}, which is not a file of {self.folder}")
                _check_link(self.folder, file)
            return names
        raise UserError(
            f"{self.folder} holds no weights ({SINGLE} or {INDEX}); "
            'set model.init="random" to start from random weights'
        )

    def _header_of(self, file: str) -> Header:
        with self._lock:
            if file not in self._headers:
                self._headers[file] = read_header(self.folder / file)
            return self._headers[file]

    def _stored(self, name: str) -> StoredTensor:
        header = self._header_of(self.file_of[name])
        if name not in header.tensors:
            raise UserError(f"{self.folder / self.file_of[name]} lacks {name}, which {INDEX} says it holds")
        return header.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the file's header."""
        return self._stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Of the tensor as `read` returns it."""
        return torch.bfloat16 if name in self.scales else DTYPES[self._stored(name).dtype]

    @property
    def is_indexed(self) -> bool:
        """Whether an index says where the tensors are."""
        return not (self.folder / SINGLE).is_file()

    def stored_dtype(self, name: str) -> torch.dtype:
        """Of the tensor as it lies in its file."""
        return DTYPES[self._stored(name).dtype]

    def metadata(self, file: str) -> dict[str, str]:
        """What a file says of itself as a whole."""
        return self._header_of(file).metadata

    def in_file_order(self) -> dict[str, list[str]]:
        """Tensors of each file in the order in which they lie there."""
        named: dict[str, set[str]] = {}
        for name, file in self.file_of.items():
            named.setdefault(file, set()).add(name)
        return {
            file: [name for name in self._header_of(file).tensors if name in names] for file, names in named.items()
        }

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU. It may be a view of the file: don't write to it."""
        if name in self.scales:
            return self._unscaled(name)
        return self._read_stored(name)

    def _read_stored(self, name: str) -> Tensor:
        stored, file = self._stored(name), self.file_of[name]
        self.bytes_read += stored.nbytes
        dtype = DTYPES[stored.dtype]
        if stored.nbytes == 0:
            return torch.empty(stored.shape, dtype=dtype)
        begin = self._header_of(file).data_start + stored.start
        data = torch.frombuffer(self._map(file), dtype=torch.uint8, count=stored.nbytes, offset=begin)
        if begin % dtype.itemsize:
            data = data.clone()
        return data.view(dtype).view(stored.shape)

    def _map(self, file: str) -> memoryview:
        with self._lock:
            if file not in self._maps:
                with open(self.folder / file, "rb") as opened:
                    # A private mapping: torch wants memory that could be written to.
                    self._maps[file] = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY))
            return self._maps[file]

    def _unscaled(self, name: str) -> Tensor:
        """Each block of [128, 128] times its own scale, in float32, rounded to bfloat16."""
        weight, scale = self._read_stored(name), self._read_stored(self.scales[name])
        result = torch.empty(weight.shape, dtype=torch.bfloat16)
        columns = scale.repeat_interleave(SCALE_BLOCK, dim=1)[:, : weight.shape[1]]
        for block, factors in enumerate(columns):
            rows = slice(block * SCALE_BLOCK, (block + 1) * SCALE_BLOCK)
            result[rows] = weight[rows].float() * factors
        return result

    def verify(self, specs: Sequence[TensorSpec], *, left_out: tuple[str, ...] = ()) -> None:
        """Raise UserError unless the folder holds exactly the tensors of the specs, in their shapes, as numbers.

        `left_out`: prefixes of tensors that may be there and are not read (`ModelFields.left_out`)."""
        expected = {name: shape for s in specs for name, shape in zip(s.hf, s.hf_shapes, strict=True)}
        # A tied model may be stored with or without its head's copy of the embedding.
        tied = {"lm_head.weight"} if "lm_head.weight" not in expected else set()
        missing = sorted(expected.keys() - self.file_of.keys())
        known = expected.keys() | tied | set(self.scales.values())
        extra = sorted(n for n in self.file_of.keys() - known if not n.startswith(left_out))
        if missing or extra:
            raise UserError(
                f"{self.folder} does not match its config.json: missing {_listing(missing)}; "
                f"unexpected {_listing(extra)}"
            )
        for prefix in left_out:
            if prefix + FURTHER_TOKEN_MARK not in self.file_of and any(n.startswith(prefix) for n in self.file_of):
                raise UserError(
                    f"{self.folder} has {prefix}* behind the last of config.json's num_hidden_layers, which is no "
                    f"layer that predicts further tokens: it lacks {FURTHER_TOKEN_MARK}; correct num_hidden_layers"
                )
        wrong = [
            f"{name} is {list(self.shape(name))}, config.json implies {list(shape)}"
            for name, shape in expected.items()
            if self.shape(name) != shape
        ]
        stored = {name: self._stored(name).dtype for name in expected}
        wrong += [
            f"{name} is stored as {dtype}, but weights must be one of {', '.join(_WEIGHT_DTYPES)}"
            for name, dtype in stored.items()
            if dtype not in _WEIGHT_DTYPES and name not in self.scales
        ]
        wrong += [problem for name in expected.keys() & self.scales.keys() for problem in self._scale_problems(name)]
        wrong += self._quantization_problems()
        if wrong:
            raise UserError(
                f"{self.folder}: {'; '.join(wrong[:5])}" + (f"; and {len(wrong) - 5} more" * (len(wrong) > 5))
            )

    def _quantization_problems(self) -> list[str]:
        """What config.json says of scales must be so, and nothing else."""
        try:
            settings = json.loads((self.folder / "config.json").read_bytes()).get("quantization_config")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            return [f"config.json can't be read: {error}"] if self.scales else []
        if not self.scales:
            method = settings.get("quant_method") if isinstance(settings, dict) else settings
            said = f"config.json: quantization_config of quant_method={method!r}, but no weight has scales ({SCALE}): "
            return [] if settings is None else [said + "remove the key if the weights are plain numbers"]
        block = settings.get("weight_block_size") if isinstance(settings, dict) else None
        if block == [SCALE_BLOCK, SCALE_BLOCK]:
            return []
        return [
            f"config.json: quantization_config.weight_block_size={block!r}, but only weights with a scale for each "
            f"[{SCALE_BLOCK}, {SCALE_BLOCK}] can be read"
        ]

    def _scale_problems(self, name: str) -> list[str]:
        stored, scale = self._stored(name), self._stored(self.scales[name])
        blocks = tuple(-(-size // SCALE_BLOCK) for size in stored.shape)
        problems = []
        if stored.dtype != "F8_E4M3" or len(stored.shape) != 2:
            problems.append(f"{name} has scales, but is stored as {stored.dtype} {list(stored.shape)}, not F8_E4M3")
        if scale.dtype != "F32" or scale.shape != blocks:
            problems.append(
                f"{self.scales[name]} is {scale.dtype} {list(scale.shape)}, should be F32 {list(blocks)}: one scale "
                f"for {SCALE_BLOCK} × {SCALE_BLOCK} numbers"
            )
        return problems


def companions_of(folder: Path) -> list[str]:
    """Files that go with the weights: those of COMPANIONS that are there, then all other small ones, such as a
    tokenizer's code or a license. Hidden files, weights of whatever format and links out of the folder are none."""
    known = [name for name in COMPANIONS if (folder / name).is_file()]
    return known + sorted(p.name for p in folder.iterdir() if p.name not in COMPANIONS and _is_companion(p))


def _is_companion(path: Path) -> bool:
    if path.name.startswith(".") or path.name.endswith((*_WEIGHT_SUFFIXES, ".index.json")) or not path.is_file():
        return False
    try:
        _check_link(path.parent, path.name)
    except UserError:
        return False
    return path.stat().st_size <= MOST_COMPANION_BYTES


def list_left_behind(folder: Path, weights: Container[str]) -> list[str]:
    """Files and folders that are neither the weights that are read nor copied with them; hidden ones apart."""
    copied = companions_of(folder)
    found = (p.name for p in folder.iterdir() if not p.name.startswith("."))
    return sorted(name for name in found if name not in weights and name not in copied)


def check_companions(folder: Path) -> None:
    """Raise UserError where a file that would be copied with the weights is a link to elsewhere or can't be read."""
    for name in COMPANIONS:
        _check_link(folder, name)
        if (folder / name).exists() and not (folder / name).is_file():
            raise UserError(f"{folder / name} is no file; remove it or put the model's {name} there")
    for name in companions_of(folder):
        if not os.access(folder / name, os.R_OK):
            raise UserError(f"{folder / name} can't be read; give this user the right to")


def copy_companions(source: Path, target: Path) -> None:
    """What goes with the weights, as far as there is any."""
    check_companions(source)
    for name in companions_of(source):
        shutil.copyfile(source / name, target / name)


def _is_name(file: str) -> bool:
    """Whether it can be the name of a file in a folder, rather than a path to elsewhere."""
    try:
        return Path(file).name == file and "\0" not in file and len(file.encode()) <= 255
    except UnicodeEncodeError:
        return False


def _check_link(folder: Path, file: str) -> None:
    """A link may lead to another file of the folder, or to where the Hugging Face cache keeps a snapshot's files."""
    path, home = folder / file, folder.resolve()
    if path.is_symlink():
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:  # it leads nowhere, or to itself
            raise UserError(f"{path} is a link to no file: {error}") from None
        if home not in target.parents and target.parent != home.parent.parent / "blobs":
            raise UserError(f"{path} is a link out of {folder}, to {target}; put the file itself there")


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
    copy_companions(companions_from, partial)
    state_storage(partial / "config.json", dtypes.most_common(1)[0][0] if dtypes else None)
    partial.rename(folder)


def state_storage(config: Path, dtype: torch.dtype | None) -> None:
    """Make config.json speak of plain weights: without quantization_config, and of `dtype` where it names one.

    None: of the dtype that it names. A file that does already, or is not there, stays as it is.
    """
    if not config.is_file():
        return
    content = json.loads(config.read_bytes())
    stated = dict(content)
    if stated.get("quantization_config") is not None:
        del stated["quantization_config"]
    if dtype is not None:
        named = [key for key in ("dtype", "torch_dtype") if stated.get(key) is not None]
        stated |= dict.fromkeys(named, str(dtype).removeprefix("torch."))
    if stated != content:
        config.write_text(json.dumps(stated, indent=2) + "\n")


def random_tensor(name: str, shape: tuple[int, ...], *, std: float, seed: int) -> Tensor:
    """Initial value of a tensor, a function of its name: the same in every parallel layout.

    Norm weights are one, biases and other vectors zero, all else is normal(0, std). float32.
    """
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("norm.weight") else torch.zeros(shape)
    digest = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    generator = torch.Generator().manual_seed((digest ^ seed * 0x9E3779B97F4A7C15) % 2**63)
    return torch.randn(shape, generator=generator) * std
