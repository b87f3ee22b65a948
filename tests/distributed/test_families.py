"""Every model family against transformers: log-probabilities, the gradient of every parameter, the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gspo_megatron.parallel import ParallelLayout
from tests.distributed import family_models
from tests.distributed.family_cases import token_weights
from tests.distributed.rank_pool import RankPool
from tests.distributed.tiny_models import make_sequences

Ranks = Callable[[int], RankPool]
Reference = Callable[..., dict[str, Any]]
LENGTHS = [7, 23, 3, 12, 31, 9, 16, 5]
TENSOR_EXPERT = {"tensor": 2, "expert": 2}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Folder, log-probabilities of the responses and gradients of a family's model, by transformers; made once."""
    base, known = tmp_path_factory.mktemp("families"), {}

    def get(family: str, **changes: Any) -> dict[str, Any]:
        key = "-".join([family, *map(str, changes.items())])
        if key not in known:
            known[key] = _reference(family, base / str(len(known)), changes)
        return known[key]

    return get


def _reference(family: str, folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    model = family_models.make(family, **changes)
    model.save_pretrained(folder / "model")
    logprobs = {}
    for sequence in make_sequences(LENGTHS, family_models.VOCAB, seed=3):
        logits = model(input_ids=sequence.token_ids[None]).logits[0]
        targets, mask = sequence.token_ids[1:], sequence.response_mask[1:]
        values = logits[:-1].log_softmax(-1).gather(1, targets[:, None])[:, 0]
        weights = token_weights(sequence.index, len(sequence.token_ids))[:-1]
        (values[mask] @ weights[mask]).backward()
        logprobs[sequence.index] = (mask.nonzero()[:, 0], values[mask].detach())
    return {
        "folder": folder / "model",
        "logprobs": logprobs,
        "gradients": family_models.gradients(model, folder / "gradients"),
    }


@pytest.mark.parametrize("layout", [{}, TENSOR_EXPERT], ids=lambda x: ParallelLayout(**x).describe())
@pytest.mark.parametrize("family", family_models.CONFIGS)
def test_the_policy_is_transformers(family: str, layout: dict[str, int], reference: Reference, ranks: Ranks) -> None:
    if family == "qwen3":
        layout = {name: degree for name, degree in layout.items() if name != "expert"}
    check(reference(family), layout, ranks)


def test_weights_decay_and_nothing_else(reference: Reference, ranks: Ranks) -> None:
    """gpt-oss has every kind of bias."""
    [names] = ranks(1).run(
        "tests.distributed.family_cases:decayed", layout={}, folder=str(reference("gpt_oss")["folder"])
    )
    kinds = {name.removeprefix("decoder.layers.0.") for name in names if ".layers." not in name or ".0." in name}
    assert kinds == {
        "embedding.word_embeddings.weight",
        "output_layer.weight",
        "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight",
        "mlp.router.weight",
        "mlp.experts.weight1",
        "mlp.experts.weight2",
    }


def test_selection_biases_stay_float32_in_a_bfloat16_model(reference: Reference, ranks: Ranks, tmp_path: Path) -> None:
    folder, out = reference("glm4_moe")["folder"], tmp_path / "out"
    layout = TENSOR_EXPERT | {"pipeline": 1}
    ranks(2).run("tests.distributed.cases:save", layout=layout, folder=str(folder), out=str(out), dtype="bfloat16")
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    biases = {name for name in before if name.endswith("e_score_correction_bias")}
    assert len(biases) == 3
    for name, tensor in before.items():
        kept = tensor if name in biases else tensor.bfloat16()
        assert after[name].dtype == kept.dtype and torch.equal(after[name], kept), name
    assert not all(torch.equal(before[n], before[n].bfloat16().float()) for n in biases), "rounding must show"
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def check(expected: dict[str, Any], layout: dict[str, int], ranks: Ranks, **settings: dict[str, Any]) -> None:
    """Log-probabilities, gradients and weights of the policy in a layout; `settings`: of its sections of the config."""
    results = ranks(ParallelLayout(**layout).world_size).run(
        "tests.distributed.family_cases:parity",
        layout=layout,
        folder=str(expected["folder"]),
        lengths=LENGTHS,
        vocab=family_models.VOCAB,
        settings=settings,
    )
    check_logprobs(results, expected["logprobs"])
    check_gradients(results[0]["gradients"], expected["gradients"])
    disk, exported = load_file(expected["folder"] / "model.safetensors"), results[0]["weights"]
    assert exported.keys() == disk.keys()
    assert all(torch.equal(exported[name], disk[name]) for name in disk)
    for name, tensor in results[0]["biases_after"].items():
        assert torch.equal(tensor, disk[name]), f"{name} was changed by training"


def check_logprobs(results: list[dict[str, Any]], expected: dict[int, tuple[Tensor, Tensor]]) -> None:
    seen = {index: torch.full((length,), torch.nan) for index, length in enumerate(LENGTHS)}
    for result in results:
        for index, (positions, values) in result["logprobs"].items():
            seen[index][positions] = values
    for index, (positions, values) in expected.items():
        others = seen[index].isfinite().nonzero()[:, 0]
        assert torch.equal(others, positions)
        assert (seen[index][positions] - values).abs().max() <= 1e-5
    assert torch.cat([v for _, v in expected.values()]).std() > 0.1, "the case must tell tokens apart"


def check_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Every parameter's gradient, to 1e-5 of the largest number in it. None may be near 0, but of experts that hardly
    any token chose."""
    buffers = {name for name in ours if name.endswith("e_score_correction_bias")}
    assert ours.keys() - buffers == theirs.keys() - buffers
    wrong = {}
    for name in ours.keys() - buffers:
        largest = float(theirs[name].abs().max())
        assert largest > 1e-3 or ".experts." in name, f"{name}: the case must give it a gradient, not {largest:.1e}"
        difference = float((ours[name] - theirs[name]).abs().max())
        if difference > 1e-5 * max(1e-3, largest):
            wrong[name] = f"{difference:.1e} of {largest:.1e}"
    assert not wrong, wrong
