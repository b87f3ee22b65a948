"""Task reasoning_gym: pure in the position, disjoint splits, the quickstart's words, bad settings."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from reasoning_gym.factory import DATASETS

from gspo_megatron.config import TaskConfig
from gspo_megatron.errors import UserError
from gspo_megatron.tasks import build
from gspo_megatron.tasks import reasoning_gym as module
from gspo_megatron.tasks import reasoning_gym_library as library
from gspo_megatron.tasks.base import Split, Task
from gspo_megatron.tokenizer import Tokenizer

ROOT = Path(__file__).parents[3]
SPELL: dict[str, Any] = {
    "dataset": "spell_backward",
    "params": {"min_word_len": 3, "max_word_len": 8},
    "prompt_pattern": r": (?P<word>\w+)$",
    "prompt_template": "{word}>",
    "lowercase": True,
    "reward_threshold": 1.0,
}


def make(tokenizer: Tokenizer, *, seed: int = 0, **settings: Any) -> Task:
    return build(TaskConfig(name="reasoning_gym", **settings), tokenizer, seed=seed)


def texts(task: Task, split: Split, start: int, count: int) -> list[str]:
    return [prompt.text for prompt in task.prompts(split, start, count)]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_order_resumes_anywhere(tokenizer: Tokenizer, split: Split) -> None:
    whole = make(tokenizer, **SPELL).prompts(split, 0, 8)
    assert [prompt.id for prompt in whole] == list(range(8))
    assert make(tokenizer, **SPELL).prompts(split, 5, 3) == whole[5:]
    across = module.POSITIONS - 2  # the next block's data set
    task = make(tokenizer, **SPELL)
    assert task.prompts(split, across, 5)[3:] == make(tokenizer, **SPELL).prompts(split, across + 3, 2)
    assert len(set(texts(task, split, across, 5))) == 5
    assert task.prompts(split, 3, 0) == []


def test_equal_in_every_process(tokenizer: Tokenizer) -> None:
    code = (
        "import json, sys\n"
        "from gspo_megatron.config import TaskConfig\n"
        "from gspo_megatron.tasks import build\n"
        "from gspo_megatron.tokenizer import Tokenizer\n"
        "task = build(TaskConfig(name='reasoning_gym', **json.loads(sys.argv[1])),\n"
        "             Tokenizer.load('examples/quickstart/model'), seed=3)\n"
        "print(json.dumps([[p.id, p.text, p.token_ids] for s in ('train', 'heldout')\n"
        "                  for p in task.prompts(s, 509, 6)]))"
    )
    task = make(tokenizer, seed=3, **SPELL)
    expected = [[p.id, p.text, p.token_ids] for s in ("train", "heldout") for p in task.prompts(s, 509, 6)]  # type: ignore[arg-type]
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(SPELL)],
            cwd=ROOT,
            env={"PYTHONHASHSEED": hash_seed, "PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_seeds_differ(tokenizer: Tokenizer) -> None:
    first, second = (texts(make(tokenizer, seed=seed, **SPELL), "train", 0, 200) for seed in (0, 1))
    assert len(set(first) & set(second)) < 10


def test_heldout_words_are_never_trained_on(tokenizer: Tokenizer) -> None:
    """The words are a finite list: without the split by word a fifth of these held-out words were trained on."""
    tasks = [make(tokenizer, seed=seed, **SPELL) for seed in (0, 1)]
    train = {text for task in tasks for text in texts(task, "train", 0, 6000)}
    heldout = {text for task in tasks for text in texts(task, "heldout", 0, 1500)}
    assert len(train) > 9000 and len(heldout) > 2000
    assert not train & heldout


def test_a_small_space_of_questions_is_split_too(tokenizer: Tokenizer) -> None:
    settings: dict[str, Any] = {
        "dataset": "chain_sum",
        "params": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        "prompt_pattern": "(?P<sum>[0-9+ -]+)[^0-9]*$",
        "prompt_template": "{sum}=",
    }
    task = make(tokenizer, **settings)
    train, heldout = (set(texts(task, split, 0, 600)) for split in ("train", "heldout"))  # type: ignore[arg-type]
    assert len(heldout) >= 10 and len(train) >= 50 and not train & heldout


def test_too_few_questions_to_split(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"none of 256 questions belongs to the (train|heldout) split.*Widen"):
        make(tokenizer, dataset="chain_sum", prompt_template="always the same")


def test_quickstart_prompts_answers_and_scores(tokenizer: Tokenizer) -> None:
    task = make(tokenizer, **SPELL)
    prompts = task.prompts("train", 0, 300)
    capitalised = 0
    for prompt in prompts:
        word = prompt.text.removesuffix(">")
        assert re.fullmatch("[a-z0-9]{3,8}>", prompt.text)
        assert tokenizer.decode(prompt.token_ids) == prompt.text
        assert task.answer(prompt) == word[::-1]
        assert task.score(prompt, word[::-1]) == 1.0
        capitalised += prompt.reference["answer"] != word[::-1]
        if word != word[::-1]:
            assert task.score(prompt, word) < 1.0
        # The package gives 0.9999999999999998 for a right answer with more behind it: a threshold of 0.999 pays it.
        assert task.score(prompt, word[::-1] + "x") < 1.0 and task.score(prompt, "") < 1.0
    assert capitalised > 10  # the list has names: their answers are lower-cased with the prompt
    assert task.isolated is None


def test_answer_keeps_its_case_where_the_score_needs_it(byte_tokenizer: Tokenizer) -> None:
    task = make(byte_tokenizer, dataset="caesar_cipher", lowercase=True)
    for prompt in task.prompts("train", 0, 20):
        assert prompt.text == prompt.reference["question"].lower()
        assert task.answer(prompt) == prompt.reference["answer"] != task.answer(prompt).lower()
        assert task.score(prompt, task.answer(prompt)) == 1.0 > task.score(prompt, task.answer(prompt).lower())


def test_data_set_without_worked_answers(tokenizer: Tokenizer) -> None:
    task = make(tokenizer, dataset="rubiks_cube", prompt_pattern=r"(?P<line>[^\n]+)", prompt_template="{line}")
    with pytest.raises(UserError, match='"rubiks_cube" has no worked answers, so sft cannot use it'):
        task.answer(task.prompts("train", 0, 1)[0])


def test_data_sets_that_evaluate_the_response_are_isolated(tokenizer: Tokenizer) -> None:
    evaluates = re.compile(r"\beval\(|\bparse_expr\(|\bsympify\(|\bexec\(")
    found = {n for n, (cls, _) in DATASETS.items() if evaluates.search(inspect.getsource(cls.score_answer))}
    found.discard("composite")
    assert found <= library.EVALUATES_RESPONSE <= set(DATASETS)
    task = make(tokenizer, dataset="countdown", prompt_pattern=r"(?P<line>[^\n]+)", prompt_template="{line}")
    assert task.isolated is not None and task.isolated.target.endswith(":score_entry")
    prompt = task.prompts("train", 0, 1)[0]
    score = library.score_entry(task.answer(prompt), prompt.reference, **task.isolated.arguments)
    assert score == task.score(prompt, task.answer(prompt)) == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "task.dataset is empty"),
        ({"dataset": "spel_backward"}, 'task.dataset="spel_backward" is no data set.*Did you mean "spell_backward"'),
        ({"dataset": "spell_backward", "eval_dataset": "x"}, 'task.eval_dataset="x" is of no use'),
        (
            {"dataset": "spell_backward", "params": {"min_word_length": 3}},
            'task.params.min_word_length is no parameter.*mean "min_word_len".*data_file',
        ),
        ({"dataset": "spell_backward", "params": {"seed": 3}}, "task.params.seed=3 cannot be set: run.seed"),
        ({"dataset": "spell_backward", "params": {"size": 3}}, "task.params.size=3 cannot be set"),
        ({"dataset": "spell_backward", "params": {"min_word_len": "3"}}, "min_word_len='3' must be of type int"),
        ({"dataset": "spell_backward", "params": {"min_word_len": True}}, "min_word_len=True must be of type int"),
        ({"dataset": "spell_backward", "params": {"min_word_len": 9, "max_word_len": 4}}, "max_word_len must be >="),
        ({"dataset": "spell_backward", "params": {"data_file": "none.txt"}}, "refuses.*FileNotFoundError"),
        ({"dataset": "spell_backward", "params": {"min_word_len": 99, "max_word_len": 99}}, "refuses.*IndexError"),
        ({"dataset": "composite"}, "refuses.*Must specify at least one dataset"),
        (
            {"dataset": "spell_backward", "prompt_pattern": "Spell (?P<w>[0-9])", "prompt_template": "{w}"},
            r"does not occur in the question 'Spell this word backward \(example",
        ),
    ],
)
def test_bad_settings(tokenizer: Tokenizer, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(tokenizer, **settings)


@pytest.mark.parametrize("dataset", ["word_ladder", "gsm_symbolic", "pool_matrix", "list_functions", "leg_counting"])
def test_other_data_sets_score_their_own_answers(byte_tokenizer: Tokenizer, dataset: str) -> None:
    """Among them those that limit or use their size, or seed numpy."""
    task = make(byte_tokenizer, dataset=dataset)
    for prompt in task.prompts("train", 100_000, 3):
        assert byte_tokenizer.decode(prompt.token_ids) == prompt.text == prompt.reference["question"]
        assert task.score(prompt, task.answer(prompt)) == 1.0
