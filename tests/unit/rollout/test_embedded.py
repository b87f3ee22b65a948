"""The embedded engine against transformers' own forward pass over whole sequences."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from gspo_megatron.errors import UserError
from gspo_megatron.rollout.embedded import EmbeddedEngine
from gspo_megatron.rollout.engine import SamplingParams
from gspo_megatron.types import Group, NamedTensor, Prompt, Rollout
from gspo_megatron.weights.hf_checkpoint import HFCheckpoint
from tests.distributed import tiny_models

KINDS = ["moe", "dense", "tied"]
PARAMS = SamplingParams(num_samples=4, temperature=0.7, max_response_tokens=9, stop_token_ids=(1,), seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny_models.write(tmp_path_factory.mktemp(kind.replace(" ", "-")), kind)
        return made[kind]

    return get


def empty_engine(folder: Path, *, batch_size: int = 64, dtype: torch.dtype = torch.float32) -> EmbeddedEngine:
    return EmbeddedEngine(folder, dtype=dtype, device=torch.device("cpu"), batch_size=batch_size)


def tensors(folder: Path) -> list[NamedTensor]:
    """Every tensor of the folder under its published name: experts one by one."""
    checkpoint = HFCheckpoint(folder)
    return [NamedTensor(name, checkpoint.read(name)) for name in checkpoint.file_of]


def fill(engine: EmbeddedEngine, given: list[NamedTensor], version: int = 0) -> EmbeddedEngine:
    engine.pause()
    engine.begin_update(version)
    for start in range(0, len(given), 7):
        engine.update(given[start : start + 7])
    engine.update([])  # a bucket of which this rank gets nothing
    engine.end_update()
    engine.resume()
    return engine


def ready_engine(folder: Path, *, batch_size: int = 64, version: int = 0) -> EmbeddedEngine:
    return fill(empty_engine(folder, batch_size=batch_size), tensors(folder), version)


@functools.cache
def load(folder: Path) -> PreTrainedModel:
    """The reference; not to be changed."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def prompts(*lengths: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(sum(lengths))
    made = []
    for i, length in enumerate(lengths):
        ids = torch.randint(2, tiny_models.VOCAB, (length,), generator=generator).tolist()
        made.append(Prompt(id=40 + i, text=f"prompt {i}", token_ids=ids, reference=None))
    return made


@torch.no_grad()
def definition(model: PreTrainedModel, rollout: Rollout, temperature: float) -> Tensor:
    """[L] log-probability of each token given those before it, from one pass over the sequence alone."""
    logits = model(input_ids=rollout.token_ids[None]).logits[0].double() / temperature
    logprobs = torch.log_softmax(logits, -1)[:-1].gather(1, rollout.token_ids[1:, None]).squeeze(1)
    return torch.where(rollout.response_mask, torch.cat([logprobs.new_zeros(1), logprobs]), 0.0)


def rollouts(groups: list[Group]) -> list[Rollout]:
    return [r for g in groups for r in g.rollouts]


def same(a: list[Group], b: list[Group]) -> bool:
    return all(
        torch.equal(x.token_ids, y.token_ids) and torch.equal(x.rollout_logprobs, y.rollout_logprobs)
        for x, y in zip(rollouts(a), rollouts(b), strict=True)
    )


# --- log-probabilities -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_logprobs_are_those_of_the_whole_sequence_at_the_temperature(
    kind: str, temperature: float, folder: Callable[[str], Path]
) -> None:
    """Prompts of very different lengths share a batch, so most rows are padded on the left."""
    engine, model = ready_engine(folder(kind)), load(folder(kind))
    groups = engine.generate(prompts(3, 17, 1, 8), replace(PARAMS, temperature=temperature))
    worst = max(float((definition(model, r, temperature) - r.rollout_logprobs).abs().max()) for r in rollouts(groups))
    assert worst <= 1e-5
    other = max(float((definition(model, r, 1.2) - r.rollout_logprobs).abs().max()) for r in rollouts(groups))
    assert other > 1e-2, "another temperature must show"


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_padding_changes_no_logits(kind: str, folder: Callable[[str], Path]) -> None:
    """The same tokens forced, alone and beside a longer prompt."""
    engine, model = ready_engine(folder(kind)), load(folder(kind))
    short, long = prompts(2, 23)
    alone = engine.generate([short], PARAMS)[0]
    beside = engine.generate([short, long], PARAMS)[0]
    for group in (alone, beside):
        for r in group.rollouts:
            assert (definition(model, r, PARAMS.temperature) - r.rollout_logprobs).abs().max() <= 1e-5
            assert r.token_ids[:2].tolist() == short.token_ids


def test_samples_follow_the_distribution(folder: Callable[[str], Path]) -> None:
    """Frequencies of the first token over many samples, against its probabilities."""
    engine, model = ready_engine(folder("dense"), batch_size=4096), load(folder("dense"))
    [prompt] = prompts(6)
    count = 4000
    groups = engine.generate([prompt], replace(PARAMS, num_samples=count, max_response_tokens=1))
    first = torch.stack([r.token_ids[6] for r in groups[0].rollouts])
    with torch.no_grad():
        probabilities = (model(torch.tensor([prompt.token_ids])).logits[0, -1] / 0.7).softmax(-1)
    frequencies = torch.bincount(first, minlength=tiny_models.VOCAB) / count
    deviation = (frequencies - probabilities) / (probabilities * (1 - probabilities) / count).sqrt()
    assert deviation.abs().max() < 5


# --- shape of a rollout ------------------------------------------------------------------------------------------


def test_a_rollout_is_prompt_and_response_with_mask_and_versions(folder: Callable[[str], Path]) -> None:
    engine = ready_engine(folder("moe"), version=7)
    assert engine.version == 7 and engine.name == "embedded, not SGLang"
    asked = prompts(4, 9, 2)
    groups = engine.generate(asked, PARAMS)
    assert [g.prompt for g in groups] == asked, "the caller's order"
    for group in groups:
        assert len(group.rollouts) == PARAMS.num_samples
        for r in group.rollouts:
            start, length = len(group.prompt.token_ids), r.token_ids.numel()
            assert r.prompt_id == group.prompt.id
            assert r.token_ids[:start].tolist() == group.prompt.token_ids
            assert 1 <= length - start <= PARAMS.max_response_tokens
            assert r.response_mask.tolist() == [False] * start + [True] * (length - start)
            assert r.policy_versions.tolist() == [-1] * start + [7] * (length - start)
            assert not r.rollout_logprobs[:start].any() and (r.rollout_logprobs[start:] < 0).all()
            dtypes = (r.token_ids.dtype, r.response_mask.dtype, r.rollout_logprobs.dtype, r.policy_versions.dtype)
            assert dtypes == (torch.int64, torch.bool, torch.float32, torch.int32)
            assert r.reward is None


def test_a_response_ends_with_the_first_stop_token_of_any_kind(folder: Callable[[str], Path]) -> None:
    engine = ready_engine(folder("dense"))
    stops = tuple(range(5, tiny_models.VOCAB, 6))
    groups = engine.generate(prompts(3, 5, 7), replace(PARAMS, num_samples=40, stop_token_ids=stops))
    seen, reasons = set(), set()
    for r in rollouts(groups):
        response = r.token_ids[r.response_mask].tolist()
        assert not set(response[:-1]) & set(stops)
        stopped = response[-1] in stops
        assert r.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(response) == PARAMS.max_response_tokens
        seen |= {response[-1]} & set(stops)
        reasons.add(r.finish_reason)
    assert reasons == {"stop", "length"} and len(seen) > len(stops) / 2


def test_a_stop_token_in_the_last_place_is_a_stop(folder: Callable[[str], Path]) -> None:
    engine = ready_engine(folder("dense"))
    every = tuple(range(tiny_models.VOCAB))
    groups = engine.generate(prompts(3), replace(PARAMS, max_response_tokens=1, stop_token_ids=every))
    assert {r.finish_reason for r in rollouts(groups)} == {"stop"}
    groups = engine.generate(prompts(3), replace(PARAMS, stop_token_ids=()))
    assert {(r.finish_reason, int(r.response_mask.sum())) for r in rollouts(groups)} == {("length", 9)}


def test_without_prompts_there_are_no_groups(folder: Callable[[str], Path]) -> None:
    """A replica whose share of the held-out prompts is empty."""
    assert ready_engine(folder("dense")).generate([], PARAMS) == []


def test_a_prompt_that_leaves_no_room_in_the_context_is_refused(folder: Callable[[str], Path]) -> None:
    engine = ready_engine(folder("dense"))
    fits, too_long = prompts(128 - PARAMS.max_response_tokens, 129 - PARAMS.max_response_tokens)
    assert len(engine.generate([fits], PARAMS)) == 1
    with pytest.raises(UserError) as error:
        engine.generate([fits, too_long], PARAMS)
    assert "prompt 41 has 120 tokens" in str(error.value)
    assert "it needs 129, and the model's context is 128; shorten the prompt" in str(error.value)


# --- seeds -------------------------------------------------------------------------------------------------------


def test_a_seed_repeats_and_another_differs(folder: Callable[[str], Path]) -> None:
    engine = ready_engine(folder("moe"))
    asked = prompts(4, 6)
    first = engine.generate(asked, PARAMS)
    torch.randn(100)
    assert same(engine.generate(asked, PARAMS), first)
    assert same(ready_engine(folder("moe")).generate(asked, PARAMS), first), "in another process, too"
    other = engine.generate(asked, replace(PARAMS, seed=6))
    assert not all(torch.equal(a.token_ids, b.token_ids) for a, b in zip(rollouts(first), rollouts(other), strict=True))


def test_the_samples_of_a_prompt_differ(folder: Callable[[str], Path]) -> None:
    [group] = ready_engine(folder("moe")).generate(prompts(4), replace(PARAMS, num_samples=8))
    assert len({tuple(r.token_ids.tolist()) for r in group.rollouts}) == 8


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_small_batches_give_every_prompt_its_group(batch_size: int, folder: Callable[[str], Path]) -> None:
    engine, model = ready_engine(folder("dense"), batch_size=batch_size), load(folder("dense"))
    asked = prompts(5, 2, 9, 2, 7)
    groups = engine.generate(asked, PARAMS)
    assert [g.prompt.id for g in groups] == [p.id for p in asked]
    for group in groups:
        assert {tuple(r.token_ids[: len(group.prompt.token_ids)].tolist()) for r in group.rollouts} == {
            tuple(group.prompt.token_ids)
        }
    assert len({tuple(r.token_ids.tolist()) for r in rollouts(groups)}) == 20, "batches don't repeat the random numbers"
    for r in rollouts(groups):
        assert (definition(model, r, PARAMS.temperature) - r.rollout_logprobs).abs().max() <= 1e-5


@pytest.mark.parametrize("batch_size", [1, 9])
def test_the_batch_size_changes_no_response(batch_size: int, folder: Callable[[str], Path]) -> None:
    asked = prompts(5, 2, 9, 2, 7)
    stops = replace(PARAMS, stop_token_ids=tuple(range(3, tiny_models.VOCAB, 10)))
    one = ready_engine(folder("moe")).generate(asked, stops)
    several = ready_engine(folder("moe"), batch_size=batch_size).generate(asked, stops)
    for a, b in zip(rollouts(one), rollouts(several), strict=True):
        assert torch.equal(a.token_ids, b.token_ids)
        torch.testing.assert_close(a.rollout_logprobs, b.rollout_logprobs, rtol=0, atol=2e-6)


def test_rollouts_can_be_trained_on(folder: Callable[[str], Path]) -> None:
    """Tensors made in inference mode cannot."""
    for rollout in rollouts(ready_engine(folder("dense")).generate(prompts(4), PARAMS)):
        assert not any(x.is_inference() for x in vars(rollout).values() if isinstance(x, Tensor))


# --- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_published_names_fill_the_model_as_transformers_loads_it(kind: str, folder: Callable[[str], Path]) -> None:
    engine, model = ready_engine(folder(kind)), load(folder(kind))
    state, expected = engine.model.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    buffers, wanted = dict(engine.model.named_buffers()), dict(model.named_buffers())
    assert buffers.keys() == wanted.keys()
    assert all(torch.equal(buffers[name], wanted[name]) for name in wanted)


def test_experts_run_as_grouped_products_and_dense_models_run_too(folder: Callable[[str], Path]) -> None:
    assert empty_engine(folder("moe")).model.config._experts_implementation == "grouped_mm"
    assert empty_engine(folder("dense")).model.config._experts_implementation == "eager"


def test_rotary_frequencies_exist_without_initialised_weights(folder: Callable[[str], Path]) -> None:
    engine = empty_engine(folder("moe"))
    expected = 10000.0 ** -(torch.arange(0, 16, 2).float() / 16)
    torch.testing.assert_close(engine.model.model.rotary_emb.inv_freq, expected, rtol=1e-6, atol=0)


def test_a_bfloat16_engine_keeps_float32_frequencies(folder: Callable[[str], Path]) -> None:
    engine = fill(empty_engine(folder("dense"), dtype=torch.bfloat16), tensors(folder("dense")))
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    assert engine.model.model.rotary_emb.inv_freq.dtype == torch.float32
    groups = engine.generate(prompts(4), PARAMS)
    assert all(r.rollout_logprobs.dtype == torch.float32 for r in rollouts(groups))


def test_a_tied_model_is_filled_without_a_head(folder: Callable[[str], Path]) -> None:
    given = tensors(folder("tied"))
    assert "lm_head.weight" not in {t.name for t in given}
    model = fill(empty_engine(folder("tied")), given).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_update_takes_effect_and_its_version_is_recorded(folder: Callable[[str], Path]) -> None:
    engine = ready_engine(folder("dense"), version=3)
    before = engine.generate(prompts(4), PARAMS)
    changed = [replace(t, tensor=t.tensor * 1.5) if "lm_head" in t.name else t for t in tensors(folder("dense"))]
    fill(engine, changed, version=4)
    after = engine.generate(prompts(4), PARAMS)
    assert engine.version == 4 and not same(before, after)
    assert {int(v) for r in rollouts(after) for v in r.policy_versions[r.response_mask]} == {4}
    model = copy.deepcopy(load(folder("dense")))
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    for r in rollouts(after):
        assert (definition(model, r, PARAMS.temperature) - r.rollout_logprobs).abs().max() <= 1e-5


def test_the_engine_keeps_a_copy_of_its_own(folder: Callable[[str], Path]) -> None:
    given = tensors(folder("dense"))
    engine = fill(empty_engine(folder("dense")), given)
    before = engine.generate(prompts(4), PARAMS)
    for item in given:
        item.tensor.zero_()
    assert same(engine.generate(prompts(4), PARAMS), before)


def test_nothing_is_generated_before_or_within_an_update(folder: Callable[[str], Path]) -> None:
    engine = empty_engine(folder("dense"))
    assert engine.version == -1
    with pytest.raises(AssertionError, match="before the first complete update"):
        engine.generate(prompts(3), PARAMS)
    fill(engine, tensors(folder("dense")))
    engine.begin_update(1)
    with pytest.raises(AssertionError, match="before the first complete update"):
        engine.generate(prompts(3), PARAMS)
    with pytest.raises(AssertionError, match="already open"):
        engine.begin_update(2)
    assert engine.version == 0, "the old version until the new one is complete"


def test_weights_outside_an_update_are_refused(folder: Callable[[str], Path]) -> None:
    engine = ready_engine(folder("dense"))
    with pytest.raises(AssertionError, match="outside begin_update"):
        engine.update(tensors(folder("dense"))[:1])
    with pytest.raises(AssertionError):
        engine.end_update()


EXPERT = "model.layers.2.mlp.experts.{}.{}_proj.weight"


@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_a_missing_tensor_is_caught(projection: str, folder: Callable[[str], Path]) -> None:
    name = EXPERT.format(3, projection)
    with pytest.raises(AssertionError, match=r"did not cover each parameter exactly once: .*layers\.2\.mlp\.experts"):
        fill(empty_engine(folder("moe")), [t for t in tensors(folder("moe")) if t.name != name])


@pytest.mark.parametrize("name", [EXPERT.format(3, "up"), "model.norm.weight"])
def test_a_tensor_that_comes_twice_is_caught(name: str, folder: Callable[[str], Path]) -> None:
    given = tensors(folder("moe"))
    again = next(t for t in given if t.name == name)
    with pytest.raises(AssertionError, match="arrived twice"):
        fill(empty_engine(folder("moe")), [*given, again])


@pytest.mark.parametrize(
    ("twice", "absent"), [((3, "up"), (4, "up")), ((3, "up"), (3, "gate")), ((0, "down"), (7, "down"))]
)
def test_one_expert_twice_does_not_make_up_for_a_missing_one(
    twice: tuple[int, str], absent: tuple[int, str], folder: Callable[[str], Path]
) -> None:
    given = {t.name: t for t in tensors(folder("moe"))}
    again = given[EXPERT.format(*twice)]
    del given[EXPERT.format(*absent)]
    with pytest.raises(AssertionError, match="arrived twice"):
        fill(empty_engine(folder("moe")), [*given.values(), again])


def test_a_tensor_of_another_shape_is_caught(folder: Callable[[str], Path]) -> None:
    given = [
        replace(t, tensor=t.tensor[:1]) if t.name == EXPERT.format(0, "gate") else t for t in tensors(folder("moe"))
    ]
    with pytest.raises(AssertionError, match="gate_proj"):
        fill(empty_engine(folder("moe")), given)


def test_an_unknown_name_is_caught(folder: Callable[[str], Path]) -> None:
    engine = empty_engine(folder("moe"))
    engine.begin_update(0)
    with pytest.raises(KeyError, match=r"model\.unknown\.weight"):
        engine.update([NamedTensor("model.unknown.weight", torch.zeros(1))])
