"""Decoding with rows that leave the batch, against decoding in which all rows stay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gspo_megatron.rollout.embedded.decoding import COMPACT_BELOW, decode, draw
from gspo_megatron.rollout.engine import SamplingParams
from tests.distributed import tiny_models

PROMPTS = [[5, 9, 30], [7], [100, 3, 4, 88, 61, 12, 2], [11, 12, 13, 14]]
# A tenth of the tokens end a response: lengths from 1 to 24, few of which reach the end.
PARAMS = SamplingParams(4, 0.8, 24, stop_token_ids=tuple(range(3, tiny_models.VOCAB, 10)), seed=0)


def uniform(rows: int = 16, seed: int = 0, columns: int = PARAMS.max_response_tokens) -> Tensor:
    return torch.rand(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sizes_of_batches(model: PreTrainedModel) -> list[int]:
    """Filled with the number of rows of each forward pass from now on."""
    sizes: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    return sizes


# --- rows that leave ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["moe", "dense"])
@pytest.mark.parametrize("compact_below", [1.0, COMPACT_BELOW, 0.5])
def test_rows_that_leave_change_nothing(compact_below: float, kind: str) -> None:
    model = tiny_models.make(kind)
    sizes = sizes_of_batches(model)
    tokens, logprobs = decode(model, PROMPTS, PARAMS, uniform(), compact_below=0.0)
    assert sizes[0] == 4 and set(sizes[1:]) == {16}, "all rows stay"
    lengths = (tokens >= 0).sum(1)
    assert len(lengths.unique()) >= 6 and lengths.max() > 12, "rows end one after the other"
    sizes.clear()
    fewer_tokens, fewer_logprobs = decode(model, PROMPTS, PARAMS, uniform(), compact_below=compact_below)
    assert torch.equal(tokens, fewer_tokens)
    torch.testing.assert_close(fewer_logprobs, logprobs, rtol=0, atol=2e-6)
    running = [16, *((lengths > step).sum().item() for step in range(1, int(lengths.max())))]
    for rows, size in zip(running[1:], sizes[1:], strict=True):
        assert rows <= size <= max(rows, math.ceil(rows / compact_below) - (compact_below < 1)), (running, sizes)
    if compact_below == 1.0:
        assert sizes[1:] == running[1:], "each leaves at once"


def test_nothing_is_computed_behind_the_last_token() -> None:
    model = tiny_models.make("dense")
    sizes = sizes_of_batches(model)
    every = SamplingParams(4, 1.0, 24, stop_token_ids=tuple(range(tiny_models.VOCAB)), seed=0)
    tokens, logprobs = decode(model, PROMPTS, every, uniform())
    assert sizes == [4], "the prompts alone"
    assert (tokens[:, 0] >= 0).all() and (tokens[:, 1:] == -1).all()
    assert (logprobs[:, 0] < 0).all() and (logprobs[:, 1:] == 0).all()
    sizes.clear()
    decode(model, PROMPTS, SamplingParams(4, 1.0, 3, stop_token_ids=(), seed=0), uniform(columns=3))
    assert sizes == [4, 16, 16], "the logits behind the third token are not needed"


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_a_response_depends_on_its_own_noise_alone(kind: str) -> None:
    """The others' lengths change, so that the row is computed among other rows at every step."""
    model = tiny_models.make(kind)
    tokens, logprobs = decode(model, PROMPTS, PARAMS, uniform())
    for row in (0, 6, 15):
        noise = uniform(seed=1)
        noise[row] = uniform()[row]
        others, others_logprobs = decode(model, PROMPTS, PARAMS, noise)
        assert torch.equal(others[row], tokens[row])
        torch.testing.assert_close(others_logprobs[row], logprobs[row], rtol=0, atol=2e-6)
        assert not torch.equal(others, tokens)


def test_logits_that_are_not_finite_are_reported() -> None:
    model = tiny_models.make("dense")
    with torch.no_grad():
        model.lm_head.weight[17, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        decode(model, PROMPTS, PARAMS, uniform())


# --- one token ---------------------------------------------------------------------------------------------------


def test_noise_selects_by_the_distribution_function() -> None:
    probabilities = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    noise = torch.tensor([0.0, 0.1999, 0.2001, 0.6999, 0.7001, 1 - 2**-53], dtype=torch.float64)
    logits = probabilities.log().expand(6, 6)
    tokens, logprobs = draw(logits, noise, 1.0)
    assert tokens.tolist() == [1, 1, 3, 3, 4, 4], "and none of probability 0 at either end"
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, probabilities[tokens].log())


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_temperature_divides_the_logits(temperature: float) -> None:
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(3))
    tokens, logprobs = draw(logits, uniform(7)[:, 0], temperature)
    expected = torch.log_softmax(logits.double() / temperature, -1)
    torch.testing.assert_close(logprobs.double(), expected.gather(1, tokens[:, None]).squeeze(1), rtol=0, atol=1e-6)
    assert torch.equal(tokens, draw(logits / temperature, uniform(7)[:, 0], 1.0)[0])


def test_bfloat16_logits_have_float32_logprobs() -> None:
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(3)).bfloat16()
    tokens, logprobs = draw(logits, uniform(7)[:, 0], 0.7)
    expected = torch.log_softmax(logits.double() / 0.7, -1).gather(1, tokens[:, None]).squeeze(1)
    assert logprobs.dtype == torch.float32 and (logprobs - expected).abs().max() < 1e-6


def test_a_token_of_probability_1e_9_has_its_place() -> None:
    """float32 sums would end at 1 before it."""
    logits = torch.tensor([[0.0, math.log(1e-9), math.log(2e-9)]]).expand(3, 3)
    noise = 1 - torch.tensor([3.1e-9, 2.5e-9, 1e-9], dtype=torch.float64)
    assert draw(logits, noise, 1.0)[0].tolist() == [0, 1, 2]
