"""The figures and the tables of tools/benchmark_end_to_end.py."""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from end_to_end.job import PHASES, Batch

TITLES = {"ours": "ours", "trl": "TRL"}


@dataclass(frozen=True)
class Machine:
    """Where it ran, in words."""

    cpu: str
    cores: int
    memory_gib: float
    load: float  # average over a minute, before the start
    python: str

    @classmethod
    def here(cls) -> Machine:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        return cls(
            cpu=match[1].strip() if match else platform.machine(),
            cores=len(os.sched_getaffinity(0)),
            memory_gib=round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
            load=round(os.getloadavg()[0], 2),
            python=platform.python_version(),
        )


@dataclass(frozen=True)
class Turn:
    """One rollout batch of one side."""

    seconds: float  # until the last rank was done
    ranks: list[Batch]

    @property
    def response_tokens(self) -> int:
        return sum(batch.response_tokens for batch in self.ranks)

    @property
    def completions(self) -> int:
        return sum(batch.completions for batch in self.ranks)

    @property
    def peak_rss_bytes(self) -> int:
        """Summed over the ranks, each at its own worst moment; pages of shared libraries count once a rank."""
        return sum(batch.peak_rss_bytes for batch in self.ranks)

    @property
    def cpu_s(self) -> float:
        """Of all ranks."""
        return sum(batch.cpu_s for batch in self.ranks)

    def phases(self) -> dict[str, float]:
        """Seconds by phase, mean over ranks; "other" is what is left of the turn."""
        parts = {name: statistics.fmean(batch.seconds[name] for batch in self.ranks) for name in PHASES}
        return {**parts, "other": self.seconds - sum(parts.values())}


@dataclass(frozen=True)
class Measurement:
    """The timed turns of one side at one length and number of processes."""

    side: str
    max_length: int
    processes: int
    facts: dict[str, Any]
    turns: list[Turn]

    def phases(self) -> dict[str, float]:
        """Median seconds by phase."""
        parts = [turn.phases() for turn in self.turns]
        return {name: statistics.median(part[name] for part in parts) for name in parts[0]}

    def median(self, value: Callable[[Turn], float]) -> float:
        return statistics.median(value(turn) for turn in self.turns)


def summary(m: Measurement) -> dict[str, Any]:
    """One side's medians, with every turn beneath them."""
    first = m.turns[0].ranks[0]

    def mean(name: str) -> float | None:
        values = [getattr(turn.ranks[0], name) for turn in m.turns]
        return None if None in values else statistics.fmean(values)

    return {
        "side": m.side,
        "max_length": m.max_length,
        "processes": m.processes,
        "runs_on": m.facts,
        "batch_s": m.median(lambda t: t.seconds),
        "completions_per_s": m.median(lambda t: t.completions / t.seconds),
        "response_tokens_per_s": m.median(lambda t: t.response_tokens / t.seconds),
        "phases_s": m.phases(),
        "cpu_s": m.median(lambda t: t.cpu_s),
        "peak_rss_bytes": m.turns[-1].peak_rss_bytes,
        "response_length_mean": sum(t.response_tokens for t in m.turns) / sum(t.completions for t in m.turns),
        "optimizer_steps_per_batch": first.optimizer_steps,
        "reward_mean": mean("reward_mean"),
        "clip_fraction": mean("clip_fraction"),
        "zero_variance_fraction": mean("zero_variance_fraction"),
        "turns": [
            {
                "seconds": turn.seconds,
                "phases_s": turn.phases(),
                "cpu_s": turn.cpu_s,
                "response_tokens": turn.response_tokens,
                "peak_rss_bytes": turn.peak_rss_bytes,
            }
            for turn in m.turns
        ],
    }


def markdown(report: dict[str, Any], measurements: Sequence[Measurement]) -> str:
    """The report in Markdown."""
    by_case: dict[tuple[int, int], list[Measurement]] = {}
    for m in measurements:
        by_case.setdefault((m.max_length, m.processes), []).append(m)
    lines = ["# GSPO from prompts to new weights, on a CPU", "", *_setting(report, measurements), ""]
    lines += ["## Speed", "", _SPEED_HEAD, "|" + "---|" * (_SPEED_HEAD.count("|") - 1)]
    lines += [row for case in by_case.values() for row in _speed_rows(case)]
    lines += ["", "## Where the time goes", "", _PHASE_HEAD, "|" + "---|" * (_PHASE_HEAD.count("|") - 1)]
    lines += [_phase_row(m) for case in by_case.values() for m in case]
    lines += ["", *_NOTES, ""]
    lines += ["## The work was the same", "", _WORK_HEAD, "|" + "---|" * (_WORK_HEAD.count("|") - 1)]
    lines += [_work_row(m) for case in by_case.values() for m in case]
    lines += ["", *_lengths_in_words(by_case)]
    return "\n".join(lines) + "\n"


_SPEED_HEAD = (
    "| longest response | processes | side | completions/s | response tokens/s | s a batch, median (range) | "
    "CPU s a batch | peak memory, MB | completions/s, × TRL | tokens/s, × TRL | tokens/CPU s, × TRL |"
)
_PHASE_HEAD = (
    "| longest response | processes | side | generate, s | old log-probs, s | train, s | weight hand-over, s | "
    "other, s | largest share |"
)
_WORK_HEAD = (
    "| longest response | processes | side | mean response length | reward | groups of equal rewards | "
    "sequences clipped | optimizer steps a batch |"
)
_NOTES = [
    "Medians over the batches, phases as mean over ranks. Generate is sampling alone. Train is the four optimizer "
    "steps: forward, backward, reduction over ranks, update. TRL samples from the model that it trains and hands "
    "nothing over; our engine holds weights of its own. Other is what is left of a batch: scoring, batching, metrics "
    "and, with several processes, waiting for each other. "
    "CPU seconds and memory are summed over processes, memory each at its own peak, libraries included. Ratios are "
    "medians over pairs of batches that ran one after the other.",
]


def _setting(report: dict[str, Any], measurements: Sequence[Measurement]) -> list[str]:
    machine, model, job = report["machine"], report["model"], report["job"]
    sides = {m.side: m.facts for m in measurements}
    runs_on = "; ".join(
        f"{TITLES[side]}: {', '.join(f'{name} {version}' for name, version in facts['versions'].items())}, "
        f"experts {facts['experts']}, attention {facts['attention']}, {facts['optimizer']}"
        for side, facts in sides.items()
    )
    taking_turns = (
        "Both sides were started together and took turns, one rollout batch each; the other waited meanwhile. "
        if len(sides) > 1
        else "Only one side ran: nothing is compared. "
    )
    return [
        f"`{report['command']}`, {report['date']}, {machine['cores']} cores of an {machine['cpu']} CPU, "
        f"{machine['memory_gib']:g} GiB of memory, load {machine['load']} before the first run, one thread a process. "
        f"{runs_on}.",
        "",
        f"A Qwen3-MoE of {model['parameters'] / 1e6:.2f} M parameters with random weights, float32: hidden "
        f"{model['hidden_size']}, {model['num_hidden_layers']} layers, {model['num_experts']} experts, "
        f"{model['num_experts_per_tok']} a token, expert FFN {model['moe_intermediate_size']}, "
        f"{model['num_attention_heads']} heads / {model['num_key_value_heads']} KV, {model['vocab_size']} symbols. "
        f"A rollout batch is {job['prompts_per_batch']} prompts of reasoning_gym's {job['dataset']} × "
        f"{job['samples_per_prompt']} samples, rewarded by its own score, and {job['mini_batches']} optimizer steps of "
        f"GSPO (clip {job['clip_low']:g} / {job['clip_high']:g}, no KL, temperature 1, learning rate "
        f"{job['learning_rate']:g}) on old log-probabilities recomputed before the first. {taking_turns}"
        f"{len(measurements[0].turns)} batches each, after one to warm up.",
    ]


def _speed_rows(case: Sequence[Measurement]) -> list[str]:
    trl = next((m for m in case if m.side == "trl"), None)
    rows = []
    for m in case:
        seconds = [turn.seconds for turn in m.turns]
        ratios = ["–"] * 3
        if trl is not None and m is not trl:
            # Of batches that ran one after the other: what slows the machine for a while slows both.
            pairs = list(zip(m.turns, trl.turns, strict=True))
            faster = statistics.median(theirs.seconds / mine.seconds for mine, theirs in pairs)
            per_token = statistics.median(
                theirs.seconds / theirs.response_tokens * mine.response_tokens / mine.seconds for mine, theirs in pairs
            )
            per_cpu = statistics.median(
                theirs.cpu_s / theirs.response_tokens * mine.response_tokens / mine.cpu_s for mine, theirs in pairs
            )
            ratios = [f"{ratio:.2f}" for ratio in (faster, per_token, per_cpu)]
        cells = [
            f"{m.max_length} | {m.processes} | {TITLES[m.side]}",
            f"{m.median(lambda t: t.completions / t.seconds):.1f}",
            f"{m.median(lambda t: t.response_tokens / t.seconds):,.0f}",
            f"{statistics.median(seconds):.2f} ({min(seconds):.2f} – {max(seconds):.2f})",
            f"{m.median(lambda t: t.cpu_s):.2f}",
            f"{m.turns[-1].peak_rss_bytes / 1e6:,.0f}",
            *ratios,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _phase_row(m: Measurement) -> str:
    phases = m.phases()
    largest = max(phases, key=lambda name: phases[name])
    share = phases[largest] / sum(phases.values())
    cells = [f"{phases[name]:.3f}" for name in (*PHASES, "other")]
    name = largest.replace("_", " ")
    return f"| {m.max_length} | {m.processes} | {TITLES[m.side]} | {' | '.join(cells)} | {name}, {share:.0%} |"


def _work_row(m: Measurement) -> str:
    figures = summary(m)

    def percent(name: str) -> str:
        return "–" if figures[name] is None else f"{figures[name]:.1%}"

    reward = "–" if figures["reward_mean"] is None else f"{figures['reward_mean']:.3f}"
    cells = [f"{figures['response_length_mean']:.1f}", reward]
    cells += [percent("zero_variance_fraction"), percent("clip_fraction"), str(figures["optimizer_steps_per_batch"])]
    return f"| {m.max_length} | {m.processes} | {TITLES[m.side]} | {' | '.join(cells)} |"


def _lengths_in_words(by_case: dict[tuple[int, int], list[Measurement]]) -> list[str]:
    """What may differ though the job is the same."""
    gaps = []
    for case in by_case.values():
        lengths = [summary(m)["response_length_mean"] for m in case]
        gaps.append(max(lengths) / min(lengths) - 1)
    text = (
        "Random weights end a response with about one token in a hundred, so lengths vary and cannot be forced to be "
        "equal without touching either sampler"
    )
    if any(len(case) > 1 for case in by_case.values()):
        text += f"; the sides' mean lengths differ by at most {max(gaps):.1%}, which tokens/s takes out"
    return [text + ". Prompts, completions and optimizer steps were compared batch by batch while it ran."]
