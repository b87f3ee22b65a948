"""Tasks: prompts and verifiable rewards, one file each.

A new task is one file and one line in TASKS. The classes are named, not imported: a run loads only
the task it uses, and a reward worker loads this package without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from gspo_megatron.errors import UserError, nearest

if TYPE_CHECKING:
    from gspo_megatron.config import TaskConfig
    from gspo_megatron.tasks.base import Task
    from gspo_megatron.tokenizer import Tokenizer

TASKS: dict[str, str] = {  # task.name → "module:class", built as class(config, tokenizer, seed=seed)
    "reasoning_gym": "gspo_megatron.tasks.reasoning_gym:ReasoningGymTask",
    "jsonl": "gspo_megatron.tasks.jsonl:JsonlTask",
}


def build(config: TaskConfig, tokenizer: Tokenizer, *, seed: int) -> Task:
    """The task of a configuration.

    Raises:
        UserError: an unknown task, or settings the task cannot use.
    """
    if config.name not in TASKS:
        raise UserError(
            f'task.name="{config.name}" is not a registered task.{nearest(config.name, TASKS)} '
            f"Registered: {', '.join(TASKS)}"
        )
    module, _, name = TASKS[config.name].partition(":")
    return getattr(importlib.import_module(module), name)(config, tokenizer, seed=seed)
