"""One rank of our side of tools/benchmark_end_to_end.py: `train`'s own trainer and recorder, without evaluations."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from end_to_end.job import Batch, Gate, Job
from gspo_megatron.config import TrainConfig
from gspo_megatron.config_io import load_config
from gspo_megatron.failures import EXIT_DONE, FailureBoard, end_process, guard_rank
from gspo_megatron.logs import quiet_libraries
from gspo_megatron.rollout.engine import RolloutEngine, SamplingParams
from gspo_megatron.types import Group, Prompt


class TimedGenerate:
    """An engine's `generate` with a clock around it."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.generate, self.seconds = engine.generate, 0.0

    def __call__(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Group]:
        start = time.perf_counter()
        groups = self.generate(prompts, params)
        self.seconds = time.perf_counter() - start
        return groups


def main() -> None:
    from gspo_megatron.job import open_job
    from gspo_megatron.recorder import Recorder
    from gspo_megatron.trainer import Trainer

    job = Job.load(Path(sys.argv[1]))
    config = load_config(TrainConfig, Path(job.run) / "ours.toml")
    gate = Gate()
    with open_job(config) as ranks:
        trainer = Trainer(config, ranks)
        assert ranks.engine is not None, "with data parallelism alone every rank generates"
        generate = TimedGenerate(ranks.engine)
        ranks.engine.generate = generate  # type: ignore[method-assign]
        trainer.sync()
        with Recorder(ranks, "train", job.batches).open() as recorder:
            gate.ready(
                versions={n: importlib.metadata.version(n) for n in ("megatron-core", "transformers", "torch")},
                experts=config.model.experts,
                attention=config.model.attention,
                optimizer="Megatron-Core's distributed AdamW",
                dtype=config.model.dtype,
                threads=torch.get_num_threads(),
                world_size=ranks.groups.layout.world_size,
            )
            for number in range(1, job.batches + 1):
                gate.wait()
                outcome = trainer.step(number)
                recorder.batch(number, outcome, None)
                groups, times = outcome.experience.groups, outcome.times
                rollouts = [rollout for group in groups for rollout in group.rollouts]
                batch = Batch(
                    seconds={
                        "generate": generate.seconds,
                        "old_logprobs": times["time_logprobs_s"],
                        "train": times["time_train_s"],
                        "hand_over": times["time_reshard_s"],
                    },
                    prompts=[list(group.prompt.token_ids) for group in groups],
                    completions=len(rollouts),
                    response_tokens=sum(int(rollout.response_mask.sum()) for rollout in rollouts),
                    old_logprob_sequences=sum(
                        int((micro.sequence_ids >= 0).sum())
                        for mini_batch in outcome.mini_batches
                        for micro in mini_batch.micro_batches
                        if micro.old_logprobs is not None
                    ),
                    optimizer_steps=len(outcome.results),
                )
                if ranks.groups.rank == 0:
                    row = json.loads((Path(config.run.folder) / "metrics.jsonl").read_text().splitlines()[-1])
                    batch.reward_mean = row["reward_mean"]
                    batch.zero_variance_fraction = row["zero_variance_group_fraction"]
                    # Ours is of the sequences that have an advantage, TRL's of all.
                    of_live = row["clip_fraction_sequence"] or 0.0
                    batch.clip_fraction = of_live * (1 - row["zero_variance_group_fraction"])
                gate.done(batch)


if __name__ == "__main__":
    quiet_libraries()
    with guard_rank(FailureBoard.from_environment()):
        main()
    end_process(EXIT_DONE)  # threads of process groups may abort an interpreter that winds down
