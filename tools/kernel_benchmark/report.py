"""Results as data, Markdown and the figures that are promised."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kernel_benchmark import linear_logprobs, policy_loss, sparse_backward, token_logprobs
from kernel_benchmark.worker import OK, Row

MIB = 2**20


@dataclass
class CaseResult:
    """A case's answers from its processes."""

    name: str
    title: str
    letters: str
    sizes: list[int]
    default_sizes: list[int]
    dtype: str
    floor: str  # in words
    probe_bytes: int  # of the arrays that the rates were measured with
    rates: dict[str, float | None]
    floors_s: dict[str, dict[str, float]]  # by objective, by name
    rows: list[Row]

    def row(self, objective: str, name: str) -> Row | None:
        """None if it was not measured."""
        key = f"{objective}: {name}"
        return next((row for row in self.rows if row.key == key and row.status == OK), None)

    @property
    def shape(self) -> str:
        letters = self.letters.split("x")
        return ", ".join(f"{letter} = {size:,}" for letter, size in zip(letters, self.sizes, strict=True))


@dataclass(frozen=True)
class Figure:
    """One number that sums a case up."""

    what: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """None without a goal."""
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most


@dataclass
class Report:
    date: str
    device: str
    repetitions: int
    machine: dict[str, str]
    cases: list[CaseResult]

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"figures": [asdict(figure) | {"met": figure.met} for figure in self.figures()]}

    def figures(self) -> list[Figure]:
        by_name = {case.name: case for case in self.cases}
        found: list[Figure] = []
        for name, function in FIGURES.items():
            if name in by_name:
                found += function(by_name[name], self.device)
        return found

    def as_markdown(self) -> str:
        lines = [f"# Kernels on {'a GPU' if self.device == 'cuda' else 'a CPU'}", "", self._about(), ""]
        if figures := self.figures():
            usual = all(case.sizes == case.default_sizes for case in self.cases)
            lines += ["| figure | measured | goal | |", "|---|---|---|---|", *map(_figure_line, figures), ""]
            lines += [] if usual else ["Goals are stated for the default sizes; these were others.", ""]
        for case in self.cases:
            lines += _case_lines(case)
        return "\n".join(lines)

    def _about(self) -> str:
        machine = "; ".join(f"{name}: {value}" for name, value in self.machine.items())
        clock = "CUDA events" if self.device == "cuda" else "wall-clock time"
        memory = (
            "what torch allocated at most" if self.device == "cuda" else "peak resident memory"
        ) + " over the state just before, in a fresh process for each candidate"
        return (
            f"`tools/benchmark_kernels.py`, {self.date}. {machine}. Medians of {self.repetitions} repetitions in which "
            f"all candidates of a case take turns in one process, {clock}; logits are restored in between, not timed. "
            f"Extra memory is {memory}, beyond the gradients that have memory of their own. Before it is timed each "
            "candidate is held to a definition in float64: the error is the largest of its outputs (absolute) and "
            "gradients (relative to the norm); who exceeds the limits is reported wrong and not timed."
        )


def _figure_line(figure: Figure) -> str:
    goal = ""
    if figure.at_least is not None:
        goal = f"≥ {figure.at_least:g} {figure.unit}"
    elif figure.at_most is not None:
        goal = f"≤ {figure.at_most:g} {figure.unit}"
    verdict = {None: "", True: "met", False: "**missed**"}[figure.met]
    return f"| {figure.what} | {figure.value:.2f} {figure.unit} | {goal} | {verdict} |"


def _case_lines(case: CaseResult) -> list[str]:
    rates = [f"{name} {_gb(case.rates[name])} GB/s" for name in ("read", "copy", "update")]
    if case.rates["multiply"] is not None:
        rates.append(f"matrix products {case.rates['multiply'] / 1e9:,.1f} GFLOP/s")
    lines = [
        f"## {case.title}",
        "",
        f"{case.shape}, {case.dtype}. Measured in the same run with arrays of the case's size: {', '.join(rates)}. "
        f"Floor: {case.floor}.",
        "",
    ]
    for objective, floors in case.floors_s.items():
        named = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in floors.items())
        lines.append(f"- {objective}: {named}")
    lines += [
        "",
        "| computes | candidate | forward ms | backward ms | together ms | ours is × faster | of the floor "
        "| extra MiB | error |",
        "|" + "---|" * 9,
    ]
    timed = [row for row in case.rows if row.status == OK]
    lines += [_row_line(case, row) for row in timed]
    lines.append("")
    missing = [
        f"{row.key}: {row.status}{f' ({row.note})' if row.note else ''}" for row in case.rows if row not in timed
    ]
    if missing:
        lines += ["Not timed:", "", *(f"- {line}" for line in missing), ""]
    return lines


def _row_line(case: CaseResult, row: Row) -> str:
    total = row.total_s
    assert total is not None
    ours = next((r for r in case.rows if r.objective == row.objective and r.ours and r.status == OK), None)
    faster = "" if ours is None or ours.total_s is None or ours is row else f"{total / ours.total_s:.2f}"
    floor = next(iter(case.floors_s[row.objective].values()))
    extra = "–" if row.extra_bytes is None else f"{row.extra_bytes / MIB:,.1f}"
    return (
        f"| {row.objective} | {row.name} | {_ms(row.forward_s)} | {_ms(row.backward_s)} | {1e3 * total:.2f} "
        f"| {faster} | {100 * floor / total:.0f} % | {extra} | {max(row.errors.values()):.0e} |"
    )


def _ms(seconds: Sequence[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.2f}"


def _gb(rate: float | None) -> str:
    assert rate is not None
    return f"{rate / 1e9:,.1f}"


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def _times(peer: Row | None, ours: Row | None) -> list[float]:
    """How many times faster ours is; empty if one was not measured."""
    if peer is None or ours is None or peer.total_s is None or ours.total_s is None:
        return []
    return [peer.total_s / ours.total_s]


def _memory_percent(ours: Row | None, peer: Row | None) -> list[float]:
    if peer is None or ours is None or not peer.extra_bytes or ours.extra_bytes is None:
        return []
    return [100 * ours.extra_bytes / peer.extra_bytes]


def _token_figures(case: CaseResult, device: str) -> list[Figure]:
    m = token_logprobs
    ours = case.row(m.ENTROPY, m.NATIVE)
    found: list[Figure] = []
    if device == "cuda" and ours is not None and ours.total_s is not None and case.rates["copy"] is not None:
        # The logits' bytes: half of what a copy of them reads and writes; they are moved three times.
        share = 100 * 3 * case.probe_bytes / ours.total_s / case.rates["copy"]
        found.append(Figure("token log-probs with entropy, of the measured copy bandwidth", share, "%", at_least=80))
    on_cpu = device == "cpu"
    for peer, which, goal in ((m.ENTROPY, "with", 10), (m.LOGPROBS, "without", 8)):
        eager = case.row(peer, m.EAGER)
        what = f"token log-probs with entropy: faster than eager {which} entropy"
        found += [Figure(what, x, "×", at_least=goal if on_cpu else None) for x in _times(eager, ours)]
        what = f"token log-probs with entropy: extra memory, of eager's {which} entropy"
        found += [Figure(what, x, "%", at_most=5 if on_cpu else None) for x in _memory_percent(ours, eager)]
    return found


def _linear_figures(case: CaseResult, device: str) -> list[Figure]:
    m = linear_logprobs
    found: list[Figure] = []
    ours = case.row(m.ENTROPY, m.NATIVE)
    if device == "cuda" and ours is not None and ours.total_s is not None:
        ratio = ours.total_s / case.floors_s[m.ENTROPY][m.FOUR]
        found.append(
            Figure("log-probs and entropy from hidden states: time over four products'", ratio, "×", at_most=1.35)
        )
        if ours.extra_bytes is not None:
            extra = ours.extra_bytes / 1e9
            found.append(Figure("log-probs and entropy from hidden states: beyond dW and dH", extra, "GB", at_most=1.5))
    for objective in case.floors_s:
        ours = case.row(objective, m.NATIVE)
        what = f"{objective} from hidden states"
        if (eager := case.row(objective, m.EAGER)) is not None and device == "cpu":
            found += [Figure(f"{what}: time over eager's", 1 / x, "×", at_most=1.15) for x in _times(eager, ours)]
            memory = _memory_percent(ours, eager)
            found += [Figure(f"{what}: memory beyond dW and dH, of eager's", x, "%", at_most=10) for x in memory]
        peers = [row for row in case.rows if row.objective == objective and not row.ours and row.status == OK]
        if ratios := [x for peer in peers for x in _times(peer, ours)]:
            goal = 1 if device == "cuda" else None
            found.append(Figure(f"{what}: faster than the fastest peer", min(ratios), "×", at_least=goal))
    return found


def _policy_figures(case: CaseResult, device: str) -> list[Figure]:
    m = policy_loss
    ours = case.row(m.LOSS, m.NATIVE)
    return [
        Figure(f"sequence policy loss: faster than {name}", x, "×", at_least=goal if device == "cpu" else None)
        for name, goal in ((m.BY_INDEX, 4), (m.BY_SEQUENCE, None))
        for x in _times(case.row(m.LOSS, name), ours)
    ]


def _sparse_figures(case: CaseResult, device: str) -> list[Figure]:
    m = sparse_backward
    found = []
    for percent in m.PERCENT[1:]:
        objective = m.objective_name(percent)
        skipping, whole = case.row(objective, m.NATIVE), case.row(objective, m.WHOLE)
        if skipping is not None and whole is not None:
            saved = 100 * (1 - statistics.median(skipping.backward_s) / statistics.median(whole.backward_s))
            found.append(Figure(f"{objective}: of the output layer's backward saved", saved, "%"))
    return found


FIGURES: dict[str, Callable[[CaseResult, str], list[Figure]]] = {
    token_logprobs.CASE.name: _token_figures,
    "linear_logprobs": _linear_figures,
    policy_loss.CASE.name: _policy_figures,
    sparse_backward.CASE.name: _sparse_figures,
}
