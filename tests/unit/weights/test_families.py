"""Model families: fields from config.json, refusals, and rule tables against what transformers writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from gspo_megatron.errors import UserError
from gspo_megatron.weights.families import FAMILIES, find_family, load_fields, read_hf_config
from gspo_megatron.weights.families.base import ModelFields
from tests.distributed import tiny_models

TINY: dict[str, Any] = {
    "vocab_size": 19,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 32,
}
EXPERTS: dict[str, Any] = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 5}


def moe_config(**changes: Any) -> dict[str, Any]:
    """config.json of a published Qwen3-MoE, at a tiny size."""
    return {
        "model_type": "qwen3_moe",
        **TINY,
        "num_hidden_layers": 6,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 5,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    } | changes


def dense_config(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in moe_config().items() if "expert" not in name} | {
        "model_type": "qwen3",
        **changes,
    }


def fields_of(config: dict[str, Any]) -> ModelFields:
    return find_family(config).fields(config)


def without(config: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != name}


# --- tables against transformers ---------------------------------------------------------------------------------


def save_tiny(folder: Path, kind: str) -> None:
    common = TINY | {"num_hidden_layers": 4}
    if kind in ("moe", "dense", "tied"):
        tiny_models.write(folder, kind)
    elif kind == "some layers dense":
        config = Qwen3MoeConfig(**common, **EXPERTS, mlp_only_layers=[1, 2], decoder_sparse_step=1)
        Qwen3MoeForCausalLM(config).save_pretrained(folder)
    elif kind == "every second layer":
        config = Qwen3MoeConfig(**common, **EXPERTS, mlp_only_layers=[3], decoder_sparse_step=2)
        Qwen3MoeForCausalLM(config).save_pretrained(folder)
    elif kind == "tied moe":
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **EXPERTS, tie_word_embeddings=True)).save_pretrained(folder)
    elif kind == "as many groups as heads":
        Qwen3ForCausalLM(Qwen3Config(**(common | {"num_key_value_heads": 4}))).save_pretrained(folder)


@pytest.mark.parametrize(
    "kind",
    ["moe", "dense", "tied", "some layers dense", "every second layer", "tied moe", "as many groups as heads"],
)
def test_the_table_names_exactly_the_tensors_that_transformers_writes(kind: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, kind)
    family, fields = load_fields(tmp_path)
    specs = [s for s in family.specs(fields) if not s.load_only]
    expected = {name: shape for s in specs for name, shape in zip(s.hf, s.hf_shapes, strict=True)}
    assert sum(len(s.hf) for s in specs) == len(expected), "a tensor has two rules"
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        written = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert expected == written
    assert len({s.megatron for s in family.specs(fields)}) == len(family.specs(fields))


@pytest.mark.parametrize(
    ("changes", "moe_layers"),
    [
        ({}, (0, 1, 2, 3, 4, 5)),
        ({"mlp_only_layers": [0, 5]}, (1, 2, 3, 4)),
        ({"mlp_only_layers": None}, (0, 1, 2, 3, 4, 5)),
        ({"decoder_sparse_step": 2}, (1, 3, 5)),
        ({"decoder_sparse_step": 3}, (2, 5)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1, 5)),
    ],
)
def test_layers_with_experts_and_the_number_of_their_tensors(
    changes: dict[str, Any], moe_layers: tuple[int, ...]
) -> None:
    config = moe_config(**changes)
    family, fields = find_family(config), fields_of(config)
    assert fields.moe_layers == moe_layers
    assert fields.dense_layers == tuple(i for i in range(6) if i not in moe_layers)
    names = [name for s in family.specs(fields) for name in s.hf]
    # embedding, norm, head; per layer 2 norms, q k v o, 2 head norms; 1 router and 3 × 8 matrices, or 3 matrices
    assert len(names) == 3 + 6 * 8 + len(moe_layers) * 25 + (6 - len(moe_layers)) * 3
    assert sum(".mlp.gate.weight" in name for name in names) == len(moe_layers)
    for layer in range(6):
        assert (f"model.layers.{layer}.mlp.experts.7.up_proj.weight" in names) == (layer in moe_layers)
        assert (f"model.layers.{layer}.mlp.up_proj.weight" in names) == (layer not in moe_layers)


def test_a_tied_head_is_loaded_from_the_embedding_and_never_exported() -> None:
    config = dense_config(tie_word_embeddings=True)
    specs = {s.megatron: s for s in find_family(config).specs(fields_of(config))}
    head = specs["output_layer.weight"]
    assert head.hf == ("model.embed_tokens.weight",) and head.load_only
    assert not specs["embedding.word_embeddings.weight"].load_only


# --- fields ------------------------------------------------------------------------------------------------------


def test_fields_of_a_published_config() -> None:
    fields = fields_of(moe_config())
    assert (fields.num_layers, fields.hidden_size, fields.head_dim) == (6, 8, 6)
    assert (fields.num_attention_heads, fields.num_query_groups) == (4, 2)
    assert (fields.num_experts, fields.experts_per_token, fields.expert_ffn_hidden_size) == (8, 2, 5)
    assert (fields.rope_theta, fields.norm_eps, fields.tied_embeddings) == (1e6, 1e-6, False)
    dense = fields_of(dense_config())
    assert (dense.num_experts, dense.moe_layers, dense.ffn_hidden_size) == (None, (), 12)


def test_the_experts_are_found_under_the_name_transformers_5_writes() -> None:
    config = json.loads(Qwen3MoeConfig(**TINY, **EXPERTS).to_json_string())
    assert "num_local_experts" in config and "num_experts" not in config
    assert fields_of(config).num_experts == 3


@pytest.mark.parametrize(
    ("rope", "theta"),
    [
        ({"rope_theta": 5000.0, "rope_scaling": None}, 5000.0),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 7000.0}}, 7000.0),
        ({"rope_theta": 5000.0, "rope_scaling": {"type": "default"}}, 5000.0),
        ({"rope_theta": 5000.0, "rope_parameters": {"rope_type": "default"}}, 5000.0),
    ],
)
def test_rope_theta_in_old_and_new_spelling(rope: dict[str, Any], theta: float) -> None:
    config = moe_config(**rope)
    assert fields_of(config).rope_theta == theta
    given = {name: value for name, value in config.items() if value is not None}
    assert Qwen3MoeConfig(**given).rope_parameters["rope_theta"] == theta


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_a_config_without_head_dim_means_what_transformers_takes_it_for(kind: str) -> None:
    config = without(dense_config() if kind == "qwen3" else moe_config(), "head_dim")
    model = {"qwen3": Qwen3ForCausalLM, "qwen3_moe": Qwen3MoeForCausalLM}[kind]
    hf_config = model.config_class(**{k: v for k, v in config.items() if v is not None})
    with torch.device("meta"):
        q_rows = model(hf_config).model.layers[0].self_attn.q_proj.weight.shape[0]
    assert fields_of(config).head_dim * 4 == q_rows


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported: sliding-window"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported: only SwiGLU"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type='yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope_type='linear' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type='dynamic' is not supported"),
    ],
)
@pytest.mark.parametrize("make", [moe_config, dense_config])
def test_what_the_policy_cannot_express_is_refused(make: Any, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        fields_of(make(**changes))


def test_scaling_added_to_a_config_of_transformers_5_is_refused() -> None:
    """transformers lets the older name, rope_scaling, go before rope_parameters."""
    scaled = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 8}
    config = moe_config(rope_parameters={"rope_type": "default", "rope_theta": 1e4}, rope_scaling=scaled)
    assert Qwen3MoeConfig(**config).rope_parameters["rope_type"] == "yarn"
    with pytest.raises(UserError, match="rope_type='yarn' is not supported"):
        fields_of(config)


@pytest.mark.parametrize(
    "name", ["num_hidden_layers", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"]
)
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f'config.json of a qwen3_moe model lacks "{name}"'):
        fields_of(without(moe_config(), name))


@pytest.mark.parametrize(
    ("model_type", "hint"),
    [
        ("qwen3moe", 'Did you mean "qwen3_moe"?'),
        ("qwen4", 'Did you mean "qwen3"?'),
        ("Qwen3", 'Did you mean "qwen3"?'),
    ],
)
def test_an_unknown_model_type_gets_the_nearest_one(model_type: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        find_family({"model_type": model_type})
    message = str(error.value)
    assert f'model_type "{model_type}" is not supported (known: {", ".join(sorted(FAMILIES))}).' in message
    assert message.endswith(hint)


def test_a_config_without_model_type_is_refused() -> None:
    with pytest.raises(UserError, match='model_type "None" is not supported'):
        find_family({})


@pytest.mark.parametrize(
    ("content", "said"), [("{", "is no JSON"), ("[1]", "must hold a JSON object"), (b"\xff\xfe\x00", "is no JSON")]
)
def test_an_unreadable_config_is_named(content: str | bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said) as error:
        read_hf_config(tmp_path)
    assert str(path) in str(error.value)


def test_a_missing_folder_and_a_folder_without_config_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        read_hf_config(tmp_path / "absent")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        read_hf_config(tmp_path)


# --- router ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_router_pre_softmax_is_transformers_without_renormalisation(norm_topk_prob: bool) -> None:
    """softmax before top-k without renormalising is Megatron's pre_softmax; renormalised it is softmax after top-k."""
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    config = moe_config(norm_topk_prob=norm_topk_prob)
    fields = fields_of(config)
    assert fields.router_pre_softmax is not norm_topk_prob
    generator = torch.Generator().manual_seed(5)
    router = Qwen3MoeTopKRouter(Qwen3MoeConfig(**{k: v for k, v in config.items() if v is not None}))
    hidden = torch.randn(40, 8, generator=generator)
    with torch.no_grad():
        router.weight.copy_(torch.randn(8, 8, generator=generator))
        logits, scores, chosen = router(hidden)
        probs, mask = topk_routing_with_score_function(
            logits, fields.experts_per_token, use_pre_softmax=fields.router_pre_softmax, score_function="softmax"
        )
    expected = torch.zeros_like(logits).scatter(1, chosen, scores)
    torch.testing.assert_close(probs, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(mask, expected > 0)
    sums = scores.sum(-1)
    assert bool((sums < 0.999).all()) is not norm_topk_prob, "the case must tell the two kinds apart"
