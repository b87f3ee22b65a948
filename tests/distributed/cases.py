"""What each rank does in the distributed tests. Functions return plain data for the test to compare."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any, get_type_hints

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from gspo_megatron.config import (
    AlgorithmConfig,
    DataConfig,
    KernelsConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
)
from gspo_megatron.data.exchange import distribute
from gspo_megatron.device import current_device
from gspo_megatron.experience import Experience
from gspo_megatron.groups import ProcessGroups
from gspo_megatron.job import Job, build_job
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.policy import optimizer as optimizer_module
from gspo_megatron.policy.policy import MegatronPolicy
from gspo_megatron.policy.runtime import collective_groups, initialize
from gspo_megatron.policy.step import forward_only
from gspo_megatron.recorder import BatchOutcome, Recorder
from gspo_megatron.tokenizer import Tokenizer
from gspo_megatron.trainer import Trainer
from gspo_megatron.types import Group, MicroBatch, Prompt, Rollout, ScoreReport, Sequence, StepBatch
from gspo_megatron.weight_sync import SyncReport
from tests.distributed.tiny_models import make_sequences

TIMEOUT_S = 30.0
COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_to_all",
    "all_to_all_single",
    "broadcast",
    "broadcast_object_list",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "gather",
    "gather_object",
    "scatter",
    "scatter_object_list",
    "barrier",
)


def join(layout: dict[str, int]) -> ProcessGroups:
    """Groups of the layout, for one case."""
    parallel_state.destroy_model_parallel()
    return initialize(ParallelLayout(**layout), seed=0, timeout_s=TIMEOUT_S)


def make_policy(
    groups: ProcessGroups, folder: str, kernels: KernelsConfig | None = None, **optimizer: Any
) -> MegatronPolicy:
    settings = OptimizerConfig(**({"lr": 1e-3} | optimizer))
    return MegatronPolicy(ModelConfig(path=folder), settings, groups, seed=0, total_steps=10, kernels=kernels)


def scatter(groups: ProcessGroups, sequences: list[Sequence]) -> list[Sequence]:
    """What this replica would have generated: every data-parallel-th prompt, at the head alone."""
    layout = groups.layout
    return sequences[groups.coordinates.data :: layout.data] if groups.is_head else []


def logits(
    layout: dict[str, int], folder: str, lengths: list[int], vocab: int, model: dict[str, Any] | None = None
) -> dict[int, tuple[torch.Tensor, torch.Tensor]] | None:
    """(positions [l], logits [l, vocab]) of each sequence, as far as the rank holds it, from the ranks of the last
    stage with tensor rank 0."""
    groups = join(layout)
    policy = MegatronPolicy(
        ModelConfig(path=folder, **(model or {})), OptimizerConfig(), groups, seed=0, total_steps=10
    )
    sequences = make_sequences(lengths, vocab, seed=3)
    [batch] = distribute(
        scatter(groups, sequences),
        groups,
        mini_batches=1,
        token_budget=64,
        pad_token_id=0,
        device=policy.device,
    )
    captured: list[torch.Tensor] = []
    if groups.is_last_stage:
        head = policy.chunks[-1].module.output_layer
        head.register_forward_pre_hook(lambda module, args: captured.append(args[0].detach()))
    forward_only(policy.chunks, batch.micro_batches, groups)
    if not groups.is_last_stage:
        return None
    last = policy.chunks[-1].module
    tied = last.share_embeddings_and_output_weights
    weight = (last.shared_embedding_or_output_weight() if tied else last.output_layer.weight).detach()
    out = {}
    for micro, hidden in zip(batch.micro_batches, captured, strict=True):
        parts = [torch.empty_like(hidden) for _ in range(groups.tp.size())]
        if groups.layout.tensor > 1:
            dist.all_gather(parts, hidden.contiguous(), group=groups.tp)
            hidden = torch.cat(parts)
        local = hidden.squeeze(1) @ weight.T
        shards = [torch.empty_like(local) for _ in range(groups.tp.size())]
        dist.all_gather(shards, local, group=groups.tp)
        whole = torch.cat(shards, -1)[:, :vocab]
        starts = micro.cu_seqlens.tolist()
        for i, index in enumerate(micro.sequence_ids.tolist()):
            positions = micro.positions[starts[i] : starts[i + 1]]
            real = positions < (lengths[index] if index >= 0 else 0)
            if index >= 0:
                out[index] = (positions[real].cpu(), whole[starts[i] : starts[i + 1]][real].cpu())
    return out if groups.coordinates.tensor == 0 else None


def round_trip(layout: dict[str, int], folder: str) -> dict[str, Any]:
    """Load an HF folder into Megatron and export it again, to every head."""
    groups = join(layout)
    policy = make_policy(groups, folder)
    heads = [groups.layout.head_rank(d) for d in range(groups.layout.data)]
    exported: dict[str, torch.Tensor] = {}
    for bucket in policy.export(policy.weights.plan([[head] for head in heads])):
        for item in bucket:
            assert item.name not in exported, f"{item.name} exported twice"
            exported[item.name] = item.tensor.clone()
    return {
        "exported": exported,
        "local_numel": sum(p.numel() for p in policy.weights.parameters),
        "received_bytes": policy.weights.counters.received_bytes,
        "is_head": groups.is_head,
    }


def save(layout: dict[str, int], folder: str, out: str, dtype: str = "float32") -> None:
    """Load an HF folder and write it back as one."""
    model = ModelConfig(path=folder, dtype=dtype)  # type: ignore[arg-type]
    policy = MegatronPolicy(model, OptimizerConfig(), join(layout), seed=0, total_steps=10)
    policy.save_hf(Path(out))


# Length of each sequence, wanted log s and advantage: every branch of the clip 3e-4/4e-4 with dual clip 1.001.
STEP_LENGTHS = [9, 14, 6, 21, 11, 8, 17, 5, 4, 10, 26, 7]
BRANCHES = [
    (8e-4, 1.0),  # above, A > 0: clipped
    (8e-4, -0.7),  # above, A < 0: kept
    (-8e-4, -1.2),  # below, A < 0: clipped
    (-8e-4, 0.9),  # below, A > 0: kept
    (1e-4, 0.5),  # inside
    (-1e-4, -0.5),  # inside
    (1.5e-3, -0.8),  # beyond the dual clip
    (6e-4, 0.0),  # no advantage
    (2e-4, 1.3),  # one response token
    (0.0, 0.6),  # fully masked
    (-6e-4, 1.1),
    (7e-4, 0.3),
]
# A batch of hard cases, response tokens at the end of each: a prompt so long that a context-parallel rank holds no
# response token, a response of one token, and nothing but masked tokens.
EDGE_LENGTHS = [24, 8, 22]
EDGE_RESPONSES = [3, 1, 0]
EDGE_BRANCHES = [(1e-4, 0.5), (-8e-4, 0.9), (0.0, 0.6)]


def step_sequences(vocab: int, batch: str = "main", pad_to: int = 1) -> list[Sequence]:
    """The fixed batches of the invariance tests; "padded" to a multiple by masked tokens at the end."""
    edge = batch == "edge"
    lengths, branches = (EDGE_LENGTHS, EDGE_BRANCHES) if edge else (STEP_LENGTHS, BRANCHES)
    sequences = []
    for s, (_, advantage) in zip(make_sequences(lengths, vocab, seed=11), branches, strict=True):
        responses = EDGE_RESPONSES[s.index] if edge else {8: 1, 9: 0}.get(s.index)
        mask = s.response_mask
        if responses is not None:
            mask = torch.arange(mask.numel()) >= mask.numel() - responses
        rows = [torch.cat([x, x.new_zeros(-x.numel() % pad_to)]) for x in (s.token_ids, mask, s.rollout_logprobs)]
        sequences.append(Sequence(s.index, *rows, torch.tensor(advantage)))
    return sequences


def _drift(index: int, mask: torch.Tensor, wanted: float, level: str) -> torch.Tensor:
    """What the new log-probabilities are above the old ones, per token: a fixed function of the sequence."""
    generator = torch.Generator().manual_seed(100 + index)
    noise = torch.randn(mask.numel(), generator=generator)
    if level == "token":
        return 0.3 * noise
    tokens = mask.double().sum().clamp(min=1)
    centred = noise - (noise * mask).sum() / tokens
    return 0.01 * centred + wanted


def shift_logprobs(trainer: Any, sequences: list[Sequence]) -> list[float]:
    """Make the old and the reference policy of the trainer fixed distances away, after the real passes.

    `sequences` is the whole batch. Returns a list that the pass fills: distances of the tokens' log-ratios from the
    clip, for GRPO.
    """
    policy = trainer.policy
    level, name = trainer.algorithm.level, trainer.algorithm.name
    fill_old, fill_reference = policy.fill_old_logprobs, policy.fill_reference_logprobs
    clip_gaps: list[float] = []
    branches = EDGE_BRANCHES if len(sequences) == len(EDGE_BRANCHES) else BRANCHES

    def old(batches: Any, **options: Any) -> None:
        fill_old(batches, **options)
        for micro, index, at, positions in _real_tokens(batches, sequences):
            mask = sequences[index].response_mask
            mask = torch.cat([mask[1:], mask.new_zeros(1)])  # as the micro-batch has it: of the next token
            drift = _drift(index, mask, branches[index][0], level)[positions]
            micro.old_logprobs[at] = (micro.old_logprobs[at].double() - drift.to(micro.old_logprobs.device)).float()
            if name == "grpo":
                bounds = [math.log1p(x) for x in (-trainer.algorithm.clip_low, trainer.algorithm.clip_high)]
                values = drift[micro.response_mask[at].cpu()]
                clip_gaps.extend(abs(float(v) - b) for v in values for b in bounds)

    def reference(batches: Any) -> None:
        fill_reference(batches)
        for micro, index, at, positions in _real_tokens(batches, sequences):
            generator = torch.Generator().manual_seed(500 + index)
            shift = 0.3 * torch.randn(sequences[index].token_ids.numel(), generator=generator)
            micro.reference_logprobs[at] += shift[positions].to(micro.reference_logprobs.device)

    policy.fill_old_logprobs, policy.fill_reference_logprobs = old, reference
    return clip_gaps


def _real_tokens(batches: Any, sequences: list[Sequence]) -> Iterator[tuple[Any, int, torch.Tensor, torch.Tensor]]:
    """(micro-batch, Sequence.index, where its tokens lie in the micro-batch, their positions in the sequence) on the
    last pipeline stage; none elsewhere. The last two are on the CPU."""
    for batch in batches:
        for micro in batch.micro_batches:
            if micro.old_logprobs is None:
                continue
            for i, index in enumerate(micro.sequence_ids.tolist()):
                if index >= 0:
                    at = torch.arange(int(micro.cu_seqlens[i]), int(micro.cu_seqlens[i + 1]))
                    positions = micro.positions[at].cpu()
                    real = positions < sequences[index].token_ids.numel()
                    yield micro, index, at[real], positions[real]


def whole_weights(policy: MegatronPolicy) -> dict[str, torch.Tensor]:
    """All weights under their HF names, at rank 0; {} elsewhere."""
    return {
        item.name: item.tensor.to("cpu", copy=True)
        for bucket in policy.export(policy.weights.plan([[0]]))
        for item in bucket
    }


def whole_gradients(policy: MegatronPolicy) -> dict[str, torch.Tensor]:
    """The reduced gradients under their HF names, at rank 0; {} elsewhere. Call before the optimizer's step."""
    for chunk in policy.chunks if policy.settings.distributed else []:
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            sharded_over = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets if sharded_over.size() > 1 else []:
                shards = list(bucket.grad_data.chunk(sharded_over.size()))
                whole = [torch.empty_like(s) for s in shards]
                dist.all_gather(whole, shards[sharded_over.rank()].clone(), group=sharded_over)
                bucket.grad_data.copy_(torch.cat(whole))
    local = {
        name: slot.of(slot.parameter.main_grad)  # type: ignore[attr-defined]
        if isinstance(slot.parameter, torch.nn.Parameter)
        else torch.zeros_like(slot.tensor)  # a buffer
        for name, slot in policy.weights.slots.items()
    }
    buckets = policy.weights.export(policy.weights.plan([[0]], dtype=torch.float32), local)
    return {item.name: item.tensor.to("cpu", copy=True) for bucket in buckets for item in bucket}


def optimizer_step(
    layout: dict[str, int],
    folder: str,
    tokenizer: str,
    algorithm: dict[str, Any],
    token_budget: int,
    vocab: int,
    batch: str = "main",
    pad_to: int = 1,
    settings: dict[str, dict[str, Any]] | None = None,
    sabotage: str = "",
) -> dict[str, Any]:
    """The trainer's own `learn` on a fixed batch; gradients, loss, log s and weights after the step.

    `settings` holds further fields of the sections model, optimizer, memory and kernels. `sabotage` takes one
    normalisation out: "data" or "micro_batch" (N counts what is local only), "tokens" (the count of tokens does),
    "n" (no N at all), "context" (sums over a rank's own tokens), "megatron" (Megatron's own averaging is left on).
    """
    groups = join(layout)
    more = settings or {}
    config = TrainConfig(
        run=RunConfig(folder="unused"),
        model=ModelConfig(path=folder, **more.get("model", {})),
        task=TaskConfig(name="unused"),
        algorithm=AlgorithmConfig(mini_batches=1, **algorithm),
        data=DataConfig(token_budget=token_budget),
        # Adam's first step is lr·g/(|g| + eps): the usual eps would blow up the rounding of gradients near 0.
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.01, eps=1e-3, **more.get("optimizer", {})),
        memory=MemoryConfig(**more.get("memory", {})),
        kernels=KernelsConfig(**more.get("kernels", {})),
    )
    original_ddp = optimizer_module.DistributedDataParallel
    optimizer_module.BUCKET_NUMEL = 4096  # several buckets, where reduction overlaps
    if sabotage == "megatron":
        optimizer_module.DistributedDataParallel = _AveragingDDP  # type: ignore[misc]
    try:
        job = Job(config, groups, Tokenizer.load(tokenizer), None, None, None, current_device())  # type: ignore[arg-type]
        trainer = Trainer(config, job)
    finally:
        optimizer_module.DistributedDataParallel = original_ddp  # type: ignore[misc]
        optimizer_module.BUCKET_NUMEL = None
    policy = trainer.policy
    sequences = step_sequences(vocab, batch, pad_to)
    first_gap = shift_logprobs(trainer, sequences)
    _take_out(trainer, sabotage)
    gradients: dict[str, torch.Tensor] = {}
    step = policy.optimizer.step

    def capture_then_step() -> Any:
        gradients.update(whole_gradients(policy))
        return step()

    policy.optimizer.step = capture_then_step
    margins: list[float] = []
    for name, module in (item for chunk in policy.chunks for item in chunk.module.named_modules()):
        if name.endswith("mlp.router"):
            module.register_forward_hook(lambda m, args, out: margins.append(_router_margin(m, args[0])))
    [step_batch], [result] = trainer.learn(scatter(groups, sequences), 2)
    weights = whole_weights(policy)
    stats = {}
    total_loss, kl = 0.0, 0.0
    for micro in result.reports if groups.reports_loss else []:
        total_loss += float(micro.sums[0])
        kl += float(micro.sums[3])
        for index, value, clipped in zip(micro.sequence_ids.tolist(), micro.log_ratio, micro.clipped, strict=True):
            if index >= 0:
                stats[index] = (float(value), bool(clipped))
    return {
        "gradients": gradients,
        "weights": weights,
        # Of each token that the rank holds, the old policy's log-probability, moved away as `shift_logprobs` does.
        "old_logprobs": {
            index: micro.old_logprobs[at].cpu() for micro, index, at, _ in _real_tokens([step_batch], sequences)
        },
        "loss": total_loss,
        "kl": kl,
        "stats": stats,
        "grad_norm": result.grad_norm,
        "router_losses": (result.router_losses.aux, result.router_losses.z),
        "num_micro_batches": len(step_batch.micro_batches),
        "num_buckets": sum(len(chunk.bucket_groups) for chunk in policy.chunks),
        "in_effect": _in_effect(policy),
        # Whether there was response to learn from, per micro-batch of this rank's last stage.
        "has_response": [bool(m.response_mask.any()) for m in step_batch.micro_batches] if groups.is_last_stage else [],
        "is_padding": [bool((m.sequence_ids < 0).all()) for m in step_batch.micro_batches],
        "router_margin": min(margins, default=math.inf),
        "clip_margin": min(first_gap, default=math.inf),
    }


def _take_out(trainer: Trainer, sabotage: str) -> None:
    """Take one normalisation of the loss out, see `optimizer_step`."""
    loss = trainer.loss

    def with_counts(counts: Callable[[StepBatch], dict[str, int]]) -> None:
        trainer.loss = lambda batch: loss(replace(batch, **counts(batch)))  # type: ignore[method-assign]

    if sabotage == "data":
        with_counts(lambda b: {"num_global_sequences": sum(_num_sequences(m) for m in b.micro_batches)})
    if sabotage == "micro_batch":
        trainer.loss = lambda batch: (  # type: ignore[method-assign]
            lambda lp, h, micro: loss(replace(batch, num_global_sequences=max(1, _num_sequences(micro))))(lp, h, micro)
        )
    if sabotage == "tokens":
        with_counts(lambda b: {"num_global_tokens": sum(m.response_tokens.numel() for m in b.micro_batches)})
    if sabotage == "n":
        with_counts(lambda b: {"num_global_sequences": 1})
    if sabotage == "context":
        alone = replace(trainer.job, groups=_WithoutSequenceGroup(**vars(trainer.job.groups)))
        trainer.loss = lambda batch: _with_job(trainer, alone, loss, batch)  # type: ignore[method-assign]


def _num_sequences(micro: MicroBatch) -> int:
    return int((micro.sequence_ids >= 0).sum())


def _in_effect(policy: MegatronPolicy) -> dict[str, Any]:
    """What settings came to, after an export: a setting that nobody reads changes nothing either."""
    chunk = policy.chunks[0]
    optimizer = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])[0]
    return {
        "distributed": type(optimizer).__name__ == "DistributedOptimizer",
        "overlap_grad_reduce": chunk.ddp_config.overlap_grad_reduce,
        "overlap_param_gather": chunk.ddp_config.overlap_param_gather,
        "recompute": (chunk.config.recompute_granularity, chunk.config.recompute_modules),
        "experts": {type(m.experts).__name__ for m in chunk.modules() if hasattr(m, "experts")},
        "kernels": chunk.module.kernels.implementation,
        "skip_zero_gradients": policy.skip_zero_gradients,
        "offload_gradients": all(b.grad_data.untyped_storage().size() == 0 for b in chunk.buffers),
    }


class _WithoutSequenceGroup(ProcessGroups):
    @property
    def sequence_group(self) -> None:
        return None


def _with_job(trainer: Any, job: Any, loss: Any, batch: Any) -> Any:
    real, trainer.job = trainer.job, job
    try:
        return loss(batch)
    finally:
        trainer.job = real


class _AveragingDDP(DistributedDataParallel):
    """DDP and schedule as Megatron has them by default: averages over data-parallel ranks and micro-batches."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        config.calculate_per_token_loss = False
        super().__init__(config, *args, **kwargs)


def _router_margin(router: Any, hidden: torch.Tensor) -> float:
    """Smallest distance between the last chosen and the first not chosen expert's router logit."""
    logits = (hidden.flatten(0, -2).float() @ router.weight.float().T).detach()
    top = logits.topk(router.topk + 1, dim=-1).values
    return float((top[:, router.topk - 1] - top[:, router.topk]).min())


def train_config(config: dict[str, Any]) -> Any:
    """A TrainConfig from tables, as a TOML file would hold them."""
    sections = get_type_hints(TrainConfig)
    return TrainConfig(**{name: sections[name](**table) for name, table in config.items()})


def unconnected_groups(layout: dict[str, int], config: dict[str, Any]) -> list[str]:
    """Collectives of a whole step over groups that `collective_groups` does not name: function and ranks."""
    groups = join(layout)
    named = {id(group) for group in collective_groups(groups)}
    seen: set[str] = set()
    known = [getattr(dist, name) for name in COLLECTIVES]

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, dist.ProcessGroup)]
            group = given[0] if given else groups.world
            if group.size() > 1 and id(group) not in named:
                seen.add(f"{function.__name__} over {dist.get_process_group_ranks(group)}")
            return function(*args, **kwargs)

        return call

    with build_job(train_config(config), groups) as job:
        trainer = Trainer(train_config(config), job)
        trainer.sync()
        with _replaced({function: watched(function) for function in known}):
            trainer.step(1)
    return sorted(seen)


@contextmanager
def _replaced(functions: dict[Callable[..., Any], Callable[..., Any]]) -> Iterator[None]:
    """Functions replaced by others in every module that has them by a name."""
    places = [
        (module, name, value)
        for module in list(sys.modules.values())
        for name, value in list(vars(module).items())
        if isinstance(value, FunctionType) and value in functions
    ]
    for module, name, value in places:
        setattr(module, name, functions[value])
    try:
        yield
    finally:
        for module, name, value in places:
            setattr(module, name, value)


def first_batch(layout: dict[str, int], config: dict[str, Any], sabotage: str = "") -> dict[str, Any]:
    """One whole step of a real run: embedded engine, real task. Its first mini-batch has the sampling policy.

    `sabotage` changes something between the pass for the old log-probabilities and the first forward:
    "temperature", "weights" or "packing".
    """
    groups = join(layout)
    settings = train_config(config)
    with build_job(settings, groups) as job:
        trainer = Trainer(settings, job)
        recompute = trainer.policy.fill_old_logprobs

        def fill(batches: Any, **options: Any) -> None:
            recompute(batches, **options)
            if sabotage == "temperature":
                for chunk in trainer.policy.chunks:
                    chunk.module.temperature *= 1.01
            if sabotage == "weights":
                with torch.no_grad():
                    for parameter in trainer.policy.weights.parameters:
                        parameter.mul_(1.001)
            if sabotage == "packing":
                for micro in batches[0].micro_batches:
                    if micro.old_logprobs is not None:
                        micro.old_logprobs = micro.old_logprobs.roll(1)

        trainer.policy.fill_old_logprobs = fill  # type: ignore[method-assign]
        trainer.sync()
        outcome = trainer.step(1)
        reference_gap = [
            float((m.reference_logprobs - m.old_logprobs)[m.response_mask].abs().max())
            for b in outcome.mini_batches
            for m in b.micro_batches
            if m.reference_logprobs is not None and m.old_logprobs is not None and m.response_mask.any()
        ]
        return {
            "log_ratio": [
                [float(x) for m in result.reports for x, i in zip(m.log_ratio, m.sequence_ids, strict=True) if i >= 0]
                for result in outcome.results
            ],
            "gap_to_engine": [float(m.maxima[1]) for result in outcome.results for m in result.reports],
            "reference_gap": reference_gap,
            "prompts": [group.prompt.id for group in outcome.experience.groups],
            "has_engine": job.engine is not None,
            "engine_version": None if job.engine is None else job.engine.version,
            "weights": {name: s.tensor.cpu().clone() for name, s in trainer.policy.weights.slots.items()},
            "grad_norms": [result.grad_norm for result in outcome.results],
            "routing_replayed": [result.routing_replayed for result in outcome.results],
        }


def reference_after_step(layout: dict[str, int], config: dict[str, Any]) -> dict[str, Any]:
    """After a step moved the weights: reference log-probabilities of its batches, beside the policy's own.

    Both as the largest distance from the log-probabilities of the initial policy; the reference pass runs twice.
    """
    settings = train_config(config)
    with build_job(settings, join(layout)) as job:
        trainer = Trainer(settings, job)
        policy = trainer.policy
        trainer.sync()
        batches = trainer.step(1).mini_batches
        micros = [m for b in batches for m in b.micro_batches if m.old_logprobs is not None]
        initial = [m.old_logprobs.clone() for m in micros if m.old_logprobs is not None]

        def farthest(name: str) -> list[float]:
            return [
                float((getattr(m, name) - was)[m.response_mask].abs().max())
                for m, was in zip(micros, initial, strict=True)
                if m.response_mask.any()
            ]

        moved = [p.detach().clone() for p in policy.weights.parameters]
        references, unchanged = [], []
        for _ in range(2):
            for micro in micros:
                micro.reference_logprobs = None
            policy.fill_reference_logprobs(batches)
            references += farthest("reference_logprobs")
            unchanged += [torch.equal(p, was) for p, was in zip(policy.weights.parameters, moved, strict=True)]
        policy.fill_old_logprobs(batches)
        return {"reference": references, "policy": farthest("old_logprobs"), "unchanged": all(unchanged)}


def recorded_row(layout: dict[str, int], folder: str, tokenizer: str, run_folder: str, vocab: int) -> None:
    """The trainer's `learn` on the fixed batch, and the Recorder's row of it in run_folder/metrics.jsonl."""
    groups = join(layout)
    config = TrainConfig(
        run=RunConfig(folder=run_folder),
        model=ModelConfig(path=folder, router_aux_loss=1e-3, router_z_loss=1e-4),
        task=TaskConfig(name="unused"),
        algorithm=AlgorithmConfig(mini_batches=2, kl_coefficient=0.1),
        data=DataConfig(token_budget=40),
        optimizer=OptimizerConfig(lr=1e-4, eps=1e-3),
    )
    engine = SimpleNamespace(name="none") if groups.is_head else None  # nothing is generated: the batch is given
    job = Job(config, groups, Tokenizer.load(tokenizer), None, None, engine, current_device())  # type: ignore[arg-type]
    trainer = Trainer(config, job)
    shift_logprobs(trainer, step_sequences(vocab))
    mine = scatter(groups, step_sequences(vocab))
    whole = make_sequences(STEP_LENGTHS, vocab, seed=11)  # without the masks that keep responses from training
    rollouts = [
        Rollout(
            prompt_id=s.index,
            token_ids=s.token_ids,
            response_mask=whole[s.index].response_mask,
            rollout_logprobs=s.rollout_logprobs,
            policy_versions=torch.where(whole[s.index].response_mask, 0, -1),
            finish_reason="stop",
            reward=float(s.advantages),
        )
        for s in mine
    ]
    experience = Experience(
        groups=[Group(Prompt(r.prompt_id, "", [0], None), [r]) for r in rollouts],
        sequences=mine,
        advantages=[[float(s.advantages)] for s in mine],
        score=ScoreReport(num_scored=len(mine)),
        next_prompt=0,
    )
    batches, results = trainer.learn(mine, 2)
    outcome = BatchOutcome(0, experience, batches, results, SyncReport(0), {"time_rollout_s": 1.0, **trainer.times})
    with Recorder(job, "test", 1).open() as recorder:
        recorder.batch(1, outcome, None)
