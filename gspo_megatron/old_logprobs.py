"""Where the old policy's log-probabilities come from: the trainer's recompute, or the engine, behind a gate."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from gspo_megatron.algorithms import Algorithm
from gspo_megatron.algorithms.tokens import Responses
from gspo_megatron.config import AlgorithmConfig
from gspo_megatron.errors import UserError
from gspo_megatron.groups import ProcessGroups
from gspo_megatron.policy.policy import MegatronPolicy
from gspo_megatron.stability.divergence import divergence_sums
from gspo_megatron.stability.gate import BEARABLE_SHARE, clipped_by_mismatch, largest_kl
from gspo_megatron.types import StepBatch

logger = logging.getLogger(__name__)


class OldLogprobs:
    """Fills in old_logprobs by `algorithm.old_logprobs`. Every method is collective over all ranks.

    The first rollout batch and every n-th one are recomputed and measured: KL(engine ‖ trainer) per token, as k3,
    against what the clip bears (stability/gate.py). So is the first of a resumed run, where the engine may be another;
    if it passes, the batch trains on what it would have without the break.
    """

    def __init__(
        self, config: AlgorithmConfig, algorithm: Algorithm, policy: MegatronPolicy, groups: ProcessGroups
    ) -> None:
        self.config, self.algorithm, self.policy, self.groups = config, algorithm, policy, groups
        self.is_open = False  # whether the engine's passed the last time; a checkpoint keeps it
        self._has_measured = False  # in this start
        self._recompute_s = 0.0  # the last time

    def fill(self, batches: Sequence[StepBatch], batch: int, *, record_routes: bool = False) -> float | None:
        """Set old_logprobs of every micro-batch, on the last pipeline stage, for rollout batch `batch`, from 1.

        With `record_routes` the trainer's pass is taken in any case, for `recorded`; which log-probabilities are used
        does not depend on it.

        Returns:
            The seconds that the engine's log-probabilities saved, 0 if the pass was taken all the same; None where the
            trainer's are used.

        Raises:
            UserError: under "rollout", the engine's are too far from the trainer's.
        """
        if self.config.old_logprobs == "recompute":
            self.policy.fill_old_logprobs(batches, record_routes=record_routes)
            return None
        start = time.perf_counter()
        is_due = (batch - 1) % self.config.old_logprobs_every == 0
        takes_engines = self.is_open and not is_due
        measures = not takes_engines or not self._has_measured
        if measures or record_routes:
            self.policy.fill_old_logprobs(batches, record_routes=record_routes)
        if measures:
            measured = self._measure(batches)
            self._recompute_s = time.perf_counter() - start
            if measured is not None:
                self._settle(batch, *measured)
        if not takes_engines or not self.is_open:
            return None
        for micro in (m for b in batches for m in b.micro_batches if self.groups.is_last_stage):
            micro.old_logprobs = micro.rollout_logprobs.clone()
        return 0.0 if measures or record_routes else self._recompute_s - (time.perf_counter() - start)

    @property
    def _clip(self) -> tuple[float, float]:
        assert self.algorithm.clip is not None, "without a clip old_logprobs_max_kl is set"
        return self.algorithm.clip

    def _measure(self, batches: Sequence[StepBatch]) -> tuple[float, float] | None:
        """(KL per token, tokens of a ratio: the mean response's, or 1 of a token ratio) over all ranks' responses that
        train; None where there is none, as where all are masked."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.policy.device)  # k3, tokens, responses
        for micro in (m for b in batches for m in b.micro_batches if m.old_logprobs is not None):
            if self.groups.coordinates.tensor == 0:
                old, mask = micro.old_logprobs, micro.response_mask
                assert old is not None
                sums[0] += divergence_sums(old, old, micro.rollout_logprobs, mask)[0, 1]
                sums[1] += mask.sum()
                lengths = Responses.of(micro, self.groups.sequence_group).num_tokens
                sums[2] += (lengths > 0).sum() / self.groups.layout.context  # all of its ranks count them
        dist.all_reduce(sums, group=self.groups.world)
        k3, tokens, responses = sums.tolist()
        if tokens == 0:
            return None
        return k3 / tokens, tokens / responses if self.algorithm.level == "sequence" else 1.0

    def _settle(self, batch: int, kl: float, tokens: float) -> None:
        """Open or close the gate, and say so when it closes."""
        limit = self.config.old_logprobs_max_kl or largest_kl(self._clip[0], tokens)
        passes = kl <= limit  # NaN is not
        is_news = self.is_open or not self._has_measured
        self.is_open, self._has_measured = passes, True
        if passes or not is_news:
            return
        message = (
            f'algorithm.old_logprobs="{self.config.old_logprobs}": in rollout batch {batch} the engine\'s log-probs '
            f"are {kl:.2g} nats a token (KL) from the trainer's, more than the {limit:.2g} that "
        )
        if self.config.old_logprobs_max_kl:
            message += "algorithm.old_logprobs_max_kl allows"
        else:
            low, high = self._clip
            positive, negative = clipped_by_mismatch(kl, clip_low=low, clip_high=high, tokens=tokens)
            message += (
                f"clip_low={low:g} bears over {tokens:.0f} tokens. As old log-probs they alone would clip about "
                f"{negative:.0%} of the responses with a negative advantage and {positive:.0%} of the positive "
                f"({BEARABLE_SHARE:.0%} are borne)"
            )
        if self.config.old_logprobs == "rollout":
            raise UserError(message + '. Use algorithm.old_logprobs="auto" or "recompute", or a wider clip')
        if self.groups.rank == 0:
            logger.warning("%s; old log-probs are recomputed from here on, as long as that is so", message)
