"""What a pool of SGLang servers costs beside the requests themselves, and beside SGLang's own benchmark client.

One server is started on this machine: the quick start's model with a vocabulary of 4,096 and random weights, so that
nearly no response ends early. Three clients take turns with 64 responses open at a time:

    pool    ServerPool.generate: rollouts, checked
    bare    one aiohttp session, the same requests; answers are read and thrown away, not even decoded
    SGLang  sglang.bench_serving, without streaming, with log-probabilities (single responses only)

and at the end the time for decoding and checking the answers is taken by itself.

    python tools/benchmark_rollout.py [--repetitions 9] [--responses 256] [--python PYTHON] [--output FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gspo_megatron.config import SGLangConfig
from gspo_megatron.logs import quiet_libraries
from gspo_megatron.rollout.engine import SamplingParams
from gspo_megatron.rollout.sglang.address import ServerAddress
from gspo_megatron.rollout.sglang.client import open_session
from gspo_megatron.rollout.sglang.command import server_environment
from gspo_megatron.rollout.sglang.generation import request_of, rollouts_of
from gspo_megatron.rollout.sglang.manager import ServerManager
from gspo_megatron.rollout.sglang.pool import ServerPool
from gspo_megatron.types import Prompt
from gspo_megatron.weights.families import load_fields

ROOT = Path(__file__).parents[1]
QUICKSTART_MODEL = ROOT / "examples/quickstart/model"
VOCABULARY, TOKENIZER_VOCABULARY = 4096, 100
PROMPT_TOKENS, RESPONSE_TOKENS, OPEN_RESPONSES = 16, 64, 64
NEVER_SET = -1
THROUGHPUT = re.compile(r"Output token throughput \(tok/s\):\s+([\d.]+)")


@dataclass(frozen=True)
class Case:
    """One kind of requests."""

    name: str
    samples: int  # responses a request
    routed_experts: bool = False
    peer: bool = False  # SGLang's benchmark sends such requests


CASES = (
    Case("8 responses a request", 8),
    Case("8 responses a request, with routed experts", 8, routed_experts=True),
    Case("1 response a request", 1, peer=True),
)


@dataclass
class Result:
    """Of one case."""

    tokens_per_s: dict[str, list[float]] = field(default_factory=dict)  # by client
    parse_ms: float = 0.0  # for 64 responses: JSON and rollouts
    json_ms: float = 0.0  # of it, JSON
    kilobytes: float = 0.0  # of one response in JSON


def write_model(folder: Path) -> Path:
    """The quick start's model folder with the larger vocabulary; no weights."""
    shutil.copytree(QUICKSTART_MODEL, folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": VOCABULARY}))
    return folder


def draw_prompts(count: int, seed: int) -> list[Prompt]:
    """Random prompts, new ones for every seed: none is in the prefix cache."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, PROMPT_TOKENS), generator=generator).tolist()
    return [Prompt(i, "", tokens, None) for i, tokens in enumerate(ids)]


class Clients:
    """The clients of one server; each returns the response tokens a second of one repetition."""

    def __init__(self, address: ServerAddress, config: SGLangConfig, folder: Path, responses: int) -> None:
        self.address, self.config, self.folder, self.responses = address, config, folder, responses
        self.fields = load_fields(folder)[1]
        self.pool = ServerPool([address], config, fields=self.fields)
        self.params = SamplingParams(1, 1.0, RESPONSE_TOKENS, (1,), 0)

    def by_pool(self, case: Case, seed: int) -> float:
        prompts = draw_prompts(self.responses // case.samples, seed)
        start = time.perf_counter()
        params = replace(self.params, num_samples=case.samples)
        generated = self.pool.generate(prompts, params, version=NEVER_SET, routed_experts=case.routed_experts)
        seconds = time.perf_counter() - start
        assert not generated.errors, generated.errors
        tokens = sum(int(r.response_mask.sum()) for group in generated.groups if group for r in group.rollouts)
        return tokens / seconds

    def by_session(self, case: Case, seed: int) -> float:
        requests = self._requests(case, seed)
        bodies, seconds = asyncio.run(self._bare(requests, OPEN_RESPONSES // case.samples))
        return count_tokens(bodies) / seconds

    def _requests(self, case: Case, seed: int) -> list[dict[str, Any]]:
        params = replace(self.params, num_samples=case.samples)
        prompts = draw_prompts(self.responses // case.samples, seed)
        return [request_of(prompt, params, case.routed_experts) for prompt in prompts]

    async def _bare(self, requests: list[dict[str, Any]], at_a_time: int) -> tuple[list[bytes], float]:
        gate = asyncio.Semaphore(at_a_time)
        async with open_session() as session:

            async def ask(request: dict[str, Any]) -> bytes:
                async with gate, session.post(self.address.url + "/generate", json=request) as response:
                    return await response.read()

            start = time.perf_counter()
            bodies = await asyncio.gather(*map(ask, requests))
            return bodies, time.perf_counter() - start

    def by_sglang(self, case: Case, seed: int) -> float:
        """SGLang's client in a process of its own; it measures its own time, without its start."""
        port = self.address.url.rsplit(":", 1)[1]
        command = [self.config.python, "-W", "ignore", "-m", "sglang.bench_serving", "--backend", "sglang"]
        command += ["--host", "127.0.0.1", "--port", port, "--model", str(self.folder), "--dataset-name", "random-ids"]
        command += ["--random-input-len", str(PROMPT_TOKENS), "--random-output-len", str(RESPONSE_TOKENS)]
        command += ["--random-range-ratio", "1.0", "--num-prompts", str(self.responses), "--seed", str(seed)]
        command += ["--max-concurrency", str(OPEN_RESPONSES), "--disable-stream", "--return-logprob"]
        command += ["--tokenize-prompt", "--temperature", "1.0", "--disable-tqdm", "--warmup-requests", "0"]
        environment = server_environment(self.config, gpu=torch.cuda.is_available(), cores=[0], inherited=os.environ)
        with tempfile.TemporaryDirectory() as folder:
            # A dependency for data sets that are not used here.
            Path(folder, "datasets.py").write_text("load_dataset = None\n")
            paths = [environment.get("PYTHONPATH", ""), folder]
            environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        found = THROUGHPUT.search(done.stdout)
        if done.returncode or not found:
            raise SystemExit(f"sglang.bench_serving ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return float(found[1])

    def parsing(self, case: Case, result: Result) -> None:
        """Time for the answers of 64 responses."""
        count = OPEN_RESPONSES // case.samples
        prompts, requests = draw_prompts(count, -1), self._requests(case, -1)[:count]
        bodies, _ = asyncio.run(self._bare(requests, count))
        params = replace(self.params, num_samples=case.samples)

        def decode() -> list[Any]:
            return [json.loads(body) for body in bodies]

        def convert() -> None:
            for prompt, answer in zip(prompts, decode(), strict=True):
                answers = answer if isinstance(answer, list) else [answer]
                rollouts_of(prompt, answers, params, NEVER_SET, fields=self.fields, routed_experts=case.routed_experts)

        result.json_ms, result.parse_ms = 1e3 * median_time(decode), 1e3 * median_time(convert)
        result.kilobytes = sum(map(len, bodies)) / OPEN_RESPONSES / 1e3


def count_tokens(bodies: Sequence[bytes]) -> int:
    answers = [json.loads(body) for body in bodies]
    lists = [answer if isinstance(answer, list) else [answer] for answer in answers]
    return sum(len(answer["output_ids"]) for several in lists for answer in several)


def median_time(work: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(clients: Clients, repetitions: int) -> dict[Case, Result]:
    """All clients of all cases, in turns; the first turn warms up."""
    results = {case: Result() for case in CASES}
    for turn in range(1 + repetitions):
        for number, (case, result) in enumerate(results.items()):
            by_name = {"pool": clients.by_pool, "bare": clients.by_session}
            if case.peer:
                by_name["SGLang"] = clients.by_sglang
            names = list(by_name) if turn % 2 else list(by_name)[::-1]
            for place, name in enumerate(names):
                seed = 1_000 * turn + 10 * number + place
                speed = by_name[name](case, seed)
                if turn > 0:
                    result.tokens_per_s.setdefault(name, []).append(speed)
    for case, result in results.items():
        clients.parsing(case, result)
    return results


def ratio(result: Result, name: str) -> float:
    """Of the pool's speed to another client's, as the median over turns: what else the machine does changes slowly."""
    pairs = zip(result.tokens_per_s["pool"], result.tokens_per_s[name], strict=True)
    return statistics.median(pool / other for pool, other in pairs)


def report(results: dict[Case, Result], repetitions: int, responses: int) -> str:
    """The table, in Markdown."""
    lines = [
        f"One SGLang server on this machine's CPU ({os.cpu_count()} cores shared by server and clients), the quick "
        f"start's model with a vocabulary of {VOCABULARY:,} and random weights, float32; prompts of {PROMPT_TOKENS}, "
        f"responses of {RESPONSE_TOKENS} tokens, {OPEN_RESPONSES} responses open at a time; medians of {repetitions} "
        f"repetitions of {responses} responses, the clients taking turns; of ratios, those within a turn. bare: an "
        "HTTP session that reads the answers and does not decode them. SGLang: `sglang.bench_serving`.",
        "",
        "| requests | pool, tokens/s | bare, tokens/s | SGLang, tokens/s | pool / bare | pool / SGLang | "
        "JSON and checks of 64 responses, ms | of it JSON, ms | kB a response |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, result in results.items():
        medians = {name: statistics.median(speeds) for name, speeds in result.tokens_per_s.items()}
        peer = medians.get("SGLang")
        cells = [
            case.name,
            f"{medians['pool']:.0f}",
            f"{medians['bare']:.0f}",
            f"{peer:.0f}" if peer else "–",
            f"{ratio(result, 'bare'):.3f}",
            f"{ratio(result, 'SGLang'):.3f}" if peer else "–",
            f"{result.parse_ms:.1f}",
            f"{result.json_ms:.1f}",
            f"{result.kilobytes:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9, help="timed repetitions of each client and case")
    parser.add_argument("--responses", type=int, default=256, help="responses a repetition, a multiple of 64")
    parser.add_argument("--python", default=str(ROOT / ".venv-sglang/bin/python"), help="Python with SGLang")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    quiet_libraries()
    config = SGLangConfig(python=options.python, routed_experts=True, max_concurrent=OPEN_RESPONSES)
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder, "model"))
        with ServerManager(config, model, "float32", Path(folder, "logs"), random_weights=True) as manager:
            (address,) = manager.start()
            clients = Clients(address, config, model, options.responses)
            text = report(measure(clients, options.repetitions), options.repetitions, options.responses)
            clients.pool.close()
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text)


if __name__ == "__main__":
    main()
