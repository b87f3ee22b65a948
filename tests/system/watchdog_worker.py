"""Short real runs with a fault in them: the trainer's own loop, a hook around the real engine or the real policy."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gspo_megatron.config import TrainConfig
from gspo_megatron.config_io import dump_config, load_config
from gspo_megatron.job import open_job
from gspo_megatron.launch import single_rank_environment
from gspo_megatron.logs import quiet_libraries
from gspo_megatron.policy.step import LossFunction
from gspo_megatron.trainer import Trainer
from gspo_megatron.types import MicroBatch, NamedTensor, Rollout, StepBatch

CONFIG = Path(__file__).parents[2] / "examples" / "quickstart" / "gspo.toml"
ALONE = [
    *("--parallel.tensor=1", "--parallel.expert=1", "--eval.prompts=8", "--eval.every=0"),
    *("--optimizer.decay=constant", "--optimizer.min_lr=0"),
]


def stale_weights(trainer: Trainer) -> None:
    """The engine samples with the weights before the last update."""
    held: dict[str, Tensor] = {}

    def change(items: list[NamedTensor]) -> list[NamedTensor]:
        older = [NamedTensor(t.name, held.get(t.name, t.tensor)) for t in items]
        held.update({t.name: t.tensor.clone() for t in items})
        return older

    _change_weights(trainer, change)


def swapped_expert(trainer: Trainer) -> None:
    """The engine holds the weights of two experts in each other's place."""
    places = {".experts.2.": ".experts.5.", ".experts.5.": ".experts.2."}

    def change(items: list[NamedTensor]) -> list[NamedTensor]:
        by_name = {t.name: t.tensor for t in items}

        def source(name: str) -> str:
            here = next((p for p in places if p in name), None) if name.startswith("model.layers.1.") else None
            return name.replace(here, places[here]) if here else name

        return [NamedTensor(t.name, by_name[source(t.name)]) for t in items]

    _change_weights(trainer, change)


def _change_weights(trainer: Trainer, change: Callable[[list[NamedTensor]], list[NamedTensor]]) -> None:
    engine: Any = trainer.job.engine
    update = engine.update
    engine.update = lambda bucket: update(change(list(bucket)))


def temperature(trainer: Trainer) -> None:
    """The engine samples at another temperature than the trainer computes with."""
    engine: Any = trainer.job.engine
    generate = engine.generate
    engine.generate = lambda prompts, params: generate(prompts, replace(params, temperature=1.3))


def bf16_logprobs(trainer: Trainer) -> None:
    """The old log-probabilities went through bfloat16."""
    fill = trainer.policy.fill_old_logprobs

    def rounded(batches: Any, **more: Any) -> None:
        fill(batches, **more)
        for micro in (m for b in batches for m in b.micro_batches if m.old_logprobs is not None):
            micro.old_logprobs = micro.old_logprobs.bfloat16().float()

    trainer.policy.fill_old_logprobs = rounded  # type: ignore[method-assign]


def constant_reward(trainer: Trainer) -> None:
    """The scorer gives every response the same."""
    scorer = trainer.job.scorer
    assert scorer is not None
    score = scorer.score

    def same(groups: Any) -> Any:
        scored, report = score(groups)

        def constant(rollout: Rollout) -> Rollout:
            return replace(rollout, reward=1.0)

        return [replace(g, rollouts=[constant(r) for r in g.rollouts]) for g in scored], report

    scorer.score = same  # type: ignore[method-assign]


def nan_loss(trainer: Trainer) -> None:
    """The loss of mini-batch 2 of rollout batch 3 is NaN."""
    make, calls = trainer.loss, itertools.count(1)

    def poisoned(batch: StepBatch) -> LossFunction:
        loss = make(batch)
        if next(calls) != 2 * trainer.algorithm.mini_batches + 2:
            return loss

        def bad(logprobs: Tensor, entropy: Tensor, micro: MicroBatch) -> tuple[Tensor, Any]:
            value, report = loss(logprobs, entropy, micro)
            return value * torch.nan, report

        return bad

    trainer.loss = poisoned  # type: ignore[method-assign]


def nothing(trainer: Trainer) -> None:
    """A healthy run."""


FAULTS: dict[str, tuple[Callable[[Trainer], None], list[str]]] = {
    "healthy": (nothing, []),
    "stale": (stale_weights, []),
    "temperature": (temperature, []),
    "swapped": (swapped_expert, []),
    "bf16": (bf16_logprobs, []),
    "clip": (nothing, ["--algorithm.clip_low=0.2", "--algorithm.clip_high=0.2", "--algorithm.allow_unusual_clip=true"]),
    "lr": (nothing, ["--optimizer.lr=2e-2"]),
    "reward": (constant_reward, []),
    "nan": (nan_loss, []),
}


def run(fault: str, model: str, folder: str, seed: int, batches: int, more: list[str]) -> int:
    """The run of a fault; its exit code. Config and metrics are in `folder`."""
    hook, overrides = FAULTS[fault]
    arguments = [
        *ALONE, f"--model.path={model}", f"--run.folder={folder}", f"--run.seed={seed}",
        f"--train.rollout_batches={batches}", *overrides, *more,
    ]  # fmt: skip
    config = load_config(TrainConfig, CONFIG, arguments)
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "config.toml").write_text(dump_config(config))
    with single_rank_environment(), open_job(config) as job:
        trainer = Trainer(config, job)
        hook(trainer)
        return trainer.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("folder")
    parser.add_argument("--faults", nargs="+", default=list(FAULTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batches", type=int, default=8)
    options, more = parser.parse_known_args()
    quiet_libraries()
    for seed in options.seeds:
        for fault in options.faults:
            folder = f"{options.folder}/{fault}-{seed}"
            print(fault, seed, run(fault, options.model, folder, seed, options.batches, more), flush=True)


if __name__ == "__main__":
    main()
