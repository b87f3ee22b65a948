"""What each rank does in the telemetry tests: a batch through the trainer, its row of metrics, and all that the row is
made of, token by token."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from gspo_megatron.config import (
    AlgorithmConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
)
from gspo_megatron.device import current_device
from gspo_megatron.errors import UserError
from gspo_megatron.experience import Experience
from gspo_megatron.job import Job, build_job
from gspo_megatron.old_logprobs import OldLogprobs
from gspo_megatron.policy.policy import MegatronPolicy
from gspo_megatron.policy.router import Router
from gspo_megatron.recorder import BatchOutcome, Recorder
from gspo_megatron.tokenizer import Tokenizer
from gspo_megatron.trainer import Trainer
from gspo_megatron.types import Group, Prompt, Rollout, ScoreReport, Sequence
from gspo_megatron.weight_sync import SyncReport
from tests.distributed.cases import join, scatter, train_config, whole_gradients
from tests.distributed.routing_cases import places
from tests.distributed.tiny_models import make_sequences

MINI_BATCHES = 3
LENGTHS = [5, 40, 9, 17, 13, 28, 7, 22, 33, 11, 6, 25, 19, 8, 36, 15] * 6  # prompt and response


def batch(vocab: int) -> list[Sequence]:
    """Sequences of many lengths; every eighth has no advantage, and one trains nothing at all."""
    sequences = []
    for s in make_sequences(LENGTHS, vocab, seed=5):
        advantage = torch.zeros(()) if s.index % 8 == 3 else s.advantages
        mask = s.response_mask & (s.index != 20)
        routes, valid = engine_routes(s.index)
        sequences.append(
            Sequence(s.index, s.token_ids, mask, s.rollout_logprobs, advantage, routes, valid if s.index % 5 else None)
        )
    return sequences


def engine_routes(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[L-1, 4 layers, 2] two experts of 8 at random, and [L-1] bool where there are any; every fifth sequence has no
    route."""
    generator = torch.Generator().manual_seed(index)
    rows = LENGTHS[index] - 1
    routes = torch.rand(rows, 4, 8, generator=generator).argsort(-1)[..., :2].short()
    return routes, (torch.rand(rows, generator=generator) < 0.7) & (index % 5 > 0)


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
        rollout=RolloutConfig(routed_experts=True),
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
    before, after = _observe_routers(trainer.policy)
    batches, results = trainer.learn(mine, 1)
    before.is_on, after.is_on = False, True
    routes = trainer.measure_routes(batches, 1)
    outcome = BatchOutcome(
        0, _experience(mine), batches, results, SyncReport(0), {"time_rollout_s": 1.0, **trainer.times}, routes
    )
    with Recorder(job, "test", 1).open() as recorder:
        recorder.batch(1, outcome, None)
    return {
        "tokens": tokens,
        "gradients": gradients,
        "grad_norms": [r.grad_norm for r in results],
        "routes": [before.rows, after.rows],
        "expert_gradient_norms": [r.expert_gradient_norms for r in results],
    }


class _Routers:
    """What every router does while nothing is trained: (Sequence.index, position, layer, experts ascending, entropy)
    of each real token."""

    def __init__(self, policy: MegatronPolicy, *, is_on: bool) -> None:
        self.policy, self.is_on, self.rows = policy, is_on, []  # type: ignore[var-annotated]
        for module in (m for chunk in policy.chunks for m in chunk.modules()):
            if isinstance(module, Router):
                module.register_forward_hook(self.note)

    def note(self, router: Any, args: Any, out: Any) -> None:
        if torch.is_grad_enabled() or not self.is_on:
            return
        micro, rows = args[1].micro, len(out[1])
        where = places(micro, self.policy.groups.coordinates.tensor * rows, rows)
        shares = (args[0].flatten(0, -2).double() @ router.weight.double().T).softmax(-1)
        entropy = -(shares * shares.log()).sum(-1)
        for (index, position), chosen, h in zip(where.tolist(), out[1], entropy.tolist(), strict=True):
            if index >= 0:
                self.rows.append((index, position, router.layer_number - 1, chosen.nonzero().flatten().tolist(), h))


def _observe_routers(policy: MegatronPolicy) -> tuple[_Routers, _Routers]:
    return _Routers(policy, is_on=True), _Routers(policy, is_on=False)


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


def bypass(
    layout: dict[str, int], config: dict[str, Any], temperatures: list[float], resumed: int, trained: list[float]
) -> dict[str, Any]:
    """Rollout batches of a real run, the trainer's temperature in each multiplied by a factor: where the old log-probs
    came from, and what was said. Before batch `resumed` the gate is made anew, as a checkpoint has it; `trained` is the
    share of a batch's responses that train, where it is not 1."""
    groups = join(layout)
    settings = train_config(config)
    logged = _Messages()
    logging.getLogger("gspo_megatron.old_logprobs").addHandler(logged)
    batches: list[dict[str, Any]] = []
    try:
        with build_job(settings, groups) as job:
            trainer = Trainer(settings, job)
            trainer.sync()
            _mask_responses(trainer, trained)
            for number, factor in enumerate(temperatures, start=1):
                for chunk in trainer.policy.chunks:
                    chunk.module.temperature = settings.rollout.temperature * factor
                if number == resumed:
                    counts = {"optimizer_steps": 0, "schedule_steps": 0}
                    state = trainer.state(Recorder(job, "test", 1), number - 1, counts)
                    old = trainer.old_logprobs
                    trainer.old_logprobs = OldLogprobs(old.config, old.algorithm, old.policy, old.groups)
                    trainer.resume(state)
                    trainer.version += 1
                outcome = trainer.step(number)
                micros = [m for b in outcome.mini_batches for m in b.micro_batches if m.old_logprobs is not None]
                batches.append(
                    {
                        "saved_s": outcome.times["time_logprobs_saved_s"],
                        "is_engine": [torch.equal(m.old_logprobs, m.rollout_logprobs) for m in micros],  # type: ignore[arg-type]
                        "is_shared": [m.old_logprobs is m.rollout_logprobs for m in micros],
                        "row": _row(trainer, outcome),
                    }
                )
    except UserError as error:
        return {"batches": batches, "error": str(error), "logged": logged.texts}
    finally:
        logging.getLogger("gspo_megatron.old_logprobs").removeHandler(logged)
    return {"batches": batches, "error": None, "logged": logged.texts}


def _mask_responses(trainer: Trainer, trained: list[float]) -> None:
    learn = trainer.learn
    rollout = trainer.config.rollout
    total = rollout.prompts_per_batch * rollout.samples_per_prompt

    def learn_some(sequences: list[Sequence], batch: int) -> Any:
        share = trained[batch - 1] if batch <= len(trained) else 1.0
        some = [replace(s, response_mask=s.response_mask & (s.index < share * total)) for s in sequences]
        return learn(some, batch)

    trainer.learn = learn_some  # type: ignore[method-assign]


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _row(trainer: Trainer, outcome: BatchOutcome) -> dict[str, Any] | None:
    """The batch's row as the recorder would write it, at rank 0."""
    rows: list[dict[str, Any]] = []
    recorder = Recorder(trainer.job, "test", 1)
    recorder.writer = SimpleNamespace(write=rows.append, write_samples=lambda *_: None)  # type: ignore[assignment]
    recorder.display = SimpleNamespace(update=lambda row: None, note=lambda text: None)  # type: ignore[assignment]
    recorder.batch(1, outcome, None)
    return rows[0] if rows and trainer.job.groups.rank == 0 else None
