"""Prompts, rewards and responses."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Literal

from gspo_megatron.config.checks import require, require_positive

Value = bool | int | float | str


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
        require_positive("task", self, "reward_timeout_s", "reward_workers")
        require(self.holdout >= 0, f"task.holdout={self.holdout} must be at least 0")


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
        require_positive("rollout", self, "max_response_tokens", "batch_size")


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
        require_positive("rollout", self, "prompts_per_batch", "temperature")
        require(
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
        require_positive("sglang", self, "servers", "tensor", "expert", "max_concurrent", "bucket_mb")
        require_positive("sglang", self, "start_timeout_s", "request_timeout_s", "update_timeout_s")
        for name in ("retries", "probe_prompts"):
            require(getattr(self, name) >= 0, f"sglang.{name}={getattr(self, name)} must be at least 0")
        require(0 <= self.port < 2**16, f"sglang.port={self.port} must lie between 1 and 65535, or be 0 for a free one")
        require(
            self.tensor % self.expert == 0,
            f"sglang.expert={self.expert} must divide sglang.tensor={self.tensor}, over whose ranks experts are spread",
        )
        require(
            not self.colocate or self.transport != "distributed",
            'sglang.colocate=true cannot work with sglang.transport="distributed": trainer and server would be two '
            'ranks of one NCCL communicator on one GPU, which NCCL refuses; use transport "tensor", or "disk"',
        )
        for address in [*self.server_addresses, *filter(None, [self.router])]:
            require(
                address.startswith(("http://", "https://")),
                f"sglang: the address {address!r} must start with http:// or https://, e.g. http://node7:30000",
            )
        addresses = self.server_addresses
        require(
            bool(addresses) or not self.addresses,
            f"sglang.addresses={self.addresses!r} names no server; leave it out to start servers here",
        )
        twice = next((a for a, b in itertools.combinations(addresses, 2) if a.lower() == b.lower()), None)
        require(twice is None, f"sglang.addresses names {twice} more than once; name each server once")

    @property
    def server_addresses(self) -> list[str]:
        """`addresses`, one by one."""
        return [address.strip().rstrip("/") for address in self.addresses.split(",") if address.strip()]
