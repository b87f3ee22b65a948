"""When a run saves, stops and resumes: the trainer's side of its checkpoints. Collective over all ranks."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from gspo_megatron import checkpoints, run_folder
from gspo_megatron.background import Background, SharedMemory
from gspo_megatron.checkpoints import TrainerState
from gspo_megatron.config import TrainConfig
from gspo_megatron.errors import CauseError, UserError
from gspo_megatron.failures import print_error
from gspo_megatron.job import Job
from gspo_megatron.policy.checkpoint import Snapshot, random_state, set_random_state
from gspo_megatron.policy.policy import MegatronPolicy
from gspo_megatron.stop import StopSignals
from gspo_megatron.weights.hf_checkpoint import companions_of
from gspo_megatron.weights.torch_dist.blocks import dump_entries, load_entries, write_blocks, write_metadata
from gspo_megatron.weights.torch_dist.checksums import FileSum, list_files, write_checksums
from gspo_megatron.weights.torch_dist.description import HF_FOLDER, Description, read_description, write_description

_POLL_S = 0.02
_DEADLINE = -1  # where a signal's number would be


class Checkpointer:
    """Saves between rollout batches, while training goes on; at most one checkpoint is being written."""

    def __init__(self, job: Job, policy: MegatronPolicy, signals: StopSignals | None) -> None:
        assert isinstance(job.config, TrainConfig)
        self.config, self.job, self.policy, self.signals = job.config, job, policy, signals
        self._started_at = psutil.Process().create_time()
        self._began_after: int | None = None  # rollout batches that were done at this start
        self._newest = -1  # batch of the checkpoint that was last saved or loaded
        self._writing: Background | None = None
        self._writing_batch = -1
        self._memory = SharedMemory()

    # -- resuming -----------------------------------------------------------------------------------------------------

    def load(self) -> TrainerState | None:
        """Take over the newest whole checkpoint's state, and cut the run's records to it. None: a new run.

        Raises:
            UserError: there are checkpoints, but none whose files are whole; or it is of another model.
        """
        run, rank = self.config.run.folder, self.job.groups.rank
        if not self.config.run.resume:
            return None
        chosen, damaged = self._choose()
        if chosen is None:
            return None
        weights_only = self.config.checkpoint.load == "weights"
        description = read_description(chosen)
        if not {"trainer", "optimizer"} <= set(description.contains):
            raise UserError(f"{chosen} holds {', '.join(description.contains)}: it is no training checkpoint of a run")
        state = checkpoints.read_trainer_state(chosen)
        self.policy.restore(chosen, state.counts, weights_only=weights_only)
        generators = checkpoints.read_json(chosen / checkpoints.RANDOM)
        if len(generators) == self.job.groups.layout.world_size:
            set_random_state(generators[rank])  # in another number of ranks they start from the seed
        if rank == 0:
            for other in [*damaged, *(p for p in checkpoints.complete(run) if checkpoints.batch_of(p) > state.batch)]:
                if other.exists():
                    checkpoints.set_aside(other)
            checkpoints.name_latest(run, chosen)
            run_folder.cut_records(run, state.metrics_bytes, state.samples_bytes)
            rest = ": its weights alone, with new optimizer state" if weights_only else ""
            self._say(f"resuming from {chosen}, after {state.batch} rollout batches{rest}")
        dist.barrier(group=self.job.groups.world)
        self._newest = state.batch
        return state

    def _choose(self) -> tuple[Path | None, list[Path]]:
        """The newest whole checkpoint, and damaged ones that are newer."""
        run, groups = self.config.run.folder, self.job.groups
        if groups.rank == 0:
            checkpoints.remove_partial(run)
        # One rank looks: a shared file system may show others an older state.
        [found] = self.job.all_gather([str(p) for p in checkpoints.complete(run)] if groups.rank == 0 else None)
        damaged: list[Path] = []
        said: list[str] = []
        for path in map(Path, found):
            own = checkpoints.damage(path, reader=groups.rank, readers=groups.layout.world_size)
            lines = [line for part in self.job.all_gather(own) for line in part]
            if not lines:
                return path, damaged
            damaged.append(path)
            said += lines
            if groups.rank == 0:
                more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
                print_error(f"checkpoint {path.name} is damaged, the one before it is tried: {lines[0]}{more}\n")
        if damaged:
            raise UserError(
                f"no checkpoint in {checkpoints.folder_of(run)} is whole:\n"
                + "\n".join(said)
                + f"\nRemove {checkpoints.folder_of(run)} to start the run anew, or give another run.folder"
            )
        return None, []

    # -- saving -------------------------------------------------------------------------------------------------------

    def boundary(self, batch: int, state: Callable[[int, dict[str, int]], TrainerState]) -> bool:
        """After a rollout batch: save if it is due, and say whether to stop, which is agreed on by all ranks.

        `state` makes the trainer's state of the batch and the policy's counts; it is called where something is saved.

        Raises:
            CauseError: the run was to stop, but could not be saved.
        """
        settings = self.config.checkpoint
        total = self.config.train.rollout_batches
        if self._began_after is None:
            self._began_after = batch
        stop = self._agree(made_progress=batch > self._began_after)
        due = batch > 0 and settings.every > 0 and (batch % settings.every == 0 or batch == total)
        if stop and self.signals is not None:
            self.signals.ignore()  # launchers end the other ranks with SIGTERM when the first has left
        if (due or (stop and batch < total)) and batch != self._newest:
            self._finish()
            self._start(batch, state)
        if stop or batch == total or not settings.async_save:
            self._finish()
        if stop and batch < total:
            why = "the deadline" if stop == _DEADLINE else signal.Signals(stop).name
            if self._newest != batch:
                raise CauseError(f"stopped on {why} after rollout batch {batch}, which could not be saved")
            self._say(f"stopped on {why} after rollout batch {batch}; the same command with --run.resume goes on")
        return bool(stop) and batch < total

    def save(self, batch: int, state: Callable[[int, dict[str, int]], TrainerState]) -> None:
        """Save after a rollout batch, due or not, and wait until it is written. All ranks have agreed on it."""
        if batch != self._newest:
            self._finish()
            self._start(batch, state)
        self._finish()

    def _agree(self, *, made_progress: bool) -> int:
        """The signal that any rank was sent, or _DEADLINE, or 0. Also takes note of what the writers came to."""
        received = self.signals.received if self.signals is not None else None
        # A deadline that is over before the first batch of each start would let the run come back for ever.
        over = made_progress and 0 < self.config.checkpoint.deadline_s < time.time() - self._started_at
        stop, over_somewhere, running, failed = self._most([received or 0, over, *self._writer_flags()])
        self._settle(running, failed)
        return stop or (_DEADLINE if over_somewhere else 0)

    def _finish(self) -> None:
        """Wait for the checkpoint that is being written."""
        while self._writing is not None:
            time.sleep(_POLL_S)
            self._settle(*self._most(self._writer_flags()))

    def _writer_flags(self) -> list[int]:
        status = self._writing.look() if self._writing is not None else "done"
        return [status == "running", status == "failed"]

    def _settle(self, running: int, failed: int) -> None:
        """Take note of a checkpoint that every rank has written, or that some rank could not write."""
        if self._writing is None or (running and not failed):
            return
        writing, batch = self._writing, self._writing_batch
        self._writing = None
        if not failed:
            self._newest = batch
            return
        writing.stop()
        errors = self.job.gather((writing.error and f"rank {self.job.groups.rank}: {writing.error}") or None)
        if errors is not None:
            self._remove_partial(batch)  # makes room again
            kept = [p.name for p in checkpoints.complete(self.config.run.folder)]
            told = next((e for e in errors if "ended by SIGKILL" not in e), errors[0])
            print_error(
                f"the checkpoint of rollout batch {batch} could not be saved: {told}. The newest is "
                f"{kept[0] if kept else 'none'}; the run goes on and tries again when the next is due\n"
            )

    def _start(self, batch: int, make_state: Callable[[int, dict[str, int]], TrainerState]) -> None:
        """Copy the state and begin to write it."""
        views = self.policy.snapshot()
        is_copied = self.config.checkpoint.async_save or self.job.device.type == "cuda"
        snapshot = views.copied_to(self._memory) if is_copied else views
        state = make_state(batch, snapshot.counts)
        partial = checkpoints.folder_of(self.config.run.folder) / checkpoints.partial_of(batch)
        problem = ""
        if self.job.groups.rank == 0:
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            except OSError as error:
                problem = str(error)
        [failed] = self._most([bool(problem)])  # and the folder is there for all
        if failed:
            if problem:
                print_error(f"the checkpoint of rollout batch {batch} could not be saved: {problem}\n")
            return
        # Drawn on here: a forked process must not ask a GPU for its generator.
        share = _Share(self.config, self.policy, self.job.groups.rank, partial, snapshot, state, random_state())
        # What training writes while the other process lives would be copied page by page.
        withheld = [*(c.tensor for c in views.blocks), *self.policy.gradient_buffers] if is_copied else []
        self._writing, self._writing_batch = Background(share.write, withheld=withheld), batch

    def close(self) -> None:
        """Leave nothing running, and nothing half-written, after an error."""
        if self._writing is not None:
            self._writing.stop()
            if self.job.groups.rank == 0:
                self._remove_partial(self._writing_batch)

    def _remove_partial(self, batch: int) -> None:
        partial = checkpoints.folder_of(self.config.run.folder) / checkpoints.partial_of(batch)
        shutil.rmtree(partial, ignore_errors=True)

    def _most(self, values: list[Any]) -> list[int]:
        """The largest of each over all ranks."""
        tensor = torch.tensor([int(v) for v in values], device=self.job.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.job.groups.world)
        return tensor.tolist()

    def _say(self, text: str) -> None:
        if self.job.groups.rank == 0:
            print(text, flush=True)


@dataclasses.dataclass(frozen=True)
class _Share:
    """What one rank writes of a checkpoint. Runs beside training: no collectives, only files."""

    config: TrainConfig
    policy: MegatronPolicy
    rank: int
    partial: Path
    snapshot: Snapshot
    state: TrainerState
    random: dict[str, Any]  # this rank's generators

    def write(self) -> None:
        """This rank's file; at rank 0 then what makes a checkpoint of all ranks' files."""
        entries, total = write_blocks(
            self.partial / f"__{self.rank}_0.distcp", self.snapshot.blocks, self.snapshot.objects
        )
        part = {"entries": dump_entries(entries), "sum": dataclasses.asdict(total), "random": self.random}
        written = self.partial / f".part_{self.rank}.new"
        checkpoints.write_json(written, part)
        written.rename(self._part(self.rank))
        if self.rank == 0:
            self._complete()

    def _part(self, rank: int) -> Path:
        return self.partial / f".part_{rank}.json"

    def _complete(self) -> None:
        ranks = range(self.config.parallel.layout().world_size)
        entries, sums, generators = [], {}, []
        for rank in ranks:
            while not self._part(rank).exists():
                time.sleep(_POLL_S)
            part = json.loads(self._part(rank).read_bytes())
            entries += load_entries(part["entries"])
            sums[f"__{rank}_0.distcp"] = FileSum(**part["sum"])
            generators.append(part["random"])
            self._part(rank).unlink()
        write_metadata(self.partial, entries)
        checkpoints.write_json(self.partial / checkpoints.RANDOM, generators)
        checkpoints.write_trainer_state(self.partial, self.state)
        self._describe()
        write_checksums(self.partial, sums)
        checkpoints.publish(self.config.run.folder, self.state.batch)
        settings = self.config.checkpoint
        try:
            checkpoints.prune(self.config.run.folder, keep_last=settings.keep_last, keep_every=settings.keep_every)
        except OSError as error:  # the new one is saved all the same
            print_error(f"an old checkpoint could not be removed: {error}\n")

    def _describe(self) -> None:
        """What Megatron and the conversion expect beside the tensors."""
        layout = dataclasses.asdict(self.config.parallel.layout())
        contains = ("model", "optimizer", "trainer")
        family, dtype = self.policy.family.model_type, self.config.model.dtype
        write_description(self.partial, Description(family, self.state.batch, dtype, contains, layout))
        backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        checkpoints.write_json(
            self.partial / "metadata.json", backends | {"common_backend": "torch", "common_backend_version": 1}
        )
        torch.save({"iteration": self.state.batch}, self.partial / "common.pt")
        (self.partial / HF_FOLDER).mkdir()
        for name in companions_of(self.policy.source):
            shutil.copyfile(self.policy.source / name, self.partial / HF_FOLDER / name)
        for name in list_files(self.partial):
            if name == "common.pt" or name.startswith(HF_FOLDER):
                with open(self.partial / name, "rb") as file:
                    os.fsync(file.fileno())
