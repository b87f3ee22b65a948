"""Checks that read the tokenizer and the task's data. Apart from the others because they import transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from gspo_megatron.config import SftConfig, TrainConfig
from gspo_megatron.errors import UserError
from gspo_megatron.preflight.model import read_model
from gspo_megatron.preflight.result import Preflight

if TYPE_CHECKING:
    from gspo_megatron.tasks.base import Split, Task
    from gspo_megatron.tokenizer import Tokenizer
    from gspo_megatron.types import Prompt
    from gspo_megatron.weights.families import ModelFields

_PROMPTS_LOOKED_AT = 64  # of each split


def check_inputs(config: TrainConfig | SftConfig) -> Preflight:
    """Check what only the tokenizer and the task can tell: on every row of a file, on the first prompts of each split
    where they are generated. After `check_…`.

    Apart from the other checks because it imports transformers and reads or generates the task's data.

    Raises:
        UserError: no usable tokenizer, a task or data file that can't be used, text the tokenizer can't encode, a
            prompt (sft: with its worked answer) longer than the context or than the token budget.
    """
    from gspo_megatron import tasks
    from gspo_megatron.tasks.base import FiniteTask
    from gspo_megatron.tokenizer import Tokenizer

    fields = read_model(config.model.path)[1]
    tokenizer = Tokenizer.load(config.model.path)
    if tokenizer.vocab_size > fields.vocab_size:
        raise UserError(
            f"the tokenizer in model.path={config.model.path} knows {tokenizer.vocab_size} tokens, more than the "
            f"model's vocab_size={fields.vocab_size}; give the tokenizer that belongs to the model"
        )
    task = tasks.build(config.task, tokenizer, seed=config.run.seed)
    first = config.rollout.prompts_per_batch if isinstance(config, TrainConfig) else config.sft.batch_size
    lengths: list[int] = []
    splits: dict[Split, int] = {"heldout": config.eval.prompts, "train": first}
    for split, wanted in splits.items():
        before = len(lengths)
        for name, prompt in _look_at(task, split, min(wanted, _PROMPTS_LOOKED_AT)):
            lengths.append(len(prompt.token_ids))
            if split == "train" and isinstance(config, SftConfig):
                answer = _encode_answer(task, tokenizer, name, prompt)
                check_answer(config, fields.max_position_embeddings, name, len(prompt.token_ids), len(answer))
            else:
                _check_prompt(config, fields, name, len(prompt.token_ids))
        if len(lengths) == before:
            raise UserError(f"task.name={config.task.name}: the {split} split holds no prompts")
    looked_at = f"all {len(lengths)}" if isinstance(task, FiniteTask) else f"the first {len(lengths)}"
    return Preflight([("prompts", f"{min(lengths)} to {max(lengths)} tokens ({looked_at} were looked at)")])


def _look_at(task: Task, split: Split, count: int) -> Iterator[tuple[str, Prompt]]:
    """All prompts of a file, else the first `count`; each with its name for messages."""
    from gspo_megatron.tasks.base import FiniteTask

    if isinstance(task, FiniteTask):
        yield from task.rows(split)
        return
    for prompt in task.prompts(split, 0, count):
        yield f"prompt {prompt.id} of the {split} split", prompt


def _encode_answer(task: Task, tokenizer: Tokenizer, name: str, prompt: Prompt) -> list[int]:
    answer = task.answer(prompt)
    try:
        return tokenizer.encode_answer(answer)
    except UserError as error:
        raise UserError(f"{name}: the worked answer: {error}") from error


def check_answer(config: SftConfig, max_positions: int, name: str, prompt_tokens: int, answer_tokens: int) -> None:
    """Raise UserError unless a prompt and its worked answer fit the model's context and the token budget."""
    longest = prompt_tokens + answer_tokens
    what = f"{name} has {prompt_tokens} tokens and its worked answer {answer_tokens}, together {longest}"
    if longest > max_positions:
        raise UserError(
            f"{what}: more than the model's context, max_position_embeddings={max_positions}; "
            "use shorter prompts and answers, or a model with a longer context"
        )
    if longest > config.data.token_budget:
        raise UserError(
            f"data.token_budget={config.data.token_budget} is smaller than one sequence: {what}; use at least {longest}"
        )


def _check_prompt(config: TrainConfig | SftConfig, fields: ModelFields, name: str, num_tokens: int) -> None:
    longest = num_tokens + config.rollout.max_response_tokens
    if longest > fields.max_position_embeddings:
        raise UserError(
            f"{name} has {num_tokens} tokens; with rollout.max_response_tokens={config.rollout.max_response_tokens} it "
            f"exceeds the model's context, max_position_embeddings={fields.max_position_embeddings}; "
            "use shorter prompts or fewer response tokens"
        )
    if longest > config.data.token_budget:
        raise UserError(
            f"data.token_budget={config.data.token_budget} is smaller than one sequence: {name} has "
            f"{num_tokens} tokens and rollout.max_response_tokens={config.rollout.max_response_tokens}; "
            f"use at least {longest}"
        )
