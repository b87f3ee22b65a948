"""Log-probs, entropies and GSPO's loss from hidden states and the output layer's weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gspo_megatron.ops import reference
from kernel_benchmark import definition
from kernel_benchmark.case import Objective, Problem, Rates, Sizes, Tensors

ENTROPY, LOGPROBS = "log-probs and entropy", "log-probs"
SUM, GSPO = "sum of log-probs", "GSPO loss"
NATIVE, EAGER = "gspo_megatron", "hidden @ W.T, log_softmax, gather"
THREE, FOUR = "three products", "four products"
CLIP_LOW, CLIP_HIGH = 3e-4, 4e-4
NUM_SEQUENCES = 8
LOGITS_STD = 2.0


@dataclass(kw_only=True)
class LinearProblem(Problem):
    hidden: Tensor  # [T, H], a leaf
    weight: Tensor  # [V, H], a leaf
    targets: Tensor  # [T]
    old_logprobs: Tensor  # [T] float32
    advantages: Tensor  # [S] float32
    cu_seqlens: Tensor  # [S+1]; all sequences are equally long, so that [S, L] needs no padding

    @property
    def leaves(self) -> Tensors:
        return self.hidden, self.weight

    @property
    def by_sequence(self) -> tuple[int, int]:
        """[S, L]"""
        return len(self.advantages), len(self.targets) // len(self.advantages)


@dataclass(frozen=True)
class Layer:
    hidden: Tensor  # [T, H], a leaf
    weight: Tensor  # [V, H], a leaf
    targets: Tensor  # [T]

    @classmethod
    def random(cls, sizes: Sizes, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Layer:
        num_tokens, width, num_columns = sizes
        hidden = torch.empty(num_tokens, width, device=device, dtype=dtype).normal_(generator=generator)
        weight = torch.empty(num_columns, width, device=device, dtype=dtype)
        weight.normal_(std=LOGITS_STD * width**-0.5, generator=generator)
        targets = torch.randint(num_columns, (num_tokens,), generator=generator, device=device)
        return cls(hidden.requires_grad_(), weight.requires_grad_(), targets)

    @property
    def result_bytes(self) -> int:
        return sum(leaf.numel() * leaf.element_size() for leaf in (self.hidden, self.weight))

    @property
    def product(self) -> tuple[int, int, int]:
        return len(self.hidden), self.hidden.shape[1], len(self.weight)


def floors(product: tuple[int, int, int]) -> Callable[[Rates], dict[str, float]]:
    """Three products if the logits are kept, a fourth to make them again."""

    def seconds(rates: Rates) -> dict[str, float]:
        assert rates.multiply is not None
        one = 2 * math.prod(product) / rates.multiply
        return {THREE: 3 * one, FOUR: 4 * one}

    return seconds


def make(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> LinearProblem:
    generator = torch.Generator(device).manual_seed(0)
    layer = Layer.random(sizes, device, dtype, generator)
    num_tokens = len(layer.targets)
    num_sequences = math.gcd(num_tokens, NUM_SEQUENCES)
    length = num_tokens // num_sequences
    upstream = torch.randn(2, num_tokens, generator=generator, device=device)
    advantages = torch.randn(num_sequences, generator=generator, device=device)
    with torch.no_grad():
        logprobs, _ = reference.linear_logprobs(layer.hidden, layer.weight, layer.targets)
    # log s is ±1e-4: within the clip, so that every token has a gradient.
    shift = 1e-4 * torch.tensor([1.0, -1.0], device=device).repeat(num_sequences)[:num_sequences]
    noise = 0.01 * torch.randn(num_sequences, length, generator=generator, device=device)
    old_logprobs = logprobs - (noise - noise.mean(1, keepdim=True) + shift[:, None]).flatten()

    def loss_of(logprobs: Tensor) -> Tensor:
        mask = torch.ones_like(layer.targets, dtype=torch.bool)
        lengths = [length] * num_sequences
        return definition.gspo_loss(logprobs, old_logprobs, mask, lengths, advantages, CLIP_LOW, CLIP_HIGH)

    one = torch.ones((), device=device)
    check = LayerCheck(layer)
    limits = floors(layer.product)
    return LinearProblem(
        objectives={
            ENTROPY: Objective((upstream[0], upstream[1]), check.tokens(upstream[0], upstream[1]), limits),
            LOGPROBS: Objective((upstream[0],), check.tokens(upstream[0], None), limits),
            SUM: Objective((one,), check.scalar(lambda logprobs: logprobs.sum()), limits),
            GSPO: Objective((one,), check.scalar(loss_of), limits),
        },
        result_bytes=layer.result_bytes,
        probe_bytes=layer.weight.numel() * layer.weight.element_size(),
        product=layer.product,
        hidden=layer.hidden,
        weight=layer.weight,
        targets=layer.targets,
        old_logprobs=old_logprobs,
        advantages=advantages,
        cu_seqlens=torch.arange(num_sequences + 1, device=device) * length,
    )


class LayerCheck:
    """Errors against the definition, whose results are computed once an objective."""

    def __init__(self, layer: Layer) -> None:
        self._definition = definition.LinearDefinition(layer.hidden.detach(), layer.weight.detach(), layer.targets)
        self._outputs: tuple[Tensor, Tensor] | None = None

    def outputs(self) -> tuple[Tensor, Tensor]:
        if self._outputs is None:
            self._outputs = self._definition.outputs()
        return self._outputs

    def tokens(
        self, grad_logprobs: Tensor, grad_entropy: Tensor | None
    ) -> Callable[[Tensors, Tensors], dict[str, float]]:
        cache: list[Tensors] = []

        def errors(outputs: Tensors, gradients: Tensors) -> dict[str, float]:
            if not cache:
                cache.append(self._definition.gradients(grad_logprobs, grad_entropy))
            result = {"output log-prob": definition.largest_difference(outputs[0], self.outputs()[0])}
            if grad_entropy is not None:
                result["output entropy"] = definition.largest_difference(outputs[1], self.outputs()[1])
            return result | _gradient_errors(gradients, cache[0])

        return errors

    def scalar(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensors, Tensors], dict[str, float]]:
        cache: list[tuple[Tensor, Tensors]] = []

        def errors(outputs: Tensors, gradients: Tensors) -> dict[str, float]:
            if not cache:
                logprobs = self.outputs()[0].detach().requires_grad_()
                value = function(logprobs)
                (grad_logprobs,) = torch.autograd.grad(value, logprobs)
                cache.append((value.detach(), self._definition.gradients(grad_logprobs, None)))
            value, expected = cache[0]
            scale = max(1.0, abs(value.item()))  # a sum over all tokens is held to its size
            difference = definition.largest_difference(outputs[0], value) / scale
            return {"output value": difference} | _gradient_errors(gradients, expected)

        return errors


def _gradient_errors(gradients: Tensors, expected: Tensors) -> dict[str, float]:
    return {
        f"gradient {name}": definition.relative_difference(actual, definite)
        for name, actual, definite in zip(("hidden", "weight"), gradients, expected, strict=True)
    }
