"""Every family: its table against what transformers writes, what it refuses, and its path through a reshard plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gspo_megatron.errors import UserError
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.weights.families import FAMILIES, REFUSED, find_family, load_fields
from gspo_megatron.weights.hf_checkpoint import HFCheckpoint
from gspo_megatron.weights.reshard import plan_reshard
from tests.distributed import family_models


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """config.json as transformers writes it for the tests' model."""
    config = family_models.make_config(family)
    return json.loads(config.to_json_string()) | {"model_type": family} | changes


def test_every_trained_family_has_a_model_here() -> None:
    assert FAMILIES.keys() == family_models.CONFIGS.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_names_exactly_the_tensors_that_transformers_writes(family: str, tmp_path: Path) -> None:
    family_models.make(family).save_pretrained(tmp_path)
    rules, fields = load_fields(tmp_path)
    specs = [s for s in rules.specs(fields) if not s.load_only]
    expected = {name: shape for s in specs for name, shape in zip(s.hf, s.hf_shapes, strict=True)}
    assert sum(len(s.hf) for s in specs) == len(expected), "a tensor has two rules"
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        written = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert expected == written
    HFCheckpoint(tmp_path).verify(rules.specs(fields), left_out=fields.left_out)


@pytest.mark.parametrize(
    ("family", "changes", "published"),
    [
        ("mixtral", {}, 46_702_792_704),  # 8x7B
        ("qwen2_moe", {}, 14_315_784_192),  # Qwen1.5-MoE-A2.7B
        ("olmoe", {"intermediate_size": 1024}, 6_919_161_856),  # OLMoE-1B-7B
        ("gpt_oss", {}, 116_829_156_672),  # gpt-oss-120b
        ("glm4_moe", {}, None),
    ],
)
def test_models_of_published_size_have_as_many_parameters_as_transformers(
    family: str, changes: dict[str, Any], published: int | None
) -> None:
    """transformers' default configurations, without memory."""
    model_class = getattr(transformers, family_models.CLASSES[family])
    config = model_class.config_class(**changes)
    with torch.device("meta"):
        model = model_class(config)
    buffers = [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    theirs = sum(t.numel() for t in [*model.parameters(), *buffers])
    given = json.loads(config.to_json_string()) | {"model_type": family}
    rules = find_family(given)
    ours = sum(spec.numel for spec in rules.specs(rules.fields(given)) if not spec.load_only)
    assert ours == theirs == (published or theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_comes_back_from_its_shards(family: str) -> None:
    rules, layout = find_family(config_of(family)), ParallelLayout(tensor=2, data=2, expert=2, expert_tensor=2)
    generator = torch.Generator().manual_seed(0)
    for spec in rules.specs(rules.fields(config_of(family))):
        tensors = [torch.randn(shape, generator=generator) for shape in spec.hf_shapes]
        whole, count = spec.codec.to_megatron(tensors), spec.num_shards(layout)
        back = [torch.full_like(t, torch.nan) for t in tensors]
        for i in range(count):
            shard = whole if spec.dim is None else spec.codec.shard(whole, spec.dim, i, count)
            spec.codec.place(shard, spec.dim, i, count, back)
        assert all(torch.equal(a, b) for a, b in zip(back, tensors, strict=True)), spec.megatron


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("mixtral", {"sliding_window": 4096}, "sliding_window=4096 is not supported: sliding-window"),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok=1 with norm_topk_prob=true"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported: only SwiGLU"),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ("qwen2_moe", {"num_experts_per_tok": 1, "norm_topk_prob": True}, "its router never trained"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported: queries, keys and values are not clipped"),
        ("olmoe", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("glm4_moe", {"norm_topk_prob": False}, "norm_topk_prob=False is not supported: Megatron-Core always renorm"),
        ("glm4_moe", {"n_group": 4, "topk_group": 2}, "num_experts_per_tok=2 with topk_group=2 is not supported: Meg"),
        ("glm4_moe", {"n_group": 3, "num_experts_per_tok": 2}, "n_group=3 must divide the number of experts, 8"),
        ("glm4_moe", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type='yarn' is not supported"),
        (
            "gpt_oss",
            {"quantization_config": {"quant_method": "mxfp4"}},
            "quant_method='mxfp4' is not supported: weights",
        ),
        ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha=1.5 is not supported: the activation is Megatron-Core's"),
        ("gpt_oss", {"attention_bias": False}, "attention_bias=False is not supported"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "must name full_attention or sliding_attention for each of 4"),
        ("gpt_oss", {"layer_types": ["chunked_attention"] * 4}, "must name full_attention or sliding_attention"),
        ("gpt_oss", {"sliding_window": None}, "sliding_window=None must be a positive integer"),
        ("gpt_oss", {"num_experts_per_tok": 1}, "its router never trained"),
        ("mixtral", {"rope_scaling": {"type": "llama3", "factor": 4.0}}, "rope_type='llama3' is not supported"),
    ],
)
def test_what_cannot_be_expressed_is_refused(family: str, changes: dict[str, Any], said: str) -> None:
    find_family({"model_type": family}).fields(config_of(family))
    with pytest.raises(UserError, match=said):
        find_family({"model_type": family}).fields(config_of(family, **changes))


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_family_that_cannot_be_had_is_refused_with_the_reason(model_type: str) -> None:
    with pytest.raises(UserError, match=f'model_type="{model_type}" is not supported: ') as error:
        find_family({"model_type": model_type})
    assert str(error.value).endswith(REFUSED[model_type])


# --- layers that predict further tokens --------------------------------------------------------------------------


def test_layers_that_predict_further_tokens_may_be_there_and_are_not_read(tmp_path: Path) -> None:
    family_models.make("glm4_moe").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.layers.4.eh_proj.weight": torch.ones(2, 2)}, path)
    rules, fields = load_fields(tmp_path)
    assert fields.left_out == ("model.layers.4.",)
    HFCheckpoint(tmp_path).verify(rules.specs(fields), left_out=fields.left_out)
    with pytest.raises(UserError, match=r"unexpected 1 \(model\.layers\.4\.eh_proj"):
        HFCheckpoint(tmp_path).verify(rules.specs(fields))
    save_file(tensors | {"model.layers.40.eh_proj.weight": torch.ones(2, 2)}, path)
    with pytest.raises(UserError, match=r"unexpected 1 \(model\.layers\.40\."):
        HFCheckpoint(tmp_path).verify(rules.specs(fields), left_out=fields.left_out)


@pytest.mark.parametrize("layers", [3, 2])
@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_a_layer_that_predicts_no_further_tokens_is_not_left_out(family: str, layers: int, tmp_path: Path) -> None:
    """A wrong num_hidden_layers, with as many layers that predict further tokens as are too many."""
    family_models.make(family).save_pretrained(tmp_path)
    wrong = {"num_hidden_layers": layers, "num_nextn_predict_layers": 4 - layers}
    (tmp_path / "config.json").write_text(json.dumps(config_of(family, **wrong)))
    rules, fields = load_fields(tmp_path)
    with pytest.raises(
        UserError, match=rf"has model\.layers\.{layers}\.\* behind .* lacks eh_proj\.weight; correct num_h"
    ):
        HFCheckpoint(tmp_path).verify(rules.specs(fields), left_out=fields.left_out)


# --- tensors that keep their dtype -------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket_bytes", [600, 10**9])
def test_a_bucket_is_of_one_dtype_and_holds_what_it_says(bucket_bytes: int) -> None:
    rules = find_family({"model_type": "glm4_moe"})
    fields = rules.fields(config_of("glm4_moe"))
    layout = ParallelLayout(tensor=2, expert=2, data=2)
    plan = plan_reshard(
        rules.specs(fields),
        layout,
        num_layers=fields.num_layers,
        num_experts=fields.num_experts,
        feeds=[range(4), [0], [2]],
        dtype=torch.bfloat16,
        bucket_bytes=bucket_bytes,
    )
    kept = {i for i, s in enumerate(plan.specs) if s.megatron.endswith("expert_bias")}
    assert len(kept) == 3 and all(plan.dtype_of(i) == torch.float32 for i in kept)
    assert all(plan.dtype_of(i) == torch.bfloat16 for i in range(len(plan.specs)) if i not in kept)
    buckets = [bucket for step in plan.steps for bucket in step.buckets]
    for bucket in buckets:
        assert len({plan.dtype_of(i) for i in bucket.specs}) == 1
        assert bucket.nbytes == sum(plan.specs[i].numel * plan.dtype_of(i).itemsize for i in bucket.specs)
    for feed in range(3):
        sent = [i for bucket in buckets if bucket.feed == feed for i in bucket.specs]
        assert sorted(sent) == list(range(len(plan.specs)))
