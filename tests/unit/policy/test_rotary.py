"""Rotary angles: plain ones are Megatron's to the bit, stretched ones transformers'."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gspo_megatron.policy.rotary import Rotary
from gspo_megatron.weights.families.base import ConfigReader

DEEPSEEK_V3 = {"factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
DEEPSEEK_V3["original_max_position_embeddings"] = 4096
GPT_OSS = {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
GPT_OSS["original_max_position_embeddings"] = 4096


@pytest.mark.parametrize(("dim", "percent", "theta"), [(8, 1.0, 100), (64, 1.0, 10_000_000.0), (16, 0.5, 1e4)])
def test_plain_angles_are_megatrons_to_the_bit(dim: int, percent: float, theta: float) -> None:
    alone: Any = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    theirs = RotaryEmbedding(dim, percent, rotary_base=theta, use_cpu_initialization=True, cp_group=alone)
    expected = theirs.get_freqs_non_repeated(300).repeat(1, 2)[:, None, None]
    ours = Rotary(int(dim * percent), theta)
    assert ours.factor == 1.0
    for length in (3, 300, 50):  # the table grows
        angles = ours.angles(length, torch.device("cpu"))
        assert angles.shape[0] >= length and torch.equal(angles[:length], expected[:length])


@pytest.mark.parametrize(
    "yarn",
    [
        DEEPSEEK_V3,
        GPT_OSS,
        DEEPSEEK_V3 | {"mscale": 0.7},
        DEEPSEEK_V3 | {"mscale_all_dim": 0.0},
        DEEPSEEK_V3 | {"attention_factor": 1.3},
        {"factor": 0.5, "original_max_position_embeddings": 64},
        {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 2, "beta_slow": 2, "truncate": False},
    ],
    ids=str,
)
@pytest.mark.parametrize(("dim", "theta"), [(64, 1e4), (16, 150000.0)])
def test_stretched_frequencies_and_their_factor_are_transformers(yarn: dict[str, Any], dim: int, theta: float) -> None:
    given = {"rope_type": "yarn", "rope_theta": theta} | yarn
    config = DeepseekV3Config(qk_rope_head_dim=dim, rope_parameters=given, max_position_embeddings=10**6)
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    ours = Rotary(dim, theta, ConfigReader({"rope_scaling": given}).yarn())
    torch.testing.assert_close(ours.frequencies, frequencies, rtol=1e-6, atol=0)
    assert ours.factor == pytest.approx(factor, rel=1e-12)
    plain = Rotary(dim, theta)
    assert not torch.allclose(ours.frequencies, plain.frequencies, rtol=1e-2), "the case must stretch something"
