"""Write the character tokenizer of the quickstart's model into a folder.

Ids: 0 <pad>, 1 <eos>, then printable ASCII 32..126 as 2..96. A text with any other character is
refused when it is encoded; nothing is dropped or replaced.

    python tools/make_char_tokenizer.py examples/quickstart/model
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

PAD, EOS = "<pad>", "<eos>"
FIRST_CHARACTER, LAST_CHARACTER = 32, 126


def char_tokenizer() -> Tokenizer:
    """One token per printable ASCII character; decoding joins them without a separator."""
    vocabulary = {PAD: 0, EOS: 1}
    vocabulary |= {chr(code): code - FIRST_CHARACTER + 2 for code in range(FIRST_CHARACTER, LAST_CHARACTER + 1)}
    # Without an unk token in the vocabulary, WordLevel raises on a character it does not know.
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(PAD, special=True), AddedToken(EOS, special=True)])
    return tokenizer


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    char_tokenizer().save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD,
            "eos_token": EOS,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 256,
        },
    )
    _write_json(folder / "generation_config.json", {"eos_token_id": 1, "pad_token_id": 0})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
