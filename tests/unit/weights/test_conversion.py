"""Conversion between the formats: round trips, dtypes, what is checked and said, and what happens when it is killed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from gspo_megatron.errors import UserError
from gspo_megatron.weights.conversion import to_megatron as to_megatron_module
from gspo_megatron.weights.conversion.compare import diff, verify
from gspo_megatron.weights.conversion.execute import MANIFEST, execute, partial_folder
from gspo_megatron.weights.conversion.hf_layout import LAYOUT
from gspo_megatron.weights.conversion.inspect import inspect
from gspo_megatron.weights.conversion.models import HFModel, TorchDistModel, open_model
from gspo_megatron.weights.conversion.to_hf import ToHF
from gspo_megatron.weights.conversion.to_megatron import ToMegatron
from gspo_megatron.weights.families import FAMILIES
from gspo_megatron.weights.hf_checkpoint import MOST_COMPANION_BYTES
from gspo_megatron.weights.rules import QKV, GateUp
from gspo_megatron.weights.torch_dist.checksums import FileSum, find_damage
from gspo_megatron.weights.torch_dist.description import read_description
from gspo_megatron.weights.torch_dist.keys import megatron_shape
from tests.distributed import family_models
from tests.unit.weights.conversion_setup import CONFIG, DENSE, Silent, contents, to_hf, to_megatron, write_hf
from tools import convert_checkpoint

ROOT = Path(__file__).parents[3]


def family_config(family: str) -> dict[str, Any]:
    assert family in family_models.CONFIGS, f"{family} needs a tiny model in tests/distributed/family_models.py"
    return json.loads(family_models.make_config(family).to_json_string(use_diff=False))


# --- round trips -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_gives_the_same_files_byte_for_byte(
    family: str, dtype: torch.dtype, files: int, tmp_path: Path
) -> None:
    source = write_hf(tmp_path / "hf", family_config(family), dtype=dtype, files=files)
    dist = to_megatron(source, tmp_path / "dist", file_bytes=50_000, chunk_bytes=3000)
    assert find_damage(dist) == []
    assert read_description(dist).family == family and read_description(dist).step == 0
    assert contents(to_hf(dist, tmp_path / "back")) == contents(source)
    assert verify(open_model(source), open_model(dist)).is_equal


def test_torch_itself_reads_the_checkpoint(tmp_path: Path) -> None:
    """By another reader than ours, and against another description of where the weights belong."""
    source = write_hf(tmp_path / "hf")
    dist = to_megatron(source, tmp_path / "dist", chunk_bytes=300)
    dcp_to_torch_save(dist, tmp_path / "flat.pt")
    found, hf = torch.load(tmp_path / "flat.pt", weights_only=False), load_file(source / "model.safetensors")
    layer, hf_layer = "decoder.layers.1.", "model.layers.1."
    fc1 = found[layer + "mlp.experts.experts.linear_fc1.weight"]
    assert fc1.shape == (4, 16, 16)
    assert torch.equal(fc1[3, :8], hf[hf_layer + "mlp.experts.3.gate_proj.weight"])
    assert torch.equal(fc1[3, 8:], hf[hf_layer + "mlp.experts.3.up_proj.weight"])
    qkv = found[layer + "self_attention.linear_qkv.weight"]
    groups = qkv.view(2, 4, 8, 16)  # two heads of queries, a key and a value in each of two groups
    q, k, v = (hf[f"{hf_layer}self_attn.{x}_proj.weight"].view(-1, 8, 16) for x in "qkv")
    for group in range(2):
        assert torch.equal(groups[group, :2], q[2 * group : 2 * group + 2])
        assert torch.equal(groups[group, 2], k[group]) and torch.equal(groups[group, 3], v[group])
    assert torch.equal(found["embedding.word_embeddings.weight"], hf["model.embed_tokens.weight"])


def test_layers_that_are_alike_are_one_tensor(tmp_path: Path) -> None:
    dist = to_megatron(write_hf(tmp_path / "hf", DENSE), tmp_path / "dist")
    tensors = TorchDistModel(dist).checkpoint.tensors
    assert tensors["decoder.layers.mlp.linear_fc2.weight"].shape == (2, 16, 24)
    assert not any(key.startswith("decoder.layers.0.") for key in tensors)


def test_a_folder_without_a_layout_is_cut_into_files(tmp_path: Path) -> None:
    dist = to_megatron(write_hf(tmp_path / "hf"), tmp_path / "dist")
    sums = json.loads((dist / "checksums.json").read_text())
    del sums["files"][LAYOUT]
    (dist / "checksums.json").write_text(json.dumps(sums))
    (dist / LAYOUT).unlink()
    out = to_hf(dist, tmp_path / "out", shard_bytes=4000)
    assert len(list(out.glob("model-*.safetensors"))) > 3
    assert verify(open_model(tmp_path / "hf"), open_model(out)).is_equal
    total = sum(t.numel() * 2 for t in load_file(tmp_path / "hf" / "model.safetensors").values())
    assert json.loads((out / "model.safetensors.index.json").read_text())["metadata"] == {"total_size": total}


def test_a_tied_head_that_is_stored_is_stored_again(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", CONFIG | {"tie_word_embeddings": True})
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    dist = to_megatron(source, tmp_path / "dist")
    assert "output_layer.weight" not in TorchDistModel(dist).checkpoint.tensors
    assert contents(to_hf(dist, tmp_path / "back")) == contents(source)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    plain = write_hf(tmp_path / "plain", CONFIG | {"tie_word_embeddings": True})
    for compare in (verify, diff):
        for pair in ((source, plain), (plain, source)):
            [difference] = compare(*map(open_model, pair)).differences
            assert difference.name == "lm_head.weight" and "in " + str(source) in difference.reason
    assert convert_checkpoint.main(["verify", str(source)]) == 2
    with pytest.raises(UserError, match=r"lm_head.weight is not model.embed_tokens.weight, though .* tie_word"):
        to_megatron(source, tmp_path / "other")


def test_layers_that_predict_further_tokens_are_left_out_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = family_config("deepseek_v3")
    source = write_hf(tmp_path / "hf", config)
    expected = load_file(source / "model.safetensors")
    further = f"model.layers.{config['num_hidden_layers']}.eh_proj.weight"
    save_file(expected | {further: torch.ones(3, 3)}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    assert convert_checkpoint.main(["import", str(source), str(tmp_path / "dist")]) == 0
    assert f"left out, for no rule has a place for them: 1 tensors ({further}" in capsys.readouterr().out
    assert convert_checkpoint.main(["verify", str(source), str(tmp_path / "dist")]) == 0
    assert f"not compared, for they belong to no rule: 1 tensors ({further}" in capsys.readouterr().out
    back = load_file(to_hf(tmp_path / "dist", tmp_path / "back") / "model.safetensors")
    assert back.keys() == expected.keys() and all(torch.equal(back[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_parameters_shape_is_what_its_codec_makes(family: str) -> None:
    model = FAMILIES[family]
    for spec in model.specs(model.fields(family_config(family))):
        assert megatron_shape(spec) == spec.codec.to_megatron([torch.empty(s) for s in spec.hf_shapes]).shape


# --- dtypes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stored", "wanted"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_dtype_that_is_asked_for_is_rounded_to_once(stored: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", dtype=stored)
    expected = {n: t.to(wanted) for n, t in load_file(source / "model.safetensors").items()}
    on_import = to_hf(to_megatron(source, tmp_path / "a", dtype=wanted), tmp_path / "a_hf")
    on_export = to_hf(to_megatron(source, tmp_path / "b"), tmp_path / "b_hf", dtype=wanted)
    for folder in (on_import, on_export):
        found = load_file(folder / "model.safetensors")
        assert all(found[n].dtype == wanted and torch.equal(found[n], expected[n]) for n in expected)
        assert json.loads((folder / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")
    assert read_description(tmp_path / "a").dtype == str(wanted).removeprefix("torch.")


def test_what_a_rule_keeps_in_float32_stays_so(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", family_config("glm4_moe"), dtype=torch.float32)
    dist = to_megatron(source, tmp_path / "dist", dtype=torch.bfloat16)
    dtypes = {key: tensor.dtype for key, tensor in TorchDistModel(dist).checkpoint.tensors.items()}
    kept = {key for key, dtype in dtypes.items() if dtype == torch.float32}
    assert kept and all(key.endswith("router.expert_bias") for key in kept)


def test_what_a_rule_keeps_in_float32_is_widened_to_it(tmp_path: Path) -> None:
    """As DeepSeek's derivatives store it; the trained model could not take it over."""
    source = write_hf(tmp_path / "hf", family_config("glm4_moe"), files=2)
    expected = {}
    for path in source.glob("*.safetensors"):
        tensors = {name: t.bfloat16() for name, t in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
        expected |= {n: t.float() if n.endswith("e_score_correction_bias") else t for n, t in tensors.items()}
    dist = to_megatron(source, tmp_path / "dist")
    assert verify(open_model(source), open_model(dist)).is_equal
    out = to_hf(dist, tmp_path / "out")
    found = {name: t for path in out.glob("*.safetensors") for name, t in load_file(path).items()}
    assert any(t.dtype == torch.float32 for t in found.values()) and found.keys() == expected.keys()
    assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())


def write_scaled(folder: Path) -> dict[str, torch.Tensor]:
    """Weights in float8 with a scale for each block of 128 × 128, as DeepSeek-V3's; returns what they mean."""
    sizes = {"hidden_size": 160, "moe_intermediate_size": 136, "num_hidden_layers": 1, "num_experts": 2}
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    write_hf(folder, CONFIG | sizes | {"quantization_config": settings})
    tensors = load_file(folder / "model.safetensors")
    generator, meaning, stored = torch.Generator().manual_seed(5), {}, {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            meaning[name] = stored[name] = tensor
            continue
        rows, columns = tensor.shape
        scale = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator) + 0.5
        weight = tensor.float().to(torch.float8_e4m3fn)
        exact = weight.double()
        for i in range(rows):
            for j in range(0, columns, 128):
                exact[i, j : j + 128] *= scale[i // 128, j // 128].double()
        meaning[name] = exact.float().to(torch.bfloat16)
        stored |= {name: weight, name + "_scale_inv": scale}
    save_file(stored, folder / "model.safetensors")
    return meaning


def test_blocks_of_float8_are_read_into_bfloat16(tmp_path: Path) -> None:
    meaning = write_scaled(tmp_path / "fp8")
    dist = to_megatron(tmp_path / "fp8", tmp_path / "dist")
    out = to_hf(dist, tmp_path / "hf")
    found = load_file(out / "model.safetensors")
    assert found.keys() == meaning.keys()
    for name, expected in meaning.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], expected), name
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert verify(open_model(tmp_path / "fp8"), open_model(dist)).is_equal


@pytest.mark.parametrize("asked", [None, torch.float32])
def test_an_index_names_the_size_of_what_is_written(asked: torch.dtype | None, tmp_path: Path) -> None:
    """After eight-bit floats were widened, and a layer that predicts further tokens was left out."""
    write_scaled(tmp_path / "fp8")
    model = tmp_path / "fp8" / "model.safetensors"
    tensors = load_file(model)
    model.rename(tmp_path / "fp8" / "model-00001-of-00001.safetensors")
    index = {
        "metadata": {"total_size": 1, "x": 2},
        "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors"),
    }
    (tmp_path / "fp8" / "model.safetensors.index.json").write_text(json.dumps(index))
    out = to_hf(to_megatron(tmp_path / "fp8", tmp_path / "dist", dtype=asked), tmp_path / "hf")
    found = load_file(out / "model-00001-of-00001.safetensors").values()
    metadata = json.loads((out / "model.safetensors.index.json").read_text())["metadata"]
    assert metadata == {"total_size": sum(t.numel() * t.element_size() for t in found), "x": 2}


def test_an_index_does_not_count_what_was_left_out(tmp_path: Path) -> None:
    config = family_config("deepseek_v3")
    source = write_hf(tmp_path / "hf", config | {"num_nextn_predict_layers": 1}, files=2)
    path = source / "model.safetensors.index.json"
    before = json.loads(path.read_text())
    further = f"model.layers.{config['num_hidden_layers']}.eh_proj.weight"
    save_file({further: torch.ones(3, 3)}, source / "further.safetensors")
    total = before["metadata"]["total_size"]
    after = {
        "metadata": {"total_size": total + 36},
        "weight_map": before["weight_map"] | {further: "further.safetensors"},
    }
    path.write_text(json.dumps(after))
    out = to_hf(to_megatron(source, tmp_path / "dist"), tmp_path / "back")
    assert json.loads((out / "model.safetensors.index.json").read_text()) == before


def test_what_training_saved_is_exported_with_a_config_of_plain_weights(tmp_path: Path) -> None:
    """Its hf/ holds the config that training began with, of weights in eight bits and of another dtype."""
    dist = to_megatron(write_hf(tmp_path / "hf", dtype=torch.float32), tmp_path / "dist")
    (dist / LAYOUT).unlink()
    (dist / "checksums.json").unlink()
    (dist / "hf" / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"quant_method": "fp8"}}))
    out = to_hf(dist, tmp_path / "out")
    assert json.loads((out / "config.json").read_text()) == CONFIG | {"dtype": "float32"}


@pytest.mark.parametrize("place", ["files", "file_metadata", "names"])
def test_a_layout_of_names_that_are_no_text_is_refused(place: str, tmp_path: Path) -> None:
    dist = to_megatron(write_hf(tmp_path / "hf"), tmp_path / "dist")
    (dist / "checksums.json").unlink()
    content = json.loads((dist / LAYOUT).read_text())
    if place == "files":
        for key in ("files", "file_metadata"):
            content[key] = {"\ud800.safetensors": content[key]["model.safetensors"]}
    elif place == "names":
        content["files"]["model.safetensors"][0] = "\ud800"
    else:
        content["file_metadata"]["model.safetensors"] = {"x": "\ud800"}
    (dist / LAYOUT).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"hf_layout.json is no layout of a Hugging Face folder: UnicodeEncodeError"):
        open_model(dist)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quantization_config": {"weight_block_size": [64, 64]}}, r"weight_block_size=\[64, 64\]"),
        ({"quantization_config": None}, "weight_block_size=None"),
    ],
)
def test_other_blocks_are_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_scaled(tmp_path / "fp8")
    path = tmp_path / "fp8" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=said):
        HFModel(tmp_path / "fp8")


def test_scales_of_another_shape_are_refused(tmp_path: Path) -> None:
    write_scaled(tmp_path / "fp8")
    path = tmp_path / "fp8" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    save_file(tensors | {name: torch.ones(1, 1)}, path)
    with pytest.raises(UserError, match=r"q_proj.weight_scale_inv is F32 \[1, 1\], should be F32 \[1, 2\]"):
        HFModel(tmp_path / "fp8")


# --- verify finds what was done wrong ----------------------------------------------------------------------------


def verified(source: Path, dist: Path) -> list[str]:
    return [d.name for d in verify(open_model(source), open_model(dist)).differences]


def test_a_swapped_gate_and_up_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_hf(tmp_path / "hf")
    with monkeypatch.context() as patch:
        patch.setattr(GateUp, "to_megatron", lambda self, tensors: torch.cat([tensors[1], tensors[0]]))
        to_megatron(source, tmp_path / "dist")
    found = verified(source, tmp_path / "dist")
    assert len(found) == 2 * 2 * 4 and all(name.endswith(("gate_proj.weight", "up_proj.weight")) for name in found)


def test_a_transposed_group_of_queries_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_hf(tmp_path / "hf")
    right = QKV.to_megatron

    def wrong(self: QKV, tensors: list[torch.Tensor]) -> torch.Tensor:
        """[q…, k, v] stacked instead of interleaved by group."""
        return torch.cat(list(tensors)) if tensors[0].numel() else right(self, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(QKV, "to_megatron", wrong)
        to_megatron(source, tmp_path / "dist")
    found = verified(source, tmp_path / "dist")
    assert found and all(".self_attn." in name for name in found)


def test_a_dropped_expert_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once written as a copy of another expert, once not written at all."""
    source = write_hf(tmp_path / "hf")
    read = HFModel.read
    with monkeypatch.context() as patch:
        patch.setattr(HFModel, "read", lambda self, name: read(self, name.replace("experts.3.", "experts.2.")))
        to_megatron(source, tmp_path / "copied")
    found = verified(source, tmp_path / "copied")
    assert len(found) == 6 and all(".experts.3." in name for name in found)

    plan = to_megatron_module.parameters_of
    with monkeypatch.context() as patch:
        patch.setattr(
            to_megatron_module,
            "parameters_of",
            lambda *a: [p for p in plan(*a) if not (p.spec.expert == 3 and p.spec.layer == 1)],
        )
        to_megatron(source, tmp_path / "missing")
    with pytest.raises(UserError, match=r"\.metadata is damaged: the parts of decoder.layers.1.mlp.experts"):
        open_model(tmp_path / "missing")


def test_a_single_bit_is_found_and_placed(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf")
    other = to_hf(to_megatron(source, tmp_path / "dist"), tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[name].view(torch.int16)[5, 7] ^= 1
    save_file(tensors, other / "model.safetensors")
    for compare in (verify, diff):
        result = compare(open_model(tmp_path / "dist"), open_model(other))
        [difference] = result.differences
        assert difference.name == name and "1 of 128 numbers differ, by at most " in difference.reason
        assert difference.reason.endswith("at [5, 7]")


def test_configs_are_compared(tmp_path: Path) -> None:
    one, other = write_hf(tmp_path / "a"), write_hf(tmp_path / "b", CONFIG | {"rms_norm_eps": 1e-5, "more": 1})
    result = verify(open_model(one), open_model(other))
    assert not result.is_equal and not result.differences
    assert result.config_differences == ("more: '(absent)', 1", "rms_norm_eps: 1e-06, 1e-05")


def test_diff_compares_across_formats_dtypes_and_missing_tensors(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", dtype=torch.float32)
    rounded = to_megatron(source, tmp_path / "dist", dtype=torch.bfloat16)
    result = diff(open_model(source), open_model(rounded))
    assert len(result.differences) == result.tensors
    assert all(d.reason.startswith("dtype torch.float32, torch.bfloat16; ") for d in result.differences)
    worst = float(result.differences[0].reason.split("by at most ")[1].split(" ")[0])
    embedding = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    assert worst == pytest.approx(float((embedding - embedding.bfloat16()).abs().max()), rel=1e-4)

    fewer = write_hf(tmp_path / "fewer", CONFIG | {"num_hidden_layers": 1})
    missing = [d for d in diff(open_model(source), open_model(fewer)).differences if d.reason.startswith("missing in")]
    assert missing and all("model.layers.1." in d.name and d.reason.endswith("fewer") for d in missing)


def add_optimizer_state(dist: Path, **tensors: torch.Tensor) -> Path:
    """As training saves it beside the weights."""
    path = dist / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    (dist / "checksums.json").unlink()
    for i, (name, tensor) in enumerate(tensors.items()):
        key, file = f"optimizer.state.exp_avg.{name}", f"__{50 + i}_0.distcp"
        torch.save(tensor, dist / file)
        place, size = MetadataIndex(key, [0] * tensor.dim()), (dist / file).stat().st_size
        chunk = ChunkStorageMetadata(torch.Size([0] * tensor.dim()), tensor.shape)
        metadata.state_dict_metadata[key] = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, [chunk])
        metadata.storage_data[place] = _StorageInfo(file, 0, size)
    path.write_bytes(pickle.dumps(metadata))
    return dist


def test_diff_compares_the_optimizers_state_of_two_training_checkpoints(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf")
    one, other, bare = (to_megatron(source, tmp_path / name) for name in ("one", "other", "bare"))
    add_optimizer_state(one, a=torch.zeros(3), b=torch.ones(2), c=torch.ones(1))
    add_optimizer_state(other, a=torch.tensor([0.0, 0.5, 0.0]), b=torch.ones(2))
    found = diff(open_model(one), open_model(other)).differences
    assert [(d.name, d.reason) for d in found] == [
        ("optimizer.state.exp_avg.c", f"missing in {other}"),
        ("optimizer.state.exp_avg.a", "1 of 3 numbers differ, by at most 0.5 at [1]"),
    ]
    assert diff(open_model(one), open_model(bare)).is_equal, "weights alone are compared with weights alone"
    assert verify(open_model(one), open_model(other)).is_equal
    assert contents(to_hf(one, tmp_path / "back")) == contents(source), "an export leaves it behind"


def test_nan_and_infinity_are_told_apart_by_their_bits(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", dtype=torch.float32)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    save_file(tensors, source / "model.safetensors")
    dist = to_megatron(source, tmp_path / "dist")
    assert verify(open_model(source), open_model(dist)).is_equal
    tensors["model.norm.weight"][3] = 0.0
    save_file(tensors, source / "model.safetensors")
    [difference] = verify(open_model(source), open_model(dist)).differences
    assert "1 of 16 numbers differ, by at most 0 at [3]" in difference.reason


# --- the target --------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "hf", files=2)


def test_an_existing_folder_is_not_touched(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "dist"
    target.mkdir()
    (target / "precious").write_text("data")
    with pytest.raises(UserError, match="exists; choose another folder or give --overwrite"):
        to_megatron(source, target)
    model = open_model(source)
    assert isinstance(model, HFModel)
    with pytest.raises(UserError, match="is no checkpoint, so --overwrite leaves it alone"):
        execute(ToMegatron(model), target, overwrite=True, report=Silent())
    assert contents(target) == {"precious": b"data"}
    assert not partial_folder(target).exists()


def overwrite(source: Path, target: Path) -> None:
    model = open_model(source)
    conversion = ToMegatron(model) if isinstance(model, HFModel) else ToHF(model)  # type: ignore[arg-type]
    execute(conversion, target, overwrite=True, report=Silent())


@pytest.mark.parametrize(
    "content",
    [
        {"config.json": "{}", "main.py": "x"},  # a project that happens to have one
        {"config.json": '{"model_type": "qwen3"}'},
        {"config.json": "[", "model.safetensors": "x"},
        {"gspo_megatron.json": "{}", "notes": "x"},
    ],
)
def test_overwrite_leaves_alone_what_is_no_checkpoint(content: dict[str, str], source: Path, tmp_path: Path) -> None:
    target = tmp_path / "project"
    target.mkdir()
    for name, text in content.items():
        (target / name).write_text(text)
    before = contents(target)
    with pytest.raises(UserError, match="project is no checkpoint, so --overwrite leaves it alone"):
        overwrite(source, target)
    assert contents(target) == before


@pytest.mark.parametrize("kind", ["hf", "dist"])
@pytest.mark.parametrize("name", ["notes.txt", "adapter_model.safetensors", ".git/config", "hf/train.py", "hf/a/b"])
def test_overwrite_removes_no_file_of_the_users(kind: str, name: str, source: Path, tmp_path: Path) -> None:
    dist = to_megatron(source, tmp_path / "made")
    target, given = (to_hf(dist, tmp_path / "out"), dist) if kind == "hf" else (dist, source)
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    (target / name).write_text("mine")
    before = contents(target)
    with pytest.raises(UserError, match="is no part of a checkpoint") as error:
        overwrite(given, target)
    assert str(target / name).startswith(str(error.value).split(" is no part")[0])
    assert contents(target) == before


def test_overwrite_looks_again_when_the_result_is_complete(source: Path, tmp_path: Path) -> None:
    target = to_megatron(source, tmp_path / "dist")

    class Slow(ToMegatron):
        def finish(self, folder: Path, sums: Mapping[str, FileSum]) -> None:
            super().finish(folder, sums)
            (target / "notes.txt").write_text("written meanwhile")

    model = open_model(source)
    assert isinstance(model, HFModel)
    with pytest.raises(UserError, match=r"notes.txt is no part of a checkpoint"):
        execute(Slow(model), target, overwrite=True, report=Silent())
    assert (target / "notes.txt").read_text() == "written meanwhile"


def test_overwrite_replaces_a_training_checkpoint_and_a_model_of_several_files(source: Path, tmp_path: Path) -> None:
    target = to_megatron(source, tmp_path / "dist")
    for name in ("trainer.json", "random.json"):
        (target / name).write_text("{}")
    (target / "checksums.json").unlink()
    overwrite(source, target)
    out = to_hf(target, tmp_path / "out")
    overwrite(target, out)
    assert contents(out) == contents(source)


def test_overwrite_replaces_a_checkpoint_only_when_the_new_one_is_complete(source: Path, tmp_path: Path) -> None:
    target = to_megatron(write_hf(tmp_path / "old", seed=1), tmp_path / "dist")
    before = contents(target)
    model = open_model(source)
    assert isinstance(model, HFModel)

    class Broken(ToMegatron):
        def content(self, number: int) -> Iterator[memoryview | bytes]:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        execute(Broken(model), target, overwrite=True, report=Silent())
    assert contents(target) == before
    execute(ToMegatron(model), target, overwrite=True, report=Silent())
    assert verify(model, open_model(target)).is_equal
    assert not partial_folder(target).exists()


@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_source_and_target_must_not_lie_in_each_other(place: str, source: Path) -> None:
    model = open_model(source)
    assert isinstance(model, HFModel)
    with pytest.raises(UserError, match="lie in each other"):
        execute(ToMegatron(model), source / place, overwrite=True, report=Silent())


def test_a_full_disk_is_foreseen(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 10})())
    with pytest.raises(UserError, match=r"has 0.0 GB free, the rest takes"):
        to_megatron(source, tmp_path / "dist")


def test_two_conversions_at_once_are_refused(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "dist"

    class Second(ToMegatron):
        def content(self, number: int) -> Iterator[memoryview | bytes]:
            with pytest.raises(UserError, match="is being written by another conversion"):
                to_megatron(source, target)
            yield from super().content(number)

    model = open_model(source)
    assert isinstance(model, HFModel)
    execute(Second(model), target, report=Silent())
    assert verify(model, open_model(target)).is_equal


# --- killed and taken up -----------------------------------------------------------------------------------------


class Stops(Exception):
    pass


class Stopping(ToMegatron):
    """Fails in a file, after half of it; counts what it was asked for."""

    stop_in: int | None = None
    asked: list[int]

    def content(self, number: int) -> Iterator[memoryview | bytes]:
        self.asked.append(number)
        parts = list(super().content(number))
        if number == self.stop_in:
            yield from parts[: len(parts) // 2]
            raise Stops
        yield from parts


def stopping(source: Path, stop_in: int | None, **options: Any) -> Stopping:
    model = open_model(source)
    assert isinstance(model, HFModel)
    made = Stopping(model, file_bytes=3000, **options)
    made.stop_in, made.asked = stop_in, []
    return made


def test_a_conversion_goes_on_with_the_file_it_was_in(source: Path, tmp_path: Path) -> None:
    target, report = tmp_path / "dist", Silent()
    with pytest.raises(Stops):
        execute(stopping(source, 4), target, threads=1, report=report)
    assert not target.exists()
    again = stopping(source, None)
    execute(again, target, threads=1, report=report)
    assert again.asked == list(range(4, len(again.files)))
    assert report.notes[0].startswith(f"4 of {len(again.files)} files are there from an earlier try")
    fresh = stopping(source, None)
    execute(fresh, tmp_path / "fresh", threads=1, report=Silent())
    assert contents(target) == contents(tmp_path / "fresh")
    assert MANIFEST not in contents(target) and not partial_folder(target).exists()


def test_a_conversion_that_fails_at_the_very_end_keeps_all_files(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "dist"
    with monkeypatch.context() as patch:
        patch.setattr(to_megatron_module, "write_description", lambda *_: (_ for _ in ()).throw(Stops))
        with pytest.raises(Stops):
            execute(stopping(source, None), target, report=Silent())
    again = stopping(source, None)
    execute(again, target, report=Silent())
    assert again.asked == []
    assert find_damage(target) == [] and verify(open_model(source), open_model(target)).is_equal


def test_the_place_of_the_unfinished_folder_is_no_way_out(source: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("data")
    partial_folder(tmp_path / "dist").symlink_to(outside)
    with pytest.raises(UserError, match="where the result would be written, is no folder; remove it"):
        to_megatron(source, tmp_path / "dist")
    assert contents(outside) == {"precious": b"data"}


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "link"])
def test_a_finished_file_that_was_changed_is_written_again(harm: str, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "dist"
    with pytest.raises(Stops):
        execute(stopping(source, 4), target, threads=1, report=Silent())
    path = partial_folder(target) / "__2_0.distcp"
    data = path.read_bytes()
    path.unlink()
    if harm == "flip":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "truncate":
        path.write_bytes(data[:-1])
    elif harm == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        path.symlink_to(tmp_path / "elsewhere")
    again = stopping(source, None)
    execute(again, target, threads=1, report=Silent())
    assert again.asked[:2] == [2, 4]
    assert find_damage(target) == [] and verify(open_model(source), open_model(target)).is_equal
    assert not (target / "__2_0.distcp").is_symlink()


def test_what_another_conversion_left_is_not_taken_up(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "dist"
    for change in ("other dtype", "other source"):
        with pytest.raises(Stops):
            execute(stopping(source, 4, dtype=torch.float32), target, threads=1, report=Silent())
        if change == "other source":
            path = next(source.glob("model-*"))
            os.utime(path, ns=(0, 0))
        again = stopping(source, None, **({"dtype": torch.float32} if change == "other source" else {}))
        execute(again, target, threads=1, report=Silent())
        assert again.asked == list(range(len(again.files))), change
        to_hf(target, tmp_path / change)
        shutil.rmtree(target)


@pytest.mark.parametrize("line", ["", "{", '{"file": "x"}', '{"file": "../x", "size": 1, "xxh3_128": "0"}', "[]"])
def test_a_manifest_that_was_being_written_is_read_as_far_as_it_goes(line: str, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "dist"
    with pytest.raises(Stops):
        execute(stopping(source, 4), target, threads=1, report=Silent())
    with open(partial_folder(target) / MANIFEST, "a") as file:
        file.write(line)
    again = stopping(source, None)
    execute(again, target, threads=1, report=Silent())
    assert again.asked[0] == 4
    assert find_damage(target) == []


def test_a_source_that_does_not_have_its_checksums_is_not_exported(source: Path, tmp_path: Path) -> None:
    dist = to_megatron(source, tmp_path / "dist")
    path = dist / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"__0_0.distcp is damaged: .* with xxh3-128"):
        to_hf(dist, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the command line --------------------------------------------------------------------------------------------


Result = tuple[int, str, str]  # exit code, standard output, standard error


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """The program's main, in this process: importing torch takes longer than all that it does here."""

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        try:
            code = convert_checkpoint.main(list(map(str, arguments)))
        except SystemExit as error:  # argparse
            code = int(error.code or 0)
        return code, *capsys.readouterr()

    return call


def test_the_program_runs_as_a_file(source: Path, tmp_path: Path) -> None:
    program = ROOT / "tools" / "convert_checkpoint.py"
    result = subprocess.run(
        [sys.executable, program, "import", source, tmp_path / "dist"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0 and result.stdout.endswith(f"{tmp_path / 'dist'} is complete\n"), result.stderr
    assert verify(open_model(source), open_model(tmp_path / "dist")).is_equal


def test_the_commands_and_their_exit_codes(run: Callable[..., Result], source: Path, tmp_path: Path) -> None:
    dist, out = tmp_path / "dist", tmp_path / "out"
    code, said, _ = run("import", source, dist, "--dry-run")
    assert code == 0 and not dist.exists() and not partial_folder(dist).exists()
    assert f"{len(HFModel(source).names)} tensors" in said and "__0_0.distcp" in said and "GB of memory" in said
    code, said, _ = run("import", source, dist)
    assert code == 0 and said.endswith(f"{dist} is complete\n")
    assert run("export", dist, out)[0] == 0 and contents(out) == contents(source)
    code, said, _ = run("verify", source, dist)
    assert code == 0 and "are equal" in said and "bit for bit" in said
    assert run("verify", dist)[:2] == (0, f"{dist}: complete, {len(HFModel(source).names)} tensors in their shapes\n")
    code, _, error = run("import", source, dist)
    assert code == 2 and error.count("error: ") == 1 and "give --overwrite" in error
    assert run("import", source, dist, "--overwrite", "--dtype", "float32")[0] == 0
    code, said, _ = run("diff", source, dist)
    assert code == 1 and "dtype torch.bfloat16, torch.float32; equal in value" in said
    code, said, _ = run("inspect", dist)
    assert code == 0 and "step 0, contains model" in said
    found = json.loads(run("inspect", dist, "--json")[1])
    assert found["format"] == "torch_dist" and found["step"] == 0
    assert {"name": "decoder.final_layernorm.weight", "shape": [16], "dtype": "float32", "parts": 1} in found["tensors"]


def test_a_disk_that_fills_is_no_fault_of_the_input(
    run: Callable[..., Result], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code, _, error = run("import", source, tmp_path / "dist")
    assert code == 1 and error.endswith("No space left on device\n") and "Traceback" not in error
    assert not (tmp_path / "dist").exists()
    assert run("import", source, tmp_path / "dist")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["import", "absent", "out"], "absent is no folder"),
        (["export", "hf", "out"], "hf is a Hugging Face folder; export takes a torch_dist one"),
        (["import", "empty", "out"], "empty is neither a Hugging Face model"),
        (["inspect", "empty"], "empty is neither"),
        (["import", "hf", "out", "--threads", "0"], "must be at least 1"),
        (["convert"], "invalid choice"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    arguments: list[str], said: str, run: Callable[..., Result], source: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    names = {"absent", "out", "hf", "empty"}
    code, _, error = run(*(tmp_path / a if a in names else a for a in arguments))
    assert code == 2 and said in error


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), FileNotFoundError(2, "No such file")])
def test_a_source_file_that_cannot_be_read_is_named(
    error: OSError, run: Callable[..., Result], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path.name != "config.json":
            return read(path)
        raise type(error)(error.errno, error.strerror, str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refused)
        code, _, said = run("import", source, tmp_path / "dist")
    assert (code, said) == (2, f"error: {source / 'config.json'} can't be read: {error.strerror}\n")


@pytest.mark.parametrize("arguments", [[], ["--dry-run"]])
def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_read(
    arguments: list[str], run: Callable[..., Result], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    if not arguments:
        for name in ("/proc/dist", str(tmp_path / ("d" * 250))):
            code, _, said = run("import", source, name)
            assert code == 2 and "can't be made: " in said and "choose another place" in said
    code, _, said = run("import", source, tmp_path / "file" / "dist", *arguments)
    assert code == 2 and f"{tmp_path / 'file'} is no folder that can be written to" in said
    allowed = os.access
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and allowed(path, mode))
        code, _, said = run("import", source, tmp_path / "new" / "dist", *arguments)
    assert code == 2 and f"{tmp_path} is no folder that can be written to" in said
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("harm", ["dangling", "folder", "unreadable"])
def test_a_tokenizer_that_cannot_be_copied_is_found_before_the_weights_are_converted(
    harm: str, run: Callable[..., Result], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = source / "tokenizer.json"
    if harm == "unreadable":
        allowed = os.access
        monkeypatch.setattr(os, "access", lambda p, mode: p != path and allowed(p, mode))
    else:
        path.unlink()
        path.symlink_to("absent") if harm == "dangling" else path.mkdir()
    code, _, said = run("import", source, tmp_path / "dist", "--dry-run")
    assert code == 2 and str(path) in said
    assert ("is a link to no file" if harm == "dangling" else "is no file" if harm == "folder" else "be read") in said


def test_small_files_beside_the_weights_are_kept_and_others_left_behind_aloud(
    run: Callable[..., Result], source: Path, tmp_path: Path
) -> None:
    kept = {"tiktoken.model": "a", "tokenization_x.py": "b", "vocab.txt": "c", "LICENSE": "d", "manifest.jsonl": "e"}
    for name, text in (kept | {"pytorch_model.bin": "x", ".hidden": "x"}).items():
        (source / name).write_text(text)
    (source / "onnx").mkdir()
    (tmp_path / "secret").write_text("x")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    with open(source / "large.txt", "wb") as file:
        file.truncate(MOST_COMPANION_BYTES + 1)
    dist, out = tmp_path / "dist", tmp_path / "out"
    code, said, _ = run("import", source, dist)
    assert code == 0
    assert "small files: large.txt, notes.txt, onnx, pytorch_model.bin\n" in said
    assert run("export", dist, out)[0] == 0
    others = {"pytorch_model.bin", ".hidden", "large.txt", "notes.txt"}
    assert contents(out) == {name: data for name, data in contents(source).items() if name not in others}
    # They are no reason to leave the result alone, unless they were changed.
    assert run("export", dist, out, "--overwrite")[0] == 0
    (out / "vocab.txt").write_text("mine")
    assert run("export", dist, out, "--overwrite")[0] == 2
    assert (out / "vocab.txt").read_text() == "mine"


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_a_conversion_to_another_dtype_is_proved(family: str, run: Callable[..., Result], tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", family_config(family), dtype=torch.float32)
    dist, wide = to_megatron(source, tmp_path / "dist", dtype=torch.bfloat16), tmp_path / "wide"
    assert run("verify", source, dist)[0] == 1
    assert run("verify", source, dist, "--dtype", "bfloat16")[0] == 0
    assert run("verify", source, dist, "--dtype", "float32")[0] == 1
    assert run("verify", source, "--dtype", "float32")[0] == 2
    out = to_hf(dist, tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"].view(torch.int16)[3] ^= 1
    save_file(tensors, out / "model.safetensors")
    code, said, _ = run("verify", source, out, "--dtype", "bfloat16")
    assert code == 1 and "differ in 1 tensors and 0 keys" in said

    to_hf(dist, wide, dtype=torch.float32)
    count = len(HFModel(wide).names) - sum(name.endswith("e_score_correction_bias") for name in HFModel(wide).names)
    code, said, _ = run("diff", dist, wide)
    assert code == 1 and f"differ in 0 tensors and 0 keys of config.json, and {count} more of another dtype" in said
    assert said.count("dtype torch.bfloat16, torch.float32; equal in value") == 1


def test_inspect_tells_both_formats(source: Path, tmp_path: Path) -> None:
    found = inspect(source)
    assert (found.format, found.step, found.family) == ("hf", None, "qwen3_moe")
    assert found.nbytes == sum(t.numel() * 2 for path in source.glob("*.safetensors") for t in load_file(path).values())
    dist = to_megatron(source, tmp_path / "dist", chunk_bytes=200)
    listed = {t.name: t for t in inspect(dist).tensors}
    fc1 = listed["decoder.layers.0.mlp.experts.experts.linear_fc1.weight"]
    assert fc1.shape == (4, 16, 16) and fc1.parts == 4 * 3
