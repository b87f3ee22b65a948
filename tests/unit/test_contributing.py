"""The algorithm that CONTRIBUTING.md shows is taken from there, registered and run."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from gspo_megatron import algorithms
from gspo_megatron.algorithms import Algorithm, Mismatch
from gspo_megatron.config import AlgorithmConfig
from gspo_megatron.types import MicroBatch

ROOT = Path(__file__).parents[2]
FILE, REGISTRY_LINE = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)


@pytest.fixture
def dapo_file(tmp_path: Path) -> Path:
    path = tmp_path / "dapo.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def dapo(dapo_file: Path, monkeypatch: pytest.MonkeyPatch) -> Algorithm:
    """The documented algorithm, selected by its name once its line is in the registry."""
    spec = importlib.util.spec_from_file_location("gspo_megatron.algorithms.dapo", dapo_file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    line = eval("{" + REGISTRY_LINE + "}", {"DAPO": module.DAPO})
    monkeypatch.setattr(algorithms, "ALGORITHMS", MappingProxyType({**algorithms.ALGORITHMS, **line}))
    return algorithms.build(AlgorithmConfig(name="dapo"))


# Three responses of 3, 2 and 2 tokens with a masked token in each of the first two.
LENGTHS = (3, 2, 2)
MASK = torch.tensor([True, False, True, True, False, True, True])
# Log-ratios on both sides of log(1 + 0.28) = 0.247, and one far below log(1 - 0.2), with either sign of the advantage.
LOG_RATIO = torch.tensor([0.5, 0.0, 0.1, 0.3, 0.0, -0.9, 0.2], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.5, -0.5, -2.0], dtype=torch.float64)


def micro_batch(old_logprobs: torch.Tensor) -> MicroBatch:
    tokens = torch.arange(7)
    return MicroBatch(
        token_ids=tokens,
        targets=tokens + 1,
        positions=torch.tensor([0, 1, 2, 0, 1, 0, 1]),
        cu_seqlens=torch.tensor([0, 3, 5, 7], dtype=torch.int32),
        sequence_ids=torch.arange(3),
        lengths=torch.tensor([3, 2, 2]),
        response_mask=MASK,
        rollout_logprobs=old_logprobs,
        advantages=ADVANTAGES,
        max_seqlen=3,
        num_padding_tokens=0,
        old_logprobs=old_logprobs,
    )


def example() -> tuple[torch.Tensor, MicroBatch]:
    """Policy log-probs and their batch; NaN under the mask, where nothing may be read."""
    logprobs = torch.linspace(-2.0, -0.5, 7, dtype=torch.float64)
    old = (logprobs - LOG_RATIO).masked_fill(~MASK, torch.nan)
    return logprobs.masked_fill(~MASK, torch.nan).requires_grad_(), micro_batch(old)


def test_the_example_is_one_short_file_in_the_project_s_format(dapo_file: Path) -> None:
    assert len(FILE.splitlines()) <= 40
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", str(ROOT / "pyproject.toml"), str(dapo_file)]
        result = subprocess.run(ruff, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


def test_the_registry_line_makes_the_name_known(dapo: Algorithm) -> None:
    assert type(dapo).__name__ == "DAPO"
    config = algorithms.resolve(AlgorithmConfig(name="dapo", clip_high=0.5))
    assert (config.clip_low, config.clip_high, config.mini_batches) == (0.2, 0.5, 4)


def test_loss_and_gradient_are_the_definition_s(dapo: Algorithm) -> None:
    logprobs, batch = example()
    num_tokens = 11
    loss, stats = dapo.loss(logprobs, batch, num_sequences=5, num_tokens=num_tokens)
    loss.backward()

    expected, gradient, start = 0.0, torch.zeros(7, dtype=torch.float64), 0
    for length, advantage in zip(LENGTHS, ADVANTAGES.tolist(), strict=True):
        for t in range(start, start + length):
            if MASK[t]:
                ratio = float(LOG_RATIO[t].exp())
                bounded = min(max(ratio, 0.8), 1.28)
                expected -= min(ratio * advantage, bounded * advantage) / num_tokens
                gradient[t] = -ratio * advantage / num_tokens if ratio * advantage <= bounded * advantage else 0.0
        start += length
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, gradient, rtol=1e-12, atol=0)
    assert stats.clipped_tokens.tolist() == [True, False, False, False, False, True, False]
    assert stats.clipped.tolist() == [True, False, True]


def test_descent_makes_good_responses_likelier_and_bad_ones_less(dapo: Algorithm) -> None:
    logprobs, batch = example()
    loss, _ = dapo.loss(logprobs, batch, num_sequences=3, num_tokens=5)
    loss.backward()
    assert torch.isfinite(loss)
    assert logprobs.grad is not None
    assert logprobs.grad.sign().tolist() == [0, 0, -1, 1, 0, 0, 1]


def test_the_other_terms_and_mismatch_weights_come_with_it(dapo: Algorithm) -> None:
    logprobs, batch = example()
    assert batch.old_logprobs is not None
    batch.rollout_logprobs = (
        batch.old_logprobs - torch.tensor(2.0).log()
    )  # the trainer's probability is twice the engine's
    entropy = torch.full((7,), 0.7, dtype=torch.float64)
    plain = algorithms.objective(
        dapo, logprobs, entropy, batch, num_sequences=3, num_tokens=5, mismatch=Mismatch("off")
    )
    weighted = algorithms.objective(
        dapo, logprobs, entropy, batch, num_sequences=3, num_tokens=5, mismatch=Mismatch("truncate", high=1.5)
    )
    assert plain.entropy.item() == pytest.approx(0.7)
    assert weighted.loss.item() == pytest.approx(1.5 * plain.loss.item(), rel=1e-6)
