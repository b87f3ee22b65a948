"""Rollout routing replay with a real SGLang server whose routers are less precise than the trainer's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gspo_megatron.config import SGLangConfig
from gspo_megatron.rollout.engine import SamplingParams
from gspo_megatron.rollout.sglang.manager import ServerManager
from gspo_megatron.rollout.sglang.pool import ServerPool
from gspo_megatron.types import Prompt, Rollout, Sequence
from gspo_megatron.weights.families import load_fields
from tests.distributed.rank_pool import RankPool
from tests.system.sglang_setup import EOS, VOCAB, sglang_python, write_model

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(600)]
PARAMS = SamplingParams(num_samples=4, temperature=1.0, max_response_tokens=48, stop_token_ids=(EOS,), seed=0)


@contextmanager
def serve(model: Path, folder: Path) -> Iterator[ServerPool]:
    config = SGLangConfig(python=str(sglang_python()), routed_experts=True, start_timeout_s=300, request_timeout_s=300)
    with ServerManager(config, model, "float32", folder) as manager:
        pool = ServerPool(manager.start(), config, fields=load_fields(model)[1])
        yield pool
        pool.close()


def round_routers(source: Path, folder: Path) -> Path:
    """The model with its routers' weights rounded to bfloat16."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    rounded = {n: t.bfloat16().float() if n.endswith("mlp.gate.weight") else t for n, t in tensors.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def sample(pool: ServerPool) -> list[Rollout]:
    generator = torch.Generator().manual_seed(0)
    prompts = [
        Prompt(i, "", torch.randint(30, VOCAB, (6 + i % 9,), generator=generator).tolist(), None) for i in range(24)
    ]
    generated = pool.generate(prompts, PARAMS, version=-1, routed_experts=True)
    assert generated.errors == []
    return [rollout for group in generated.groups if group is not None for rollout in group.rollouts]


def test_replaying_the_servers_routes_brings_the_trainer_closer(tmp_path: Path) -> None:
    exact = write_model(tmp_path / "model")
    with serve(round_routers(exact, tmp_path / "rounded"), tmp_path) as pool:
        rollouts = sample(pool)
    for rollout in rollouts:
        assert rollout.routes is not None and rollout.routes_valid is not None
        # Of all tokens but the last one, which the server never read.
        assert rollout.routes_valid.all() and len(rollout.routes_valid) == len(rollout.token_ids) - 1
    sequences = [
        Sequence(i, r.token_ids, r.response_mask, r.rollout_logprobs, torch.zeros(()), r.routes, r.routes_valid)
        for i, r in enumerate(rollouts)
    ]
    ranks = RankPool(1)
    try:
        [alone], [replayed] = (
            ranks.run(
                "tests.distributed.routing_cases:engine_gap",
                layout={},
                folder=str(exact),
                sequences=sequences,
                token_budget=1024,
                mode=mode,
            )
            for mode in ("off", "r3")
        )
    finally:
        ranks.close()
    print(f"off: {alone}\nr3: {replayed}")
    assert alone["tokens"] == replayed["tokens"] >= 2000
    assert alone["differing"] > 0, "the rounding must change routes"
    assert replayed["kl"] <= 0.8 * alone["kl"]
