"""Hugging Face folders: completeness on reading, atomic writing, random initial values."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from gspo_megatron.errors import UserError
from gspo_megatron.types import NamedTensor
from gspo_megatron.weights.families import load_fields
from gspo_megatron.weights.hf_checkpoint import (
    COMPANIONS,
    INDEX,
    SINGLE,
    HFCheckpoint,
    check_companions,
    random_tensor,
    save_hf_folder,
)
from gspo_megatron.weights.rules import Rule, TensorSpec, expand
from tests.distributed import tiny_models

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (7, 4),
    "a.weight": (4, 4),
    "b.weight": (4, 4),
    "model.norm.weight": (4,),
    "lm_head.weight": (7, 4),
}


SHARD = "one.safetensors"


def specs(tied: bool = False) -> list[TensorSpec]:
    rules = [
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ((7, 4),)),
        Rule("ab", ("a.weight", "b.weight"), ((4, 4), (4, 4))),
        Rule("norm", ("model.norm.weight",), ((4,),)),
    ]
    if not tied:
        rules.append(Rule("output_layer.weight", ("lm_head.weight",), ((7, 4),)))
    return expand(rules, num_layers=1)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def write_single(folder: Path, content: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(content, folder / SINGLE)
    return folder


def write_shard(folder: Path, content: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(content, folder / SHARD)
    return folder


def write_index(folder: Path, weight_map: object) -> Path:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def message(folder: Path, *, tied: bool = False) -> str:
    with pytest.raises(UserError) as error:
        HFCheckpoint(folder).verify(specs(tied))
    return str(error.value)


# --- reading -----------------------------------------------------------------------------------------------------


def test_a_complete_folder_is_accepted_and_read_bitwise(tmp_path: Path) -> None:
    content = tensors()
    checkpoint = HFCheckpoint(write_single(tmp_path, content))
    checkpoint.verify(specs())
    assert checkpoint.bytes_read == 0, "proving completeness reads headers only"
    for name, value in content.items():
        assert torch.equal(checkpoint.read(name), value)
    assert checkpoint.bytes_read == 4 * sum(t.numel() for t in content.values())


def test_the_shards_an_index_names_are_read(tmp_path: Path) -> None:
    content = tensors()
    names = list(content)
    save_file({n: content[n] for n in names[:2]}, tmp_path / "one.safetensors")
    save_file({n: content[n] for n in names[2:]}, tmp_path / "two.safetensors")
    write_index(tmp_path, {n: "one.safetensors" if n in names[:2] else "two.safetensors" for n in names})
    checkpoint = HFCheckpoint(tmp_path)
    checkpoint.verify(specs())
    assert all(torch.equal(checkpoint.read(n), content[n]) for n in names)


@pytest.mark.parametrize("index", [dict.fromkeys(SHAPES, SHARD), {"stale.weight": "absent.safetensors"}, None])
def test_one_file_goes_before_an_index(index: object, tmp_path: Path) -> None:
    """As in transformers: the index is not even looked at."""
    content = tensors()
    write_shard(tmp_path, {name: tensor + 1 for name, tensor in content.items()})
    write_index(write_single(tmp_path, content), index)
    checkpoint = HFCheckpoint(tmp_path)
    checkpoint.verify(specs())
    assert all(torch.equal(checkpoint.read(name), content[name]) for name in content)


@pytest.mark.parametrize("settings", [{"quant_method": "awq", "bits": 4}, {}, "fp8"])
def test_a_config_of_quantized_weights_without_scales_is_refused(settings: object, tmp_path: Path) -> None:
    write_single(tmp_path, tensors())
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    assert "config.json: quantization_config of quant_method=" in message(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": None}))
    HFCheckpoint(tmp_path).verify(specs())


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    write_index(tmp_path, dict.fromkeys(SHAPES, "\ud800.safetensors"))
    assert "names '\\ud800.safetensors', which is not a file of" in message(tmp_path)
    header = b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header)
    assert "is no readable safetensors file: " in message(tmp_path)


def test_a_link_to_itself_is_refused(tmp_path: Path, companions: Path) -> None:
    (companions / "tokenizer.json").unlink()
    (companions / "tokenizer.json").symlink_to(companions / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer.json is a link to no file"):
        check_companions(companions)


def test_missing_and_extra_tensors_are_listed_together(tmp_path: Path) -> None:
    content = tensors()
    del content["b.weight"], content["model.norm.weight"]
    content["a.bias"] = torch.zeros(4)
    said = message(write_single(tmp_path, content))
    assert said.startswith(f"{tmp_path} does not match its config.json: ")
    assert "missing 2 (b.weight, model.norm.weight); unexpected 1 (a.bias)" in said


def test_a_long_list_is_cut_and_counted(tmp_path: Path) -> None:
    extra = {f"extra.{i}": torch.zeros(1) for i in range(12)}
    said = message(write_single(tmp_path, tensors() | extra))
    assert "missing none; unexpected 12 (extra.0, extra.1, extra.10" in said and said.endswith(", …)")


def test_misshapen_tensors_are_named_with_both_shapes(tmp_path: Path) -> None:
    content = tensors() | {"a.weight": torch.zeros(4, 5), "model.norm.weight": torch.zeros(1, 4)}
    said = message(write_single(tmp_path, content))
    assert str(tmp_path) in said
    assert "a.weight is [4, 5], config.json implies [4, 4]" in said
    assert "model.norm.weight is [1, 4], config.json implies [4]" in said


def test_many_misshapen_tensors_are_counted(tmp_path: Path) -> None:
    rules = [Rule(f"p{i}", (f"p{i}",), ((2,),)) for i in range(8)]
    write_single(tmp_path, {f"p{i}": torch.zeros(3) for i in range(8)})
    with pytest.raises(UserError, match=r"p4 is .*; and 3 more$"):
        HFCheckpoint(tmp_path).verify(expand(rules, 1))


def test_a_tied_model_may_bring_its_head_or_not(tmp_path: Path) -> None:
    content = tensors()
    HFCheckpoint(write_single(tmp_path / "with", content)).verify(specs(tied=True))
    del content["lm_head.weight"]
    HFCheckpoint(write_single(tmp_path / "without", content)).verify(specs(tied=True))
    assert "missing 1 (lm_head.weight)" in message(tmp_path / "without")


def test_a_folder_without_weights_says_how_to_start_without(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    said = message(tmp_path)
    assert f"{tmp_path} holds no weights ({SINGLE} or {INDEX})" in said
    assert 'model.init="random"' in said


@pytest.mark.parametrize("kept", [0, 4, 8, 40, -1])
def test_a_truncated_file_is_named(kept: int, tmp_path: Path) -> None:
    path = write_single(tmp_path, tensors()) / SINGLE
    path.write_bytes(path.read_bytes()[:kept])
    assert message(tmp_path).startswith(f"{path} is no readable safetensors file: ")


@pytest.mark.parametrize("content", [b"not a checkpoint at all", struct.pack("<Q", 2**40) + b"{}", b"\x08" + bytes(15)])
def test_a_file_of_something_else_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    assert message(tmp_path).startswith(f"{tmp_path / SINGLE} is no readable safetensors file: ")


def test_a_damaged_shard_of_several_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path, tensors())
    (tmp_path / "other.safetensors").write_bytes(b"damaged")
    write_index(tmp_path, {n: "other.safetensors" if n == "a.weight" else SHARD for n in SHAPES})
    assert f"{tmp_path / 'other.safetensors'} is no readable safetensors file" in message(tmp_path)


@pytest.mark.parametrize("file", ["absent.safetensors", "../outside.safetensors", "sub/inside.safetensors", "..", ""])
def test_an_index_may_name_files_of_its_folder_only(file: str, tmp_path: Path) -> None:
    folder = write_shard(tmp_path / "model", tensors())
    for other in (tmp_path / "outside.safetensors", folder / "sub" / "inside.safetensors"):
        other.parent.mkdir(exist_ok=True)
        save_file(tensors(), other)
    write_index(folder, dict.fromkeys(SHAPES, SHARD) | {"a.weight": file})
    assert message(folder) == f"{folder / INDEX} names {file!r}, which is not a file of {folder}"


def test_an_absolute_path_in_an_index_is_refused(tmp_path: Path) -> None:
    folder = write_shard(tmp_path / "model", tensors())
    outside = write_shard(tmp_path / "other", tensors()) / SHARD
    write_index(folder, dict.fromkeys(SHAPES, str(outside)))
    assert "which is not a file of" in message(folder)


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"{}", b'{"weight_map": ["a"]}', b'{"weight_map": null}', b"null", b"\xff\xfe"]
)
def test_a_broken_index_is_named(content: bytes, tmp_path: Path) -> None:
    write_shard(tmp_path, tensors())
    (tmp_path / INDEX).write_bytes(content)
    assert message(tmp_path).startswith(f"{tmp_path / INDEX} is no safetensors index: ")


def test_a_tensor_that_the_index_promises_and_the_file_lacks_is_named(tmp_path: Path) -> None:
    content = tensors()
    del content["b.weight"]
    write_shard(tmp_path, content)
    write_index(tmp_path, dict.fromkeys(SHAPES, SHARD))
    said = message(tmp_path)
    assert str(tmp_path / SHARD) in said and "lacks b.weight" in said


def test_another_dtype_on_disk_is_read_as_it_is_and_converts_on_copying(tmp_path: Path) -> None:
    content = {name: t.bfloat16() for name, t in tensors().items()}
    checkpoint = HFCheckpoint(write_single(tmp_path, content))
    checkpoint.verify(specs())
    parameter = torch.empty(4, 4)
    parameter.copy_(checkpoint.read("a.weight"))
    assert torch.equal(parameter, content["a.weight"].float())
    assert checkpoint.bytes_read == 2 * 16


# --- writing -----------------------------------------------------------------------------------------------------


def named(content: dict[str, Tensor]) -> Iterator[NamedTensor]:
    return (NamedTensor(name, tensor) for name, tensor in content.items())


@pytest.fixture
def companions(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja"):
        (folder / name).write_text(f"content of {name}")
    (folder / "config.json").write_text('{"hidden_size":  8, "dtype": "float32"}')
    (folder / "optimizer.bin").write_text("not part of a model")
    return folder


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_the_saved_config_names_the_dtype_that_was_saved(tmp_path: Path, companions: Path) -> None:
    save_hf_folder(tmp_path / "out", named({"a": torch.ones(2, dtype=torch.bfloat16)}), companions_from=companions)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"hidden_size": 8, "dtype": "bfloat16"}


def test_the_saved_config_speaks_of_plain_weights(tmp_path: Path, companions: Path) -> None:
    """Training from weights in eight bits saves numbers without scales."""
    content = {"dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}}
    (companions / "config.json").write_text(json.dumps(content))
    save_hf_folder(tmp_path / "out", named({"a": torch.ones(2, dtype=torch.bfloat16)}), companions_from=companions)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"dtype": "bfloat16"}


def test_a_small_model_becomes_one_file_with_its_companions(tmp_path: Path, companions: Path) -> None:
    content = tensors()
    target = tmp_path / "runs" / "final"
    save_hf_folder(target, named(content), companions_from=companions)
    assert files(target) == {SINGLE, "config.json", "tokenizer.json", "chat_template.jinja"}
    assert (target / "config.json").read_bytes() == (companions / "config.json").read_bytes()
    saved = load_file(target / SINGLE)
    assert saved.keys() == content.keys() and all(torch.equal(saved[n], content[n]) for n in content)
    with safe_open(target / SINGLE, "pt") as file:
        assert file.metadata() == {"format": "pt"}, "transformers refuses a file without it"
    assert files(tmp_path / "runs") == {"final"}
    HFCheckpoint(target).verify(specs())


def test_a_large_model_is_cut_into_files_with_an_index(tmp_path: Path, companions: Path) -> None:
    content = tensors()  # 112, 64, 64, 16 and 112 bytes
    target = tmp_path / "final"
    save_hf_folder(target, named(content), companions_from=companions, shard_bytes=130)
    index = json.loads((target / INDEX).read_text())
    assert index["metadata"]["total_size"] == 368
    assert index["weight_map"] == {
        "model.embed_tokens.weight": "model-00001-of-00003.safetensors",
        "a.weight": "model-00002-of-00003.safetensors",
        "b.weight": "model-00002-of-00003.safetensors",
        "model.norm.weight": "model-00003-of-00003.safetensors",
        "lm_head.weight": "model-00003-of-00003.safetensors",
    }
    assert files(target) - files(companions) == {INDEX, *index["weight_map"].values()}
    checkpoint = HFCheckpoint(target)
    checkpoint.verify(specs())
    assert all(torch.equal(checkpoint.read(n), content[n]) for n in content)


def test_a_tensor_above_the_file_size_gets_a_file_of_its_own(tmp_path: Path, companions: Path) -> None:
    save_hf_folder(tmp_path / "final", named(tensors()), companions_from=companions, shard_bytes=1)
    weight_map = json.loads((tmp_path / "final" / INDEX).read_text())["weight_map"]
    assert len(set(weight_map.values())) == len(SHAPES)


@pytest.mark.parametrize("shard_bytes", [130, 10**6])
def test_an_error_in_the_middle_leaves_nothing_under_the_name(
    shard_bytes: int, tmp_path: Path, companions: Path
) -> None:
    target = tmp_path / "final"

    def broken() -> Iterator[NamedTensor]:
        for i, item in enumerate(named(tensors())):
            if i == 3:
                raise RuntimeError("a peer is gone")
            yield item

    with pytest.raises(RuntimeError, match="a peer is gone"):
        save_hf_folder(target, broken(), companions_from=companions, shard_bytes=shard_bytes)
    assert not target.exists()
    # What was left behind is in nobody's way the next time, and none of it shows up in the result.
    (tmp_path / "final.partial" / "shard-77").write_text("left over")
    save_hf_folder(target, named(tensors()), companions_from=companions)
    assert files(target) - files(companions) == {SINGLE}
    assert not (tmp_path / "final.partial").exists()


def test_an_existing_folder_is_never_touched(tmp_path: Path, companions: Path) -> None:
    target = tmp_path / "final"
    target.mkdir()
    (target / "precious").write_text("data")
    with pytest.raises(UserError, match="exists; choose another folder or remove it") as error:
        save_hf_folder(target, named(tensors()), companions_from=companions)
    assert str(target) in str(error.value)
    assert files(target) == {"precious"} and not (tmp_path / "final.partial").exists()


def test_views_of_live_parameters_are_written_by_value(tmp_path: Path, companions: Path) -> None:
    """An export hands out views of the model; two of one storage, one of them transposed."""
    base = torch.arange(24.0).reshape(6, 4)
    content = {"half": base[:3], "other": base[3:], "turned": base.T}
    expected = {name: t.clone() for name, t in content.items()}

    def then_overwrite() -> Iterator[NamedTensor]:
        yield from named(content)
        base.zero_()  # a receive buffer that is used again

    save_hf_folder(tmp_path / "final", then_overwrite(), companions_from=companions)
    saved = load_file(tmp_path / "final" / SINGLE)
    assert all(torch.equal(saved[n], expected[n]) for n in expected)


@pytest.mark.parametrize("kind", ["moe", "tied"])
def test_what_is_saved_is_what_transformers_loads(kind: str, tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source", kind)
    family, fields = load_fields(source)
    checkpoint = HFCheckpoint(source)
    checkpoint.verify(family.specs(fields))
    names = [name for s in family.specs(fields) if not s.load_only for name in s.hf]
    target = tmp_path / "saved"
    save_hf_folder(
        target,
        (NamedTensor(name, checkpoint.read(name)) for name in names),
        companions_from=source,
        shard_bytes=20_000,
    )
    loaded, wanted = (AutoModelForCausalLM.from_pretrained(f, local_files_only=True) for f in (target, source))
    state, expected = loaded.state_dict(), wanted.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_every_companion_is_copied_that_the_source_has(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in COMPANIONS:
        (source / name).write_text("{}")
    save_hf_folder(tmp_path / "final", named(tensors()), companions_from=source)
    assert files(tmp_path / "final") == {SINGLE, *COMPANIONS}


# --- random values -----------------------------------------------------------------------------------------------


def test_initial_values_depend_on_name_and_seed_alone() -> None:
    first = random_tensor("model.layers.0.a", (6, 5), std=0.02, seed=3)
    torch.manual_seed(99)
    torch.randn(7)
    state = torch.get_rng_state()
    assert torch.equal(random_tensor("model.layers.0.a", (6, 5), std=0.02, seed=3), first)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert not torch.equal(random_tensor("model.layers.1.a", (6, 5), std=0.02, seed=3), first)
    assert not torch.equal(random_tensor("model.layers.0.a", (6, 5), std=0.02, seed=4), first)
    assert torch.equal(random_tensor("model.layers.0.a", (6, 5), std=0.04, seed=3), 2 * first)
    assert first.dtype == torch.float32


def test_initial_values_are_normal_norms_are_one_and_biases_zero() -> None:
    values = random_tensor("w", (400, 500), std=0.02, seed=0).double()
    assert abs(float(values.mean())) < 5 * 0.02 / 200_000**0.5
    assert float(values.std()) == pytest.approx(0.02, rel=0.01)
    for norm in ("model.norm.weight", "layers.0.q_a_layernorm.weight"):
        assert torch.equal(random_tensor(norm, (5,), std=0.02, seed=0), torch.ones(5))
    for other in ("q_proj.bias", "gate.e_score_correction_bias", "self_attn.sinks"):
        assert torch.equal(random_tensor(other, (5,), std=0.02, seed=0), torch.zeros(5))


@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**62])
def test_any_seed_gives_values(seed: int) -> None:
    assert bool(random_tensor("w", (4, 4), std=1.0, seed=seed).isfinite().all())


def test_the_expected_names_of_a_real_model_match_its_folder(tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path, "moe")
    family, fields = load_fields(folder)
    HFCheckpoint(folder).verify(family.specs(fields))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 9}))
    family, fields = load_fields(folder)
    with pytest.raises(UserError, match="missing 12 ") as error:
        HFCheckpoint(folder).verify(family.specs(fields))
    assert "model.layers.0.mlp.experts.8.down_proj.weight" in str(error.value)
