"""A stand-in for an SGLang server that can fail in every way one needs."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from aiohttp import web

from gspo_megatron.rollout.sglang.address import ServerAddress
from gspo_megatron.rollout.sglang.loop import LoopThread

STOP = 1
VOCAB = 512
SERIALS = itertools.count(2)  # of responses, over all servers: none is given twice


def logprob(token: int, position: int) -> float:
    """What fake servers say a token's log-probability is."""
    return -0.25 - token / VOCAB - position / 64


def answer(
    tokens: list[int],
    *,
    prompt_tokens: int,
    version: str = "0",
    finish: dict[str, Any] | None = None,
    routes: np.ndarray | None = None,
    retractions: int = 0,
) -> dict[str, Any]:
    """One answer of /generate, in SGLang's form."""
    matched = {"type": "stop", "matched": tokens[-1]} if tokens and tokens[-1] == STOP else None
    meta: dict[str, Any] = {
        "id": "x",
        "finish_reason": finish or matched or {"type": "length", "length": len(tokens)},
        "prompt_tokens": prompt_tokens,
        "weight_version": version,
        "weight_versions": [{"version": version, "start": 0, "end": len(tokens)}],
        "num_retractions": retractions,
        "output_token_logprobs": [[logprob(t, i), t, None] for i, t in enumerate(tokens)],
        "completion_tokens": len(tokens),
        "cached_tokens": 0,
    }
    if routes is not None:
        meta["routed_experts"] = base64.b64encode(np.ascontiguousarray(routes, dtype=np.int32).tobytes()).decode()
    return {"text": "text", "output_ids": tokens, "meta_info": meta}


def serial_of(tokens: Iterable[int]) -> int:
    """The serial number in a response of a fake server."""
    high, low, *_ = tokens
    return (high - 2) * 500 + low - 2


class FakeServer:
    """Serves on a free port of 127.0.0.1.

    `faults` are used up one a /generate request: "500", "refuse", "hang", "garbage", "text", "nan", "half" (breaks off
    within the answer), "die", "abort", "short" (an answer too few); then it does as it should.
    """

    def __init__(self, faults: Iterable[str] = (), *, version: str = "0", delay_s: float = 0.0) -> None:
        self.faults, self.version, self.delay_s = deque(faults), version, delay_s
        self.requests: list[tuple[str, Any, str | None]] = []  # path, body, authorization
        self.open = self.most_open = 0  # responses
        self.dead = self.stopped = self.sick = False
        self.answers: dict[str, Callable[[Any], web.Response]] = {}  # path -> answer, instead of the usual one
        self.aborted = asyncio.Event()
        self._transports: set[asyncio.BaseTransport] = set()
        self._loop = LoopThread("fake-server")
        self._loop.run(self._start(0))

    @property
    def address(self) -> ServerAddress:
        return ServerAddress(f"http://127.0.0.1:{self.port}")

    def bodies(self, path: str = "/generate") -> list[Any]:
        return [body for called, body, _ in self.requests if called == path]

    def die(self) -> None:
        self._loop.run(self._die())

    def live_again(self) -> None:
        self._loop.run(self._start(self.port))

    def close(self) -> None:
        if not self.dead:
            self.die()
        self._loop.close()

    async def _start(self, port: int) -> None:
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        self.dead = False

    async def _die(self) -> None:
        self.dead = True
        for transport in self._transports:
            transport.abort()  # type: ignore[attr-defined]
        self._transports.clear()
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        self._transports.add(request.transport)
        content = await request.read()
        body = json.loads(content) if content else None
        self.requests.append((request.path, body, request.headers.get("Authorization")))
        if self.stopped:
            await asyncio.sleep(3600)
        if request.path in self.answers:
            return self.answers[request.path](body)
        if request.path == "/generate":
            return await self._generate(request, body)
        if request.path == "/health_generate" and self.sick:
            return web.Response(status=503)
        if request.path == "/abort_request":
            self.aborted.set()
            return web.Response()
        if request.path == "/model_info":
            return web.json_response({"weight_version": self.version, "preferred_sampling_params": None})
        return web.json_response({"success": True, "message": "ok"})

    async def _generate(self, request: web.Request, body: Any) -> web.StreamResponse:
        samples = body["sampling_params"]["n"]
        self.open += samples
        self.most_open = max(self.most_open, self.open)
        try:
            fault = self.faults.popleft() if self.faults else ""
            cut = False
            try:
                await asyncio.wait_for(self.aborted.wait(), self.delay_s or 1e-3)
                cut = True
            except TimeoutError:
                pass
            return await self._respond(request, body, fault, cut)
        finally:
            self.open -= samples

    async def _respond(self, request: web.Request, body: Any, fault: str, cut: bool) -> web.StreamResponse:
        if fault == "500":
            return web.json_response({"error": {"message": "out of memory"}}, status=500)
        if fault == "refuse":
            return web.json_response({"error": {"message": "the input is too long"}}, status=400)
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "die":
            asyncio.get_running_loop().create_task(self._die())
            await asyncio.sleep(3600)
        if fault == "text":
            return web.Response(text="hello")
        if fault == "garbage":
            return web.json_response([{"meta_info": {"finish_reason": None}}] * body["sampling_params"]["n"])
        answers = [self._answer(body, cut or fault == "abort") for _ in range(body["sampling_params"]["n"])]
        if fault == "nan":
            answers[-1]["meta_info"]["output_token_logprobs"][0][0] = None
        if fault == "short":
            answers.pop()
        if fault == "half":
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            await response.prepare(request)
            await response.write(json.dumps(answers).encode()[:100])
            assert request.transport is not None
            request.transport.abort()  # type: ignore[attr-defined]
            return response
        return web.json_response(answers if len(answers) > 1 else answers[0])

    def _answer(self, body: Any, cut: bool) -> dict[str, Any]:
        serial = next(SERIALS)
        tokens = [serial // 500 + 2, serial % 500 + 2, *([] if cut else [STOP])]
        finish = {"type": "abort", "message": "Aborted"} if cut else None
        return answer(tokens, prompt_tokens=len(body["input_ids"]), version=self.version, finish=finish)
