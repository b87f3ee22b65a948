"""Generation by real SGLang servers on the CPU: log-probabilities, ends, routes, faults in mid-generation."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gspo_megatron.config import SGLangConfig
from gspo_megatron.rollout.engine import SamplingParams
from gspo_megatron.rollout.sglang.address import ServerAddress, ServerRefused, ServerUnavailable
from gspo_megatron.rollout.sglang.client import ServerClient
from gspo_megatron.rollout.sglang.dispatch import Generated, Timing
from gspo_megatron.rollout.sglang.generation import request_of
from gspo_megatron.rollout.sglang.manager import ServerManager
from gspo_megatron.rollout.sglang.pool import ServerPool
from gspo_megatron.types import Group, Prompt, Rollout
from gspo_megatron.weights.families import load_fields
from tests.distributed.rank_pool import free_port
from tests.system.sglang_setup import EOS, VOCAB, sglang_python, write_model

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]
NEVER_SET = -1  # version of the weights that servers start with
VERSION = 0  # that of the servers that tests share
STOPS = (EOS, *range(20, 28))
PARAMS = SamplingParams(num_samples=4, temperature=1.0, max_response_tokens=48, stop_token_ids=STOPS, seed=0)
# Long enough to be in the middle of it.
LONG = replace(PARAMS, max_response_tokens=400, stop_token_ids=(EOS,))
QUICK = Timing(probe_every_s=1.0, probe_timeout_s=4.0, backoff_s=0.5)


@dataclass
class Running:
    """Servers with a model, and what starts, stops and kills them."""

    manager: ServerManager
    addresses: list[ServerAddress]
    folder: Path
    config: SGLangConfig

    def pool(self, *indices: int) -> ServerPool:
        addresses = [self.addresses[i] for i in indices] or self.addresses
        return ServerPool(addresses, self.config, fields=load_fields(self.folder)[1], timing=QUICK)

    def send(self, index: int, number: signal.Signals) -> None:
        """A signal to a server, its guard and its children."""
        os.killpg(self.manager._servers[index].pid, number)


@contextmanager
def start(folder: Path) -> Iterator[Running]:
    model = write_model(folder / "model")
    config = SGLangConfig(
        servers=2, python=str(sglang_python()), routed_experts=True, start_timeout_s=240, request_timeout_s=300
    )
    with ServerManager(config, model, "float32", folder) as manager:
        yield Running(manager, manager.start(), model, config)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with start(tmp_path_factory.mktemp("servers")) as found:
        pool = found.pool()
        assert pool.on_all(lambda client: client.set_version(VERSION)) == [None, None]
        pool.close()
        yield found


@pytest.fixture(scope="module")
def model(running: Running) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(running.folder, dtype=torch.float32).eval()


@pytest.fixture
def pool(running: Running) -> Iterator[ServerPool]:
    found = running.pool()
    yield found
    found.close()


def prompts(count: int, seed: int = 0) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Prompt(i, "", torch.randint(30, VOCAB, (6 + i % 9,), generator=generator).tolist(), None) for i in range(count)
    ]


@torch.no_grad()
def reference(model: torch.nn.Module, rollout: Rollout, temperature: float) -> tuple[Tensor, Tensor]:
    """By transformers: log-probabilities [L-1] of the next tokens, and experts [L-1, layers, k] of each token."""
    routes: list[Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, __, out: routes.append(out[2])) for layer in model.model.layers
    ]
    try:
        logits = model(rollout.token_ids[None]).logits[0, :-1] / temperature
    finally:
        for hook in hooks:
            hook.remove()
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, rollout.token_ids[1:, None]).squeeze(1)
    return logprobs, torch.stack(routes, dim=1)[:-1]


def complete(generated: Generated, asked: list[Prompt], samples: int) -> list[Group]:
    """All groups, each with its samples."""
    groups = [group for group in generated.groups if group is not None]
    assert [group.prompt for group in groups] == asked
    assert all(len(group.rollouts) == samples for group in groups)
    return groups


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_and_routes_are_those_of_transformers(
    pool: ServerPool, model: torch.nn.Module, temperature: float
) -> None:
    asked = prompts(12)
    params = replace(PARAMS, temperature=temperature)
    generated = pool.generate(asked, params, version=VERSION, routed_experts=True)
    assert generated.errors == []
    num_routes = 0
    for group in complete(generated, asked, PARAMS.num_samples):
        for rollout in group.rollouts:
            logprobs, routes = reference(model, rollout, temperature)
            inside = rollout.response_mask[1:]
            assert (rollout.rollout_logprobs[1:] - logprobs)[inside].abs().max() < 1e-5
            assert not rollout.rollout_logprobs[~rollout.response_mask].any()
            assert rollout.routes is not None and rollout.routes_valid is not None
            # Also the prompt's, which the samples but one found in the prefix cache.
            assert rollout.routes_valid.all()
            assert torch.equal(rollout.routes.long().sort(-1).values, routes.sort(-1).values)
            num_routes += len(routes)
    assert num_routes > 500


def test_samples_share_the_prompt_in_the_prefix_cache(running: Running, pool: ServerPool) -> None:
    prompt = Prompt(0, "", list(range(100, 164)), None)
    asked: list[list[Any]] = []

    async def ask(client: ServerClient) -> None:
        asked.append(await client.generate(request_of(prompt, PARAMS, False)))

    pool.on_all(lambda client: client.flush_cache())
    pool.on_all(ask)
    for answers in asked:
        # All but the last token of the prompt: it is run for the first log-probabilities.
        assert [answer["meta_info"]["cached_tokens"] for answer in answers] == [63] * PARAMS.num_samples
        assert all(triple[2] is None for a in answers for triple in a["meta_info"]["output_token_logprobs"])


def test_responses_end_at_the_first_stop_token_or_at_the_longest_length(pool: ServerPool) -> None:
    asked = prompts(16, seed=1)
    groups = complete(pool.generate(asked, PARAMS, version=VERSION), asked, PARAMS.num_samples)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        response = rollout.token_ids[rollout.response_mask].tolist()
        stops = [token in STOPS for token in response]
        assert stops == [False] * (len(response) - 1) + [rollout.finish_reason == "stop"]
        assert rollout.finish_reason == "stop" or len(response) == PARAMS.max_response_tokens
    assert len({tuple(rollout.token_ids.tolist()) for rollout in rollouts}) == len(rollouts)


def test_a_stop_token_that_is_none_here_is_an_error_with_a_remedy(pool: ServerPool) -> None:
    params = replace(PARAMS, num_samples=16, max_response_tokens=400, stop_token_ids=(27,))
    generated = pool.generate(prompts(8), params, version=VERSION)
    assert None in generated.groups
    message = str(generated.errors[0])
    assert f"ended at token {EOS}" in message and "eos_token_id in the model's generation_config.json" in message


def test_a_prompt_too_long_ends_the_call_in_the_servers_words(pool: ServerPool) -> None:
    with pytest.raises(ServerRefused, match=r"400 .*maximum context length"):
        pool.generate([Prompt(0, "", [50] * 30, None)], replace(PARAMS, max_response_tokens=2040), version=VERSION)


def test_other_weights_than_asked_for_are_not_returned(pool: ServerPool) -> None:
    generated = pool.generate(prompts(2), PARAMS, version=3)
    assert generated.groups == [None, None]
    assert "weights of version 0, not 3" in str(generated.errors[0])


def in_background(work: Callable[[], Generated]) -> Callable[[], Generated]:
    """Starts `work`; what is returned waits for its result."""
    results: list[Generated | BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def wait() -> Generated:
        thread.join(300)
        assert results, "still running"
        assert isinstance(results[0], Generated), results[0]
        return results[0]

    return wait


def test_abort_keeps_partial_responses(pool: ServerPool, model: torch.nn.Module) -> None:
    asked = prompts(6)
    params = replace(LONG, max_response_tokens=1500)
    result = in_background(lambda: pool.generate(asked, params, version=VERSION, routed_experts=True))
    time.sleep(1.5)
    start = time.monotonic()
    pool.abort()
    generated = result()
    assert time.monotonic() - start < 20
    rollouts = [r for g in complete(generated, asked, params.num_samples) for r in g.rollouts]
    aborted = [rollout for rollout in rollouts if rollout.finish_reason == "abort"]
    assert aborted and generated.errors == []  # others had ended by themselves
    longest = max(aborted, key=lambda rollout: len(rollout.token_ids))
    assert 10 < int(longest.response_mask.sum()) < 1500
    logprobs, _ = reference(model, longest, 1.0)
    assert (longest.rollout_logprobs[1:] - logprobs)[longest.response_mask[1:]].abs().max() < 2e-5
    complete(pool.generate(asked, PARAMS, version=VERSION), asked, PARAMS.num_samples)


def test_a_response_by_two_versions_names_both_and_its_routes_are_not_valid(running: Running) -> None:
    pool = running.pool(0)
    params = replace(LONG, max_response_tokens=1200, num_samples=1)

    def generate_through_an_update(prompt: Prompt) -> Group | None:
        assert pool.on_all(lambda client: client.set_version(1)) == [None]
        result = in_background(lambda: pool.generate([prompt], params, version=2, routed_experts=True))
        time.sleep(0.3)
        assert pool.on_all(lambda client: client.pause("retract")) == [None]
        assert pool.on_all(lambda client: client.flush_cache()) == [None]
        assert pool.on_all(lambda client: client.set_version(2)) == [None]
        assert pool.on_all(lambda client: client.resume()) == [None]
        return result().groups[0]

    try:
        # One that ended before the update is not returned.
        groups = (generate_through_an_update(prompt) for prompt in prompts(20, seed=2))
        group = next(group for group in groups if group is not None)
        (rollout,) = group.rollouts
        versions = rollout.policy_versions[rollout.response_mask]
        assert versions.unique().tolist() == [1, 2] and (versions.diff() >= 0).all()
        assert rollout.routes_valid is not None
        assert torch.equal(rollout.routes_valid, ~rollout.response_mask[1:])
    finally:
        pool.on_all(lambda client: client.set_version(VERSION))
        pool.close()


@contextmanager
def router(running: Running, log: Path) -> Iterator[str]:
    """A real sglang-router in front of the servers; its address."""
    port = free_port()
    command = [str(sglang_python()), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--policy", "round_robin", "--worker-urls", *(a.url for a in running.addresses)]
    with open(log, "w") as file, subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + 120
            while "Workflow completed" not in log.read_text() or log.read_text().count("activate_workers") < 2:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_router_in_front_gets_the_generation_and_the_servers_the_rest(
    running: Running, model: torch.nn.Module, tmp_path: Path
) -> None:
    with router(running, tmp_path / "router.log") as url:
        fields = load_fields(running.folder)[1]
        pool = ServerPool(running.addresses, replace(running.config, router=url), fields=fields, timing=QUICK)
        try:
            asked = prompts(12, seed=5)
            made = pool.generate(asked, PARAMS, version=VERSION)
            assert made.errors == []
            for prompt, group in zip(asked, made.groups, strict=True):
                assert group is not None and group.prompt is prompt and len(group.rollouts) == PARAMS.num_samples
                logprobs, _ = reference(model, group.rollouts[0], PARAMS.temperature)
                mask = group.rollouts[0].response_mask[1:]
                gap = (logprobs - group.rollouts[0].rollout_logprobs[1:])[mask]
                assert gap.abs().max() < 1e-5
            # Weight updates and their like are no business of a router: they reach each server.
            assert [isinstance(info, dict) for info in pool.on_all(lambda c: c.server_info())] == [True, True]
        finally:
            pool.close()


def test_a_stopped_server_is_noticed_and_its_prompts_go_to_the_other(running: Running) -> None:
    pool = running.pool()
    asked = prompts(10)
    result = in_background(lambda: pool.generate(asked, LONG, version=VERSION))
    time.sleep(1.0)
    running.send(0, signal.SIGSTOP)
    try:
        start = time.monotonic()
        generated = result()
        assert time.monotonic() - start < 60  # of a request timeout of 300 s
    finally:
        running.send(0, signal.SIGCONT)
    complete(generated, asked, LONG.num_samples)
    assert {error.address for error in generated.errors} == {running.addresses[0]}
    again = pool.generate(asked, replace(PARAMS, stop_token_ids=(EOS,)), version=VERSION)
    complete(again, asked, PARAMS.num_samples)
    pool.close()


@pytest.mark.slow
def test_killed_servers(tmp_path: Path) -> None:
    with start(tmp_path) as running:
        pool = running.pool()
        asked = prompts(10)
        result = in_background(lambda: pool.generate(asked, LONG, version=NEVER_SET))
        time.sleep(1.0)
        running.send(0, signal.SIGKILL)
        generated = result()
        complete(generated, asked, LONG.num_samples)
        assert {error.address for error in generated.errors} == {running.addresses[0]}
        assert all(isinstance(error, ServerUnavailable) for error in generated.errors)

        # The other one alone: what it had not answered is None, and it takes a moment, not the request's timeout.
        pool.set_addresses(running.addresses[1:])
        result = in_background(lambda: pool.generate(asked, LONG, version=NEVER_SET))
        time.sleep(0.5)
        running.send(1, signal.SIGKILL)
        start_wait = time.monotonic()
        generated = result()
        assert time.monotonic() - start_wait < 30
        assert generated.groups == [None] * len(asked)
        assert {error.address for error in generated.errors} == {running.addresses[1]}

        running.manager.restart(1)
        pool.mark_back(running.addresses[1])
        generated = pool.generate(asked, PARAMS, version=NEVER_SET)
        assert generated.errors == []
        complete(generated, asked, PARAMS.num_samples)
        pool.close()
