"""Core attention over packed sequences under context parallelism, without Transformer Engine.

Layout: under context parallelism each sequence of P tokens (P a multiple of 2·CP) is cut into 2·CP chunks
of c tokens; rank r holds chunks r and 2·CP-1-r, one behind the other (zigzag), so that every rank has the same
share of the causal triangle. The chunks of a rank are *segments*: the queries of a segment stay where they
are, its keys are those of the sequence from the start to the segment's own end, gathered over the ranks. A
segment is therefore one row of causal attention, aligned at the bottom right, with more keys than queries.

Queries and keys are rotated here, by the positions of the micro-batch's plan, not by Megatron's attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from gspo_megatron.errors import UserError
from gspo_megatron.groups import Group
from gspo_megatron.ops.reference import sequence_of_token

if TYPE_CHECKING:
    from gspo_megatron.policy.router import RouterInputs

KINDS = ("torch", "transformer_engine")
FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_MAX_HEAD_DIM = 256
FLASH_MIN_CAPABILITY = (8, 0)


@dataclass
class AttentionPlan:
    """Which keys each segment looks at.

    N segments: the S sequences without context parallelism, 2·S chunks with it. K keys in all: T, or
    (2·CP+1)·c for each sequence.
    """

    num_tokens: int  # T, local
    cu_seqlens_query: Tensor  # [N+1] int32, into the local tokens
    cu_seqlens_key: Tensor  # [N+1] int32, into the keys picked by key_index
    longest_query: int  # of a segment
    longest_key: int
    key_index: Tensor | None  # [K] int64, into the [CP·T] gathered keys; None without context parallelism
    positions: Tensor  # [T] int64, of the local tokens, each in its sequence

    @cached_property
    def segment_lengths(self) -> tuple[list[int], list[int]]:
        """Queries and keys of each segment, on the host. Read from the device when first asked for: the variable-length
        kernel does without."""
        return self.cu_seqlens_query.diff().tolist(), self.cu_seqlens_key.diff().tolist()


def plan_attention(
    cu_seqlens: Tensor,  # [S+1] int32, local
    longest: int,  # local
    num_tokens: int,  # local
    *,
    context_rank: int,
    context_size: int,
) -> AttentionPlan:
    """The plan of one rank. Pure; nothing is read back from the device, since all sizes follow from T."""
    if context_size == 1:
        _, positions = _segment_of(cu_seqlens, num_tokens)
        return AttentionPlan(num_tokens, cu_seqlens, cu_seqlens, longest, longest, None, positions)
    assert longest % 2 == 0 and num_tokens % 2 == 0, f"{longest=}, {num_tokens=}: a rank holds two chunks of each"
    chunk = cu_seqlens.diff() // 2  # [S], tokens in a chunk
    front, back = context_rank + 1, 2 * context_size - context_rank  # chunks that a segment looks at
    cu_queries = _offsets(torch.stack([chunk, chunk], 1).flatten())
    cu_keys = _offsets(torch.stack([chunk * front, chunk * back], 1).flatten())
    own, place = _segment_of(cu_queries, num_tokens)
    positions = torch.where(own % 2 == 0, front - 1, back - 1) * chunk.long()[own // 2] + place
    segment, position = _segment_of(cu_keys, num_tokens // 2 * (front + back))
    sequence = segment // 2
    chunk_size = chunk.long()[sequence]
    at, within = position // chunk_size, position % chunk_size  # at: which of the sequence's 2·CP chunks
    second = at >= context_size  # the second of the two that its rank holds
    rank = torch.where(second, 2 * context_size - 1 - at, at)
    return AttentionPlan(
        num_tokens=num_tokens,
        cu_seqlens_query=cu_queries,
        cu_seqlens_key=cu_keys,
        longest_query=longest // 2,
        longest_key=longest // 2 * back,
        key_index=rank * num_tokens + cu_seqlens.long()[sequence] + second * chunk_size + within,
        positions=positions,
    )


@dataclass(kw_only=True)
class PackedSequences(PackedSeqParams):
    """Megatron's parameters of a packed micro-batch, our attention's plan for it, and what its routers are told.

    Megatron's own fields hold global, padded offsets: rotary embeddings and Transformer Engine take this
    rank's share by themselves.
    """

    cu_seqlens: Tensor  # [S+1] int32, local
    longest: int  # local
    context_rank: int
    context_size: int
    router_inputs: RouterInputs | None = None
    rotary_angles: Tensor | None = None  # [≥ longest sequence, 1, 1, rotary_dim], of each position; None: no rotation
    rotary_factor: float = 1.0  # on cosine and sine
    _plan: AttentionPlan | None = None
    _rotation: tuple[Tensor, Tensor] | None = None

    def plan(self, num_tokens: int) -> AttentionPlan:
        """The plan for the T local tokens; made by the first layer, kept for the others and for recomputation."""
        if self._plan is None:
            self._plan = plan_attention(
                self.cu_seqlens,
                self.longest,
                num_tokens,
                context_rank=self.context_rank,
                context_size=self.context_size,
            )
        assert self._plan.num_tokens == num_tokens, f"planned for {self._plan.num_tokens} tokens, given {num_tokens}"
        return self._plan

    def rotation(self, num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the T local tokens' angles, [T, 1, rotary_dim] each, the first half of the sine negated.

        Made by the first layer, kept for the others.
        """
        if self._rotation is None:
            assert self.rotary_angles is not None
            own = self.rotary_angles.flatten(1)[self.plan(num_tokens).positions][:, None]
            sign = torch.ones_like(own)
            sign[..., : own.shape[-1] // 2] = -1
            cos, sin = own.cos() * self.rotary_factor, own.sin() * sign * self.rotary_factor
            self._rotation = cos.to(dtype), sin.to(dtype)
        return self._rotation


def packed_sequences(
    cu_seqlens: Tensor,  # [S+1] int32, local
    longest: int,  # local
    *,
    context_rank: int,
    context_size: int,
    router_inputs: RouterInputs | None = None,
) -> PackedSequences:
    """What the model takes as `packed_seq_params` of one micro-batch.

    With context_size > 1 every sequence's local length is even, two chunks; without it is any.
    """
    offsets = cu_seqlens * context_size
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        max_seqlen_q=longest * context_size,
        max_seqlen_kv=longest * context_size,
        cu_seqlens=cu_seqlens,
        longest=longest,
        context_rank=context_rank,
        context_size=context_size,
        router_inputs=router_inputs,
    )


def _offsets(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _segment_of(cu_seqlens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Of each token, its segment and its position in the segment. [num_tokens] int64 each."""
    segment = sequence_of_token(cu_seqlens, num_tokens)
    return segment, torch.arange(num_tokens, device=cu_seqlens.device) - cu_seqlens.long()[segment]


class Rotate(torch.autograd.Function):
    """Rotary embedding of queries or keys, in the roundings of Megatron's own.

    x [T, heads, head_dim], cos and sin [T, 1, rotary_dim], as `PackedSequences.rotation` gives them -> like x. What a
    head has beyond rotary_dim stays as it is.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
        turned = (turned * cos).add_(_swap_halves(turned).mul_(sin))
        return turned if rest.shape[-1] == 0 else torch.cat([turned, rest], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        [gradient], (cos, sin) = gradients, ctx.saved_tensors
        turned, rest = gradient.split([cos.shape[-1], gradient.shape[-1] - cos.shape[-1]], -1)
        turned = (turned * cos).sub_(_swap_halves(turned).mul_(sin))
        return turned if rest.shape[-1] == 0 else torch.cat([turned, rest], -1), None, None


def _swap_halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([second, first], -1)


class GatherKeys(torch.autograd.Function):
    """Keys and values of the segments, from all ranks of the context-parallel group.

    One all-gather for both; backward one reduce-scatter, its sums in float32 or better.
    """

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, index: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        """key, value [T, groups, head_dim], index [K] -> keys and values [K, groups, head_dim]. Their head_dim may
        differ."""
        ctx.save_for_backward(index)
        ctx.group, ctx.dtype, ctx.sizes = group, key.dtype, [key.shape[-1], value.shape[-1]]
        local = torch.cat([key, value], -1)
        gathered = local.new_empty((group.size() * local.shape[0], *local.shape[1:]))
        dist.all_gather_into_tensor(gathered, local, group=group)
        ctx.shape = gathered.shape
        keys, values = (part.index_select(0, index) for part in gathered.split(ctx.sizes, -1))
        return keys, values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (index,) = ctx.saved_tensors
        dtype = torch.promote_types(ctx.dtype, torch.float32)
        gathered = torch.zeros(ctx.shape, dtype=dtype, device=index.device)
        for part, gradient in zip(gathered.split(ctx.sizes, -1), gradients, strict=True):
            # Twice at most a key is one rank's: a sum of two does not depend on their order.
            part.index_add_(0, index, gradient.to(dtype))
        local = gathered.new_empty((ctx.shape[0] // ctx.group.size(), *ctx.shape[1:]))
        dist.reduce_scatter_tensor(local, gathered, group=ctx.group)
        key, value = local.to(ctx.dtype).split(ctx.sizes, -1)
        return key, value, None, None


def _find_varlen_attn() -> Callable[..., Tensor] | None:
    """torch's variable-length flash attention, if this torch has it with all that is asked of it."""
    if find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= known.keys():
        return None
    attention = cast("Callable[..., Tensor]", varlen_attn)  # one tensor where no auxiliary output is asked for
    if "enable_gqa" in known:
        return attention

    def without_flag(*args: Any, enable_gqa: bool, **kwargs: Any) -> Tensor:
        return attention(*args, **kwargs)  # torch 2.11: the kernel takes grouped queries without being told

    return without_flag


_varlen_attn = _find_varlen_attn()


def uses_flash(query: Tensor) -> bool:
    """Whether `attend` takes torch's variable-length flash attention, else scaled_dot_product_attention.

    Flash: a CUDA device of capability 8.0 or more, bfloat16 or float16, a head_dim that is a multiple of 8
    up to 256, a torch with `varlen_attn` (grouped queries included) and built with flash attention.
    """
    head_dim = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in FLASH_DTYPES
        and head_dim % 8 == 0
        and head_dim <= FLASH_MAX_HEAD_DIM
        and _varlen_attn is not None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= FLASH_MIN_CAPABILITY
    )


def attend(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, *, scale: float) -> Tensor:
    """Causal attention of each segment's queries to its keys.

    query [T, heads, head_dim]; key [K, groups, head_dim], value [K, groups, value_dim], as picked by `key_index`
    -> [T, heads, value_dim]. `uses_flash` decides by what.
    """
    grouped = query.shape[1] != key.shape[1]
    if uses_flash(query):
        assert _varlen_attn is not None
        value_dim = value.shape[-1]  # the kernel wants it to be the keys': zeros make up for the rest
        if value_dim < key.shape[-1]:
            value = F.pad(value, (0, key.shape[-1] - value_dim))
        out = _varlen_attn(
            query,
            key,
            value,
            plan.cu_seqlens_query,
            plan.cu_seqlens_key,
            plan.longest_query,
            plan.longest_key,
            scale=scale,
            window_size=(-1, 0),  # causal; flash attention aligns it at the bottom right
            enable_gqa=grouped,
        )
        return out[..., :value_dim]
    # One segment at a time: padded to the longest, a pack of many lengths is mostly padding.
    lengths_q, lengths_k = plan.segment_lengths
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))  # [1, heads, T or K, head_dim]
    outputs = []
    for q, k, v in zip(query.split(lengths_q, 2), key.split(lengths_k, 2), value.split(lengths_k, 2), strict=True):
        mask = _causal_mask(q.shape[2], k.shape[2], q.device)
        result = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
        outputs.append(result.transpose(1, 2))
    return torch.cat(outputs, 1).squeeze(0)


def _causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
    """[num_queries, num_keys] bool: the last query sees the last key. None where torch's own causal mask is that."""
    if num_queries == num_keys:
        return None
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)


class PackedAttention(MegatronModule):
    """Causal attention within each sequence of a pack (Megatron's THD format), over the context-parallel group.

    Constructed as Megatron constructs a core attention. `cp_comm_type` is Transformer Engine's affair: here
    keys and values are always gathered.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        assert dropout == 0 and config.window_size is None and not config.apply_query_key_layer_scaling
        assert not config.rotary_interleaved and not config.no_rope_freq, "every layer rotates halves"
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])
        self.cp_group: Group = pg_collection.cp
        self.rotates: bool = not config.multi_latent_attention  # that one rotates a part of each head by itself
        self.scale: float = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,  # [T, heads, head_dim]
        key: Tensor,  # [T, groups, head_dim]
        value: Tensor,  # [T, groups, value_dim]
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:  # [T, heads × value_dim]
        assert attention_mask is None and attention_bias is None
        assert isinstance(packed_seq_params, PackedSequences), "packed_seq_params come from packed_sequences()"
        num_tokens = query.shape[0]
        plan = packed_seq_params.plan(num_tokens)
        if self.rotates and packed_seq_params.rotary_angles is not None:
            cos, sin = packed_seq_params.rotation(num_tokens, query.dtype)
            query, key = Rotate.apply(query, cos, sin), Rotate.apply(key, cos, sin)
        if plan.key_index is not None:
            assert packed_seq_params.context_size == self.cp_group.size()
            key, value = GatherKeys.apply(key, value, plan.key_index, self.cp_group)
        return self.attend(query, key, value, plan).flatten(1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        """query [T, heads, head_dim]; key, value [K, groups, …] -> [T, heads, value_dim]"""
        return attend(query, key, value, plan, scale=self.scale)


def core_attention(kind: str) -> type[torch.nn.Module]:
    """The class of core attention by `model.attention`, for a layer's ModuleSpec.

    "torch" is PackedAttention; "transformer_engine" is Megatron's wrapper of Transformer Engine's.
    Raises UserError if Transformer Engine is asked for and not installed, or for another kind.
    """
    if kind == "torch":
        return PackedAttention
    if kind != "transformer_engine":
        raise UserError(f"model.attention={kind!r}; use one of {', '.join(KINDS)}")
    from megatron.core.extensions import transformer_engine

    if not transformer_engine.HAVE_TE:
        raise UserError(
            'model.attention="transformer_engine", but Transformer Engine is not installed; '
            'install it or set model.attention="torch"'
        )
    return transformer_engine.TEDotProductAttention
