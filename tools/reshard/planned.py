"""benchmark_reshard.py planned: plans of published size, and what they would take."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from reshard import figures
from reshard.cells import Cases, Cell, Model, choose, load_cases, load_model
from reshard.figures import Figures

OUTPUT = Path("benchmarks/results/reshard_planned.md")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="one model of tools/reshard_models, as in kimi_k2")
    parser.add_argument("--gpus", type=int, help="one number of training GPUs")
    parser.add_argument("--output", type=Path, help=f"also write the tables to this file (all cells: {OUTPUT})")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the tables; write them if all cells are asked for."""
    cases = load_cases()
    cells = choose(cases.cells, options.model, options.gpus)
    models = {name: load_model(name) for name in dict.fromkeys(cell.model for cell in cells)}
    text = report(cases, cells, models)
    print(text)
    is_complete = len(cells) == len(cases.cells)
    output = options.output or (OUTPUT if is_complete else None)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")


def report(cases: Cases, cells: Sequence[Cell], models: dict[str, Model]) -> str:
    """All tables, in Markdown."""
    rows = [(cell, _measure(cases, cell, models)) for cell in cells]
    blocks = [_introduction(cases), "## Plans", _plans(rows), "## Bytes", _bytes(rows)]
    blocks += ["## Predicted seconds", _time_model(cases), _seconds(rows)]
    blocks += ["## Beside published times", _PUBLISHED, _published(cases, models), "## Layouts", _layouts(cells)]
    return "\n\n".join(blocks) + "\n"


def _measure(cases: Cases, cell: Cell, models: dict[str, Model]) -> Figures:
    return figures.measure(models[cell.model], cell, cases.bucket_bytes, cases.links, cases.call)


def _introduction(cases: Cases) -> str:
    return (
        "# Resharding models of published size, planned\n\n"
        "Written by `tools/benchmark_reshard.py planned`. **Nothing here was sent over a network: plans are computed, "
        "bytes are counted from them, seconds are predictions.** Weights go in bfloat16, buckets hold "
        f"{cases.bucket_bytes / 2**30:g} GiB or one larger tensor, every server gets every bucket by broadcast. "
        "GB are 10⁹ bytes."
    )


def _plans(rows: Sequence[tuple[Cell, Figures]]) -> str:
    header = [
        "model", "training GPUs", "planning, CPU s", "buckets", "senders = communicators",
        "most ÷ mean bytes of a stage's senders", "peak extra memory, buckets",
    ]  # fmt: skip
    return _table(
        header,
        [
            [
                *_name(cell), f"{f.planning_s:.2f}", f"{f.num_buckets:,}", f"{f.num_senders}", f"{f.imbalance:.3f}",
                f"{f.peak_buckets:.2f}",
            ]
            for cell, f in rows
        ],
    ) + "\n\nOne process plans all cells in this order; the first one also pays for warming up."  # fmt: skip


def _bytes(rows: Sequence[tuple[Cell, Figures]]) -> str:
    header = [
        "model", "training GPUs", "model, GB", "gathered, GB", "of it relayed experts, GB",
        "a trainer's NIC sends at most, GB", "and receives, GB", "a server's NIC receives at most, GB",
        "a server rank receives ÷ model", "÷ its own part",
    ]  # fmt: skip
    return _table(
        header,
        [
            [
                *_name(cell), _gb(f.model_bytes), _gb(f.gathered_bytes), _gb(f.relayed_bytes), _gb(f.nic_sent_bytes),
                _gb(f.nic_received_bytes), _gb(f.server_nic_received_bytes), f"{f.received_over_model:.3f}",
                f"{f.received_over_shard:.0f}",
            ]
            for cell, f in rows
        ],
    ) + (
        "\n\nGathered: shards that reach a sender from other ranks, of products cut over tensor-parallel ranks and of "
        "relayed experts, which are those of ranks that are no senders and those moved for balance. An SGLang rank "
        "takes whole tensors and keeps its part, so it receives the model once, whatever the server's degree: the last "
        "column is what shard-to-shard transports save."
    )  # fmt: skip


def _time_model(cases: Cases) -> str:
    links, call = cases.links, cases.call
    return (
        "A server takes one bucket at a time over all its ranks. A broadcast moves its bytes once, at the slower of "
        f"the sender's NIC ({links.trainer_nic_gb_per_s:g} GB/s) and the servers' ({links.server_nic_gb_per_s:g} "
        f"GB/s). A call costs {1e3 * call.seconds_per_call:g} ms and each tensor {1e3 * call.seconds_per_tensor:g} ms "
        f"({call.source}). A step's shards are gathered while the step before is sent, over NVLink "
        f"({links.nvlink_gb_per_s:g} GB/s) within a node of {links.gpus_per_node} GPUs, else over NICs; waiting is "
        f"what remains of that. Links: {links.source}. Left out: latency, contention, how far NCCL stays below the "
        "links' rates, copies within a GPU, pausing and resuming."
    )


def _seconds(rows: Sequence[tuple[Cell, Figures]]) -> str:
    header = ["model", "training GPUs", "servers", "sending, s", "calls, s", "waiting, s", "predicted, s"]
    return _table(
        header,
        [
            [
                *_name(cell), _servers(cell), f"{f.sending_s:.2f}", f"{f.calls_s:.2f}", f"{f.waiting_s:.2f}",
                f"**{f.seconds:.1f}**",
            ]
            for cell, f in rows
        ],
    )  # fmt: skip


_PUBLISHED = (
    "Predicted: our plan for the layout in that row, by the model above, in bfloat16 and by broadcast. Published times "
    "were measured by those who report them, on other code, and include more or fewer steps besides the transfer. Only "
    "NCCL broadcasts go the way that ours go; where FP8 is named, fewer bytes may have been sent than we count, so "
    "that equal seconds mean nothing."
)


def _published(cases: Cases, models: dict[str, Model]) -> str:
    header = ["model", "published, s", "what", "layout → servers", "what differs from ours", "predicted for ours, s"]
    lines = []
    for entry in cases.published:
        if entry.model not in models:
            continue
        cell = entry.cell
        layout = f"{cell.layout.describe()} → {_servers(cell)}" if cell else "–"
        seconds = f"{_measure(cases, cell, models).seconds:.1f}" if cell else "–"
        what = f"{entry.how} ([source]({entry.source}))"
        lines.append([entry.model, entry.seconds, what, layout, entry.differs, seconds])
    return _table(header, lines)


def _layouts(cells: Sequence[Cell]) -> str:
    header = ["model", "training", "servers", "after"]
    return _table(header, [[c.model, c.layout.describe(), _servers(c), c.source] for c in cells])


def _name(cell: Cell) -> list[str]:
    return [cell.model, f"{cell.gpus:,}"]


def _servers(cell: Cell) -> str:
    return f"{cell.servers.count} × TP{cell.servers.tensor}"


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.1f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
