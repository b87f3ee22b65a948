#!/usr/bin/env python
"""Tokens a second, MFU and memory of one rank that trains a MoE with GSPO, by what is recomputed and offloaded.

    .venv/bin/python tools/benchmark_training.py [--size tiny|1b] [--dtype bfloat16] [--steps 5]
                                                 [--variants none,selective,moe,full,none+offload] [--output FILE]

A Qwen3-MoE with random weights, packed sequences of ragged lengths, grouped experts; the trainer's own pass for the
old log-probabilities and its own optimizer step, each variant in a process of its own, on CUDA where it is there.
Prints a table in Markdown. A variant that does not fit into the device's memory says so in its row.

FLOPs of T tokens, R of them in responses, in sequences of lengths L, a multiplication and an addition counting as two:

    N      parameters that a token is multiplied with: projections of the attention, router, its experts;
           not the embedding, whose rows are only looked up
    N_head those of the output layer, which response tokens alone are multiplied with
    A      4 · heads · head_dim · layers · Σ L(L+1)/2, attention's two products under the causal mask
    F      2·N·T + 2·N_head·R + A, a forward pass
    model  3·F for an optimizer step, the backward pass costing twice the forward pass; F for log-probabilities
    done   model + 2·N_head·R in a step, since the head makes its logits again in the backward pass,
           + A with "selective", + 2·N_moe·T with "moe", + F - 2·N_head·R with "full" recomputation

MFU is model FLOPs a second over the device's peak, HFU the FLOPs done. What attention kernels compute again by
themselves, norms, activations, softmax and Adam count nowhere. Peaks are dense bfloat16 from the vendor's data
sheets, by the device's exact name (PEAK_FLOPS); for another device or dtype give --peak-tflops, else there is no MFU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gspo_megatron import config as c
from gspo_megatron.device import DTYPES, current_device
from gspo_megatron.errors import UserError
from gspo_megatron.failures import EXIT_DONE, EXIT_USER_ERROR, FailureBoard, end_process, guard_rank
from gspo_megatron.launch import launch_local
from gspo_megatron.logs import quiet_libraries
from gspo_megatron.types import Sequence as Rollout
from gspo_megatron.weights.families.base import ModelFields

PEAK_FLOPS = {  # dense bfloat16
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
RECOMPUTE = ("none", "selective", "moe", "full")
OFFLOAD = "+offload"
VARIANTS = ",".join(RECOMPUTE)
WARM_UP_STEPS = 2
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Size:
    """A model and its batch."""

    hf_config: dict[str, Any]
    num_sequences: int
    shortest: int
    longest: int
    token_budget: int


SIZES = {
    # A second a step on a CPU core.
    "tiny": Size(
        {
            "vocab_size": 512,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 32,
            "max_position_embeddings": 256,
        },
        num_sequences=16,
        shortest=16,
        longest=256,
        token_budget=1024,
    ),
    # Layers of Qwen3-30B-A3B with half its experts, 6 of 48, and a small vocabulary: 2.1 B parameters. At 18 bytes
    # each (bfloat16 weights; main weights, Adam's two moments and gradients in float32) that is 37 GB.
    "1b": Size(
        {
            "vocab_size": 32768,
            "hidden_size": 2048,
            "num_hidden_layers": 6,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "max_position_embeddings": 4096,
        },
        num_sequences=32,
        shortest=256,
        longest=4096,
        token_budget=16384,
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ActiveParameters:
    """Parameters that one token is multiplied with."""

    attention: int  # projections of all layers
    moe: int  # routers and chosen experts of all layers
    dense: int  # MLPs of layers without experts
    head: int

    @classmethod
    def of(cls, fields: ModelFields) -> ActiveParameters:
        hidden, head_dim = fields.hidden_size, fields.head_dim
        projections = 2 * hidden * head_dim * (fields.num_attention_heads + fields.num_query_groups)  # q and o, k and v
        moe = 0
        if fields.num_experts is not None:
            expert = 3 * hidden * fields.expert_ffn_hidden_size  # gate, up, down
            moe = len(fields.moe_layers) * (hidden * fields.num_experts + fields.experts_per_token * expert)
        return cls(
            attention=fields.num_layers * projections,
            moe=moe,
            dense=len(fields.dense_layers) * 3 * hidden * fields.ffn_hidden_size,
            head=hidden * fields.vocab_size,
        )

    @property
    def total(self) -> int:
        return self.attention + self.moe + self.dense + self.head


@dataclass(frozen=True)
class StepFlops:
    """Of one optimizer step and of one pass for log-probabilities; the formulas are at the top of this file."""

    logprobs: float
    model: float
    done: float

    @classmethod
    def of(cls, fields: ModelFields, lengths: Sequence[int], *, response_tokens: int, recompute: str) -> StepFlops:
        active, tokens = ActiveParameters.of(fields), sum(lengths)
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        attention = 4.0 * fields.num_attention_heads * fields.head_dim * fields.num_layers * pairs
        head = 2.0 * active.head * response_tokens
        forward = 2.0 * (active.total - active.head) * tokens + head + attention
        again = {
            "none": 0.0,
            "selective": attention,
            "moe": 2.0 * active.moe * tokens,
            "full": forward - head,
        }[recompute]
        return cls(logprobs=forward, model=3 * forward, done=3 * forward + head + again)


# ---------------------------------------------------------------------------------------------------------------------
# One rank
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankResult:
    """What one variant's process measured. Plain numbers."""

    num_parameters: int
    lengths: list[int]
    response_tokens: int
    num_micro_batches: int
    setup_s: float  # from the start of the process to a policy with weights
    train_s: list[float]  # of each optimizer step
    logprobs_s: list[float]
    peak_bytes: int | None  # allocated on the device during the timed steps; None on a CPU
    resting_bytes: int | None  # between steps
    log_ratio_max: float  # of a sequence, in absolute value
    flash_attention: bool
    grouped_experts: int  # layers


@dataclass(frozen=True)
class Variant:
    """What is recomputed, and whether the optimizer works in host memory."""

    recompute: str
    offload: bool

    @classmethod
    def parse(cls, text: str) -> Variant:
        recompute = text.removesuffix(OFFLOAD)
        if recompute not in RECOMPUTE:
            raise UserError(
                f"--variants {text!r}: {recompute!r} is none of {', '.join(RECOMPUTE)}; "
                f"each may be followed by {OFFLOAD}, as in none{OFFLOAD}"
            )
        return cls(recompute, text.endswith(OFFLOAD))


def train_config(options: argparse.Namespace, folder: Path, variant: Variant) -> c.TrainConfig:
    """The run that the variant makes steps of."""
    return c.TrainConfig(
        run=c.RunConfig(folder=str(folder)),
        model=c.ModelConfig(path=str(folder), init="random", dtype=options.dtype),
        task=c.TaskConfig(name="none"),
        algorithm=c.AlgorithmConfig(mini_batches=1),
        data=c.DataConfig(token_budget=SIZES[options.size].token_budget),
        optimizer=c.OptimizerConfig(lr=1e-6),
        memory=c.MemoryConfig(
            recompute=variant.recompute,  # type: ignore[arg-type]
            offload_optimizer=float(variant.offload),
        ),
    )


def write_model(folder: Path, size: Size) -> None:
    """A Qwen3-MoE's config.json and a tokenizer. No weights: they are drawn by name, on each rank for itself."""
    from make_char_tokenizer import write as write_tokenizer
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        **size.hf_config,
        intermediate_size=4 * size.hf_config["hidden_size"],  # of dense layers: there are none
        norm_topk_prob=True,
        tie_word_embeddings=False,
        eos_token_id=1,
        pad_token_id=0,
    )
    write_tokenizer(folder)
    config.save_pretrained(folder)


def rollout_batch(size: Size) -> list[Rollout]:
    """Random tokens in sequences of evenly spread lengths; the first quarter of each is its prompt."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = size.hf_config["vocab_size"]
    sequences = []
    for index in range(size.num_sequences):
        length = int(torch.randint(size.shortest, size.longest + 1, (), generator=generator))
        tokens = torch.randint(2, vocabulary, (length,), generator=generator)
        advantage = torch.randn((), generator=generator)
        logprobs = torch.full((length,), -math.log(vocabulary))
        sequences.append(Rollout(index, tokens, torch.arange(length) >= length // 4, logprobs, advantage))
    return sequences


def measure(config: c.TrainConfig, size: Size, steps: int) -> RankResult:
    """Steps through the trainer, each on log-probabilities taken just before: the first ones to warm up."""
    start = time.perf_counter()
    from gspo_megatron.job import Job
    from gspo_megatron.policy.attention import uses_flash
    from gspo_megatron.policy.experts import GroupedExperts
    from gspo_megatron.policy.policy import StepResult
    from gspo_megatron.policy.runtime import initialize
    from gspo_megatron.tokenizer import Tokenizer
    from gspo_megatron.trainer import Trainer

    groups = initialize(config.parallel.layout(), seed=0, timeout_s=TIMEOUT_S)
    device = current_device()
    tokenizer = Tokenizer.load(config.model.path)
    trainer = Trainer(config, Job(config, groups, tokenizer, None, None, None, device))  # type: ignore[arg-type]
    policy = trainer.policy
    synchronize(device)
    setup_s = time.perf_counter() - start

    sequences = rollout_batch(size)
    [batch], _ = trainer.learn(sequences, 2)  # the first step

    results: list[StepResult] = []
    logprobs_s: list[float] = []
    train_s: list[float] = []
    log_ratios: list[float] = []
    for step in range(1, WARM_UP_STEPS + steps):
        if step == WARM_UP_STEPS and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        logprobs_s.append(seconds(lambda: policy.fill_old_logprobs([batch]), device))
        train_s.append(seconds(lambda: results.append(policy.train_step(batch, trainer.loss(batch))), device))
        result = results.pop()
        loss = sum(float(report.sums[0]) for report in result.reports)
        assert math.isfinite(loss) and 0 < result.grad_norm < math.inf, (loss, result.grad_norm)
        log_ratios.append(max(float(report.log_ratio.abs().max()) for report in result.reports))
    on_cuda = device.type == "cuda"
    query = torch.empty(1, 1, policy.fields.head_dim, dtype=DTYPES[config.model.dtype], device=device)
    modules = [module for chunk in policy.chunks for module in chunk.modules()]
    return RankResult(
        num_parameters=sum(p.numel() for p in policy.weights.parameters),
        lengths=[s.token_ids.numel() for s in sequences],
        response_tokens=sum(int(s.response_mask[1:].sum()) for s in sequences),
        num_micro_batches=len(batch.micro_batches),
        setup_s=setup_s,
        train_s=train_s[-steps:],
        logprobs_s=logprobs_s[-steps:],
        peak_bytes=torch.cuda.max_memory_allocated(device) if on_cuda else None,
        resting_bytes=torch.cuda.memory_allocated(device) if on_cuda else None,
        log_ratio_max=max(log_ratios),
        flash_attention=uses_flash(query),
        grouped_experts=sum(isinstance(module, GroupedExperts) for module in modules),
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long the work takes, on the device too."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def run_as_rank(options: argparse.Namespace) -> int:
    """What the launcher starts: measure, and leave the result in the folder."""
    with guard_rank(FailureBoard.from_environment()):
        result: RankResult | None = None
        try:
            config = train_config(options, options.folder, Variant.parse(options.measure))
            result = measure(config, SIZES[options.size], options.steps)
        except torch.OutOfMemoryError as error:
            print(f"{options.measure}: {error}", file=sys.stderr)
        (options.folder / "result.json").write_text(json.dumps(None if result is None else asdict(result)))
    end_process(EXIT_DONE)  # threads of open process groups may abort an interpreter that winds down
    raise AssertionError


# ---------------------------------------------------------------------------------------------------------------------
# All variants
# ---------------------------------------------------------------------------------------------------------------------


def run_variant(name: str, options: argparse.Namespace, folder: Path) -> RankResult | int | None:
    """Measure in a process of its own, so that memory is the variant's alone.

    Returns None where it did not fit into the device's memory, the launcher's exit code where that is not 0.
    """
    command = [sys.executable, __file__, "--measure", name, "--folder", str(folder), "--steps", str(options.steps)]
    command += ["--size", options.size, "--dtype", options.dtype]
    if exit_code := launch_local(1, command):
        return exit_code
    content = json.loads((folder / "result.json").read_text())
    return None if content is None else RankResult(**content)


def row(name: str, result: RankResult | None, fields: ModelFields, peak_flops: float | None) -> str:
    """One line of the table; – is what was not measured."""
    variant = Variant.parse(name)
    head = f"| {variant.recompute} | {'yes' if variant.offload else 'no'} |"
    if result is None:
        return head + " out of memory |" + " – |" * 8
    flops = StepFlops.of(fields, result.lengths, response_tokens=result.response_tokens, recompute=variant.recompute)
    tokens = sum(result.lengths)
    train_s, logprobs_s = statistics.median(result.train_s), statistics.median(result.logprobs_s)

    def utilization(done: float) -> str:
        return "–" if peak_flops is None else f"{done / train_s / peak_flops:.1%}"

    def gib(size: int | None) -> str:
        return "–" if size is None else f"{size / 2**30:.1f}"

    cells = [
        f"{train_s:.3f}",
        f"{tokens / train_s:,.0f}",
        f"{tokens / logprobs_s:,.0f}",
        f"{flops.model / train_s / 1e12:.4g}",
        utilization(flops.model),
        utilization(flops.done),
        gib(result.peak_bytes),
        gib(result.resting_bytes),
        f"{result.log_ratio_max:.1e}",
    ]
    return f"{head} {' | '.join(cells)} |"


def table(
    results: dict[str, RankResult | None], options: argparse.Namespace, fields: ModelFields, peak_flops: float | None
) -> str:
    """The report in Markdown."""
    device = current_device()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU, one thread"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "megatron-core"))
    measured = next((r for r in results.values() if r is not None), None)
    lines = [
        f"# Training a MoE on {where}",
        "",
        f"`tools/benchmark_training.py --size {options.size} --dtype {options.dtype}`, {datetime.date.today()}, "
        f"{versions}. One rank. " + ("" if measured is None else describe(measured, fields, options)),
        "",
        f"Medians of {options.steps} steps after {WARM_UP_STEPS}, the device waited for. A step is forward, backward "
        "and update; log-probabilities are a forward pass. TFLOP/s and MFU count the model's FLOPs, HFU also those of "
        "what is computed again, by the formulas at the top of the tool; "
        + (
            "no peak is known for this device and dtype."
            if peak_flops is None
            else f"peak {peak_flops / 1e12:g} TFLOP/s."
        ),
        "Memory is what torch has allocated on the device: the most during the steps, and between them. "
        "The weights are the same in a step and in the log-probabilities before it: log s, the mean of a sequence's "
        "log-ratios, is what two passes differ by, to be held against GSPO's clip of 3e-4.",
        "",
        "| recomputed | optimizer offloaded | s a step | tokens/s, step | tokens/s, log-probs | TFLOP/s | MFU | "
        "HFU | peak GiB | GiB between steps | largest \\|log s\\| |",
        "|" + "---|" * 11,
        *(row(name, result, fields, peak_flops) for name, result in results.items()),
    ]
    return "\n".join(lines) + "\n"


def describe(result: RankResult, fields: ModelFields, options: argparse.Namespace) -> str:
    """The model, the batch and the kernels in a sentence each."""
    active = ActiveParameters.of(fields).total
    lengths = result.lengths
    attention = "flash attention over packed sequences" if result.flash_attention else "scaled_dot_product_attention"
    return (
        f"A random Qwen3-MoE of {result.num_parameters / 1e6:,.1f} M parameters, {active / 1e6:,.1f} M of them "
        f"multiplied with each token ({fields.num_layers} layers, {fields.num_experts} experts, "
        f"{fields.experts_per_token} a token). {len(lengths)} sequences of {min(lengths)} to {max(lengths)} tokens, "
        f"{sum(lengths):,} in all, packed into {result.num_micro_batches} micro-batches of at most "
        f"{SIZES[options.size].token_budget}. Attention: {attention}; experts: grouped products in "
        f"{result.grouped_experts} layers."
    )


def find_peak(options: argparse.Namespace) -> float | None:
    """FLOP/s of this device in the dtype; None where they are not known."""
    if options.peak_tflops is not None:
        return float(options.peak_tflops) * 1e12
    device = current_device()
    if device.type != "cuda" or options.dtype != "bfloat16":
        return None
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "1b" if torch.cuda.is_available() else "tiny"
    parser.add_argument("--size", choices=sorted(SIZES), default=default, help="default: 1b on CUDA, else tiny")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="model.dtype; default: %(default)s")
    parser.add_argument("--variants", default=VARIANTS, help="separated by commas; default: %(default)s")
    parser.add_argument("--steps", type=int, default=5, help="timed steps; default: %(default)s")
    parser.add_argument("--peak-tflops", type=float, help="the device's peak, for MFU; default: by its name")
    parser.add_argument("--output", type=Path, help="write the table to this file too")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # how this program starts itself as a rank
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 1:
        raise UserError(f"--steps {options.steps} must be at least 1")
    if options.peak_tflops is not None and not options.peak_tflops > 0:
        raise UserError(f"--peak-tflops {options.peak_tflops} must be positive")
    for name in options.variants.split(","):
        if Variant.parse(name).offload and (options.dtype != "bfloat16" or not torch.cuda.is_available()):
            raise UserError(
                f"--variants {name} moves a bfloat16 model's main weights from a CUDA device; with --dtype "
                f"{options.dtype} on {current_device()} there is nothing to move; leave {OFFLOAD} out"
            )
    return options


def main() -> int:
    options = parse_arguments()
    quiet_libraries()
    if options.measure:
        return run_as_rank(options)
    from gspo_megatron.weights.families import load_fields

    results: dict[str, RankResult | None] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, SIZES[options.size])
        _, fields = load_fields(folder)
        for variant in options.variants.split(","):
            result = run_variant(variant, options, folder)
            if isinstance(result, int):
                return result
            results[variant] = result
            times = "out of memory" if result is None else f"{result.train_s[-1]:.3f} s a step"
            setup = "" if result is None else f", {result.setup_s:.0f} s to set up"
            print(f"{variant}: {times}{setup}", file=sys.stderr, flush=True)
    text = table(results, options, fields, find_peak(options))
    print(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")
    return EXIT_DONE


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
