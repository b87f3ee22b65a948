"""What passes between the stages of a step.

Letters in shapes: L tokens of one rollout, T packed tokens of one micro-batch, S sequences of one
micro-batch, G rollouts of one prompt (the group), k experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Prompt:
    """One question of a task."""

    id: int  # position in the task's endless, seeded order of prompts: the same on every rank and every run
    text: str  # what the model reads, before tokenisation (the chat template is in token_ids)
    token_ids: list[int]  # [L]
    reference: Any  # what the task needs to score a response: an answer, an entry of a data set


@dataclass(frozen=True)
class Rollout:
    """One sampled response, with its prompt's tokens in front."""

    prompt_id: int
    token_ids: Tensor  # [L] int64, prompt then response
    response_mask: Tensor  # [L] bool, True where the policy chose the token
    rollout_logprobs: Tensor  # [L] float32, the engine's log-probability of each token; 0 outside the response
    policy_versions: Tensor  # [L] int32, version of the weights that produced the token; -1 outside the response
    finish_reason: FinishReason
    reward: float | None = None  # None: not scored, or the scorer failed
    routes: Tensor | None = None  # [L-1, moe_layers, k] int16, experts of *input* token i
    routes_valid: Tensor | None = None  # [L-1] bool


@dataclass(frozen=True)
class Group:
    """All rollouts of one prompt. Advantages are computed from it, never stored in it."""

    prompt: Prompt
    rollouts: list[Rollout]  # [G]


@dataclass(frozen=True)
class Sequence:
    """One rollout with its advantage, ready to be packed. Token-aligned, like Rollout."""

    index: int  # position in the global rollout batch
    token_ids: Tensor  # [L] int64
    response_mask: Tensor  # [L] bool; all False for a sequence that trains nothing but is counted in N
    rollout_logprobs: Tensor  # [L] float32
    advantages: Tensor  # [] one value for the response, or [L] one a token (float32)
    routes: Tensor | None = None  # [L-1, layers, k] int16, experts of *input* token i; those of RouteShape's layers
    routes_valid: Tensor | None = None  # [L-1] bool


@dataclass(frozen=True)
class RouteShape:
    """Of which MoE layers one rank keeps routes. Layers are counted among the model's MoE layers, from 0."""

    layers: tuple[int, ...]  # of this rank's pipeline stage, ascending
    num_layers: int  # of the whole model
    experts_per_token: int  # k


@dataclass(frozen=True)
class RecordedRoutes:
    """What the routers of one rank chose in a micro-batch without being told, on the device.

    Rows are the run of the micro-batch's tokens that this rank's routers see (T/tp of them, see RouteShape for the
    layers): each (real token, layer) of a rollout batch is in one row of one rank, and sums over the ranks are exact.
    Of a replayed pass it is what the routers would have chosen for the hidden states that replay made.
    """

    layers: tuple[int, ...]  # places among the model's MoE layers, ascending: axis 1 of `experts`
    first_token: int  # row i is token first_token + i of the micro-batch
    is_real: Tensor  # [T/tp] bool, False for padding; whatever is there counts nowhere
    experts: Tensor  # [T/tp, layers, k] int16, most probable first
    entropy: Tensor  # [layers] float64, of the experts' shares of a token's scores (nats), summed over real tokens
    load: Tensor  # [layers, E] int64, real tokens that chose each expert


@dataclass
class MicroBatch:
    """Sequences packed end to end. Everything but token_ids and positions is target-aligned:
    entry t concerns token t+1 of the same sequence, so a sequence's last entry is never used.

    Under context parallelism T and cu_seqlens are this rank's share: of each sequence, cut into twice as many
    chunks as there are ranks, one from the front and one from the back. S, sequence_ids and [S] values are whole.
    """

    token_ids: Tensor  # [T] int64
    targets: Tensor  # [T] int64
    positions: Tensor  # [T] int64, from 0 in each sequence
    cu_seqlens: Tensor  # [S+1] int32
    sequence_ids: Tensor  # [S] int64, Sequence.index; -1 for padding, which holds no response token
    lengths: Tensor  # [S] int64, real tokens of the whole sequence; 0 for padding
    response_mask: Tensor  # [T] bool
    rollout_logprobs: Tensor  # [T] float32
    advantages: Tensor  # [S] or [T] float32
    max_seqlen: int  # the longest sequence, in tokens
    num_padding_tokens: int  # of the whole pack, behind sequences and at its end
    old_logprobs: Tensor | None = None  # [T] float32, the trainer's recompute; last pipeline stage only
    reference_logprobs: Tensor | None = None  # [T] float32, last pipeline stage only
    routes: Tensor | None = None  # [T/tp, layers, k] int16, the engine's experts, in the rows of RecordedRoutes
    routes_valid: Tensor | None = None  # [T/tp] bool, False for padding and tokens without a route
    recorded: RecordedRoutes | None = None  # of the pass that filled old_logprobs
    response_tokens: Tensor = field(init=False)  # [R] int64: where response_mask is true

    def __post_init__(self) -> None:
        # Here, before the batch moves to a device, which would have to be waited for.
        self.response_tokens = self.response_mask.nonzero().squeeze(1)

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.numel())


@dataclass(frozen=True)
class StepBatch:
    """What one optimizer step consumes on one data-parallel rank."""

    micro_batches: list[MicroBatch]  # as many on every data-parallel rank
    num_global_sequences: int  # N: over all ranks and micro-batches, fully masked sequences included
    num_global_tokens: int  # response tokens over all ranks and micro-batches, masked ones left out


@dataclass(frozen=True)
class NamedTensor:
    """A tensor under its name in the Hugging Face checkpoint."""

    name: str
    tensor: Tensor


@dataclass(frozen=True)
class ScoreReport:
    """How the rewards of one batch of rollouts came about."""

    num_scored: int = 0
    num_failed: int = 0  # the scorer raised or returned something that is no number
    num_timed_out: int = 0
    first_error: str | None = None
