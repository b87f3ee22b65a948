"""What tools/benchmark_end_to_end.py and the ranks it starts say to each other.

Plain Python without torch: TRL's ranks import it in a virtual environment of their own.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PHASES = ("generate", "old_logprobs", "train", "hand_over")


@dataclass(frozen=True)
class Job:
    """The work of both sides."""

    model: str  # folder of a Hugging Face model with weights
    prompts: str  # JSON lines of {"prompt": text, "entry": reasoning_gym's, as JSON}, in the order of both sides
    run: str  # folder for what a side writes
    max_length: int  # tokens of a response
    prompts_per_batch: int
    samples_per_prompt: int
    mini_batches: int
    batches: int  # rollout batches, the warm-up ones included
    processes: int
    learning_rate: float
    clip_low: float
    clip_high: float
    dataset: str  # of reasoning_gym
    dataset_params: dict[str, int]
    prompt_pattern: str
    prompt_template: str
    seed: int

    @property
    def completions(self) -> int:
        """Responses of a rollout batch, over all ranks."""
        return self.prompts_per_batch * self.samples_per_prompt

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Job:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass
class Batch:
    """One rollout batch as one rank saw it."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    prompts: list[list[int]] = field(default_factory=list)  # token ids of each, once, in order
    completions: int = 0
    response_tokens: int = 0
    old_logprob_sequences: int = 0  # whose log-probabilities were taken before the first optimizer step
    optimizer_steps: int = 0
    reward_mean: float | None = None  # this and the next two over all ranks, at rank 0
    zero_variance_fraction: float | None = None  # of groups
    clip_fraction: float | None = None  # of sequences
    peak_rss_bytes: int = 0  # of the process since its start
    cpu_s: float = 0.0  # of the process, its threads and the kernel's work for it


class Gate:
    """A rank's side of the conversation: it works through one batch for each line on stdin, and answers it."""

    def __init__(self) -> None:
        self._answers = os.fdopen(int(os.environ["END_TO_END_ANSWERS"]), "w")
        self._cpu_s = 0.0

    def wait(self) -> None:
        """Block, at no cost to the other side's time, until it is this side's turn."""
        line = sys.stdin.readline()
        if line != "go\n":
            raise SystemExit(f"the benchmark is gone: read {line!r} where go was due")
        self._cpu_s = time.process_time()

    def ready(self, **facts: Any) -> None:
        """Say that the rank is set up, and on what it runs."""
        self._say(facts)

    def done(self, batch: Batch) -> None:
        """Answer with what a batch took."""
        batch.peak_rss_bytes, batch.cpu_s = peak_rss_bytes(), time.process_time() - self._cpu_s
        self._say(asdict(batch))

    def _say(self, content: dict[str, Any]) -> None:
        self._answers.write(json.dumps(content) + "\n")
        self._answers.flush()


def peak_rss_bytes() -> int:
    """Most resident memory of this process so far."""
    match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024
