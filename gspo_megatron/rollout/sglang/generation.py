"""Between the project's types and the JSON of /generate: pure conversion, and a check of all that a server says."""

from __future__ import annotations

import base64
import binascii
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gspo_megatron.errors import UserError
from gspo_megatron.rollout.engine import SamplingParams
from gspo_megatron.rollout.sglang.version import NEVER_SET, OtherRun, VersionNames
from gspo_megatron.types import FinishReason, Prompt, Rollout
from gspo_megatron.weights.families.base import ModelFields

# Everything a server could have a default of its own for, at the value that changes nothing: the log-probability of a
# token is then that of the softmax at the temperature.
NEUTRAL: dict[str, Any] = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "ignore_eos": False,  # with it stop_token_ids would have no effect
}
MISSING_ROUTES = "the experts of its tokens are missing: start the server with --enable-return-routed-experts"


class BadAnswer(ValueError):
    """An answer that must not be trained on. The message holds the value and, where there is one, the remedy."""


class WrongVersion(BadAnswer):
    """A response by other weights than asked for: the server was started again, or missed an update."""


@dataclass(frozen=True)
class _Answer:
    """What is read of one answer."""

    token_ids: np.ndarray  # [R] int64, the response
    logprobs: np.ndarray  # [R] float64
    finish_reason: FinishReason
    num_retractions: int


def request_of(prompt: Prompt, params: SamplingParams, routed_experts: bool) -> dict[str, Any]:
    """The body of /generate for all samples of a prompt: they share the prompt's entry in the prefix cache.

    `params.seed` has no part in it: the server's samples are not repeatable.
    """
    return {
        "input_ids": list(prompt.token_ids),
        "sampling_params": {
            **NEUTRAL,
            "n": params.num_samples,
            "temperature": params.temperature,
            "max_new_tokens": params.max_response_tokens,
            "stop_token_ids": list(params.stop_token_ids),
            "no_stop_trim": True,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
        },
        "return_logprob": True,
        "logprob_start_len": -1,  # of the response's tokens alone
        "return_text_in_logprobs": False,
        "return_routed_experts": routed_experts,
        "stream": False,
    }


def rollouts_of(
    prompt: Prompt,
    answers: Sequence[Mapping[str, Any]],
    params: SamplingParams,
    version: int,
    *,
    names: VersionNames | None = None,
    fields: ModelFields | None = None,
    routed_experts: bool = False,
) -> list[Rollout]:
    """The rollouts that one request was answered with.

    `version`, which the server calls as `names` say, must have produced the response, or part of it where the server
    tells several. `fields` of the model tell its vocabulary, and its layers and experts where `routed_experts` were
    asked for.

    Raises:
        BadAnswer: whatever is not as it must be.
        OtherRun: the response is by weights of another run.
    """
    if len(answers) != params.num_samples:
        raise BadAnswer(f"{len(answers)} answers for {params.num_samples} samples")
    rollouts = []
    for body in answers:
        try:
            answer = _read(prompt, body, params, None if fields is None else fields.vocab_size)
            versions = _versions(body["meta_info"], len(answer.token_ids), version, names or VersionNames())
            routes = routes_valid = None
            if routed_experts:
                assert fields is not None, "routed experts need the model's fields"
                encoded = body["meta_info"].get("routed_experts")
                routes, routes_valid = _routes(encoded, len(prompt.token_ids), answer, fields)
        except BadAnswer as error:
            raise type(error)(f"prompt {prompt.id}: {error}") from None
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            said = f"{type(error).__name__}: {error}"
            raise BadAnswer(f"prompt {prompt.id}: an answer of another form ({said})") from error
        in_prompt, in_response = len(prompt.token_ids), len(answer.token_ids)
        token_ids = np.concatenate([np.asarray(prompt.token_ids, dtype=np.int64), answer.token_ids])
        logprobs = np.concatenate([np.zeros(in_prompt), answer.logprobs]).astype(np.float32)
        policy_versions = np.concatenate([np.full(in_prompt, -1), versions]).astype(np.int32)
        rollouts.append(
            Rollout(
                prompt_id=prompt.id,
                token_ids=torch.from_numpy(token_ids),
                response_mask=torch.arange(in_prompt + in_response) >= in_prompt,
                rollout_logprobs=torch.from_numpy(logprobs),
                policy_versions=torch.from_numpy(policy_versions),
                finish_reason=answer.finish_reason,
                routes=routes,
                routes_valid=routes_valid,
            )
        )
    return rollouts


def _read(prompt: Prompt, body: Mapping[str, Any], params: SamplingParams, vocab_size: int | None) -> _Answer:
    meta = body["meta_info"]
    if meta.get("prompt_tokens", len(prompt.token_ids)) != len(prompt.token_ids):
        raise BadAnswer(f"the server read {meta['prompt_tokens']} of {len(prompt.token_ids)} prompt tokens")
    token_ids = np.asarray(body["output_ids"] or np.empty(0, dtype=np.int64))
    if token_ids.dtype.kind != "i" or token_ids.ndim != 1:
        raise BadAnswer("output_ids is no list of token ids")
    triples = meta.get("output_token_logprobs") or []
    if len(triples) != len(token_ids):
        raise BadAnswer(f"{len(triples)} log-probabilities for {len(token_ids)} tokens")
    if [triple[1] for triple in triples] != body["output_ids"]:
        raise BadAnswer("the log-probabilities are of other tokens than output_ids")
    # The server writes NaN as null.
    logprobs = np.asarray([triple[0] for triple in triples] or np.empty(0))
    if logprobs.dtype.kind not in "fi" or not np.isfinite(logprobs).all() or (logprobs > 1e-3).any():
        raise BadAnswer("log-probabilities that are no finite numbers up to 0: the server's weights may hold NaN")
    if len(token_ids) and (token_ids.min() < 0 or token_ids.max() >= (vocab_size or 2**31)):
        raise BadAnswer(f"a token id {token_ids.max()} outside the vocabulary of {vocab_size}")
    reason = _finish_reason(meta["finish_reason"], token_ids, params)
    return _Answer(token_ids.astype(np.int64), logprobs, reason, int(meta.get("num_retractions") or 0))


def _finish_reason(said: Mapping[str, Any], token_ids: np.ndarray, params: SamplingParams) -> FinishReason:
    """ "stop" if the last token is a stop token, also where the server counted it as the last one it was allowed."""
    kind, length = said["type"], len(token_ids)
    if length > params.max_response_tokens:
        raise BadAnswer(f"{length} tokens where at most {params.max_response_tokens} were asked for")
    stops = np.flatnonzero(np.isin(token_ids, params.stop_token_ids))
    if len(stops) and stops[0] != length - 1:
        raise BadAnswer(
            f"the response goes on for {length - 1 - stops[0]} tokens after stop token {token_ids[stops[0]]}"
        )
    if kind == "abort":
        return "abort"
    if not length:
        raise BadAnswer(f"an empty response, with finish reason {said!r}")
    if kind == "stop" and isinstance(said.get("matched"), str):
        # Also "NaN happened", whose token the server replaces by a stop token.
        raise BadAnswer(f"the response ended at {said['matched']!r}, not at a stop token")
    if kind == "stop" and not len(stops):
        raise BadAnswer(
            f"the response ended at token {said.get('matched')}, which is a stop token for the server and none here "
            f"(stop_token_ids={list(params.stop_token_ids)}); add it to eos_token_id in the model's "
            "generation_config.json, or start the server with --json-model-override-args"
        )
    if kind not in ("stop", "length"):
        raise BadAnswer(f"finish reason {said!r} is not known")
    if kind == "length" and length != params.max_response_tokens:
        raise BadAnswer(
            f"the response was cut after {length} of {params.max_response_tokens} tokens; start the server with a "
            "larger --context-length or lower rollout.max_response_tokens"
        )
    return "stop" if len(stops) else "length"


def _versions(meta: Mapping[str, Any], length: int, version: int, names: VersionNames) -> np.ndarray:
    """[R] version of the weights behind each token."""
    spans = meta.get("weight_versions") or [
        {"version": meta.get("weight_version", NEVER_SET), "start": 0, "end": length}
    ]
    try:
        found = [(names.number(str(span["version"])), int(span["start"]), int(span["end"])) for span in spans]
    except OtherRun:
        raise
    except ValueError as error:
        raise WrongVersion(str(error)) from None
    if version not in [number for number, _, _ in found]:
        said = " and ".join(str(number) for number, _, _ in found)
        raise WrongVersion(f"the response is by weights of version {said}, not {version}")
    ends = [0, *(end for _, _, end in found)]
    if [start for _, start, _ in found] != ends[:-1] or ends[-1] != length:
        raise BadAnswer(f"weight versions {spans!r} do not cover {length} tokens")
    return np.repeat([number for number, _, _ in found], np.diff(ends))


def _routes(encoded: str | None, in_prompt: int, answer: _Answer, fields: ModelFields) -> tuple[Tensor, Tensor]:
    """Experts [L-1, moe_layers, k] int16 of each input token, and [L-1] whether they are those behind the log-probs.

    The server returns all layers, [L-1, num_layers, k] int32, by the cache slots of the tokens: those of a prompt that
    was found in the prefix cache are there.
    """
    assert fields.num_experts is not None and fields.experts_per_token is not None, "the model has no experts"
    rows, experts_per_token = in_prompt + len(answer.token_ids) - 1, fields.experts_per_token
    shape = (rows, fields.num_layers, experts_per_token)
    if encoded is None:
        if len(answer.token_ids):
            raise BadAnswer(MISSING_ROUTES)
        # A request that was aborted before it ran has none.
        nothing = torch.zeros((rows, len(fields.moe_layers), experts_per_token), dtype=torch.int16)
        return nothing, torch.zeros(rows, dtype=torch.bool)
    try:
        flat = np.frombuffer(base64.b64decode(encoded, validate=True), dtype=np.int32)
    except (binascii.Error, ValueError) as error:
        raise BadAnswer(f"routed_experts is not base64 of int32 ({error})") from None
    if flat.size != np.prod(shape):
        raise BadAnswer(f"routed_experts holds {flat.size} numbers, not {'×'.join(map(str, shape))}")
    whole = flat.reshape(shape)
    # Layers without experts hold zeros.
    routes = whole if len(fields.moe_layers) == fields.num_layers else whole[:, list(fields.moe_layers)]
    if routes.size and (routes.min() < 0 or routes.max() >= fields.num_experts):
        raise BadAnswer(f"experts from {routes.min()} to {routes.max()}, where there are {fields.num_experts}")
    valid = np.ones(rows, dtype=bool)
    if experts_per_token > 1:
        # No token is sent to one expert twice: this is a slot that was never written.
        valid &= (routes[:, :, 0] != routes[:, :, 1]).all(axis=1)
    if answer.num_retractions:
        # A retracted request's tokens are computed again when it goes on, which replaces their routes, with new weights
        # if an update came between; log-probabilities are kept. How many were there before is not told.
        valid[in_prompt - 1 :] = False
    return torch.from_numpy(routes.astype(np.int16)), torch.from_numpy(valid)


def check_routes(url: str, server_info: Mapping[str, Any]) -> None:
    """Raise UserError for a server that says of itself that it returns no experts; every request would fail."""
    if not server_info.get("enable_return_routed_experts", True):
        raise UserError(
            f"{url} returns no experts, which rollout.routed_experts or model.routing_replay asks for; start it with "
            "--enable-return-routed-experts"
        )


def check_sampling(
    stop_token_ids: Sequence[int],
    *,
    preferred: Mapping[str, Any] | None = None,
    server_info: Mapping[str, Any] | None = None,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> None:
    """Refuse what would make a server's log-probabilities other than those of the softmax at the temperature.

    Requests name every sampling parameter, so that neither the model's generation_config.json (sampling_defaults, read
    by the OpenAI routes alone) nor a server's preferred parameters decide; what a user set there is refused and not
    passed over in silence.

    Args:
        stop_token_ids: of the tokenizer.
        preferred: `preferred_sampling_params` of /model_info.
        server_info: the answer of /server_info.
        arguments: further arguments of the servers that are started here.
        environment: of the servers that are started here.

    Raises:
        UserError: with the value and the remedy.
    """
    if not stop_token_ids:
        raise UserError(
            "there is no stop token: a response could never end; set eos_token_id in generation_config.json"
        )
    info = server_info or {}
    asked = {"preferred_sampling_params of the server": preferred or info.get("preferred_sampling_params") or {}}
    flags = ["--preferred-sampling-params", "--allow-auto-truncate"]
    for argument, following in itertools.pairwise([*arguments, ""]):
        name, _, value = argument.partition("=")
        if name == flags[0]:
            asked[f"sglang.arguments {name}"] = value or following
    for source, given in asked.items():
        _refuse_changes(source, given)
    if info.get("allow_auto_truncate") or flags[1] in arguments:
        raise UserError(f"{flags[1]} cuts prompts in silence; start the server without it and shorten the prompts")
    if (environment or {}).get("SGLANG_RETURN_ORIGINAL_LOGPROB", "0").lower() in ("1", "true", "yes"):
        raise UserError(
            "SGLANG_RETURN_ORIGINAL_LOGPROB is set: log-probabilities would not be at the sampling temperature; "
            "unset it"
        )


def _refuse_changes(source: str, given: Any) -> None:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            raise UserError(f"{source}={given!r} is not JSON; leave it out") from None
    neutral = {**NEUTRAL, "skip_special_tokens": False, "no_stop_trim": True, "n": 1}
    wrong = {key: value for key, value in given.items() if key not in neutral or value != neutral[key]}
    if "temperature" in wrong:
        raise UserError(f"{source}: temperature={wrong['temperature']}; set rollout.temperature instead")
    if wrong:
        key, value = next(iter(wrong.items()))
        remedy = f"leave it out or use {neutral[key]}" if key in neutral else "leave it out"
        raise UserError(
            f"{source}: {key}={value!r} changes which tokens are drawn without changing their log-probabilities, so "
            f"that the policy would learn from wrong ratios; {remedy}"
        )
