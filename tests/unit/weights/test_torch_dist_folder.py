"""What a checkpoint folder says of itself, and the checksums of its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import xxhash

from gspo_megatron.errors import UserError
from gspo_megatron.weights.torch_dist.checksums import CHECKSUMS, FileSum, find_damage, hash_file, write_checksums
from gspo_megatron.weights.torch_dist.description import DESCRIPTION, Description, read_description, write_description

SAVED = Description("qwen3_moe", 8, "bfloat16", ("model", "optimizer", "trainer"), {"tensor": 2, "expert": 2})


@pytest.mark.parametrize("description", [SAVED, Description("qwen3", 0, "float32")])
def test_a_description_is_read_as_it_was_written(description: Description, tmp_path: Path) -> None:
    write_description(tmp_path, description)
    assert read_description(tmp_path) == description


def test_a_folder_without_description_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{DESCRIPTION} is missing: .* is no checkpoint of gspo_megatron"):
        read_description(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 2}, "format_version=2 is not known here; this program reads 1"),
        ({"format_version": None}, "format_version=None is not known"),
        ({"step": -1}, "step=-1 is not possible"),
        ({"step": "8"}, "step='8' is not possible"),
        ({"step": True}, "step=True is not possible"),
        ({"family": ["qwen3"]}, r"family=\['qwen3'\] is not possible"),
        ({"dtype": "int8"}, "dtype='int8' is not possible"),
        ({"contains": ["optimizer"]}, r"contains=\['optimizer'\] is not possible"),
        ({"contains": ["model", "secrets"]}, "is not possible"),
        ({"layout": {"tensor": "2"}}, "is not possible"),
        ({"more": 1}, "must hold exactly family, step"),
    ],
)
def test_a_wrong_description_is_refused_by_value(change: dict[str, object], said: str, tmp_path: Path) -> None:
    write_description(tmp_path, SAVED)
    path = tmp_path / DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=said) as error:
        read_description(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_what_is_no_description_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / DESCRIPTION).write_bytes(content)
    with pytest.raises(UserError, match=DESCRIPTION):
        read_description(tmp_path)


# --- checksums ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "step_00000008"
    (made / "hf").mkdir(parents=True)
    (made / "__0_0.distcp").write_bytes(bytes(range(256)) * 40_000)  # several blocks
    (made / "hf" / "config.json").write_text("{}")
    (made / ".metadata").write_bytes(b"")
    write_checksums(made)
    return made


def test_a_file_s_checksum_is_xxh3_128_of_its_bytes(folder: Path) -> None:
    data = (folder / "__0_0.distcp").read_bytes()
    assert hash_file(folder / "__0_0.distcp") == FileSum(10_240_000, xxhash.xxh3_128_hexdigest(data))
    assert hash_file(folder / ".metadata") == FileSum(0, "99aa06d3014798d86001c324468d497f")  # of nothing


def test_all_files_are_listed_and_whole(folder: Path) -> None:
    files = json.loads((folder / CHECKSUMS).read_text())["files"]
    assert list(files) == [".metadata", "__0_0.distcp", "hf/config.json"]
    assert find_damage(folder) == []


def test_known_sums_are_not_read_again(folder: Path) -> None:
    write_checksums(folder, {".metadata": FileSum(7, "0" * 32)})
    assert find_damage(folder) == [f"{folder / '.metadata'} has 0 bytes, should have 7"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "said", "by_size"),
    [(flip, "is damaged: xxh3-128 ", False), (truncate, "has 10239999 bytes, should have 10240000", True)],
)
def test_a_damaged_file_is_named(harm: object, said: str, by_size: bool, folder: Path) -> None:
    assert callable(harm)
    harm(folder / "__0_0.distcp")
    [line] = find_damage(folder)
    assert line.startswith(f"{folder / '__0_0.distcp'} {said}")
    assert find_damage(folder, sizes_only=True) == ([line] if by_size else [])


def test_missing_and_added_files_are_named(folder: Path) -> None:
    (folder / "hf" / "config.json").unlink()
    (folder / "hf" / "other.json").touch()
    assert find_damage(folder) == [
        f"{folder / 'hf/config.json'} is missing",
        f"{folder / 'hf/other.json'} is not in {CHECKSUMS}",
    ]


def test_a_folder_without_checksums_is_refused(folder: Path) -> None:
    (folder / CHECKSUMS).unlink()
    with pytest.raises(UserError, match=f"{CHECKSUMS} is missing: nothing proves"):
        find_damage(folder)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"files": []}',
        '{"files": {"a": 3}}',
        '{"files": {"a": {"size": 1}}}',
        '{"files": {"a": {"size": "1", "xxh3_128": "0"}}}',
        '{"files": {"../a": {"size": 1, "xxh3_128": "0"}}}',
        '{"files": {"/etc/passwd": {"size": 1, "xxh3_128": "0"}}}',
        '{"files": {"": {"size": 1, "xxh3_128": "0"}}}',
    ],
)
def test_broken_checksums_are_refused(content: str, folder: Path) -> None:
    (folder / CHECKSUMS).write_text(content)
    with pytest.raises(UserError) as error:
        find_damage(folder)
    assert str(folder / CHECKSUMS) in str(error.value)
