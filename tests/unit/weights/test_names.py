"""Names of other layouts: every parameter of every family has one place in each, and comes back from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.weights.families import load_fields
from gspo_megatron.weights.families.base import ModelFields
from gspo_megatron.weights.names import (
    GroupedPlace,
    from_grouped_place,
    from_transformer_engine_name,
    grouped_place,
    transformer_engine_name,
)
from gspo_megatron.weights.rules import TensorSpec
from tests.distributed import tiny_models

KINDS = ["moe", "mixed", "dense", "tied"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ModelFields, list[TensorSpec]]]:
    found = {}
    for kind in KINDS:
        family, fields = load_fields(tiny_models.write(tmp_path_factory.mktemp(kind), kind))
        found[kind] = (fields, family.specs(fields))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_grouped_places_are_a_bijection(models: dict[str, tuple[ModelFields, list[TensorSpec]]], kind: str) -> None:
    fields, specs = models[kind]
    places = [grouped_place(spec.megatron) for spec in specs]
    assert len(set(places)) == len(specs)
    assert [from_grouped_place(place) for place in places] == [spec.megatron for spec in specs]
    assert [place.expert for place in places] == [spec.expert for spec in specs]
    for layer in fields.moe_layers:
        for weight in ("weight1", "weight2"):
            parameter = f"decoder.layers.{layer}.mlp.experts.{weight}"
            assert [p.expert for p in places if p.parameter == parameter] == list(range(fields.num_experts or 0))


@pytest.mark.parametrize("kind", KINDS)
def test_transformer_engine_names_are_a_bijection(
    models: dict[str, tuple[ModelFields, list[TensorSpec]]], kind: str
) -> None:
    fields, specs = models[kind]
    names = [transformer_engine_name(spec.megatron, moe_layers=fields.moe_layers) for spec in specs]
    assert len(set(names)) == len(specs)
    assert [from_transformer_engine_name(name) for name in names] == [spec.megatron for spec in specs]


GROUPED = [
    ("decoder.layers.3.mlp.experts.local_experts.5.linear_fc1.weight", "decoder.layers.3.mlp.experts.weight1", 5),
    ("decoder.layers.12.mlp.experts.local_experts.127.linear_fc2.weight", "decoder.layers.12.mlp.experts.weight2", 127),
    ("decoder.layers.3.mlp.linear_fc1.weight", "decoder.layers.3.mlp.linear_fc1.weight", None),
    ("decoder.layers.3.mlp.router.weight", "decoder.layers.3.mlp.router.weight", None),
]


@pytest.mark.parametrize(("name", "parameter", "expert"), GROUPED)
def test_grouped_place(name: str, parameter: str, expert: int | None) -> None:
    assert grouped_place(name) == GroupedPlace(parameter, expert)


def test_a_grouped_place_must_say_which_expert() -> None:
    with pytest.raises(AssertionError, match="many experts"):
        from_grouped_place(GroupedPlace("decoder.layers.3.mlp.experts.weight1", None))
    with pytest.raises(AssertionError, match="no experts"):
        from_grouped_place(GroupedPlace("decoder.layers.3.mlp.router.weight", 2))


# Layer 3 is a MoE layer, layer 2 is dense.
TRANSFORMER_ENGINE = [
    ("embedding.word_embeddings.weight", None),
    ("decoder.layers.2.input_layernorm.weight", "decoder.layers.2.self_attention.linear_qkv.layer_norm_weight"),
    ("decoder.layers.3.input_layernorm.weight", "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight"),
    ("decoder.layers.3.self_attention.linear_qkv.weight", None),
    ("decoder.layers.3.self_attention.linear_proj.weight", None),
    ("decoder.layers.3.self_attention.q_layernorm.weight", None),
    ("decoder.layers.3.self_attention.k_layernorm.weight", None),
    ("decoder.layers.2.pre_mlp_layernorm.weight", "decoder.layers.2.mlp.linear_fc1.layer_norm_weight"),
    ("decoder.layers.3.pre_mlp_layernorm.weight", None),
    ("decoder.layers.2.mlp.linear_fc1.weight", None),
    ("decoder.layers.2.mlp.linear_fc2.weight", None),
    ("decoder.layers.3.mlp.router.weight", None),
    (
        "decoder.layers.3.mlp.experts.local_experts.5.linear_fc1.weight",
        "decoder.layers.3.mlp.experts.linear_fc1.weight5",
    ),
    (
        "decoder.layers.3.mlp.experts.local_experts.12.linear_fc2.weight",
        "decoder.layers.3.mlp.experts.linear_fc2.weight12",
    ),
    ("decoder.final_layernorm.weight", None),
    ("output_layer.weight", None),
]


@pytest.mark.parametrize(("name", "expected"), TRANSFORMER_ENGINE)
def test_transformer_engine_name(name: str, expected: str | None) -> None:
    assert transformer_engine_name(name, moe_layers=(3,)) == (expected or name)


@pytest.mark.parametrize("num_experts", [None, 4])
def test_norms_are_fused_where_megatrons_layer_fuses_them(
    num_experts: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against Megatron's own layer specification for Transformer Engine: a norm of its own, or one in the product."""
    from megatron.core.extensions import transformer_engine_spec_provider
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.identity_op import IdentityOp

    # The specification only lists classes: it can be read without Transformer Engine, but for its version.
    provider = transformer_engine_spec_provider.TESpecProvider
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", provider, raising=False)
    monkeypatch.setattr(transformer_engine_spec_provider, "is_te_min_version", lambda version: True)
    layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(num_experts=num_experts, qk_layernorm=True)
    parts, moe_layers = layer.submodules, () if num_experts is None else (0,)

    def fused(norm: str) -> bool:
        name = f"decoder.layers.0.{norm}.weight"
        return transformer_engine_name(name, moe_layers=moe_layers).endswith("layer_norm_weight")

    attention = parts.self_attention.submodules
    assert fused("input_layernorm") == (parts.input_layernorm is IdentityOp)
    assert fused("input_layernorm") == (attention.linear_qkv is TELayerNormColumnParallelLinear)
    assert fused("pre_mlp_layernorm") == (parts.pre_mlp_layernorm is IdentityOp)
    if num_experts is None:
        assert fused("pre_mlp_layernorm") == (parts.mlp.submodules.linear_fc1 is TELayerNormColumnParallelLinear)
    for norm, module in (("q_layernorm", attention.q_layernorm), ("k_layernorm", attention.k_layernorm)):
        assert fused(f"self_attention.{norm}") == (module is IdentityOp)


def test_transformer_engines_grouped_weights_are_numbered_as_named_here() -> None:
    """Megatron's Transformer Engine module, read: it is not installed everywhere."""
    import importlib.util

    specification = importlib.util.find_spec("megatron.core.extensions.transformer_engine")
    assert specification is not None and specification.origin is not None
    source = Path(specification.origin).read_text()
    assert 'f"{prefix}weight{gemm_idx}"' in source and "layer_norm_weight" in source
