"""The protocol of a weight update on one rank, over fake servers and a fake transport, and what failures do to it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from aiohttp import web
from fake_sglang_server import FakeServer

from gspo_megatron.config import ModelConfig, RunConfig, SGLangConfig, TaskConfig, TrainConfig
from gspo_megatron.errors import CauseError, UserError
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.rollout.engine import SamplingParams
from gspo_megatron.rollout.sglang.address import ServerAddress, ServerUnavailable
from gspo_megatron.rollout.sglang.engine import SGLangEngine
from gspo_megatron.rollout.sglang.opening import open_sglang
from gspo_megatron.rollout.sglang.pool import ServerPool
from gspo_megatron.rollout.sglang.served_model import ServedModel
from gspo_megatron.rollout.sglang.transports.base import Feed, Meetings, Turns
from gspo_megatron.rollout.sglang.transports.disk import DiskTransport
from gspo_megatron.rollout.sglang.weight_check import WeightCheck
from gspo_megatron.types import NamedTensor, Prompt
from gspo_megatron.weight_sync import generate, sync_weights
from gspo_megatron.weights.checksum import HostChecksum
from gspo_megatron.weights.families import find_family
from gspo_megatron.weights.gather import FlatBucket
from gspo_megatron.weights.reshard import Bucket, ReshardPlan, plan_reshard
from gspo_megatron.weights.server_layout import ServerLayout, server_parameters, server_piece

LAYERS = 4
CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "max_position_embeddings": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 4,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
}
FAMILY = find_family(CONFIG)
FIELDS = FAMILY.fields(CONFIG)
SPECS = [s for s in FAMILY.specs(FIELDS) if not s.load_only]
PARAMETERS = server_parameters(SPECS)
LAYOUT = ServerLayout(1, 1, 32)  # as of a server on a CPU
SENT_BYTES = 4096  # a bucket
ORDER = ["/pause_generation", "/flush_cache", "/begin_weight_update", "bucket", "/update_weight_version"]
ORDER += ["/end_weight_update", "/weights_checker", "/continue_generation"]


@pytest.fixture(scope="module", autouse=True)
def only_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def whole_model() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {name: shape for spec in SPECS for name, shape in zip(spec.hf, spec.hf_shapes, strict=True)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


class Policy:
    """Exports HF tensors; `weights` of itself."""

    def __init__(self) -> None:
        self.tensors, self.weights = whole_model(), self
        self.made_room = False

    def plan(self, feeds: Sequence[Sequence[int]], *, dtype: torch.dtype, bucket_bytes: int) -> ReshardPlan:
        return plan_reshard(
            SPECS,
            ParallelLayout(),
            num_layers=LAYERS,
            num_experts=FIELDS.num_experts,
            feeds=feeds,
            dtype=dtype,
            bucket_bytes=SENT_BYTES,
        )

    def make_room(self) -> None:
        self.made_room = True

    def export(self, plan: ReshardPlan) -> Iterator[Any]:
        for number, step in enumerate(plan.steps):
            yield Gathered(number, len(plan.steps), step.bucket_of(0), plan, self.tensors)


@dataclass
class Gathered:
    number: int
    count: int
    bucket: Bucket | None
    plan: ReshardPlan
    tensors: dict[str, torch.Tensor]

    def assemble(self) -> FlatBucket:
        assert self.bucket is not None
        named = [NamedTensor(name, self.tensors[name]) for i in self.bucket.specs for name in self.plan.specs[i].hf]
        return FlatBucket(torch.empty(0, dtype=torch.uint8), named)


class Servers:
    """Fake servers that hold what they are sent, and the log of all calls: (server, path), or (-1, event)."""

    def __init__(self, count: int) -> None:
        self.log: list[tuple[int, str]] = []
        self.held: dict[str, torch.Tensor] = {}
        self.fakes = [FakeServer() for _ in range(count)]
        self.info = [{"tp_size": 1, "device": "cpu", "dtype": "float32"} for _ in range(count)]
        self.refusals: dict[str, int] = {}  # path -> how often it is refused from now on
        self.skipped: list[list[str] | None] = []  # of each checksum call
        for index, fake in enumerate(self.fakes):
            for path in (*ORDER, "/release_memory_occupation", "/resume_memory_occupation", "/server_info"):
                if path.startswith("/"):
                    fake.answers[path] = self._answer(index, path)

    def _answer(self, index: int, path: str) -> Callable[[Any], web.Response]:
        def answer(body: Any) -> web.Response:
            tags = " " + "+".join(body["tags"]) if path.endswith("memory_occupation") else ""
            if path != "/server_info":
                self.log.append((index, path + tags))
            if path == "/update_weight_version":
                self.fakes[index].version = body["new_version"]
            if self.refusals.get(path, 0) > 0:
                self.refusals[path] -= 1
                return web.json_response({"success": False, "message": "no"}, status=400)
            if path == "/server_info":
                return web.json_response(self.info[index])
            if path == "/weights_checker":
                return web.json_response({"success": True, "ranks": [self._checksums(body)]})
            return web.json_response({"success": True})

        return answer

    def _checksums(self, body: Any) -> dict[str, Any]:
        skipped = body["skip_tensor_list"]
        self.skipped.append(skipped)
        sums = {}
        for parameter in PARAMETERS:
            if any(part in parameter.name for part in skipped or []):
                continue
            checksum = HostChecksum()
            for i in parameter.specs:
                whole = [self.held[name] for name in SPECS[i].hf]
                piece = server_piece(SPECS[i], whole, LAYOUT, 0, num_experts=FIELDS.num_experts)
                assert piece is not None
                checksum.update(piece)
            sums[parameter.name] = checksum.hexdigest()
        return {"checksums": sums, "parallelism_info": {"tp_rank": 0}}

    def calls(self, index: int = 0) -> list[str]:
        """What happened to one server, buckets once."""
        found = [what for who, what in self.log if who in (-1, index)]
        return [what for i, what in enumerate(found) if what != "bucket" or found[i - 1] != "bucket"]


class FakeTransport:
    """Puts buckets straight into the fakes' hands. The sends numbered in `failing`, from 0 on, fail."""

    needs_session = True

    def __init__(self, servers: Servers) -> None:
        self.servers, self.failing, self.sent = servers, set[int](), 0
        self.feed: Feed | None = None
        self.spoil: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor

    def begin(self, version: int, feed: Feed | None, *, sends: bool) -> None:
        assert sends
        self.feed = feed

    def send(self, bucket: FlatBucket) -> None:
        self.servers.log.append((-1, "bucket"))
        self.sent += 1
        if self.sent - 1 in self.failing:
            raise ServerUnavailable(self.servers.fakes[0].address, "/update", "gone")
        self.servers.held |= {item.name: self.spoil(item.name, item.tensor) for item in bucket.tensors}

    def finish(self, plan: ReshardPlan) -> None:
        pass

    def reset(self) -> None:
        self.servers.log.append((-1, "reset"))

    def close(self) -> None:
        self.servers.log.append((-1, "close"))


class FakeManager:
    """Starts fakes again at their address."""

    def __init__(self, servers: Servers, *, works: bool = True) -> None:
        self.servers, self.works = servers, works
        self.restarted: list[int] = []

    def restart(self, index: int) -> None:
        self.restarted.append(index)
        fake = self.servers.fakes[index]
        if not self.works:
            raise ServerUnavailable(fake.address, "restart", "it has ended again")
        fake.live_again()
        fake.version = "default"


class Stage:
    """An engine over fakes, and what uses it."""

    def __init__(self, count: int = 1, *, managed: bool = False, **settings: Any) -> None:
        self.servers = Servers(count)
        self.transport, self.manager = FakeTransport(self.servers), FakeManager(self.servers)
        self.config = SGLangConfig(
            **{"probe_prompts": 0, "update_timeout_s": 2.0, "request_timeout_s": 2.0, "start_timeout_s": 1.0}
            | {"transport": "tensor"}
            | settings
        )
        addresses = [fake.address for fake in self.servers.fakes]
        self.pool = ServerPool(addresses, self.config)
        store = dist.HashStore()
        groups = SimpleNamespace(rank=0, layout=ParallelLayout(), world=dist.group.WORLD, is_head=True)
        self.engine = SGLangEngine(
            self.config,
            groups,  # type: ignore[arg-type]
            self.pool,
            [ServedModel(a, LAYOUT, torch.float32, False, "model", "0.5") for a in addresses],
            [Feed((0,), tuple(addresses))],
            self.transport,
            Turns(store, 2.0),
            Meetings(dist.PrefixStore("meetings", store), 1, 2.0),
            WeightCheck(self.config.check, PARAMETERS),
            num_experts=FIELDS.num_experts,
            manager=self.manager if managed else None,  # type: ignore[arg-type]
        )
        self.policy = Policy()
        self.job: Any = SimpleNamespace(
            engine=self.engine,
            feeding=self.engine.feeding,
            groups=groups,
            all_gather=lambda record: [record],
            device=torch.device("cpu"),
            config=SimpleNamespace(sglang=self.config),
        )

    def sync(self, version: int) -> None:
        sync_weights(self.policy, self.job, version)  # type: ignore[arg-type]

    def again(self) -> None:
        """Forget the calls so far."""
        self.servers.log.clear()

    def calls(self, index: int = 0) -> list[str]:
        return self.servers.calls(index)

    @property
    def addresses(self) -> list[ServerAddress]:
        return [client.address for client in self.pool.clients]

    def close(self) -> None:
        self.engine.close(failed=True)
        for fake in self.servers.fakes:
            fake.close()


@pytest.fixture
def build() -> Iterator[Callable[..., Stage]]:
    stages: list[Stage] = []

    def built(count: int = 1, **settings: Any) -> Stage:
        stages.append(Stage(count, **settings))
        return stages[-1]

    yield built
    for stage in stages:
        stage.close()


def test_the_order_of_an_update(build: Callable[..., Stage]) -> None:
    stage = build(2)
    stage.sync(0)
    stage.again()
    stage.sync(1)
    for index in range(2):
        assert stage.calls(index) == ORDER
    assert stage.transport.sent > 4 and stage.engine.version == 1
    bodies = stage.servers.fakes[0].bodies
    assert [body["new_version"] for body in bodies("/update_weight_version")] == ["0", "1"]
    assert bodies("/pause_generation")[0] == {"mode": "abort"}
    # Nothing is called at one server before all are done with what came before.
    whats = [what for _, what in stage.servers.log]
    assert all(whats.index(a) < whats.index(b) for a, b in itertools.pairwise(ORDER))
    last = len(whats) - 1 - whats[::-1].index("/weights_checker")
    assert last < whats.index("/continue_generation")


def test_the_first_update_forgets_what_a_trainer_that_was_killed_left_open(build: Callable[..., Stage]) -> None:
    stage = build()
    stage.servers.refusals["/end_weight_update"] = 1  # none is open
    stage.sync(0)
    assert stage.calls() == [*ORDER[:2], "reset", "/end_weight_update", *ORDER[2:]]


@pytest.mark.parametrize("fault", ["bucket", *ORDER[:3], "/update_weight_version", "/weights_checker"])
def test_after_a_failure_nothing_goes_on_until_all_is_made_again(build: Callable[..., Stage], fault: str) -> None:
    stage = build()
    stage.sync(0)
    stage.again()
    if fault == "bucket":
        stage.transport.failing = {stage.transport.sent + 1}
    else:
        stage.servers.refusals[fault] = 1
    stage.sync(1)
    calls = stage.calls()
    second = len(calls) - calls[::-1].index("/pause_generation") - 1
    assert second > 0
    assert "/continue_generation" not in calls[:second]
    assert calls[second:] == [*ORDER[:2], "reset", "/end_weight_update", *ORDER[2:]]
    assert stage.engine.version == 1
    stage.again()
    stage.sync(2)
    assert stage.calls() == ORDER, "what was cleaned up once is clean"


def test_a_failed_bucket_ends_the_sending(build: Callable[..., Stage]) -> None:
    stage = build(retries=0)
    stage.transport.failing = {1}
    with pytest.raises(RuntimeError, match=r"weight update 0 failed 1 times; the servers stay paused .*: gone"):
        stage.sync(0)
    assert stage.transport.sent == 2
    assert not {"/update_weight_version", "/weights_checker", "/continue_generation"} & set(stage.calls())
    assert stage.engine.version == -1


def test_retries_are_counted_for_each_update(build: Callable[..., Stage], caplog: pytest.LogCaptureFixture) -> None:
    stage = build(retries=1)
    stage.sync(0)
    for _ in range(3):  # the same version again and again, each time with one failure
        stage.servers.refusals["/begin_weight_update"] = 1
        stage.sync(0)
    assert sum("weight update 0 failed and is tried again" in r.message for r in caplog.records) == 3
    stage.again()
    stage.servers.refusals["/begin_weight_update"] = 2
    with pytest.raises(RuntimeError, match="weight update 1 failed 2 times"):
        stage.sync(1)
    assert stage.calls().count("/begin_weight_update") == 2 and "/continue_generation" not in stage.calls()


def test_a_wrong_checksum_fails_the_update_and_is_named(build: Callable[..., Stage]) -> None:
    stage = build(retries=0)
    stage.transport.spoil = lambda name, tensor: tensor + (name == "model.layers.2.input_layernorm.weight")
    with pytest.raises(
        RuntimeError, match=r"1 of \d+ parameters are not the trainer's: model.layers.2.input_layernorm"
    ):
        stage.sync(0)
    assert "/continue_generation" not in stage.calls()


def test_the_first_update_is_checked_whole_and_later_ones_layer_by_layer(build: Callable[..., Stage]) -> None:
    stage = build()
    for version in range(0, 2 * LAYERS * LAYERS, LAYERS):  # as an evaluation now and then has them
        stage.sync(version)
    first, *later = stage.servers.skipped
    assert first is None
    names = {f"model.layers.{i}." for i in range(LAYERS)}
    checked = [names - set(skipped or []) for skipped in later]
    assert all(len(one) == 1 for one in checked)
    for start in range(LAYERS):
        assert set().union(*checked[start : start + LAYERS]) == names


@pytest.mark.parametrize("check", ["full", "off"])
def test_checks_can_be_full_or_off(build: Callable[..., Stage], check: str) -> None:
    stage = build(check=check)
    stage.sync(0)
    stage.sync(1)
    assert stage.servers.skipped == ([None, None] if check == "full" else [])


# -- memory -----------------------------------------------------------------------------------------------------------

RELEASE = "/release_memory_occupation weights+kv_cache+cuda_graph"
WEIGHTS, REST = "/resume_memory_occupation weights", "/resume_memory_occupation kv_cache+cuda_graph"


@pytest.mark.parametrize("fault", ["/begin_weight_update", "/weights_checker"])  # before and after the name is set
def test_colocated_servers_rest_and_get_their_memory_back_in_two_parts(build: Callable[..., Stage], fault: str) -> None:
    stage = build(colocate=True)
    stage.sync(0)
    stage.again()
    stage.engine.rest()
    stage.engine.rest()
    assert stage.calls() == [*ORDER[:2], RELEASE]
    stage.again()
    stage.servers.refusals[fault] = 1  # the weights' memory is not asked for again
    stage.sync(1)
    assert [c for c in stage.calls() if "occupation" in c] == [WEIGHTS, REST]
    assert stage.calls()[:4] == [*ORDER[:2], WEIGHTS, ORDER[2]]
    assert stage.calls()[-3:] == ["/weights_checker", REST, "/continue_generation"]
    stage.again()
    stage.sync(2)
    assert stage.calls() == ORDER


def test_the_trainer_makes_room_before_colocated_servers_take_their_memory_back(build: Callable[..., Stage]) -> None:
    stage = build(colocate=True)
    stage.sync(0)
    stage.engine.rest()
    stage.again()
    stage.policy.make_room = lambda: stage.servers.log.append((-1, "room"))  # type: ignore[method-assign]
    stage.sync(1)
    assert stage.calls()[0] == "room" and WEIGHTS in stage.calls()
    alone = build()
    alone.sync(0)
    assert not alone.policy.made_room, "an engine with memory of its own needs none of the trainer's"


def test_a_release_whose_answer_is_late_is_given_back(build: Callable[..., Stage]) -> None:
    stage = build(colocate=True)
    stage.sync(0)
    fake = stage.servers.fakes[0]
    usual = fake.answers.pop("/release_memory_occupation")

    def late(body: Any) -> web.Response:
        usual(body)
        return web.Response(status=503)

    fake.answers["/release_memory_occupation"] = late
    stage.engine.rest()
    stage.again()
    stage.sync(1)
    assert [c for c in stage.calls() if "occupation" in c] == [WEIGHTS, REST]


def test_servers_with_memory_of_their_own_do_not_rest(build: Callable[..., Stage]) -> None:
    stage = build()
    stage.sync(0)
    stage.again()
    stage.engine.rest()
    assert stage.calls() == []


def test_a_server_that_was_started_again_has_its_memory(build: Callable[..., Stage]) -> None:
    stage = build(2, managed=True, colocate=True)
    stage.sync(0)
    stage.engine.rest()
    stage.again()
    stage.servers.fakes[1].die()
    stage.sync(1)
    assert [c for c in stage.calls(0) if "occupation" in c] == [WEIGHTS, REST]
    assert [c for c in stage.calls(1) if "occupation" in c] == []


def test_a_server_that_dies_before_it_rests_is_brought_back_later(build: Callable[..., Stage]) -> None:
    stage = build(2, managed=True, colocate=True)
    stage.sync(0)
    stage.servers.fakes[1].die()
    stage.engine.rest()
    stage.sync(1)
    assert stage.manager.restarted == [1]


# -- lost servers -----------------------------------------------------------------------------------------------------


def test_a_lost_server_is_started_again_and_its_group_made_anew(build: Callable[..., Stage]) -> None:
    stage = build(2, managed=True, retries=0)
    stage.sync(0)
    stage.again()
    stage.servers.fakes[1].die()
    stage.sync(1)
    assert stage.manager.restarted == [1]
    assert stage.calls(1) == [*ORDER[:2], "reset", "/end_weight_update", *ORDER[2:]]
    assert stage.engine.version == 1


def test_a_server_that_hangs_is_lost(build: Callable[..., Stage]) -> None:
    stage = build(2, managed=True, update_timeout_s=0.5)
    stage.sync(0)
    stage.servers.fakes[0].stopped = True
    stage.manager.restart = lambda index: setattr(stage.servers.fakes[index], "stopped", False)  # type: ignore
    stage.sync(1)
    assert stage.engine.version == 1


def test_a_server_that_cannot_start_again_ends_the_run_at_once(build: Callable[..., Stage]) -> None:
    stage = build(managed=True, retries=3)
    stage.sync(0)
    stage.again()
    stage.manager.works = False
    stage.servers.fakes[0].die()
    with pytest.raises(RuntimeError, match=r"could not bring back servers that were lost: .*it has ended again"):
        stage.sync(1)
    assert stage.manager.restarted == [0] and stage.calls() == []


def test_a_lost_server_of_others_is_left_out(build: Callable[..., Stage], caplog: pytest.LogCaptureFixture) -> None:
    stage = build(3)
    stage.sync(0)
    stage.again()
    gone = stage.servers.fakes[1]
    gone.die()
    stage.sync(1)
    left = [fake.address for fake in stage.servers.fakes if fake is not gone]
    assert stage.addresses == list(stage.engine.served) == left
    assert stage.transport.feed == Feed((0,), tuple(left))
    assert stage.calls()[2] == "reset"
    [said] = [r.message for r in caplog.records if "going on with 2 of 3 servers" in r.message]
    assert gone.address.url in said


def test_a_server_of_others_that_is_back_takes_part_and_is_checked_whole(
    build: Callable[..., Stage], caplog: pytest.LogCaptureFixture
) -> None:
    stage = build(2)
    stage.sync(0)
    back = stage.servers.fakes[1]
    back.die()
    stage.sync(1)
    stage.again()
    back.live_again()
    back.version = "default"
    stage.sync(2)
    assert stage.addresses == list(stage.engine.served) == [fake.address for fake in stage.servers.fakes]
    assert stage.transport.feed == Feed((0,), tuple(stage.addresses))
    assert stage.calls(1) == [*ORDER[:2], "reset", "/end_weight_update", *ORDER[2:]]
    assert stage.servers.skipped[-1] is None
    assert any(f"going on with 2 of 2 servers; back: {back.address.url}" in r.message for r in caplog.records)
    stage.again()
    stage.sync(3)
    assert stage.calls(1) == ORDER


def test_a_server_that_was_started_again_unnoticed_gets_a_new_group_and_is_checked_whole(
    build: Callable[..., Stage],
) -> None:
    stage = build()
    stage.sync(0)
    stage.again()
    stage.servers.fakes[0].version = "default"
    stage.sync(1)
    assert stage.calls() == [*ORDER[:2], "reset", "/end_weight_update", *ORDER[2:]]
    assert stage.servers.skipped[-1] is None


def test_a_server_that_was_started_again_as_another_one_stays_out(
    build: Callable[..., Stage], caplog: pytest.LogCaptureFixture
) -> None:
    stage = build(2)
    stage.sync(0)
    stage.servers.fakes[1].version = "default"
    stage.servers.info[1] |= {"tp_size": 2, "dtype": "bfloat16"}
    stage.sync(1)
    assert stage.addresses == [stage.servers.fakes[0].address]
    said = "it was started again with TP2 in torch.bfloat16 instead of TP1 in torch.float32"
    assert any(said in r.message for r in caplog.records)


def test_a_server_of_others_that_is_not_well_yet_is_not_taken_back(build: Callable[..., Stage]) -> None:
    """`serve` waits for its health, which a pause would end."""
    stage = build(2)
    stage.sync(0)
    back = stage.servers.fakes[1]
    back.version, back.sick = "default", True
    stage.sync(1)
    assert stage.addresses == [stage.servers.fakes[0].address]
    back.sick = False
    stage.sync(2)
    assert len(stage.addresses) == 2


def test_a_server_that_another_run_uses_ends_the_run(build: Callable[..., Stage]) -> None:
    stage = build()
    stage.servers.fakes[0].version = "cd34ef56-0"  # of a run that has ended
    stage.sync(0)
    stage.servers.fakes[0].version = "cd34ef56-1"
    with pytest.raises(UserError, match=f"{stage.addresses[0].url}: .*'cd34ef56-1'.* two runs use this server"):
        stage.sync(1)


def test_the_last_server_of_others_is_waited_for(build: Callable[..., Stage]) -> None:
    """`serve` starts it again."""
    stage = build(start_timeout_s=30.0)
    stage.sync(0)
    only = stage.servers.fakes[0]
    only.die()
    starting = threading.Timer(1.5, only.live_again)
    starting.start()
    stage.sync(1)
    starting.join()
    assert stage.engine.version == 1 and stage.addresses == [only.address]


def test_without_any_server_the_run_ends(build: Callable[..., Stage]) -> None:
    stage = build(retries=3)
    stage.sync(0)
    sent = stage.transport.sent
    stage.servers.fakes[0].die()
    with pytest.raises(CauseError, match=rf"no server is left, and none came back .*{stage.addresses[0].url}"):
        stage.sync(1)
    assert stage.transport.sent == sent


def test_a_server_that_dies_at_the_very_end_of_an_update_is_missed_by_generation(
    build: Callable[..., Stage], caplog: pytest.LogCaptureFixture
) -> None:
    stage = build(2)
    stage.sync(0)
    dying = stage.servers.fakes[1]
    dying.answers["/continue_generation"] = lambda body: web.Response(status=503)
    stage.sync(1)
    assert stage.engine.version == 1
    assert any(dying.address.url in r.message and "/continue_generation" in r.message for r in caplog.records)


def test_after_a_failure_closing_speaks_to_nobody(build: Callable[..., Stage]) -> None:
    stage = build()
    stage.sync(0)
    stage.again()
    stage.engine.close(failed=True)
    assert stage.calls() == []
    stage = build()
    stage.engine.close()
    assert stage.calls() == ["close"]


# -- generation -------------------------------------------------------------------------------------------------------

PARAMS = SamplingParams(num_samples=1, temperature=1.0, max_response_tokens=4, stop_token_ids=(1,), seed=0)


def test_what_no_server_could_answer_is_asked_for_again_after_a_new_hand_over(build: Callable[..., Stage]) -> None:
    stage = build(managed=True, max_concurrent=1)
    stage.sync(0)
    stage.servers.fakes[0].faults.extend(["", "die"])
    prompts = [Prompt(7 + i, "", [3 + i, 4], None) for i in range(3)]
    groups = generate(stage.job, prompts, PARAMS, lambda: stage.sync(0))
    assert [group.prompt.id for group in groups] == [7, 8, 9]
    assert stage.manager.restarted == [0]
    asked = [body["input_ids"][0] for body in stage.servers.fakes[0].bodies()]
    assert asked.count(3) == 1, "what is there stays"
    assert asked.count(4) == 2 and asked[-1] == 5


@pytest.mark.parametrize(
    ("fault", "reason", "times"), [("nan", "weights may hold NaN", 0), ("500", "/generate failed: 500", 1)]
)
def test_generation_that_comes_to_nothing_ends_and_says_why(
    build: Callable[..., Stage], fault: str, reason: str, times: int
) -> None:
    """Weights are handed over again to servers that were lost, not to those that are well and answer nonsense."""
    stage = build(retries=0)
    stage.sync(0)
    stage.servers.fakes[0].faults.extend([fault] * 100)
    handed_over: list[int] = []
    with pytest.raises(CauseError, match=rf"2 prompts could not be answered by any server: .*({reason})"):
        generate(stage.job, [Prompt(i, "", [3], None) for i in range(2)], PARAMS, lambda: handed_over.append(1))
    assert len(handed_over) == times


def test_weights_of_another_version_are_handed_over_again(build: Callable[..., Stage]) -> None:
    """The server was started again in the meantime."""
    stage = build()
    stage.sync(0)
    stage.servers.fakes[0].version = "default"
    groups = generate(stage.job, [Prompt(7, "", [3, 4], None)], PARAMS, lambda: stage.sync(0))
    assert [group.prompt.id for group in groups] == [7]


@pytest.mark.parametrize("fault", ["500", "nan"])
def test_a_probe_that_is_not_answered_says_why_and_comes_to_no_figure(
    build: Callable[..., Stage], caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    stage = build()
    stage.job.config = TrainConfig(
        run=RunConfig(folder="run"),
        model=ModelConfig(path="model"),
        task=TaskConfig(name="jsonl"),
        sglang=replace(stage.config, probe_prompts=2),
    )
    stage.job.groups.coordinates = SimpleNamespace(data=0)
    stage.job.task = SimpleNamespace(prompts=lambda *_: [Prompt(i, "", [3, 4], None) for i in range(2)])
    stage.job.tokenizer = SimpleNamespace(stop_token_ids=(1,))
    stage.servers.fakes[0].faults.extend([fault] * 100)
    report = sync_weights(stage.policy, stage.job, 0)  # type: ignore[arg-type]
    assert report.is_probed and report.probe_max_abs is None
    assert any("the probe of weight update 0: SGLang server" in r.message for r in caplog.records)


# -- ranks that wait for each other -----------------------------------------------------------------------------------


def test_ranks_meet() -> None:
    store = dist.HashStore()
    ranks = [Meetings(store, 2, 5.0) for _ in range(2)]
    passed: list[int] = []

    def second() -> None:
        for number in range(3):
            ranks[1].wait()
            passed.append(number)

    thread = threading.Thread(target=second)
    thread.start()
    for number in range(3):
        assert len(passed) <= number
        ranks[0].wait()
    thread.join()
    assert passed == [0, 1, 2]


def test_meetings_and_turns_leave_nothing_in_the_store() -> None:
    store = dist.HashStore()
    meetings, turns = Meetings(store, 1, 5.0), Turns(store, 1.0)
    for number in range(3):
        meetings.wait()
        turns.end(f"turn/{number}")
    assert store.num_keys() == 2 + 3
    turns.forget()
    assert store.num_keys() == 2


def test_a_rank_may_be_waited_for_longer_than_usual() -> None:
    store = dist.HashStore()
    late = threading.Timer(0.5, Meetings(store, 2, 0.2).wait)
    late.start()
    Meetings(store, 2, 0.2).wait(5.0)
    late.join()


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever() -> None:
    with pytest.raises(RuntimeError, match=r"a rank was not done with its servers within 0.2 s"):
        Meetings(dist.HashStore(), 2, 0.2).wait()


def test_ranks_wait_longer_for_each_other_than_for_a_server() -> None:
    config: Any = SimpleNamespace(
        sglang=SGLangConfig(update_timeout_s=30.0), parallel=SimpleNamespace(timeout_s=30.0), model=None
    )
    groups: Any = SimpleNamespace(layout=ParallelLayout(tensor=2))
    with (
        pytest.raises(UserError, match=r"sglang.update_timeout_s=30 must be below parallel.timeout_s=30"),
        open_sglang(config, groups, stop_token_ids=(1,)),
    ):
        pass


# -- through a folder -------------------------------------------------------------------------------------------------


def on_disk(stage: Stage, folder: Path) -> list[DiskTransport]:
    """The transports of two ranks."""
    return [
        DiskTransport(stage.pool, rank=rank, folder=folder / "run", companions_from=folder, timeout_s=2.0)
        for rank in range(2)
    ]


def test_ranks_write_into_one_folder_also_after_one_had_no_turn(build: Callable[..., Stage], tmp_path: Path) -> None:
    first, second = on_disk(build(), tmp_path)
    first.begin(0, None, sends=True)  # and the second rank has lost its turn
    failed = list(first.folder.iterdir())
    for transport in (first, second):
        transport.reset()
    for transport in (first, second):
        transport.begin(0, None, sends=True)
    [now] = first.folder.iterdir()
    assert now not in failed, "what is still on its way to the old folder must not count"
    for transport in (first, second):
        transport.close()
    assert not first.folder.exists()


def test_a_folder_stays_until_all_servers_have_read_it(build: Callable[..., Stage], tmp_path: Path) -> None:
    stage = build(2)
    seen: list[bool] = []

    def read_slowly(body: Any) -> web.Response:
        time.sleep(0.3)
        seen.append(Path(body["model_path"]).is_dir())
        return web.json_response({"success": True})

    stage.servers.fakes[0].answers["/update_weights_from_disk"] = lambda body: web.Response(status=500)
    stage.servers.fakes[1].answers["/update_weights_from_disk"] = read_slowly
    stage.servers.refusals["/weights_checker"] = 1
    transport, _ = on_disk(stage, tmp_path)
    transport.begin(0, None, sends=True)
    plan: Any = SimpleNamespace(specs=[])
    with pytest.raises(ServerUnavailable):
        transport.finish(plan)
    assert seen == [True]
    transport.close()
    assert not transport.folder.exists()
