"""Whether a server serves the model that is trained: what is compared, in either form of config.json, and what not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_megatron.errors import UserError
from gspo_megatron.rollout.sglang.address import ServerAddress
from gspo_megatron.rollout.sglang.served_model import ServedModel, check_same_model, read_served_model

ADDRESS = ServerAddress("http://n:1")
OLDER: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "rope_theta": 10000,
    "rope_scaling": None,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
NEWER: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "sliding_window": None,
    "use_sliding_window": False,
}
YARN = {"type": "yarn", "factor": 4.0}


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    return write(tmp_path / "ours", NEWER)


def write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def served(folder: Path | str, **server: Any) -> ServedModel:
    """As it says about itself."""
    return read_served_model(ADDRESS, {"model_path": str(folder)}, {"device": "cpu", "dtype": "bfloat16"} | server)


def check(model: ServedModel, ours: Path, transport: str = "distributed") -> None:
    check_same_model(model, {}, [], [], ours, transport=transport)


@pytest.mark.parametrize("theirs", [NEWER, OLDER])
def test_the_same_model_in_the_form_of_either_version(ours: Path, tmp_path: Path, theirs: dict[str, Any]) -> None:
    folder = write(tmp_path / "theirs", theirs)
    check(served(folder), ours, "tensor")
    check(served(ours), folder, "disk")
    # What is not compared may be overridden, and what is compared by what it is.
    overrides = json.dumps({"eos_token_id": [1, 2], "hidden_size": 64, "rope_theta": 10000})
    check(served(folder, json_model_override_args=overrides), ours)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 32}, "hidden_size=32 instead of 64; start the server with the same model"),
        ({"rope_theta": 5e6, "rope_parameters": None}, "rope_theta=5000000.0 instead of 10000.0"),
        ({"rope_scaling": {"type": "default", "rope_theta": 5e6}}, "rope_theta=5000000.0 instead of 10000.0"),
        ({"rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}}, "rope_theta=5000000.0 instead of 10000.0"),
        ({"rope_scaling": YARN}, "rope_type='yarn' instead of 'default'"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn' instead of"),
        ({"use_sliding_window": True, "sliding_window": 16}, "use_sliding_window=True instead of False"),
    ],
)
def test_what_the_same_weights_compute_otherwise_with(
    ours: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    other = served(write(tmp_path / "theirs", NEWER | changes))
    with pytest.raises(UserError) as caught:
        check(other, ours)
    assert f"another model than model.path={ours}: {said}" in str(caught.value)
    # The same by an option of the server, also where its folder can't be read.
    for folder in (ours, "/no/such"):
        with pytest.raises(UserError) as caught:
            check(served(folder, json_model_override_args=json.dumps(changes)), ours)
        assert said.partition(";")[0] in str(caught.value) and "--json-model-override-args" in str(caught.value)


def test_scaling_and_windows_are_compared_in_parts(tmp_path: Path) -> None:
    old = OLDER | {"rope_scaling": YARN, "use_sliding_window": True}
    new = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4, "attention_factor": None}
    ours = write(tmp_path / "ours", OLDER | {"rope_parameters": new, "use_sliding_window": True})
    check(served(write(tmp_path / "same", old)), ours)
    for changes, said in (
        ({"rope_scaling": YARN | {"factor": 2.0}}, "rope factor=2.0 instead of 4"),
        ({"sliding_window": 16}, "sliding_window=16 instead of 4096"),
        ({"max_window_layers": 2}, "max_window_layers=2 instead of 28"),
    ):
        with pytest.raises(UserError, match=said):
            check(served(write(tmp_path / said.partition("=")[0], old | changes)), ours)


def test_an_overridden_base_is_taken_for_what_it_says(ours: Path) -> None:
    with pytest.raises(UserError, match=r"rope_theta=1000000.0 instead of 10000.0; .*, and do not override that"):
        check(served(ours, json_model_override_args='{"rope_theta": 1e6}'), ours)


@pytest.mark.parametrize("transport", ["tensor", "disk"])
def test_a_server_that_could_not_refuse_other_sizes_must_show_its_own(ours: Path, transport: str) -> None:
    with pytest.raises(UserError) as caught:
        check(served("/no/such"), ours, transport)
    said = str(caught.value)
    assert "serves /no/such, whose config.json cannot be read here" in said and f'transport="{transport}"' in said
    assert 'a model folder that this machine can read, or use "distributed"' in said


def test_a_server_that_refuses_other_sizes_need_not(ours: Path, caplog: pytest.LogCaptureFixture) -> None:
    check(served("/no/such"), ours)
    assert "config.json cannot be read here" in caplog.text


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float32"}, "float16"),
        ({}, "float16"),
        (None, "read here"),
    ],
)
def test_an_automatic_dtype_is_that_which_sglang_takes(
    tmp_path: Path, config: dict[str, Any] | None, dtype: str
) -> None:
    folder = tmp_path / "none" if config is None else write(tmp_path / "theirs", config)
    if dtype == "bfloat16":
        assert served(folder, dtype="auto").dtype == torch.bfloat16
        return
    with pytest.raises(UserError, match=f"{dtype}.*start it with --dtype float32 or bfloat16"):
        served(folder, dtype="auto")
