"""The policy on one CUDA device: the same model and the same on-policy step as on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gspo_megatron.policy.permutation import permute, unpermute
from tests.distributed import tiny_models
from tests.distributed.rank_pool import RankPool
from tests.distributed.test_training import CONFIG

pytestmark = pytest.mark.gpu
LENGTHS = [7, 3, 12, 5, 9, 2, 15, 6]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_logits_equal_transformers(kind: str, pool: RankPool, tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path / kind, kind)
    [ours] = pool.run(
        "tests.distributed.cases:logits", layout={}, folder=str(folder), lengths=LENGTHS, vocab=tiny_models.VOCAB
    )
    model = tiny_models.make(kind)
    for sequence in tiny_models.make_sequences(LENGTHS, tiny_models.VOCAB, seed=3):
        with torch.no_grad():
            theirs = model(input_ids=sequence.token_ids[None]).logits[0]
        assert (ours[sequence.index][1] - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_mini_batch_is_on_policy(dtype: str, pool: RankPool) -> None:
    config = {**CONFIG, "model": {**CONFIG["model"], "dtype": dtype}}
    [result] = pool.run("tests.distributed.cases:first_batch", layout={}, config=config)
    assert max(map(abs, result["log_ratio"][0])) <= 1e-6
    assert max(map(abs, result["log_ratio"][1])) > 1e-4
    assert all(0 < norm < float("inf") for norm in result["grad_norms"])


def test_sums_over_experts_are_the_same_in_every_pass() -> None:
    """A token's log-probability must not depend on the order in which its eight experts' outputs arrive."""
    tokens, experts, hidden = 4096, 64, 256
    generator = torch.Generator("cuda").manual_seed(0)
    scores = torch.rand(tokens, experts, generator=generator, device="cuda")
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(8).indices, True)
    x = torch.randn(tokens, hidden, generator=generator, device="cuda").bfloat16().requires_grad_()
    results = []
    for _ in range(20):
        rows, _, token_of_row = permute(x, chosen)
        out = unpermute(rows * rows, token_of_row, restore_shape=x.shape)
        [gradient] = torch.autograd.grad(out.float().square().sum(), x)
        results.append((out.detach(), gradient))
    assert all(torch.equal(out, results[0][0]) and torch.equal(g, results[0][1]) for out, g in results)
