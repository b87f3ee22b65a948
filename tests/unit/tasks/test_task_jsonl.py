"""Task jsonl: order, splits, and every file a user can get wrong."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.config import TaskConfig
from gspo_megatron.errors import UserError
from gspo_megatron.tasks import build
from gspo_megatron.tasks.jsonl import JsonlTask
from gspo_megatron.tokenizer import Tokenizer

ROOT = Path(__file__).parents[3]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def sums(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(first, first + count)]


def make(tokenizer: Tokenizer, path: Path, *, seed: int = 0, **settings: Any) -> JsonlTask:
    task = build(TaskConfig(name="jsonl", dataset=str(path), **settings), tokenizer, seed=seed)
    assert isinstance(task, JsonlTask)
    return task


def test_each_epoch_is_a_new_permutation(tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = make(tokenizer, write(tmp_path / "a.jsonl", sums(20)), holdout=4)
    epochs = [[p.text for p in task.prompts("train", 16 * epoch, 16)] for epoch in range(3)]
    everything = {f"{i}+1=" for i in range(16)}
    assert all(set(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    assert [p.id for p in task.prompts("train", 30, 4)] == [30, 31, 32, 33]


def test_order_resumes_anywhere(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", sums(6))
    whole = make(tokenizer, path, holdout=1).prompts("train", 0, 40)
    for start in (5, 39, 12, 0):  # also backwards, over several epochs
        assert make(tokenizer, path, holdout=1).prompts("train", start, 3)[: 40 - start] == whole[start : start + 3]
    assert make(tokenizer, path, seed=1, holdout=1).prompts("train", 0, 40) != whole
    assert whole[0].text == tokenizer.decode(whole[0].token_ids)


def test_equal_in_every_process(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", sums(50))
    code = (
        "import sys\n"
        "from gspo_megatron.config import TaskConfig\n"
        "from gspo_megatron.tasks import build\n"
        "from gspo_megatron.tokenizer import Tokenizer\n"
        "task = build(TaskConfig(name='jsonl', dataset=sys.argv[1], holdout=9),\n"
        "             Tokenizer.load('examples/quickstart/model'), seed=4)\n"
        "print([p.text for p in task.prompts('train', 30, 60)])"
    )
    expected = str([p.text for p in make(tokenizer, path, seed=4, holdout=9).prompts("train", 30, 60)])
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)],
            cwd=ROOT,
            env={"PYTHONHASHSEED": hash_seed, "PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == expected


def test_held_out_rows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", sums(10))
    task = make(tokenizer, path, holdout=3)
    assert [p.text for p in task.prompts("heldout", 0, 99)] == ["7+1=", "8+1=", "9+1="]
    assert [p.text for p in task.prompts("heldout", 2, 1)] == ["9+1="]
    assert task.prompts("heldout", 3, 5) == []
    assert (task.num_train, task.num_heldout) == (7, 3)
    assert make(tokenizer, path, holdout=0).prompts("heldout", 0, 5) == []
    own = write(tmp_path / "eval.jsonl", sums(2, first=50))
    task = make(tokenizer, path, eval_dataset=str(own))
    assert [p.text for p in task.prompts("heldout", 0, 9)] == ["50+1=", "51+1="] and task.num_train == 10


def test_training_rows_that_are_held_out_prompts_are_left_out(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", [*sums(5), {"prompt": "2+1=", "answer": "3"}])
    with caplog.at_level(logging.WARNING):
        task = make(tokenizer, path, holdout=1)
    assert "1 of 5 training rows left out" in caplog.text
    assert {p.text for p in task.prompts("train", 0, 8)} == {"0+1=", "1+1=", "3+1=", "4+1="}
    # What counts is what the model reads.
    path = write(tmp_path / "b.jsonl", [{"prompt": p, "answer": "1"} for p in ("Ab", "cd", "aB")])
    assert make(tokenizer, path, holdout=1, lowercase=True).num_train == 1
    assert make(tokenizer, path, holdout=1).num_train == 2
    with pytest.raises(UserError, match="every training prompt is also a held-out prompt"):
        make(tokenizer, path, eval_dataset=str(path))


def test_answer_score_and_kind_of_each_row(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "answer": " 1/2", "level": 3},
        {"prompt": "b", "answer": "Paris"},
        {"prompt": "c", "answer": 7},
        {"prompt": "d", "answer": "8", "scoring": "exact"},
        {"prompt": "e", "answer": "x", "scoring": "math"},
    ]
    task = make(tokenizer, write(tmp_path / "a.jsonl", rows), holdout=0)
    by_text = {p.text: p for p in task.prompts("train", 0, 5)}
    assert {t: p.reference["scoring"] for t, p in by_text.items()} == {
        "a": "math",
        "b": "exact",
        "c": "math",
        "d": "exact",
        "e": "math",
    }
    assert by_text["a"].reference["level"] == 3  # further keys reach a reward of one's own
    assert [task.answer(by_text[t]) for t in "abc"] == [" 1/2", "Paris", "7"]
    assert task.score(by_text["a"], "it is \\boxed{0.5}") == 1.0 and task.score(by_text["a"], "0.4") == 0.0
    assert task.score(by_text["b"], " Paris\n") == 1.0 and task.score(by_text["b"], "paris") == 0.0
    assert task.score(by_text["d"], "8.0") == 0.0 and task.score(by_text["c"], "7.0") == 1.0
    assert task.isolated is not None
    words = [{"prompt": "b", "answer": "Paris"}, {"prompt": "c", "answer": "Rome"}]
    assert make(tokenizer, write(tmp_path / "b.jsonl", words), holdout=1).isolated is None


def test_pattern_template_and_blank_lines(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["", *sums(3), "   ", ""])
    task = make(tokenizer, path, holdout=1, prompt_pattern=r"(?P<n>\d)\+", prompt_template="N{n}", lowercase=True)
    assert {p.text for p in task.prompts("train", 0, 2)} == {"n0", "n1"}
    with pytest.raises(UserError, match=r"does not occur in the question '2\+1='"):
        make(tokenizer, path, holdout=1, prompt_pattern="(?P<n>z)", prompt_template="{n}")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty; it needs lines such as"),
        (["", " "], "is empty"),
        (['{"prompt": "a", "answer": "b"}', "", '{"prompt": '], r"bad.jsonl:3: not valid JSON"),
        (["[1]"], r"bad.jsonl:1: must be an object"),
        ([{"prompt": "a", "solution": "b"}], r"bad.jsonl:1: no 'answer'; keys there: \['prompt', 'solution'\]"),
        ([{}], "no 'prompt' and no 'answer'"),
        ([{"prompt": [{"role": "user", "content": "a"}], "answer": "b"}], "list of chat messages; give one plain"),
        ([{"prompt": 3, "answer": "b"}], "'prompt' must be a non-empty string, found 3"),
        ([{"prompt": " ", "answer": "b"}], "'prompt' must be a non-empty string"),
        ([{"prompt": "a", "answer": ""}], "'answer' must be a non-empty string, found ''"),
        ([{"prompt": "a", "answer": None}], "'answer' must be a non-empty string, found None"),
        ([{"prompt": "a", "answer": True}], "'answer' must be a non-empty string, found True"),
        ([{"prompt": "a", "answer": "b", "scoring": "fuzzy"}], "'scoring' is 'fuzzy'; use \"math\" or \"exact\""),
        (sums(5), "5 rows are too few to keep task.holdout=5.*at most 4"),
    ],
)
def test_bad_files(tokenizer: Tokenizer, tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(tokenizer, write(tmp_path / "bad.jsonl", lines), holdout=5)


def test_files_that_cannot_be_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task.dataset='.*none.jsonl': no such file"):
        make(tokenizer, tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="no such file"):
        make(tokenizer, tmp_path)
    good = write(tmp_path / "a.jsonl", sums(3))
    with pytest.raises(UserError, match=r"task.eval_dataset='.*none.jsonl': no such file"):
        make(tokenizer, good, eval_dataset=str(tmp_path / "none.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é", "answer": "1"}'.encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        make(tokenizer, tmp_path / "latin.jsonl")
    with pytest.raises(UserError, match=r"task.dataset is empty"):
        build(TaskConfig(name="jsonl"), tokenizer, seed=0)
    with pytest.raises(UserError, match=r"task.params=\{'a': 1\} are of no use"):
        make(tokenizer, good, params={"a": 1})
