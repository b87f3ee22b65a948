"""A plan in words: one line for the model, the layout, the algorithm, the batch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from gspo_megatron import memory_estimate
from gspo_megatron.config import AlgorithmConfig, SftConfig, TrainConfig
from gspo_megatron.device import DTYPES
from gspo_megatron.preflight.engine import describe_engine

if TYPE_CHECKING:
    from gspo_megatron.weights.families import Family, ModelFields


def describe_common(config: TrainConfig | SftConfig, fields: ModelFields) -> list[tuple[str, str]]:
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
        ("engine", describe_engine(config)),
        ("task", " ".join(filter(None, (config.task.name, config.task.dataset)))),
    ]


def describe_algorithm(algorithm: AlgorithmConfig) -> list[tuple[str, str]]:
    from gspo_megatron import algorithms

    own = {f.name for f in dataclasses.fields(algorithms.ALGORITHMS[algorithm.name])}
    parts = [algorithm.name]
    if algorithm.clip_low is not None and algorithm.clip_high is not None:
        parts.append(f"clip to [1 − {algorithm.clip_low:g}, 1 + {algorithm.clip_high:g}]")
    elif algorithm.clip_high is not None:
        parts.append(f"weights of at most 1 + {algorithm.clip_high:g}")
    parts += [
        f"{name.replace('_', ' ')} {getattr(algorithm, name):g}"
        for name in sorted(own)
        if name.startswith(("sapo_", "vespo_"))
    ]
    if "dual_clip" in own:
        parts.append("no dual clip" if algorithm.dual_clip is None else f"dual clip {algorithm.dual_clip:g}")
    if algorithm.aggregation == "token_sum":
        parts.append("token terms summed over each response")
    elif algorithm.aggregation == "token_mean":
        parts.append("mean over all tokens")
    parts.append(f"KL coefficient {algorithm.kl_coefficient:g}" if algorithm.kl_coefficient else "no KL")
    if algorithm.entropy_coefficient:
        parts.append(f"entropy coefficient {algorithm.entropy_coefficient:g}")
    parts.append("advantages / std" if algorithm.normalize_std else "advantages not divided by std")
    if algorithm.dynamic_sampling:
        parts.append(f"dynamic sampling, at most {algorithm.dynamic_sampling_max_rounds} rounds")
    parts += _describe_mismatch(algorithm)
    if algorithm.old_logprobs != "recompute":
        parts.append(f"old log-probs: {algorithm.old_logprobs}, measured every {algorithm.old_logprobs_every} batches")
    if algorithm.shuffle_advantages:
        parts.append("CONTROL: advantages shuffled within groups")
    return [("algorithm", "; ".join(parts))]


def _describe_mismatch(algorithm: AlgorithmConfig) -> list[str]:
    low, high, parts = algorithm.mismatch_low, algorithm.mismatch_high, []
    if algorithm.mismatch == "truncate":
        parts.append(f"mismatch weight truncated at {high:g}")
    elif algorithm.mismatch == "mask":
        parts.append(f"mismatch weight within [{low:g}, {high:g}], else 0")
    elif algorithm.mismatch == "geometric":
        parts.append(f"responses kept with a geometric-mean mismatch within [{low:g}, {high:g}]")
    if algorithm.opsm_delta is not None:
        parts.append(f"responses of negative advantage dropped at {algorithm.opsm_delta:g} nats a token off-policy")
    return parts


def describe_routes(config: TrainConfig) -> list[tuple[str, str]]:
    """Whose experts training passes take, unless it is their own routers' choice alone."""
    text = {
        "r2": "replay r2: training takes the experts that the pass for the old log-probs chose",
        "r3": "replay r3: old log-probs and training take the experts that the rollout engine chose",
        "off": "no replay; the engine's experts are compared with the trainer's" if config.returns_routes else "",
    }[config.model.routing_replay]
    return [("routing", text)] if text else []


def describe_batch(config: TrainConfig, algorithm: AlgorithmConfig) -> list[tuple[str, str]]:
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
        describe_replicas(config, rollout.prompts_per_batch, "prompts a rollout batch"),
        ("length", f"{batches} rollout batches × {mini_batches} = {batches * mini_batches} optimizer steps"),
        describe_eval(config, "before, after" + every(config.eval.every, "rollout batches")),
    ]


def describe_eval(config: TrainConfig | SftConfig, when: str) -> tuple[str, str]:
    samples = config.eval.samples
    text = f"{config.eval.prompts} held-out prompts × {samples} sample{'s' if samples > 1 else ''}"
    return "evaluation", f"{text}; {when}" if when else text


def every(count: int, unit: str) -> str:
    return f", every {count} {unit}" if count else ""


def describe_replicas(config: TrainConfig | SftConfig, count: int, unit: str) -> tuple[str, str]:
    data = config.parallel.data
    low, rest = divmod(count, data)
    share = f"{low}–{low + 1}" if rest else str(low)
    return "replicas", "1" if data == 1 else f"{data} data-parallel, {share} {unit} on each"


def describe_packing(config: TrainConfig | SftConfig) -> tuple[str, str]:
    return (
        "packing",
        f"at most {config.data.token_budget} tokens a micro-batch; "
        f"responses of at most {config.rollout.max_response_tokens} tokens",
    )


def describe_memory(
    config: TrainConfig | SftConfig, family: Family, fields: ModelFields, *, reference: bool = False
) -> tuple[str, str]:
    """The estimate for the fullest pipeline rank; `memory_estimate` says what it counts."""
    largest = max(memory_estimate.estimate(config, family, fields, reference=reference), key=lambda m: m.total)
    parts = [f"{name} {_size(value)}" for name, value in dataclasses.asdict(largest).items() if value]
    text = f"about {_size(largest.total)} a rank while training: {', '.join(parts)}"
    sglang = config.sglang
    if config.rollout.engine == "sglang" and not sglang.server_addresses:
        dtype = config.model.dtype if sglang.dtype == "auto" else sglang.dtype
        weights = sum(s.numel for s in family.specs(fields) if not s.load_only) * DTYPES[dtype].itemsize
        text += f"; a server's weights take {_size(weights / sglang.tensor)} of each of its GPUs"
        text += ", not while the policy trains" if sglang.colocate else ""
    return "memory", text


def _size(number: float) -> str:
    """Bytes as '1.2 GB' (10⁹ bytes)."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number / 1e3:.1f} kB"
