"""config_io: what a TOML file and the command line may say, and what they are told when they may not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gspo_megatron.config import (
    AlgorithmConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SftConfig,
    TaskConfig,
    TrainConfig,
)
from gspo_megatron.config_io import dump_config, field_help, load_config, print_help, render_reference, sections
from gspo_megatron.errors import UserError

Write = Callable[[str], Path]

MINIMAL = """
[run]
folder = "runs/x"
[model]
path = "models/tiny"
[task]
name = "reasoning_gym"
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(text: str) -> Path:
        path = tmp_path / "config.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def refusal(path: Path, *overrides: str, cls: type = TrainConfig) -> str:
    with pytest.raises(UserError) as caught:
        load_config(cls, path, list(overrides))
    return str(caught.value)


def test_engine_log_probs_are_refused_where_the_trainers_are_needed(write: Write) -> None:
    bypass = "--algorithm.old_logprobs=auto"
    assert 'use old_logprobs="recompute", or routing_replay="r3"' in refusal(
        write(MINIMAL), bypass, "--model.routing_replay=r2"
    )
    assert load_config(TrainConfig, write(MINIMAL), [bypass, "--model.routing_replay=r3"]).returns_routes


# -- files --


def test_defaults_and_values_of_the_file(write: Write) -> None:
    config = load_config(TrainConfig, write(MINIMAL + "[optimizer]\nlr = 1e-6\nclip_grad = inf\n[train]\n"))
    assert config.run == RunConfig(folder="runs/x")
    assert config.optimizer == OptimizerConfig(lr=1e-6, clip_grad=math.inf)
    assert config.algorithm == AlgorithmConfig()


def test_an_integer_is_a_number(write: Write) -> None:
    value = load_config(TrainConfig, write(MINIMAL + "[optimizer]\nclip_grad = 2\n")).optimizer.clip_grad
    assert value == 2.0 and type(value) is float


def test_params_keep_their_types(write: Write) -> None:
    text = MINIMAL + '[task.params]\nmin_len = 3\nratio = 0.5\nflag = true\nword = "w"\n'
    params = load_config(TrainConfig, write(text)).task.params
    assert params == {"min_len": 3, "ratio": 0.5, "flag": True, "word": "w"}
    assert [type(v) for v in params.values()] == [int, float, bool, str]


def test_missing_file_names_the_nearest(tmp_path: Path, write: Write) -> None:
    write(MINIMAL)
    message = refusal(tmp_path / "conifg.toml")
    assert "does not exist" in message and 'Did you mean "config.toml"?' in message


def test_a_folder_is_no_config_file(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(tmp_path / "config.toml")


def test_malformed_toml_says_the_line(write: Write) -> None:
    message = refusal(write("[run]\nfolder = \n"))
    assert "not valid TOML" in message and "line 2" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[algoritm]\nclip_low = 1e-4\n", ["unknown section [algoritm]", 'Did you mean "algorithm"?']),
        ("[algorithm]\nclip_lo = 1e-4\n", ['unknown key "clip_lo" in section [algorithm]', 'Did you mean "clip_low"?']),
        ("[train]\ntoken_budget = 4\n", ['unknown key "token_budget"', "belongs to section [data]"]),
        ("[sft]\nsteps = 4\n", ["unknown section [sft]", "Known: run, model"]),
        ("[algorithm]\nclip_low = 'a'\n", ["algorithm.clip_low='a' must be a number"]),
        ("[rollout]\nprompts_per_batch = 4.0\n", ["rollout.prompts_per_batch=4.0 must be an integer"]),
        ("[rollout]\nprompts_per_batch = true\n", ["rollout.prompts_per_batch=true must be an integer"]),
        ("[optimizer]\nlr = true\n", ["optimizer.lr=true must be a number"]),
        ("[log]\ntensorboard = 1\n", ["log.tensorboard=1 must be true or false"]),
        ("[log]\nwandb_project = 3\n", ["log.wandb_project=3 must be a string"]),
        (
            "[algorithm]\nmismatch = 'trunc'\n",
            ['one of "off", "truncate", "mask", "geometric"', 'Did you mean "truncate"?'],
        ),
        ("[task.params]\nx = [1]\n", ["task.params.x=[1] must be"]),
        ("[algorithm]\ndual_clip = 0.5\n", ["algorithm.dual_clip=0.5 must be above 1"]),
        ("[rollout]\nsamples_per_prompt = 1\n", ["rollout.samples_per_prompt=1", "at least 2"]),
        ("[parallel]\nexpert = 3\ntensor = 2\n", ["parallel.expert=3", "use expert in [1, 2]"]),
    ],
)
def test_bad_files_are_refused_with_value_and_remedy(write: Write, text: str, expected: list[str]) -> None:
    if text.startswith("[task.params]"):
        text = MINIMAL + text
    else:
        text = text + MINIMAL
    message = refusal(write(text))
    for part in expected:
        assert part in message


def test_keys_outside_a_section(write: Write) -> None:
    assert 'unknown key "seed" outside a section. It belongs to section [run].' in refusal(
        write("seed = 3\n" + MINIMAL)
    )
    assert "data='x' must be a table: write [data]" in refusal(write("data = 'x'\n" + MINIMAL))


def test_required_fields_are_all_named(write: Write) -> None:
    message = refusal(write("[run]\nseed = 1\n"))
    assert "run.folder, model.path, task.name must be set" in message and "--run.folder" in message


# -- overrides --


def test_required_fields_may_come_from_the_command_line(write: Write) -> None:
    overrides = ["--run.folder", "a b", "--model.path=m=1", "--task.name", "jsonl"]
    config = load_config(SftConfig, write(""), overrides)
    assert (config.run.folder, config.model.path, config.task.name) == ("a b", "m=1", "jsonl")


@pytest.mark.parametrize(
    ("overrides", "section", "key", "value"),
    [
        (["--optimizer.lr", "1e-6"], "optimizer", "lr", 1e-6),
        (["--optimizer.lr", "2", "--optimizer.lr", "3"], "optimizer", "lr", 3.0),
        (["--optimizer.clip_grad", "inf"], "optimizer", "clip_grad", math.inf),
        (["--optimizer.warmup-steps", "7"], "optimizer", "warmup_steps", 7),
        (["--algorithm.entropy_coefficient", "-0.5"], "algorithm", "entropy_coefficient", -0.5),
        (["--algorithm.entropy_coefficient=-1e-3"], "algorithm", "entropy_coefficient", -1e-3),
        (["--algorithm.clip_low", "none"], "algorithm", "clip_low", None),
        (["--algorithm.normalize_std", "false"], "algorithm", "normalize_std", False),
        (["--algorithm.mismatch", "mask"], "algorithm", "mismatch", "mask"),
        (["--run.overwrite"], "run", "overwrite", True),
        (["--run.overwrite", "--run.seed", "4"], "run", "overwrite", True),
        (["--run.overwrite", "True"], "run", "overwrite", True),
        (["--run.overwrite=false"], "run", "overwrite", False),
        (["--task.prompt_pattern="], "task", "prompt_pattern", ""),
        (["--task.prompt_template", "a 'b' {c}\n-d"], "task", "prompt_template", "a 'b' {c}\n-d"),
    ],
)
def test_overrides(write: Write, overrides: list[str], section: str, key: str, value: object) -> None:
    text = MINIMAL + "[algorithm]\nclip_low = 1e-4\n"
    config = load_config(TrainConfig, write(text), overrides)
    got = getattr(getattr(config, section), key)
    assert got == value and type(got) is type(value)


def test_overrides_leave_other_values_of_the_file(write: Write) -> None:
    text = MINIMAL + "[parallel]\ntensor = 4\nexpert = 4\n"
    config = load_config(TrainConfig, write(text), ["--parallel.expert", "2"])
    assert (config.parallel.tensor, config.parallel.expert, config.run.folder) == (4, 2, "runs/x")


def test_only_the_final_values_are_checked(write: Write) -> None:
    text = MINIMAL + "[parallel]\nexpert = 4\n"  # refused by itself
    assert load_config(TrainConfig, write(text), ["--parallel.data", "4"]).parallel.layout().world_size == 4


def test_params_are_overridden_one_by_one(write: Write) -> None:
    text = MINIMAL + "[task.params]\nmin_word_len = 3\nmax_word_len = 9\n"
    overrides = ["--task.params.min_word_len", "4", "--task.params.new=0.5", "--task.params.flag", "true"]
    overrides += ["--task.params.word", "spell it", "--task.params.day", "2020-01-01", "--task.params.s", '"4"']
    params = load_config(TrainConfig, write(text), overrides).task.params
    expected = {"min_word_len": 4, "max_word_len": 9, "new": 0.5, "flag": True}
    assert params == expected | {"word": "spell it", "day": "2020-01-01", "s": "4"}
    assert type(params["min_word_len"]) is int and params["flag"] is True


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--rollout.batchsize", "4"], ['unknown option "--rollout.batchsize"', '"--rollout.batch_size"']),
        (["--tensor", "2"], ['unknown option "--tensor"', "--parallel.tensor"]),
        (["--algoritm.clip_low", "2"], ["Did you mean --algorithm.clip_low?"]),
        (["--sft.steps", "2"], ['unknown option "--sft.steps"']),
        (["--model.path.x", "2"], ['unknown option "--model.path.x"']),
        (["model.path", "x"], ['unexpected argument "model.path"']),
        (["--optimizer.lr"], ["--optimizer.lr needs a value: a number"]),
        (["--optimizer.lr", "--run.seed", "3"], ["--optimizer.lr needs a value"]),
        (["--optimizer.lr", "fast"], ["--optimizer.lr='fast' must be a number"]),
        (["--optimizer.lr", "none"], ["--optimizer.lr='none' must be a number"]),
        (["--run.seed", "1.5"], ["--run.seed='1.5' must be an integer"]),
        (["--run.seed", "1", "--run.overwrite", "maybe"], ["--run.overwrite='maybe' must be true or false"]),
        (["--model.dtype", "bfloat"], ['must be one of "float32", "bfloat16"', 'Did you mean "bfloat16"?']),
        (["--task.params", "4"], ["--task.params.NAME VALUE"]),
        (["--algorithm.clip_low", "-1"], ["algorithm.clip_low=-1.0 must be positive"]),
        (["--sglang.addresses", "http://h:1, http://g:1,http://H:1/"], ["http://h:1 more than once; name each"]),
        (["--rollout.temperature", "0"], ["rollout.temperature=0.0 must be positive"]),
        (["--eval.temperature", "nan"], ["eval.temperature=nan must be positive"]),
        (["--sglang.colocate", "true"], ['sglang.transport="distributed"', "NCCL refuses", 'use transport "tensor"']),
        (["--sglang.addresses", " , ,"], ["sglang.addresses=' , ,' names no server; leave it out"]),
    ],
)
def test_bad_overrides(
    write: Write, capsys: pytest.CaptureFixture[str], overrides: list[str], expected: list[str]
) -> None:
    message = refusal(write(MINIMAL), *overrides)
    for part in expected:
        assert part in message
    assert capsys.readouterr() == ("", "")  # nothing but the message


# -- out again --

_text = st.text(st.characters(codec="utf-8"), max_size=20)
_float = st.floats(min_value=1e-300, allow_nan=False)
_value = st.one_of(st.booleans(), st.integers(-(2**62), 2**62), st.floats(allow_nan=False), _text)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_text, st.dictionaries(_text, _value, max_size=4), _float, st.one_of(st.none(), _float), st.booleans())
def test_dump_loads_back_equal(
    tmp_path: Path, text: str, params: dict, lr: float, clip: float | None, flag: bool
) -> None:
    config = TrainConfig(
        run=RunConfig(folder=text, overwrite=flag),
        model=ModelConfig(path=text + "/"),
        task=TaskConfig(name="jsonl", params=params, prompt_pattern=text, reward_threshold=clip),
        algorithm=AlgorithmConfig(clip_high=clip, normalize_std=flag),
        optimizer=OptimizerConfig(lr=lr),
    )
    path = tmp_path / "dumped.toml"
    path.write_bytes(dump_config(config).encode())
    again = load_config(TrainConfig, path)
    assert again == config
    assert [type(v) for v in again.task.params.values()] == [type(v) for v in config.task.params.values()]


def test_dump_shows_unset_fields_as_comments() -> None:
    config = SftConfig(run=RunConfig(folder="f"), model=ModelConfig(path="m"), task=TaskConfig(name="jsonl"))
    assert "# target_accuracy is unset" in dump_config(config)


# -- help and reference --


@pytest.mark.parametrize("cls", [TrainConfig, SftConfig])
def test_every_field_has_help(cls: type) -> None:
    for section in sections(cls).values():
        assert section.__doc__
        assert set(field_help(section)) == {field.name for field in dataclasses.fields(section)}


def test_help_lists_options_with_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    print_help(TrainConfig, "python -m gspo_megatron train CONFIG.toml", "Train")
    text = capsys.readouterr().out
    words = " ".join(text.split())
    assert "╭" not in text  # no boxes where there is no terminal
    assert "\x1b" not in text
    for name, section in sections(TrainConfig).items():
        for field in dataclasses.fields(section):
            assert f"--{name}.{field.name}" in text
    assert "ends the run with an error, in seconds. (default: 600.0)" in words
    assert "(required)" in words


def test_reference_in_docs_is_current() -> None:
    path = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert path.read_text(encoding="utf-8") == render_reference(), (
        "write it again: python -m gspo_megatron settings > docs/configuration.md"
    )
