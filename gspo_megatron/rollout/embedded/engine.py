"""The embedded engine: batched sampling over the transformers model, in this process.

For tiny models and machines without SGLang. It holds a full copy of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from gspo_megatron.errors import UserError
from gspo_megatron.rollout.embedded.decoding import decode
from gspo_megatron.rollout.embedded.names import in_memory
from gspo_megatron.rollout.embedded.routes import RouteRecorder
from gspo_megatron.rollout.engine import Export, SamplingParams
from gspo_megatron.types import Group, NamedTensor, Prompt, Rollout
from gspo_megatron.weights.families import load_fields

FLOAT32_BUFFERS = ("e_score_correction_bias",)  # ends of the names of buffers that stay so in a bfloat16 model


class EmbeddedEngine:
    """RolloutEngine over a transformers model that is filled by weight updates."""

    name = "embedded, not SGLang"

    def __init__(self, model_folder: str | Path, *, dtype: torch.dtype, device: torch.device, batch_size: int) -> None:
        config = AutoConfig.from_pretrained(model_folder, local_files_only=True)
        with no_init_weights():
            # Experts run as grouped products by default; asking for it refuses models without experts.
            attention = "sdpa" if AutoModelForCausalLM._model_mapping[type(config)]._supports_sdpa else "eager"
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        model.tie_weights()  # part of the initialisation that was left out
        self.model = model.to(device).eval()
        self.device, self.batch_size, self._folder = device, batch_size, model_folder
        self._parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        for name, buffer in self.model.named_buffers():
            if name.endswith(FLOAT32_BUFFERS):
                buffer.data = buffer.float()
                self._parameters[name] = buffer
        self._elements_missing: dict[str, int] | None = None
        self._version = -1

    @property
    def version(self) -> int:
        """Version of the weights in use; -1 before the first update."""
        return self._version

    def pause(self) -> None:
        """Nothing runs between calls of `generate`."""

    def resume(self) -> None:
        """Nothing to resume."""

    def begin_update(self, version: int) -> None:
        """Start receiving the weights of a version; until `end_update` nothing is generated."""
        assert self._elements_missing is None, "an update is already open"
        self._elements_missing = {name: p.numel() for name, p in self._parameters.items()}
        self._received: set[str] = set()
        self._next_version = version

    @torch.no_grad()
    def update(self, bucket: Iterable[NamedTensor]) -> None:
        """Copy HF-named tensors into the model."""
        assert self._elements_missing is not None, "update outside begin_update … end_update"
        for item in bucket:
            # Elements alone would not tell: a second copy of one expert makes up for another's absence.
            assert item.name not in self._received, f"{item.name} arrived twice"
            self._received.add(item.name)
            name, target = self._target(item.name)
            assert target.shape == item.tensor.shape, (item.name, target.shape, item.tensor.shape)
            target.copy_(item.tensor)
            self._elements_missing[name] -= target.numel()

    def end_update(self, export: Export | None = None) -> bool:
        """Check that every element was received once; always True."""
        assert self._elements_missing is not None
        wrong = sorted(name for name, missing in self._elements_missing.items() if missing != 0)
        assert not wrong, f"the update did not cover each parameter exactly once: {wrong}"
        self._elements_missing = None
        self._version = self._next_version
        return True

    def rest(self) -> None:
        """The model stays where it is."""

    def close(self) -> None:
        """Nothing is open."""

    def _target(self, hf_name: str) -> tuple[str, Tensor]:
        """The parameter, or the part of one, that a checkpoint's tensor names."""
        place = in_memory(hf_name)
        tensor = self._parameters[place.parameter]
        if place.expert is not None:
            tensor = tensor[place.expert]
        return place.parameter, tensor if place.half is None else tensor.chunk(2, dim=0)[place.half]

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Group]:
        """Sample `num_samples` responses for each prompt.

        Each response has random numbers of its own, for all its tokens. On the CPU they depend neither on
        `batch_size` nor on where others end.
        """
        assert self._elements_missing is None and self._version >= 0, "generate before the first complete update"
        self._check_context(prompts, params)
        generator = torch.Generator(self.device).manual_seed(params.seed)
        per_batch = max(1, self.batch_size // params.num_samples)
        # Prompts of like length share a batch; results return in the caller's order.
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].token_ids), i))
        by_index: dict[int, Group] = {}
        for start in range(0, len(order), per_batch):
            chosen = order[start : start + per_batch]
            batch = [prompts[i] for i in chosen]
            shape = (len(batch) * params.num_samples, params.max_response_tokens)
            noise = torch.rand(shape, dtype=torch.float64, device=self.device, generator=generator)
            recorder = self._recorder() if params.routes else None
            with nullcontext() if recorder is None else recorder.reading():
                tokens, logprobs = decode(self.model, [p.token_ids for p in batch], params, noise, recorder=recorder)
            by_index |= dict(zip(chosen, self._to_groups(batch, tokens, logprobs, params, recorder), strict=True))
        return [by_index[i] for i in range(len(prompts))]

    def _recorder(self) -> RouteRecorder:
        _, fields = load_fields(self._folder)
        return RouteRecorder(
            self.model, num_layers=len(fields.moe_layers), experts_per_token=fields.experts_per_token or 0
        )

    def _check_context(self, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        context = self.model.config.max_position_embeddings
        for prompt in prompts:
            needed = len(prompt.token_ids) + params.max_response_tokens
            if needed > context:
                raise UserError(
                    f"prompt {prompt.id} has {len(prompt.token_ids)} tokens; with rollout.max_response_tokens="
                    f"{params.max_response_tokens} it needs {needed}, and the model's context is {context}; shorten "
                    "the prompt or lower rollout.max_response_tokens"
                )

    def _to_groups(
        self,
        prompts: Sequence[Prompt],
        tokens: Tensor,
        logprobs: Tensor,
        params: SamplingParams,
        recorder: RouteRecorder | None,
    ) -> list[Group]:
        stop = set(params.stop_token_ids)
        groups = []
        for i, prompt in enumerate(prompts):
            rollouts = []
            prompt_ids = torch.tensor(prompt.token_ids, dtype=torch.int64)
            for row in range(i * params.num_samples, (i + 1) * params.num_samples):
                length = int((tokens[row] >= 0).sum())
                response = tokens[row, :length]
                in_prompt = len(prompt.token_ids)
                routes = recorder.of(row, prompt=i, in_prompt=in_prompt, length=length) if recorder else None
                rollouts.append(
                    Rollout(
                        prompt_id=prompt.id,
                        token_ids=torch.cat([prompt_ids, response]),
                        response_mask=torch.arange(in_prompt + length) >= in_prompt,
                        rollout_logprobs=torch.cat([torch.zeros(in_prompt), logprobs[row, :length]]),
                        policy_versions=torch.tensor([-1] * in_prompt + [self._version] * length, dtype=torch.int32),
                        finish_reason="stop" if int(response[-1]) in stop else "length",
                        routes=routes,
                        routes_valid=None if routes is None else torch.ones(len(routes), dtype=torch.bool),
                    )
                )
            groups.append(Group(prompt, rollouts))
        return groups
