"""What a config.json leaves out or sets to null means what transformers takes it for, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import PretrainedConfig

from gspo_megatron.errors import UserError
from gspo_megatron.weights.conversion.models import read_architecture
from gspo_megatron.weights.families import FAMILIES, load_fields, read_fields
from gspo_megatron.weights.families.base import ModelFields
from gspo_megatron.weights.families.config_types import check_types
from tests.distributed import family_models

PATH = Path("model/config.json")


def full_config(family: str) -> dict[str, Any]:
    """config.json of the tests' model with every key that transformers knows."""
    return family_models.make_config(family).to_dict() | {"model_type": family}


def their_config(config: dict[str, Any]) -> dict[str, Any] | None:
    """What transformers makes of a config; None where it refuses it."""
    config_class = getattr(transformers, family_models.CLASSES[config["model_type"]]).config_class
    try:
        made: PretrainedConfig = config_class(**{k: v for k, v in config.items() if k != "model_type"})
    except Exception:
        return None
    heads = {"head_dim": made.hidden_size // made.num_attention_heads}  # where the class has none, the models do this
    return heads | made.to_dict()


def our_fields(config: dict[str, Any]) -> ModelFields | str:
    """Fields, or why they are refused. Any other failure fails the test."""
    try:
        check_types(config, PATH)
        return read_fields(config, PATH)[1]
    except UserError as error:
        assert "describes no possible model" not in str(error)
        return str(error)


def without(table: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in table.items() if k != key}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_left_out_means_what_transformers_takes_it_for_or_is_refused(family: str) -> None:
    full = full_config(family)
    assert isinstance(our_fields(full), ModelFields)
    wrong = {}
    for key in full.keys() - {"model_type"}:
        config = without(full, key)
        ours, theirs = our_fields(config), their_config(config)
        if not isinstance(ours, str) and (theirs is None or ours != our_fields(config | {key: theirs[key]})):
            wrong[key] = theirs and theirs[key]
    assert not wrong, "transformers' defaults are not ours"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_of_rope_parameters_left_out_means_what_transformers_takes_it_for_or_is_refused(family: str) -> None:
    full = full_config(family)
    for key in full["rope_parameters"]:
        config = full | {"rope_parameters": without(full["rope_parameters"], key)}
        ours, theirs = our_fields(config), their_config(config)
        if not isinstance(ours, str):
            assert theirs and ours == our_fields(full | {"rope_parameters": theirs["rope_parameters"]}), key


@pytest.mark.parametrize("family", FAMILIES)
def test_null_is_refused_by_name_or_means_what_transformers_takes_it_for(family: str) -> None:
    full = full_config(family)
    for key in full.keys() - {"model_type"}:
        config = full | {key: None}
        ours, theirs = our_fields(config), their_config(config)
        if isinstance(ours, str):
            assert key in ours or ours == our_fields(without(full, key)), key
        elif ours != our_fields(without(full, key)):
            assert theirs is not None and ours == our_fields(config | {key: theirs[key]}), key
    nulls = full["rope_parameters"] | {"partial_rotary_factor": None}
    if family == "glm4_moe":
        assert "partial_rotary_factor=null" in str(our_fields(full | {"rope_parameters": nulls}))


@pytest.mark.parametrize(
    ("family", "key", "default"),
    [
        ("deepseek_v3", "routed_scaling_factor", ("router_scale", 2.5)),
        ("deepseek_v3", "q_lora_rank", ("q_lora_rank", 1536)),
        ("deepseek_v3", "n_shared_experts", ("shared_ffn_hidden_size", 24)),
        ("glm4_moe", "n_shared_experts", ("shared_ffn_hidden_size", 24)),
        ("gpt_oss", "head_dim", ("head_dim", 64)),
        ("gpt_oss", "sliding_window", ("attention_windows", (128, None, 128, None))),
    ],
)
def test_defaults_that_models_were_published_with(family: str, key: str, default: tuple[str, Any]) -> None:
    name, value = default
    assert getattr(our_fields(without(full_config(family), key)), name) == value


def test_deepseek_v3_without_groups_has_the_published_ones() -> None:
    config = without(without(full_config("deepseek_v3"), "n_group"), "topk_group") | {"num_experts_per_tok": 8}
    fields = our_fields(config)
    assert isinstance(fields, ModelFields) and (fields.router_groups, fields.router_groups_chosen) == (8, 4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_group": 2, "topk_group": 4, "num_experts_per_tok": 8}, "topk_group=4 must lie between 1 and n_group=2"),
        ({"topk_group": 0}, "topk_group=0 must be an integer from 1"),
        ({"n_group": 0}, "n_group=0 must be an integer from 1"),
        ({"n_group": 3, "topk_group": 3}, "n_group=3 must divide the number of experts, 16"),
        ({"num_experts_per_tok": 99, "n_group": 1, "topk_group": 1}, "num_experts_per_tok=99 must lie between 1 and"),
    ],
)
def test_impossible_choices_of_experts_are_refused(changes: dict[str, Any], said: str) -> None:
    assert said in str(our_fields(full_config("deepseek_v3") | changes))


def test_the_conversion_and_the_training_refuse_the_same_numbers(tmp_path: Path) -> None:
    family_models.make_config("mixtral", num_experts_per_tok=99).save_pretrained(tmp_path)
    for read in (load_fields, read_architecture):
        with pytest.raises(UserError, match="num_experts_per_tok=99 must lie between 1 and num_experts=8") as error:
            read(tmp_path)
        assert str(error.value).count(str(tmp_path / "config.json")) == 1


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_a_part_of_heads_that_yarn_rotates_is_refused(family: str) -> None:
    """transformers takes the factor of either place."""
    full, said = full_config(family), "partial_rotary_factor=0.5 with rope_type='yarn' is not supported"
    beside = their_config(full | {"partial_rotary_factor": 0.5, "rope_parameters": dict(full["rope_parameters"])})
    assert beside and beside["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert said in str(our_fields(full | {"partial_rotary_factor": 0.5}))
    assert said in str(our_fields(full | {"rope_parameters": full["rope_parameters"] | {"partial_rotary_factor": 0.5}}))


@pytest.mark.parametrize("key", ["scoring_func", "topk_method"])
@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_another_routers_ways_are_refused(family: str, key: str) -> None:
    assert f"{key}='greedy' is not supported" in str(our_fields(full_config(family) | {key: "greedy"}))
