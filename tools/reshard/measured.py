"""benchmark_reshard.py measured: real updates over gloo on this machine, beside a plain broadcast of the same bytes."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from gspo_megatron.config import SGLangConfig
from gspo_megatron.errors import UserError
from gspo_megatron.logs import quiet_libraries
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.rollout.sglang.manager import ServerManager
from gspo_megatron.rollout.sglang.server import free_ports
from gspo_megatron.rollout.sglang.transports.distributed import environment
from gspo_megatron.weights.families import load_fields
from reshard.measured_report import Cell, Model, report
from reshard.ranks import START_TIMEOUT_S, Ranks
from reshard.trainer import Case

ROOT = Path(__file__).parents[2]
OUTPUT = Path("benchmarks/results/reshard_cpu.md")
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch then asks for huge pages for tensors in host memory
BUCKET_SIZES_MB = (16, 64, 512)  # the last one is the default of sglang.bucket_mb
TRANSPORTS = ("direct", "distributed", "tensor", "disk", "memory")
LAYOUTS: dict[str, dict[str, int]] = {
    "one rank": {},
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "EP2": {"data": 2, "expert": 2},
    "TP2xEP2": {"tensor": 2, "expert": 2},
    "PP2xVPP2": {"pipeline": 2, "virtual_pipeline": 2},
    "DP2": {"data": 2},
}
SIZES = {  # hidden size, experts and the size of one, layers, vocabulary
    "200MB": (768, 16, 512, 4, 11_840),
    "tiny": (64, 8, 64, 4, 512),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, default="200MB", help="of the model")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="of the training ranks, separated by commas")
    parser.add_argument(
        "--transports", default=",".join(TRANSPORTS), help="direct: to bare receivers; memory: embedded"
    )
    parser.add_argument("--servers", default="1,2", help="tensor-parallel degrees of the servers, one at a time")
    parser.add_argument("--repetitions", type=int, default=9, help="of yardstick and update, in turns")
    parser.add_argument("--bucket-mb", type=int, default=16, help="sglang.bucket_mb")
    parser.add_argument("--python", default=str(ROOT / ".venv-sglang/bin/python"), help="Python with SGLang")
    parser.add_argument("--output", type=Path, help=f"also write the tables to this file (everything: {OUTPUT})")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure and print the tables; write them if everything is asked for."""
    quiet_libraries()
    layouts, transports = options.layouts.split(","), options.transports.split(",")
    for name, known in [*((n, LAYOUTS) for n in layouts), *((n, TRANSPORTS) for n in transports)]:
        if name not in known:
            raise UserError(f"{name!r} is none of {', '.join(known)}")
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder, "model"), options.size)
        cells = Cells(options, model, Path(folder))
        if "direct" in transports:
            cells.direct(layouts)
        if "memory" in transports:
            cells.memory(layouts)
        over_http = [t for t in transports if t not in ("direct", "memory")]
        for degree in map(int, options.servers.split(",") if over_http else []):
            # The other transports don't depend on it much: they are measured on the first one.
            chosen = over_http if degree == int(options.servers.split(",")[0]) else ["distributed"]
            cells.served(layouts, chosen, degree)
        family, fields = load_fields(model)
        specs = [s for s in family.specs(fields) if not s.load_only]
        size = Model(2 * sum(s.numel for s in specs), sum(len(s.hf) for s in specs), *SIZES[options.size])
    text = report(size, cells.measured, options.repetitions)
    print(text)
    is_complete = all(getattr(options, name) == default for name, default in _defaults().items())
    output = options.output or (OUTPUT if is_complete else None)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")


def _defaults() -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = vars(parser.parse_args([]))
    return {name: options[name] for name in ("size", "layouts", "transports", "servers")}


class Cells:
    """Measures groups of cells of the tables, and keeps them."""

    def __init__(self, options: argparse.Namespace, model: Path, folder: Path) -> None:
        self.options, self.model, self.folder = options, model, folder
        self.measured: list[Cell] = []

    def direct(self, layouts: Sequence[str]) -> None:
        """To a bare receiver; of the first layout also other sizes of buckets, without and with huge pages."""
        with bare_receivers(self.model, 1) as urls:
            for name in layouts:
                with self._ranks(name) as ranks:
                    self._measure(ranks, name, "direct", urls, urls, self.options.bucket_mb)
        for pages in ("0", "1") if self.options.size == "200MB" else ():
            with environment(HUGE_PAGES, pages), bare_receivers(self.model, 1) as urls:
                with self._ranks(layouts[0]) as ranks:
                    for bucket_mb in BUCKET_SIZES_MB:
                        self._measure(ranks, layouts[0], f"pages {pages}", urls, urls, bucket_mb)

    def memory(self, layouts: Sequence[str]) -> None:
        """To the embedded engines of the heads."""
        for name in layouts:
            with self._ranks(name) as ranks:
                self._measure(ranks, name, "memory", (), (), 256)

    def served(self, layouts: Sequence[str], transports: Sequence[str], degree: int) -> None:
        """To a real server; of the first layout also with huge pages and the default size of buckets."""
        config = SGLangConfig(python=self.options.python, tensor=degree)
        for pages in ("0", "1") if self.options.size == "200MB" and degree == 1 else ("0",):
            with (
                environment(HUGE_PAGES, pages),
                bare_receivers(self.model, degree) as bare,
                ServerManager(
                    config, self.model, "bfloat16", self.folder / "logs", random_weights=True, say=_say
                ) as manager,
            ):
                urls = tuple(address.url for address in manager.start())
                for name in layouts if pages == "0" else layouts[:1]:
                    with self._ranks(name) as ranks:
                        for transport in transports if pages == "0" else ():
                            key = f"{transport} TP{degree}"
                            self._measure(ranks, name, key, urls, bare, self.options.bucket_mb)
                        if name == layouts[0] and degree == 1:
                            for bucket_mb in (self.options.bucket_mb, 512):
                                self._measure(ranks, name, f"served pages {pages}", urls, bare, bucket_mb)

    @contextmanager
    def _ranks(self, layout: str) -> Iterator[Ranks]:
        degrees = LAYOUTS[layout]
        ranks = Ranks(degrees, ParallelLayout(**degrees).world_size, self.model)
        try:
            yield ranks
        finally:
            ranks.close()

    def _measure(
        self, ranks: Ranks, layout: str, kind: str, servers: Sequence[str], bare: Sequence[str], bucket_mb: int
    ) -> None:
        transport = kind.split()[0]
        is_direct = transport in ("direct", "pages")
        case = Case(
            transport if transport in TRANSPORTS[1:] else "distributed",
            tuple(servers),
            tuple(bare),
            bucket_mb,
            self.options.repetitions,
            check="off" if is_direct else "sampled",
            probe_prompts=4 if transport == "distributed" else 0,
            run_folder=str(self.folder / "run"),
            direct=is_direct,
        )
        cell = Cell(layout, kind, bucket_mb, ranks.measure(case))
        self.measured.append(cell)
        print(
            f"{layout}, {kind}, {bucket_mb} MB: {1e3 * cell.seconds('buckets_s'):.0f} ms", file=sys.stderr, flush=True
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def write_model(folder: Path, size: str) -> Path:
    """A random Qwen3-MoE in bfloat16 with a tokenizer, as a Hugging Face folder."""
    from make_char_tokenizer import write as write_tokenizer
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    hidden, experts, expert_size, layers, vocabulary = SIZES[size]
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64 * 4 if hidden < 512 else hidden // 64,
        num_key_value_heads=4,
        head_dim=16 if hidden < 512 else 64,
        num_experts=experts,
        num_experts_per_tok=2,
        moe_intermediate_size=expert_size,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@contextmanager
def bare_receivers(folder: Path, count: int) -> Iterator[tuple[str, ...]]:
    """Addresses of new receivers."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"}
    ports = free_ports("127.0.0.1", count)
    program = Path(__file__).with_name("receiver.py")
    processes = [
        subprocess.Popen([sys.executable, program, str(folder), str(port)], env=variables, stdout=subprocess.DEVNULL)
        for port in ports
    ]
    urls = tuple(f"http://127.0.0.1:{port}" for port in ports)
    try:
        for url in urls:
            _wait_for(url)
        yield urls
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(url + "/model_info", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
