"""Tokens to their experts and back, adding up in a fixed order.

Megatron adds a token's expert outputs with `scatter_add_` in the model's dtype. On CUDA the order of its additions
changes from run to run: with eight experts a token in bfloat16, two passes over the same weights then differ in log s
by more than GSPO's clip of 3e-4. Here each token gathers its rows and sums them in float32, which costs no more.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs
from torch import Tensor


class _Permute(torch.autograd.Function):
    """rows[j] = tokens[token_of_row[j]]"""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, token_of_row: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_row)
        ctx.num_tokens = tokens.shape[0]
        return tokens.index_select(0, token_of_row)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        [gradient], (token_of_row,) = gradients, ctx.saved_tensors
        return _sum_rows(gradient, token_of_row, ctx.num_tokens), None


class _Unpermute(torch.autograd.Function):
    """tokens[i] = sum of the rows j with token_of_row[j] = i"""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token_of_row: Tensor, num_tokens: int) -> Tensor:
        ctx.save_for_backward(token_of_row)
        return _sum_rows(rows, token_of_row, num_tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        [gradient], (token_of_row,) = gradients, ctx.saved_tensors
        return gradient.index_select(0, token_of_row), None, None


def _sum_rows(rows: Tensor, token_of_row: Tensor, num_tokens: int) -> Tensor:
    """[T·k, H] -> [T, H]: each token's k rows in the order they stand, accumulated in float32 or better."""
    if rows.shape[0] == 0:
        return rows.new_zeros((num_tokens, rows.shape[1]))
    by_token = rows.index_select(0, token_of_row.argsort(stable=True))
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return by_token.view(num_tokens, -1, rows.shape[1]).sum(1, dtype=dtype).to(rows.dtype)  # fails unless k divides out


def permute(
    tokens: Tensor,  # [T, H]
    routing_map: Tensor,  # [T, E] bool, k of each row
    probs: Tensor | None = None,  # [T, E]
    num_out_tokens: int | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """In place of megatron.core.transformer.moe.moe_utils.permute, for dispatchers that send every token to k experts.

    Returns the tokens sorted by expert [T·k, H], their probabilities [T·k], and the token of each row.
    """
    assert not fused and not drop_and_pad
    by_expert = routing_map.bool().T.contiguous()
    token = torch.arange(tokens.shape[0], device=tokens.device).expand(by_expert.shape)
    token_of_row = token.masked_select(by_expert)
    permuted_probs = None if probs is None else probs.T.contiguous().masked_select(by_expert)
    return _Permute.apply(tokens, token_of_row), permuted_probs, token_of_row


def unpermute(
    permuted_tokens: Tensor,  # [T·k, H]
    sorted_indices: Tensor,  # [T·k], the token of each row
    restore_shape: torch.Size,  # [T, H]
    probs: Tensor | None = None,
    routing_map: Tensor | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
) -> Tensor:
    """In place of megatron.core.transformer.moe.moe_utils.unpermute: [T, H], the sum of each token's rows.

    The experts have applied the probabilities already.
    """
    assert probs is None and not fused and not drop_and_pad
    return _Unpermute.apply(permuted_tokens, sorted_indices, restore_shape[0])


def sort_chunks(
    rows: Tensor,  # [N, H]
    split_sizes: Tensor,  # [C] rows of each chunk
    sorted_idxs: Tensor,  # [C] on the host, a permutation
    probs: Tensor | None = None,  # [N]
    fused: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """In place of megatron.core.transformer.moe.moe_utils.sort_chunks_by_idxs: copies nothing where the chunks are in
    order, as they are without expert parallelism."""
    if torch.equal(sorted_idxs, torch.arange(sorted_idxs.numel())):
        return rows, probs
    result: tuple[Tensor, Tensor | None] = sort_chunks_by_idxs(rows, split_sizes, sorted_idxs, probs, fused)
    return result
