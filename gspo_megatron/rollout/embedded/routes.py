"""The experts of each token, read off a transformers model while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gspo_megatron.errors import UserError


class RouteRecorder:
    """What `decode` sends to which experts, for one batch of prompts after the other.

    Each family has a router of its own, some return scores alone. All hand their experts, which are stacked in one
    module a layer, the numbers of the experts as second argument: that is read.
    """

    def __init__(self, model: PreTrainedModel, *, num_layers: int, experts_per_token: int) -> None:
        """For a model with `num_layers` MoE layers.

        Raises:
            UserError: its experts are not where they are in the known families.
        """
        self._experts = [m for name, m in model.named_modules() if name.endswith(".experts")]
        self._experts_per_token = experts_per_token
        if num_layers == 0 or len(self._experts) != num_layers:
            raise UserError(
                f"the embedded engine finds {len(self._experts)} modules of experts in {type(model).__name__}, not "
                f'{num_layers}, and so can\'t return routes; use rollout.engine="sglang", or ask for no routes'
            )
        self._latest: list[Tensor] = []  # of the forward pass in progress, [tokens, k] a layer
        self.prompts = torch.empty(0)  # [prompts, longest, layers, k] int16, padded on the left
        self.responses = torch.empty(0)  # [prompts × samples, tokens, layers, k] int16, of each token that was read

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While open, forward passes are read."""
        handles = [m.register_forward_pre_hook(self._read) for m in self._experts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _read(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        experts = args[1] if len(args) > 1 else None
        if not isinstance(experts, Tensor) or experts.is_floating_point() or experts.dim() != 2:
            raise UserError(
                f"{type(module).__name__} gets no numbers of experts as second argument, so that the embedded engine "
                'can\'t return routes; use rollout.engine="sglang", or ask for no routes'
            )
        assert experts.shape[1] == self._experts_per_token
        self._latest.append(experts.to(torch.int16))

    def _take(self) -> Tensor:
        """[tokens, layers, k] of the forward pass that has ended."""
        assert len(self._latest) == len(self._experts)
        taken, self._latest = torch.stack(self._latest, 1), []
        return taken

    def after_prompts(self, num_prompts: int, num_responses: int, max_response_tokens: int) -> None:
        """The forward pass over the prompts has ended."""
        taken = self._take()
        self.prompts = taken.unflatten(0, (num_prompts, -1))
        self.responses = taken.new_zeros(num_responses, max_response_tokens, *taken.shape[1:])

    def after_token(self, index: Tensor, step: int) -> None:
        """That over token `step` of the responses `index` has."""
        self.responses[index, step] = self._take()

    def of(self, response: int, *, prompt: int, in_prompt: int, length: int) -> Tensor:
        """[in_prompt + length - 1, layers, k] of one response with its prompt; the last token was never read."""
        first = self.prompts.shape[1] - in_prompt
        return torch.cat([self.prompts[prompt, first:], self.responses[response, : length - 1]]).cpu()
