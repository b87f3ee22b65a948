"""Grouped experts against Megatron's loop over experts, and against a float64 definition, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gspo_megatron.weights.grouped import misaligned
from tests.distributed.rank_pool import free_port
from tests.unit.policy import experts_cases as cases
from tests.unit.policy.experts_cases import EXPERTS, FFN, HIDDEN

COUNTS = {
    "all_busy": [5, 1, 7, 3],
    "some_empty": [0, 6, 0, 5],
    "last_empty": [4, 3, 2, 0],
    "all_on_one": [0, 0, 9, 0],
    "one_token": [0, 0, 0, 1],
    "no_tokens": [0, 0, 0, 0],
}
FP32 = 1e-5  # relative, per tensor
BF16 = 2**-8  # relative, per tensor: one rounding to bfloat16


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """One process that may start its own, as saving a checkpoint does."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=cases.alone, initargs=(free_port(),)) as pool:
        yield pool


def result(pool: ProcessPoolExecutor, case: Callable[..., Any], **kwargs: Any) -> Any:
    return pool.submit(case, **kwargs).result(timeout=120)


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; 0 where both are 0."""
    assert found.shape == expected.shape
    difference, norm = (found.double() - expected.double()).norm(), expected.double().norm()
    return float(difference / norm) if norm > 0 else float(difference)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_float32_equals_megatrons_loop_over_experts(pool: ProcessPoolExecutor, counts: list[int]) -> None:
    found = result(pool, cases.compare, dtype=torch.float32, counts=counts)
    for name, expected in found["sequential"].items():
        assert relative(found["grouped"][name], expected) <= FP32, name


@pytest.mark.parametrize("counts", [c for c in COUNTS.values() if sum(c)], ids=[k for k, c in COUNTS.items() if sum(c)])
def test_float32_equals_the_definition_in_float64(pool: ProcessPoolExecutor, counts: list[int]) -> None:
    found = result(pool, cases.compare, dtype=torch.float32, counts=counts)
    for name, expected in found["definition"].items():
        assert relative(found["grouped"][name], expected) <= FP32, name


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_bfloat16_equals_megatrons_loop_to_rounding(pool: ProcessPoolExecutor, counts: list[int]) -> None:
    found = result(pool, cases.compare, dtype=torch.bfloat16, counts=counts)
    for name, expected in found["sequential"].items():
        got = found["grouped"][name]
        assert got.dtype == expected.dtype, name
        assert relative(got, expected) <= BF16, name
        if found["definition"] is not None:
            truth = found["definition"][name]
            assert relative(got, truth) <= 1.1 * relative(expected, truth) + 1e-4, f"{name}: less exact than the loop"


def test_bfloat16_weighs_the_activation_with_float32_probabilities_bit_for_bit(pool: ProcessPoolExecutor) -> None:
    found = result(pool, cases.activation)
    assert found["sequential"].abs().sum() > 0
    assert torch.equal(found["grouped"], found["sequential"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_with_one_expert(pool: ProcessPoolExecutor, dtype: torch.dtype) -> None:
    found = result(pool, cases.compare, dtype=dtype, counts=[11], moe_router_pre_softmax=True)
    for name, expected in found["sequential"].items():
        assert relative(found["grouped"][name], expected) <= (FP32 if dtype == torch.float32 else BF16), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_without_tokens_gives_every_weight_a_zero_gradient(
    pool: ProcessPoolExecutor, dtype: torch.dtype
) -> None:
    found = result(pool, cases.compare, dtype=dtype, counts=[0] * EXPERTS)["grouped"]
    assert found["output"].shape == found["hidden"].shape == (0, HIDDEN)
    assert found["weight1"].shape == (EXPERTS, 2 * FFN, HIDDEN) and not found["weight1"].any()
    assert found["weight2"].shape == (EXPERTS, HIDDEN, FFN) and not found["weight2"].any()


@pytest.mark.parametrize("changes", [{}, {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_biases_and_a_clamped_activation(pool: ProcessPoolExecutor, counts: list[int], changes: dict[str, Any]) -> None:
    if changes:
        changes = changes | {"moe_grouped_gemm": True}
    found = result(pool, cases.with_biases, counts=counts, **changes)
    assert found["found"].keys() == found["definition"].keys()
    for name, expected in found["definition"].items():
        assert bool(expected.any()) is (sum(counts) > 0), name
        assert relative(found["found"][name], expected) <= FP32, name


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_a_moe_layer(pool: ProcessPoolExecutor, dtype: torch.dtype, dispatcher: str) -> None:
    found = result(pool, cases.moe_layer, dtype=dtype, dispatcher=dispatcher)
    for name, expected in found["sequential"].items():
        assert expected.any(), name
        assert relative(found["grouped"][name], expected) <= (FP32 if dtype == torch.float32 else BF16), name


def test_an_expanded_upstream_gradient(pool: ProcessPoolExecutor) -> None:
    assert result(pool, cases.expanded_gradient)


@pytest.mark.parametrize("counts", [COUNTS["all_busy"], COUNTS["some_empty"], COUNTS["no_tokens"]])
def test_expert_tensor_shards_add_up(pool: ProcessPoolExecutor, counts: list[int]) -> None:
    found = result(pool, cases.expert_tensor_shards, degree=2, counts=counts)
    for name, expected in found["whole"].items():
        assert relative(found["joined"][name], expected) <= FP32, name


@pytest.mark.parametrize("counts", [COUNTS["some_empty"], COUNTS["no_tokens"]])
def test_recomputing_the_activation_changes_nothing_but_memory(pool: ProcessPoolExecutor, counts: list[int]) -> None:
    found = result(pool, cases.recompute, counts=counts)
    kept, recomputed = found["kept"], found["recomputed"]
    for name, expected in kept["results"].items():
        assert torch.equal(recomputed["results"][name], expected), name
    assert torch.equal(recomputed["no_grad"], kept["results"]["output"])
    if tokens := sum(counts):
        inputs_and_fc1 = 4 * tokens * (HIDDEN + 2 * FFN + 1)
        assert recomputed["bytes"] <= inputs_and_fc1 + 8 * EXPERTS  # and the groups' offsets, twice
        assert kept["bytes"] >= inputs_and_fc1 + 3 * 4 * tokens * FFN


def test_gradients_of_empty_groups_are_zeroed_where_the_device_leaves_them_unwritten(pool: ProcessPoolExecutor) -> None:
    found = result(pool, cases.unwritten_gradients, counts=COUNTS["some_empty"])
    assert found["left"]["weight1"].isnan().any() and found["left"]["weight2"].isnan().any()
    for name, expected in found["sound"].items():
        assert torch.equal(found["zeroed"][name], expected), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_megatron_is_told_that_the_weights_are_shards_of_experts(pool: ProcessPoolExecutor, dtype: torch.dtype) -> None:
    common = {
        "tensor_model_parallel": True,
        "partition_stride": 1,
        "allreduce": False,
        "dtype": dtype,
        "device": "cpu",
    }
    assert result(pool, cases.attributes, dtype=dtype) == [common | {"partition_dim": 1}, common | {"partition_dim": 2}]


@pytest.mark.parametrize("offsets", [(), ((0, 3, 8),)])
@pytest.mark.parametrize(
    ("ep", "etp"), [((1, 0), (1, 0)), ((2, 1), (1, 0)), ((1, 0), (2, 1)), ((2, 0), (2, 1)), ((2, 1), (2, 0))]
)
def test_checkpoints_describe_the_tensors_of_megatrons_loop(
    pool: ProcessPoolExecutor, ep: tuple[int, int], etp: tuple[int, int], offsets: tuple[Any, ...]
) -> None:
    found = result(pool, cases.sharded_state, ep=ep, etp=etp, offsets=offsets)
    assert len(found["grouped"]) == (3 + 2) * EXPERTS // ep[0]  # gate, up and down; an empty state a layer
    assert found["grouped"] == found["sequential"]
    assert found["parameters_themselves"] == [True, True], "the optimizer finds its state by the parameter itself"


def test_checkpoints_load_both_ways(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    found = result(pool, cases.checkpoint, folder=str(tmp_path))
    assert found == dict.fromkeys(["sequential -> grouped", "grouped -> sequential", "grouped -> grouped"], True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("hidden", "ffn"), [(16, 8), (8, 16), (4, 8), (8, 4), (12, 8), (8, 12), (6, 8), (8, 6), (6, 2)]
)
def test_misaligned_refuses_what_the_product_refuses(hidden: int, ffn: int, dtype: torch.dtype) -> None:
    def works() -> bool:
        x = torch.randn(4, hidden, dtype=dtype, requires_grad=True)
        weight1 = torch.randn(2, 2 * ffn, hidden, dtype=dtype, requires_grad=True)
        weight2 = torch.randn(2, hidden, ffn, dtype=dtype, requires_grad=True)
        offs = torch.tensor([3, 4], dtype=torch.int32)
        try:
            gate, up = F.grouped_mm(x, weight1.transpose(1, 2), offs=offs).chunk(2, -1)
            output = F.grouped_mm(gate * up, weight2.transpose(1, 2), offs=offs)
            output.backward(torch.ones_like(output))
        except RuntimeError as error:
            assert "16 bytes" in str(error)
            return False
        return True

    assert (misaligned(hidden, ffn, dtype) is None) == works()


def test_misaligned_names_what_is_wrong_and_what_would_do() -> None:
    message = misaligned(2048, 100, torch.bfloat16)
    assert message is not None and "100" in message and "multiple of 8" in message and "2048" not in message
    message = misaligned(30, 100, torch.float32)
    assert message is not None and "hidden_size=30" in message and "multiple of 4" in message
