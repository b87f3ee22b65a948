"""What each rank does in the telemetry tests: a batch through the trainer, its row of metrics, and all that the row is
made of, token by token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from gspo_megatron.config import (
    AlgorithmConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
)
from gspo_megatron.device import current_device
from gspo_megatron.experience import Experience
from gspo_megatron.job import Job
from gspo_megatron.recorder import BatchOutcome, Recorder
from gspo_megatron.tokenizer import Tokenizer
from gspo_megatron.trainer import Trainer
from gspo_megatron.types import Group, Prompt, Rollout, ScoreReport, Sequence
from gspo_megatron.weight_sync import SyncReport
from tests.distributed.cases import join, scatter, whole_gradients
from tests.distributed.tiny_models import make_sequences

MINI_BATCHES = 3
LENGTHS = [5, 40, 9, 17, 13, 28, 7, 22, 33, 11, 6, 25, 19, 8, 36, 15] * 6  # prompt and response


def batch(vocab: int) -> list[Sequence]:
    """Sequences of many lengths; every eighth has no advantage, and one trains nothing at all."""
    sequences = []
    for s in make_sequences(LENGTHS, vocab, seed=5):
        advantage = torch.zeros(()) if s.index % 8 == 3 else s.advantages
        mask = s.response_mask & (s.index != 20)
        sequences.append(Sequence(s.index, s.token_ids, mask, s.rollout_logprobs, advantage))
    return sequences


def measured_row(
    layout: dict[str, int], folder: str, tokenizer: str, run_folder: str, vocab: int, distributed: bool = True
) -> dict[str, Any]:
    """One measured batch; its row goes to run_folder/metrics.jsonl, what it is made of is returned."""
    groups = join(layout)
    config = TrainConfig(
        run=RunConfig(folder=run_folder),
        model=ModelConfig(path=folder),
        task=TaskConfig(name="unused"),
        algorithm=AlgorithmConfig(mini_batches=MINI_BATCHES, clip_low=3e-3, clip_high=4e-3),
        data=DataConfig(token_budget=160),
        optimizer=OptimizerConfig(lr=2e-4, eps=1e-3, distributed=distributed),
    )
    engine = SimpleNamespace(name="none") if groups.is_head else None  # nothing is generated: the batch is given
    job = Job(config, groups, Tokenizer.load(tokenizer), None, None, engine, current_device())  # type: ignore[arg-type]
    trainer = Trainer(config, job)
    tokens: list[dict[str, Any]] = []
    gradients: list[dict[str, torch.Tensor]] = []
    _capture(trainer, tokens, gradients)
    mine = scatter(groups, batch(vocab))
    batches, results = trainer.learn(mine, measure=True)
    outcome = BatchOutcome(
        0, _experience(mine), batches, results, SyncReport(0), {"time_rollout_s": 1.0, **trainer.times}
    )
    with Recorder(job, "test", 1).open() as recorder:
        recorder.batch(1, outcome, None)
    return {
        "tokens": tokens,
        "gradients": gradients,
        "grad_norms": [r.grad_norm for r in results],
        "expert_gradient_norms": [r.expert_gradient_norms for r in results],
    }


def _experience(sequences: list[Sequence]) -> Experience:
    rollouts = [
        Rollout(
            prompt_id=s.index,
            token_ids=s.token_ids,
            response_mask=torch.arange(s.token_ids.numel()) >= max(1, s.token_ids.numel() // 3),
            rollout_logprobs=s.rollout_logprobs,
            policy_versions=torch.zeros(s.token_ids.numel(), dtype=torch.int32),
            finish_reason="stop",
            reward=float(s.advantages),
        )
        for s in sequences
    ]
    return Experience(
        groups=[Group(Prompt(r.prompt_id, "", [0], None), [r]) for r in rollouts],
        sequences=sequences,
        advantages=[[float(s.advantages)] for s in sequences],
        score=ScoreReport(num_scored=len(sequences)),
        next_prompt=0,
    )


def _capture(trainer: Trainer, tokens: list[dict[str, Any]], gradients: list[dict[str, torch.Tensor]]) -> None:
    """Note log-probabilities and entropies as the loss sees them, and gradients as the optimizer does."""
    make_loss, step = trainer.loss, trainer.policy.optimizer.step
    c = trainer.job.groups.coordinates

    def loss(step_batch: Any) -> Any:
        inner = make_loss(step_batch)

        def observed(logprobs: torch.Tensor, entropy: torch.Tensor, micro: Any) -> Any:
            starts = micro.cu_seqlens.tolist()
            for i, index in enumerate(micro.sequence_ids.tolist() if c.tensor == 0 else []):
                at = torch.arange(starts[i], starts[i + 1])[micro.response_mask[starts[i] : starts[i + 1]]]
                columns = (logprobs, micro.old_logprobs, micro.rollout_logprobs, entropy)
                tokens.append(
                    {
                        "mini_batch": len(gradients),
                        "index": index,
                        "values": torch.stack([x.detach()[at] for x in columns]).double(),  # [4, response tokens here]
                    }
                )
            return inner(logprobs, entropy, micro)

        return observed

    def capture_then_step() -> Any:
        gradients.append(whole_gradients(trainer.policy))
        return step()

    trainer.loss = loss  # type: ignore[method-assign]
    trainer.policy.optimizer.step = capture_then_step
