"""Held-out evaluation: avg@k and pass@k with a confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gspo_megatron.config import OptimizerConfig, TrainConfig
from gspo_megatron.errors import UserError
from gspo_megatron.job import Job, open_job
from gspo_megatron.policy.policy import MegatronPolicy
from gspo_megatron.rollout.engine import SamplingParams
from gspo_megatron.weight_sync import Restore, generate, sync_weights

CORRECT = 1.0 - 1e-6  # a reward from which pass@k counts a response as solved


@dataclass(frozen=True)
class EvalResult:
    """Rewards of the held-out prompts."""

    mean: float  # avg@k: over prompts, of the mean reward of their samples
    ci95: float  # half-width of the 95 % interval of the mean, over prompts; NaN with a single one
    pass_at: dict[int, float]  # k -> unbiased estimate that one of k samples is correct
    num_prompts: int
    num_samples: int
    num_failed: int  # responses without a reward: the scorer failed or timed out

    def __str__(self) -> str:
        passes = ", ".join(f"pass@{k} {p:.3f}" for k, p in self.pass_at.items())
        failed = f", {self.num_failed} not scored" if self.num_failed else ""
        return (
            f"held-out avg@{self.num_samples} {self.mean:.3f} ± {self.ci95:.3f} (95 %), {passes}, "
            f"{self.num_prompts} prompts{failed}"
        )


def summarize(rewards: Sequence[Sequence[float | None]]) -> EvalResult:
    """`rewards` holds the samples of each prompt; None where there is no reward. Those count in no mean."""
    scored = [[r for r in samples if r is not None] for samples in rewards]
    num_failed = sum(len(samples) for samples in rewards) - sum(len(s) for s in scored)
    means = [sum(s) / len(s) for s in scored if s]
    if not means:
        raise RuntimeError("not one held-out response could be scored")
    mean = sum(means) / len(means)
    # One prompt tells nothing about the spread over prompts.
    variance = sum((m - mean) ** 2 for m in means) / (len(means) - 1) if len(means) > 1 else math.nan
    k_max = min((len(s) for s in scored if s), default=1)
    pass_at = {}
    for k in (2**i for i in range(k_max.bit_length())):
        solved = [_pass_at_k(len(s), sum(r >= CORRECT for r in s), k) for s in scored if s]
        pass_at[k] = sum(solved) / len(solved)
    return EvalResult(
        mean, 1.96 * math.sqrt(variance / len(means)), pass_at, len(means), max(len(s) for s in rewards), num_failed
    )


def _pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), eq. 1."""
    return 1.0 if n - correct < k else 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def evaluate(job: Job, restore: Restore | None = None) -> EvalResult:
    """Sample the held-out prompts from the engines' present weights. Collective; the same result on every rank. For
    `restore` see `generate`."""
    settings = job.config.eval
    mine = []
    if job.groups.is_head:
        prompts = job.task.prompts("heldout", 0, settings.prompts)
        mine = [prompts[i] for i in job.share(len(prompts))]
    params = SamplingParams(
        num_samples=settings.samples,
        temperature=settings.temperature,
        max_response_tokens=job.config.rollout.max_response_tokens,
        stop_token_ids=job.tokenizer.stop_token_ids,
        seed=1_000_003 * (job.config.run.seed + 1) + job.groups.coordinates.data,
    )
    generated = generate(job, mine, params, restore)
    record = None
    if job.scorer is not None:
        groups, report = job.scorer.score(generated)
        record = [[rollout.reward for rollout in group.rollouts] for group in groups], report.first_error
    records = job.all_gather(record)
    rewards = [samples for part, _ in records for samples in part]
    if not any(reward is not None for samples in rewards for reward in samples):
        errors = [error for _, error in records if error]
        raise UserError(
            f"not one of {sum(map(len, rewards))} held-out responses could be scored; first error: {errors[0]}"
            if errors
            else "there are no held-out prompts to evaluate on; give task.eval_dataset or a positive task.holdout"
        )
    return summarize(rewards)


def run(config: TrainConfig) -> None:
    """The `eval` command on one rank: score the model folder on the held-out split."""
    with open_job(config) as job:
        policy = MegatronPolicy(
            config.model, OptimizerConfig(), job.groups, seed=config.run.seed, total_steps=1
        )  # through Megatron, so that what is evaluated is what would be trained
        sync_weights(policy, job, version=0)
        result = evaluate(job)
        if job.groups.rank == 0:
            print(result, flush=True)
