"""Where a parameter of the rule tables lies in other layouts of the same model.

Rules (weights/rules.py) name each expert's weights and each norm by themselves, as Megatron's local modules do.
Here those names are translated to the grouped experts of policy/experts.py and to the names of Megatron's
Transformer Engine modules (megatron/core/models/gpt/gpt_layer_specs.py), and back. All names are those of the
whole model: layer and expert numbers are global, a rank subtracts its own first ones.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

_EXPERT = re.compile(r"(?P<experts>.+\.mlp\.experts)\.local_experts\.(?P<expert>\d+)\.linear_fc(?P<fc>[12])\.weight")
_GROUPED = re.compile(r"(?P<experts>.+\.mlp\.experts)\.weight(?P<fc>[12])")
_TE_EXPERT = re.compile(r"(?P<experts>.+\.mlp\.experts)\.linear_fc(?P<fc>[12])\.weight(?P<expert>\d+)")
_PRE_MLP_NORM = re.compile(r"decoder\.layers\.(?P<layer>\d+)\.pre_mlp_layernorm\.weight")

# Norms that Transformer Engine fuses into the product that follows them.
_INPUT_NORM, _TE_INPUT_NORM = ".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight"
_MLP_NORM, _TE_MLP_NORM = ".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight"


@dataclass(frozen=True)
class GroupedPlace:
    """A tensor in the grouped layout: a whole parameter, or one entry along its first axis."""

    parameter: str
    expert: int | None  # global expert number; None: the whole parameter


def grouped_place(name: str) -> GroupedPlace:
    """Where grouped experts keep the parameter: `…experts.local_experts.5.linear_fc1.weight` is entry 5 of
    `…experts.weight1`; what belongs to no expert stays where it is."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return GroupedPlace(name, None)
    return GroupedPlace(f"{match['experts']}.weight{match['fc']}", int(match["expert"]))


def from_grouped_place(place: GroupedPlace) -> str:
    """Inverse of `grouped_place`."""
    if place.expert is None:
        assert not _GROUPED.fullmatch(place.parameter), f"{place.parameter} holds many experts; say which"
        return place.parameter
    match = _GROUPED.fullmatch(place.parameter)
    assert match is not None, f"{place.parameter} holds no experts"
    return f"{match['experts']}.local_experts.{place.expert}.linear_fc{match['fc']}.weight"


def transformer_engine_name(name: str, *, moe_layers: Collection[int]) -> str:
    """The parameter's name in a Transformer Engine model with grouped experts.

    A norm is fused into the product that follows it: the one before attention always, the one before the MLP
    in dense layers only, because in a MoE layer the router needs its output too. Norms of queries and keys and
    everything else keep their names.
    """
    if match := _EXPERT.fullmatch(name):
        return f"{match['experts']}.linear_fc{match['fc']}.weight{match['expert']}"
    if name.endswith(_INPUT_NORM):
        return name.removesuffix(_INPUT_NORM) + _TE_INPUT_NORM
    if (match := _PRE_MLP_NORM.fullmatch(name)) and int(match["layer"]) not in moe_layers:
        return name.removesuffix(_MLP_NORM) + _TE_MLP_NORM
    return name


def from_transformer_engine_name(name: str) -> str:
    """Inverse of `transformer_engine_name`."""
    if match := _TE_EXPERT.fullmatch(name):
        return f"{match['experts']}.local_experts.{match['expert']}.linear_fc{match['fc']}.weight"
    for ours, theirs in ((_INPUT_NORM, _TE_INPUT_NORM), (_MLP_NORM, _TE_MLP_NORM)):
        if name.endswith(theirs):
            return name.removesuffix(theirs) + ours
    return name
