"""What is learned, and how."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from gspo_megatron.config.checks import require, require_positive


@dataclass(frozen=True)
class AlgorithmConfig:
    """The objective. An unset (null) field takes the algorithm's own default, the paper's where there is one."""

    name: str = "gspo"
    """A registered algorithm: gspo, gspo_token, grpo, cispo, gmpo, sapo, luspo, vespo or minirl. A field below that it
    does not have is refused."""
    clip_low: float | None = None
    """Ratios below 1 - clip_low are clipped for negative advantages. gspo 3e-4, luspo 2e-3, grpo and minirl 0.2, gmpo
    0.33 (1 - e^-0.4)."""
    clip_high: float | None = None
    """Ratios above 1 + clip_high are clipped for positive advantages. gspo 4e-4, luspo 2.5e-3, grpo and minirl 0.27,
    gmpo 0.49 (e^0.4 - 1); cispo 4, of the weight and for both signs."""
    dual_clip: float | None = None
    """gspo, gspo_token, grpo, luspo: for negative advantages the loss is at most dual_clip × |advantage|; above 1.
    Unset: off."""
    sapo_tau_positive: float | None = None
    """sapo: temperature of the gate for positive advantages. 1."""
    sapo_tau_negative: float | None = None
    """sapo: temperature of the gate for negative advantages. 1.05."""
    vespo_c1_positive: float | None = None
    """vespo: power of the sequence weight W in W^c1·e^(c2(1-W)), for positive advantages. 2."""
    vespo_c2_positive: float | None = None
    """vespo: rate of the exponential, for positive advantages. 3."""
    vespo_c1_negative: float | None = None
    """vespo: power of W, for negative advantages. 3."""
    vespo_c2_negative: float | None = None
    """vespo: rate of the exponential, for negative advantages. 2."""
    kl_coefficient: float | None = None
    """Weight of the k3 KL term to the reference model (the initial weights). 0: no reference model."""
    entropy_coefficient: float | None = None
    """Weight of the entropy bonus."""
    normalize_std: bool | None = None
    """Divide advantages by the group's standard deviation. true; vespo and minirl false."""
    mini_batches: int | None = None
    """Optimizer steps per rollout batch. 4."""
    dynamic_sampling: bool | None = None
    """Keep only groups whose rewards differ, drawing further prompts until the batch is full."""
    dynamic_sampling_max_rounds: int = 4
    """dynamic_sampling: rounds of prompts at most; then groups of equal rewards fill the batch."""
    aggregation: Literal["sequence_mean", "token_sum", "token_mean"] | None = None
    """How token terms become a loss: mean over a response's tokens, then over responses; sum over a response's tokens,
    then mean over responses; mean over all tokens. It is part of the algorithm: another than its own is refused."""
    mismatch: Literal["off", "truncate", "mask", "geometric"] | None = None
    """Weight tokens by the trainer/engine probability ratio: truncated at mismatch_high (TIS), or 0 outside the band
    [mismatch_low, mismatch_high] (MIS); or drop responses whose geometric mean of it is outside the band (Geo-RS).
    off; minirl truncate."""
    mismatch_low: float | None = None
    """mask: smallest ratio kept, 0.5; geometric: smallest mean kept, 0.999."""
    mismatch_high: float | None = None
    """truncate: largest weight, 2, minirl 5; mask: largest ratio kept, 2; geometric: largest mean kept, 1.001."""
    opsm_delta: float | None = None
    """Drop responses with a negative advantage whose tokens the engine finds likelier than the present policy does, by
    more than this many nats a token (OPSM). Usual: 0.5. Unset: off."""
    allow_unusual_clip: bool = False
    """Accept a clip of 0.05 or more, GRPO's scale, under gspo, gspo_token or luspo, which then hardly ever clip."""
    old_logprobs: Literal["recompute", "rollout", "auto"] = "recompute"
    """Where the old policy's log-probabilities come from: the trainer, in a pass of its own; the rollout engine, which
    ends the run where the two differ by more than the clip bears; or "auto", the engine as long as they do not."""
    old_logprobs_max_kl: float = 0.0
    """rollout, auto: largest KL of engine and trainer, nats a token. 0: at which it alone clips 5 % of the responses
    with a negative advantage; about 5e-5 for responses of 4096 tokens and clip_low 3e-4, less for shorter ones."""
    old_logprobs_every: int = 10
    """rollout, auto: recompute and measure in the first and in every this many rollout batches. Batches in which
    telemetry.every compares experts are recomputed too."""
    shuffle_advantages: bool = False
    """Control experiment: permute the advantages within each group, which must remove the gain."""

    def __post_init__(self) -> None:
        for name in (
            "clip_low",
            "clip_high",
            *(f.name for f in fields(self) if f.name.startswith(("sapo_", "vespo_"))),
        ):
            value = getattr(self, name)
            require(value is None or value > 0, f"algorithm.{name}={value} must be positive")
        require(self.clip_low is None or self.clip_low < 1, f"algorithm.clip_low={self.clip_low} must be below 1")
        require(
            self.dual_clip is None or self.dual_clip > 1,
            f"algorithm.dual_clip={self.dual_clip} must be above 1, e.g. 3.0; leave it out to switch it off",
        )
        require(
            self.mini_batches is None or self.mini_batches >= 1,
            f"algorithm.mini_batches={self.mini_batches} must be at least 1",
        )
        require_positive("algorithm", self, "dynamic_sampling_max_rounds", "old_logprobs_every")
        require(
            self.old_logprobs_max_kl >= 0,
            f"algorithm.old_logprobs_max_kl={self.old_logprobs_max_kl} must be at least 0, e.g. 5e-5; 0: by the clip",
        )
        require(
            self.mismatch_low is None or self.mismatch_low >= 0,
            f"algorithm.mismatch_low={self.mismatch_low} must be at least 0",
        )
        require(
            self.mismatch_high is None or self.mismatch_high > 0,
            f"algorithm.mismatch_high={self.mismatch_high} must be positive",
        )
        require(
            self.opsm_delta is None or self.opsm_delta > 0,
            f"algorithm.opsm_delta={self.opsm_delta} must be positive, e.g. 0.5; leave it out to switch it off",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW through Megatron's distributed optimizer."""

    lr: float = 1e-6
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Decay after the warm-up, over the run's optimizer steps."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    beta1: float = 0.9
    """Adam's first moment."""
    beta2: float = 0.95
    """Adam's second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip_grad: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 switches it off."""
    distributed: bool = True
    """Shard the optimizer's state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather the updated parameters during the next forward pass; needs optimizer.distributed."""

    def __post_init__(self) -> None:
        require_positive("optimizer", self, "lr", "eps")
        require(
            (self.distributed and self.overlap_grad_reduce) or not self.overlap_param_gather,
            "optimizer.overlap_param_gather=true needs optimizer.distributed=true, whose shards it gathers, and "
            "optimizer.overlap_grad_reduce=true; set both, or leave overlap_param_gather out",
        )
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}={value} must be at least 0 and below 1")
        require(self.weight_decay >= 0, f"optimizer.weight_decay={self.weight_decay} must be at least 0")
        require(
            self.clip_grad >= 0, f"optimizer.clip_grad={self.clip_grad} must be at least 0; 0 switches clipping off"
        )
        require(
            0 <= self.min_lr <= self.lr, f"optimizer.min_lr={self.min_lr} must lie between 0 and optimizer.lr={self.lr}"
        )
        require(self.warmup_steps >= 0, f"optimizer.warmup_steps={self.warmup_steps} must be at least 0")


@dataclass(frozen=True)
class DataConfig:
    """Packing."""

    token_budget: int = 8192
    """Most tokens in a micro-batch, at least one longest sequence. The few padding tokens that tensor and context
    parallelism need come on top."""

    def __post_init__(self) -> None:
        require_positive("data", self, "token_budget")


@dataclass(frozen=True)
class TrainLoopConfig:
    """Length of a training run."""

    rollout_batches: int = 100
    """Rollout batches; each makes algorithm.mini_batches optimizer steps."""

    def __post_init__(self) -> None:
        require_positive("train", self, "rollout_batches")


@dataclass(frozen=True)
class SftLoopConfig:
    """Supervised cold start on the task's worked answers."""

    steps: int = 300
    """Optimizer steps at most."""
    batch_size: int = 128
    """Worked answers per step, over all data-parallel ranks."""
    target_accuracy: float | None = None
    """Stop at the first evaluation whose held-out accuracy is at least this; needs eval.every. Unset: run all steps."""

    def __post_init__(self) -> None:
        require_positive("sft", self, "steps", "batch_size")
