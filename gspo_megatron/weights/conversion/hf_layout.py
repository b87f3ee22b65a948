"""Which tensor lies in which file of the Hugging Face folder that a checkpoint came from: hf_layout.json.

With it an export gives the same files again, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gspo_megatron.errors import UserError

LAYOUT = "hf_layout.json"
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class HFLayout:
    """Files of one folder."""

    path: Path  # where it was read, for messages
    files: Mapping[str, tuple[str, ...]]  # tensors in the order in which they lie in each
    file_metadata: Mapping[str, Mapping[str, str]]  # what each says of itself
    index_metadata: Mapping[str, Any] | None  # None: one file without an index

    @property
    def names(self) -> list[str]:
        return [name for names in self.files.values() for name in names]


def write_layout(folder: Path, layout: HFLayout) -> None:
    """Write the file."""
    content = asdict(layout) | {"path": None}
    del content["path"]
    (folder / LAYOUT).write_text(json.dumps(content, indent=1) + "\n")


def read_layout(folder: Path) -> HFLayout | None:
    """None where there is none. Raises UserError, naming the file, where it is damaged."""
    path = folder / LAYOUT
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        files = {_file(name): tuple(map(_text, names)) for name, names in content["files"].items()}
        metadata = {
            _text(name): {_text(k): _text(v) for k, v in entry.items()}
            for name, entry in content["file_metadata"].items()
        }
        index = content["index_metadata"]
        if not files or files.keys() != metadata.keys() or not (index is None or isinstance(index, dict)):
            raise ValueError("its parts don't fit together")
        if index is None and len(files) > 1:
            raise ValueError("several files need an index")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise UserError(f"{path} is no layout of a Hugging Face folder: {type(error).__name__}: {error}") from None
    return HFLayout(path, files, metadata, index)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    value.encode()  # ValueError: halves of characters
    return value


def _file(value: Any) -> str:
    name = _text(value)
    if Path(name).name != name or "\0" in name or len(name.encode()) > 255 or not name.endswith(_SUFFIX):
        raise ValueError(f"{name!r} is no name of a {_SUFFIX} file")
    return name
