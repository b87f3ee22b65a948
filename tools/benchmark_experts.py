#!/usr/bin/env python
"""Seconds of forward and backward of a MoE layer's experts: grouped products beside Megatron's loop over experts.

    .venv/bin/python tools/benchmark_experts.py [--dtype bfloat16] [--repeats 7] [--shape 64x1024x64x32 …]

A shape is experts × tokens × hidden × ffn; tokens are those that arrive at the experts (after top-k), spread over
them at random. Prints a table in markdown: medians over repeats that alternate between the two, and their ratio.
Runs in one process, on CUDA where it is there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from gspo_megatron.device import DTYPES, current_device
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.policy.experts import GroupedExperts
from gspo_megatron.policy.runtime import initialize, shutdown
from gspo_megatron.weights.grouped import misaligned

Shape = tuple[int, int, int, int]  # experts, tokens, hidden, ffn
DTYPE_NAMES = ["float32", "bfloat16"]
SHAPES: list[Shape] = [
    (8, 512, 32, 24),
    (32, 1024, 64, 64),
    (128, 1024, 64, 64),
    (8, 512, 256, 512),
    (64, 2048, 256, 128),
    (16, 2048, 512, 256),
]


def parse_shape(text: str) -> Shape:
    experts, tokens, hidden, ffn = (int(part) for part in text.split("x"))
    return experts, tokens, hidden, ffn


def make_modules(shape: Shape, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """Both modules on the current device, with weights of usual size."""
    experts, _, hidden, ffn = shape
    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=1,
        num_moe_experts=experts,
        moe_router_topk=2,
        moe_ffn_hidden_size=ffn,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
    )
    groups = get_default_pg_collection()
    spec = get_moe_module_spec(use_te=False, num_experts=experts).submodules.experts
    modules = {
        "sequential": build_module(spec, experts, config, pg_collection=groups),
        "grouped": GroupedExperts(experts, config, pg_collection=groups),
    }
    for module in modules.values():
        module.to(current_device())
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=hidden**-0.5)
    return modules


def measure(shape: Shape, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Median seconds of forward and backward of each module."""
    experts, tokens, hidden, _ = shape
    device = current_device()
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.randint(experts, (tokens,), generator=generator), minlength=experts)
    hidden_states = torch.randn(tokens, hidden, generator=generator).to(device, dtype).requires_grad_()
    probs = torch.rand(tokens, generator=generator).to(device).requires_grad_()
    upstream = torch.randn(tokens, hidden, generator=generator).to(device, dtype)
    modules = make_modules(shape, dtype)

    def run(module: Any) -> float:
        module.zero_grad()
        hidden_states.grad = probs.grad = None
        synchronize(device)
        start = time.perf_counter()
        module(hidden_states, counts, probs)[0].backward(upstream)
        synchronize(device)
        return time.perf_counter() - start

    for module in modules.values():  # not timed: the first run allocates
        run(module)
    times: dict[str, list[float]] = {name: [] for name in modules}
    for _ in range(repeats):
        for name, module in modules.items():
            times[name].append(run(module))
    return {name: statistics.median(values) for name, values in times.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dtype", choices=sorted(DTYPES), action="append", help="default: each")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--shape", type=parse_shape, action="append", help="experts x tokens x hidden x ffn, as 64x1024x64x32"
    )
    options = parser.parse_args()

    for dtype in options.dtype or DTYPE_NAMES:
        for _, _, hidden, ffn in options.shape or SHAPES:
            if refusal := misaligned(hidden, ffn, DTYPES[dtype]):
                parser.error(refusal)

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    initialize(ParallelLayout(), seed=0, timeout_s=60)
    device = current_device()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"Forward and backward of the experts on {where}, torch {torch.__version__}: median of {options.repeats}.\n")
    print("| dtype | experts | tokens | hidden | ffn | loop over experts, ms | grouped, ms | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype in options.dtype or DTYPE_NAMES:
        for shape in options.shape or SHAPES:
            seconds = measure(shape, DTYPES[dtype], options.repeats)
            sizes = " | ".join(str(size) for size in shape)
            loop, grouped = seconds["sequential"], seconds["grouped"]
            print(f"| {dtype} | {sizes} | {1e3 * loop:.2f} | {1e3 * grouped:.2f} | {loop / grouped:.2f} |", flush=True)
    shutdown()


if __name__ == "__main__":
    main()
