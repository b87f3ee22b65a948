"""The trainer's step on one CUDA device: the CPU's step in float32, its kernels and memory settings in bfloat16."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.distributed import tiny_models
from tests.distributed.rank_pool import RankPool
from tests.distributed.test_invariance import ALGORITHMS, TOKENIZER

pytestmark = pytest.mark.gpu
LAYERS, MICRO_BATCHES = 4, 4  # of the tiny model; of its batch at BUDGET tokens each
WITH_GRADIENT = 3  # micro-batches: in one every sequence is clipped, and it gets no backward pass
BUDGET = 40
MEAN_ADVANTAGE = 0.74
CPU_TOLERANCE = 1e-4
BF16 = 2**-7  # one unit in the last place of a value just above a power of two
Step = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def gpu() -> Iterator[RankPool]:
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def cpu() -> Iterator[RankPool]:
    """A process that sees no CUDA device; `on_cpu` runs it."""
    pool = RankPool(1)
    yield pool
    pool.close()


def on_cpu(pool: RankPool, case: str, **arguments: Any) -> Any:
    with pytest.MonkeyPatch.context() as environment:  # of the process, whenever it is started
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        [result] = pool.run(case, **arguments)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.write(tmp_path_factory.mktemp("model") / "moe", "moe"))


def arguments(folder: str, algorithm: str = "gspo", **settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "layout": {},
        "folder": folder,
        "tokenizer": TOKENIZER,
        "algorithm": ALGORITHMS[algorithm],
        "token_budget": BUDGET,
        "vocab": tiny_models.VOCAB,
        "settings": settings,
    }


def farthest(ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative distance of a tensor, and its name."""
    assert ours.keys() == truth.keys()
    return max(
        (float((ours[n].float() - t.float()).norm() / t.float().norm().clamp(min=1e-8)), n) for n, t in truth.items()
    )


def test_the_cpu_adaptation_is_not_in_use(gpu: RankPool, cpu: RankPool) -> None:
    [here] = gpu.run("tests.gpu.training_cases:adaptation")
    assert (here["device"], here["adapted"], here["patched"]) == ("cuda", False, [])
    assert set(here["replaced functions"]) <= {"megatron.core.optimizer.optimizer_config.is_te_min_version"}
    there = on_cpu(cpu, "tests.gpu.training_cases:adaptation")
    assert there["device"] == "cpu" and there["adapted"] and there["patched"]
    assert len(there["replaced functions"]) > 1


def test_a_rank_takes_little_memory_before_it_holds_a_model() -> None:
    words = [sys.executable, "-c", "from tests.gpu.training_cases import bytes_of_joining; print(bytes_of_joining())"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=True)
    assert int(done.stdout.splitlines()[-1]) < 2 * 2**30


@pytest.mark.parametrize("experts", ["grouped", "sequential"])
@pytest.mark.parametrize("algorithm", ["gspo", "gspo_kl", "grpo"])
def test_float32_takes_the_step_of_the_cpu(
    algorithm: str, experts: str, gpu: RankPool, cpu: RankPool, folder: str
) -> None:
    chosen = arguments(folder, algorithm, model={"experts": experts})
    truth = on_cpu(cpu, "tests.distributed.cases:optimizer_step", **chosen)
    [ours] = gpu.run("tests.distributed.cases:optimizer_step", **chosen)
    assert truth["num_micro_batches"] == ours["num_micro_batches"] == MICRO_BATCHES
    assert ours["old_logprobs"].keys() == truth["old_logprobs"].keys() == set(range(12))
    for index, logprobs in truth["old_logprobs"].items():
        assert (ours["old_logprobs"][index] - logprobs).abs().max() <= CPU_TOLERANCE, index
    assert abs(ours["loss"] - truth["loss"]) <= CPU_TOLERANCE * MEAN_ADVANTAGE
    gradient, name = farthest(ours["gradients"], truth["gradients"])
    assert gradient <= CPU_TOLERANCE, name
    assert max(float(g.norm()) for g in truth["gradients"].values()) > 0.01
    assert abs(ours["grad_norm"] - truth["grad_norm"]) <= CPU_TOLERANCE * truth["grad_norm"]
    for index, (log_ratio, clipped) in truth["stats"].items():
        assert abs(ours["stats"][index][0] - log_ratio) <= 5e-6, index  # the batch keeps 1e-5 off the clip
        assert ours["stats"][index][1] == clipped, index
    distances = [float((ours["weights"][n] - w).abs().max()) for n, w in truth["weights"].items()]
    assert max(distances) <= 1e-6  # a thousandth of the learning rate


@pytest.fixture(scope="module")
def bf16_step(gpu: RankPool, folder: str) -> Step:
    """bf16_step(recompute=…, offload_optimizer=…): the step with these memory settings, and its kernels' calls."""
    kept: dict[tuple[tuple[str, Any], ...], dict[str, Any]] = {}

    def run(**memory: Any) -> dict[str, Any]:
        key = tuple(sorted(memory.items()))
        if key not in kept:
            chosen = arguments(folder, model={"dtype": "bfloat16"}, memory=memory)
            [kept[key]] = gpu.run("tests.gpu.training_cases:step_with_kernels", **chosen)
        return kept[key]

    return run


def test_bfloat16_uses_flash_attention_and_grouped_products(bf16_step: Step) -> None:
    result = bf16_step()
    passes = 2 * LAYERS * MICRO_BATCHES  # old log-probabilities, and the step's forward pass
    assert result["calls"] == {"varlen": passes, "grouped": 2 * passes}
    step = result["step"]
    assert math.isfinite(step["loss"]) and 0 < step["grad_norm"] < math.inf
    assert all(torch.isfinite(g).all() and g.dtype == torch.float32 for g in step["gradients"].values())
    assert all(w.dtype == torch.bfloat16 for w in step["weights"].values())
    assert {i for i, (_, clipped) in step["stats"].items() if clipped} == {0, 2, 6, 11}, "both passes are one function"


@pytest.mark.parametrize(
    ("recompute", "attention", "experts"), [("selective", 1, 0), ("moe", 0, 1), ("full", 1, 1)], ids=lambda x: str(x)
)
def test_recomputation_changes_no_gradient(recompute: str, attention: int, experts: int, bf16_step: Step) -> None:
    kept, again = bf16_step(), bf16_step(recompute=recompute)
    once_more = LAYERS * WITH_GRADIENT
    assert again["calls"] == {
        "varlen": kept["calls"]["varlen"] + attention * once_more,
        "grouped": kept["calls"]["grouped"] + 2 * experts * once_more,
    }
    gradient, name = farthest(again["step"]["gradients"], kept["step"]["gradients"])
    assert gradient <= 2 * BF16, name  # the kernel's backward pass adds in no fixed order
    assert again["step"]["grad_norm"] == pytest.approx(kept["step"]["grad_norm"], rel=BF16)
    assert again["step"]["loss"] == pytest.approx(kept["step"]["loss"], abs=1e-6)


def test_an_optimizer_in_host_memory_takes_the_same_step(bf16_step: Step) -> None:
    here, there = bf16_step()["step"], bf16_step(offload_optimizer=1.0)["step"]
    assert there["grad_norm"] == pytest.approx(here["grad_norm"], rel=BF16)
    equal, count = 0, 0
    for name, weight in here["weights"].items():
        other = there["weights"][name]
        equal, count = equal + int((weight == other).sum()), count + weight.numel()
        # Rounding to bfloat16 may fall to the other side: one unit, of a value up to the tensor's largest.
        assert (weight.float() - other.float()).abs().max() <= BF16 * weight.float().abs().max(), name
    assert equal >= 0.99 * count
    name = "lm_head.weight"
    initial = tiny_models.make("moe").state_dict()[name].bfloat16()
    assert (there["weights"][name] != initial).float().mean() >= 0.5, "the step is larger than the rounding"


def test_an_optimizer_in_host_memory_frees_the_device(gpu: RankPool, folder: str) -> None:
    case = {"case": "tests.gpu.training_cases:memory", "folder": folder, "vocab": tiny_models.VOCAB}
    [here] = gpu.run(**case, settings={})
    [there] = gpu.run(**case, settings={"offload_optimizer": 1.0})
    assert here["moments"] == ["cuda"] and there["moments"] == ["cpu"]
    # Main parameters and two moments, 4 bytes each.
    assert here["trained again"] - there["trained again"] >= 0.9 * 12 * here["parameters"]
    assert there["grad_norms"] == pytest.approx(here["grad_norms"], rel=BF16)


def test_gradient_buffers_are_freed_between_training_phases(gpu: RankPool, folder: str) -> None:
    case = {"case": "tests.gpu.training_cases:memory", "folder": folder, "vocab": tiny_models.VOCAB}
    [kept] = gpu.run(**case, settings={})
    [freed] = gpu.run(**case, settings={"offload_gradients": True})
    gradients = 4 * kept["parameters"]
    assert abs(kept["trained"] - kept["exported"]) < 0.1 * gradients
    assert freed["trained"] - freed["exported"] >= 0.9 * gradients
    assert freed["trained again"] - freed["exported"] >= 0.9 * gradients
    assert freed["grad_norms"] == pytest.approx(kept["grad_norms"], rel=BF16)
    assert freed["grad_norms"][1] == pytest.approx(freed["grad_norms"][0], rel=BF16), "old gradients are gone"
