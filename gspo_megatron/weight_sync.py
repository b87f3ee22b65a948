"""The policy's weights into the engines, and the proof that engine and trainer then agree."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from gspo_megatron.config import TrainConfig
from gspo_megatron.data.exchange import distribute
from gspo_megatron.errors import CauseError
from gspo_megatron.job import Job
from gspo_megatron.policy.policy import MegatronPolicy
from gspo_megatron.rollout.engine import SamplingParams
from gspo_megatron.rollout.sglang.engine import SGLangEngine
from gspo_megatron.types import Group, Prompt
from gspo_megatron.types import Sequence as TrainSequence

logger = logging.getLogger(__name__)

PROBE_TOKENS = 32  # of each probe's response at most
PROBE_WARNING = 0.05  # median |engine - trainer| from which the probe warns; routing flips move a few tokens only

Restore = Callable[[], object]
"""Brings engines that were lost back, with the present weights. Collective."""


@dataclass(frozen=True)
class SyncReport:
    """What one hand-over of the weights came to."""

    num_bytes: int  # the weights as each engine gets them
    is_probed: bool = False
    probe_max_abs: float | None = None  # largest |engine - trainer| of the probe's log-probabilities, if it came to one


def sync_weights(policy: MegatronPolicy, job: Job, version: int) -> SyncReport:
    """Bring every engine to the policy's weights. Collective; a failed update is made again by the engine's rules."""
    engine, feeding = job.engine, job.feeding
    plan = policy.weights.plan(feeding.feeds, dtype=feeding.dtype, bucket_bytes=feeding.bucket_bytes)
    complete = False
    while not complete:
        if job.config.sglang.colocate:
            policy.make_room()
        if engine is not None:
            engine.pause()
            engine.begin_update(version)
        for bucket in policy.export(plan):
            if engine is not None:
                engine.update(bucket)
        complete = engine is None or engine.end_update(policy.export)
    if engine is not None:
        engine.resume()
    return SyncReport(plan.num_bytes, is_probed=_is_probed(job), probe_max_abs=probe(policy, job))


def generate(
    job: Job, prompts: Sequence[Prompt], params: SamplingParams, restore: Restore | None = None
) -> list[Group]:
    """Groups of this head's prompts, [] on other ranks. Collective.

    Where engines are lost on the way, `restore` brings them back and what is missing is generated; what there is stays.
    """
    groups: dict[int, Group] = {}
    before, in_vain = -1, 0  # missing prompts of all heads the last time, and rounds since they became fewer
    while True:
        if job.groups.is_head and job.engine is not None:
            missing = [p for p in prompts if p.id not in groups]
            made = job.engine.generate(missing, params) if missing else []
            groups |= {group.prompt.id: group for group in made if group is not None}
        lost = len(prompts) - len(groups) if job.groups.is_head else 0
        if not isinstance(job.engine, SGLangEngine):
            assert lost == 0
            break
        job.engine.wait_for_all()
        total = torch.tensor(lost, device=job.device)
        dist.all_reduce(total, group=job.groups.world)
        if total == 0:
            break
        in_vain = in_vain + 1 if total == before else 0
        before = int(total)
        if restore is None or in_vain > job.config.sglang.retries:
            reasons = dict.fromkeys(reason for reasons in job.all_gather(job.engine.reasons) for reason in reasons)
            raise CauseError(f"{before} prompts could not be answered by any server: {'; '.join(reasons)}")
        if job.groups.rank == 0:
            logger.warning("%d prompts wait for servers that were lost", before)
        restore()
    return [groups[p.id] for p in prompts] if job.groups.is_head else []


def probe(policy: MegatronPolicy, job: Job) -> float | None:
    """Largest difference of log-probabilities between each server and the trainer, on responses to fixed prompts.

    Collective. Each head asks some of the servers; a mapping that moves weights to the wrong place shows here.
    """
    engine, config = job.engine, job.config
    if not _is_probed(job):
        return None
    assert isinstance(engine, SGLangEngine) and isinstance(config, TrainConfig)
    layout = job.groups.layout
    sequences: list[TrainSequence] = []
    asked = 0
    if job.groups.is_head:
        prompts = job.task.prompts("heldout", 0, config.sglang.probe_prompts)
        params = SamplingParams(
            num_samples=1,
            temperature=config.rollout.temperature,
            max_response_tokens=min(PROBE_TOKENS, config.rollout.max_response_tokens),
            stop_token_ids=job.tokenizer.stop_token_ids,
            seed=config.run.seed,
        )
        servers = list(range(job.groups.coordinates.data, len(engine.served), layout.data))
        answered = engine.probe(prompts, params, servers)
        asked = len(servers) * len(prompts)
        for server, groups in zip(servers, answered, strict=True):
            for i, group in enumerate(groups):
                if group is not None:
                    [rollout] = group.rollouts
                    index = server * len(prompts) + i
                    zero = torch.zeros(())
                    sequences.append(
                        TrainSequence(index, rollout.token_ids, rollout.response_mask, rollout.rollout_logprobs, zero)
                    )
    counts = torch.tensor([asked, len(sequences)], device=job.device)
    dist.all_reduce(counts, group=job.groups.world)
    if counts[0] != counts[1]:
        return None  # the engine has said why
    gaps = _gaps(policy, job, sequences)
    if job.groups.rank == 0 and not float(gaps.median()) <= PROBE_WARNING:  # NaN neither
        logger.warning(
            "after weight update %d the servers' log-probabilities differ from the trainer's by %.3g in the median: "
            "engine and trainer do not compute the same model",
            engine.version,
            float(gaps.median()),
        )
    return float(gaps.max())


def _is_probed(job: Job) -> bool:
    is_training = isinstance(job.config, TrainConfig)
    return isinstance(job.engine, SGLangEngine) and is_training and job.config.sglang.probe_prompts > 0


def _gaps(policy: MegatronPolicy, job: Job, sequences: list[TrainSequence]) -> torch.Tensor:
    """|engine - trainer| of every response token of all heads' sequences, on every rank."""
    batches = distribute(
        sequences,
        job.groups,
        mini_batches=1,
        token_budget=job.config.data.token_budget,
        pad_token_id=job.tokenizer.pad_token_id,
        device=job.device,
    )
    policy.fill_old_logprobs(batches, replay=False)
    mine: list[float] = []
    if job.groups.is_last_stage and job.groups.coordinates.tensor == 0:
        for micro in batches[0].micro_batches:
            assert micro.old_logprobs is not None
            gap = (micro.old_logprobs - micro.rollout_logprobs).abs()[micro.response_mask]
            mine += gap.tolist()
    gaps = [gap for part in job.all_gather(mine) for gap in part]
    return torch.tensor(gaps or [math.nan])
