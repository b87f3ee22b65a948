"""What a server is started with: command line, environment, key, and what is refused before anything starts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_megatron.config import SGLangConfig
from gspo_megatron.errors import UserError
from gspo_megatron.rollout.sglang.api_key import describe_api_key, find_api_key, is_random
from gspo_megatron.rollout.sglang.command import (
    CPU_STAND_INS,
    check_servers,
    has_weights,
    server_command,
    server_environment,
)

ROOT = Path(__file__).parents[3]
VARIABLE = "GSPO_SGLANG_API_KEY"


def command(gpu: bool = False, first_gpu: int = 0, random_weights: bool = False, **settings: object) -> list[str]:
    return server_command(
        SGLangConfig(**settings),
        model_folder="/models/m",
        dtype="bfloat16",
        port=31000,
        gpu=gpu,
        first_gpu=first_gpu,
        random_weights=random_weights,
    )


def after(arguments: list[str], option: str) -> str:
    assert arguments.count(option) == 1
    return arguments[arguments.index(option) + 1]


# -- command line --


def test_the_program_is_named_absolutely_and_its_link_is_kept(tmp_path: Path) -> None:
    (tmp_path / "python").symlink_to(sys.executable)  # a venv's python is a link: resolved, it's another environment
    assert command(python=str(tmp_path / "python"))[:3] == [str(tmp_path / "python"), "-m", "sglang.launch_server"]
    assert command(python=".venv-x/bin/python")[0] == str(Path.cwd() / ".venv-x/bin/python")


def test_what_every_server_is_told() -> None:
    arguments = command(tensor=2, host="0.0.0.0")
    for option, value in {
        "--model-path": "/models/m",
        "--dtype": "bfloat16",
        "--host": "0.0.0.0",
        "--port": "31000",
        "--tp-size": "2",
    }.items():
        assert after(arguments, option) == value
    for absent in ("--ep-size", "--load-format", "--enable-return-routed-experts", "--random-seed", "--api-key"):
        assert absent not in arguments
    assert "--disable-radix-cache" not in arguments


def test_the_cpu_has_options_of_its_own() -> None:
    arguments = command(colocate=True, transport="tensor")
    assert after(arguments, "--device") == "cpu" and after(arguments, "--attention-backend") == "torch_native"
    assert {"--sleep-on-idle", "--skip-server-warmup", "--disable-overlap-schedule"} <= set(arguments)
    assert "--base-gpu-id" not in arguments and "--enable-memory-saver" not in arguments  # it saves nothing there


def test_a_gpu_has_none_of_them() -> None:
    assert command(gpu=True, first_gpu=4, tensor=2, python="/p") == [
        *("/p", "-m", "sglang.launch_server", "--model-path", "/models/m", "--dtype", "bfloat16"),
        *("--host", "127.0.0.1", "--port", "31000", "--tp-size", "2", "--base-gpu-id", "4"),
    ]
    assert "--enable-memory-saver" in command(gpu=True, colocate=True, transport="tensor")


def test_what_is_asked_for_is_added() -> None:
    arguments = command(tensor=4, expert=2, routed_experts=True, random_weights=True)
    assert after(arguments, "--ep-size") == "2" and after(arguments, "--load-format") == "dummy"
    assert "--enable-return-routed-experts" in arguments


def test_the_user_s_arguments_come_last() -> None:
    arguments = command(arguments="--max-total-tokens 99 --served-model-name 'my model'")
    assert arguments[-4:] == ["--max-total-tokens", "99", "--served-model-name", "my model"]
    assert arguments.count("--max-total-tokens") == 2  # argparse takes the last one


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--api-key abc", "may not set --api-key; use sglang.api_key_file"),
        ("--port=3", "may not set --port; use sglang.port"),
        ("--tp 2", "may not set --tp; use sglang.tensor"),
        ("--hos 0.0.0.0", "may not set --hos, which may be --host; use sglang.host"),
        ("--ho=0.0.0.0", "may not set --ho, which may be --host; use sglang.host"),
        ("--admin-api-k x", "may not set --admin-api-k, which may be --admin-api-key; use sglang.api_key_file"),
        (
            "--tensor-parallel 2",
            "may not set --tensor-parallel, which may be --tensor-parallel-size; use sglang.tensor",
        ),
        ("--x 'open", "cannot be split"),
    ],
)
def test_arguments_that_have_a_key_of_their_own(arguments: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        command(arguments=arguments)


def test_arguments_that_only_look_like_those() -> None:
    given = ["--model-impl", "transformers", "--ep-dispatch-algorithm", "static", "--hicache-size=4", "-h", "--", "--y"]
    assert command(arguments=" ".join(given))[-8:] == given


# -- environment --


def environment(gpu: bool = False, cores: tuple[int, ...] = (3, 5), **settings: object) -> dict[str, str]:
    inherited = {"PATH": "/bin", "PYTHONPATH": "/mine", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "n0"}
    inherited |= {"TORCHELASTIC_USE_AGENT_STORE": "True", VARIABLE: "secret", "CUDA_VISIBLE_DEVICES": "0,1"}
    return server_environment(SGLangConfig(**settings), gpu=gpu, cores=cores, inherited=inherited)


def test_a_server_is_no_rank_and_sees_no_key() -> None:
    for gpu in (False, True):
        found = environment(gpu)
        assert found["PATH"] == "/bin" and "secret" not in found.values()
        assert not {"RANK", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE"} & set(found)


def test_stand_ins_are_for_the_cpu_alone() -> None:
    cpu, gpu = environment(), environment(gpu=True)
    assert cpu["PYTHONPATH"] == f"{CPU_STAND_INS}:/mine" and gpu["PYTHONPATH"] == "/mine"
    assert cpu["CUDA_VISIBLE_DEVICES"] == "" and gpu["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert "SGLANG_USE_CPU_ENGINE" in cpu and "SGLANG_USE_CPU_ENGINE" not in gpu


def test_ranks_share_the_cores() -> None:
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in environment()
    assert environment(tensor=2)["SGLANG_CPU_OMP_THREADS_BIND"] == "3|5"
    assert environment(tensor=4)["SGLANG_CPU_OMP_THREADS_BIND"] == "3|5|3|5"
    assert environment()["OMP_NUM_THREADS"] == "2" and environment(servers=2, tensor=2)["OMP_NUM_THREADS"] == "1"


# -- key --


@pytest.fixture
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.mark.usefixtures("no_variable")
def test_where_a_key_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, everywhere = SGLangConfig(), SGLangConfig(host="0.0.0.0")
    assert find_api_key(here) is None and describe_api_key(here) == "no key"
    key = find_api_key(everywhere)
    assert key is not None and len(key) == 64 and find_api_key(everywhere) != key
    assert is_random(everywhere) and not is_random(here) and "random" in describe_api_key(everywhere)
    # Another's servers have a key that cannot be guessed.
    assert find_api_key(SGLangConfig(host="0.0.0.0", addresses="http://n:1")) is None

    monkeypatch.setenv(VARIABLE, "of-the-environment")
    assert find_api_key(here) == "of-the-environment" and not is_random(everywhere)
    (tmp_path / "key").write_text("of-the-file \nmore\n")
    from_file = SGLangConfig(api_key_file=str(tmp_path / "key"))
    assert find_api_key(from_file) == "of-the-file"
    assert VARIABLE in describe_api_key(here) and str(tmp_path / "key") in describe_api_key(from_file)


@pytest.mark.usefixtures("no_variable")
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1"])
def test_no_key_is_needed_where_only_this_machine_listens(host: str) -> None:
    assert find_api_key(SGLangConfig(host=host)) is None


@pytest.mark.parametrize("text", [b"", b"\n", b"two words\n", b"-leading\n", b"\xff\xfe", "schlüssel".encode()])
def test_what_is_no_key_is_refused_and_not_shown(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "key").write_bytes(text)
    with pytest.raises(UserError, match="openssl rand") as error:
        find_api_key(SGLangConfig(api_key_file=str(tmp_path / "key")))
    assert str(tmp_path / "key") in str(error.value) and "two words" not in str(error.value)


def test_a_key_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sglang\.api_key_file=/no/such cannot be read: No such file.*openssl"):
        find_api_key(SGLangConfig(api_key_file="/no/such"))


# -- what is refused --


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = {"num_attention_heads": 12, "num_key_value_heads": 4, "num_experts": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "gpus", "expected"),
    [
        ({"tensor": 5}, 0, r"sglang\.tensor=5 must divide num_attention_heads=12 .*use 1, 2, 3, 4, 6, 12"),
        ({"tensor": 3}, 0, r"sglang\.tensor=3 must divide num_key_value_heads=4"),
        ({"tensor": 4, "expert": 4}, 8, r"sglang\.expert=4 must divide num_experts=6"),
        ({"tensor": 4, "expert": 2}, 0, r"sglang\.expert=2: .* set 1 for servers on the CPU"),
        ({"servers": 3, "tensor": 2}, 4, r"from GPU 0 on need 6 GPUs, but 4 are visible"),
        ({"python": "no/such/python"}, 0, r"sglang\.python=no/such/python.*make setup-sglang"),
        ({"python": sys.executable}, 0, r"has no SGLang; run `make setup-sglang`"),
        ({"arguments": "--host x"}, 0, r"may not set --host"),
    ],
)
def test_what_cannot_work(model: Path, settings: dict[str, object], gpus: int, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        check_servers(SGLangConfig(**settings), model_folder=model, gpus=gpus)


def test_key_value_heads_may_be_copied(model: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    check_servers(SGLangConfig(python=str(python), tensor=12), model_folder=model, gpus=0)
    check_servers(SGLangConfig(python=str(python), tensor=4), model_folder=model, gpus=8, first_gpu=4)
    with pytest.raises(UserError, match="from GPU 5 on need 9 GPUs"):
        check_servers(SGLangConfig(python=str(python), tensor=4), model_folder=model, gpus=8, first_gpu=5)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json"):
        check_servers(SGLangConfig(), model_folder=tmp_path, gpus=0)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        check_servers(SGLangConfig(), model_folder=tmp_path, gpus=0)


def test_weights_are_safetensors(tmp_path: Path) -> None:
    assert not has_weights(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert has_weights(tmp_path)


# -- stand-ins --


def with_stand_ins(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(CPU_STAND_INS)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_kernel_stand_in_enters_slots_as_the_definition_says() -> None:
    code = (
        "import torch, sgl_kernel\n"
        "table = torch.zeros(3, 5, dtype=torch.int32)\n"
        "t = torch.tensor\n"
        "sgl_kernel.assign_req_to_token_pool_cpu(t([2, 0]), table, t([1, 0]), t([4, 2]), t([7, 8, 9, 4, 5]), 5)\n"
        "print(table.tolist())\n"
        "from sgl_kernel import fused_experts\n"
        "try: fused_experts(1, x=2)\n"
        "except NotImplementedError as error: print(error)\n"
        "print(hasattr(sgl_kernel, '__path_hooks__'), hasattr(torch.ops.sgl_kernel, 'convert_weight_packed'))\n"
    )
    table, error, absent = with_stand_ins(code).splitlines()
    assert json.loads(table) == [[4, 5, 0, 0, 0], [0, 0, 0, 0, 0], [0, 7, 8, 9, 0]]
    assert error.startswith("sgl_kernel.fused_experts has no CPU stand-in")
    assert absent == "False False"


def test_the_torchvision_stand_in_can_be_imported_and_not_called() -> None:
    code = (
        "import torchvision.transforms.v2.functional as f\n"
        "from torchvision.transforms import InterpolationMode\n"
        "from typing import Optional\n"
        "Optional[InterpolationMode], InterpolationMode | None, {InterpolationMode.BICUBIC: 1}\n"
        "for call in (f.resize, InterpolationMode.BICUBIC):\n"
        "    try: call(1)\n"
        "    except NotImplementedError as error: print(error)\n"
    )
    lines = with_stand_ins(code).splitlines()
    assert [line.split()[0] for line in lines] == [
        "torchvision.transforms.v2.functional.resize",
        "torchvision.transforms.InterpolationMode.BICUBIC",
    ]


def test_python_finds_the_plugin() -> None:
    code = "from importlib.metadata import entry_points\nprint(*entry_points(group='sglang.srt.plugins'), sep='\\n')"
    assert "gspo_sglang_cpu:register" in with_stand_ins(code)


def test_a_wheel_holds_the_stand_ins(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "gspo_megatron", tmp_path / "gspo_megatron", ignore=ignored)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", "built"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        timeout=120,
    )
    built = tmp_path / "built" / CPU_STAND_INS.relative_to(ROOT)
    files = {str(path.relative_to(CPU_STAND_INS)) for path in CPU_STAND_INS.rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert len(files) == 5 and files == {str(path.relative_to(built)) for path in built.rglob("*") if path.is_file()}
