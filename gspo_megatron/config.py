"""Settings: frozen dataclasses, one per concern. The text under a field is its help on the command line.

A command reads one TOML file with one table per section; every field can be overridden as
`--section.key value`. Local checks are here; what needs the model's config or several sections
together is checked in preflight.py.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from gspo_megatron.errors import UserError
from gspo_megatron.parallel import ParallelLayout

Value = bool | int | float | str


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _require_positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"{section}.{name}={value} must be positive")


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what makes it repeatable."""

    folder: str
    """Run folder; made if missing. It holds config.toml, metrics.jsonl, samples.jsonl, the report and weights."""
    seed: int = 0
    """Seed of weights, prompts and sampling."""
    overwrite: bool = False
    """Allow a run folder that already holds a run; its files are replaced."""
    resume: bool = False
    """Go on from the newest good checkpoint in the run folder; start anew if it has none. The same command can so be
    given again after any end of the run. Only for `train`."""

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**31, f"run.seed={self.seed} must lie between 0 and 2147483647")
        _require(
            not (self.resume and self.overwrite),
            "run.resume=true keeps the run in the folder, run.overwrite=true removes it; set one of them",
        )


@dataclass(frozen=True)
class ModelConfig:
    """The policy."""

    path: str
    """Hugging Face folder with config.json, tokenizer and (for init = "weights") safetensors."""
    init: Literal["weights", "random"] = "weights"
    """Start from the folder's weights, or from random weights of its config."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the policy's parameters. Gradients are reduced and optimizer state is kept in float32."""
    experts: Literal["grouped", "sequential"] = "grouped"
    """Products of a MoE layer's experts: all in one grouped product, or one expert after the other (for comparison)."""
    attention: Literal["torch", "transformer_engine"] = "torch"
    """Attention kernels: torch's own (flash attention over packed sequences on CUDA), or Transformer Engine's, which
    must be installed."""
    router_aux_loss: float = 0.0
    """Weight of the experts' load-balancing loss, of each sequence by itself and summed over MoE layers; in a balanced
    layer it is 1. 0: none."""
    router_z_loss: float = 0.0
    """Weight of the mean squared log-sum-exp of the router's logits, summed over MoE layers. 0: none."""
    routing_replay: Literal["off", "r2", "r3"] = "off"
    """Experts that a training pass sends tokens to: its own routers' choice; those that the pass for the old
    log-probabilities chose ("r2"); or, in both, those that the rollout engine chose ("r3")."""

    def __post_init__(self) -> None:
        for name in ("router_aux_loss", "router_z_loss"):
            value = getattr(self, name)
            _require(0 <= value < float("inf"), f"model.{name}={value} must be at least 0, e.g. 0.001; 0 for none")


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of parallelism. Ranks needed = tensor × context × pipeline × data."""

    tensor: int = 1
    """Tensor parallel degree (with sequence parallelism)."""
    pipeline: int = 1
    """Pipeline parallel degree; divides the number of layers."""
    context: int = 1
    """Context parallel degree: ranks that share each sequence's tokens."""
    data: int = 1
    """Data parallel degree: replicas of the model; each generates its own share of the prompts."""
    expert: int = 1
    """Expert parallel degree, over the ranks of tensor × context × data."""
    expert_tensor: int = 1
    """Tensor parallel degree inside an expert."""
    virtual_pipeline: int = 1
    """Model chunks per pipeline rank (interleaved schedule)."""
    timeout_s: float = 600.0
    """A collective that takes longer ends the run with an error, in seconds."""

    def __post_init__(self) -> None:
        _require(self.timeout_s >= 1, f"parallel.timeout_s={self.timeout_s} must be at least 1 second")
        _require(self.timeout_s <= 1e6, f"parallel.timeout_s={self.timeout_s} must be at most 1e6 seconds")
        self.layout()

    def layout(self) -> ParallelLayout:
        names = [f.name for f in fields(ParallelLayout)]
        return ParallelLayout(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class TaskConfig:
    """Prompts and verifiable rewards."""

    name: str
    """A registered task: "reasoning_gym" or "jsonl"."""
    dataset: str = ""
    """reasoning_gym: name of its data set, e.g. "spell_backward". jsonl: path of the training file."""
    eval_dataset: str = ""
    """jsonl: path of the held-out file. Empty: the last `holdout` rows of `dataset`."""
    holdout: int = 256
    """jsonl without eval_dataset: rows kept out of training for evaluation."""
    params: dict[str, Value] = field(default_factory=dict)
    """reasoning_gym: parameters of the data set, e.g. { min_word_len = 3 }."""
    prompt_pattern: str = ""
    """Regular expression with named groups searched in the question; its groups fill prompt_template."""
    prompt_template: str = ""
    """The prompt, with {name} for the named groups of prompt_pattern, or {question}. Empty: the question itself."""
    lowercase: bool = False
    """Lower-case the prompt."""
    reward_threshold: float | None = None
    """Reward 1 where the task's score is at least this, else 0. Unset: the score itself."""
    reward: str = ""
    """Own reward as "module:function", called as function(response_text, reference) -> number. Empty: the task's."""
    reward_timeout_s: float = 10.0
    """A response whose scoring takes longer is counted as timed out, in seconds."""
    reward_workers: int = 1
    """Worker processes for `reward`, per data-parallel rank."""

    def __post_init__(self) -> None:
        _require_positive("task", self, "reward_timeout_s", "reward_workers")
        _require(self.holdout >= 0, f"task.holdout={self.holdout} must be at least 0")


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
            _require(value is None or value > 0, f"algorithm.{name}={value} must be positive")
        _require(self.clip_low is None or self.clip_low < 1, f"algorithm.clip_low={self.clip_low} must be below 1")
        _require(
            self.dual_clip is None or self.dual_clip > 1,
            f"algorithm.dual_clip={self.dual_clip} must be above 1, e.g. 3.0; leave it out to switch it off",
        )
        _require(
            self.mini_batches is None or self.mini_batches >= 1,
            f"algorithm.mini_batches={self.mini_batches} must be at least 1",
        )
        _require_positive("algorithm", self, "dynamic_sampling_max_rounds", "old_logprobs_every")
        _require(
            self.old_logprobs_max_kl >= 0,
            f"algorithm.old_logprobs_max_kl={self.old_logprobs_max_kl} must be at least 0, e.g. 5e-5; 0: by the clip",
        )
        _require(
            self.mismatch_low is None or self.mismatch_low >= 0,
            f"algorithm.mismatch_low={self.mismatch_low} must be at least 0",
        )
        _require(
            self.mismatch_high is None or self.mismatch_high > 0,
            f"algorithm.mismatch_high={self.mismatch_high} must be positive",
        )
        _require(
            self.opsm_delta is None or self.opsm_delta > 0,
            f"algorithm.opsm_delta={self.opsm_delta} must be positive, e.g. 0.5; leave it out to switch it off",
        )


@dataclass(frozen=True)
class GenerationConfig:
    """Generation of responses."""

    engine: Literal["embedded", "sglang"] = "embedded"
    """"embedded": in process, on each data-parallel replica's first rank. "sglang": servers, see [sglang]."""
    max_response_tokens: int = 1024
    """Longest response, in tokens."""
    batch_size: int = 256
    """Embedded engine: responses generated together."""

    def __post_init__(self) -> None:
        _require_positive("rollout", self, "max_response_tokens", "batch_size")


@dataclass(frozen=True)
class RolloutConfig(GenerationConfig):
    """Generation of responses."""

    prompts_per_batch: int = 32
    """Prompts per rollout batch, over all data-parallel ranks."""
    samples_per_prompt: int = 8
    """Responses per prompt (the group size); at least 2."""
    temperature: float = 1.0
    """Sampling temperature; old and new log-probabilities are taken at the same temperature."""
    truncated: Literal["score", "zero", "mask", "drop"] = "score"
    """Responses cut at max_response_tokens: scored like others; reward 0; scored, but without gradient ("mask"); or
    also left out of the group's statistics ("drop"). They stay counted in N."""
    routed_experts: bool = False
    """Have the engine return the experts that it sent each token to. On by itself with model.routing_replay = "r3"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive("rollout", self, "prompts_per_batch", "temperature")
        _require(
            self.samples_per_prompt >= 2,
            f"rollout.samples_per_prompt={self.samples_per_prompt}: a group of one has no advantage; "
            "use at least 2, e.g. 8",
        )


@dataclass(frozen=True)
class SGLangConfig:
    """SGLang servers, read where rollout.engine = "sglang": those that are started here, or others by address."""

    addresses: str = ""
    """Servers that run already, as "http://host:port", separated by commas. Empty: start `servers` on this machine."""
    servers: int = 1
    """Servers to start on this machine, where `addresses` is empty."""
    tensor: int = 1
    """Tensor parallel degree of each server that is started."""
    expert: int = 1
    """Expert parallel degree of each server that is started; divides `tensor`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the servers' weights; auto: model.dtype. Weights are converted on the way."""
    host: str = "127.0.0.1"
    """Address a started server listens on. Other than 127.0.0.1 it asks for a key; see `api_key_file`."""
    port: int = 0
    """First port of the started servers, further ones take the next ports; 0: free ports."""
    api_key_file: str = ""
    """File with the servers' API key in its first line. Empty: the environment variable GSPO_SGLANG_API_KEY, else a
    new random key for servers that listen on other than 127.0.0.1, and none for those that do."""
    python: str = ".venv-sglang/bin/python"
    """Python in whose environment SGLang is installed (make setup-sglang)."""
    arguments: str = ""
    """Further arguments of sglang.launch_server, as on a command line."""
    router: str = ""
    """Address of an sglang-router in front of the servers; it gets the generation requests, the servers themselves all
    others. Empty: each request goes to the server with the fewest open ones."""
    max_concurrent: int = 256
    """Responses a server is asked for at one time, over all data-parallel ranks."""
    start_timeout_s: float = 600.0
    """Longest time a server may take to start and load the model, in seconds."""
    request_timeout_s: float = 1800.0
    """Longest time for one generation request, after which it is sent to another server, in seconds."""
    update_timeout_s: float = 300.0
    """Longest time for one call of a weight update, in seconds."""
    retries: int = 2
    """How often a failed weight update is tried again, and how often a server that died is started again in a row."""
    transport: Literal["distributed", "tensor", "disk"] = "distributed"
    """How weights reach the servers. "distributed": broadcast in a process group with them; "tensor": shared memory or
    CUDA IPC, on one machine; "disk": safetensors in a folder that the servers can read."""
    master_address: str = ""
    """distributed: address at which servers reach the training ranks. Empty: found out by each sending rank."""
    update_folder: str = ""
    """disk: folder for the weights, e.g. in /dev/shm or on a shared file system. Empty: in the run folder."""
    bucket_mb: int = 512
    """Weights sent together, in MiB; a rank needs at most twice that in addition. A larger tensor is sent alone."""
    check: Literal["sampled", "full", "off"] = "sampled"
    """After an update, compare checksums of the servers' parameters with the trainer's: of some layers, all or none."""
    probe_prompts: int = 4
    """Held-out prompts whose responses are sampled from every server after an update, to compare log-probabilities with
    the trainer's (sync_probe_max_abs); 0: none."""
    routed_experts: bool = False
    """Start servers that can return the experts of each token. On by itself where `rollout.routed_experts` or
    `model.routing_replay` asks for them. Named servers must have been started with --enable-return-routed-experts."""
    colocate: bool = False
    """The servers run on the trainer's GPUs: release their memory while the policy trains. With transport "tensor" or
    "disk"."""

    def __post_init__(self) -> None:
        _require_positive("sglang", self, "servers", "tensor", "expert", "max_concurrent", "bucket_mb")
        _require_positive("sglang", self, "start_timeout_s", "request_timeout_s", "update_timeout_s")
        for name in ("retries", "probe_prompts"):
            _require(getattr(self, name) >= 0, f"sglang.{name}={getattr(self, name)} must be at least 0")
        _require(
            0 <= self.port < 2**16, f"sglang.port={self.port} must lie between 1 and 65535, or be 0 for a free one"
        )
        _require(
            self.tensor % self.expert == 0,
            f"sglang.expert={self.expert} must divide sglang.tensor={self.tensor}, over whose ranks experts are spread",
        )
        _require(
            not self.colocate or self.transport != "distributed",
            'sglang.colocate=true cannot work with sglang.transport="distributed": trainer and server would be two '
            'ranks of one NCCL communicator on one GPU, which NCCL refuses; use transport "tensor", or "disk"',
        )
        for address in [*self.server_addresses, *filter(None, [self.router])]:
            _require(
                address.startswith(("http://", "https://")),
                f"sglang: the address {address!r} must start with http:// or https://, e.g. http://node7:30000",
            )
        addresses = self.server_addresses
        _require(
            bool(addresses) or not self.addresses,
            f"sglang.addresses={self.addresses!r} names no server; leave it out to start servers here",
        )
        twice = next((a for a, b in itertools.combinations(addresses, 2) if a.lower() == b.lower()), None)
        _require(twice is None, f"sglang.addresses names {twice} more than once; name each server once")

    @property
    def server_addresses(self) -> list[str]:
        """`addresses`, one by one."""
        return [address.strip().rstrip("/") for address in self.addresses.split(",") if address.strip()]


@dataclass(frozen=True)
class DataConfig:
    """Packing."""

    token_budget: int = 8192
    """Most tokens in a micro-batch, at least one longest sequence. The few padding tokens that tensor and context
    parallelism need come on top."""

    def __post_init__(self) -> None:
        _require_positive("data", self, "token_budget")


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
        _require_positive("optimizer", self, "lr", "eps")
        _require(
            (self.distributed and self.overlap_grad_reduce) or not self.overlap_param_gather,
            "optimizer.overlap_param_gather=true needs optimizer.distributed=true, whose shards it gathers, and "
            "optimizer.overlap_grad_reduce=true; set both, or leave overlap_param_gather out",
        )
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name}={value} must be at least 0 and below 1")
        _require(self.weight_decay >= 0, f"optimizer.weight_decay={self.weight_decay} must be at least 0")
        _require(
            self.clip_grad >= 0, f"optimizer.clip_grad={self.clip_grad} must be at least 0; 0 switches clipping off"
        )
        _require(
            0 <= self.min_lr <= self.lr, f"optimizer.min_lr={self.min_lr} must lie between 0 and optimizer.lr={self.lr}"
        )
        _require(self.warmup_steps >= 0, f"optimizer.warmup_steps={self.warmup_steps} must be at least 0")


@dataclass(frozen=True)
class MemoryConfig:
    """What is recomputed or moved to host memory to save device memory."""

    recompute: Literal["none", "selective", "moe", "full"] = "none"
    """Activations computed again in the backward pass instead of kept: none, the core attention's, the MoE layers',
    or whole layers'."""
    offload_optimizer: float = 0.0
    """Share of the optimizer's state and main parameters kept and updated in host memory, from 0 to 1."""
    offload_gradients: bool = False
    """Free the gradient buffers between training phases, for engines on the same devices."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.offload_optimizer <= 1,
            f"memory.offload_optimizer={self.offload_optimizer} must lie between 0 and 1",
        )


@dataclass(frozen=True)
class KernelsConfig:
    """How log-probabilities and the policy loss are computed."""

    implementation: Literal["native", "reference"] = "native"
    """native: the compiled kernels; reference: their definition in plain torch, slower, for debugging."""
    skip_zero_gradients: bool = True
    """Leave tokens without gradient out of the output layer's backward pass: of clipped responses, and of responses
    without advantage, where there is no KL and no entropy term. Leave out the backward pass of a whole micro-batch
    without gradient, but not under pipeline parallelism, experts spread over more ranks than tensor × context,
    overlapped reductions or routers' losses. A GPU is waited for each time."""


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation."""

    every: int = 0
    """Evaluate after every this many rollout batches (train) or steps (sft); 0: only before and after."""
    prompts: int = 256
    """Held-out prompts."""
    samples: int = 1
    """Responses per held-out prompt; avg@k and pass@k are reported for k up to it."""
    temperature: float = 1.0
    """Sampling temperature of evaluations."""

    def __post_init__(self) -> None:
        _require_positive("eval", self, "prompts", "samples", "temperature")
        _require(self.every >= 0, f"eval.every={self.every} must be at least 0")


@dataclass(frozen=True)
class LogConfig:
    """Where metrics go besides metrics.jsonl."""

    samples_per_batch: int = 4
    """Rollouts written to samples.jsonl per rollout batch of train."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run folder."""
    profile_batch: int = 0
    """The rollout batch of train that torch's profiler records, on every rank, into the run folder's `profile`;
    0: none."""
    wandb_project: str = ""
    """Weights & Biases project; empty: off. WANDB_MODE=offline works."""

    def __post_init__(self) -> None:
        for name in ("samples_per_batch", "profile_batch"):
            _require(getattr(self, name) >= 0, f"log.{name}={getattr(self, name)} must be at least 0")


@dataclass(frozen=True)
class TelemetryConfig:
    """What is measured of a training run beyond what each rollout batch gives anyway."""

    every: int = 20
    """Measure what costs extra in every this many rollout batches, from the first: experts' gradient norms, load and
    entropy, and by a further forward pass how the updates changed the experts of the batch's tokens; 0: never."""

    def __post_init__(self) -> None:
        _require(
            self.every >= 0, f"telemetry.every={self.every} must be at least 0; 0 measures nothing that costs extra"
        )

    def is_due(self, batch: int) -> bool:
        """Whether rollout batch `batch`, counted from 1, is measured."""
        return self.every > 0 and (batch - 1) % self.every == 0


@dataclass(frozen=True)
class WatchdogConfig:
    """What happens where the metrics of a training run show that something is wrong."""

    action: Literal["warn", "skip", "stop"] = "warn"
    """warn: say what it is when it begins. skip: also leave out the optimizer steps of mini-batches whose gradient norm
    is a spike or not finite, of which the latter otherwise ends the run. stop: also save a checkpoint and end the run,
    with exit code 1."""
    patience: int = 5
    """Rollout batches in a row before a reward under half of its best, or a clip that never acts, is reported."""
    entropy_floor: float = 1e-3
    """Entropy, in nats, under which nothing is explored any more."""
    spike: float = 10.0
    """A gradient norm of more than this many times its median over the rollout batches before, from the sixth on, is a
    spike."""

    def __post_init__(self) -> None:
        _require_positive("watchdog", self, "patience")
        _require(self.spike > 1, f"watchdog.spike={self.spike} must be above 1: it is a multiple of the median norm")
        _require(self.entropy_floor >= 0, f"watchdog.entropy_floor={self.entropy_floor} must be at least 0")


@dataclass(frozen=True)
class TrainLoopConfig:
    """Length of a training run."""

    rollout_batches: int = 100
    """Rollout batches; each makes algorithm.mini_batches optimizer steps."""

    def __post_init__(self) -> None:
        _require_positive("train", self, "rollout_batches")


@dataclass(frozen=True)
class CheckpointConfig:
    """Training checkpoints, in the run folder's `checkpoints`; what SIGTERM, SIGUSR1 and the deadline save."""

    every: int = 0
    """Save after every this many rollout batches, and after the last one; 0: only on a signal or at the deadline."""
    keep_last: int = 2
    """Newest checkpoints that are kept; older ones are removed."""
    keep_every: int = 0
    """Also keep those of every this many rollout batches; 0: none."""
    async_save: bool = True
    """Write while training goes on. One checkpoint at most is being written; the next waits for it."""
    deadline_s: float = 0.0
    """Save and stop, with exit code 75, at the first rollout batch that ends so many seconds after the ranks' processes
    have started; 0: never."""
    load: Literal["all", "weights"] = "all"
    """What run.resume takes from the checkpoint: all; or the weights alone, with new optimizer state, for layouts and
    settings that the optimizer's state does not fit."""

    def __post_init__(self) -> None:
        _require_positive("checkpoint", self, "keep_last")
        for name in ("every", "keep_every", "deadline_s"):
            _require(getattr(self, name) >= 0, f"checkpoint.{name}={getattr(self, name)} must be at least 0")


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
        _require_positive("sft", self, "steps", "batch_size")


@dataclass(frozen=True)
class TrainConfig:
    """Reinforcement learning."""

    run: RunConfig
    model: ModelConfig
    task: TaskConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sglang: SGLangConfig = field(default_factory=SGLangConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    train: TrainLoopConfig = field(default_factory=TrainLoopConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        _require(
            self.algorithm.old_logprobs == "recompute" or self.model.routing_replay != "r2",
            f'algorithm.old_logprobs="{self.algorithm.old_logprobs}" leaves out the pass whose experts '
            'model.routing_replay="r2" takes; use old_logprobs="recompute", or routing_replay="r3"',
        )
        if self.returns_routes and self.rollout.engine == "sglang":
            # Here, so that `serve` starts them with it too.
            object.__setattr__(self, "sglang", replace(self.sglang, routed_experts=True))

    @property
    def returns_routes(self) -> bool:
        """Whether rollouts carry the experts of their tokens."""
        return self.rollout.routed_experts or self.model.routing_replay == "r3"


@dataclass(frozen=True)
class SftConfig:
    """Supervised cold start."""

    run: RunConfig
    model: ModelConfig
    task: TaskConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    rollout: GenerationConfig = field(default_factory=GenerationConfig)
    sglang: SGLangConfig = field(default_factory=SGLangConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    sft: SftLoopConfig = field(default_factory=SftLoopConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)


@dataclass(frozen=True)
class MeasureSettings:
    """What `measure` measures of a policy; it does not train for the task's sake."""

    what: Literal["lengths", "flips", "precision"] = "lengths"
    """lengths: how ratios spread with the response's length, after an update and under rounded weights; flips: what
    experts chosen at random do to ratios, at fixed weights; precision: what inexact old log-probabilities do to the
    clip."""
    prompts: int = 128
    """Held-out prompts, each with one response."""
    response_tokens: int = 512
    """Length of each of these responses: no stop token ends them."""
    skip_tokens: int = 0
    """lengths: tokens sampled before these and left out. A model trained on short answers is another one inside them
    than behind them, and a change of noise along the response would pass for an effect of length."""
    updates: int = 1
    """lengths: rollout batches of training between before and after."""

    def __post_init__(self) -> None:
        _require_positive("measure", self, "updates")
        _require(self.skip_tokens >= 0, f"measure.skip_tokens={self.skip_tokens} must be at least 0")
        _require(self.prompts >= 2, f"measure.prompts={self.prompts} must be at least 2: spreads are over responses")
        _require(
            self.response_tokens >= 16,
            f"measure.response_tokens={self.response_tokens} must be at least 16: slopes need two lengths from 8 on",
        )


@dataclass(frozen=True)
class MeasureConfig(TrainConfig):
    """Measurements of a policy: a training run's config, and what is measured."""

    measure: MeasureSettings = field(default_factory=MeasureSettings)
