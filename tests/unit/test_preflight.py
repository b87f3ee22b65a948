"""preflight: what is refused before anything starts, and what a run says about itself."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gspo_megatron import preflight, run_folder
from gspo_megatron.config import (
    AlgorithmConfig,
    DataConfig,
    EvalConfig,
    MemoryConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    SftConfig,
    SftLoopConfig,
    TaskConfig,
    TrainConfig,
    TrainLoopConfig,
)
from gspo_megatron.config_io import load_config
from gspo_megatron.errors import UserError
from gspo_megatron.preflight.model import check_family
from gspo_megatron.preflight.result import Problems
from gspo_megatron.weights.families import load_fields, olmoe, qwen3_moe
from gspo_megatron.weights.families.base import Family

MODEL = Path(__file__).parents[2] / "examples" / "quickstart" / "model"  # 2 layers, 4 heads, 2 kv heads, 8 experts


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The quickstart's model folder, with weights."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    family, fields = load_fields(folder)
    tensors = {}
    for spec in family.specs(fields):
        for name, shape in zip(spec.hf, spec.hf_shapes, strict=True):
            tensors[name] = torch.zeros(shape)
    save_file(tensors, folder / "model.safetensors")
    return folder


def edit_config(model: Path, **values: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def config(tmp_path: Path, model: Path) -> TrainConfig:
    return TrainConfig(
        run=RunConfig(folder=str(tmp_path / "run")),
        model=ModelConfig(path=str(model)),
        task=TaskConfig(name="reasoning_gym", dataset="spell_backward"),
        rollout=RolloutConfig(prompts_per_batch=16, samples_per_prompt=8, max_response_tokens=32),
        data=DataConfig(token_budget=512),
        eval=EvalConfig(prompts=32),
        train=TrainLoopConfig(rollout_batches=10),
    )


def changed(config: TrainConfig, section: str, **values: Any) -> TrainConfig:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def sft(config: TrainConfig, **values: Any) -> SftConfig:
    return SftConfig(
        run=config.run,
        model=config.model,
        task=config.task,
        rollout=config.rollout,
        data=config.data,
        parallel=config.parallel,
        eval=config.eval,
        sft=SftLoopConfig(**values),
    )


def refusal(config: TrainConfig | SftConfig) -> str:
    with pytest.raises(UserError) as caught:
        if isinstance(config, TrainConfig):
            preflight.check_train(config)
        else:
            preflight.check_sft(config)
    return str(caught.value)


# -- what a good run says --


def test_description_of_a_training_run(config: TrainConfig) -> None:
    config = changed(config, "parallel", tensor=2, data=3, expert=2)
    config = changed(config, "rollout", prompts_per_batch=32)
    text = preflight.check_train(config).describe()
    for part in [
        "8 experts of which 2 a token",
        "TP2 × DP3 × EP2, 6 ranks",
        "embedded, not SGLang",
        "gspo; clip to [1 − 0.0003, 1 + 0.0004]",
        "no KL",
        "32 prompts × 8 samples = 256 sequences a rollout batch; 4 optimizer steps of 64 sequences each",
        "3 data-parallel, 10–11 prompts a rollout batch on each",
        "10 rollout batches × 4 = 40 optimizer steps",
        "at most 512 tokens a micro-batch",
    ]:
        assert part in text
    assert "warning" not in text
    assert not Path(config.run.folder).exists()  # a check makes nothing


@pytest.mark.parametrize(
    ("replay", "routed_experts", "text"),
    [
        ("off", False, None),
        ("off", True, "no replay; the engine's experts are compared with the trainer's"),
        ("r2", False, "replay r2: training takes the experts that the pass for the old log-probs chose"),
        ("r3", False, "replay r3: old log-probs and training take the experts that the rollout engine chose"),
    ],
)
def test_whose_experts_are_taken(config: TrainConfig, replay: str, routed_experts: bool, text: str | None) -> None:
    config = changed(changed(config, "model", routing_replay=replay), "rollout", routed_experts=routed_experts)
    assert dict(preflight.check_train(config).rows).get("routing") == text


def test_the_effective_clip_is_the_given_one(config: TrainConfig) -> None:
    text = preflight.check_train(changed(config, "algorithm", clip_low=2e-3, mini_batches=2)).describe()
    assert "clip to [1 − 0.002, 1 + 0.0004]" in text and "2 optimizer steps of 64" in text


def test_warnings_come_with_the_reason(config: TrainConfig) -> None:
    checked = preflight.check_train(changed(config, "algorithm", mini_batches=1))
    assert len(checked.warnings) == 1 and "nothing is ever clipped" in checked.warnings[0]
    assert "warning: algorithm.mini_batches=1" in checked.describe()


def test_description_of_a_cold_start(config: TrainConfig) -> None:
    config = changed(config, "eval", every=10)
    text = preflight.check_sft(sft(config, steps=50, batch_size=12, target_accuracy=0.5)).describe()
    assert "12 worked answers a step" in text and "50 optimizer steps, or held-out accuracy 0.5" in text


def test_evaluation_does_not_mind_the_run_folder(config: TrainConfig) -> None:
    run_folder.prepare(config)
    assert "32 held-out prompts × 1 sample" in preflight.check_eval(config).describe()


def test_inputs_of_a_good_run(config: TrainConfig) -> None:
    assert "tokens (the first 48 were looked at)" in preflight.check_inputs(config).describe()


# -- the model folder --


def test_missing_model_folder(config: TrainConfig) -> None:
    assert "model.path=nowhere" in refusal(changed(config, "model", path="nowhere"))


def test_folder_without_config(config: TrainConfig, model: Path) -> None:
    (model / "config.json").unlink()
    assert "config.json is missing" in refusal(config)


def test_a_checkpoint_of_megatrons_is_told_apart(config: TrainConfig, model: Path) -> None:
    (model / "config.json").unlink()
    (model / "gspo_megatron.json").write_text("{}")
    message = refusal(config)
    assert "config.json is missing" in message and "is a checkpoint of Megatron's (gspo_megatron.json is" in message
    assert message.endswith(f"`tools/convert_checkpoint.py export {model} OUT_DIR`")


def test_config_that_is_no_json(config: TrainConfig, model: Path) -> None:
    (model / "config.json").write_text("{")
    assert "is no JSON" in refusal(config)


def test_unknown_model_type_names_the_nearest(config: TrainConfig, model: Path) -> None:
    edit_config(model, model_type="qwen3_mo")
    message = refusal(config)
    assert '"qwen3_mo" is not supported' in message and 'Did you mean "qwen3_moe"?' in message


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"num_hidden_layers": 0}, "config.json: num_hidden_layers=0 must be an integer from 1 to"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers='two' must be an integer from 1 to"),
        ({"rope_parameters": 3}, "rope_parameters=3 must be an object"),
        ({"vocab_size": 100.5}, "vocab_size=100.5 must be an integer from 1 to"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 must lie between 1 and num_experts=8"),
        ({"num_experts_per_tok": 1, "norm_topk_prob": True}, "num_experts_per_tok=1 with norm_topk_prob=true"),
    ],
)
def test_impossible_numbers(config: TrainConfig, model: Path, values: dict[str, Any], expected: str) -> None:
    edit_config(model, **values)
    assert expected in refusal(config)


def test_folder_without_weights(config: TrainConfig, model: Path) -> None:
    (model / "model.safetensors").unlink()
    message = refusal(config)
    assert "holds no weights" in message and 'model.init="random"' in message
    assert preflight.check_train(changed(config, "model", init="random"))


def test_tensors_that_do_not_match_the_config(config: TrainConfig, model: Path) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.extra.weight"] = torch.zeros(2)
    del tensors["model.norm.weight"]
    save_file(tensors, path)
    message = refusal(config)
    assert "missing 1 (model.norm.weight)" in message and "unexpected 1 (model.extra.weight)" in message
    tensors["model.norm.weight"] = torch.zeros(7)
    del tensors["model.extra.weight"]
    save_file(tensors, path)
    assert "model.norm.weight is [7], config.json implies [128]" in refusal(config)
    tensors["model.norm.weight"] = torch.zeros(128, dtype=torch.int8)
    save_file(tensors, path)
    assert "model.norm.weight is stored as I8, but weights must be one of F64, F32, F16, BF16" in refusal(config)


# -- sizes --


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        ({"tensor": 4}, "parallel.tensor=4 must divide num_key_value_heads=2; use 1 or 2"),
        (
            {"tensor": 3},
            "parallel.tensor=3 must divide num_attention_heads=4 and num_key_value_heads=2; use 1 or 2",
        ),
        ({"pipeline": 4}, "parallel.pipeline=4 must divide num_hidden_layers=2; use 1 or 2"),
        ({"data": 6, "expert": 3}, "parallel.expert=3 must divide num_experts=8; use 1 or 2"),
        (
            {"pipeline": 2, "virtual_pipeline": 2},
            "parallel.virtual_pipeline=2 must divide num_hidden_layers / parallel.pipeline=1; use 1",
        ),
        (
            {"virtual_pipeline": 2},
            "parallel.virtual_pipeline=2 interleaves the chunks of pipeline ranks, but parallel.pipeline=1; "
            "use virtual_pipeline=1, or at least two pipeline ranks",
        ),
        ({"data": 5, "expert_tensor": 5}, "parallel.expert_tensor=5 must divide moe_intermediate_size=64; use 1"),
    ],
)
def test_layouts_the_model_cannot_have(config: TrainConfig, degrees: dict[str, int], expected: str) -> None:
    config = dataclasses.replace(config, parallel=ParallelConfig(**degrees))
    assert refusal(config) == expected


def test_dense_layers_are_split_by_tensor_too(config: TrainConfig, model: Path) -> None:
    edit_config(model, model_type="qwen3", intermediate_size=255)
    (model / "model.safetensors").unlink()
    config = changed(config, "model", init="random")
    message = refusal(dataclasses.replace(config, parallel=ParallelConfig(tensor=2)))
    assert message == "parallel.tensor=2 must divide intermediate_size=255; use 1"
    message = refusal(dataclasses.replace(config, parallel=ParallelConfig(data=2, expert=2)))
    assert "parallel.expert=2, but the model has no experts" in message
    for name in ("router_aux_loss", "router_z_loss"):
        message = refusal(changed(config, "model", **{name: 0.01}))
        assert message == f"model.{name}=0.01, but the model has no router (it is dense); use 0"
    message = refusal(changed(config, "model", routing_replay="r2"))
    assert message == 'model.routing_replay="r2", but the model has no router (it is dense); use "off"'
    message = refusal(changed(config, "rollout", routed_experts=True))
    assert message == "rollout.routed_experts=true, but the model has no experts (it is dense); use false"


@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        (
            "rollout",
            {"prompts_per_batch": 30},
            "algorithm.mini_batches=4 must divide rollout.prompts_per_batch=30; "
            "use 1, 2, 3, 5, 6, 10, 15 or 30 mini-batches, or 28 or 32 prompts",
        ),
        ("parallel", {"data": 32}, "rollout.prompts_per_batch=16 must be at least parallel.data=32"),
        ("eval", {"prompts": 1}, "eval.prompts=1 must be at least parallel.data=2"),
        ("data", {"token_budget": 32}, "data.token_budget=32 is smaller than one sequence"),
        ("rollout", {"max_response_tokens": 256}, "max_position_embeddings=256"),
        ("algorithm", {"name": "gpso"}, 'Did you mean "gspo"?'),
        ("algorithm", {"clip_low": 0.2, "clip_high": 0.27}, "allow_unusual_clip"),
        ("algorithm", {"aggregation": "token_mean"}, "weight it by length"),
    ],
)
def test_plans_that_cannot_work(config: TrainConfig, section: str, values: dict[str, Any], expected: str) -> None:
    if section == "eval":
        config = changed(config, "parallel", data=2)
    assert expected in refusal(changed(config, section, **values))


def test_cold_start_needs_an_answer_for_each_replica(config: TrainConfig) -> None:
    config = changed(config, "parallel", data=4)
    assert "sft.batch_size=3 must be at least parallel.data=4" in refusal(sft(config, batch_size=3))


def test_a_target_accuracy_needs_evaluations(config: TrainConfig) -> None:
    message = refusal(sft(config, target_accuracy=0.5))
    assert "sft.target_accuracy=0.5" in message and "eval.every=0" in message
    assert preflight.check_sft(sft(changed(config, "eval", every=10), target_accuracy=0.5))


def test_settings_that_are_not_read_are_named(config: TrainConfig) -> None:
    checked = preflight.check_train(changed(config, "optimizer", min_lr=1e-7))
    assert [w.split(" is not read")[0] for w in checked.warnings] == ["optimizer.min_lr=1e-07"]
    assert preflight.check_train(changed(config, "optimizer", min_lr=1e-7, decay="linear")).warnings == []

    holdout = changed(config, "task", holdout=7)
    for checked in (preflight.check_train(holdout), preflight.check_eval(holdout), preflight.check_sft(sft(holdout))):
        assert checked.warnings == ['task.holdout=7 is not read by the task "reasoning_gym"; leave it out']
    jsonl = changed(holdout, "task", name="jsonl", dataset="a.jsonl")
    assert preflight.check_train(jsonl).warnings == []
    [warning] = preflight.check_train(changed(jsonl, "task", eval_dataset="b.jsonl")).warnings
    assert "task.holdout=7 is not read together with task.eval_dataset" in warning

    samples = changed(config, "log", samples_per_batch=2)
    assert preflight.check_train(samples).warnings == []
    [warning] = preflight.check_sft(dataclasses.replace(sft(config), log=samples.log)).warnings
    assert "log.samples_per_batch=2 is not read by sft" in warning


def test_everything_that_is_wrong_is_said_at_once(config: TrainConfig) -> None:
    config = changed(config, "rollout", prompts_per_batch=30)
    message = refusal(dataclasses.replace(config, parallel=ParallelConfig(tensor=4, pipeline=4)))
    assert message.startswith("3 things are wrong:\n- ")
    assert "num_key_value_heads" in message and "num_hidden_layers" in message and "mini_batches" in message


# -- inputs --


def input_refusal(config: TrainConfig | SftConfig) -> str:
    with pytest.raises(UserError) as caught:
        preflight.check_inputs(config)
    return str(caught.value)


def test_a_prompt_longer_than_the_context(config: TrainConfig, tmp_path: Path) -> None:
    lines = [{"prompt": "spell ab", "answer": "ba"}, {"prompt": "spell " + "ab" * 150, "answer": "ba"}]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = dataclasses.replace(config, task=TaskConfig(name="jsonl", dataset=str(path), holdout=1))
    message = input_refusal(config)
    assert "tokens; with rollout.max_response_tokens=32 it exceeds the model's context" in message
    assert "max_position_embeddings=256" in message


def jsonl(config: TrainConfig, path: Path, rows: list[tuple[str, str]], **settings: Any) -> TrainConfig:
    path.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in rows))
    return dataclasses.replace(config, task=TaskConfig(name="jsonl", dataset=str(path), **settings))


@pytest.mark.parametrize("place", [100, 149])  # a training row and, the last, a held-out one
def test_every_row_of_a_file_is_looked_at(config: TrainConfig, tmp_path: Path, place: int) -> None:
    path = tmp_path / "train.jsonl"
    rows = [(f"spell {'abcdefghij'[i % 10]}{'k' * (i // 10)}", "ba") for i in range(150)]
    assert "all 150 were looked at" in preflight.check_inputs(jsonl(config, path, rows, holdout=5)).describe()
    long = rows[:place] + [("ab" * 120, "ba")] + rows[place + 1 :]
    message = input_refusal(jsonl(config, path, long, holdout=5))
    assert message.startswith(f"{path}:{place + 1} has ") and "max_position_embeddings=256" in message
    assert "use shorter prompts or fewer response tokens" in message
    foreign = rows[:place] + [("spell 語", "ba")] + rows[place + 1 :]
    message = input_refusal(jsonl(config, path, foreign, holdout=5))
    assert message.startswith(f"{path}:{place + 1}: ") and "['語']" in message


def test_worked_answers_must_fit_and_be_encodable(config: TrainConfig, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    rows = [("spell ab", "ba")] * 80
    long = jsonl(config, path, [("spell a", "a"), *rows[:70], ("spell b", "ab" * 130), *rows], eval_dataset="")
    long = changed(long, "task", holdout=1, eval_dataset=str(tmp_path / "eval.jsonl"))
    (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": "spell c", "answer": "c"}) + "\n")
    assert preflight.check_inputs(long)  # train never reads the answers
    message = input_refusal(sft(long))
    assert message.startswith(f"{path}:72 has ") and "its worked answer 261" in message
    assert "max_position_embeddings=256" in message
    (path).write_text(path.read_text().replace("ab" * 130, "ab" * 60))
    message = input_refusal(sft(changed(long, "data", token_budget=100)))
    assert "data.token_budget=100 is smaller than one sequence" in message and "use at least" in message
    assert preflight.check_inputs(sft(long))
    (path).write_text(path.read_text().replace("ab" * 60, "語"))
    assert input_refusal(sft(long)).startswith(f"{path}:72: the worked answer: ")


def test_a_prompt_and_response_longer_than_the_token_budget(config: TrainConfig) -> None:
    message = input_refusal(changed(config, "data", token_budget=40))
    assert "data.token_budget=40 is smaller than one sequence" in message and "use at least" in message


def test_a_tokenizer_larger_than_the_model(config: TrainConfig, model: Path) -> None:
    edit_config(model, vocab_size=10)
    assert "more than the model's vocab_size=10" in input_refusal(config)


def test_a_folder_without_tokenizer(config: TrainConfig, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    assert "no tokenizer" in input_refusal(config)


def test_unknown_tasks(config: TrainConfig) -> None:
    assert 'Did you mean "reasoning_gym"?' in input_refusal(changed(config, "task", name="reasoning_gim"))
    assert "spell_backward" in input_refusal(changed(config, "task", dataset="spell_backwards"))
    assert "task.params" in input_refusal(changed(config, "task", params={"no_such": 1}))


# -- the run folder --


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_resolved_config_is_written(config: TrainConfig) -> None:
    run_folder.prepare(config)
    folder = Path(config.run.folder)
    written = load_config(TrainConfig, folder / "config.toml")
    assert (written.algorithm.clip_low, written.algorithm.clip_high, written.algorithm.mini_batches) == (3e-4, 4e-4, 4)
    assert dataclasses.replace(written, algorithm=AlgorithmConfig()) == config
    # It can be run again as it is.
    assert run_folder.resolve(written) == written
    assert preflight.check_train(written, folder=False).warnings == []


@pytest.mark.parametrize("existing", ["metrics.jsonl", "config.toml", "final/model.safetensors"])
def test_a_folder_that_holds_a_run_is_left_alone(config: TrainConfig, existing: str) -> None:
    folder = Path(config.run.folder)
    (folder / existing).parent.mkdir(parents=True)
    (folder / existing).write_text("old")
    before = snapshot(folder)
    for attempt in (preflight.check_train, run_folder.prepare):
        with pytest.raises(UserError, match=r"already holds a run .* --run.overwrite"):
            attempt(config)
    assert snapshot(folder) == before


def test_overwrite_replaces_the_run_and_nothing_else(config: TrainConfig) -> None:
    run_folder.prepare(config)
    folder = Path(config.run.folder)
    for name in ("metrics.jsonl", "samples.jsonl", "report.png", "final/model.safetensors", "notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("old")
    run_folder.prepare(changed(config, "run", overwrite=True, seed=5))
    assert sorted(snapshot(folder)) == [".lock", "config.toml", "notes.txt"]
    assert load_config(TrainConfig, folder / "config.toml").run.seed == 5


def test_overwrite_never_removes_the_weights_it_starts_from(config: TrainConfig, model: Path) -> None:
    folder = Path(config.run.folder)
    shutil.copytree(model, folder / "final")
    before = snapshot(folder)
    config = changed(changed(config, "run", overwrite=True), "model", path=str(folder / "final"))
    assert "which run.overwrite would replace" in refusal(config)
    with pytest.raises(UserError):
        run_folder.prepare(config)
    assert snapshot(folder) == before


def test_run_folders_that_cannot_be(config: TrainConfig, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file" in refusal(changed(config, "run", folder=str(tmp_path / "file")))
    assert "model's own folder" in refusal(changed(config, "run", folder=str(model)))
    with pytest.raises(UserError, match="cannot be written"):
        run_folder.prepare(changed(config, "run", folder=str(tmp_path / "file" / "below")))


@pytest.mark.parametrize("name", ["final", "tensorboard"])
def test_overwrite_is_refused_before_anything_is_removed(config: TrainConfig, tmp_path: Path, name: str) -> None:
    run_folder.prepare(config)
    folder = Path(config.run.folder)
    (folder / "metrics.jsonl").write_text("old")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("kept")
    before = snapshot(folder)
    config = changed(config, "run", overwrite=True)
    for target in (tmp_path / "elsewhere", tmp_path / "nowhere"):
        (folder / name).symlink_to(target)
        with pytest.raises(UserError, match=f"{name} is a symbolic link.* move it away"):
            run_folder.prepare(config)
        (folder / name).unlink()
    assert snapshot(folder) == before and (tmp_path / "elsewhere" / "kept").exists()
    (folder / name).write_text("file")
    assert f"{name} is a file, no folder that a run has made" in refusal(config)
    (folder / name).unlink()
    (folder / "report.html").mkdir()
    assert "report.html is a folder, no file that a run has made" in refusal(config)


def test_a_run_folder_that_is_a_dangling_link(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    message = refusal(changed(config, "run", folder=str(tmp_path / "link")))
    assert f"is a symbolic link to {tmp_path / 'nowhere'}, which does not exist; make that folder" in message


def test_a_refused_start_frees_the_folder(config: TrainConfig) -> None:
    run_folder.prepare(config)
    folder = Path(config.run.folder)
    (folder / "metrics.jsonl").touch()
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard" / "events").write_text("x")
    run_folder.release(config)
    assert not folder.exists()


def test_a_run_with_records_is_not_taken_back(config: TrainConfig) -> None:
    run_folder.prepare(config)
    folder = Path(config.run.folder)
    (folder / "metrics.jsonl").write_text("{}\n")
    before = snapshot(folder)
    run_folder.release(config)
    assert snapshot(folder) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that there is no GPU")
def test_nothing_is_offloaded_without_a_gpu(config: TrainConfig) -> None:
    message = refusal(dataclasses.replace(config, memory=MemoryConfig(offload_optimizer=0.5)))
    assert "memory.offload_optimizer=0.5 moves state from a GPU to host memory, but there is no GPU; use 0" in message
    assert 'model.dtype="float32" has none; use dtype="bfloat16", or 0' in message


def test_experts_that_a_grouped_product_cannot_hold(config: TrainConfig, model: Path) -> None:
    edit_config(model, moe_intermediate_size=62)
    (model / "model.safetensors").unlink()
    config = changed(config, "model", init="random")
    message = refusal(config)
    assert "expert intermediate size per expert-tensor rank=62 must be a multiple of 4" in message
    assert message.endswith('use "sequential"')
    assert preflight.check_train(changed(config, "model", experts="sequential"))


def test_moe_recomputation_needs_moe_layers(config: TrainConfig, model: Path) -> None:
    edit_config(model, model_type="qwen3")
    (model / "model.safetensors").unlink()
    config = changed(config, "model", init="random")
    message = refusal(dataclasses.replace(config, memory=MemoryConfig(recompute="moe")))
    assert message.startswith('memory.recompute="moe", but the model has no experts')


def test_transformer_engine_must_be_there(config: TrainConfig) -> None:
    message = refusal(changed(config, "model", attention="transformer_engine"))
    assert "needs Transformer Engine and a CUDA device" in message
    assert 'use dtype="bfloat16", or attention="torch"' in message


def test_servers_must_know_the_family_unless_nothing_is_checked(config: TrainConfig) -> None:
    stranger = Family("stranger", qwen3_moe.fields, qwen3_moe.rules)
    config = changed(config, "rollout", engine="sglang")

    def problems_of(config: TrainConfig, family: Family) -> list[str]:
        problems = Problems()
        check_family(config, family, problems)
        return problems.messages

    [message] = problems_of(config, stranger)
    assert message.startswith('rollout.engine="sglang" with sglang.check="sampled": what a server makes of the tensors')
    assert "of a stranger model is not known" in message and message.endswith('or rollout.engine="embedded"')
    assert not problems_of(config, qwen3_moe.FAMILY)
    assert not problems_of(changed(config, "sglang", check="off"), stranger)
    assert not problems_of(changed(config, "rollout", engine="embedded"), stranger)
    [message] = problems_of(changed(config, "model", attention="transformer_engine"), stranger)[1:]
    assert message == 'model.attention="transformer_engine" is not set up for stranger models; use "torch"'


def test_servers_of_several_gpus_must_be_able_to_split_the_family(config: TrainConfig) -> None:
    for family, refused in ((olmoe.FAMILY, True), (qwen3_moe.FAMILY, False)):
        for tensor in (1, 2):
            problems = Problems()
            check_family(
                changed(changed(config, "rollout", engine="sglang"), "sglang", tensor=tensor), family, problems
            )
            said = [m for m in problems.messages if m.startswith("sglang.tensor=2: SGLang can't split a olmoe model")]
            assert len(said) == len(problems.messages) == (refused and tensor == 2)
        problems = Problems()
        check_family(changed(config, "sglang", tensor=2), family, problems)
        assert not problems.messages


def test_experts_with_biases_are_kept_together_and_whole(config: TrainConfig, model: Path) -> None:
    edit_config(model, model_type="gpt_oss", intermediate_size=32, sliding_window=16, attention_bias=True)
    (model / "model.safetensors").unlink()
    config = changed(config, "model", init="random")
    assert preflight.check_train(config)
    cut = changed(config, "parallel", tensor=2, expert_tensor=2)
    assert "parallel.expert_tensor=2, but experts with biases are not cut over ranks" in refusal(cut)
    message = refusal(changed(config, "model", experts="sequential"))
    assert message == 'model.experts="sequential", but this family keeps a layer\'s experts together; use "grouped"'


def test_shared_experts_are_split_by_tensor_too(config: TrainConfig, model: Path) -> None:
    edit_config(model, model_type="qwen2_moe", shared_expert_intermediate_size=31)
    (model / "model.safetensors").unlink()
    config = changed(changed(config, "model", init="random"), "parallel", tensor=2)
    assert "must divide intermediate size of the shared experts=31" in refusal(config)
