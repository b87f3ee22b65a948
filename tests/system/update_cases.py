"""What each training rank does in the tests of weight updates to real servers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from gspo_megatron.config import (
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    SGLangConfig,
    TaskConfig,
    TrainConfig,
)
from gspo_megatron.job import build_job
from gspo_megatron.policy.policy import MegatronPolicy
from gspo_megatron.weight_sync import sync_weights
from gspo_megatron.weights.gather import FlatBucket, GatheredBucket
from tests.distributed.cases import join


def update(
    layout: dict[str, int],
    folder: str,
    run_folder: str,
    sglang: dict[str, Any],
    sabotage: str = "",
    versions: int = 1,
) -> dict[str, Any]:
    """Load a folder into Megatron and bring its weights to servers.

    `sabotage`: "mapping" exports one expert under another's name, which the trainer itself believes; "buffer" changes
    what is sent on its way.
    """
    groups = join(layout)
    config = TrainConfig(
        run=RunConfig(folder=run_folder),
        model=ModelConfig(path=folder),
        task=TaskConfig(name="reasoning_gym", dataset="spell_backward"),
        rollout=RolloutConfig(engine="sglang", max_response_tokens=32),
        sglang=SGLangConfig(**sglang),
        eval=EvalConfig(prompts=8),
    )
    policy = MegatronPolicy(config.model, OptimizerConfig(), groups, seed=0, total_steps=10)
    if sabotage == "mapping":
        _swap_experts(policy)
    report = None
    plan = None
    with build_job(config, groups) as job:
        if sabotage == "buffer":
            _corrupt(policy)
        for version in range(versions):
            report = sync_weights(policy, job, version)
        assert job.engine is not None and report is not None
        plan = policy.weights.plan(job.feeding.feeds, dtype=job.feeding.dtype, bucket_bytes=job.feeding.bucket_bytes)
        return {
            "probe": report.probe_max_abs,
            "num_bytes": report.num_bytes,
            "sent_bytes": plan.sent_bytes(0).get(groups.rank, 0),
            "steps": len(plan.steps),
            "engine": job.engine.name,
        }


def _swap_experts(policy: MegatronPolicy) -> None:
    """Exchange the HF names of two experts of the first layer, one weight each."""
    specs = policy.weights.specs
    first, second = (
        next(i for i, s in enumerate(specs) if s.layer == 0 and s.expert == e and "fc2" in s.megatron) for e in (0, 1)
    )
    one, other = specs[first], specs[second]
    specs[first], specs[second] = replace(one, hf=other.hf), replace(other, hf=one.hf)


def _corrupt(policy: MegatronPolicy) -> None:
    """Flip one bit of the first bucket that each rank sends; what is checked is left alone."""
    export = policy.weights.export
    sending: list[Any] = []  # the plan of the update: the first that is carried out
    sent = [0]

    def wrong(plan: Any, local: Any = None) -> Iterator[GatheredBucket]:
        sending[:] = sending or [plan]
        for bucket in export(plan, local):
            if plan is sending[0] and bucket.bucket is not None and sent[0] == 0:
                sent[0] += 1
                yield _FlippedBucket(bucket)  # type: ignore[misc]
            else:
                yield bucket

    policy.weights.export = wrong  # type: ignore[method-assign]


class _FlippedBucket:
    def __init__(self, bucket: GatheredBucket) -> None:
        self._bucket = bucket

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bucket, name)

    def assemble(self) -> FlatBucket:
        flat = self._bucket.assemble()
        flat.flat[2] ^= 1
        return flat
