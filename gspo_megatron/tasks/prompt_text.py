"""task.prompt_pattern, prompt_template and lowercase: from a question to what the model reads."""

from __future__ import annotations

import re
from collections.abc import Iterable
from string import Formatter

from gspo_megatron.config import TaskConfig
from gspo_megatron.errors import UserError, nearest


class PromptText:
    """Turns questions into prompt texts."""

    def __init__(self, config: TaskConfig) -> None:
        """Raises UserError for a bad pattern, a bad template, or one that uses a group the pattern lacks."""
        self._template = config.prompt_template
        self._lowercase = config.lowercase
        self._pattern = _compile(config.prompt_pattern) if config.prompt_pattern else None
        groups = list(self._pattern.groupindex) if self._pattern else []
        if self._pattern and not self._template:
            raise UserError(
                f"task.prompt_pattern={config.prompt_pattern!r} is unused without task.prompt_template; "
                f'set a template such as "{{{(groups or ["name"])[0]}}}" or remove the pattern'
            )
        if "question" in groups:
            raise UserError(
                f"task.prompt_pattern={config.prompt_pattern!r}: {{question}} stands for the whole question; "
                "give the group another name"
            )
        _check_template(self._template, [*groups, "question"])

    def render(self, question: str) -> str:
        """The prompt's text. Raises UserError if the pattern does not occur in the question."""
        text = question
        if self._template:
            values = {"question": question}
            if self._pattern:
                match = self._pattern.search(question)
                if match is None:
                    raise UserError(
                        f"task.prompt_pattern={self._pattern.pattern!r} does not occur in the question {question!r}; "
                        "correct the pattern"
                    )
                values |= {name: value or "" for name, value in match.groupdict().items()}
            text = self._template.format(**values)
        return text.lower() if self._lowercase else text


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"task.prompt_pattern={pattern!r} is not a regular expression: {error}; "
            "in TOML, write it in single quotes so that backslashes stay"
        ) from error


def _check_template(template: str, names: Iterable[str]) -> None:
    allowed = list(names)
    try:
        fields = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(template)]
    except ValueError as error:
        raise UserError(
            f"task.prompt_template={template!r}: {error}; write {{{{ and }}}} for literal braces"
        ) from error
    for name, spec, conversion in fields:
        if name is None:
            continue
        if name not in allowed or spec or conversion:
            shown = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise UserError(
                f"task.prompt_template={template!r}: {{{shown}}} is no named group of task.prompt_pattern."
                f"{nearest(name, allowed)} Usable: {', '.join('{' + n + '}' for n in allowed)}"
            )
