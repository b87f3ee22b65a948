"""How tensors of a Hugging Face checkpoint and parameters of a Megatron model correspond.

A family lists its correspondence once, as rules; loading and exporting read the same list in the two
directions. Everything here is pure: names, shapes and slices, no process group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gspo_megatron.parallel import ParallelLayout


class Codec(Protocol):
    """Turns the HF tensors of one rule into the whole Megatron parameter, cuts that into shards, and puts a shard back
    to where it belongs in the HF tensors."""

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor: ...

    def shard(self, tensor: Tensor, dim: int, index: int, count: int) -> Tensor: ...

    def place(self, shard: Tensor, dim: int | None, index: int, count: int, targets: Sequence[Tensor]) -> None:
        """Copy one of `count` shards into its part of the HF tensors, converting the dtype. `dim` None: the shard is
        the whole parameter."""
        ...


@dataclass(frozen=True)
class Copy:
    """The same tensor on both sides."""

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0]

    def shard(self, tensor: Tensor, dim: int, index: int, count: int) -> Tensor:
        return tensor.chunk(count, dim)[index]

    def place(self, shard: Tensor, dim: int | None, index: int, count: int, targets: Sequence[Tensor]) -> None:
        piece(targets[0], dim, index, count).copy_(shard)


@dataclass(frozen=True)
class QKV(Copy):
    """q, k, v projections interleaved by query group: [q…q k v] per group, groups cut over tensor ranks."""

    num_query_groups: int
    heads_per_group: int
    head_dim: int

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        rest = tensors[0].shape[1:]
        per_projection = (self.heads_per_group, 1, 1)
        parts = [
            t.reshape(self.num_query_groups, heads * self.head_dim, *rest)
            for t, heads in zip(tensors, per_projection, strict=True)
        ]
        return torch.cat(parts, dim=1).flatten(0, 1)

    def place(self, shard: Tensor, dim: int | None, index: int, count: int, targets: Sequence[Tensor]) -> None:
        grouped = shard.reshape(self.num_query_groups // count, -1, *shard.shape[1:])  # a shard holds whole groups
        sizes = [self.heads_per_group * self.head_dim, self.head_dim, self.head_dim]
        for part, target in zip(grouped.split(sizes, dim=1), targets, strict=True):
            own = piece(target, dim, index, count)
            own.view(part.shape).copy_(part)


@dataclass(frozen=True)
class GateUp(Copy):
    """gate and up projections stacked; each half is cut over tensor ranks by itself."""

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors), dim=0)

    def shard(self, tensor: Tensor, dim: int, index: int, count: int) -> Tensor:
        return torch.cat([half.chunk(count, dim)[index] for half in tensor.chunk(2, dim)], dim)

    def place(self, shard: Tensor, dim: int | None, index: int, count: int, targets: Sequence[Tensor]) -> None:
        for half, target in zip(shard.chunk(2, 0), targets, strict=True):
            piece(target, dim, index, count).copy_(half)


@dataclass(frozen=True)
class Vocabulary(Copy):
    """Rows padded with zeros to a multiple of the tensor-parallel degree."""

    vocab_size: int

    def shard(self, tensor: Tensor, dim: int, index: int, count: int) -> Tensor:
        rows = padded_vocab_size(self.vocab_size, count) // count
        piece = tensor[index * rows : (index + 1) * rows]
        if piece.shape[0] < rows:
            piece = torch.cat([piece, piece.new_zeros(rows - piece.shape[0], *piece.shape[1:])])
        return piece

    def place(self, shard: Tensor, dim: int | None, index: int, count: int, targets: Sequence[Tensor]) -> None:
        rows = targets[0][index * shard.shape[0] : (index + 1) * shard.shape[0]]
        rows.copy_(shard[: rows.shape[0]])


def piece(tensor: Tensor, dim: int | None, index: int, count: int) -> Tensor:
    """The part of a HF tensor that one shard covers."""
    return tensor if dim is None else tensor.chunk(count, dim)[index]


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of the embedding over all tensor-parallel ranks."""
    return -(-vocab_size // tensor_parallel) * tensor_parallel


@dataclass(frozen=True)
class Rule:
    """One line of a family's table. `{layer}` and `{expert}` in names run over the model's."""

    megatron: str
    hf: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    codec: Codec = Copy()
    dim: int | None = None  # axis cut over tensor-parallel ranks; None: each holds the whole
    layers: tuple[int, ...] | None = None  # layers it applies to, for names with {layer}
    num_experts: int | None = None  # for names with {expert}
    load_only: bool = False  # a second copy of tensors that another rule exports
    dtype: torch.dtype | None = None  # kept and sent in, whatever the model's; None: the model's
    stacks_experts: bool = False  # all experts of a layer along axis 0, which is cut over expert-parallel ranks


@dataclass(frozen=True)
class TensorSpec:
    """One parameter of the whole model: its names on both sides and who holds it."""

    megatron: str  # with global layer and expert numbers
    hf: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    codec: Codec
    dim: int | None
    layer: int | None
    expert: int | None
    load_only: bool
    dtype: torch.dtype | None = None  # None: the model's
    stacks_experts: bool = False

    @property
    def numel(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.hf_shapes)

    def num_shards(self, layout: ParallelLayout) -> int:
        """Pieces the parameter is cut into."""
        if self.dim is None:
            return 1
        if self.stacks_experts:
            return layout.expert
        return layout.expert_tensor if self.expert is not None else layout.tensor

    def pipeline_stage(self, layout: ParallelLayout, num_layers: int) -> int:
        """The pipeline rank that holds it: the model's chunks go round the ranks, virtual_pipeline times."""
        if self.layer is not None:
            return self.layer * layout.pipeline * layout.virtual_pipeline // num_layers % layout.pipeline
        return 0 if self.megatron.startswith("embedding.") else layout.pipeline - 1


def expand(rules: Sequence[Rule], num_layers: int) -> list[TensorSpec]:
    """Every parameter of the model, in export order: embedding, layer by layer, the rest."""
    specs = []
    for rule in rules:
        layers: Sequence[int | None] = [None]
        if "{layer}" in rule.megatron:
            layers = rule.layers if rule.layers is not None else range(num_layers)
        for layer in layers:
            for expert in range(rule.num_experts) if rule.num_experts is not None else [None]:
                where = {"layer": layer, "expert": expert}
                specs.append(
                    TensorSpec(
                        megatron=rule.megatron.format(**where),
                        hf=tuple(name.format(**where) for name in rule.hf),
                        hf_shapes=rule.hf_shapes,
                        codec=rule.codec,
                        dim=rule.dim,
                        layer=layer,
                        expert=expert,
                        load_only=rule.load_only,
                        dtype=rule.dtype,
                        stacks_experts=rule.stacks_experts,
                    )
                )
    first = [s for s in specs if s.megatron.startswith("embedding.")]
    rest = [s for s in specs if s.layer is None and not s.megatron.startswith("embedding.")]
    in_layers = sorted((s for s in specs if s.layer is not None), key=lambda s: s.layer or 0)  # stable: table order
    return [*first, *in_layers, *rest]
