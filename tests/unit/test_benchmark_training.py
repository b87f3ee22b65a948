"""tools/benchmark_training.py: its FLOPs by hand and against what torch counts, its peaks, and a run of it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_megatron.errors import UserError
from gspo_megatron.weights.families.base import ModelFields
from gspo_megatron.weights.grouped import misaligned
from tests.distributed.rank_pool import RankPool

ROOT = Path(__file__).parents[2]
FIELDS = ModelFields(
    num_layers=3,
    hidden_size=8,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=5,
    ffn_hidden_size=11,
    vocab_size=100,
    max_position_embeddings=64,
    norm_eps=1e-6,
    rope_theta=1e4,
    tied_embeddings=False,
    initializer_range=0.02,
    qk_layernorm=True,
    num_experts=6,
    experts_per_token=2,
    expert_ffn_hidden_size=7,
    moe_layers=(0, 2),
)


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "tools")
    import benchmark_training

    return benchmark_training


def test_parameters_that_a_token_is_multiplied_with(tool: Any) -> None:
    active = tool.ActiveParameters.of(FIELDS)
    # A layer: q and o of 8 × 20 each, k and v of 8 × 10 each.
    assert active.attention == 3 * (160 + 160 + 80 + 80)
    # A MoE layer: a router of 8 × 6; two experts of three matrices of 8 × 7.
    assert active.moe == 2 * (48 + 2 * 168)
    assert active.dense == 3 * 8 * 11
    assert active.head == 800
    assert active.total == 1440 + 768 + 264 + 800


@pytest.mark.parametrize(("recompute", "again"), [("none", 0), ("selective", 2160), ("moe", 7680), ("full", 26880)])
def test_flops_of_a_step(tool: Any, recompute: str, again: int) -> None:
    flops = tool.StepFlops.of(FIELDS, [2, 3], response_tokens=4, recompute=recompute)
    # Attention: 3 layers of 4 heads, 3 + 6 pairs of tokens, two products of 5 multiplications and additions each.
    attention = 3 * 4 * 9 * 2 * 10
    forward = 2 * (3272 - 800) * 5 + 2 * 800 * 4 + attention
    assert attention == 2160
    assert flops.logprobs == forward == 33280
    assert flops.model == 3 * forward
    assert flops.done == 3 * forward + 2 * 800 * 4 + again


@pytest.fixture(scope="module")
def rank() -> Iterator[RankPool]:
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.mark.parametrize("recompute", ["none", "selective", "moe", "full"])
def test_flops_are_those_that_torch_counts(recompute: str, rank: RankPool) -> None:
    [counted] = rank.run("tests.unit.benchmark_training_cases:counted_products", recompute=recompute)
    assert counted["logprobs"] == counted["logprobs formula"] > 0
    assert counted["step"] == counted["step formula"] > 3 * counted["logprobs"]


def test_the_large_model_is_large_and_fits(tool: Any, tmp_path: Path) -> None:
    from gspo_megatron.weights.families import load_fields

    tool.write_model(tmp_path, tool.SIZES["1b"])
    assert not list(tmp_path.glob("*.safetensors"))
    family, fields = load_fields(tmp_path)
    parameters = sum(torch.Size(shape).numel() for spec in family.specs(fields) for shape in spec.hf_shapes)
    assert parameters >= max(1e9, 4 * tool.ActiveParameters.of(fields).total)
    assert 18 * parameters <= 40e9  # bytes; half of an 80 GB device is left for activations
    assert misaligned(fields.hidden_size, fields.expert_ffn_hidden_size, torch.bfloat16) is None
    lengths = [s.token_ids.numel() for s in tool.rollout_batch(tool.SIZES["1b"])]
    assert 256 <= min(lengths) < 512 and 3584 < max(lengths) <= fields.max_position_embeddings


def test_peaks_are_known_by_the_exact_name(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(name: str, dtype: str = "bfloat16", stated: float | None = None) -> float | None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        result: float | None = tool.find_peak(argparse.Namespace(dtype=dtype, peak_tflops=stated))
        return result

    monkeypatch.setattr(tool, "current_device", lambda: torch.device("cuda", 0))
    assert peak("NVIDIA H200") == 989e12
    assert peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak("NVIDIA H100 PCIe") < peak("NVIDIA H100 80GB HBM3")  # type: ignore[operator]
    assert peak("NVIDIA H200", dtype="float32") is None
    assert peak("NVIDIA H2000") is None
    assert peak("NVIDIA H2000", stated=1.5) == 1.5e12
    monkeypatch.setattr(tool, "current_device", lambda: torch.device("cpu"))
    assert peak("NVIDIA H200") is None


def test_a_row_of_the_table(tool: Any) -> None:
    result = tool.RankResult(
        num_parameters=1,
        lengths=[2, 3],
        response_tokens=4,
        num_micro_batches=1,
        setup_s=1.0,
        train_s=[9.0, 0.5, 0.25],
        logprobs_s=[0.125],
        peak_bytes=3 * 2**29,
        resting_bytes=2**30,
        log_ratio_max=2.5e-7,
        flash_attention=True,
        grouped_experts=2,
    )
    row = tool.row("full+offload", result, FIELDS, 1e6)
    cells = ["full", "yes", "0.500", "10", "40", "1.997e-07", "20.0%", "26.6%", "1.5", "1.0", "2.5e-07"]
    assert row == f"| {' | '.join(cells)} |"
    unknown = tool.row("none", result, FIELDS, None).split(" | ")
    assert unknown[6:8] == ["–", "–"]
    assert tool.row("none", None, FIELDS, 1e6).count("|") == row.count("|")


@pytest.mark.parametrize("name", ["all", "none+", "offload", ""])
def test_an_unknown_variant_is_refused(tool: Any, name: str) -> None:
    with pytest.raises(UserError, match="is none of none, selective, moe, full"):
        tool.Variant.parse(name)
