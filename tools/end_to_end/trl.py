"""One rank of TRL's side of tools/benchmark_end_to_end.py. Runs in .venv-peers, under torchrun's environment.

GSPO as in arXiv 2507.18071 through TRL's GRPOTrainer: the ratio of the sequence (`importance_sampling_level`), its
loss averaged within each response and then over responses (`loss_type="grpo"`). With gradient_accumulation_steps=1 and
steps_per_generation=4, TRL makes 4 optimizer steps a rollout batch and, since a generation spans several of them,
takes old log-probabilities in a pass of their own. Experts and attention are what transformers chooses by itself.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import accelerate
import datasets
import reasoning_gym
import torch
import transformers
import trl
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from end_to_end.job import Batch, Gate, Job


class TimedTrainer(GRPOTrainer):
    """GRPOTrainer that notes how long its phases take."""

    batch = Batch()

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        start = time.perf_counter()
        inputs = super()._prepare_inputs(generation_batch)
        self.batch.seconds["train"] -= time.perf_counter() - start  # the callback counts whole steps
        return inputs

    def _generate_single_turn(self, prompt_ids: list[list[int]], *arguments: Any) -> Any:
        start = time.perf_counter()
        completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *arguments)
        self.batch.seconds["generate"] += time.perf_counter() - start
        self.batch.prompts += prompt_ids[:: self.num_generations]
        self.batch.completions += len(completion_ids)
        self.batch.response_tokens += sum(len(ids) for ids in completion_ids)
        return completion_ids, logprobs

    def _get_per_token_logps_and_entropies(self, model: Any, input_ids: torch.Tensor, *rest: Any, **named: Any) -> Any:
        start = time.perf_counter()
        result = super()._get_per_token_logps_and_entropies(model, input_ids, *rest, **named)
        if not torch.is_grad_enabled():
            self.batch.seconds["old_logprobs"] += time.perf_counter() - start
            self.batch.old_logprob_sequences += len(input_ids)
        return result


class Turns(TrainerCallback):
    """Lets the trainer through one rollout batch at a time; what lies between two counts to the first."""

    def __init__(self, gate: Gate, mini_batches: int) -> None:
        self.gate, self.mini_batches = gate, mini_batches
        self.trainer: TimedTrainer
        self.step_start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        if state.global_step % self.mini_batches == 0:
            if state.global_step > 0:
                self.gate.done(self.trainer.batch)
            self.gate.wait()
            self.trainer.batch = Batch()
        self.step_start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self.trainer.batch.seconds["train"] += time.perf_counter() - self.step_start
        self.trainer.batch.optimizer_steps += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **named: Any) -> None:
        if "reward" in logs:
            batch = self.trainer.batch
            batch.reward_mean, batch.clip_fraction = logs["reward"], logs["clip_ratio/region_mean"]
            batch.zero_variance_fraction = logs["frac_reward_zero_std"]

    def on_train_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self.gate.done(self.trainer.batch)


def settings(job: Job) -> GRPOConfig:
    """TRL's names for the job."""
    return GRPOConfig(
        output_dir=str(Path(job.run) / "trl"),
        use_cpu=True,
        ddp_backend="gloo" if job.processes > 1 else None,
        bf16=False,
        gradient_checkpointing=False,
        seed=job.seed,
        # Algorithm
        importance_sampling_level="sequence",
        loss_type="grpo",
        epsilon=job.clip_low,
        epsilon_high=job.clip_high,
        beta=0.0,
        scale_rewards="group",
        num_iterations=1,
        gradient_accumulation_steps=1,
        steps_per_generation=job.mini_batches,
        per_device_train_batch_size=job.completions // job.mini_batches // job.processes,
        # Generation
        num_generations=job.samples_per_prompt,
        max_completion_length=job.max_length,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        shuffle_dataset=False,
        # Optimizer
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_steps=job.batches * job.mini_batches,
        # Housekeeping: one log a rollout batch, nothing saved
        logging_steps=job.mini_batches,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main() -> None:
    job = Job.load(Path(sys.argv[1]))
    rows = [json.loads(line) for line in Path(job.prompts).read_text(encoding="utf-8").splitlines()]
    scorer = reasoning_gym.create_dataset(job.dataset, seed=0, size=1, **job.dataset_params)

    def reward(completions: list[str], entry: list[str], **named: Any) -> list[float]:
        return [float(scorer.score_answer(text, json.loads(one))) for text, one in zip(completions, entry, strict=True)]

    gate = Gate()
    turns = Turns(gate, job.mini_batches)
    trainer = TimedTrainer(
        model=job.model,
        reward_funcs=reward,
        args=settings(job),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job.model, padding_side="left"),
        callbacks=[turns],
    )
    turns.trainer = trainer
    config = trainer.model.config
    gate.ready(
        versions={module.__name__: module.__version__ for module in (trl, transformers, accelerate, torch)},
        experts=config._experts_implementation,
        attention=config._attn_implementation,
        optimizer=trainer.args.optim.value,
        dtype=str(trainer.model.dtype),
        threads=torch.get_num_threads(),
        world_size=trainer.args.world_size,
    )
    trainer.train()


if __name__ == "__main__":
    main()
