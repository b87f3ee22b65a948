"""From prompts to requests, from answers to rollouts; nonsense is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fake_sglang_server import STOP, VOCAB, answer, logprob

from gspo_megatron.errors import UserError
from gspo_megatron.rollout.engine import SamplingParams
from gspo_megatron.rollout.sglang.generation import BadAnswer, check_routes, check_sampling, request_of, rollouts_of
from gspo_megatron.types import Prompt
from gspo_megatron.weights.families.base import ModelFields

PARAMS = SamplingParams(num_samples=2, temperature=0.7, max_response_tokens=4, stop_token_ids=(STOP, 9), seed=0)
ONE = replace(PARAMS, num_samples=1)
PROMPT = Prompt(5, "", [3, 4, 5], None)
FIELDS = ModelFields(
    num_layers=3,
    hidden_size=8,
    num_attention_heads=1,
    num_query_groups=1,
    head_dim=8,
    ffn_hidden_size=8,
    vocab_size=VOCAB,
    max_position_embeddings=64,
    norm_eps=1e-6,
    rope_theta=1e4,
    tied_embeddings=False,
    initializer_range=0.02,
    qk_layernorm=False,
    num_experts=8,
    experts_per_token=2,
    expert_ffn_hidden_size=8,
    moe_layers=(0, 2),
)


def given_routes(rows: int) -> np.ndarray:
    """[rows, layers, k] with two different experts everywhere but in the layer without experts."""
    first = np.arange(rows * 3).reshape(rows, 3) % 8
    routes = np.stack([first, (first + 3) % 8], axis=-1)
    routes[:, 1] = 0
    return routes


def one(tokens: list[int], **changes: Any) -> Any:
    return rollouts_of(PROMPT, [answer(tokens, prompt_tokens=3, **changes)], ONE, 0, fields=FIELDS)[0]


def test_a_request_names_everything_a_server_could_have_a_default_for() -> None:
    request = request_of(PROMPT, PARAMS, routed_experts=True)
    assert request["input_ids"] == [3, 4, 5]
    assert request["sampling_params"] == {
        "n": 2,
        "temperature": 0.7,
        "max_new_tokens": 4,
        "stop_token_ids": [STOP, 9],
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_new_tokens": 0,
        "ignore_eos": False,
        "no_stop_trim": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
    }
    assert request["return_logprob"] is True and request["logprob_start_len"] == -1
    assert request["return_text_in_logprobs"] is False and request["stream"] is False
    assert request["return_routed_experts"] is True
    assert json.loads(json.dumps(request)) == request


def test_an_answer_becomes_a_rollout() -> None:
    answers = [answer([7, STOP], prompt_tokens=3, version="6"), answer([7, 8, 7, 8], prompt_tokens=3, version="6")]
    short, long = rollouts_of(PROMPT, answers, PARAMS, 6, fields=FIELDS)
    assert short.token_ids.tolist() == [3, 4, 5, 7, STOP] and short.token_ids.dtype == torch.int64
    assert short.response_mask.tolist() == [False] * 3 + [True] * 2
    expected = torch.tensor([0.0] * 3 + [logprob(7, 0), logprob(STOP, 1)])
    assert torch.equal(short.rollout_logprobs, expected)
    assert short.policy_versions.tolist() == [-1, -1, -1, 6, 6] and short.policy_versions.dtype == torch.int32
    assert (short.prompt_id, short.finish_reason, short.reward) == (5, "stop", None)
    assert short.routes is None and short.routes_valid is None
    assert long.finish_reason == "length" and len(long.token_ids) == 7


def test_each_token_has_the_version_that_made_it() -> None:
    body = answer([7, 8, 7, STOP], prompt_tokens=3)
    body["meta_info"]["weight_versions"] = [
        {"version": "3", "start": 0, "end": 1},
        {"version": "4", "start": 1, "end": 4},
    ]
    rollout = rollouts_of(PROMPT, [body], ONE, 4)[0]
    assert rollout.policy_versions.tolist() == [-1, -1, -1, 3, 4, 4, 4]
    with pytest.raises(BadAnswer, match="by weights of version 3 and 4, not 5"):
        rollouts_of(PROMPT, [body], ONE, 5)


def test_without_spans_the_version_is_that_of_the_answer() -> None:
    body = answer([7, STOP], prompt_tokens=3, version="2")
    del body["meta_info"]["weight_versions"]
    assert rollouts_of(PROMPT, [body], ONE, 2)[0].policy_versions.tolist() == [-1, -1, -1, 2, 2]


@pytest.mark.parametrize("version, said", [("5", "5"), ("default", "-1"), ("theirs", "'theirs'")])
def test_other_weights_are_refused(version: str, said: str) -> None:
    with pytest.raises(BadAnswer, match=said):
        rollouts_of(PROMPT, [answer([7, STOP], prompt_tokens=3, version=version)], ONE, 4)


def test_a_stop_token_in_the_last_place_is_a_stop() -> None:
    assert one([7, 8, 7, 9]).finish_reason == "stop"
    assert one([7, 8, 7, 9], finish={"type": "length", "length": 4}).finish_reason == "stop"


def test_an_aborted_response_keeps_what_there_is() -> None:
    aborted = {"type": "abort", "message": "Aborted"}
    rollout = one([7, 8], finish=aborted)
    assert rollout.finish_reason == "abort" and rollout.token_ids.tolist() == [3, 4, 5, 7, 8]
    nothing = answer([], prompt_tokens=3, finish=aborted)
    del nothing["meta_info"]["output_token_logprobs"], nothing["meta_info"]["num_retractions"]
    (rollout,) = rollouts_of(PROMPT, [nothing], ONE, 0, fields=FIELDS, routed_experts=True)
    assert rollout.token_ids.tolist() == [3, 4, 5] and not rollout.response_mask.any()
    assert rollout.routes is not None and rollout.routes.shape == (2, 2, 2)
    assert rollout.routes_valid is not None and not rollout.routes_valid.any()


def routed(tokens: list[int], routes: np.ndarray | None, **changes: Any) -> Any:
    body = answer(tokens, prompt_tokens=3, routes=routes, **changes)
    return rollouts_of(PROMPT, [body], ONE, 0, fields=FIELDS, routed_experts=True)[0]


def test_routes_are_those_of_layers_with_experts() -> None:
    given = given_routes(5)
    rollout = routed([7, 8, STOP], given)
    assert rollout.routes.dtype == torch.int16
    assert torch.equal(rollout.routes, torch.tensor(given[:, [0, 2]], dtype=torch.int16))
    assert rollout.routes_valid.tolist() == [True] * 5


def test_a_slot_that_was_never_written_is_not_valid() -> None:
    given = given_routes(5)
    given[1, 2] = 0
    assert routed([7, 8, STOP], given).routes_valid.tolist() == [True, False, True, True, True]


def test_routes_computed_again_after_a_retraction_are_not_valid() -> None:
    assert routed([7, 8, STOP], given_routes(5), retractions=1).routes_valid.tolist() == [True, True] + [False] * 3


@pytest.mark.parametrize(
    "routes, words",
    [
        (None, "--enable-return-routed-experts"),
        (given_routes(6), "36 numbers, not 5×3×2"),
        (given_routes(5) + 5, "experts from 5 to 12, where there are 8"),
        (given_routes(5) - 1, "experts from -1 to 6"),
    ],
)
def test_wrong_routes_are_refused(routes: np.ndarray | None, words: str) -> None:
    with pytest.raises(BadAnswer, match=words):
        routed([7, 8, STOP], routes)


def test_routes_that_are_not_base64_are_refused() -> None:
    body = answer([7, STOP], prompt_tokens=3)
    for text in ("?", "AAA=", "AAAAAAA="):
        body["meta_info"]["routed_experts"] = text
        with pytest.raises(BadAnswer, match="routed_experts"):
            rollouts_of(PROMPT, [body], ONE, 0, fields=FIELDS, routed_experts=True)


def meta(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["meta_info"].__setitem__(key, value)


def first_logprob(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["meta_info"]["output_token_logprobs"][0].__setitem__(0, value)


NONSENSE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "fewer log-probs": (lambda b: b["meta_info"]["output_token_logprobs"].pop(), "1 log-probabilities for 2 tokens"),
    "no log-probs": (meta("output_token_logprobs", None), "0 log-probabilities for 2 tokens"),
    "log-probs of others": (lambda b: b["output_ids"].__setitem__(0, 8), "of other tokens"),
    "null": (first_logprob(None), "NaN"),
    "infinite": (first_logprob(float("-inf")), "NaN"),
    "positive": (first_logprob(0.5), "up to 0"),
    "text": (first_logprob("-1"), "no finite numbers"),
    "ids as text": (lambda b: b.__setitem__("output_ids", ["7", "1"]), "no list of token ids"),
    "ids as floats": (lambda b: b.__setitem__("output_ids", [7.5, 1.0]), "no list of token ids"),
    "nested ids": (lambda b: b.__setitem__("output_ids", [[7, 1]]), "no list of token ids"),
    "other prompt": (meta("prompt_tokens", 2), "read 2 of 3 prompt tokens"),
    "NaN in the server": (meta("finish_reason", {"type": "stop", "matched": "NaN happened"}), "NaN happened"),
    "other finish": (meta("finish_reason", {"type": "weary"}), "weary"),
    "no finish": (meta("finish_reason", None), "another form"),
    "no meta_info": (lambda b: b.pop("meta_info"), "another form"),
    "no ids": (lambda b: b.pop("output_ids"), "another form"),
    "empty": (lambda b: (b.__setitem__("output_ids", []), meta("output_token_logprobs", [])(b)), "an empty response"),
    "a hole between versions": (
        meta("weight_versions", [{"version": "0", "start": 0, "end": 1}, {"version": "0", "start": 2, "end": 2}]),
        "do not cover 2 tokens",
    ),
    "versions too short": (meta("weight_versions", [{"version": "0", "start": 0, "end": 1}]), "do not cover 2 tokens"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refused(name: str) -> None:
    body = answer([7, STOP], prompt_tokens=3)
    change, words = NONSENSE[name]
    change(body)
    with pytest.raises(BadAnswer, match=words) as caught:
        rollouts_of(PROMPT, [body], ONE, 0, fields=FIELDS)
    assert str(caught.value).startswith("prompt 5: ")


@pytest.mark.parametrize("body", [None, "text", 3, [], {}])
def test_an_answer_that_is_no_answer_is_refused(body: Any) -> None:
    with pytest.raises(BadAnswer):
        rollouts_of(PROMPT, [body], ONE, 0)


@pytest.mark.parametrize(
    "tokens, finish, words",
    [
        ([7, STOP, 8, 7], None, "goes on for 2 tokens after stop token 1"),
        ([7] * 5, None, "5 tokens where at most 4"),
        ([7, 8], {"type": "length", "length": 2}, "cut after 2 of 4 tokens.*--context-length"),
        ([7, 2], {"type": "stop", "matched": 2}, "token 2, which is a stop token for the server.*eos_token_id"),
        ([VOCAB, STOP], None, f"{VOCAB} outside the vocabulary"),
        ([-1, STOP], None, "outside the vocabulary"),
    ],
)
def test_a_response_of_the_wrong_shape_is_refused(tokens: list[int], finish: Any, words: str) -> None:
    with pytest.raises(BadAnswer, match=words):
        one(tokens, finish=finish)


def test_another_number_of_answers_is_refused() -> None:
    with pytest.raises(BadAnswer, match="1 answers for 2 samples"):
        rollouts_of(PROMPT, [answer([7, STOP], prompt_tokens=3)], PARAMS, 0)


def test_the_defaults_of_a_server_pass() -> None:
    info = {"sampling_defaults": "model", "preferred_sampling_params": None}
    check_sampling(
        PARAMS.stop_token_ids,
        server_info=info,
        arguments=["--mem-fraction-static", "0.8"],
        environment={"PATH": "/bin"},
    )
    check_sampling(PARAMS.stop_token_ids, preferred={"top_p": 1.0, "top_k": -1})


def test_no_stop_token_is_refused() -> None:
    with pytest.raises(UserError, match="no stop token"):
        check_sampling(())


CHANGES = {
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "min_new_tokens": 3,
    "ignore_eos": True,
    "logit_bias": {"5": 1.0},
    "regex": "a*",
    "stop": ["x"],
    "temperature": 0.6,
}


@pytest.mark.parametrize("key", CHANGES)
@pytest.mark.parametrize("where", ["preferred", "info", "argument", "argument="])
def test_what_changes_the_distribution_is_refused_wherever_it_is_set(key: str, where: str) -> None:
    given = {key: CHANGES[key]}
    text = json.dumps(given)
    settings: dict[str, dict[str, Any]] = {
        "preferred": {"preferred": given},
        "info": {"server_info": {"preferred_sampling_params": text}},
        "argument": {"arguments": ["--preferred-sampling-params", text]},
        "argument=": {"arguments": [f"--preferred-sampling-params={text}"]},
    }
    with pytest.raises(UserError, match=key) as caught:
        check_sampling(PARAMS.stop_token_ids, **settings[where])
    assert "set rollout.temperature" in str(caught.value) or "leave it out" in str(caught.value)


def test_what_cuts_prompts_or_changes_log_probs_is_refused() -> None:
    with pytest.raises(UserError, match="--allow-auto-truncate"):
        check_sampling(PARAMS.stop_token_ids, arguments=["--allow-auto-truncate"])
    with pytest.raises(UserError, match="--allow-auto-truncate"):
        check_sampling(PARAMS.stop_token_ids, server_info={"allow_auto_truncate": True})
    with pytest.raises(UserError, match=r"SGLANG_RETURN_ORIGINAL_LOGPROB.*unset"):
        check_sampling(PARAMS.stop_token_ids, environment={"SGLANG_RETURN_ORIGINAL_LOGPROB": "1"})
    with pytest.raises(UserError, match="not JSON"):
        check_sampling(PARAMS.stop_token_ids, arguments=["--preferred-sampling-params", "{top_p"])


def test_a_server_without_routes_is_refused_where_they_are_asked_for() -> None:
    with pytest.raises(UserError, match=r"http://a:1 returns no experts.*start it with --enable-return-routed-experts"):
        check_routes("http://a:1", {"enable_return_routed_experts": False})
    check_routes("http://a:1", {"enable_return_routed_experts": True})
    check_routes("http://a:1", {})  # of a version that does not say
