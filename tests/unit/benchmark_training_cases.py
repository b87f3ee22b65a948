"""What tests/unit/test_benchmark_training.py runs in a process of its own."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from megatron.core import parallel_state
from torch.utils.flop_counter import FlopCounterMode

from gspo_megatron.config import KernelsConfig
from gspo_megatron.device import current_device
from gspo_megatron.job import Job
from gspo_megatron.policy.runtime import initialize
from gspo_megatron.tokenizer import Tokenizer
from gspo_megatron.trainer import Trainer
from gspo_megatron.types import StepBatch

TOOLS = str(Path(__file__).parents[2] / "tools")


def counted_products(recompute: str) -> dict[str, float]:
    """FLOPs of the matrix products that torch counts in the log-probability pass and in a step of the tiny model,
    beside the formula's without attention, which torch does not count here."""
    if TOOLS not in sys.path:
        sys.path.insert(0, TOOLS)
    import benchmark_training as tool

    size, variant = tool.SIZES["tiny"], tool.Variant(recompute, offload=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tool.write_model(folder, size)
        config = tool.train_config(tool.argparse.Namespace(size="tiny", dtype="float32"), folder, variant)
        # torch counts no grouped products, and none inside an operator of ours.
        config = replace(
            config, model=replace(config.model, experts="sequential"), kernels=KernelsConfig("reference", False)
        )
        parallel_state.destroy_model_parallel()
        groups = initialize(config.parallel.layout(), seed=0, timeout_s=60)
        job = Job(config, groups, Tokenizer.load(str(folder)), None, None, None, current_device())  # type: ignore[arg-type]
        trainer = Trainer(config, job)
    sequences = tool.rollout_batch(size)
    [batch], _ = trainer.learn(sequences, 2)
    lengths = [s.token_ids.numel() for s in sequences]
    responses = sum(int(s.response_mask[1:].sum()) for s in sequences)
    flops = tool.StepFlops.of(trainer.policy.fields, lengths, response_tokens=responses, recompute=recompute)
    active = tool.ActiveParameters.of(trainer.policy.fields)
    products = 2 * (active.total - active.head) * sum(lengths) + 2 * active.head * responses
    attention = flops.logprobs - products
    passes = 4 if recompute in ("selective", "full") else 3  # of attention, in forward's FLOPs
    return {
        "logprobs": _counted(trainer, batch, train=False),
        "logprobs formula": flops.logprobs - attention,
        "step": _counted(trainer, batch, train=True),
        "step formula": flops.done - passes * attention,
    }


def _counted(trainer: Trainer, batch: StepBatch, *, train: bool) -> float:
    with FlopCounterMode(display=False) as counter:
        if train:
            trainer.policy.train_step(batch, trainer.loss(batch))
        else:
            trainer.policy.fill_old_logprobs([batch])
    kinds = {str(kind): count for kind, count in counter.get_flop_counts()["Global"].items()}
    assert not [kind for kind in kinds if "attention" in kind], kinds
    return float(sum(kinds.values()))
