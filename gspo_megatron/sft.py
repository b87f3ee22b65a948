"""Supervised cold start on a task's worked answers, through the same Megatron path as training."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron import ops
from gspo_megatron.config import SftConfig
from gspo_megatron.data.exchange import distribute
from gspo_megatron.evaluate import EvalResult, evaluate
from gspo_megatron.job import Job, open_job
from gspo_megatron.policy.policy import MegatronPolicy
from gspo_megatron.policy.step import LossFunction
from gspo_megatron.preflight import check_answer
from gspo_megatron.recorder import Recorder
from gspo_megatron.step_metrics import router_losses
from gspo_megatron.types import MicroBatch, Sequence, StepBatch
from gspo_megatron.weight_sync import sync_weights


def run(config: SftConfig) -> None:
    """The `sft` command on one rank: train, evaluate every eval.every steps, save to run.folder/final."""
    with open_job(config) as job:
        policy = MegatronPolicy(
            config.model,
            config.optimizer,
            job.groups,
            seed=config.run.seed,
            total_steps=config.sft.steps,
            memory=config.memory,
            kernels=config.kernels,
        )
        with Recorder(job, "sft", config.sft.steps, unit="step").open() as recorder:
            for step in range(1, config.sft.steps + 1):
                start = time.perf_counter()
                batch = _batch(job, step - 1, max_positions=policy.fields.max_position_embeddings)
                loss_function = answer_loss(
                    batch.num_global_sequences, job.groups.sequence_group, config.kernels.implementation
                )
                result = policy.train_step(batch, loss_function, name=f"step {step}")
                loss = sum(job.all_gather(sum(map(float, result.reports)) if job.groups.reports_loss else None))
                row = {"loss": loss, "grad_norm": result.grad_norm, "learning_rate": result.learning_rate}
                row |= router_losses([result.router_losses])
                row["time_step_s"] = time.perf_counter() - start
                evaluation = _evaluate_if_due(job, policy, step)
                recorder.write(step, row, evaluation)
                target = config.sft.target_accuracy
                if evaluation is not None and target is not None and evaluation.mean >= target:
                    break
            else:
                if config.sft.target_accuracy is not None and job.groups.rank == 0:
                    recorder.display.note(
                        f"sft.target_accuracy={config.sft.target_accuracy} was not reached in {config.sft.steps} steps"
                    )
        policy.save_hf(Path(config.run.folder) / "final")


def answer_loss(
    num_sequences: int,
    cp_group: dist.ProcessGroup | None = None,
    implementation: ops.Implementation = "native",
) -> LossFunction:
    """Negative log-likelihood of the answers, each answer weighing the same whatever its length.

    The report is the micro-batch's loss, summed over the context-parallel group.
    """

    def loss(logprobs: Tensor, entropy: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        value = ops.sequence_mean(
            -logprobs,
            micro.response_mask,
            micro.cu_seqlens,
            num_sequences=num_sequences,
            cp_group=cp_group,
            implementation=implementation,
        )
        report = value.detach().clone()
        if cp_group is not None:
            dist.all_reduce(report, group=cp_group)
        return value, report

    return loss


def _batch(job: Job, step: int, *, max_positions: int) -> StepBatch:
    """The step's worked answers, packed."""
    config = job.config
    assert isinstance(config, SftConfig)
    sequences = []
    if job.groups.is_head:
        size = config.sft.batch_size
        prompts = job.task.prompts("train", step * size, size)
        for i in job.share(size):
            answer = job.tokenizer.encode_answer(job.task.answer(prompts[i]))
            name = f"training prompt {prompts[i].id}"
            check_answer(config, max_positions, name, len(prompts[i].token_ids), len(answer))
            token_ids = torch.tensor([*prompts[i].token_ids, *answer])
            mask = torch.arange(len(token_ids)) >= len(prompts[i].token_ids)
            sequences.append(Sequence(i, token_ids, mask, torch.zeros(len(token_ids)), torch.tensor(1.0)))
    [batch] = distribute(
        sequences,
        job.groups,
        mini_batches=1,
        token_budget=config.data.token_budget,
        pad_token_id=job.tokenizer.pad_token_id,
        device=job.device,
    )
    return batch


def _evaluate_if_due(job: Job, policy: MegatronPolicy, step: int) -> EvalResult | None:
    config = job.config
    assert isinstance(config, SftConfig)
    every = config.eval.every
    if step != config.sft.steps and not (every and step % every == 0):
        return None
    sync_weights(policy, job, version=step)
    evaluation = evaluate(job, restore=lambda: sync_weights(policy, job, version=step))
    job.rest()
    return evaluation
