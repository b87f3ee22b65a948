"""The cold start learns the answers and the stop token, and nothing of the prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.config import TaskConfig
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.tasks import build
from gspo_megatron.tokenizer import Tokenizer
from tests.distributed.rank_pool import RankPool

MODEL = Path(__file__).parents[2] / "examples" / "quickstart" / "model"
TASK: dict[str, Any] = {
    "name": "reasoning_gym",
    "dataset": "spell_backward",
    "params": {"min_word_len": 3, "max_word_len": 8},
    "prompt_pattern": r": (?P<word>\w+)$",
    "prompt_template": "{word}>",
    "lowercase": True,
}
BATCH_SIZE = 8


def run(ranks: Callable[[int], RankPool], layout: dict[str, int]) -> list[dict[str, Any]]:
    return ranks(ParallelLayout(**layout).world_size).run(
        "tests.distributed.policy_cases:worked_answers",
        layout=layout,
        model=str(MODEL),
        task=TASK,
        batch_size=BATCH_SIZE,
    )


@pytest.mark.parametrize("layout", [{}, {"data": 2}], ids=lambda layout: ParallelLayout(**layout).describe())
def test_loss_covers_the_answer_and_the_stop_token(layout: dict[str, int], ranks: Callable[[int], RankPool]) -> None:
    results = run(ranks, layout)
    held = [index for r in results for index in r["sequences"]]
    assert sorted(held) == list(range(BATCH_SIZE)), "each answer on one replica"
    sequences = {index: s for r in results for index, s in r["sequences"].items()}
    tokenizer = Tokenizer.load(str(MODEL))
    eos = json.loads((MODEL / "generation_config.json").read_text())["eos_token_id"]
    task = build(TaskConfig(**TASK), tokenizer, seed=0)
    for index, prompt in enumerate(task.prompts("train", 0, BATCH_SIZE)):
        ours, answer = sequences[index], task.answer(prompt)
        assert answer == prompt.text.removesuffix(">")[::-1]
        assert tokenizer.decode(ours["token_ids"]) == prompt.text + answer
        assert ours["with_loss"] == ours["masked"]
        *text, last = ours["with_loss"]
        assert tokenizer.decode(text) == answer and len(text) == len(answer) and last == eos
        assert ours["weights"] == pytest.approx([1 / BATCH_SIZE / (len(answer) + 1)] * (len(answer) + 1))
    for r in results:
        assert r["num_global_sequences"] == BATCH_SIZE
        assert r["losses"] == results[0]["losses"]
        assert r["losses"][1] < r["losses"][0] - 0.01


@pytest.mark.parametrize(
    "layout",
    [{"context": 2}, {"tensor": 2, "context": 2}, {"pipeline": 2}],
    ids=lambda layout: ParallelLayout(**layout).describe(),
)
def test_the_loss_is_the_same_in_every_layout(layout: dict[str, int], ranks: Callable[[int], RankPool]) -> None:
    [expected, *_] = run(ranks, {})
    for result in run(ranks, layout):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
