"""One SGLang server over HTTP: one method a call, each with its timeout; failures say what the server said.

Forms of requests and answers are those of SGLang 0.5 (entrypoints/http_server.py, managers/io_struct.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp

from gspo_megatron.rollout.sglang.address import ServerAddress, ServerRefused, ServerUnavailable
from gspo_megatron.rollout.sglang.version import NEVER_SET, VersionNames

INFO_TIMEOUT_S = 30.0  # calls that a server answers without its scheduler or nearly so
CONNECT_TIMEOUT_S = 10.0
# The server closes idle connections after 5 s; a request sent just then would be lost.
KEEP_ALIVE_S = 3.0
RETRY_STATUS = (408, 425, 429)  # 4xx that mean "later", not "never"
PARTLY_LOADED = "partially updated"  # of the words with which SGLang refuses tensors of other shapes
LONGEST_REASON = 400  # characters of a server's words that are passed on


def open_session() -> aiohttp.ClientSession:
    """A session for any number of servers; made and closed in the loop that uses it."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
    # Addresses are given: a proxy from the environment has no part in it (trust_env is off by default).
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())


class ServerClient:
    """Calls of one server. All raise ServerUnavailable or ServerRefused and nothing else."""

    def __init__(
        self,
        address: ServerAddress,
        session: aiohttp.ClientSession,
        *,
        request_timeout_s: float,
        update_timeout_s: float,
        names: VersionNames | None = None,
    ) -> None:
        """`names` of the weights that this run sends."""
        self.address, self.names = address, names or VersionNames()
        self.paused = False  # by this client: a paused server generates nothing, also not for its health check
        self._session = session
        self._request_timeout_s, self._update_timeout_s = request_timeout_s, update_timeout_s
        self._headers = {"Authorization": f"Bearer {address.api_key}"} if address.api_key else {}

    async def health_generate(self, timeout_s: float = INFO_TIMEOUT_S) -> None:
        """Return when the server's scheduler has answered, after a second at least."""
        await self._call("GET", "/health_generate", timeout_s=timeout_s)

    async def model_info(self, timeout_s: float = INFO_TIMEOUT_S) -> dict[str, Any]:
        """Model path, weight_version and preferred sampling parameters; answered without the scheduler."""
        return self._object("/model_info", await self._call("GET", "/model_info", timeout_s=timeout_s))

    async def server_info(self, timeout_s: float = INFO_TIMEOUT_S) -> dict[str, Any]:
        """The arguments the server was started with, resolved, and limits that follow; its scheduler is asked too."""
        return self._object("/server_info", await self._call("GET", "/server_info", timeout_s=timeout_s))

    async def version(self) -> int:
        """Version of the server's weights; -1 if it never got one."""
        info = await self.model_info()
        try:
            return self.names.number(str(info.get("weight_version", NEVER_SET)))
        except ValueError as error:
            raise ServerRefused(self.address, "/model_info", str(error)) from error

    async def generate(self, request: Mapping[str, Any]) -> list[Any]:
        """The answers to one request, one a sample, as they are."""
        answer = await self._call("POST", "/generate", request, timeout_s=self._request_timeout_s)
        return answer if isinstance(answer, list) else [answer]  # n = 1 is answered without a list

    async def abort_all(self) -> None:
        """End all requests that the scheduler has; they are answered with what they have so far.

        Requests that wait in front of the scheduler go on: repeat it until all are answered.
        """
        await self._call("POST", "/abort_request", {"abort_all": True}, timeout_s=INFO_TIMEOUT_S)

    async def pause(self, mode: str) -> None:
        """Stop generating: "abort" ends open requests, "retract" and "in_place" keep them for later."""
        self.paused = True
        await self._call("POST", "/pause_generation", {"mode": mode}, timeout_s=self._update_timeout_s)

    async def resume(self) -> None:
        """Go on after `pause`."""
        await self._call("POST", "/continue_generation", {}, timeout_s=self._update_timeout_s)
        self.paused = False

    async def flush_cache(self) -> None:
        """Forget the prefix cache. Refused while requests run."""
        await self._call("POST", "/flush_cache", timeout_s=self._update_timeout_s)

    async def begin_update(self) -> None:
        """Open a weight update; only inside one do tensors get in."""
        await self._update("/begin_weight_update", {})

    async def end_update(self) -> None:
        """Close the weight update. Refused if none is open."""
        await self._update("/end_weight_update", {})

    async def set_version(self, version: int) -> None:
        """Name the present weights. Requests that run go on (by default the server would abort them)."""
        await self._update(
            "/update_weight_version", {"new_version": self.names.name(version), "abort_all_requests": False}
        )

    async def init_group(
        self, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None:
        """Have the server's ranks join a process group; returns when all its members have."""
        body = {
            "master_address": master_address,
            "master_port": master_port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group_name,
            "backend": backend,
        }
        await self._update("/init_weights_update_group", body)

    async def destroy_group(self, group_name: str) -> None:
        """Leave a process group. Refused if there is none of that name."""
        await self._update("/destroy_weights_update_group", {"group_name": group_name})

    async def update_from_distributed(
        self, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]], group_name: str
    ) -> None:
        """Receive one flattened bucket by broadcast in the group."""
        body = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": group_name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        await self._update("/update_weights_from_distributed", body)

    async def update_from_tensor(self, serialized: Sequence[str]) -> None:
        """Load serialized (name, tensor) lists, base64, one for each of the server's tensor-parallel ranks."""
        body = {"serialized_named_tensors": list(serialized), "load_format": None, "flush_cache": False}
        await self._update("/update_weights_from_tensor", body)

    async def update_from_disk(self, folder: str, version: int) -> None:
        """Load safetensors from a folder that the server can read, and name them."""
        body = {
            "model_path": folder,
            "weight_version": self.names.name(version),
            "load_format": "auto",  # a server that was started with random weights would make new ones
            "flush_cache": True,
            "abort_all_requests": False,
        }
        await self._update("/update_weights_from_disk", body)

    async def checksums(self, skip: Sequence[str]) -> list[dict[str, Any]]:
        """Checksums of each rank's parameters, without those whose name holds one of `skip`."""
        body = {"action": "checksum", "skip_tensor_list": list(skip) or None}
        answer = self._object("/weights_checker", await self._update("/weights_checker", body))
        ranks = answer.get("ranks")
        if not isinstance(ranks, list) or not ranks:
            raise ServerRefused(self.address, "/weights_checker", f"no checksums in {_short(str(answer))}")
        return ranks

    async def release_memory(self, tags: Sequence[str]) -> None:
        """Give back the memory of "weights" or "kv_cache"."""
        await self._update("/release_memory_occupation", {"tags": list(tags)})

    async def resume_memory(self, tags: Sequence[str]) -> None:
        """Take the memory of "weights" or "kv_cache" again."""
        await self._update("/resume_memory_occupation", {"tags": list(tags)})

    async def _update(self, path: str, body: Mapping[str, Any]) -> Any:
        return await self._call("POST", path, body, timeout_s=self._update_timeout_s)

    async def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float) -> Any:
        """The decoded answer, or None where the server sends no JSON."""
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(CONNECT_TIMEOUT_S, timeout_s))
        try:
            async with self._session.request(
                method, self.address.url + path, json=body, headers=self._headers, timeout=timeout
            ) as response:
                content = await response.read()
        except TimeoutError as error:
            raise ServerUnavailable(self.address, path, f"no answer within {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # ValueError: an address that is none.
            raise ServerUnavailable(self.address, path, _short(f"{type(error).__name__}: {error}")) from error
        is_json = response.content_type == "application/json" and content
        try:
            answer = json.loads(content) if is_json else None
        except ValueError as error:
            said = _short(content.decode(errors="replace"))
            raise ServerUnavailable(self.address, path, f"an answer that is not JSON: {said}") from error
        if response.status >= 400:
            reason = f"{response.status} {_words(answer, content)}".strip()
            never = response.status < 500 and response.status not in RETRY_STATUS
            raise (ServerRefused if never else ServerUnavailable)(self.address, path, reason, status=response.status)
        if isinstance(answer, dict) and answer.get("success") is False:
            raise ServerRefused(self.address, path, _words(answer, content))
        return answer

    def _object(self, path: str, answer: Any) -> dict[str, Any]:
        if not isinstance(answer, dict):
            raise ServerRefused(self.address, path, f"an answer that is no object: {_short(str(answer))}")
        return answer


def _words(answer: Any, content: bytes) -> str:
    """What the server says went wrong: SGLang has several forms for it."""
    found = answer
    for _ in range(2):
        if isinstance(found, dict):
            found = next((found[key] for key in ("error", "message", "detail") if found.get(key)), found)
    return _short(found if isinstance(found, str) else content.decode(errors="replace"))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_REASON else line[:LONGEST_REASON] + " …"
