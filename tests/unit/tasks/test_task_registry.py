"""The registry, and the prompt texts all tasks share."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_megatron.config import TaskConfig
from gspo_megatron.errors import UserError
from gspo_megatron.tasks import TASKS, build
from gspo_megatron.tasks.prompt_text import PromptText
from gspo_megatron.tokenizer import Tokenizer


def test_unknown_task_names_the_nearest(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r'task.name="reasoning-gym" is not.*Did you mean "reasoning_gym".*jsonl'):
        build(TaskConfig(name="reasoning-gym"), tokenizer, seed=0)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_registered_classes_exist_and_carry_their_name(name: str) -> None:
    module, _, class_name = TASKS[name].partition(":")
    assert getattr(importlib.import_module(module), class_name).name == name


def test_what_workers_load_imports_no_torch() -> None:
    code = (
        "import sys, gspo_megatron.tasks.math_answers, gspo_megatron.tasks.reasoning_gym_library\n"
        "sys.exit(' '.join({'torch', 'megatron', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def render(question: str, **settings: object) -> str:
    return PromptText(TaskConfig(name="jsonl", **settings)).render(question)  # type: ignore[arg-type]


def test_prompt_text() -> None:
    assert render("What is A?") == "What is A?"
    assert render("What is A?", lowercase=True) == "what is a?"
    assert render("2+2", prompt_template="{{Q}} {question}=") == "{Q} 2+2="
    settings = {"prompt_pattern": r": (?P<word>\w+)$", "prompt_template": "{word}>"}
    assert render("(sun: x -> nus): Apple", **settings) == "Apple>"
    assert render("(sun: x -> nus): Apple", **settings, lowercase=True) == "apple>"
    optional = {"prompt_pattern": r"(?P<a>\d)(?P<b>\d)?$", "prompt_template": "{a}{b}|{question}"}
    assert render("x7", **optional) == "7|x7"
    assert render("1 {x}", prompt_template="{question}") == "1 {x}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_pattern": "(", "prompt_template": "{a}"}, "not a regular expression"),
        ({"prompt_pattern": "(?P<w>a)"}, r'unused without task.prompt_template; set a template such as "\{w\}"'),
        ({"prompt_template": "{word}"}, r"\{word\} is no named group"),
        (
            {"prompt_pattern": "(?P<word>a)", "prompt_template": "{wrod}"},
            r'\{wrod\} is no named group.*mean "word".*Usable: \{word\}, \{question\}',
        ),
        ({"prompt_template": "{"}, "write {{ and }} for literal braces"),
        ({"prompt_template": "{}"}, r"\{\} is no named group"),
        ({"prompt_template": "{question.x}"}, r"\{question.x\} is no named group"),
        ({"prompt_template": "{question:>9}"}, r"\{question:>9\} is no named group"),
        ({"prompt_template": "{question!r}"}, r"\{question!r\} is no named group"),
        ({"prompt_pattern": "(?P<question>a)", "prompt_template": "{question}"}, "give the group another name"),
    ],
)
def test_bad_pattern_or_template(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        render("a", **settings)


def test_pattern_that_does_not_occur_names_both() -> None:
    with pytest.raises(UserError, match=r"task.prompt_pattern='x\(\?P<w>\.\)' does not occur in the question 'abc'"):
        render("abc", prompt_pattern="x(?P<w>.)", prompt_template="{w}")
