"""Calls of one server: what is sent, what is made of the answer, and what of each kind of failure."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from aiohttp import web
from fake_sglang_server import FakeServer

from gspo_megatron.rollout.sglang.address import (
    ServerAddress,
    ServerError,
    ServerRefused,
    ServerUnavailable,
    not_reached,
)
from gspo_megatron.rollout.sglang.client import ServerClient, open_session
from gspo_megatron.rollout.sglang.loop import LoopThread
from gspo_megatron.rollout.sglang.version import OtherRun, VersionNames


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.close()


def ask(address: ServerAddress, call: Callable[[ServerClient], Awaitable[Any]], timeout_s: float = 5.0) -> Any:
    """The result of one call on a new client."""

    async def run() -> Any:
        async with open_session() as session:
            client = ServerClient(address, session, request_timeout_s=timeout_s, update_timeout_s=timeout_s)
            return await call(client)

    return asyncio.run(run())


CALLS: list[tuple[Callable[[ServerClient], Awaitable[Any]], str, Any]] = [
    (lambda c: c.health_generate(), "/health_generate", None),
    (lambda c: c.server_info(), "/server_info", None),
    (lambda c: c.abort_all(), "/abort_request", {"abort_all": True}),
    (lambda c: c.pause("retract"), "/pause_generation", {"mode": "retract"}),
    (lambda c: c.resume(), "/continue_generation", {}),
    (lambda c: c.flush_cache(), "/flush_cache", None),
    (lambda c: c.begin_update(), "/begin_weight_update", {}),
    (lambda c: c.end_update(), "/end_weight_update", {}),
    (lambda c: c.set_version(7), "/update_weight_version", {"new_version": "7", "abort_all_requests": False}),
    (
        lambda c: c.init_group("10.0.0.1", 4000, 1, 3, "g", "gloo"),
        "/init_weights_update_group",
        {
            "master_address": "10.0.0.1",
            "master_port": 4000,
            "rank_offset": 1,
            "world_size": 3,
            "group_name": "g",
            "backend": "gloo",
        },
    ),
    (lambda c: c.destroy_group("g"), "/destroy_weights_update_group", {"group_name": "g"}),
    (
        lambda c: c.update_from_distributed(["a"], ["float32"], [(2, 3)], "g"),
        "/update_weights_from_distributed",
        {
            "names": ["a"],
            "dtypes": ["float32"],
            "shapes": [[2, 3]],
            "group_name": "g",
            "load_format": "flattened_bucket",
            "flush_cache": False,
        },
    ),
    (
        lambda c: c.update_from_tensor(["AA==", "BB=="]),
        "/update_weights_from_tensor",
        {"serialized_named_tensors": ["AA==", "BB=="], "load_format": None, "flush_cache": False},
    ),
    (
        lambda c: c.update_from_disk("/weights", 3),
        "/update_weights_from_disk",
        {
            "model_path": "/weights",
            "weight_version": "3",
            "load_format": "auto",
            "flush_cache": True,
            "abort_all_requests": False,
        },
    ),
    (lambda c: c.release_memory(["weights"]), "/release_memory_occupation", {"tags": ["weights"]}),
    (lambda c: c.resume_memory(["kv_cache"]), "/resume_memory_occupation", {"tags": ["kv_cache"]}),
]


@pytest.mark.parametrize("call, path, body", CALLS, ids=[path for _, path, _ in CALLS])
def test_what_a_call_sends(
    server: FakeServer, call: Callable[[ServerClient], Awaitable[Any]], path: str, body: Any
) -> None:
    ask(ServerAddress(server.address.url, "secret"), call)
    assert server.requests == [(path, body, "Bearer secret")]


def test_no_key_sends_no_header(server: FakeServer) -> None:
    ask(server.address, lambda c: c.model_info())
    assert server.requests == [("/model_info", None, None)]


def test_checksums_are_those_of_the_ranks(server: FakeServer) -> None:
    ranks = [{"checksums": {"a": "1"}}, {"checksums": {"a": "2"}}]
    server.answers["/weights_checker"] = lambda _: web.json_response({"success": True, "ranks": ranks})
    assert ask(server.address, lambda c: c.checksums(["experts"])) == ranks
    assert server.bodies("/weights_checker") == [{"action": "checksum", "skip_tensor_list": ["experts"]}]


def test_checksums_that_are_missing_are_refused(server: FakeServer) -> None:
    with pytest.raises(ServerRefused, match="no checksums"):
        ask(server.address, lambda c: c.checksums([]))


@pytest.mark.parametrize("text, version", [("default", -1), ("0", 0), ("17", 17)])
def test_versions(server: FakeServer, text: str, version: int) -> None:
    assert VersionNames().number(text) == version
    server.version = text
    assert ask(server.address, lambda c: c.version()) == version


@pytest.mark.parametrize("text", ["", "v1", "-1", "1.0"])
def test_a_version_of_somebody_else_is_refused(server: FakeServer, text: str) -> None:
    with pytest.raises(ValueError):
        VersionNames().number(text)
    server.version = text
    with pytest.raises(ServerRefused, match="weight version"):
        ask(server.address, lambda c: c.version())


def test_a_run_knows_its_own_versions() -> None:
    names = VersionNames("ab12cd34")
    assert names.name(7) == "ab12cd34-7" and names.number("ab12cd34-7") == 7 and names.number("default") == -1
    with pytest.raises(OtherRun, match="'ab12cd35-7', which another run has sent"):
        names.number("ab12cd35-7")
    for other in ("7", "qwen3-30", "v1-7"):  # by --weight-version
        with pytest.raises(ValueError, match="not one that this program sets"):
            names.number(other)
    with pytest.raises(OtherRun):
        VersionNames().number("ab12cd34-7")


@pytest.mark.parametrize(
    "answer, words",
    [
        ({"error": {"message": "too long"}}, "too long"),
        ({"object": "error", "message": "no such model", "type": "404"}, "no such model"),
        ({"detail": "Not Found"}, "Not Found"),
        ({"error": "a key is needed"}, "a key is needed"),
        ({"success": False, "message": "wrong shape"}, "wrong shape"),
    ],
)
def test_a_refusal_in_the_servers_words(server: FakeServer, answer: Any, words: str) -> None:
    server.answers["/begin_weight_update"] = lambda _: web.json_response(answer, status=400)
    with pytest.raises(ServerRefused) as caught:
        ask(server.address, lambda c: c.begin_update())
    message = f"SGLang server {server.address.url}: /begin_weight_update failed: 400 {words}"
    assert str(caught.value) == message and caught.value.status == 400


def test_an_answer_200_that_says_no_is_a_refusal(server: FakeServer) -> None:
    said = {"success": False, "message": "group is gone"}
    server.answers["/update_weights_from_distributed"] = lambda _: web.json_response(said)
    with pytest.raises(ServerRefused, match="group is gone"):
        ask(server.address, lambda c: c.update_from_distributed([], [], [], "g"))


def test_long_words_are_cut(server: FakeServer) -> None:
    server.answers["/flush_cache"] = lambda _: web.Response(text="x" * 5000, status=400)
    with pytest.raises(ServerRefused) as caught:
        ask(server.address, lambda c: c.flush_cache())
    assert len(caught.value.reason) < 420


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_work_elsewhere_is_unavailable(server: FakeServer, status: int) -> None:
    server.answers["/generate"] = lambda _: web.json_response({"error": {"message": "later"}}, status=status)
    with pytest.raises(ServerUnavailable, match="later"):
        ask(server.address, lambda c: c.generate({}))


@pytest.mark.parametrize("fault", ["half", "die"])
def test_a_broken_connection_is_unavailable(server: FakeServer, fault: str) -> None:
    server.faults.append(fault)
    with pytest.raises(ServerUnavailable):
        ask(server.address, lambda c: c.generate({"input_ids": [3], "sampling_params": {"n": 2}}))


def test_json_that_is_none_is_unavailable(server: FakeServer) -> None:
    server.answers["/generate"] = lambda _: web.Response(text='{"a": ', content_type="application/json")
    with pytest.raises(ServerUnavailable, match="not JSON"):
        ask(server.address, lambda c: c.generate({}))


def test_who_could_not_be_asked_is_told_with_the_remedy(server: FakeServer) -> None:
    server.answers["/model_info"] = lambda _: web.json_response({"error": "Unauthorized"}, status=401)
    errors = []
    for address in (server.address, ServerAddress("http://127.0.0.1:9"), ServerAddress("http://no401.invalid:9")):
        with pytest.raises(ServerError) as caught:
            ask(address, lambda c: c.model_info())
        errors.append(caught.value)
    assert [error.status for error in errors] == [401, None, None]
    keyless, absent, all_of_them = (str(not_reached(some)) for some in (errors[:1], errors[1:], errors))
    assert "failed: 401 Unauthorized; give its key by sglang.api_key_file" in keyless and "`serve`" not in keyless
    assert "no401" in absent and "; start it with `serve`, or correct sglang.addresses" in absent
    assert "api_key_file" not in absent and "api_key_file" in all_of_them and "`serve`" in all_of_them


def test_nobody_there_is_unavailable() -> None:
    with pytest.raises(ServerUnavailable):
        ask(ServerAddress("http://127.0.0.1:9"), lambda c: c.model_info())
    with pytest.raises(ServerUnavailable):
        ask(ServerAddress("http://"), lambda c: c.model_info())


def test_a_timeout_is_unavailable_and_says_how_long(server: FakeServer) -> None:
    server.stopped = True
    with pytest.raises(ServerUnavailable, match=r"/begin_weight_update failed: no answer within 0\.2 s"):
        ask(server.address, lambda c: c.begin_update(), timeout_s=0.2)


def test_one_answer_and_several_are_a_list(server: FakeServer) -> None:
    for samples in (1, 3):
        request = {"input_ids": [3], "sampling_params": {"n": samples}}
        answers = ask(server.address, lambda c, request=request: c.generate(request))  # type: ignore[misc]
        assert len(answers) == samples


def test_a_paused_server_is_known_to_be(server: FakeServer) -> None:
    async def states(client: ServerClient) -> list[bool]:
        found = [client.paused]
        await client.pause("abort")
        found.append(client.paused)
        await client.resume()
        return [*found, client.paused]

    assert ask(server.address, states) == [False, True, False]


def test_the_loop_returns_raises_and_times_out() -> None:
    async def after(seconds: float, value: int) -> int:
        await asyncio.sleep(seconds)
        return 1 // value

    loop = LoopThread()
    assert loop.run(after(0.0, 1)) == 1
    with pytest.raises(ZeroDivisionError):
        loop.run(after(0.0, 0))
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        loop.run(after(30.0, 1), timeout_s=0.1)
    assert time.monotonic() - start < 5
    loop.close()


def test_closing_the_loop_cancels_what_runs_and_ends_its_thread() -> None:
    cancelled = threading.Event()
    started = threading.Event()

    async def wait() -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    loop = LoopThread("to-be-closed")
    future = loop.submit(wait())
    assert started.wait(5)
    loop.close()
    loop.close()
    assert cancelled.is_set() and future.cancelled()
    assert "to-be-closed" not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(RuntimeError, match="closed"):
        loop.run(asyncio.sleep(0))
