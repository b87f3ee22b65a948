"""What each rank does in the tests of the policy's own steps and of the supervised cold start."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from gspo_megatron import algorithms, sft
from gspo_megatron.config import (
    AlgorithmConfig,
    DataConfig,
    KernelsConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SftConfig,
    SftLoopConfig,
    TaskConfig,
)
from gspo_megatron.data.exchange import distribute
from gspo_megatron.errors import CauseError
from gspo_megatron.groups import ProcessGroups
from gspo_megatron.job import build_job
from gspo_megatron.policy import optimizer as optimizer_module
from gspo_megatron.policy.policy import MegatronPolicy, StepResult
from gspo_megatron.step_metrics import observed_loss
from gspo_megatron.types import MicroBatch, StepBatch
from tests.distributed.cases import STEP_LENGTHS, join, make_policy, scatter, whole_gradients, whole_weights
from tests.distributed.tiny_models import make_sequences


def _batches(policy: MegatronPolicy, groups: ProcessGroups, vocab: int, count: int) -> list[StepBatch]:
    return distribute(
        scatter(groups, make_sequences(STEP_LENGTHS, vocab, seed=11)),
        groups,
        mini_batches=count,
        token_budget=40,
        pad_token_id=0,
        device=policy.device,
    )


def answer_steps(
    layout: dict[str, int], folder: str, vocab: int, steps: int, mini_batches: int, optimizer: dict[str, Any]
) -> dict[str, Any]:
    """Optimizer steps on random worked answers, the mini-batches in turn: gradients before and weights after each."""
    groups = join(layout)
    policy = make_policy(groups, folder, **optimizer)
    batches = _batches(policy, groups, vocab, mini_batches)
    gradients: list[dict[str, torch.Tensor]] = []
    step = policy.optimizer.step

    def capture_then_step() -> Any:
        gradients.append(whole_gradients(policy))
        return step()

    policy.optimizer.step = capture_then_step
    weights, results = [whole_weights(policy)], []
    for k in range(steps):
        batch = batches[k % mini_batches]
        results.append(policy.train_step(batch, sft.answer_loss(batch.num_global_sequences)))
        weights.append(whole_weights(policy))
    return {
        "gradients": gradients,
        "weights": weights,
        "learning_rates": [r.learning_rate for r in results],
        "grad_norms": [r.grad_norm for r in results],
    }


def skipped_steps(layout: dict[str, int], folder: str, vocab: int, optimizer: dict[str, Any]) -> dict[str, Any]:
    """Two steps by a policy that has to leave out two bad ones between them, and by one that is spared those."""
    groups = join(layout)
    ours, spared = (make_policy(groups, folder, **optimizer) for _ in range(2))
    first, second = _batches(ours, groups, vocab, 2)

    def step(policy: MegatronPolicy, batch: StepBatch, factor: float = 1.0, **more: Any) -> StepResult:
        """`factor`: of the first replica's loss."""
        answers = sft.answer_loss(batch.num_global_sequences)

        def loss(logprobs: torch.Tensor, entropy: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, Any]:
            value, report = answers(logprobs, entropy, micro)
            return value * (factor if groups.coordinates.data == 0 else 1.0), report

        return policy.train_step(batch, loss, **more)

    usual = step(ours, first, skip_above=math.inf)
    bad = [
        step(ours, second, math.nan, skip_above=math.inf),
        step(ours, second, math.inf, skip_above=math.inf),
        step(ours, second, 1e3, skip_above=10 * usual.grad_norm),
    ]
    last = step(ours, second, skip_above=10 * usual.grad_norm)
    truth = [step(spared, batch) for batch in (first, second)]
    weights, expected = whole_weights(ours), whole_weights(spared)
    snapshot, other = ours.snapshot(), spared.snapshot()
    states = [{c.key: c.tensor.clone() for c in s.blocks} for s in (snapshot, other)]
    message = ""
    try:
        step(spared, second, math.nan, name="mini-batch 2")
    except CauseError as error:
        message = str(error)
    return {
        "skipped": [r.is_skipped for r in (usual, *bad, last, *truth)],
        "norms": [r.grad_norm for r in bad],
        "rates": [[r.learning_rate for r in results] for results in ((usual, last), truth)],
        "weights": [weights, expected],
        "states": states,
        "counts": [snapshot.counts, other.counts],
        "message": message,
        "kept": all(torch.equal(w, expected[n]) for n, w in whole_weights(spared).items()),
    }


def logprobs_between_steps(
    layout: dict[str, int], folder: str, vocab: int, optimizer: dict[str, Any]
) -> list[list[torch.Tensor]]:
    """Log-probabilities of the same batch before and after each of two steps, with nothing exported in between; on
    the last pipeline stage."""
    groups = join(layout)
    policy = make_policy(groups, folder, **optimizer)
    [batch] = _batches(policy, groups, vocab, 1)
    passes = []
    for _ in range(3):
        policy.fill_old_logprobs([batch])
        if groups.is_last_stage:
            passes.append([m.old_logprobs.clone() for m in batch.micro_batches if m.old_logprobs is not None])
        policy.train_step(batch, sft.answer_loss(batch.num_global_sequences))
    return passes


def steps_of_varying_size(layout: dict[str, int], folder: str, vocab: int, optimizer: dict[str, Any]) -> dict[str, Any]:
    """Steps on the same sequences in differing numbers of micro-batches; the weights after them, at rank 0.

    Only from the second step on does Megatron start reductions within the backward pass, and how many gradients it
    waits for it learns in the first.
    """
    groups = join(layout)
    optimizer_module.BUCKET_NUMEL = 4096
    try:
        policy = make_policy(groups, folder, **optimizer)
    finally:
        optimizer_module.BUCKET_NUMEL = None
    counts, norms = [], []
    for token_budget in (80, 30, 40, 80):
        [batch] = distribute(
            scatter(groups, make_sequences(STEP_LENGTHS, vocab, seed=11)),
            groups,
            mini_batches=1,
            token_budget=token_budget,
            pad_token_id=0,
            device=policy.device,
        )
        counts.append(len(batch.micro_batches))
        norms.append(policy.train_step(batch, sft.answer_loss(batch.num_global_sequences)).grad_norm)
    return {"weights": whole_weights(policy), "counts": counts, "grad_norms": norms}


def idle_micro_batches(layout: dict[str, int], folder: str, vocab: int, skip: bool) -> dict[str, Any]:
    """A step whose loss leaves out some sequences, so that whole micro-batches have no gradient: the gradients, and how
    many micro-batches' backward passes went through the model."""
    groups = join(layout)
    policy = make_policy(groups, folder, kernels=KernelsConfig(skip_zero_gradients=skip))
    [batch] = _batches(policy, groups, vocab, 1)
    passes, idle = [0], 0
    if groups.is_last_stage:
        norm = policy.chunks[-1].module.decoder.final_layernorm
        norm.register_full_backward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    for k, micro in enumerate(batch.micro_batches):
        # One keeps its shortest response alone: under context parallelism not every rank holds some of it. Replicas
        # differ in which one.
        kept = groups.coordinates.data % len(batch.micro_batches)
        lengths = [int(micro.response_mask[a:b].sum()) for a, b in pairwise(micro.cu_seqlens.tolist())]
        micro.advantages.fill_(0.0)
        if k == kept:
            micro.advantages[min(range(len(lengths)), key=lambda i: lengths[i] or 10**9)] = 1.0
        idle += k != kept
    policy.fill_old_logprobs([batch])
    gradients: dict[str, torch.Tensor] = {}
    step = policy.optimizer.step

    def capture_then_step() -> Any:
        gradients.update(whole_gradients(policy))
        return step()

    policy.optimizer.step = capture_then_step
    algorithm, mismatch = algorithms.build(AlgorithmConfig()), algorithms.Mismatch("off")
    loss = observed_loss(algorithm, mismatch, num_sequences=batch.num_global_sequences, cp_group=groups.sequence_group)
    policy.train_step(batch, loss)
    return {"gradients": gradients, "passes": passes[0], "idle": idle, "count": len(batch.micro_batches)}


def graph_of_layers(layout: dict[str, int], folder: str, vocab: int) -> dict[str, list[bool]]:
    """Whether each attention's and each MLP's output required a gradient, in the log-probability pass and in training.

    A layer's own output says nothing: Megatron adds the residual under enable_grad, and what a pipeline stage
    receives always requires a gradient.
    """
    groups = join(layout)
    policy = make_policy(groups, folder)
    [batch] = _batches(policy, groups, vocab, 1)
    seen: list[bool] = []

    def note(module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append(hidden.requires_grad)

    for chunk in policy.chunks:
        for module in chunk.module.modules():
            if isinstance(module, TransformerLayer):
                module.self_attention.register_forward_hook(note)
                module.mlp.register_forward_hook(note)
    policy.fill_old_logprobs([batch])
    in_pass = seen.copy()
    seen.clear()
    policy.train_step(batch, sft.answer_loss(batch.num_global_sequences))
    return {"logprobs": in_pass, "train": seen}


def worked_answers(layout: dict[str, int], model: str, task: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """The cold start's first batch, which of its targets carry loss, and the loss of two steps on it."""
    groups = join(layout)
    config = SftConfig(
        run=RunConfig(folder="unused"),
        model=ModelConfig(path=model, init="random"),
        task=TaskConfig(**task),
        data=DataConfig(token_budget=64),
        optimizer=OptimizerConfig(lr=1e-3),
        sft=SftLoopConfig(batch_size=batch_size),
    )
    with build_job(config, groups) as job:
        policy = MegatronPolicy(config.model, config.optimizer, groups, seed=0, total_steps=10)
        batch = sft._batch(job, 0, max_positions=policy.fields.max_position_embeddings)
        loss_function = sft.answer_loss(batch.num_global_sequences, groups.sequence_group)
        sequences = {}
        for micro in batch.micro_batches:
            logprobs = torch.zeros(micro.num_tokens, requires_grad=True)
            loss_function(logprobs, torch.zeros(micro.num_tokens), micro)[0].backward()
            assert logprobs.grad is not None
            for i, index in enumerate(micro.sequence_ids.tolist()):
                at = slice(int(micro.cu_seqlens[i]), int(micro.cu_seqlens[i + 1]))
                weights = -logprobs.grad[at]
                if index < 0:
                    assert not weights.any(), "padding carries loss"
                    continue
                sequences[index] = {
                    "token_ids": micro.token_ids[at].tolist(),
                    "masked": micro.targets[at][micro.response_mask[at]].tolist(),
                    "with_loss": micro.targets[at][weights != 0].tolist(),
                    "weights": weights[weights != 0].tolist(),
                }
        losses = []
        for _ in range(2):
            reports = policy.train_step(batch, loss_function).reports
            losses.append(sum(job.all_gather(sum(map(float, reports)) if groups.reports_loss else None)))
        return {"sequences": sequences, "losses": losses, "num_global_sequences": batch.num_global_sequences}
