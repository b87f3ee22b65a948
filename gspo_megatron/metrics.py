"""What a run records: the names of the metrics, and the files they go to.

Nothing here communicates or computes: what a metric is, stability/ defines; rank 0 writes.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from gspo_megatron.errors import CauseError, UserError, nearest

logger = logging.getLogger(__name__)

METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.jsonl"

METRICS: dict[str, str] = {
    "step": "rollout batches done; 0 is before the first one (count)",
    "policy_version": "version of the weights the rollouts were sampled from (count of weight updates)",
    "engine": "rollout engine that produced the responses (name)",
    "reward_mean": "mean reward of the batch's scored rollouts (task's units)",
    "reward_std": "standard deviation of those rewards (task's units)",
    "response_length_mean": "mean response length (tokens)",
    "truncated_fraction": "share of rollouts cut at rollout.max_response_tokens (0-1)",
    "entropy": "mean entropy of the policy's next-token distribution over response tokens (nats)",
    "grad_norm": "global gradient norm before clipping, mean over the batch's mini-batches where it is finite",
    "loss": "value of the objective's loss, mean over the batch's optimizer steps",
    "clip_fraction_token": "share of response tokens whose term is clipped (0-1)",
    "clip_fraction_sequence": "share of sequences with a clipped term (0-1)",
    "clip_fraction_positive": "clip_fraction_sequence among sequences with a positive advantage (0-1)",
    "clip_fraction_negative": "clip_fraction_sequence among sequences with a negative advantage (0-1)",
    "log_ratio_sequence_p01": "1st percentile of log s, the mean over a response of log(new/old probability) (nats)",
    "log_ratio_sequence_p50": "median of log s (nats)",
    "log_ratio_sequence_p99": "99th percentile of log s (nats)",
    "log_ratio_sequence_max_abs": "largest |log s| (nats)",
    "token_ratio_max": "largest new/old probability ratio of a response token (ratio)",
    "kl_rollout_trainer": "k3 estimate of KL(engine, trainer) per response token, same weights (nats)",
    "expert_change_fraction": "share of (token, layer) expert sets that differ before and after the updates (0-1)",
    "sync_probe_max_abs": "largest gap of engine and trainer log-probs: of the sync probe, else of the batch (nats)",
    "rollout_tokens_per_s": "response tokens sampled per second of rollout (tokens/s)",
    "time_rollout_s": "time of generation and scoring (s)",
    "time_logprobs_s": "time of the old and reference log-prob passes (s)",
    "time_train_s": "time of forward, backward and optimizer steps (s)",
    "time_reshard_s": "time of handing the new weights to the rollout engine (s)",
    "time_step_s": "time of the whole rollout batch, evaluation left out (s)",
    "reshard_bytes": "weights handed to each rollout engine in one reshard (bytes)",
    "eval_reward_mean": "mean held-out reward over all prompts and samples, avg@k (task's units)",
    "eval_reward_ci95": "half-width of the 95 % confidence interval of eval_reward_mean (task's units)",
    "eval_samples_per_prompt": "k of avg@k and pass_at_k (count)",
    "pass_at_k": "share of held-out prompts with at least one right response among k (0-1)",
    "kl_reference": "k3 estimate of the KL to the reference model, mean over sequences (nats a token)",
    "padding_fraction": "share of the packed tokens that are padding (0-1)",
    "learning_rate": "learning rate of the batch's last optimizer step",
    "num_failed_rewards": "rollouts whose scorer raised or returned no number (count)",
    "num_timed_out_rewards": "rollouts whose scorer took longer than task.reward_timeout_s (count)",
    "zero_variance_group_fraction": "share of groups whose rewards are all equal and so train nothing (0-1)",
    "old_logprob_gap_first_mini_batch": "largest |log s| in mini-batch 1, where no weight has changed yet (nats)",
    "router_aux_loss": "experts' load-balancing loss, mean over sequences and MoE layers; 1 is balanced (no unit)",
    "router_z_loss": "mean squared log-sum-exp of the router's logits, over sequences and MoE layers (nats²)",
    "routing_replayed_fraction": "share of trained (token, MoE layer) pairs whose experts were replayed (0-1)",
    "grad_norm_max": "largest global gradient norm before clipping of the batch's mini-batches",
    "skipped_steps": "optimizer steps that watchdog.action=skip left out for their gradient norm (count)",
    "clip_fraction_token_mini_batches": "clip_fraction_token of each mini-batch (list, 0-1)",
    "clip_fraction_sequence_mini_batches": "clip_fraction_sequence of each mini-batch (list, 0-1)",
    "clip_fraction_positive_mini_batches": "clip_fraction_positive of each mini-batch (list, 0-1)",
    "clip_fraction_negative_mini_batches": "clip_fraction_negative of each mini-batch (list, 0-1)",
    "log_ratio_sequence_std": "standard deviation of log s over sequences (nats)",
    "log_weight_sequence_std": "standard deviation of log W, the sum over a response of log(new/old) (nats)",
    "log_ratio_length_slope": "slope of log std(log s) against log length, after mini-batch 1; noise gives -1/2",
    "log_weight_length_slope": "slope of log std(log W) against log length, after mini-batch 1; noise gives 1/2",
    "ess_fraction_sequence": "effective sample size of the weights s over the number of sequences (0-1)",
    "ess_fraction_weight": "effective sample size of the weights W over the number of sequences (0-1)",
    "kl_rollout_trainer_k1": "k1 estimate of kl_rollout_trainer: mean log(engine/trainer), may be below 0 (nats)",
    "rollout_trainer_correlation": "correlation of engine's and trainer's log-probs over response tokens (-1 to 1)",
    "rollout_trainer_slope": "slope of the engine's log-probs by the trainer's; another temperature shows here (ratio)",
    "kl_staleness": "k3 estimate of KL(old, new) per response token: what the batch's updates moved (nats)",
    "kl_staleness_k1": "k1 estimate of kl_staleness (nats)",
    "kl_total": "k3 estimate of KL(engine, new) per response token: mismatch and staleness together (nats)",
    "kl_total_k1": "k1 estimate of kl_total: the sum of the other two k1 (nats)",
    "time_logprobs_saved_s": "time of the old log-prob pass, as last taken, that the engine's log-probs saved (s)",
    "time_telemetry_s": "time of the forward pass that measures how the updates changed the routes (s)",
    "expert_change_fraction_layers": "expert_change_fraction of each MoE layer (list, 0-1)",
    "expert_mismatch_fraction": "share of (token, layer) expert sets that differ in engine and trainer (0-1)",
    "expert_mismatch_fraction_layers": "expert_mismatch_fraction of each MoE layer (list, 0-1)",
    "router_entropy": "mean entropy of the experts' shares of a token's router scores, before the updates (nats)",
    "router_entropy_layers": "router_entropy of each MoE layer (list, nats)",
    "expert_load_max": "largest over MoE layers of expert_load_max_layers (ratio)",
    "expert_load_max_layers": "tokens of a layer's fullest expert over the mean; 1 is balanced (list by MoE layer)",
    "dead_experts": "experts that got no token, over all MoE layers (count)",
    "dead_experts_layers": "experts that got no token, of each MoE layer (list of counts)",
    "expert_gradient_spread": "largest over MoE layers of expert_gradient_spread_layers (ratio)",
    "expert_gradient_spread_layers": "largest over median gradient norm of a layer's experts (list by MoE layer)",
}
"""Every key of metrics.jsonl, in order, with what it means and its unit. Not measured is null, never 0."""

TEXT_METRICS = frozenset({"engine"})

LIST_METRICS = frozenset(name for name in METRICS if name.endswith(("_mini_batches", "_layers")))
"""Metrics of several numbers; single ones may be null. TensorBoard and W&B get them as name/0, name/1 …"""

NON_FINITE = "non_finite"
"""Extra key of a row that had NaN or infinite values: {metric: "nan", "inf" or "-inf"}. The metric itself is null."""

SAMPLE_FIELDS: dict[str, str] = {
    "step": "rollout batch, counted as in metrics.jsonl",
    "prompt": "text the model read",
    "response": "text the model wrote",
    "reward": "its reward; null if the scorer failed or timed out",
    "finish_reason": "stop, length or abort",
    "policy_version": "version of the weights that wrote the response's first token",
    "advantage": "the advantage it was trained with; null if it was left out",
}
"""Every key of samples.jsonl, in order."""


Scalar = float | int | str | None


def _plain_list(value: Any) -> list[Scalar] | None:
    """A list of Python scalars from a sequence of numbers; None stays."""
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise TypeError(f"a metric of several numbers must be a list or None, not {type(value).__name__}")
    return [_plain(x) for x in value]


def _plain(value: Any) -> Scalar:
    """A Python scalar from a number, a NumPy scalar or a one-element tensor."""
    if value is None or isinstance(value, str):
        return value
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool | int | float):
        return value
    raise TypeError(f"a metric must be a number, text or None, not {type(value).__name__}")


def _complete(row: Mapping[str, Any], known: Mapping[str, str], what: str) -> dict[str, Any]:
    """The row's values under all known keys, in their order; null where the row has none."""
    for key in row:
        if key not in known:
            raise ValueError(f'"{key}" is no {what}.{nearest(key, known)} Add it to gspo_megatron/metrics.py first.')
    return {key: (_plain_list if key in LIST_METRICS else _plain)(row.get(key)) for key in known}


def flatten_lists(values: Mapping[str, Any]) -> dict[str, Scalar]:
    """The values with each list as name/0, name/1 …"""
    flat: dict[str, Scalar] = {}
    for key, value in values.items():
        flat |= {f"{key}/{i}": x for i, x in enumerate(value)} if isinstance(value, list) else {key: value}
    return flat


def _json_line(values: Mapping[str, Any]) -> str:
    """One line of JSON. JSON has no NaN: such a value becomes null and is named under NON_FINITE, in a list as
    name/position."""

    def finite(value: Any) -> Any:
        if isinstance(value, list):
            return [finite(x) for x in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    flat = flatten_lists(values)
    bad = {k: str(v) for k, v in flat.items() if isinstance(v, float) and not math.isfinite(v)}
    row: dict[str, Any] = {k: finite(v) for k, v in values.items()}
    if bad:
        row[NON_FINITE] = bad
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _append(file: FileIO, line: str) -> None:
    # backslashreplace: a lone surrogate in a response has no UTF-8 form, but "\udXXX" is its valid JSON escape.
    data = line.encode("utf-8", "backslashreplace")
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        raise CauseError(
            f"{file.name!s} cannot be written: {error.strerror}. Make room; the same command with --run.resume then "
            "goes on from the newest checkpoint"
        ) from error


def _drop_incomplete_line(path: Path) -> None:
    """Cut off what a killed run left of a last line, so that what is appended starts on a line of its own."""
    if not path.exists():
        return
    content = path.read_bytes()
    if not content or content.endswith(b"\n"):
        return
    kept = content.rfind(b"\n") + 1
    logger.warning("%s ended in an incomplete line (%d bytes); it was removed", path, len(content) - kept)
    with path.open("r+b") as file:
        file.truncate(kept)


class MetricsWriter:
    """Appends a run's metrics and samples to its folder, and to TensorBoard and Weights & Biases if asked.

    For rank 0 only. Usable as a context manager.

    Args:
        folder: the run folder; metrics.jsonl and samples.jsonl in it are appended to.
        tensorboard: write event files to `folder/tensorboard`.
        wandb_project: project name; empty means off. Its files go to `folder/wandb`. A resumed run is a new run there.
        config: the resolved config as nested plain values, recorded by TensorBoard and W&B.
        first_step: step that is written next; TensorBoard drops those from it on that an earlier start had written.

    Raises:
        UserError: a sink was asked for that is not installed, or that cannot start.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tensorboard: bool,
        wandb_project: str,
        config: dict[str, Any],
        first_step: int | None = None,
    ) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._tensorboard = _open_tensorboard(folder, config, first_step) if tensorboard else None
        self._wandb_run = _open_wandb(folder, wandb_project, config) if wandb_project else None
        for name in (METRICS_FILE, SAMPLES_FILE):
            _drop_incomplete_line(folder / name)
        # Nothing is buffered: what did not fit on a full disk must not be tried again while the run ends.
        self._metrics = (folder / METRICS_FILE).open("ab", buffering=0)
        self._samples = (folder / SAMPLES_FILE).open("ab", buffering=0)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one rollout batch's metrics. Keys of METRICS that the row lacks are written as null.

        Values are numbers, NumPy scalars, one-element tensors, text or None, for LIST_METRICS lists of such or None;
        `step` is needed.

        Raises:
            ValueError: a key is not in METRICS, or there is no `step`.
        """
        values = _complete(row, METRICS, "metric")
        step = values["step"]
        if not isinstance(step, int):
            raise ValueError(f"a row of metrics needs an integer step, not {step!r}")
        _append(self._metrics, _json_line(values))
        measured = {k: v for k, v in flatten_lists(values).items() if v is not None}
        if self._tensorboard is not None:
            for key, value in measured.items():
                if key != "step" and key not in TEXT_METRICS:
                    self._tensorboard.add_scalar(key, value, step)
            self._tensorboard.flush()
        if self._wandb_run is not None:
            self._wandb_run.log(measured)

    def write_samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rollouts of one batch; each row has keys of SAMPLE_FIELDS (without `step`).

        Raises:
            ValueError: a key is not in SAMPLE_FIELDS.
        """
        for row in rows:
            _append(self._samples, _json_line(_complete({**row, "step": step}, SAMPLE_FIELDS, "field of a sample")))

    def positions(self) -> tuple[int, int]:
        """Bytes of metrics.jsonl and samples.jsonl, which are on the disk when this returns."""
        for file in (self._metrics, self._samples):
            file.flush()
            os.fsync(file.fileno())
        return os.fstat(self._metrics.fileno()).st_size, os.fstat(self._samples.fileno()).st_size

    def close(self) -> None:
        """Close all files and sinks. May be called twice."""
        self._metrics.close()
        self._samples.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._wandb_run is not None:
            self._wandb_run.finish()
            self._wandb_run = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _open_tensorboard(folder: Path, config: dict[str, Any], first_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise UserError(
            f"log.tensorboard=true needs the package {error.name}: pip install tensorboard, "
            "or set log.tensorboard=false"
        ) from error
    writer = SummaryWriter(log_dir=str(folder / "tensorboard"), purge_step=first_step)
    writer.add_text("config", f"```json\n{json.dumps(config, indent=2, default=str)}\n```")
    return writer


def _open_wandb(folder: Path, project: str, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise UserError(
            f'log.wandb_project="{project}" needs the package {error.name}: pip install wandb, '
            'or set log.wandb_project=""'
        ) from error
    try:
        run = wandb.init(project=project, name=folder.resolve().name, dir=str(folder), config=config)
    except wandb.errors.Error as error:
        raise UserError(
            f'log.wandb_project="{project}": Weights & Biases did not start ({error}); run `wandb login`, '
            "or set WANDB_MODE=offline"
        ) from error
    # W&B's own step must never go back; after a resume ours does.
    run.define_metric("*", step_metric="step")
    return run
