"""A KV cache that is written in place and whose rows can be repeated and dropped."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

MIN_GROWTH = 128
"""Tokens by which storage grows at least; when it holds more it doubles."""


class InPlaceLayer(CacheLayerMixin):
    """Keys and values of one attention layer, in storage that has room for tokens to come.

    transformers' DynamicLayer copies all it holds at each step; its StaticLayer has attention read the empty room too.
    `keys` and `values` are the storage, [rows, heads, capacity, head_dim]; `update` returns what is filled of it.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length  # tokens: storage never has room for more
        self.cumulative_length = 0  # tokens held; the base class resets an attribute of this name

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the rows, heads, sizes, dtype and device of the first states."""
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append states [rows, heads, new, head_dim]; returns views of all that are held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.cumulative_length, self.cumulative_length + key_states.shape[2]
        assert end <= self.max_length, (end, self.max_length)
        if end > self.keys.shape[2]:
            capacity = min(self.max_length, max(2 * end, end + MIN_GROWTH))
            self.keys, self.values = self._moved(self.keys, capacity), self._moved(self.values, capacity)
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.cumulative_length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, the copies of a row side by side."""
        self.keys = self._moved(self.keys, self.keys.shape[2], repeats)
        self.values = self._moved(self.values, self.values.shape[2], repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` [kept], in that order, moved within the storage."""
        for states in (self.keys, self.values):
            held = states[:, :, : self.cumulative_length]
            held[: len(indices)] = held.index_select(0, indices)
        self.keys, self.values = self.keys[: len(indices)], self.values[: len(indices)]

    def _moved(self, states: Tensor, capacity: int, repeats: int = 1) -> Tensor:
        """What is held of `states`, in new storage."""
        rows, heads, _, size = states.shape
        storage = states.new_empty(rows, repeats, heads, capacity, size)
        storage[:, :, :, : self.cumulative_length] = states[:, None, :, : self.cumulative_length]
        return storage.flatten(0, 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that queries may see, and the position of the first."""
        return self.cumulative_length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """Tokens there can be."""
        return self.max_length


def make_cache(model: PreTrainedModel, max_length: int) -> Cache:
    """An empty cache for sequences of up to `max_length` tokens, padding included."""
    # Layers with a window keep all tokens too: the mask hides those outside.
    kinds = set(getattr(model.config, "layer_types", None) or ())
    assert kinds <= {"full_attention", "sliding_attention"}, f"layer_types={sorted(kinds)}"
    assert kinds or not getattr(model.config, "sliding_window", None), "every layer is taken to see all tokens"
    return Cache(layers=[InPlaceLayer(max_length) for _ in range(model.config.num_hidden_layers)])
