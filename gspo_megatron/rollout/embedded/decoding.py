"""Sampling from a transformers model with a KV cache; rows that have ended leave the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from gspo_megatron.rollout.embedded.kv_cache import make_cache
from gspo_megatron.rollout.embedded.routes import RouteRecorder
from gspo_megatron.rollout.engine import SamplingParams

COMPACT_BELOW = 0.875
"""Ended rows leave once at most this share of the rows runs: each time, what the others have cached is copied."""


@dataclass
class Rows:
    """The R rows of the batch: at first one for each response, later one for each that runs or has ended lately."""

    index: Tensor  # [R] place among all responses
    ended: Tensor  # [R] bool: decoded on, to no effect, until the row leaves
    position: Tensor  # [R, 1] of the last token in its own sequence
    mask: Tensor  # [R, 1, 1, most tokens] added to attention scores: -inf at the padding, 0 else
    cache: Cache

    def keep(self, kept: Tensor) -> None:
        """Go on with the rows `kept`."""
        self.index, self.ended, self.position, self.mask = (
            x.index_select(0, kept) for x in (self.index, self.ended, self.position, self.mask)
        )
        self.cache.batch_select_indices(kept)


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    noise: Tensor,
    *,
    compact_below: float = COMPACT_BELOW,
    recorder: RouteRecorder | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample responses to prompts of token ids; samples of a prompt are side by side.

    `noise` is [prompts × samples, max_response_tokens] float64, uniform in [0, 1). A response depends on its prompt
    and its row of the noise, and on the other rows by rounding only. A `recorder` that is reading gets the routes.

    Returns token ids [prompts × samples, max_response_tokens] int64, -1 behind a response's end, and their float32
    log-probabilities at the temperature, of the same shape, 0 behind the end. Both on the CPU.

    Raises FloatingPointError where the model's logits are not finite.
    """
    logits, rows = _prefill(model, prompts, params)
    stop = torch.tensor(params.stop_token_ids, dtype=torch.int64, device=model.device)
    tokens = torch.full(noise.shape, -1, device=model.device)
    logprobs = torch.zeros(noise.shape, device=model.device)
    in_prompt = rows.cache.get_seq_length()
    if recorder is not None:
        recorder.after_prompts(len(prompts), len(noise), params.max_response_tokens)
    for step in range(params.max_response_tokens):
        token, logprob = draw(logits, noise[:, step].index_select(0, rows.index), params.temperature)
        tokens[rows.index, step] = token.masked_fill(rows.ended, -1)
        logprobs[rows.index, step] = logprob.masked_fill(rows.ended, 0.0)
        rows.ended |= torch.isin(token, stop)
        running = (~rows.ended).nonzero().squeeze(1)
        if len(running) == 0 or step + 1 == params.max_response_tokens:
            break
        if len(running) <= compact_below * len(rows.index):
            rows.keep(running)
            token = token.index_select(0, running)
        rows.position = rows.position + 1
        logits = model(
            input_ids=token[:, None],
            attention_mask=_masks(model, rows.mask[..., : in_prompt + step + 1]),
            position_ids=rows.position,
            past_key_values=rows.cache,
        ).logits[:, -1]
        if recorder is not None:
            recorder.after_token(rows.index, step)
    if not bool(logprobs.isfinite().all()):
        raise FloatingPointError("the policy's logits are not finite: its weights hold NaN or infinity, or overflow")
    return tokens.cpu(), logprobs.cpu()


def _masks(model: PreTrainedModel, mask: Tensor) -> Tensor | dict[str, Tensor]:
    """The mask [R, 1, 1, tokens] of one more token, or one for each kind of layer where some have a sliding window."""
    if "sliding_attention" not in (getattr(model.config, "layer_types", None) or ()):
        return mask
    near = mask.clone()
    near[..., : max(0, mask.shape[-1] - model.config.sliding_window)] = -torch.inf
    return {"full_attention": mask, "sliding_attention": near}


def _prefill(model: PreTrainedModel, prompts: Sequence[Sequence[int]], params: SamplingParams) -> tuple[Tensor, Rows]:
    """Logits [prompts × samples, vocabulary] for the first token. A prompt is computed once for all its samples."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # left padding: all rows end at the same column
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = make_cache(model, longest + params.max_response_tokens)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
    ).logits[:, -1]
    # Of the shape that decoding needs and in the form that attention adds: made once instead of in each step and layer.
    room = longest + params.max_response_tokens
    added = torch.zeros(len(prompts), 1, 1, room, dtype=model.dtype, device=model.device)
    added[:, 0, 0, :longest].masked_fill_(mask == 0, -torch.inf)
    cache.batch_repeat_interleave(params.num_samples)
    logits, position, added = (x.repeat_interleave(params.num_samples, 0) for x in (logits, positions[:, -1:], added))
    index = torch.arange(len(logits), device=model.device)
    return logits, Rows(index, torch.zeros_like(index, dtype=torch.bool), position, added, cache)


def draw(logits: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token a row from logits [R, V] and noise [R] float64 in [0, 1): tokens [R], their float32 log-probabilities.

    By inverting the distribution function, which takes one random number a row. Its sums are float64: in float32 they
    could not tell tokens of a probability below about 1e-7 apart.
    """
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
    # The first token whose sum exceeds the noise: never one of probability 0. The sums end at 1 up to rounding only.
    token = torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True)
    token = token.clamp(max=logits.shape[-1] - 1)  # NaN exceeds nothing; `decode` reports it
    return token.squeeze(1), logprobs.gather(1, token).squeeze(1)
