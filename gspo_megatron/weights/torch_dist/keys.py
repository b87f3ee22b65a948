"""Where Megatron's dist_checkpointing keeps each tensor of the rule tables: key, position and shape.

The keys are those of GPTModel.sharded_state_dict with Megatron's local modules (megatron/core/transformer/
transformer_block.py, models/gpt/gpt_layer_specs.py) and policy/experts.py: one key for each tensor of a layer, all
experts of a layer under one key with the expert first; a model whose layers are all alike has one key for all layers,
with the layer first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from gspo_megatron.weights.families.base import ModelFields
from gspo_megatron.weights.rules import Codec, TensorSpec

_LAYER = re.compile(r"decoder\.layers\.(?P<layer>\d+)\.(?P<rest>.+)")
_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.local_experts\.(?P<expert>\d+)\.(?P<rest>.+)")
_STACKED = re.compile(r"(?P<experts>.+\.experts)\.(?P<kind>weight|bias)(?P<layer>[12])")  # of all experts at once
_LINEAR = re.compile(r"(?P<module>.*\.linear_\w+)\.weight")  # modules that save an empty state beside their weight

# Named as if they were fused into the product that follows, as they are with Transformer Engine; not in models with
# latent attention.
_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


@dataclass(frozen=True)
class Place:
    """A part of one tensor of the checkpoint: all of it behind the position `index` along its first axes."""

    key: str
    index: tuple[int, ...]  # of layer, of expert, where these are axes
    sizes: tuple[int, ...]  # of those axes

    @property
    def offsets(self) -> tuple[tuple[int, int], ...]:
        return tuple(zip(self.index, self.sizes, strict=True))


@dataclass(frozen=True)
class KeyTable:
    """How one model's tensors are called."""

    num_layers: int
    num_experts: int
    stacks_layers: bool  # all layers under one key
    fuses_norms: bool

    @classmethod
    def of(cls, fields: ModelFields, specs: Sequence[TensorSpec], *, stacks_layers: bool | None = None) -> KeyTable:
        """`stacks_layers` None: as Megatron writes it, which stacks the layers of models without experts."""
        if stacks_layers is None:
            stacks_layers = fields.num_experts is None
        fuses = any(".self_attention.linear_qkv." in spec.megatron for spec in specs)
        return cls(fields.num_layers, fields.num_experts or 0, stacks_layers, fuses)

    def place(self, spec: TensorSpec) -> Place:
        """Of a parameter. A second copy (`load_only`) has the place of its original's key; ask only for others."""
        assert not spec.load_only
        name, index, sizes = spec.megatron, [], []
        if match := _LAYER.fullmatch(name):
            rest, layer = match["rest"], int(match["layer"])
            if self.fuses_norms:
                for norm, fused in _NORMS.items():
                    if rest.startswith(norm):
                        rest = fused + rest.removeprefix(norm)
            if self.stacks_layers:
                name = f"decoder.layers.{rest}"
                index.append(layer)
                sizes.append(self.num_layers)
            else:
                name = f"decoder.layers.{layer}.{rest}"
        if match := _EXPERT.fullmatch(name):
            name = f"{match['experts']}.experts.{match['rest']}"
            index.append(int(match["expert"]))
            sizes.append(self.num_experts)
        elif match := _STACKED.fullmatch(name):
            name = f"{match['experts']}.experts.linear_fc{match['layer']}.{match['kind']}"
        return Place(name, tuple(index), tuple(sizes))

    def empty_states(self, spec: TensorSpec) -> list[str]:
        """Keys of the empty objects that Megatron's linear layers save beside their weights; [] for all else."""
        place = self.place(spec)
        match = _LINEAR.fullmatch(place.key)
        if match is None:
            return []
        places = [(place.index or (0,), place.sizes or (1,))]
        if spec.stacks_experts:
            places = [((expert,), (self.num_experts,)) for expert in range(self.num_experts)]
        return [
            f"{match['module']}._extra_state/shard_{'.'.join(map(str, index))}_{'.'.join(map(str, sizes))}"
            for index, sizes in places
        ]


def megatron_shape(spec: TensorSpec) -> tuple[int, ...]:
    """Of the whole parameter. Raises ValueError or RuntimeError where the HF tensors can't make one."""
    return _shape(spec.codec, spec.hf_shapes)  # type: ignore[arg-type]  # codecs are frozen dataclasses


@lru_cache(maxsize=1024)
def _shape(codec: Codec, hf_shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """The codec is asked, with tensors that hold nothing: their last axis is empty. (On torch's meta device the first
    question would import its compiler.) A codec only moves numbers, so how many there are tells the missing size."""
    if any(len(shape) == 1 for shape in hf_shapes):
        return tuple(codec.to_megatron([torch.empty(shape) for shape in hf_shapes]).shape)
    found = tuple(codec.to_megatron([torch.empty(*shape[:-1], 0) for shape in hf_shapes]).shape)
    known, count = math.prod(size for size in found if size), sum(math.prod(shape) for shape in hf_shapes)
    if found.count(0) != 1 or count % known:
        raise ValueError(f"tensors of {', '.join(str(list(shape)) for shape in hf_shapes)} don't make one parameter")
    return tuple(size or count // known for size in found)
