"""What can be known about a run before it starts: checks over the config, the model folder and the task.

No devices, no process groups, no megatron. A plan that can't work is refused here with everything that is wrong
about it; one that can is described once, with its layout, batch arithmetic and effective clip.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import TYPE_CHECKING

from gspo_megatron import run_folder
from gspo_megatron.config import AlgorithmConfig, LogConfig, SftConfig, TaskConfig, TrainConfig
from gspo_megatron.errors import UserError

if TYPE_CHECKING:
    from gspo_megatron.tasks.base import Split, Task
    from gspo_megatron.tokenizer import Tokenizer
    from gspo_megatron.types import Prompt
    from gspo_megatron.weights.families import Family, ModelFields

ENGINE_LABELS = {"embedded": "embedded, not SGLang"}

_PROMPTS_LOOKED_AT = 64  # of each split


@dataclass(frozen=True)
class Preflight:
    """A plan that passed: what it will do, and what is doubtful about it."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """Printed once by every run."""
        lines = [f"{name:<10} {text}" for name, text in self.rows]
        return "\n".join(lines + [f"warning: {text}" for text in self.warnings])


@dataclass
class _Problems:
    """Collects what is wrong, so that one message holds all of it."""

    messages: list[str] = field(default_factory=list)

    def require(self, condition: bool, message: str) -> None:
        if not condition:
            self.messages.append(message)

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Take a UserError of the block as one problem."""
        try:
            yield
        except UserError as error:
            self.messages.append(str(error))

    def raise_if_any(self) -> None:
        if len(self.messages) == 1:
            raise UserError(self.messages[0])
        if self.messages:
            raise UserError(f"{len(self.messages)} things are wrong:\n" + "\n".join(f"- {m}" for m in self.messages))


# ---------------------------------------------------------------------------------------------------------------------
# Public
# ---------------------------------------------------------------------------------------------------------------------


def check_train(config: TrainConfig, *, folder: bool = True) -> Preflight:
    """Check a training run; `folder=False` leaves the run folder out.

    Raises:
        UserError: everything that is wrong, each with the value and the remedy.
    """
    from gspo_megatron import algorithms

    problems = _Problems()
    fields = _check_common(config, problems, folder=folder)
    algorithm = config.algorithm
    warnings: list[str] = []
    with problems.collect():
        algorithm = algorithms.resolve(config.algorithm)
        warnings = algorithms.warnings(config.algorithm, algorithms.build(config.algorithm))
        _check_batch(config, algorithm, problems)
    problems.raise_if_any()
    assert fields is not None
    rows = [
        *_describe_common(config, fields),
        *_describe_algorithm(algorithm),
        *_describe_batch(config, algorithm),
        _describe_packing(config),
        ("folder", config.run.folder),
    ]
    return Preflight(rows, [*warnings, *_unread_settings(config)])


def check_eval(config: TrainConfig) -> Preflight:
    """Check an evaluation of `model.path`. It writes nothing, so the run folder is not looked at."""
    problems = _Problems()
    fields = _check_common(config, problems, folder=False)
    problems.raise_if_any()
    assert fields is not None
    return Preflight(
        [*_describe_common(config, fields), _describe_eval(config, "")], _unread_task_settings(config.task)
    )


def check_sft(config: SftConfig, *, folder: bool = True) -> Preflight:
    """Check a cold start; like `check_train`."""
    problems = _Problems()
    fields = _check_common(config, problems, folder=folder)
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
        *_describe_common(config, fields),
        ("batch", f"{config.sft.batch_size} worked answers a step"),
        _describe_replicas(config, config.sft.batch_size, "answers a step"),
        ("length", f"{config.sft.steps} optimizer steps{stop}"),
        _describe_eval(config, "after" + _every(config.eval.every, "steps")),
        _describe_packing(config),
        ("folder", config.run.folder),
    ]
    return Preflight(rows, _unread_settings(config))


def check_inputs(config: TrainConfig | SftConfig) -> Preflight:
    """Check what only the tokenizer and the task can tell: on every row of a file, on the first prompts of each split
    where they are generated. After `check_…`.

    Apart from the other checks because it imports transformers and reads or generates the task's data.

    Raises:
        UserError: no usable tokenizer, a task or data file that can't be used, text the tokenizer can't encode, a
            prompt (sft: with its worked answer) longer than the context or than the token budget.
    """
    from gspo_megatron import tasks
    from gspo_megatron.tasks.base import FiniteTask
    from gspo_megatron.tokenizer import Tokenizer

    fields = _read_model(config.model.path)[1]
    tokenizer = Tokenizer.load(config.model.path)
    if tokenizer.vocab_size > fields.vocab_size:
        raise UserError(
            f"the tokenizer in model.path={config.model.path} knows {tokenizer.vocab_size} tokens, more than the "
            f"model's vocab_size={fields.vocab_size}; give the tokenizer that belongs to the model"
        )
    task = tasks.build(config.task, tokenizer, seed=config.run.seed)
    first = config.rollout.prompts_per_batch if isinstance(config, TrainConfig) else config.sft.batch_size
    lengths: list[int] = []
    splits: dict[Split, int] = {"heldout": config.eval.prompts, "train": first}
    for split, wanted in splits.items():
        before = len(lengths)
        for name, prompt in _look_at(task, split, min(wanted, _PROMPTS_LOOKED_AT)):
            lengths.append(len(prompt.token_ids))
            if split == "train" and isinstance(config, SftConfig):
                answer = _encode_answer(task, tokenizer, name, prompt)
                check_answer(config, fields.max_position_embeddings, name, len(prompt.token_ids), len(answer))
            else:
                _check_prompt(config, fields, name, len(prompt.token_ids))
        if len(lengths) == before:
            raise UserError(f"task.name={config.task.name}: the {split} split holds no prompts")
    looked_at = f"all {len(lengths)}" if isinstance(task, FiniteTask) else f"the first {len(lengths)}"
    return Preflight([("prompts", f"{min(lengths)} to {max(lengths)} tokens ({looked_at} were looked at)")])


def _look_at(task: Task, split: Split, count: int) -> Iterator[tuple[str, Prompt]]:
    """All prompts of a file, else the first `count`; each with its name for messages."""
    from gspo_megatron.tasks.base import FiniteTask

    if isinstance(task, FiniteTask):
        yield from task.rows(split)
        return
    for prompt in task.prompts(split, 0, count):
        yield f"prompt {prompt.id} of the {split} split", prompt


def _encode_answer(task: Task, tokenizer: Tokenizer, name: str, prompt: Prompt) -> list[int]:
    answer = task.answer(prompt)
    try:
        return tokenizer.encode_answer(answer)
    except UserError as error:
        raise UserError(f"{name}: the worked answer: {error}") from error


def check_answer(config: SftConfig, max_positions: int, name: str, prompt_tokens: int, answer_tokens: int) -> None:
    """Raise UserError unless a prompt and its worked answer fit the model's context and the token budget."""
    longest = prompt_tokens + answer_tokens
    what = f"{name} has {prompt_tokens} tokens and its worked answer {answer_tokens}, together {longest}"
    if longest > max_positions:
        raise UserError(
            f"{what}: more than the model's context, max_position_embeddings={max_positions}; "
            "use shorter prompts and answers, or a model with a longer context"
        )
    if longest > config.data.token_budget:
        raise UserError(
            f"data.token_budget={config.data.token_budget} is smaller than one sequence: {what}; use at least {longest}"
        )


def _check_prompt(config: TrainConfig | SftConfig, fields: ModelFields, name: str, num_tokens: int) -> None:
    longest = num_tokens + config.rollout.max_response_tokens
    if longest > fields.max_position_embeddings:
        raise UserError(
            f"{name} has {num_tokens} tokens; with rollout.max_response_tokens={config.rollout.max_response_tokens} it "
            f"exceeds the model's context, max_position_embeddings={fields.max_position_embeddings}; "
            "use shorter prompts or fewer response tokens"
        )
    if longest > config.data.token_budget:
        raise UserError(
            f"data.token_budget={config.data.token_budget} is smaller than one sequence: {name} has "
            f"{num_tokens} tokens and rollout.max_response_tokens={config.rollout.max_response_tokens}; "
            f"use at least {longest}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def _check_common(config: TrainConfig | SftConfig, problems: _Problems, *, folder: bool) -> ModelFields | None:
    """Model, layout, lengths and run folder; returns the model's fields if they could be read."""
    fields = None
    with problems.collect():
        family, fields = _read_model(config.model.path)
    _check_supported(config, problems)
    if fields is not None:
        if config.model.init == "weights":
            with problems.collect():
                _check_weights(config.model.path, family, fields)
        _check_layout(config, fields, problems)
        _check_lengths(config, fields, problems)
    problems.require(
        config.eval.prompts >= config.parallel.data,
        f"eval.prompts={config.eval.prompts} must be at least parallel.data={config.parallel.data}: "
        "each data-parallel replica evaluates its own share",
    )
    if folder:
        problems.messages += run_folder.problems(config)
    return fields


def _read_model(path: str) -> tuple[Family, ModelFields]:
    """Family and fields of the model folder; a hand-written config.json may hold anything."""
    from gspo_megatron.weights.families import load_fields

    try:
        family, fields = load_fields(path)
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path}/config.json holds a value of a wrong type: {error}") from error
    _check_numbers(path, fields)
    return family, fields


def _check_numbers(path: str, fields: ModelFields) -> None:
    for item in dataclasses.fields(fields):
        value = getattr(fields, item.name)
        if str(item.type).startswith("int") and item.name not in ("experts_per_token", "expert_ffn_hidden_size"):
            if value is None and item.type == "int | None":
                continue
            if type(value) is not int or value < 1:
                raise UserError(f"{path}/config.json: {item.name}={value!r} must be a positive integer")
    if fields.num_experts is not None and not 1 <= fields.experts_per_token <= fields.num_experts:
        raise UserError(
            f"{path}/config.json: num_experts_per_tok={fields.experts_per_token} must lie between 1 and "
            f"num_experts={fields.num_experts}"
        )


def _check_supported(config: TrainConfig | SftConfig, problems: _Problems) -> None:
    parallel = config.parallel
    for name in ("context", "virtual_pipeline", "expert_tensor"):
        degree = getattr(parallel, name)
        problems.require(degree == 1, f"parallel.{name}={degree} is not supported yet; use 1")


def _check_weights(path: str, family: Family, fields: ModelFields) -> None:
    """Names and shapes from the files' headers; no tensor is read."""
    from gspo_megatron.weights.hf_checkpoint import HFCheckpoint

    HFCheckpoint(path).verify(family.specs(fields))


def _check_layout(config: TrainConfig | SftConfig, fields: ModelFields, problems: _Problems) -> None:
    parallel = config.parallel
    split_by_tensor = {
        "num_attention_heads": fields.num_attention_heads,
        "num_key_value_heads": fields.num_query_groups,
    }
    if fields.dense_layers:
        split_by_tensor["intermediate_size"] = fields.ffn_hidden_size
    _check_divides(problems, "tensor", parallel.tensor, split_by_tensor)
    _check_divides(problems, "pipeline", parallel.pipeline, {"num_hidden_layers": fields.num_layers})
    if fields.num_experts is None:
        problems.require(
            parallel.expert == 1,
            f"parallel.expert={parallel.expert}, but the model has no experts (it is dense); use 1",
        )
    else:
        stage = parallel.tensor * parallel.context * parallel.data
        _check_divides(
            problems,
            "expert",
            parallel.expert,
            {"num_experts": fields.num_experts},
            usable=lambda degree: stage % (degree * parallel.expert_tensor) == 0,
        )


def _check_divides(
    problems: _Problems,
    name: str,
    degree: int,
    sizes: dict[str, int],
    usable: Callable[[int], bool] = lambda degree: True,
) -> None:
    """The degree must divide every size; the message lists those that do and fit the rest of the layout."""
    wrong = [f"{size_name}={size}" for size_name, size in sizes.items() if size % degree]
    common = gcd(*sizes.values())
    remedy = _one_of([d for d in _divisors(common) if usable(d)])
    problems.require(not wrong, f"parallel.{name}={degree} must divide {' and '.join(wrong)}; use {remedy}")


def _check_lengths(config: TrainConfig | SftConfig, fields: ModelFields, problems: _Problems) -> None:
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


def _check_batch(config: TrainConfig, algorithm: AlgorithmConfig, problems: _Problems) -> None:
    prompts, mini_batches = config.rollout.prompts_per_batch, algorithm.mini_batches
    assert mini_batches is not None
    near = sorted({max(1, prompts // mini_batches) * mini_batches, -(-prompts // mini_batches) * mini_batches})
    problems.require(
        prompts % mini_batches == 0,
        f"algorithm.mini_batches={mini_batches} must divide rollout.prompts_per_batch={prompts}; "
        f"use {_one_of(_divisors(prompts))} mini-batches, or {_one_of(near)} prompts",
    )
    problems.require(
        prompts >= config.parallel.data,
        f"rollout.prompts_per_batch={prompts} must be at least parallel.data={config.parallel.data}: "
        "each data-parallel replica generates its own prompts",
    )


def _unread_settings(config: TrainConfig | SftConfig) -> list[str]:
    """Settings that were given and will not be read."""
    optimizer, warnings = config.optimizer, _unread_task_settings(config.task)
    if optimizer.min_lr > 0 and optimizer.decay == "constant":
        warnings.append(
            f'optimizer.min_lr={optimizer.min_lr:g} is not read with optimizer.decay="constant"; '
            'use "linear" or "cosine", or leave min_lr out'
        )
    samples = config.log.samples_per_batch
    if isinstance(config, SftConfig) and samples != LogConfig().samples_per_batch:
        warnings.append(f"log.samples_per_batch={samples} is not read by sft, which writes no samples")
    return warnings


def _unread_task_settings(task: TaskConfig) -> list[str]:
    if task.holdout == TaskConfig(name=task.name).holdout or (task.name == "jsonl" and not task.eval_dataset):
        return []
    why = "together with task.eval_dataset" if task.name == "jsonl" else f'by the task "{task.name}"'
    return [f"task.holdout={task.holdout} is not read {why}; leave it out"]


# ---------------------------------------------------------------------------------------------------------------------
# Descriptions
# ---------------------------------------------------------------------------------------------------------------------


def _describe_common(config: TrainConfig | SftConfig, fields: ModelFields) -> list[tuple[str, str]]:
    experts = (
        f"{fields.num_experts} experts of which {fields.experts_per_token} a token" if fields.num_experts else "dense"
    )
    start = "its weights" if config.model.init == "weights" else f"random weights, seed {config.run.seed}"
    return [
        (
            "model",
            f"{config.model.path}: {fields.num_layers} layers, hidden size {fields.hidden_size}, {experts}; "
            f"{start}, {config.model.dtype}",
        ),
        ("layout", config.parallel.layout().describe()),
        ("engine", ENGINE_LABELS[config.rollout.engine]),
        ("task", " ".join(filter(None, (config.task.name, config.task.dataset)))),
    ]


def _describe_algorithm(algorithm: AlgorithmConfig) -> list[tuple[str, str]]:
    parts = [algorithm.name]
    if algorithm.clip_low is not None and algorithm.clip_high is not None:
        parts.append(f"clip to [1 − {algorithm.clip_low:g}, 1 + {algorithm.clip_high:g}]")
    parts.append("no dual clip" if algorithm.dual_clip is None else f"dual clip {algorithm.dual_clip:g}")
    parts.append(f"KL coefficient {algorithm.kl_coefficient:g}" if algorithm.kl_coefficient else "no KL")
    if algorithm.entropy_coefficient:
        parts.append(f"entropy coefficient {algorithm.entropy_coefficient:g}")
    parts.append("advantages / std" if algorithm.normalize_std else "advantages not divided by std")
    if algorithm.dynamic_sampling:
        parts.append(f"dynamic sampling, at most {algorithm.dynamic_sampling_max_rounds} rounds")
    if algorithm.mismatch != "off":
        parts.append(f"mismatch weight: {algorithm.mismatch}")
    if algorithm.shuffle_advantages:
        parts.append("CONTROL: advantages shuffled within groups")
    return [("algorithm", "; ".join(parts))]


def _describe_batch(config: TrainConfig, algorithm: AlgorithmConfig) -> list[tuple[str, str]]:
    rollout, mini_batches = config.rollout, algorithm.mini_batches
    assert mini_batches is not None
    sequences = rollout.prompts_per_batch * rollout.samples_per_prompt
    batches = config.train.rollout_batches
    return [
        (
            "batch",
            f"{rollout.prompts_per_batch} prompts × {rollout.samples_per_prompt} samples = {sequences} sequences a "
            f"rollout batch; {mini_batches} optimizer step{'s' if mini_batches > 1 else ''} of "
            f"{sequences // mini_batches} sequences each",
        ),
        _describe_replicas(config, rollout.prompts_per_batch, "prompts a rollout batch"),
        ("length", f"{batches} rollout batches × {mini_batches} = {batches * mini_batches} optimizer steps"),
        _describe_eval(config, "before, after" + _every(config.eval.every, "rollout batches")),
    ]


def _describe_eval(config: TrainConfig | SftConfig, when: str) -> tuple[str, str]:
    samples = config.eval.samples
    text = f"{config.eval.prompts} held-out prompts × {samples} sample{'s' if samples > 1 else ''}"
    return "evaluation", f"{text}; {when}" if when else text


def _every(count: int, unit: str) -> str:
    return f", every {count} {unit}" if count else ""


def _describe_replicas(config: TrainConfig | SftConfig, count: int, unit: str) -> tuple[str, str]:
    data = config.parallel.data
    low, rest = divmod(count, data)
    share = f"{low}–{low + 1}" if rest else str(low)
    return "replicas", "1" if data == 1 else f"{data} data-parallel, {share} {unit} on each"


def _describe_packing(config: TrainConfig | SftConfig) -> tuple[str, str]:
    return (
        "packing",
        f"at most {config.data.token_budget} tokens a micro-batch; "
        f"responses of at most {config.rollout.max_response_tokens} tokens",
    )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _one_of(values: Sequence[int], most: int = 10) -> str:
    """'1', '1 or 2', '1, 2, 3 …'."""
    shown = [str(v) for v in values[:most]]
    if len(values) > most:
        return ", ".join(shown) + " …"
    return " or ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
