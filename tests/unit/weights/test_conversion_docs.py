"""The commands of docs/conversion.md, in their order, on a small model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.unit.weights.conversion_setup import contents, write_hf
from tools import convert_checkpoint

ROOT = Path(__file__).parents[3]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "conversion.md").read_text(), re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]


def test_the_documented_commands_do_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_hf(Path("Qwen3-30B-A3B"), files=2)
    verbs = []
    for line in COMMANDS:
        python, program, *arguments = shlex.split(line)
        assert (python, program) == ("python", "tools/convert_checkpoint.py")
        if "--logits" in arguments:  # run by tests/system/test_conversion.py: Megatron wants a process of its own
            arguments.remove("--logits")
        assert convert_checkpoint.main(arguments) == 0, line
        verbs.append(arguments[0])
    assert {"import", "export", "verify", "inspect", "diff"} <= set(verbs)
    assert contents(Path("qwen3_back")) == contents(Path("Qwen3-30B-A3B"))
    assert "bit for bit" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["benchmark_conversion.py", "convert_checkpoint.py"])
def test_the_programs_are_named_as_they_are(name: str) -> None:
    assert f"tools/{name}" in (ROOT / "docs" / "conversion.md").read_text() and (ROOT / "tools" / name).is_file()
