"""What can be known about a run before it starts: checks over the config, the model folder and the task.

No devices, no process groups, no megatron. A plan that can't work is refused here with everything that is wrong
about it; one that can is described once, with its layout, batch arithmetic and effective clip.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gspo_megatron import run_folder
from gspo_megatron.config import AlgorithmConfig, LogConfig, SftConfig, TaskConfig, TrainConfig
from gspo_megatron.preflight.describe import (
    describe_algorithm,
    describe_batch,
    describe_common,
    describe_eval,
    describe_memory,
    describe_packing,
    describe_replicas,
    describe_routes,
    every,
)
from gspo_megatron.preflight.engine import check_engine, unread_engine_settings
from gspo_megatron.preflight.inputs import check_answer, check_inputs
from gspo_megatron.preflight.model import (
    check_family,
    check_kernels,
    check_layout,
    check_memory,
    check_weights,
    read_model,
)
from gspo_megatron.preflight.result import Preflight, Problems, divisors, one_of

if TYPE_CHECKING:
    from gspo_megatron.weights.families import ModelFields

__all__ = ["Preflight", "check_answer", "check_eval", "check_inputs", "check_sft", "check_train"]


def check_train(config: TrainConfig, *, folder: bool = True, here: bool = True) -> Preflight:
    """Check a training run.

    Args:
        config: the run.
        folder: look at the run folder.
        here: the run starts on this machine. False: nothing is asked of it, neither GPUs nor SGLang nor servers, and
            weights are checked only if they are there.

    Raises:
        UserError: everything that is wrong, each with the value and the remedy.
    """
    from gspo_megatron import algorithms

    problems = Problems()
    fields = _check_common(config, problems, folder=folder, here=here)
    if fields is not None:
        check_memory(config, fields, problems, here=here)
    algorithm = config.algorithm
    warnings: list[str] = []
    with problems.collect():
        algorithm = algorithms.resolve(config.algorithm)
        warnings = algorithms.warnings(config.algorithm, algorithms.build(config.algorithm))
        _check_batch(config, algorithm, problems)
    problems.raise_if_any()
    assert fields is not None
    rows = [
        *describe_common(config, fields),
        *describe_algorithm(algorithm),
        *describe_routes(config),
        *describe_batch(config, algorithm),
        describe_packing(config),
        describe_memory(config, read_model(config.model.path)[0], fields, reference=bool(algorithm.kl_coefficient)),
        ("folder", config.run.folder),
    ]
    return Preflight(rows, [*warnings, *_unread_settings(config, here=here)])


def check_eval(config: TrainConfig) -> Preflight:
    """Check an evaluation of `model.path`. It writes nothing, so the run folder is not looked at."""
    problems = Problems()
    fields = _check_common(config, problems, folder=False, here=True)
    problems.raise_if_any()
    assert fields is not None
    return Preflight([*describe_common(config, fields), describe_eval(config, "")], _unread_task_settings(config.task))


def check_sft(config: SftConfig, *, folder: bool = True, here: bool = True) -> Preflight:
    """Check a cold start; like `check_train`."""
    problems = Problems()
    fields = _check_common(config, problems, folder=folder, here=here)
    if fields is not None:
        check_memory(config, fields, problems, here=here)
    problems.require(
        config.sft.batch_size >= config.parallel.data,
        f"sft.batch_size={config.sft.batch_size} must be at least parallel.data={config.parallel.data}, "
        "one answer for each data-parallel replica",
    )
    problems.require(
        config.sft.target_accuracy is None or config.eval.every > 0,
        f"sft.target_accuracy={config.sft.target_accuracy} is looked at after evaluations, but eval.every=0 evaluates "
        "only after the last step; set eval.every, e.g. 10, or leave target_accuracy out",
    )
    problems.raise_if_any()
    assert fields is not None
    stop = "" if config.sft.target_accuracy is None else f", or held-out accuracy {config.sft.target_accuracy:g}"
    rows = [
        *describe_common(config, fields),
        ("batch", f"{config.sft.batch_size} worked answers a step"),
        describe_replicas(config, config.sft.batch_size, "answers a step"),
        ("length", f"{config.sft.steps} optimizer steps{stop}"),
        describe_eval(config, "after" + every(config.eval.every, "steps")),
        describe_packing(config),
        describe_memory(config, read_model(config.model.path)[0], fields),
        ("folder", config.run.folder),
    ]
    return Preflight(rows, _unread_settings(config, here=here))


def _check_common(
    config: TrainConfig | SftConfig, problems: Problems, *, folder: bool, here: bool
) -> ModelFields | None:
    """Model, layout, lengths and run folder; returns the model's fields if they could be read."""
    from gspo_megatron.rollout.sglang.command import has_weights

    fields = None
    with problems.collect():
        family, fields = read_model(config.model.path)
    if fields is not None:
        if config.model.init == "weights" and (here or has_weights(config.model.path)):
            with problems.collect():
                check_weights(config.model.path, family, fields)
        check_family(config, family, problems)
        check_layout(config, fields, problems)
        check_kernels(config, fields, problems, here=here)
        check_engine(config, problems, here=here)
        _check_lengths(config, fields, problems)
    problems.require(
        config.eval.prompts >= config.parallel.data,
        f"eval.prompts={config.eval.prompts} must be at least parallel.data={config.parallel.data}: "
        "each data-parallel replica evaluates its own share",
    )
    if folder:
        problems.messages += run_folder.problems(config)
    return fields


def _check_lengths(config: TrainConfig | SftConfig, fields: ModelFields, problems: Problems) -> None:
    longest = config.rollout.max_response_tokens
    problems.require(
        longest < fields.max_position_embeddings,
        f"rollout.max_response_tokens={longest} leaves no room for a prompt in the model's context, "
        f"max_position_embeddings={fields.max_position_embeddings}; use less",
    )
    problems.require(
        longest < config.data.token_budget,
        f"data.token_budget={config.data.token_budget} is smaller than one sequence: a prompt and "
        f"rollout.max_response_tokens={longest}; use at least {longest + 1} and the longest prompt's tokens",
    )


def _check_batch(config: TrainConfig, algorithm: AlgorithmConfig, problems: Problems) -> None:
    prompts, mini_batches = config.rollout.prompts_per_batch, algorithm.mini_batches
    assert mini_batches is not None
    near = sorted({max(1, prompts // mini_batches) * mini_batches, -(-prompts // mini_batches) * mini_batches})
    problems.require(
        prompts % mini_batches == 0,
        f"algorithm.mini_batches={mini_batches} must divide rollout.prompts_per_batch={prompts}; "
        f"use {one_of(divisors(prompts))} mini-batches, or {one_of(near)} prompts",
    )
    problems.require(
        prompts >= config.parallel.data,
        f"rollout.prompts_per_batch={prompts} must be at least parallel.data={config.parallel.data}: "
        "each data-parallel replica generates its own prompts",
    )


def _unread_settings(config: TrainConfig | SftConfig, *, here: bool) -> list[str]:
    """Settings that were given and will not be read."""
    optimizer, warnings = config.optimizer, _unread_task_settings(config.task)
    warnings += unread_engine_settings(config, here=here)
    if optimizer.min_lr > 0 and optimizer.decay == "constant":
        warnings.append(
            f'optimizer.min_lr={optimizer.min_lr:g} is not read with optimizer.decay="constant"; '
            'use "linear" or "cosine", or leave min_lr out'
        )
    samples, profiled = config.log.samples_per_batch, config.log.profile_batch
    if isinstance(config, SftConfig):
        if samples != LogConfig().samples_per_batch:
            warnings.append(f"log.samples_per_batch={samples} is not read by sft, which writes no samples")
        if profiled > 0:
            warnings.append(f"log.profile_batch={profiled} is not read by sft, which has no rollout batches")
    elif profiled > config.train.rollout_batches:
        warnings.append(
            f"log.profile_batch={profiled} is never reached: train.rollout_batches={config.train.rollout_batches}"
        )
    return warnings


def _unread_task_settings(task: TaskConfig) -> list[str]:
    if task.holdout == TaskConfig(name=task.name).holdout or (task.name == "jsonl" and not task.eval_dataset):
        return []
    why = "together with task.eval_dataset" if task.name == "jsonl" else f'by the task "{task.name}"'
    return [f"task.holdout={task.holdout} is not read {why}; leave it out"]
