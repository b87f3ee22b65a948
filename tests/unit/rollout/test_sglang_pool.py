"""Generation over several servers that fail: every prompt gets exactly its samples once, or None."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from fake_sglang_server import STOP, VOCAB, FakeServer, serial_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gspo_megatron.config import SGLangConfig
from gspo_megatron.errors import UserError
from gspo_megatron.rollout.engine import SamplingParams
from gspo_megatron.rollout.sglang.address import ServerError, ServerRefused, ServerUnavailable
from gspo_megatron.rollout.sglang.dispatch import Generated, Timing
from gspo_megatron.rollout.sglang.pool import ServerPool
from gspo_megatron.types import Prompt
from gspo_megatron.weights.families.base import ModelFields

SAMPLES = 3
PARAMS = SamplingParams(num_samples=SAMPLES, temperature=1.0, max_response_tokens=8, stop_token_ids=(STOP,), seed=0)
QUICK = Timing(probe_every_s=0.05, probe_timeout_s=0.2, backoff_s=0.02)
FIELDS = ModelFields(
    num_layers=1,
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
)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(100 + i, "", [3 + i % 7, 5], None) for i in range(count)]


class Servers:
    """Fake servers and pools over them, closed at the end."""

    def __init__(self) -> None:
        self.fakes: list[FakeServer] = []
        self.pools: list[ServerPool] = []

    def start(self, faults: Sequence[str] = (), *, version: str = "0", delay_s: float = 0.0) -> FakeServer:
        self.fakes.append(FakeServer(faults, version=version, delay_s=delay_s))
        return self.fakes[-1]

    def pool(self, *fakes: FakeServer, share: int = 1, first: int = 0, **settings: object) -> ServerPool:
        config = SGLangConfig(**{"request_timeout_s": 5.0, "update_timeout_s": 5.0, **settings})  # type: ignore[arg-type]
        addresses = [fake.address for fake in fakes]
        self.pools.append(ServerPool(addresses, config, share=share, first=first, fields=FIELDS, timing=QUICK))
        return self.pools[-1]

    def close(self) -> None:
        for pool in self.pools:
            pool.close()
        for fake in self.fakes:
            fake.close()


@pytest.fixture
def servers() -> Iterator[Servers]:
    found = Servers()
    yield found
    found.close()


def check(generated: Generated, asked: Sequence[Prompt], *, missing: int = 0) -> None:
    """Exactly the samples asked for, none of them twice, each with its prompt."""
    assert len(generated.groups) == len(asked)
    assert sum(group is None for group in generated.groups) == missing
    serials = []
    for prompt, group in zip(asked, generated.groups, strict=True):
        if group is None:
            continue
        assert group.prompt is prompt and len(group.rollouts) == SAMPLES
        for rollout in group.rollouts:
            assert rollout.prompt_id == prompt.id
            assert rollout.token_ids.tolist()[: len(prompt.token_ids)] == prompt.token_ids
            serials.append(serial_of(rollout.token_ids.tolist()[len(prompt.token_ids) :]))
    assert len(set(serials)) == len(serials)


def num_generated(fake: FakeServer) -> int:
    return len(fake.bodies())


def test_one_request_a_prompt_in_the_prompts_order(servers: Servers) -> None:
    fake = servers.start()
    asked = prompts(5)
    generated = servers.pool(fake).generate(asked, PARAMS, version=0)
    check(generated, asked)
    assert generated.errors == []
    assert sorted(body["input_ids"] for body in fake.bodies()) == sorted(p.token_ids for p in asked)
    assert {body["sampling_params"]["n"] for body in fake.bodies()} == {SAMPLES}


def test_no_prompts_are_no_requests(servers: Servers) -> None:
    fake = servers.start()
    fake.die()
    assert servers.pool(fake).generate([], PARAMS, version=0) == Generated([], [])


def test_requests_go_to_the_server_with_the_fewest(servers: Servers) -> None:
    fakes = [servers.start(delay_s=0.05) for _ in range(3)]
    asked = prompts(9)
    check(servers.pool(*fakes).generate(asked, PARAMS, version=0), asked)
    assert [num_generated(fake) for fake in fakes] == [3, 3, 3]


def test_heads_start_at_different_servers(servers: Servers) -> None:
    fakes = [servers.start() for _ in range(3)]
    for first in range(3):
        servers.pool(*fakes, first=first).generate(prompts(1), PARAMS, version=0)
        assert [num_generated(fake) for fake in fakes] == [1] * (first + 1) + [0] * (2 - first)


@pytest.mark.parametrize("share", [1, 2])
def test_a_server_is_asked_for_no_more_than_its_share_at_a_time(servers: Servers, share: int) -> None:
    fake = servers.start(delay_s=0.02)
    asked = prompts(12)
    pool = servers.pool(fake, max_concurrent=4 * SAMPLES, share=share)
    check(pool.generate(asked, PARAMS, version=0), asked)
    assert fake.most_open == 4 * SAMPLES // share


def test_a_group_larger_than_the_limit_goes_alone(servers: Servers) -> None:
    fake = servers.start()
    asked = prompts(3)
    check(servers.pool(fake, max_concurrent=1).generate(asked, PARAMS, version=0), asked)
    assert fake.most_open == SAMPLES


@pytest.mark.parametrize("fault", ["500", "half", "die", "garbage", "text", "nan", "short", "abort"])
def test_a_failure_is_made_up_for_by_another_server(servers: Servers, fault: str) -> None:
    bad, good = servers.start([fault], delay_s=0.01), servers.start()
    asked = prompts(20)
    generated = servers.pool(bad, good, max_concurrent=SAMPLES).generate(asked, PARAMS, version=0)
    check(generated, asked)
    assert [error.address for error in generated.errors] == [bad.address]
    assert num_generated(bad) == 1  # a server that failed is out for this call


def test_a_server_that_failed_takes_part_in_the_next_call(servers: Servers) -> None:
    bad, good = servers.start(["500"]), servers.start()
    pool = servers.pool(bad, good, max_concurrent=SAMPLES)
    pool.generate(prompts(4), PARAMS, version=0)
    before = num_generated(bad)
    good.delay_s = bad.delay_s = 0.05
    asked = prompts(6)
    generated = pool.generate(asked, PARAMS, version=0)
    check(generated, asked)
    assert num_generated(bad) > before and generated.errors == []


def test_a_server_that_stays_dead_costs_the_next_call_one_question(servers: Servers) -> None:
    bad, good = servers.start(["die"]), servers.start()
    pool = servers.pool(bad, good)
    for _ in range(2):
        asked = prompts(6)
        generated = pool.generate(asked, PARAMS, version=0)
        check(generated, asked)
    assert num_generated(bad) <= 3


@pytest.mark.parametrize("fault", ["500", "half"])
def test_the_only_server_is_tried_again_once_it_is_well(servers: Servers, fault: str) -> None:
    fake = servers.start([fault])
    asked = prompts(4)
    generated = servers.pool(fake).generate(asked, PARAMS, version=0)
    check(generated, asked)
    assert len(generated.errors) == 1
    assert fake.bodies("/health_generate") == [None]


def test_with_every_server_dead_the_rest_is_none_and_the_errors_say_why(servers: Servers) -> None:
    fakes = [servers.start([*[""] * 2, "die"]) for _ in range(2)]
    asked = prompts(12)
    start = time.monotonic()
    generated = servers.pool(*fakes, max_concurrent=SAMPLES).generate(asked, PARAMS, version=0)
    assert time.monotonic() - start < 10
    check(generated, asked, missing=8)
    assert {error.address for error in generated.errors} == {fake.address for fake in fakes}
    assert all(isinstance(error, ServerUnavailable) for error in generated.errors)


def test_a_server_that_is_not_well_is_not_tried_again(servers: Servers) -> None:
    fake = servers.start(["500"])
    fake.sick = True
    generated = servers.pool(fake, max_concurrent=SAMPLES).generate(prompts(3), PARAMS, version=0)
    check(generated, prompts(3), missing=3)
    assert num_generated(fake) == 1


def test_garbage_from_every_server_is_none_and_named(servers: Servers) -> None:
    fakes = [servers.start(["nan"] * 9), servers.start(["garbage"] * 9)]
    generated = servers.pool(*fakes).generate(prompts(3), PARAMS, version=0)
    check(generated, prompts(3), missing=3)
    assert [isinstance(error, ServerRefused) for error in generated.errors] == [True, True]
    assert any("NaN" in str(error) for error in generated.errors)


def test_a_refusal_ends_the_call_in_the_servers_words(servers: Servers) -> None:
    fakes = [servers.start(["", "refuse"], delay_s=0.01), servers.start(delay_s=0.01)]
    pool = servers.pool(*fakes)
    with pytest.raises(ServerRefused, match="400 the input is too long"):
        pool.generate(prompts(6), PARAMS, version=0)
    asked = prompts(6)
    check(pool.generate(asked, PARAMS, version=0), asked)


def test_a_prompt_that_ends_servers_is_given_up(servers: Servers) -> None:
    fakes = [servers.start(["500"]) for _ in range(5)]
    generated = servers.pool(*fakes).generate(prompts(1), PARAMS, version=0)
    check(generated, prompts(1), missing=1)
    assert [num_generated(fake) for fake in fakes] == [1, 1, 1, 0, 0]


def test_tokens_outside_the_vocabulary_reach_no_server(servers: Servers) -> None:
    fake = servers.start()
    with pytest.raises(UserError, match=f"prompt 7 holds token {VOCAB}, and the model's vocabulary has {VOCAB}"):
        servers.pool(fake).generate([Prompt(7, "", [3, VOCAB], None)], PARAMS, version=0)
    assert fake.requests == []


def test_a_server_with_other_weights_is_left_out(servers: Servers) -> None:
    old, new = servers.start(version="3"), servers.start(version="4")
    asked = prompts(8)
    generated = servers.pool(old, new).generate(asked, PARAMS, version=4)
    check(generated, asked)
    for group in generated.groups:
        assert group is not None
        assert {int(v) for r in group.rollouts for v in r.policy_versions[r.response_mask]} == {4}
    assert [str(error.address.url) for error in generated.errors] == [old.address.url]
    assert "weights of version 3, not 4" in str(generated.errors[0])


def test_a_server_with_the_weights_of_another_run_ends_the_call(servers: Servers) -> None:
    ours, theirs = servers.start(version="ab12cd34-4"), servers.start(version="cd34ef56-4")
    pool = ServerPool([ours.address, theirs.address], SGLangConfig(), run="ab12cd34", fields=FIELDS, timing=QUICK)
    servers.pools.append(pool)
    with pytest.raises(UserError, match=f"{theirs.address.url}: .*'cd34ef56-4'.* two runs use this server"):
        pool.generate(prompts(8), PARAMS, version=4)


def test_a_server_that_got_the_weights_since_is_used_at_once(servers: Servers) -> None:
    fake = servers.start(version="3")
    pool = servers.pool(fake)
    check(pool.generate(prompts(1), PARAMS, version=4), prompts(1), missing=1)
    fake.version = "4"
    asked = prompts(1)
    check(pool.generate(asked, PARAMS, version=4), asked)
    assert fake.bodies("/health_generate") == []  # it takes a second, and says nothing about weights


def test_one_server_alone_can_be_asked(servers: Servers) -> None:
    fakes = [servers.start() for _ in range(3)]
    asked = prompts(4)
    check(servers.pool(*fakes).generate(asked, PARAMS, version=0, only=fakes[1].address), asked)
    assert [num_generated(fake) for fake in fakes] == [0, 4, 0]


def test_only_servers_with_other_weights_are_none(servers: Servers) -> None:
    fake = servers.start(version="default")
    generated = servers.pool(fake).generate(prompts(2), PARAMS, version=0)
    check(generated, prompts(2), missing=2)


@pytest.mark.parametrize("hung_at_once", [True, False])
def test_a_hung_server_is_noticed_long_before_the_timeout(servers: Servers, hung_at_once: bool) -> None:
    hung, good = servers.start(["hang"] * 9), servers.start()
    hung.stopped = hung_at_once
    if not hung_at_once:
        hung.sick = True  # the HTTP side lives, the scheduler does not
    asked = prompts(6)
    start = time.monotonic()
    generated = servers.pool(hung, good, request_timeout_s=600.0).generate(asked, PARAMS, version=0)
    assert time.monotonic() - start < 5
    check(generated, asked)
    assert {error.address for error in generated.errors} == {hung.address}
    deadline = time.monotonic() + 5
    while hung.open and time.monotonic() < deadline:
        time.sleep(0.01)
    assert hung.open == 0  # its requests were cancelled


def test_a_slow_server_that_answers_probes_is_waited_for(servers: Servers) -> None:
    slow = servers.start(delay_s=0.8)
    asked = prompts(2)
    generated = servers.pool(slow).generate(asked, PARAMS, version=0)
    check(generated, asked)
    assert generated.errors == [] and len(slow.bodies("/health_generate")) > 3


def test_a_paused_server_is_asked_whether_it_answers(servers: Servers) -> None:
    slow = servers.start(delay_s=0.5)
    slow.sick = True  # a paused server cannot generate for its health check
    pool = servers.pool(slow)
    assert pool.on_all(lambda client: client.pause("in_place")) == [None]
    asked = prompts(2)
    generated = pool.generate(asked, PARAMS, version=0)
    check(generated, asked)
    assert generated.errors == [] and slow.bodies("/health_generate") == [] and slow.bodies("/model_info") != []


def test_a_request_that_takes_too_long_goes_elsewhere(servers: Servers) -> None:
    hung, good = servers.start(["hang"]), servers.start()
    asked = prompts(4)
    generated = servers.pool(hung, good, request_timeout_s=0.3).generate(asked, PARAMS, version=0)
    check(generated, asked)
    assert ["no answer within 0.3 s" in str(error) for error in generated.errors] == [True]


def in_background(work: Callable[[], Generated]) -> tuple[threading.Thread, list[Generated]]:
    results: list[Generated] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    return thread, results


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_abort_keeps_what_there_is(servers: Servers) -> None:
    fakes = [servers.start(delay_s=60.0) for _ in range(2)]
    pool = servers.pool(*fakes, max_concurrent=SAMPLES)
    asked = prompts(5)
    thread, results = in_background(lambda: pool.generate(asked, PARAMS, version=0))
    wait_until(lambda: sum(fake.open for fake in fakes) == 2 * SAMPLES)
    pool.abort()
    thread.join(10)
    check(results[0], asked, missing=3)
    reasons = {rollout.finish_reason for group in results[0].groups if group for rollout in group.rollouts}
    assert reasons == {"abort"} and results[0].errors == []
    pool.abort()  # nothing runs: nothing happens
    for fake in fakes:
        fake.aborted.clear()
        fake.delay_s = 0.0
    check(pool.generate(asked, PARAMS, version=0), asked)


def test_a_restarted_server_takes_part_again_in_the_same_call(servers: Servers) -> None:
    first, slow = servers.start(["die"]), servers.start(delay_s=0.15)
    pool = servers.pool(first, slow, max_concurrent=SAMPLES)
    asked = prompts(8)
    thread, results = in_background(lambda: pool.generate(asked, PARAMS, version=0))
    wait_until(lambda: first.dead)
    first.live_again()
    pool.mark_back(first.address)
    thread.join(20)
    check(results[0], asked)
    assert num_generated(first) > 2


def test_servers_are_replaced_within_a_call(servers: Servers) -> None:
    hung, fresh = servers.start(["hang"] * 9), servers.start()
    pool = servers.pool(hung)
    asked = prompts(3)
    thread, results = in_background(lambda: pool.generate(asked, PARAMS, version=0))
    wait_until(lambda: hung.open == 3 * SAMPLES)
    pool.set_addresses([fresh.address])
    thread.join(20)
    check(results[0], asked)
    assert [client.address for client in pool.clients] == [fresh.address]


def test_the_router_gets_generation_and_the_servers_the_rest(servers: Servers) -> None:
    router, *workers = (servers.start() for _ in range(3))
    pool = servers.pool(*workers, router=router.address.url)
    asked = prompts(4)
    check(pool.generate(asked, PARAMS, version=0), asked)
    assert num_generated(router) == 4 and [num_generated(worker) for worker in workers] == [0, 0]
    pool.on_all(lambda client: client.flush_cache())
    assert [worker.bodies("/flush_cache") for worker in workers] == [[None], [None]]
    assert router.bodies("/flush_cache") == []


def test_one_call_on_all_servers_gives_results_or_errors_in_order(servers: Servers) -> None:
    fakes = [servers.start(version=str(i)) for i in range(3)]
    fakes[1].die()
    results = servers.pool(*fakes).on_all(lambda client: client.version())
    assert [results[0], results[2]] == [0, 2]
    assert isinstance(results[1], ServerError) and results[1].address == fakes[1].address


def test_close_leaves_no_thread(servers: Servers) -> None:
    pool = servers.pool(servers.start())
    before = threading.active_count()
    pool.close()
    pool.close()
    assert threading.active_count() == before - 1


FAULTS = st.sampled_from(["", "", "", "500", "half", "garbage", "text", "nan", "short", "abort", "die"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    faults=st.lists(st.lists(FAULTS, max_size=6), min_size=1, max_size=3),
    count=st.integers(0, 10),
    limit=st.integers(1, 12),
)
def test_whatever_fails_each_prompt_is_answered_once_or_not_at_all(
    faults: list[list[str]], count: int, limit: int
) -> None:
    servers = Servers()
    try:
        fakes = [servers.start(each) for each in faults]
        pool = servers.pool(*fakes, max_concurrent=limit)
        asked = prompts(count)
        generated = pool.generate(asked, PARAMS, version=0)
        missing = sum(group is None for group in generated.groups)
        check(generated, asked, missing=missing)
        if missing:
            assert generated.errors
        if not any(each for one in faults for each in one):
            assert not missing
    finally:
        servers.close()
