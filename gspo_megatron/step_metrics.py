"""What a rollout batch reports, defined so that it is the same in every parallel layout.

Each rank keeps sums, maxima and per-sequence values apart; rank 0 puts them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.algorithms import Algorithm, Mismatch, Objective, objective
from gspo_megatron.experience import Experience
from gspo_megatron.groups import ProcessGroups
from gspo_megatron.ops.reference import sequence_of_token, sums_per_sequence
from gspo_megatron.policy.policy import MegatronPolicy, StepResult
from gspo_megatron.policy.router import RouterLosses
from gspo_megatron.policy.step import LossFunction
from gspo_megatron.stability.divergence import agreement, agreement_sums, divergence_sums
from gspo_megatron.stability.gradients import expert_spread, largest
from gspo_megatron.stability.ratios import clip_fractions, ratio_spread
from gspo_megatron.stability.routing import count_routes
from gspo_megatron.types import MicroBatch, StepBatch

SUMS = (
    "loss",
    "entropy",
    "tokens",
    "kl_reference",  # NaN: there is no reference
    "mismatch_k1",
    "mismatch_k3",
    "staleness_k1",
    "staleness_k3",
    "total_k1",
    "total_k3",
    "x",  # of `agreement_sums`
    "y",
    "xx",
    "yy",
    "xy",
)


@dataclass(frozen=True)
class MicroStats:
    """One micro-batch of one optimizer step, over all context-parallel ranks. On the device; read once per rollout
    batch."""

    sequence_ids: Tensor  # [S]
    log_ratio: Tensor  # [S]
    clipped: Tensor  # [S] bool
    clipped_tokens: Tensor  # [S]
    num_tokens: Tensor  # [S]
    advantages: Tensor  # [S]
    sums: Tensor  # [15] SUMS, over response tokens but for the losses
    maxima: Tensor  # [2] token log-ratio, |engine - trainer|


def observe(
    micro: MicroBatch,
    logprobs: Tensor,
    entropy: Tensor,
    result: Objective,
    *,
    cp_group: dist.ProcessGroup | None = None,
) -> MicroStats:
    """Collect a micro-batch's figures without synchronising with the device. Collective over `cp_group`."""
    mask, stats = micro.response_mask, result.stats
    assert micro.old_logprobs is not None
    zero = torch.zeros_like(micro.old_logprobs)
    gap = torch.where(mask, micro.old_logprobs - micro.rollout_logprobs, zero)
    token_log_ratio = torch.where(mask, logprobs.detach() - micro.old_logprobs, -torch.inf)  # 0 would be a ratio of 1
    sequences = sequence_of_token(micro.cu_seqlens, mask.numel())

    def per_sequence(values: Tensor) -> Tensor:
        return sums_per_sequence(values.double()[None], sequences, micro.sequence_ids.numel())[0, :-1]

    clipped_tokens = per_sequence(stats.clipped_tokens & mask)
    is_per_token = micro.advantages.numel() != micro.sequence_ids.numel()
    advantage_sums = per_sequence(torch.where(mask, micro.advantages, zero)) if is_per_token else clipped_tokens * 0
    sums = torch.stack(
        [
            result.loss.detach().double(),
            torch.where(mask, entropy.detach(), zero).double().sum(),
            mask.double().sum(),
            torch.full_like(zero[0], torch.nan).double() if result.kl is None else result.kl.double(),
            *divergence_sums(logprobs, micro.old_logprobs, micro.rollout_logprobs, mask).flatten(),
            *agreement_sums(micro.old_logprobs, micro.rollout_logprobs, mask),
        ]
    )
    maxima = torch.stack([token_log_ratio.max(), gap.abs().max()])
    if cp_group is not None:
        flat = torch.cat([sums, clipped_tokens, advantage_sums])
        dist.all_reduce(flat, group=cp_group)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=cp_group)
        sums, clipped_tokens, advantage_sums = flat.split([sums.numel(), *[clipped_tokens.numel()] * 2])
    return MicroStats(
        sequence_ids=micro.sequence_ids,
        log_ratio=stats.log_ratio.detach(),
        clipped=stats.clipped,
        clipped_tokens=clipped_tokens,
        num_tokens=stats.num_response_tokens,
        advantages=advantage_sums / stats.num_response_tokens.clamp(min=1) if is_per_token else micro.advantages,
        sums=sums,
        maxima=maxima,
    )


def observed_loss(
    algorithm: Algorithm,
    mismatch: Mismatch,
    *,
    num_sequences: int,
    num_tokens: int | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> LossFunction:
    """The algorithm's whole loss on one micro-batch; its report is a MicroStats."""

    def loss(logprobs: Tensor, entropy: Tensor, micro: MicroBatch) -> tuple[Tensor, MicroStats]:
        result = objective(
            algorithm,
            logprobs,
            entropy,
            micro,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            mismatch=mismatch,
            cp_group=cp_group,
        )
        return result.loss, observe(micro, logprobs, entropy, result, cp_group=cp_group)

    return loss


def routing_replayed(steps: Sequence[float | None]) -> dict[str, float | None]:
    """The metric of routing replay, mean over optimizer steps; None where it is off."""
    measured = [x for x in steps if x is not None]
    return {"routing_replayed_fraction": sum(measured) / len(measured) if measured else None}


def router_losses(steps: Sequence[RouterLosses]) -> dict[str, float | None]:
    """The metrics of the routers' losses, mean over optimizer steps."""
    row = {}
    for key, values in (("router_aux_loss", [s.aux for s in steps]), ("router_z_loss", [s.z for s in steps])):
        measured = [x for x in values if x is not None]
        row[key] = sum(measured) / len(measured) if measured else None
    return row


def gather_routes(batches: Sequence[StepBatch], policy: MegatronPolicy, groups: ProcessGroups) -> Tensor:
    """Counts of the routes recorded before the updates and of those after them, by a forward pass; the same on every
    rank, see stability/routing.py. Collective."""
    micros = [micro for batch in batches for micro in batch.micro_batches]
    after = [routes for batch in policy.routes(batches) for routes in batch]
    layers, experts = policy.route_shape.num_layers, policy.fields.num_experts or 0
    counts = count_routes(micros, after, num_layers=layers, num_experts=experts, device=policy.device)
    dist.all_reduce(counts, group=groups.world)
    return counts


@dataclass
class RankRecord:
    """What one rank sends to rank 0 for one rollout batch. Plain numbers."""

    # of the loss-reporting ranks, one list entry per mini-batch
    sequences: list[dict[str, list[float]]] = field(default_factory=list)
    sums: list[list[float]] = field(default_factory=list)
    maxima: list[list[float]] = field(default_factory=list)
    padding_tokens: int = 0
    packed_tokens: int = 0
    # of the heads
    rewards: list[list[float | None]] = field(default_factory=list)
    response_lengths: list[int] = field(default_factory=list)
    truncated: int = 0
    failed: int = 0
    timed_out: int = 0
    first_error: str | None = None
    # of all
    engine_bytes: int = 0


def record(
    reports: Sequence[Sequence[MicroStats]], experience: Experience, *, padding: tuple[int, int], engine_bytes: int
) -> RankRecord:
    """This rank's record; `reports` holds the micro-batches of each mini-batch, [] away from the last stage."""
    out = RankRecord(padding_tokens=padding[0], packed_tokens=padding[1], engine_bytes=engine_bytes)
    for micros in reports:
        if not micros:
            continue
        real = [m.sequence_ids >= 0 for m in micros]
        names = ("sequence_ids", "log_ratio", "clipped", "clipped_tokens", "num_tokens", "advantages")
        out.sequences.append(
            {
                name: torch.cat(
                    [getattr(m, name)[keep].double() for m, keep in zip(micros, real, strict=True)]
                ).tolist()
                for name in names
            }
        )
        out.sums.append(torch.stack([m.sums for m in micros]).sum(0).tolist())
        out.maxima.append(torch.stack([m.maxima for m in micros]).amax(0).tolist())
    for group in experience.groups:
        out.rewards.append([r.reward for r in group.rollouts])
        out.response_lengths += [int(r.response_mask.sum()) for r in group.rollouts]
        out.truncated += sum(r.finish_reason == "length" for r in group.rollouts)
    out.failed, out.timed_out = experience.score.num_failed, experience.score.num_timed_out
    out.first_error = experience.score.first_error
    return out


KL_METRICS = {
    "kl_rollout_trainer": "mismatch_k3",
    "kl_rollout_trainer_k1": "mismatch_k1",
    "kl_staleness": "staleness_k3",
    "kl_staleness_k1": "staleness_k1",
    "kl_total": "total_k3",
    "kl_total_k1": "total_k1",
}


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The values of several parts of a batch's sequences, one after the other."""
    return {name: torch.cat([torch.as_tensor(part[name], dtype=torch.float64) for part in parts]) for name in parts[0]}


def _clip_fractions(values: dict[str, Tensor]) -> dict[str, float | None]:
    return clip_fractions(
        values["clipped"].bool(), values["clipped_tokens"], values["num_tokens"], values["advantages"]
    )


def without_recompute(row: dict[str, Any]) -> dict[str, Any]:
    """The row of a batch whose old log-probs are the engine's: engine and trainer were not compared, and what looks
    like staleness is the total."""
    parts = ("kl_rollout_trainer", "kl_rollout_trainer_k1", "kl_staleness", "kl_staleness_k1", "sync_probe_max_abs")
    both = ("rollout_trainer_correlation", "rollout_trainer_slope")
    return {key: value for key, value in row.items() if key not in parts + both}


def of_steps(results: Sequence[StepResult]) -> dict[str, Any]:
    """What every rank knows of the batch's optimizer steps."""
    norms = torch.tensor([r.grad_norm for r in results], dtype=torch.float64)
    finite = norms[norms.isfinite()]
    taken = [r.expert_gradient_norms for r in results if not r.is_skipped]
    experts = expert_spread([norms for norms in taken if norms is not None])
    return {
        "grad_norm": float(finite.mean()) if finite.numel() else None,
        "grad_norm_max": float(norms.max()),  # NaN if one is
        "skipped_steps": sum(r.is_skipped for r in results),
        "learning_rate": results[-1].learning_rate,
        "expert_gradient_spread": largest(experts),
        "expert_gradient_spread_layers": experts,
        **router_losses([r.router_losses for r in results]),
        **routing_replayed([r.routing_replayed for r in results]),
    }


def summarize(records: Sequence[RankRecord]) -> dict[str, Any]:
    """The metrics of one rollout batch from all ranks' records."""
    row: dict[str, Any] = {}
    training = [r for r in records if r.sequences]
    parts = [_joined([r.sequences[j] for r in training]) for j in range(len(training[0].sequences))]
    whole = _joined(parts)
    row |= _clip_fractions(whole)
    of_each = [_clip_fractions(part) for part in parts]
    row |= {f"{key}_mini_batches": [part[key] for part in of_each] for key in of_each[0]}
    mini_batch = [j for j, part in enumerate(parts) for _ in part["log_ratio"]]
    row |= ratio_spread(whole["log_ratio"], whole["num_tokens"], torch.tensor(mini_batch))
    values = torch.tensor([r.sums for r in training], dtype=torch.float64).sum(0)  # [mini-batches, SUMS]
    sums = dict(zip(SUMS, values.unbind(1), strict=True))
    maxima = torch.tensor([r.maxima for r in training], dtype=torch.float64).amax((0, 1))
    row["loss"] = float(sums["loss"].mean())
    if not sums["kl_reference"].isnan().all():
        row["kl_reference"] = float(sums["kl_reference"].mean())
    tokens = sums["tokens"].sum()
    if tokens > 0:
        row["entropy"] = float(sums["entropy"].sum() / tokens)
        for key, name in KL_METRICS.items():
            row[key] = float(sums[name].sum() / tokens)
        of_tokens = [float(sums[name].sum()) for name in ("x", "y", "xx", "yy", "xy")]
        row["rollout_trainer_correlation"], row["rollout_trainer_slope"] = agreement(of_tokens, float(tokens))
        row["token_ratio_max"] = float(maxima[0].exp())
        row["sync_probe_max_abs"] = float(maxima[1])
    starts = [r.sequences[0] for r in training]
    first = [abs(x) for p in starts for x, n in zip(p["log_ratio"], p["num_tokens"], strict=True) if n > 0]
    row["old_logprob_gap_first_mini_batch"] = max(first, default=None)
    row["padding_fraction"] = sum(r.padding_tokens for r in training) / sum(r.packed_tokens for r in training)

    groups = [[x for x in g if x is not None] for r in records for g in r.rewards]
    rewards = torch.tensor([x for g in groups for x in g], dtype=torch.float64)
    if rewards.numel():
        row["reward_mean"] = float(rewards.mean())
        row["reward_std"] = float(rewards.std(unbiased=False))
    lengths = [n for r in records for n in r.response_lengths]
    row["response_length_mean"] = sum(lengths) / len(lengths)
    row["truncated_fraction"] = sum(r.truncated for r in records) / len(lengths)
    row["zero_variance_group_fraction"] = sum(not g or min(g) == max(g) for g in groups) / len(groups)
    row["num_failed_rewards"] = sum(r.failed for r in records)
    row["num_timed_out_rewards"] = sum(r.timed_out for r in records)
    row["reshard_bytes"] = max(r.engine_bytes for r in records)
    row["response_tokens"] = sum(lengths)
    return row
