"""DeepSeek-V3's table: against what transformers builds, published totals, and Megatron's own names."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from gspo_megatron.errors import UserError
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.weights.families import PLANNABLE
from gspo_megatron.weights.rules import TensorSpec

CONFIGS = Path(__file__).parents[3] / "tools/reshard_models"

SMALL: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 19,
    "hidden_size": 8,
    "intermediate_size": 12,
    "moe_intermediate_size": 6,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 10,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 3,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
}


YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}


def published(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def specs_of(config: dict[str, Any]) -> list[TensorSpec]:
    family = PLANNABLE[config["model_type"]]
    return family.specs(family.fields(config))


def hf_tensors(specs: list[TensorSpec]) -> dict[str, tuple[int, ...]]:
    pairs = [pair for s in specs if not s.load_only for pair in zip(s.hf, s.hf_shapes, strict=True)]
    assert len(dict(pairs)) == len(pairs), "a tensor has two rules"
    return dict(pairs)


def transformers_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a transformers model, with experts named one by one as in published checkpoints."""
    known = {k: v for k, v in config.items() if k not in ("model_type", "source", "num_parameters")}
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**known))
    tensors: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if ".mlp.experts." not in name:
            tensors[name] = shape
            continue
        prefix, fused = name.rsplit(".", 1)
        for expert in range(shape[0]):
            if fused == "gate_up_proj":
                half = (shape[1] // 2, shape[2])
                tensors |= {f"{prefix}.{expert}.{x}_proj.weight": half for x in ("gate", "up")}
            else:
                tensors[f"{prefix}.{expert}.{fused}.weight"] = shape[1:]
    return tensors


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None},
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 4},
        {"n_shared_experts": 1},
        {"num_nextn_predict_layers": 1},
    ],
    ids=str,
)
def test_the_table_names_exactly_the_tensors_of_transformers(changes: dict[str, Any]) -> None:
    config = SMALL | changes
    assert hf_tensors(specs_of(config)) == transformers_tensors(config)


@pytest.mark.parametrize("name", ["deepseek_v3", "kimi_k2"])
def test_published_models_have_exactly_the_tensors_of_transformers(name: str) -> None:
    specs = specs_of(published(name))
    assert hf_tensors(specs) == transformers_tensors(published(name))
    assert len({s.megatron for s in specs}) == len(specs)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen3_30b_a3b", 30_532_122_624),
        ("qwen3_235b_a22b", 235_093_634_560),
        ("deepseek_v3", 671_026_419_200),  # without the layer that predicts further tokens
        ("kimi_k2", 1_026_408_232_448),
    ],
)
def test_published_numbers_of_parameters(name: str, parameters: int) -> None:
    config = published(name)
    assert sum(s.numel for s in specs_of(config)) == parameters == config["num_parameters"]
    assert config["source"].startswith("https://huggingface.co/")


def test_layers_that_predict_further_tokens_are_not_sent() -> None:
    config = published("deepseek_v3")
    assert config["num_nextn_predict_layers"] == 1 and config["num_hidden_layers"] == 61
    names = hf_tensors(specs_of(config))
    assert any(".layers.60." in name for name in names) and not any(".layers.61." in name for name in names)


def test_every_tensor_comes_back_from_its_shards() -> None:
    generator = torch.Generator().manual_seed(0)
    layout = ParallelLayout(tensor=2, expert_tensor=2)
    for spec in specs_of(SMALL):
        tensors = [torch.randn(shape, generator=generator) for shape in spec.hf_shapes]
        whole, count = spec.codec.to_megatron(tensors), spec.num_shards(layout)
        back = [torch.full_like(t, torch.nan) for t in tensors]
        for i in range(count):
            shard = whole if spec.dim is None else spec.codec.shard(whole, spec.dim, i, count)
            spec.codec.place(shard, spec.dim, i, count, back)
        assert all(torch.equal(a, b) for a, b in zip(back, tensors, strict=True)), spec.megatron


def test_names_are_those_of_megatron() -> None:
    from megatron.core.transformer.moe.moe_layer import MoESubmodules
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules

    specs = [*specs_of(SMALL), *specs_of(SMALL | {"q_lora_rank": None})]
    attention = {s.megatron.split(".")[4] for s in specs if ".self_attention." in s.megatron}
    assert attention == set(MLASelfAttentionSubmodules.__dataclass_fields__) - {"core_attention"}
    moe = {s.megatron.split(".")[4] for s in specs if ".mlp." in s.megatron and s.layer != 0}
    assert moe == set(MoESubmodules.__dataclass_fields__)
    assert "self.register_buffer(\n                'expert_bias'" in inspect.getsource(TopKRouter.__init__)
    assert "decoder.layers.1.mlp.router.expert_bias" in {s.megatron for s in specs}


def test_projections_through_a_low_rank_are_cut_along_their_rows_and_norms_are_whole() -> None:
    dims = {s.megatron.split(".")[4]: s.dim for s in specs_of(SMALL) if "layers.1.self_attention" in s.megatron}
    assert dims == {
        "linear_q_down_proj": 0,
        "q_layernorm": None,
        "linear_q_up_proj": 0,
        "linear_kv_down_proj": 0,
        "kv_layernorm": None,
        "linear_kv_up_proj": 0,
        "linear_proj": 1,
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False is not supported"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax' is not supported"),
        ({"topk_method": "greedy"}, "topk_method='greedy' is not supported"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05 is not supported: transformers takes 1e-6"),
        ({"num_experts_per_tok": 3}, "num_experts_per_tok=3 with topk_group=1 is not supported"),
        ({"rope_scaling": YARN | {"mscale": "1"}}, "rope_type='yarn' with mscale='1'; it must be a number > 0"),
        ({"rope_scaling": YARN | {"factor": 0}}, "rope_type='yarn' with factor=0; it must be a number > 0"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear' is not supported; only unscaled"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type='yarn' with original_max_position_embeddings=N"),
        ({"kv_lora_rank": None}, 'lacks "kv_lora_rank"'),
        ({"first_k_dense_replace": None}, 'lacks "first_k_dense_replace"'),
    ],
)
def test_what_has_no_rule_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        specs_of(SMALL | changes)


def test_the_base_of_rotary_embeddings_is_read_in_both_spellings() -> None:
    fields = PLANNABLE["deepseek_v3"].fields
    assert fields(SMALL).rope_theta == 1e4
    newer = {k: v for k, v in SMALL.items() if k != "rope_theta"} | {"rope_parameters": {"rope_theta": 5e4}}
    assert fields(newer).rope_theta == 5e4
