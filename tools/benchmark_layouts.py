"""The same batch through one optimizer step in each parallel layout, on this machine's CPU.

    python tools/benchmark_layouts.py [--layouts TP2,EP2xTP2,…] [--steps N] [--output FILE]

Prints a Markdown table: seconds a step, memory a rank, and the bytes that ranks send, by what they are for, beside
what `gspo_megatron.traffic` predicts. Ends with exit code 1 if a kind's counted bytes are off its formula by more
than 5 %, or if the kernel saw bytes on the sockets that were not counted; no file is written then.

Bytes are counted from the collectives themselves (tools/count_collectives.py), by the convention of
`gspo_megatron.traffic`: what a rank sends under the ideal ring or pairwise algorithm. What the kernel says the process
wrote, against what gloo's own algorithms send for the counted calls, shows that none escapes.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import re
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
from count_collectives import OTHER, CollectiveCounter, group_roles, written_bytes

from gspo_megatron import config as c
from gspo_megatron.device import DTYPES
from gspo_megatron.errors import UserError
from gspo_megatron.failures import EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, FailureBoard, end_process, guard_rank
from gspo_megatron.launch import launch_local
from gspo_megatron.logs import quiet_libraries
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.traffic import StepWork, Traffic, mean, step_traffic
from gspo_megatron.types import Sequence

TAGS = {
    "TP": "tensor", "PP": "pipeline", "VPP": "virtual_pipeline", "CP": "context", "DP": "data", "EP": "expert",
    "ETP": "expert_tensor",
}  # fmt: skip
LAYOUTS = (
    "1,TP2,PP2,PP2xVPP2,CP2,DP2,TP2xEP2,TP2xETP2,CP2xEP2,DP2xEP2,"
    "TP2xPP2,CP2xTP2,CP2xPP2,PP4,DP2xPP2,PP2xVPP2xDP2xEP2,DP4,DP4xEP4,DP2xCP2xEP4,TP2xDP2xEP4,TP2xDP2xEP2xETP2"
)
VOCABULARY, NUM_SEQUENCES, LONGEST, TOKEN_BUDGET = 8192, 16, 128, 512
TOLERANCE = 0.05
FLOOR = 0.01  # a kind below this share of its layout's traffic is not held to the formula
KERNEL_TOLERANCE, KERNEL_SLACK_BYTES = 0.02, 2**16  # messages' headers; the ranks' key-value store
TIMEOUT_S = 120.0
KINDS = [field.name for field in fields(Traffic)]


def parse_layout(text: str) -> ParallelLayout:
    """'EP2xTP2' -> a layout; '1' is a single rank."""
    degrees = {}
    for part in text.split("x") if text != "1" else []:
        match = re.fullmatch(r"([A-Z]+)(\d+)", part)
        if match is None or match[1] not in TAGS:
            raise UserError(f"--layouts {text}: {part!r} is none of {', '.join(TAGS)} with a degree, as in EP2xTP2")
        degrees[TAGS[match[1]]] = int(match[2])
    return ParallelLayout(**degrees)


def train_config(options: argparse.Namespace, folder: Path) -> c.TrainConfig:
    """The run that every layout makes a step of."""
    return c.TrainConfig(
        run=c.RunConfig(folder=str(folder)),
        model=c.ModelConfig(path=str(folder), dtype=options.dtype),
        task=c.TaskConfig(name="none"),
        algorithm=c.AlgorithmConfig(mini_batches=1),
        data=c.DataConfig(token_budget=TOKEN_BUDGET),
        optimizer=c.OptimizerConfig(lr=1e-6, overlap_grad_reduce=options.overlap, overlap_param_gather=options.overlap),
        memory=c.MemoryConfig(recompute=options.recompute),
    )


def write_model(folder: Path) -> int:
    """A random Qwen3-MoE with a tokenizer, as a Hugging Face folder. Returns its number of parameters."""
    from make_char_tokenizer import write as write_tokenizer
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=256,
        norm_topk_prob=True,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Qwen3MoeForCausalLM(config)
    # As large as trained ones: tokens then choose experts by what they are, not by the sequence they stand in.
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return sum(p.numel() for p in model.parameters())


def rollout_batch() -> list[Sequence]:
    """The same in every layout. A third of each sequence is the prompt."""
    generator = torch.Generator().manual_seed(1)
    sequences = []
    for index in range(NUM_SEQUENCES):
        length = int(torch.randint(LONGEST // 2, LONGEST + 1, (), generator=generator))
        tokens = torch.randint(2, VOCABULARY, (length,), generator=generator)
        advantage = torch.randn((), generator=generator)
        mask = torch.arange(length) >= length // 3
        sequences.append(Sequence(index, tokens, mask, torch.full((length,), -9.0), advantage))
    return sequences


# ---------------------------------------------------------------------------------------------------------------------
# One rank
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankResult:
    """What one rank measured. Plain numbers."""

    stage: int
    step_s: list[float]
    peak_rss_bytes: int  # during the steps
    tokens: int  # of this replica's packs, over all micro-batches and context-parallel ranks
    micro_batches: int
    sent: dict[str, float]  # bytes by kind
    gloo_bytes: float  # what gloo sends for the counted calls
    written_bytes: int  # what the kernel saw


def measure(layout: ParallelLayout, config: c.TrainConfig, steps: int) -> RankResult:
    """Optimizer steps through the trainer: one to warm up, `steps` timed ones, one whose collectives are counted."""
    from gspo_megatron.job import Job
    from gspo_megatron.policy.runtime import initialize
    from gspo_megatron.tokenizer import Tokenizer
    from gspo_megatron.trainer import Trainer

    torch.set_num_threads(1)
    groups = initialize(layout, seed=0, timeout_s=TIMEOUT_S)
    tokenizer = Tokenizer.load(config.model.path)
    job = Job(config, groups, tokenizer, None, None, None, torch.device("cpu"))  # type: ignore[arg-type]
    trainer = Trainer(config, job)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here: loading is no part of a step
    mine = rollout_batch()[groups.coordinates.data :: layout.data] if groups.is_head else []
    [batch], _ = trainer.learn(mine, 2)

    def step() -> float:
        dist.barrier()
        start = time.perf_counter()
        trainer.policy.train_step(batch, trainer.loss(batch))
        return time.perf_counter() - start

    step_s = [step() for _ in range(steps)]
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    counter = CollectiveCounter(group_roles())
    before = written_bytes()
    with counter:
        step()
    written = written_bytes() - before
    return RankResult(
        stage=groups.coordinates.pipeline,
        step_s=step_s,
        peak_rss_bytes=int(peak[1]) * 1024,
        tokens=sum(m.num_tokens for m in batch.micro_batches) * layout.context,
        micro_batches=len(batch.micro_batches),
        sent=dict(counter.sent),
        gloo_bytes=counter.gloo_bytes,
        written_bytes=written,
    )


def run_as_rank(options: argparse.Namespace) -> int:
    """What the launcher starts: measure, and leave the result in the folder."""
    with guard_rank(FailureBoard.from_environment()) as board:
        config = train_config(options, options.folder)
        result = measure(parse_layout(options.measure), config, options.steps)
        (options.folder / f"rank_{board.rank}.json").write_text(json.dumps(asdict(result)))
    end_process(EXIT_DONE)  # threads of open process groups may abort an interpreter that winds down
    raise AssertionError


# ---------------------------------------------------------------------------------------------------------------------
# All layouts
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayoutResult:
    """What was measured in one layout, and what the formula gives."""

    name: str
    ranks: list[RankResult]
    predicted: list[Traffic]  # by pipeline stage

    @property
    def step_s(self) -> float:
        """Median over steps; a step takes as long as its slowest rank."""
        return statistics.median(max(times) for times in zip(*(r.step_s for r in self.ranks), strict=True))

    def counted(self, stage: int | None = None) -> dict[str, float]:
        """Bytes a rank sends by kind: mean over a stage's ranks, or over all."""
        ranks = [r for r in self.ranks if stage in (None, r.stage)]
        return {kind: sum(r.sent.get(kind, 0.0) for r in ranks) / len(ranks) for kind in [*KINDS, OTHER]}

    def problems(self) -> list[str]:
        """Stages whose bytes are not the formula's, and ranks that sent what was not counted."""
        found = []
        for stage, traffic in enumerate(self.predicted):
            counted, predicted = self.counted(stage), asdict(traffic) | {OTHER: 0.0}
            floor = FLOOR * max(sum(counted.values()), traffic.total)
            for kind, want in predicted.items():
                got = counted[kind]
                if max(got, want) > floor and abs(got - want) > TOLERANCE * got:
                    found.append(f"{self.name}, stage {stage}, {kind}: counted {got:,.0f} bytes, formula {want:,.0f}")
        for number, rank in enumerate(self.ranks):
            if abs(rank.written_bytes - rank.gloo_bytes) > KERNEL_TOLERANCE * rank.gloo_bytes + KERNEL_SLACK_BYTES:
                found.append(
                    f"{self.name}, rank {number}: the kernel saw {rank.written_bytes:,} bytes written, "
                    f"the counted calls make gloo send {rank.gloo_bytes:,.0f}"
                )
        return found


def run_layout(name: str, options: argparse.Namespace, folder: Path) -> LayoutResult | int:
    """Start the ranks of a layout, in processes of their own so that memory is the layout's alone.

    Returns the launcher's exit code where that is not 0.
    """
    from gspo_megatron.weights.families import load_fields

    layout, config = parse_layout(name), train_config(options, folder)
    command = [sys.executable, __file__, "--measure", name, "--folder", str(folder), "--steps", str(options.steps)]
    command += ["--dtype", options.dtype, "--recompute", options.recompute, *["--overlap"] * options.overlap]
    if exit_code := launch_local(layout.world_size, command):
        return exit_code
    files = [folder / f"rank_{rank}.json" for rank in range(layout.world_size)]
    ranks = [RankResult(**json.loads(file.read_text())) for file in files]
    work = StepWork(
        tokens=statistics.mean(r.tokens for r in ranks),
        micro_batches=ranks[0].micro_batches,
        element_bytes=DTYPES[config.model.dtype].itemsize,
        distributed_optimizer=config.optimizer.distributed,
        recompute=config.memory.recompute,
        uneven_reduce_scatter=False,  # gloo has none
    )
    _, model = load_fields(str(folder))
    return LayoutResult(name, ranks, step_traffic(model, layout, work))


def table(results: list[LayoutResult], options: argparse.Namespace, num_parameters: int, load: float) -> str:
    """Markdown: a table of time, memory and bytes, and one of bytes by kind."""
    alone = next((r.step_s for r in results if len(r.ranks) == 1), None)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "megatron-core"))
    settings = (
        f"{options.dtype}, recompute {options.recompute}" + ", gradients and parameters overlapped" * options.overlap
    )
    lines = [
        "# Parallel layouts on a CPU",
        "",
        f"`tools/benchmark_layouts.py`, {datetime.date.today()}, {versions}, {os.cpu_count()} cores, gloo, one "
        f"thread a rank. One optimizer step of GSPO (forward, backward, update) with a random Qwen3-MoE of "
        f"{num_parameters / 1e6:.1f} M parameters ({settings}) on the same {NUM_SEQUENCES} sequences, packed to at "
        f"most {TOKEN_BUDGET} tokens a micro-batch. Median of {options.steps} steps after a warm-up; layouts ran in "
        f"turn. The machine's load was {load:.1f} before the first.",
        "",
        "Where there are more ranks than cores they share them: seconds compare layouts of as many ranks, and say "
        "nothing about GPUs. Memory is the largest rank's peak during the steps, libraries included. MB are 10^6 "
        "bytes, mean over ranks.",
        "",
        "| layout | ranks | s a step | × one rank | peak MB a rank | MB sent a rank | formula | off by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        sent, predicted = sum(r.counted().values()), mean(r.predicted).total
        ratio = f"{r.step_s / alone:.2f}" if alone else "–"
        off = f"{(predicted - sent) / sent:+.1%}" if sent else "–"
        peak = max(rank.peak_rss_bytes for rank in r.ranks)
        lines.append(
            f"| {r.name} | {len(r.ranks)} | {r.step_s:.2f} | {ratio} | {peak / 1e6:.0f} | "
            f"{sent / 1e6:.2f} | {predicted / 1e6:.2f} | {off} |"
        )
    return "\n".join([*lines, "", *_table_of_kinds(results)]) + "\n"


def _table_of_kinds(results: list[LayoutResult]) -> list[str]:
    ranks = [rank for result in results for rank in result.ranks if rank.gloo_bytes]
    unseen = max((abs(rank.written_bytes / rank.gloo_bytes - 1) for rank in ranks), default=0.0)
    used = [k for k in [*KINDS, OTHER] if any(r.counted()[k] > 0 for r in results)]
    lines = [
        "MB that a rank sends in a step by what they are for, counted from the collectives / by the formula of "
        "`gspo_megatron/traffic.py`, whose `Traffic` says what each kind is. By the ideal ring or pairwise algorithm: "
        "of n bytes over p ranks an all-gather and a reduce-scatter send n·(p-1)/p, an all-reduce twice that, an "
        f"all-to-all what leaves the rank, a message its size. Each pipeline stage is held to {TOLERANCE:.0%}, kinds "
        f"below {FLOOR:.0%} of its bytes excepted. gloo cannot reduce-scatter pieces of different lengths: expert "
        f"tensor parallelism uses an all-reduce here. What the kernel saw each rank write is within {unseen:.1%} of "
        "what gloo sends for the counted calls.",
        "",
        f"| layout | {' | '.join(k.replace('_', ' ') for k in used)} |",
        "|---" * (len(used) + 1) + "|",
    ]
    for r in results:
        counted, predicted = r.counted(), asdict(mean(r.predicted)) | {OTHER: 0.0}
        cells = [
            f"{counted[k] / 1e6:.3f} / {predicted[k] / 1e6:.3f}" if counted[k] + predicted[k] else "" for k in used
        ]
        lines.append(f"| {r.name} | {' | '.join(cells)} |")
    return lines


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", default=LAYOUTS, help="separated by commas; default: %(default)s")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per layout; default: %(default)s")
    parser.add_argument("--output", type=Path, help="write the table to this file too")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="model.dtype; default: %(default)s")
    parser.add_argument(
        "--recompute", choices=("none", "selective", "moe", "full"), default="none", help="memory.recompute"
    )
    parser.add_argument(
        "--overlap", action="store_true", help="optimizer.overlap_grad_reduce and optimizer.overlap_param_gather"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # how this program starts itself as a rank
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 1:
        raise UserError(f"--steps {options.steps} must be at least 1")
    return options


def main() -> int:
    options = parse_arguments()
    quiet_libraries()
    if options.measure:
        return run_as_rank(options)
    names = options.layouts.split(",")
    for name in names:
        parse_layout(name)  # a typo shows before anything runs
    os.environ["OMP_NUM_THREADS"] = "1"
    load, _, _ = os.getloadavg()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        num_parameters = write_model(Path(folder))
        for name in names:
            result = run_layout(name, options, Path(folder))
            if isinstance(result, int):
                return result
            print(f"{name}: {result.step_s:.2f} s a step", file=sys.stderr, flush=True)
            results.append(result)
    text = table(results, options, num_parameters, load)
    print(text)
    problems = [problem for result in results for problem in result.problems()]
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        return EXIT_FAILED
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")
    return EXIT_DONE


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
