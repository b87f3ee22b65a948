"""The in-place KV cache against transformers' own, which concatenates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from gspo_megatron.rollout.embedded import kv_cache
from gspo_megatron.rollout.embedded.kv_cache import InPlaceLayer, make_cache
from tests.distributed import tiny_models

ROWS, HEADS, KEY_SIZE, VALUE_SIZE = 5, 2, 4, 3


def states(rows: int, new: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(rows, new, HEADS, KEY_SIZE, generator=generator).transpose(1, 2)  # as a model gives them
    return keys, torch.randn(rows, HEADS, new, VALUE_SIZE, generator=generator)


def equal(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("min_growth", [0, 1, 3, 128])
def test_it_holds_what_a_concatenating_cache_holds(min_growth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt, its repetition, then tokens one by one while rows leave."""
    monkeypatch.setattr(kv_cache, "MIN_GROWTH", min_growth)
    model = tiny_models.make("dense")
    ours, theirs = make_cache(model, 3 + 12), DynamicCache(config=model.config)
    assert len(ours) == model.config.num_hidden_layers
    for cache in (ours, theirs):
        for layer in range(len(ours)):
            cache.update(*states(ROWS, 3, layer), layer)
        cache.batch_repeat_interleave(2)
    rows = 2 * ROWS
    for step, kept in enumerate(
        [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 5, 8, 9], [0, 1, 2, 3, 4], [4, 2], [1]] + [[0]] * 7
    ):
        for cache in (ours, theirs):
            cache.batch_select_indices(torch.tensor(kept))
        rows = len(kept)
        for layer in range(len(ours)):
            new = states(rows, 1, 100 * step + layer)
            assert ours.get_mask_sizes(1, layer) == theirs.get_mask_sizes(1, layer)
            assert equal(ours.update(*new, layer), theirs.update(*new, layer)), (step, layer)
        assert ours.get_seq_length() == theirs.get_seq_length() == 4 + step


def test_storage_stays_in_place_while_there_is_room() -> None:
    layer = InPlaceLayer(40)
    layer.update(*states(ROWS, 3, 0))
    places = layer.keys.data_ptr(), layer.values.data_ptr()
    for step in range(37):
        keys, values = layer.update(*states(layer.keys.shape[0], 1, step))
        assert (keys.data_ptr(), values.data_ptr()) == places
        if step == 10:
            layer.batch_select_indices(torch.tensor([1, 3]))
    assert keys.shape == (2, HEADS, 40, KEY_SIZE) and values.shape == (2, HEADS, 40, VALUE_SIZE)
    with pytest.raises(AssertionError, match="41, 40"):
        layer.update(*states(2, 1, 0))


def test_room_for_a_long_response_is_taken_as_it_is_needed() -> None:
    layer = InPlaceLayer(100_000)
    layer.update(*states(1, 5, 0))
    assert layer.keys.shape[2] == 5 + kv_cache.MIN_GROWTH
    layer.update(*states(1, 1000, 1))
    assert layer.keys.shape[2] == 2010
    assert layer.get_max_length() == 100_000


def test_a_reset_layer_starts_anew() -> None:
    layer = InPlaceLayer(10)
    layer.update(*states(ROWS, 3, 0))
    layer.reset()
    new = states(ROWS, 2, 1)
    assert equal(layer.update(*new), new) and layer.get_seq_length() == 2


def test_layers_that_keep_something_else_are_refused() -> None:
    model = tiny_models.make("dense")
    model.config.sliding_window, model.config.layer_types = 8, ["sliding_attention", "full_attention"]
    make_cache(model, 10)
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(AssertionError, match="linear_attention"):
        make_cache(model, 10)
    model.config.layer_types = None
    with pytest.raises(AssertionError, match="every layer is taken to see all tokens"):
        make_cache(model, 10)
