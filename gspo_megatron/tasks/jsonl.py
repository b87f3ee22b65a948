"""Task `jsonl`: a file with one {"prompt": text, "answer": text} a line.

Order: the training rows are shuffled anew each epoch by the seed. Held-out rows are those of
task.eval_dataset, or the last task.holdout rows of task.dataset, in the file's order.

Split: a training row whose prompt is also a held-out prompt is left out of training, so that the two
never share a prompt. Duplicates within one split stay.

Scoring: decided for each row when the file is read, by the form of its answer (math_answers.is_mathematical)
or by a third key "scoring" with the value "math" or "exact". Further keys are kept for a reward of one's own.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gspo_megatron.config import TaskConfig
from gspo_megatron.errors import UserError
from gspo_megatron.tasks.base import IsolatedReward, Split
from gspo_megatron.tasks.math_answers import row_scoring, score_row
from gspo_megatron.tasks.prompt_text import PromptText
from gspo_megatron.tokenizer import Tokenizer
from gspo_megatron.types import Prompt

logger = logging.getLogger(__name__)

Row = dict[str, Any]  # "prompt", "answer", "scoring", and whatever else the line holds


@dataclass(frozen=True)
class Line:
    """A row and where it stands."""

    where: str  # "file:line"
    row: Row


class JsonlTask:
    """Prompts and answers of a file. Prompt.reference is the row, as a dict."""

    name = "jsonl"

    def __init__(self, config: TaskConfig, tokenizer: Tokenizer, *, seed: int) -> None:
        """Raises UserError for settings it has no use for, a missing, empty or malformed file, too few rows."""
        if not config.dataset:
            raise UserError('task.dataset is empty; the task "jsonl" needs the path of its training file')
        if config.params:
            raise UserError(f'task.params={config.params} are of no use to the task "jsonl"; remove them')
        self._tokenizer = tokenizer
        self._seed = seed
        self._prompt_text = PromptText(config)
        train, heldout = _split(config)
        heldout_texts = {self._prompt_text.render(line.row["prompt"]) for line in heldout}
        self._train = [line for line in train if self._prompt_text.render(line.row["prompt"]) not in heldout_texts]
        self._heldout = heldout
        if not self._train:
            raise UserError(
                f"{config.dataset}: every training prompt is also a held-out prompt; "
                "give task.eval_dataset other prompts"
            )
        if len(self._train) < len(train):
            logger.warning(
                "%s: %d of %d training rows left out: their prompts are held-out prompts",
                config.dataset,
                len(train) - len(self._train),
                len(train),
            )
        mathematical = any(line.row["scoring"] == "math" for line in [*self._train, *self._heldout])
        self.isolated: IsolatedReward | None = (
            IsolatedReward("gspo_megatron.tasks.math_answers:score_row") if mathematical else None
        )
        self._epoch_order = lru_cache(maxsize=2)(self._shuffled)

    @property
    def num_train(self) -> int:
        """Rows of one epoch."""
        return len(self._train)

    @property
    def num_heldout(self) -> int:
        """Rows of the held-out split; prompts("heldout") ends there."""
        return len(self._heldout)

    def prompts(self, split: Split, start: int, count: int) -> list[Prompt]:
        if split == "heldout":
            stop = min(start + count, len(self._heldout))
            return [self._prompt(position, self._heldout[position].row) for position in range(start, stop)]
        return [self._prompt(position, self._train_row(position)) for position in range(start, start + count)]

    def rows(self, split: Split) -> Iterator[tuple[str, Prompt]]:
        """Every row of the split in the file's order, with its "file:line"; Prompt.id counts them."""
        for number, line in enumerate(self._train if split == "train" else self._heldout):
            try:
                prompt = self._prompt(number, line.row)
            except UserError as error:
                raise UserError(f"{line.where}: {error}") from error
            yield line.where, prompt

    def answer(self, prompt: Prompt) -> str:
        return prompt.reference["answer"]

    def score(self, prompt: Prompt, response_text: str) -> float:
        return score_row(response_text, prompt.reference)

    def _prompt(self, position: int, row: Row) -> Prompt:
        text = self._prompt_text.render(row["prompt"])
        return Prompt(id=position, text=text, token_ids=self._tokenizer.encode_prompt(text), reference=row)

    def _train_row(self, position: int) -> Row:
        epoch, offset = divmod(position, len(self._train))
        return self._train[self._epoch_order(epoch)[offset]].row

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self._train)))
        random.Random(f"jsonl {self._seed} {epoch}").shuffle(order)  # a string seeds the same in every process
        return order


def _split(config: TaskConfig) -> tuple[list[Line], list[Line]]:
    """Training rows and held-out rows, before the removal of shared prompts."""
    rows = read_rows(Path(config.dataset), setting="task.dataset")
    if config.eval_dataset:
        return rows, read_rows(Path(config.eval_dataset), setting="task.eval_dataset")
    if config.holdout >= len(rows):
        raise UserError(
            f"{config.dataset}: {len(rows)} rows are too few to keep task.holdout={config.holdout} of them out of "
            f"training; use a holdout of at most {len(rows) - 1}, or give task.eval_dataset"
        )
    cut = len(rows) - config.holdout
    return rows[:cut], rows[cut:]


def read_rows(path: Path, *, setting: str) -> list[Line]:
    """The rows of a file; empty lines are skipped.

    Raises:
        UserError: no such file, not UTF-8, empty, or a line that is no usable row, with its number.
    """
    if not path.is_file():
        raise UserError(f"{setting}={str(path)!r}: no such file (looked in {Path.cwd()})")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{setting}={str(path)!r} is not UTF-8 ({error}); convert it") from error
    places = ((f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip())
    rows = [Line(where, _row(line, where=where)) for where, line in places]
    if not rows:
        raise UserError(f'{setting}={str(path)!r} is empty; it needs lines such as {{"prompt": "2+2=", "answer": "4"}}')
    return rows


def _row(line: str, *, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}): {line[:80]!r}") from error
    if not isinstance(row, dict):
        raise UserError(f'{where}: must be an object with "prompt" and "answer", found {line[:80]!r}')
    missing = [key for key in ("prompt", "answer") if key not in row]
    if missing:
        raise UserError(f"{where}: no {' and no '.join(repr(key) for key in missing)}; keys there: {sorted(row)}")
    if isinstance(row["prompt"], list):
        raise UserError(
            f"{where}: 'prompt' is a list of chat messages; give one plain string, the tokenizer's chat template is "
            "put around it"
        )
    answer = row["answer"]
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    for key, value in (("prompt", row["prompt"]), ("answer", answer)):
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: {key!r} must be a non-empty string, found {value!r}")
    scoring = row.get("scoring", row_scoring(answer))
    if scoring not in ("math", "exact"):
        raise UserError(f'{where}: \'scoring\' is {scoring!r}; use "math" or "exact", or leave it out')
    return {**row, "answer": answer, "scoring": scoring}
