"""The tables of benchmark_reshard.py measured, in Markdown."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reshard.trainer import Measured

TARGET = 1.5
CONTROL = {
    "/server_info": "is the server there?",
    "/pause_generation": "pause",
    "/flush_cache": "flush",
    "/begin_weight_update": "begin",
    "/update_weight_version": "version",
    "/end_weight_update": "end",
    "/continue_generation": "continue",
}
SENDING = ("/update_weights_from_distributed", "/update_weights_from_tensor")
CHECK = "/weights_checker"


@dataclass(frozen=True)
class Model:
    """What is sent."""

    num_bytes: int
    num_tensors: int
    hidden: int
    experts: int
    expert_size: int
    layers: int
    vocabulary: int


@dataclass(frozen=True)
class Cell:
    """One case, as all ranks saw it."""

    layout: str
    kind: str
    bucket_mb: int
    ranks: Sequence[Measured]

    def seconds(self, name: str) -> float:
        """The median of rank 0's."""
        values = getattr(self.ranks[0], name)
        return statistics.median(values) if values else 0.0

    def ratio(self, name: str, yardstick: str) -> float | None:
        """The median over repetitions: what else the machine does changes slowly."""
        own, others = getattr(self.ranks[0], name), getattr(self.ranks[0], yardstick)
        return statistics.median(a / b for a, b in zip(own, others, strict=True)) if others else None

    def part(self, combine: Callable[[list[float]], float], *names: str) -> float:
        """The median over repetitions of what `combine` makes of the ranks' seconds in these parts."""
        per_rank = [[sum(parts.get(n, 0.0) for n in names) for parts in r.parts_s] for r in self.ranks]
        return statistics.median(combine(list(values)) for values in zip(*per_rank, strict=True))

    @property
    def wire(self) -> float:
        """Bytes that the ranks wrote, over the model's."""
        return sum(r.written_bytes for r in self.ranks) / self.ranks[0].model_bytes

    @property
    def gathered(self) -> float:
        return sum(r.gathered_bytes for r in self.ranks) / self.ranks[0].model_bytes

    @property
    def memory(self) -> str:
        """Of the rank that needed most: measured, planned."""
        most = max(self.ranks, key=lambda r: r.extra_bytes)
        return f"{most.extra_bytes / 2**20:.0f} / {max(r.planned_bytes for r in self.ranks) / 2**20:.0f}"


def report(model: Model, cells: Sequence[Cell], repetitions: int) -> str:
    """All tables for which something was measured."""
    blocks = [_introduction(model, repetitions)]
    for make in (_direct, _pages, _served, _memory, _calls):
        block = make(cells)
        if block:
            blocks += block
    return "\n\n".join(blocks) + "\n"


def _introduction(model: Model, repetitions: int) -> str:
    expert_bytes, mean_bytes = 6 * model.hidden * model.expert_size, model.num_bytes / model.num_tensors
    return (
        "# Weights from the Megatron layout to servers, measured\n\n"
        "Written by `tools/benchmark_reshard.py measured`. A Qwen3-MoE in bfloat16 of "
        f"{model.num_bytes / 1e6:,.1f} MB: {model.layers} layers, hidden size {model.hidden}, "
        f"{model.experts} experts of {model.expert_size} a layer "
        f"({expert_bytes / 1e6:.1f} MB each), vocabulary {model.vocabulary:,}; {model.num_tensors} tensors, "
        f"{mean_bytes / 1e6:.2f} MB each in the mean (Qwen3-30B-A3B: 3.2 MB). {os.cpu_count()} cores, which ranks, "
        "receivers and servers share with whatever else runs; gloo over the loopback interface; one thread a rank. "
        f"Medians of {repetitions} repetitions, in which yardstick and update take turns; of ratios, those within a "
        "repetition. The yardstick: one broadcast of one flat tensor of the model's bytes, from memory in use to "
        "memory in use, until all have it. MB of buckets and memory are 2²⁰ bytes.\n\n"
        "Peak memory is the kernel's high-water mark of a rank's resident memory in an update (VmHWM, reset before it) "
        "less what it had before, in an update of its own after memory that was free was given back; beside it "
        "`ReshardPlan.peak_bytes`; what is above it malloc keeps of freed memory (none with "
        "MALLOC_MMAP_THRESHOLD_=200000). Bytes written are the kernel's count (wchar) of all ranks, to sockets and "
        "files."
    )


def _direct(cells: Sequence[Cell]) -> list[str]:
    chosen = [c for c in cells if c.kind == "direct"]
    if not chosen:
        return []
    header = [
        "layout", "senders", "buckets", "plain broadcast, same members, ms", "of one sender, ms",
        "ready buckets, ms", "reshard, ms", "÷ same members", "÷ one sender", "÷ ready buckets", "gather, ms",
        "assemble, ms", "broadcast, ms", "bytes written ÷ model", "gathered ÷ model", "peak / planned, MB",
    ]  # fmt: skip
    rows = []
    for c in chosen:
        many = bool(c.ranks[0].plain_all_s)
        same = "plain_all_s" if many else "plain_s"
        rows.append(
            [
                c.layout, str(c.ranks[0].num_senders), str(c.ranks[0].num_buckets), _ms(c.seconds(same)),
                _ms(c.seconds("plain_s")), "–" if many else _ms(c.seconds("ready_s")),
                _ms(c.seconds("buckets_s")),
                f"**{_same_members(c):.2f}**", f"{c.ratio('buckets_s', 'plain_s'):.2f}",
                "–" if many else f"{c.ratio('buckets_s', 'ready_s'):.2f}", _ms(c.part(max, "gather")),
                _ms(c.part(max, "assemble")), _ms(c.part(sum, "broadcast")), f"{c.wire:.3f}", f"{c.gathered:.3f}",
                c.memory,
            ]
        )  # fmt: skip
    met = [row[0] for row, c in zip(rows, chosen, strict=True) if _same_members(c) <= TARGET]
    text = (
        "To one receiver that does what a server's rank does with a bucket and nothing else: receive it flat, cut it, "
        f"copy each tensor to its place. Buckets of {chosen[0].bucket_mb} MB, and no HTTP between them. The trainer's "
        "part is the whole path, gathering to turns. The plain broadcast once in a gloo group of the same members, "
        "all senders and the receiver, and once in that of one sender and the receiver, which moves the bytes once. "
        "Ready buckets: a sender that has them already, and the same receiver, whose copying no sender can avoid. "
        f"At most {TARGET} × the same members' in: {', '.join(met) or 'no layout'}. Gather and assemble: of the rank "
        "that needed most, waiting for others included; broadcast: of all senders together; they overlap."
    )
    return ["## Beside a plain broadcast", text, _table(header, rows)]


def _same_members(cell: Cell) -> float:
    ratio = cell.ratio("buckets_s", "plain_all_s" if cell.ranks[0].plain_all_s else "plain_s")
    assert ratio is not None
    return ratio


def _pages(cells: Sequence[Cell]) -> list[str]:
    chosen = [c for c in cells if "pages" in c.kind]
    if not chosen:
        return []
    header = [
        "receiver", "buckets of, MB", "huge pages", "plain, ms", "buckets, ms", "÷ plain", "whole update, ms",
        "assemble, ms", "broadcast, ms", "peak / planned, MB",
    ]  # fmt: skip
    rows = [
        [
            "SGLang" if c.kind.startswith("served") else "bare", str(c.bucket_mb), "yes" if c.kind[-1] == "1" else "no",
            _ms(c.seconds("plain_s")), _ms(c.seconds("buckets_s")), f"**{c.ratio('buckets_s', 'plain_s'):.2f}**",
            _ms(c.seconds("update_s")), _ms(c.part(max, "assemble")), _ms(c.part(sum, "broadcast")), c.memory,
        ]
        for c in chosen
    ]  # fmt: skip
    text = (
        f"Layout {chosen[0].layout}. A receiver takes fresh memory for every bucket, and glibc keeps blocks of up to "
        "32 MB for the next time; larger ones come from the kernel, which needs longer to clear and map small pages "
        "than the bytes need to arrive. With THP_MEM_ALLOC_ENABLE=1 in its environment, torch asks for huge pages. The "
        "trainer's own buffers have them anyway."
    )
    return ["## Sizes of buckets", text, _table(header, rows)]


def _served(cells: Sequence[Cell]) -> list[str]:
    chosen = [c for c in cells if c.kind.split()[0] in ("distributed", "tensor", "disk")]
    if not chosen:
        return []
    header = [
        "layout", "transport, server", "buckets", "plain, ms", "buckets, ms", "÷ plain", "whole update, ms", "÷ plain",
        "gather, ms", "assemble, ms", "send, ms", "of it broadcast, ms", "finish, ms", "checksums, ms",
        "of it the server, ms", "control calls, ms", "probe, ms", "bytes written ÷ model", "peak / planned, MB",
    ]  # fmt: skip
    rows = []
    for c in chosen:
        rows.append(
            [
                c.layout, c.kind.replace(" TP", ", TP"), str(c.ranks[0].num_buckets), _ms(c.seconds("plain_s")),
                _ms(c.seconds("buckets_s")), f"{c.ratio('buckets_s', 'plain_s'):.2f}", _ms(c.seconds("update_s")),
                f"{c.ratio('update_s', 'plain_s'):.2f}", _ms(c.part(max, "gather")), _ms(c.part(max, "assemble")),
                _ms(c.part(sum, "send")), _ms(c.part(sum, "broadcast")), _ms(c.part(max, "finish")),
                _ms(c.part(max, "check")), _ms(c.part(sum, CHECK)), _ms(c.part(sum, *CONTROL)),
                _ms(c.seconds("probe_s")) if c.kind.startswith("distributed") else "–", f"{c.wire:.3f}", c.memory,
            ]
        )  # fmt: skip
    text = (
        f"Real SGLang servers on the CPU, buckets of {chosen[0].bucket_mb} MB, checksums of the default (sampled). "
        "The plain broadcast is that of one sender to as many bare receivers as the server has ranks. Buckets: from "
        "the first gather until the server has loaded the last one; with disk, until all files are written: the server "
        "loads them in finish. Whole update: pause to continue, without the probe, which is the same for every "
        "transport. Send is of all senders together: requests until their answers. What the transports tensor and disk "
        "hold beside the bucket, in shared memory or for the file, is not in the plan."
    )
    return ["## Real servers", text, _table(header, rows)]


def _memory(cells: Sequence[Cell]) -> list[str]:
    chosen = [c for c in cells if c.kind == "memory"]
    if not chosen:
        return []
    header = [
        "layout", "buckets", "whole update, ms", "gather, ms", "assemble, ms", "bytes written ÷ model",
        "gathered ÷ model", "peak / planned, MB",
    ]  # fmt: skip
    rows = [
        [
            c.layout, str(c.ranks[0].num_buckets), _ms(c.seconds("update_s")), _ms(c.part(max, "gather")),
            _ms(c.part(max, "assemble")), f"{c.wire:.3f}", f"{c.gathered:.3f}", c.memory,
        ]
        for c in chosen
    ]  # fmt: skip
    text = "In each head's own process: no server, every head gets the whole model."
    return ["## Embedded engine", text, _table(header, rows)]


def _calls(cells: Sequence[Cell]) -> list[str]:
    found = next((c for c in cells if c.kind.startswith("distributed")), None)
    if found is None:
        return []
    rows = [[name, path, _ms(found.part(sum, path), 1)] for path, name in CONTROL.items()]
    sending = found.part(sum, *SENDING)
    own = found.part(max, "check") - found.part(sum, CHECK)
    rows += [
        ["buckets, broadcasts included", SENDING[0], _ms(sending, 1)],
        ["checksums of the server", CHECK, _ms(found.part(sum, CHECK), 1)],
        ["checksums of the trainer", "–", _ms(own, 1)],
        ["probe, whole", "/generate and a forward pass", _ms(found.seconds("probe_s"), 1)],
    ]
    known = sum(found.part(sum, path) for path in CONTROL) + found.part(max, "check")
    rest = found.seconds("update_s") - found.seconds("buckets_s") - known
    rows.append(["everything else: agreement of the ranks", "–", _ms(rest, 1)])
    text = f"{found.layout}, {found.kind}: calls of one update, one after the other but for what overlaps with buckets."
    return ["## Calls", text, _table(["what", "call", "ms"], rows)]


def _ms(seconds: float, digits: int = 0) -> str:
    return f"{1e3 * seconds:,.{digits}f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
