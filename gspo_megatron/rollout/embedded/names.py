"""Where transformers 5 keeps a checkpoint's tensor: experts, named one by one on disk, are stacked in memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

_EXPERT = re.compile(r"(?P<experts>.*\.mlp\.experts\.)(?P<expert>\d+)\.(?P<projection>gate|up|down)_proj\.weight")
# Mixtral's own names of what other families call otherwise.
_MIXTRAL = ".block_sparse_moe."
_MIXTRAL_PROJECTIONS = {".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}


@dataclass(frozen=True)
class Place:
    """A parameter of the model, or a part of it."""

    parameter: str
    expert: int | None = None  # entry along the first axis; None: all
    half: int | None = None  # of that entry's rows: 0 gate, 1 up; None: all


def in_memory(hf_name: str) -> Place:
    """The place of a checkpoint's tensor."""
    if _MIXTRAL in hf_name:
        hf_name = hf_name.replace(_MIXTRAL, ".mlp.")
        for theirs, common in _MIXTRAL_PROJECTIONS.items():
            hf_name = hf_name.replace(theirs, common)
    match = _EXPERT.fullmatch(hf_name)
    if match is None:
        return Place(hf_name)
    if match["projection"] == "down":
        return Place(match["experts"] + "down_proj", int(match["expert"]))
    return Place(match["experts"] + "gate_up_proj", int(match["expert"]), 0 if match["projection"] == "gate" else 1)
