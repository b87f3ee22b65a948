"""270 broken folders, more than 200 of them different, made from a seed: copies of good ones with one thing wrong.

Every case is (name, source kind, harm, file that the message must name). A harm gets the folder, a random generator
and the path of a marker that a payload would create if it ran.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

SEED = 20260131
COUNT = 270
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"

Harm = Callable[[Path, random.Random, Path], None]


@dataclass(frozen=True)
class Case:
    """One broken folder."""

    name: str
    kind: str  # "hf", "sharded", "scaled" or "dist": which good folder it is made from
    harm: Harm
    named: str  # file or folder that the message must name, relative to the folder; "": the folder itself


class Payload:
    """Unpickles to a command that creates the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


# --- safetensors -------------------------------------------------------------------------------------------------


def edit_header(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    data = path.read_bytes()
    [length] = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = edit(header)
    text = json.dumps(header).encode() if text is None else text
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def any_name(header: dict[str, Any], rng: random.Random) -> str:
    return rng.choice([name for name in header if name != "__metadata__"])


def truncated(folder: Path, rng: random.Random, marker: Path) -> None:
    path = folder / WEIGHTS
    os.truncate(path, rng.randrange(path.stat().st_size))


def extended(folder: Path, rng: random.Random, marker: Path) -> None:
    with open(folder / WEIGHTS, "ab") as file:
        file.write(bytes(rng.randrange(1, 100)))


def header_length(folder: Path, rng: random.Random, marker: Path) -> None:
    length = rng.choice([0, 1, 2**20, 2**31, 2**40, 2**62, 2**63, 2**64 - 1])
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[:8] = struct.pack("<Q", length)
    (folder / WEIGHTS).write_bytes(data)


def header_of_nan(folder: Path, rng: random.Random, marker: Path) -> None:
    def edit(header: dict[str, Any]) -> None:
        header[any_name(header, rng)]["shape"][0] = rng.choice([float("nan"), float("inf"), -float("inf")])

    edit_header(folder / WEIGHTS, edit)


def header_length_of_nan(folder: Path, rng: random.Random, marker: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[:8] = struct.pack("<d", rng.choice([float("nan"), float("inf"), -float("nan")]))
    (folder / WEIGHTS).write_bytes(data)


def header_text(folder: Path, rng: random.Random, marker: Path) -> None:
    texts = [b"", b"[]", b"null", b"{", b"\xff\xfe{}", b"[" * 5000, b"{}", b'{"a": 1}', b'"' + b"a" * 100 + b'"']
    edit_header(folder / WEIGHTS, lambda header: rng.choice(texts))


def wrong_dtype(folder: Path, rng: random.Random, marker: Path) -> None:
    def edit(header: dict[str, Any]) -> None:
        header[any_name(header, rng)]["dtype"] = rng.choice(
            ["I16", "U8", "F32", "BF17", "", None, 3, "F8_E4M3", ["F32"]]
        )

    edit_header(folder / WEIGHTS, edit)


def wrong_shape(folder: Path, rng: random.Random, marker: Path) -> None:
    def edit(header: dict[str, Any]) -> None:
        entry = header[any_name(header, rng)]
        shape = entry["shape"]
        entry["shape"] = rng.choice(
            [[*shape, 2], shape[:-1], [-n for n in shape], [2**62, 2**62], "ab", None, [1.5], {}]
        )

    edit_header(folder / WEIGHTS, edit)


def transposed_shape(folder: Path, rng: random.Random, marker: Path) -> None:
    def edit(header: dict[str, Any]) -> None:
        entry = header["model.layers.0.mlp.experts.1.gate_proj.weight"]
        entry["shape"] = entry["shape"][::-1]

    edit_header(folder / WEIGHTS, edit)


def offsets(folder: Path, rng: random.Random, marker: Path) -> None:
    """Overlapping, out of range, turned round, of wrong types."""

    def edit(header: dict[str, Any]) -> None:
        entry, other = header[any_name(header, rng)], header[any_name(header, rng)]
        start, end = entry["data_offsets"]
        far = rng.choice([2**33, 2**63, 2**70])
        while other is entry:
            other = header[any_name(header, rng)]
        entry["data_offsets"] = rng.choice(
            [[end, start], [start + 2, end + 2], [start, end + far], [start + far, end + far], [-8, end - start - 8],
             [other["data_offsets"][0], other["data_offsets"][0] + end - start + 2], [start], [], "0", [0.0, 8.0], None]
        )  # fmt: skip

    edit_header(folder / WEIGHTS, edit)


def duplicate_name(folder: Path, rng: random.Random, marker: Path) -> None:
    def edit(header: dict[str, Any]) -> bytes:
        name = any_name(header, rng)
        again = json.dumps({name: header[name]})[1:]
        return (json.dumps(header)[:-1] + ", " + again).encode()

    edit_header(folder / WEIGHTS, edit)


def missing_tensor(folder: Path, rng: random.Random, marker: Path) -> None:
    """Renamed: one is missing, another is too many."""

    def edit(header: dict[str, Any]) -> None:
        name = any_name(header, rng)
        header[name + rng.choice([".old", "_", "/../x"])] = header.pop(name)

    edit_header(folder / WEIGHTS, edit)


def pickle_for_weights(folder: Path, rng: random.Random, marker: Path) -> None:
    if rng.random() < 0.5:
        (folder / WEIGHTS).write_bytes(pickle.dumps(Payload(marker)))
    else:
        torch.save(Payload(marker), folder / WEIGHTS)


def pickle_beside_nothing(folder: Path, rng: random.Random, marker: Path) -> None:
    """Old weights in a pickle, and no safetensors."""
    (folder / WEIGHTS).unlink()
    torch.save({"a": Payload(marker)}, folder / "pytorch_model.bin")


def folder_for_weights(folder: Path, rng: random.Random, marker: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def weights_link(folder: Path, rng: random.Random, marker: Path) -> None:
    outside = folder.parent / f"{folder.name}_outside"
    (folder / WEIGHTS).rename(outside)
    (folder / WEIGHTS).symlink_to(outside if rng.random() < 0.5 else f"../{outside.name}")


# --- index -------------------------------------------------------------------------------------------------------


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / INDEX).read_text())
    edit(content)
    (folder / INDEX).write_text(json.dumps(content))


def index_path(folder: Path, rng: random.Random, marker: Path) -> None:
    """Traversal: relative, absolute, through a folder, an empty name, a NUL."""
    good = next(folder.glob("model-*"))
    outside = folder.parent / f"{folder.name}_{good.name}"
    outside.write_bytes(good.read_bytes())
    (folder / "sub").mkdir()
    (folder / "sub" / good.name).write_bytes(good.read_bytes())
    paths = [f"../{outside.name}", str(outside), f"sub/{good.name}", f"./../{folder.name}/{good.name}", "", ".", "..",
             "/etc/passwd", f"{good.name}\0", "~", "a" * 300, f"..\\{good.name}", "//" + good.name]  # fmt: skip

    def edit(content: dict[str, Any]) -> None:
        weight_map = content["weight_map"]
        weight_map[rng.choice(sorted(weight_map))] = rng.choice(paths)

    edit_index(folder, edit)


def index_link(folder: Path, rng: random.Random, marker: Path) -> None:
    path = sorted(folder.glob("model-*"))[rng.randrange(2)]
    outside = folder.parent / f"{folder.name}_{path.name}"
    path.rename(outside)
    path.symlink_to(outside)


def index_types(folder: Path, rng: random.Random, marker: Path) -> None:
    choices: list[Any] = [[], {}, None, "x", 3, {"weight_map": None}, {"weight_map": []}, {"weight_map": "model"},
                          {"weight_map": {"a": 3}}, {"weight_map": {"a": None}}, {"weight_map": {}}]  # fmt: skip
    (folder / INDEX).write_text(json.dumps(rng.choice(choices)))


def index_text(folder: Path, rng: random.Random, marker: Path) -> None:
    data = (folder / INDEX).read_bytes()
    (folder / INDEX).write_bytes(rng.choice([b"", data[: rng.randrange(len(data) - 2)], b"\xff" + data, b"[" * 20_000]))


def index_lacks(folder: Path, rng: random.Random, marker: Path) -> None:
    edit_index(folder, lambda content: content["weight_map"].pop(rng.choice(sorted(content["weight_map"]))))


def index_swaps(folder: Path, rng: random.Random, marker: Path) -> None:
    """A tensor is said to be in the other file."""

    def edit(content: dict[str, Any]) -> None:
        weight_map = content["weight_map"]
        name = rng.choice(sorted(weight_map))
        weight_map[name] = next(file for file in weight_map.values() if file != weight_map[name])

    edit_index(folder, edit)


def index_twice(folder: Path, rng: random.Random, marker: Path) -> None:
    text = (folder / INDEX).read_text().rstrip()
    first = next(iter(json.loads(text)["weight_map"]))
    (folder / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{first}": "../x",', 1))


def missing_shard(folder: Path, rng: random.Random, marker: Path) -> None:
    rng.choice(sorted(folder.glob("model-*"))).unlink()


def truncated_shard(folder: Path, rng: random.Random, marker: Path) -> None:
    path = rng.choice(sorted(folder.glob("model-*")))
    os.truncate(path, rng.randrange(path.stat().st_size))


# --- config.json -------------------------------------------------------------------------------------------------


def config_types(folder: Path, rng: random.Random, marker: Path) -> None:
    keys = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "rms_norm_eps", "rope_theta", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
            "tie_word_embeddings", "norm_topk_prob", "model_type", "mlp_only_layers", "rope_scaling"]  # fmt: skip
    values: list[Any] = ["abc", "12", [3], {"a": 1}, -4, 1e400, float("nan"), 2**70]
    key, value = rng.choice(keys), rng.choice(values)
    sound = {"mlp_only_layers": [3], "rope_scaling": {"a": 1}}
    edit_config(folder, {key: "abc" if value == sound.get(key) else value})


def config_sizes(folder: Path, rng: random.Random, marker: Path) -> None:
    edit_config(folder, rng.choice([
        {"num_hidden_layers": 10**9}, {"num_experts": 10**8}, {"num_hidden_layers": 0}, {"hidden_size": 0},
        {"hidden_size": 17}, {"num_attention_heads": 3}, {"num_key_value_heads": 3}, {"vocab_size": 2**31 - 1},
        {"num_experts": 5}, {"num_hidden_layers": 3}, {"decoder_sparse_step": 0}, {"head_dim": 7},
    ]))  # fmt: skip


def config_keys(folder: Path, rng: random.Random, marker: Path) -> None:
    content = json.loads((folder / CONFIG).read_text())
    del content[rng.choice(["vocab_size", "hidden_size", "num_hidden_layers", "model_type", "rms_norm_eps"])]
    (folder / CONFIG).write_text(json.dumps(content))


def config_model(folder: Path, rng: random.Random, marker: Path) -> None:
    edit_config(folder, {"model_type": rng.choice(["qwen3_moe ", "", "../qwen3", "gpt2", "qwen3", "__import__('os')"])})


def config_text(folder: Path, rng: random.Random, marker: Path) -> None:
    data = (folder / CONFIG).read_bytes()
    broken = [b"", data[: rng.randrange(1, len(data) - 4)], b"\xff\xfe" + data, b"[" * 20_000, b"[1]", b"null", b"\0"]
    (folder / CONFIG).write_bytes(rng.choice([*broken, pickle.dumps(Payload(marker))]))


def config_missing(folder: Path, rng: random.Random, marker: Path) -> None:
    (folder / CONFIG).unlink()


def companion_link(folder: Path, rng: random.Random, marker: Path) -> None:
    """A file that is copied with the weights is a link to a secret."""
    home = folder / "hf" if (folder / "hf").is_dir() else folder
    secret = folder.parent / f"{folder.name}_secret"
    secret.write_text((home / CONFIG).read_text())
    name = rng.choice(["tokenizer.json", "vocab.json", "merges.txt", "generation_config.json", CONFIG])
    (home / name).unlink(missing_ok=True)
    (home / name).symlink_to(rng.choice([secret, "/etc/passwd"]))
    forget_checksums(folder)


def edit_config(folder: Path, change: dict[str, Any]) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def scales(folder: Path, rng: random.Random, marker: Path) -> None:
    """Of another size or dtype, of a weight that is not there, or with blocks of another size."""
    choice = rng.randrange(4)
    if choice == 0:
        edit_config(folder, {"quantization_config": rng.choice([{"weight_block_size": [1, 1]}, {}, 3, "fp8"])})
        return

    def edit(header: dict[str, Any]) -> None:
        entry = header["model.layers.0.self_attn.o_proj.weight_scale_inv"]
        if choice == 1:
            entry["shape"] = entry["shape"][::-1] if entry["shape"][0] != entry["shape"][1] else [4, 1]
        elif choice == 2:
            entry["dtype"] = "I32"
        else:
            header["x_scale_inv"] = header.pop("model.layers.0.self_attn.o_proj.weight_scale_inv")

    edit_header(folder / WEIGHTS, edit)


# --- torch_dist --------------------------------------------------------------------------------------------------


def edit_metadata(folder: Path, edit: Callable[[Any], Any]) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edited = edit(metadata)
    path.write_bytes(pickle.dumps(metadata if edited is None else edited))
    forget_checksums(folder)


def forget_checksums(folder: Path) -> None:
    """So that what lies deeper has to find the damage."""
    (folder / "checksums.json").unlink(missing_ok=True)


def metadata_runs(folder: Path, rng: random.Random, marker: Path) -> None:
    """A `.metadata` that calls os.system: alone, inside the metadata, as a key, as a dtype, in protocol 0."""

    def edit(metadata: Any) -> Any:
        payload, choice = Payload(marker), rng.randrange(5)
        tensor = next(e for e in metadata.state_dict_metadata.values() if hasattr(e, "properties"))
        if choice == 0:
            return payload
        if choice == 1:
            metadata.planner_data = payload
        elif choice == 2:
            metadata.state_dict_metadata["x"] = payload
        elif choice == 3:
            tensor.chunks.append(payload)
        else:
            metadata.storage_data[MetadataIndex("x")] = payload
        return None

    edit_metadata(folder, edit)


def metadata_bytes(folder: Path, rng: random.Random, marker: Path) -> None:
    path = folder / ".metadata"
    data = path.read_bytes()
    place = rng.randrange(len(data))
    path.write_bytes(rng.choice([
        data[:place], b"", b"\x80\x05", f"cos\nsystem\n(S'touch {marker}'\ntR.".encode(),
        f"cbuiltins\neval\n(S'open({str(marker)!r}, \"w\")'\ntR.".encode(),
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x80\x04\x8e" + b"\xff" * 8, b"(" * 100_000,
    ]))  # fmt: skip
    forget_checksums(folder)


def metadata_paths(folder: Path, rng: random.Random, marker: Path) -> None:
    """Entries outside the folder, outside their file, or of no sensible place."""

    def edit(metadata: Any) -> None:
        index = rng.choice(list(metadata.storage_data))
        info = metadata.storage_data[index]
        change: dict[str, Any] = rng.choice([
            {"relative_path": "../outside"}, {"relative_path": "/etc/passwd"}, {"relative_path": ""},
            {"relative_path": "absent.distcp"}, {"relative_path": 3}, {"relative_path": "sub/__0_0.distcp"},
            {"relative_path": "a\0b"}, {"relative_path": "a" * 300},
            {"offset": -64}, {"offset": 2**62}, {"length": 2**62}, {"length": -1},
            {"offset": None}, {"length": "8"}, {"offset": 1.5}, {"transform_descriptors": ["zstd"]},
        ])  # fmt: skip
        metadata.storage_data[index] = replace(info, **change)

    edit_metadata(folder, edit)


def metadata_boxes(folder: Path, rng: random.Random, marker: Path) -> None:
    """Tensors that are not filled, parts that overlap or lie outside, other shapes and dtypes."""

    def edit(metadata: Any) -> None:
        key = rng.choice([k for k, e in metadata.state_dict_metadata.items() if hasattr(e, "chunks") and "expert" in k])
        entry = metadata.state_dict_metadata[key]
        chunk, choice = entry.chunks[0], rng.randrange(8)
        if choice == 0:
            entry.chunks.pop()
        elif choice == 1:
            entry.chunks.append(chunk)
        elif choice == 2:
            entry.chunks[-1] = chunk
        elif choice == 3:
            entry.size = torch.Size([2 * n for n in entry.size])
        elif choice == 4:
            chunk.sizes = torch.Size([0 for _ in chunk.sizes])
        elif choice == 5:
            entry.properties.dtype = rng.choice([torch.int64, torch.float64, torch.bool])
        elif choice == 6:
            chunk.offsets = rng.choice([(-1, 0, 0), (0, 0), None, "abc", torch.Size([9, 9, 9])])
        else:
            del metadata.state_dict_metadata[key]

    edit_metadata(folder, edit)


def metadata_missing(folder: Path, rng: random.Random, marker: Path) -> None:
    (folder / ".metadata").unlink()
    forget_checksums(folder)


def entry_runs(folder: Path, rng: random.Random, marker: Path) -> None:
    """A payload where a tensor should be, in place of an entry of a *.distcp file."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    tensors = [i for i in metadata.storage_data if i.offset is not None]
    info = metadata.storage_data[rng.choice(tensors)]
    stream = io.BytesIO()
    if rng.random() < 0.5:
        torch.save(Payload(marker), stream)
    else:
        stream.write(pickle.dumps(Payload(marker)))
    data = bytearray((folder / info.relative_path).read_bytes())
    payload = stream.getvalue()[: info.length].ljust(info.length, b"\0")
    data[info.offset : info.offset + info.length] = payload
    (folder / info.relative_path).write_bytes(data)
    forget_checksums(folder)


def common_runs(folder: Path, rng: random.Random, marker: Path) -> None:
    """A payload in what is saved once: a bare pickle, or as torch.save writes it."""
    content: Any = rng.choice([Payload(marker), {"iteration": 1, "x": Payload(marker)}])
    if rng.random() < 0.5:
        torch.save(content, folder / "common.pt")
    else:
        (folder / "common.pt").write_bytes(pickle.dumps(content))
    forget_checksums(folder)


def entry_of_another_shape(folder: Path, rng: random.Random, marker: Path) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index = rng.choice([i for i in metadata.storage_data if i.offset is not None and "experts" in i.fqn])
    info = metadata.storage_data[index]
    stream = io.BytesIO()
    torch.save(rng.choice([torch.zeros(3), torch.zeros(2, 2, 2, dtype=torch.bfloat16), [1, 2], None, "x"]), stream)
    path = folder / f"__9_{rng.randrange(9)}.distcp"
    path.write_bytes(stream.getvalue())
    metadata.storage_data[index] = replace(info, relative_path=path.name, offset=0, length=len(stream.getvalue()))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    forget_checksums(folder)


def distcp_truncated(folder: Path, rng: random.Random, marker: Path) -> None:
    path = folder / "__0_0.distcp"
    os.truncate(path, rng.randrange(path.stat().st_size))
    if rng.random() < 0.5:
        forget_checksums(folder)


def distcp_flipped(folder: Path, rng: random.Random, marker: Path) -> None:
    path = folder / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def distcp_link(folder: Path, rng: random.Random, marker: Path) -> None:
    outside = folder.parent / f"{folder.name}_outside"
    (folder / "__0_0.distcp").rename(outside)
    (folder / "__0_0.distcp").symlink_to(outside)


def json_file(name: str, choices: list[Any]) -> Harm:
    def harm(folder: Path, rng: random.Random, marker: Path) -> None:
        forget = name != "checksums.json"
        choice = rng.choice(choices)
        content = json.loads((folder / name).read_text())
        if isinstance(choice, dict) and "=" in choice:
            choice = choice["="]
        elif isinstance(choice, dict):
            choice = content | choice
        (folder / name).write_bytes(choice if isinstance(choice, bytes) else json.dumps(choice).encode())
        if forget:
            forget_checksums(folder)

    return harm


description = json_file("gspo_megatron.json", [
    b"", b"{", b"null", b"[" * 20_000, {"format_version": 99}, {"step": -3}, {"step": "1"}, {"dtype": "int4"},
    {"contains": "model"}, {"contains": []}, {"layout": [1]}, {"family": None}, {"extra": 1}, {"=": []},
])  # fmt: skip
format_file = json_file("metadata.json", [b"", b"{", {"=": {}}, {"sharded_backend": "zarr"}, {"=": [1]}, {"a": 1}])
layout_file = json_file("hf_layout.json", [
    b"", b"[]", {"files": {}}, {"files": {"../x.safetensors": ["a"]}}, {"files": {"/tmp/x.safetensors": ["a"]}},
    {"files": []}, {"file_metadata": None}, {"index_metadata": 3}, {"files": {"model.safetensors": ["a", "b"]}},
    {"files": {"model.safetensors": "abc"}}, {"file_metadata": {"model.safetensors": {"format": 3}}},
])  # fmt: skip
checksum_file = json_file("checksums.json", [
    b"", b"{", {"=": []}, {"files": []}, {"files": {"../x": {"size": 1, "xxh3_128": "0"}}}, {"files": {"a": 1}},
    {"files": {"/etc/passwd": {"size": 1, "xxh3_128": "0"}}}, {"files": {"a": {"size": "1", "xxh3_128": "0"}}},
])  # fmt: skip


def nested_config(folder: Path, rng: random.Random, marker: Path) -> None:
    """The harms of config.json in the folder beside the checkpoint."""
    forget_checksums(folder)
    rng.choice([config_types, config_sizes, config_keys, config_text, config_missing])(folder / "hf", rng, marker)


HARMS: list[tuple[Harm, str, str]] = [
    (truncated, "hf", WEIGHTS), (extended, "hf", WEIGHTS), (header_length, "hf", WEIGHTS),
    (header_of_nan, "hf", WEIGHTS), (header_length_of_nan, "hf", WEIGHTS), (header_text, "hf", ""),
    (wrong_dtype, "hf", ""), (wrong_shape, "hf", ""), (transposed_shape, "hf", ""), (offsets, "hf", WEIGHTS),
    (duplicate_name, "hf", WEIGHTS), (missing_tensor, "hf", ""), (pickle_for_weights, "hf", WEIGHTS),
    (pickle_beside_nothing, "hf", ""), (folder_for_weights, "hf", ""), (weights_link, "hf", WEIGHTS),
    (index_path, "sharded", INDEX), (index_path, "sharded", INDEX), (index_path, "sharded", INDEX),
    (index_link, "sharded", ""), (index_types, "sharded", ""), (index_text, "sharded", INDEX),
    (index_lacks, "sharded", ""), (index_swaps, "sharded", ""), (index_twice, "sharded", INDEX),
    (missing_shard, "sharded", INDEX), (truncated_shard, "sharded", ""),
    (config_types, "hf", CONFIG), (config_types, "hf", CONFIG), (config_sizes, "hf", ""), (config_keys, "hf", CONFIG),
    (config_model, "hf", ""), (config_text, "hf", CONFIG), (config_missing, "hf", CONFIG), (scales, "scaled", ""),
    (companion_link, "hf", ""), (companion_link, "dist", "hf"),
    (metadata_runs, "dist", ".metadata"), (metadata_runs, "dist", ".metadata"), (metadata_bytes, "dist", ".metadata"),
    (metadata_bytes, "dist", ".metadata"), (metadata_paths, "dist", ""), (metadata_paths, "dist", ""),
    (metadata_boxes, "dist", ""), (metadata_boxes, "dist", ""), (metadata_missing, "dist", ".metadata"),
    (entry_runs, "dist", ""), (entry_runs, "dist", ""), (entry_of_another_shape, "dist", "__9_"),
    (distcp_truncated, "dist", "__0_0.distcp"), (distcp_flipped, "dist", "__0_0.distcp"),
    (distcp_link, "dist", "__0_0.distcp"), (description, "dist", "gspo_megatron.json"),
    (format_file, "dist", "metadata.json"), (layout_file, "dist", "hf_layout.json"),
    (common_runs, "dist", "common.pt"), (common_runs, "dist", "common.pt"),
    (checksum_file, "dist", "checksums.json"), (nested_config, "dist", ""),
]  # fmt: skip


def cases() -> Iterator[Case]:
    """The same each time: every harm in turn, with other random choices."""
    for number in range(COUNT):
        harm, kind, named = HARMS[number % len(HARMS)]
        yield Case(f"{number:03d}-{getattr(harm, '__name__', 'harm')}-{kind}", kind, harm, named)


def generator(case: Case) -> random.Random:
    """Of a case's random choices."""
    return random.Random(f"{SEED} {case.name}")
