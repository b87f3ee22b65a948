"""Weights through a folder that trainer and servers can read: the fallback where nothing faster works.

Senders write their buckets at the same time, as safetensors; rank 0 completes the folder, gives it its name and has all
servers load it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from gspo_megatron.rollout.sglang.client import ServerClient
from gspo_megatron.rollout.sglang.pool import ServerPool
from gspo_megatron.rollout.sglang.transports.base import Feed
from gspo_megatron.weights.gather import FlatBucket
from gspo_megatron.weights.hf_checkpoint import COMPANIONS, INDEX
from gspo_megatron.weights.reshard import ReshardPlan


class DiskTransport:
    """One safetensors file a bucket."""

    needs_session = False  # the server opens one itself

    def __init__(
        self,
        pool: ServerPool,
        *,
        rank: int,
        folder: Path,
        companions_from: Path,
        timeout_s: float,
        servers_stay: bool = False,
    ) -> None:
        """`folder` is this run's alone; `companions_from` has the model's config and tokenizer.

        Servers call their model by the folder that they were sent last. Where they stay after the run, config and
        tokenizer are left there for whoever asks what they serve.
        """
        self.pool, self.rank, self.timeout_s, self.servers_stay = pool, rank, timeout_s, servers_stay
        self.folder, self.companions_from = folder.absolute(), companions_from
        self._version, self._attempt, self._written = -1, 0, 0

    @property
    def _partial(self) -> Path:
        return self.folder / f"version_{self._version:08d}.{self._attempt}.partial"

    def begin(self, version: int, feed: Feed | None, *, sends: bool) -> None:
        self._version, self._written = version, 0
        self._partial.mkdir(parents=True, exist_ok=True)

    def send(self, bucket: FlatBucket) -> None:
        # Views of one buffer: safetensors wants each tensor's memory to be its own.
        tensors = {item.name: item.tensor.detach().to("cpu", copy=True) for item in bucket.tensors}
        save_file(
            tensors, self._partial / f"model-{self.rank:05d}-{self._written:05d}.safetensors", metadata={"format": "pt"}
        )
        self._written += 1

    def finish(self, plan: ReshardPlan) -> None:
        weight_map: dict[str, str] = {}
        for path in sorted(self._partial.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                weight_map |= dict.fromkeys(file.keys(), path.name)
        missing = {name for spec in plan.specs for name in spec.hf} - weight_map.keys()
        if missing:
            raise RuntimeError(
                f"{self._partial} lacks {len(missing)} tensors that other ranks wrote, {min(missing)} among them; "
                "sglang.update_folder must be one folder for all ranks"
            )
        (self._partial / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        for name in COMPANIONS:
            if (self.companions_from / name).is_file():
                shutil.copy(self.companions_from / name, self._partial / name)
        complete = self._partial.with_suffix("")  # without ".partial"
        shutil.rmtree(complete, ignore_errors=True)  # of the same version, handed over before
        self._partial.rename(complete)
        try:
            requests = [self.pool.loop.submit(self._load(client, str(complete))) for client in self.pool.clients]
            # All of them, also after a failure: others still read the folder, and answers have their own timeout.
            concurrent.futures.wait(requests)
            for future in requests:
                future.result()
        finally:
            self._remove_weights(complete)
        for earlier in self.folder.glob("version_*"):  # no server is called by them any more
            if earlier != complete:
                shutil.rmtree(earlier, ignore_errors=True)

    def _remove_weights(self, folder: Path) -> None:
        if not self.servers_stay:
            shutil.rmtree(folder, ignore_errors=True)
            return
        for path in [folder / INDEX, *folder.glob("*.safetensors")]:
            with contextlib.suppress(OSError):
                path.unlink()

    async def _load(self, client: ServerClient, folder: str) -> None:
        await client.update_from_disk(folder, self._version)
        # The answer is that of the server's first rank; others may still read. Checksums, even of nothing, are an
        # exchange between all of them.
        await client.checksums(skip=[""])

    def reset(self) -> None:
        if self._version >= 0:
            shutil.rmtree(self._partial, ignore_errors=True)
        # All ranks reset together, and so agree on the next name. What is left, or still on its way to a file server,
        # is not taken for the next attempt's.
        self._attempt += 1

    def close(self) -> None:
        self.reset()
        for folder in (self.folder, self.folder.parent):
            with contextlib.suppress(OSError):  # never made, not empty, or another's too
                folder.rmdir()
