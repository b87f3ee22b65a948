"""What is measured of a policy without training it for a task's sake: how its ratios spread with length, what flipped
routes and lost precision do to them. One file of plain numbers comes of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gspo_megatron.config import MeasureConfig
from gspo_megatron.data.exchange import distribute
from gspo_megatron.errors import UserError
from gspo_megatron.experience import collect
from gspo_megatron.job import Job, open_job
from gspo_megatron.policy.policy import MegatronPolicy
from gspo_megatron.rollout.engine import SamplingParams
from gspo_megatron.rollout.sglang.engine import SGLangEngine
from gspo_megatron.stability.benchmark.measurements import (
    BIASES,
    FLIP_CURVES,
    FLIPS,
    FLIPS_OF_PRECISION,
    MISMATCHES,
    NOISES,
    RATE_CURVES,
    Curves,
    Values,
    clip_by_sign,
    length_scaling,
    prefixed,
    ratio_change,
)
from gspo_megatron.trainer import Trainer
from gspo_megatron.types import Group, NamedTensor, RecordedRoutes, StepBatch
from gspo_megatron.types import Sequence as TrainSequence
from gspo_megatron.weight_sync import generate
from gspo_megatron.weights.families import load_fields

FILE = "measurement.json"

_FP8_MAX = 448.0  # largest number of float8_e4m3fn
_KEPT_IN_FP8 = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")  # as FP8 rollouts keep them
_Ratios = tuple[np.ndarray, np.ndarray]  # [S, T] the engine's and the trainer's log-probabilities


def run(config: MeasureConfig) -> None:
    """The `measure` command on one rank; rank 0 writes run.folder/measurement.json."""
    _check(config)
    replay = "r3" if _forces_routes(config) else config.model.routing_replay
    with open_job(config) as job:
        trainer = Trainer(replace(config, model=replace(config.model, routing_replay=replay)), job)
        trainer.sync()
        measurements = {"lengths": lengths, "flips": flips, "precision": precision}
        values, curves = measurements[config.measure.what](trainer, config)
        if job.groups.rank == 0:
            _write(Path(config.run.folder), values, curves)


def _check(config: MeasureConfig) -> None:
    if config.parallel.context > 1:
        raise UserError(
            f"parallel.context={config.parallel.context}: measure looks at whole responses; set it to 1 and use other "
            "degrees"
        )
    if config.rollout.engine != "embedded":
        raise UserError(
            f'rollout.engine="{config.rollout.engine}" does not take the rounded weights that measure gives it; set '
            '"embedded"'
        )


def _forces_routes(config: MeasureConfig) -> bool:
    """Whether experts are chosen for the routers: by the replay of the engine's routes, which are made up here."""
    fields = load_fields(config.model.path)[1]
    if config.measure.what == "flips" and not fields.moe_layers:
        raise UserError(f'model.path={config.model.path} has no MoE layer, and measure.what="flips" nothing to flip')
    return bool(fields.moe_layers) and config.measure.what != "lengths"


def _write(folder: Path, values: Values, curves: Curves) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{FILE}.partial"
    partial.write_text(json.dumps({"values": values, "curves": curves}, indent=1, allow_nan=False), encoding="utf-8")
    os.replace(partial, folder / FILE)
    print(f"{len(values)} values and {len(curves)} curves written to {folder / FILE}")


# ---------------------------------------------------------------------------------------------------------------------
# Responses and their log-probabilities
# ---------------------------------------------------------------------------------------------------------------------


def sample(job: Job, config: MeasureConfig, *, skip: int = 0) -> list[StepBatch]:
    """Responses of `skip` and measure.response_tokens tokens to held-out prompts, packed: no stop token ends them."""
    mine = []
    if job.groups.is_head:
        prompts = job.task.prompts("heldout", 0, config.measure.prompts)
        mine = [prompts[i] for i in job.share(len(prompts))]
    params = SamplingParams(
        num_samples=1,
        temperature=config.rollout.temperature,
        max_response_tokens=skip + config.measure.response_tokens,
        stop_token_ids=(),
        seed=config.run.seed * job.groups.layout.data + job.groups.coordinates.data,
    )
    groups = generate(job, mine, params)
    numbers = {prompt.id: job.share(config.measure.prompts)[i] for i, prompt in enumerate(mine)}
    return distribute(
        [_sequence(numbers[g.prompt.id], g) for g in groups],
        job.groups,
        mini_batches=1,
        token_budget=config.data.token_budget,
        pad_token_id=job.tokenizer.pad_token_id,
        device=job.device,
    )


def _sequence(index: int, group: Group) -> TrainSequence:
    [rollout] = group.rollouts
    return TrainSequence(index, rollout.token_ids, rollout.response_mask, rollout.rollout_logprobs, torch.zeros(()))


def logprobs(policy: MegatronPolicy, job: Job, batches: list[StepBatch], *, forced: bool = False) -> _Ratios:
    """[S, T] log-probabilities of the responses' tokens, the engine's and the policy's present ones, on every rank.

    Collective. `forced`: the experts are those of the micro-batches' routes; else the routers choose, and their choice
    is recorded where the policy can force one.
    """
    # A forced pass would record what routers choose for hidden states that other experts made.
    policy.fill_old_logprobs(batches, record_routes=policy.routing.mode == "r3" and not forced, replay=forced)
    mine: dict[int, tuple[list[float], list[float]]] = {}
    if job.groups.reports_loss:
        for micro in (m for batch in batches for m in batch.micro_batches):
            assert micro.old_logprobs is not None
            bounds = micro.cu_seqlens.tolist()
            for i, number in enumerate(micro.sequence_ids.tolist()):
                if number >= 0:
                    part = slice(bounds[i], bounds[i + 1])
                    chosen = micro.response_mask[part]
                    both = (micro.rollout_logprobs[part][chosen], micro.old_logprobs[part][chosen])
                    mine[number] = (both[0].tolist(), both[1].tolist())
    found = {number: pair for part in job.all_gather(mine) for number, pair in part.items()}
    pairs = np.array([found[number] for number in sorted(found)], dtype=np.float64)  # [S, 2, T]
    return pairs[:, 0], pairs[:, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Lengths
# ---------------------------------------------------------------------------------------------------------------------


def lengths(trainer: Trainer, config: MeasureConfig) -> tuple[Values, Curves]:
    """How ratios of long responses spread: `update`, between the policy before and after measure.updates rollout
    batches of training; `fp8`, between the engine with weights rounded to FP8, which samples them, and the policy."""
    policy, job, skip = trainer.policy, trainer.job, config.measure.skip_tokens
    batches = sample(job, config, skip=skip)
    _, before = logprobs(policy, job, batches)
    next_prompt = 0
    for batch in range(1, config.measure.updates + 1):
        experience = collect(job, trainer.algorithm, batch=batch, first_prompt=next_prompt)
        next_prompt = experience.next_prompt
        trainer.learn(experience.sequences, batch)
        trainer.sync()
    _, after = logprobs(policy, job, batches)
    _sync_rounded(policy, job)
    engine, rounded = logprobs(policy, job, sample(job, config, skip=skip))
    values: Values = {}
    curves: Curves = {}
    for name, d in (("update", after - before), ("fp8", rounded - engine)):
        some, lines = length_scaling(d[:, skip:], seed=config.run.seed)
        values |= prefixed(name, some)
        curves |= prefixed(name, lines)
    return values, curves


# ---------------------------------------------------------------------------------------------------------------------
# Flipped routes
# ---------------------------------------------------------------------------------------------------------------------


def flips(trainer: Trainer, config: MeasureConfig) -> tuple[Values, Curves]:
    """Ratios between the policy with a share of its routes flipped at random and the same policy, same weights."""
    policy, job = trainer.policy, trainer.job
    batches = sample(job, config)
    _, own = logprobs(policy, job, batches)
    routes = own_routes(batches)
    values: Values = {}
    curves: Curves = {"share": list(FLIPS)}
    for share in FLIPS:
        flip_routes(policy, batches, routes, share, seed=config.run.seed)
        d = logprobs(policy, job, batches, forced=True)[1] - own
        change = ratio_change(d)
        change["rms_ratio"] = float(change["sequence_rms"] or 0) / max(float(change["token_rms"] or 0), 1e-30)
        change["slope_std_log_s"] = length_scaling(d)[0]["slope_std_log_s"]
        values |= prefixed(f"flip_{share:g}", change)
        for key in FLIP_CURVES:
            curves.setdefault(key, []).append(float(change[key] or 0))
    return values, curves


def own_routes(batches: list[StepBatch]) -> list[RecordedRoutes]:
    """What the routers chose in a pass that forced nothing, by micro-batch."""
    found = [micro.recorded for batch in batches for micro in batch.micro_batches]
    assert all(routes is not None for routes in found)
    return found  # type: ignore[return-value]


def flip_routes(
    policy: MegatronPolicy, batches: list[StepBatch], own: list[RecordedRoutes], share: float, *, seed: int
) -> None:
    """Give the micro-batches the routers' own routes, but with one expert replaced by another in `share` of the (token,
    layer) pairs, those of the prompt among them."""
    num_experts = policy.fields.num_experts
    assert num_experts is not None
    generator = torch.Generator().manual_seed(seed * policy.groups.layout.world_size + policy.groups.rank)
    micro_batches = [micro for batch in batches for micro in batch.micro_batches]
    for micro, routes in zip(micro_batches, own, strict=True):
        micro.routes = flip_experts(routes.experts.cpu(), share, num_experts, generator).to(policy.device)
        micro.routes_valid = routes.is_real


def flip_experts(experts: Tensor, share: float, num_experts: int, generator: torch.Generator) -> Tensor:
    """[T, layers, k] expert sets, in `share` of the [T, layers] one member replaced by another expert."""
    rows, layers, k = experts.shape
    drawn = torch.rand(rows, layers, num_experts, generator=generator).scatter(-1, experts.long(), -1.0)
    place = torch.randint(k, (rows, layers, 1), generator=generator)
    other = experts.scatter(-1, place, drawn.argmax(-1, keepdim=True).to(experts.dtype))
    is_flipped = torch.rand(rows, layers, 1, generator=generator) < share
    return torch.where(is_flipped, other, experts)


# ---------------------------------------------------------------------------------------------------------------------
# Precision
# ---------------------------------------------------------------------------------------------------------------------


def precision(trainer: Trainer, config: MeasureConfig) -> tuple[Values, Curves]:
    """What GSPO's clip would do if the old log-probabilities were another's than the trainer's own.

    `engine`: the embedded engine's, with the same weights. `fp8`: sampled by an engine whose linear layers are rounded
    to FP8 (e4m3, one scale a row). `flip_x`: the trainer takes other experts than the engine at a share x of routes.
    `bf16`: the trainer's, rounded to bfloat16. `noise_σ`, `bias_b`: the trainer's plus
    normal noise, or plus a constant: no mismatch that sampling could have, as the mean of the ratio is not 1.
    `mismatch_K`: normal log-ratios of mean −K and variance 2K, as a mismatch of K nats a token has.
    """
    policy, job = trainer.policy, trainer.job
    batches = sample(job, config)
    engine, exact = logprobs(policy, job, batches)
    flipped = {}
    routes = own_routes(batches) if policy.routing.mode == "r3" else []
    for share in FLIPS_OF_PRECISION if routes else ():
        flip_routes(policy, batches, routes, share, seed=config.run.seed)
        flipped[f"flip_{share:g}"] = logprobs(policy, job, batches, forced=True)[1] - engine
    _sync_rounded(policy, job)
    rounded = logprobs(policy, job, sample(job, config))
    generator = np.random.default_rng(config.run.seed)
    normal = generator.standard_normal(exact.shape)
    bf16 = torch.from_numpy(exact).bfloat16().double().numpy()
    ratios = {"engine": exact - engine, "fp8": rounded[1] - rounded[0], "bf16": exact - bf16, **flipped}
    ratios |= {f"noise_{sigma:g}": sigma * normal for sigma in NOISES}
    ratios |= {f"bias_{bias:g}": np.full_like(exact, -bias) for bias in BIASES}
    ratios |= {f"mismatch_{kl:g}": -kl + np.sqrt(2 * kl) * normal for kl in MISMATCHES}
    return summarize_precision(ratios)


def summarize_precision(ratios: dict[str, np.ndarray]) -> tuple[Values, Curves]:
    """Clip rates by sign of every kind of log-ratios [S, T]; the simulated mismatches also as curves over KL."""
    found = {name: clip_by_sign(d) for name, d in ratios.items()}
    values: Values = {}
    for name, one in found.items():
        values |= prefixed(name, one)
    simulated = [one for name, one in found.items() if name.startswith("mismatch_")]
    values["mismatch_error"] = max(float(one["error"] or 0) for one in simulated)
    curves: Curves = {"kl": list(MISMATCHES)}
    for key in RATE_CURVES:
        curves[key] = [float(one[key] or 0) for one in simulated]
    return values, curves


@torch.no_grad()
def to_fp8(weight: Tensor) -> Tensor:
    """[out, in] rounded to FP8 e4m3 with one scale a row, in its own dtype."""
    scale = weight.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / _FP8_MAX
    return ((weight.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(weight.dtype)


def _rounded(tensors: Iterator[NamedTensor]) -> list[NamedTensor]:
    return [
        NamedTensor(t.name, t.tensor if t.tensor.dim() < 2 or t.name.endswith(_KEPT_IN_FP8) else to_fp8(t.tensor))
        for t in tensors
    ]


def _sync_rounded(policy: MegatronPolicy, job: Job) -> None:
    """Hand the policy's weights, rounded to FP8, to the embedded engines. Collective."""
    engine = job.engine
    assert not isinstance(engine, SGLangEngine)
    plan = policy.weights.plan(job.feeding.feeds, dtype=job.feeding.dtype, bucket_bytes=job.feeding.bucket_bytes)
    if engine is not None:
        engine.begin_update(engine.version + 1)
    for bucket in policy.export(plan):
        if engine is not None:
            engine.update(_rounded(iter(bucket)))  # type: ignore[arg-type]
    if engine is not None:
        assert engine.end_update(policy.export)
