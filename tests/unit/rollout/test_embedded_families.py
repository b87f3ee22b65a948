"""The embedded engine with each model family: its weights are transformers', and so is what it samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from gspo_megatron.errors import UserError
from gspo_megatron.rollout.embedded import EmbeddedEngine
from gspo_megatron.rollout.embedded.routes import RouteRecorder
from gspo_megatron.types import NamedTensor
from gspo_megatron.weights.families import load_fields
from gspo_megatron.weights.hf_checkpoint import HFCheckpoint
from tests.distributed import family_models
from tests.distributed.routing_cases import observed
from tests.unit.rollout.test_embedded import PARAMS, definition, empty_engine, fill, prompts, rollouts


@pytest.mark.parametrize("family", family_models.CONFIGS)
def test_what_it_samples_is_what_transformers_computes(family: str, tmp_path: Path) -> None:
    """Prompts of very different lengths share a batch, so most rows are padded on the left."""
    family_models.make(family).save_pretrained(tmp_path)
    checkpoint, (rules, fields) = HFCheckpoint(tmp_path), load_fields(tmp_path)
    names = [name for spec in rules.specs(fields) if not spec.load_only for name in spec.hf]
    engine = fill(empty_engine(tmp_path), [NamedTensor(name, checkpoint.read(name)) for name in names])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, local_files_only=True).eval()
    theirs = model.state_dict()
    assert theirs.keys() == engine.model.state_dict().keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in engine.model.state_dict().items())
    sampled = rollouts(engine.generate(prompts(3, 17, 1, 8), PARAMS))
    worst = max(float((definition(model, r, PARAMS.temperature) - r.rollout_logprobs).abs().max()) for r in sampled)
    assert worst <= 1e-5
    assert all(r.routes is None and r.routes_valid is None for r in sampled), "nobody asked"
    if fields.moe_layers:
        check_routes(engine, model, [r.token_ids for r in sampled])


def check_routes(engine: EmbeddedEngine, model: PreTrainedModel, unasked: list[Tensor]) -> None:
    """The experts of each input token, those of a prompt under each of its responses, as in one pass over all; to ask
    for them changes no response."""
    asked = rollouts(engine.generate(prompts(3, 17, 1, 8), replace(PARAMS, routes=True)))
    assert all(torch.equal(r.token_ids, ids) for r, ids in zip(asked, unasked, strict=True))
    for r in asked:
        with torch.no_grad(), observed(model) as seen:
            model(input_ids=r.token_ids[None])
        expected = torch.stack([experts for experts, _ in seen], 1)[:-1].sort(-1).values
        assert r.routes is not None and r.routes.dtype == torch.int16
        assert torch.equal(r.routes.long().sort(-1).values, expected)
        assert r.routes_valid is not None and r.routes_valid.all() and len(r.routes_valid) == len(expected)
    assert len({len(r.token_ids) for r in asked}) > 3, "rows leave the batch"


def test_experts_that_are_not_found_are_refused() -> None:
    for family, layers in (("qwen3", 0), ("qwen3_moe", 2)):
        with pytest.raises(UserError, match="can't return routes; use rollout"):
            RouteRecorder(family_models.make(family), num_layers=layers, experts_per_token=2)


def test_selection_biases_stay_float32_in_a_bfloat16_model(tmp_path: Path) -> None:
    family_models.make("glm4_moe").save_pretrained(tmp_path)
    checkpoint, (rules, fields) = HFCheckpoint(tmp_path), load_fields(tmp_path)
    names = [name for spec in rules.specs(fields) for name in spec.hf]
    given = [NamedTensor(name, checkpoint.read(name)) for name in names]
    engine = fill(empty_engine(tmp_path, dtype=torch.bfloat16), given)
    biases = {item.name: item.tensor for item in given if item.name.endswith("e_score_correction_bias")}
    held = dict(engine.model.named_buffers())
    assert len(biases) == 3
    assert all(torch.equal(held[name], bias) and held[name].dtype == torch.float32 for name, bias in biases.items())
