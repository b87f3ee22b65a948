"""Text to token ids and back: chat template, stop tokens, padding. Reads local folders only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from gspo_megatron.errors import UserError

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
_GENERATION_CONFIG = "generation_config.json"
_MARKER = "answer"  # a word that every template leaves as it is
_UNKNOWN = "\ufffd"


class Tokenizer:
    """A model's tokenizer with its chat template and the tokens that end a response.

    Attributes:
        stop_token_ids: tokens that end a response: the tokenizer's eos, those of generation_config.json,
            and the token with which the chat template ends an assistant's turn.
        pad_token_id: the tokenizer's padding token, or its first stop token if it has none.
        vocab_size: number of tokens the tokenizer knows. A model's vocabulary may be larger.
    """

    def __init__(self, tokenizer: Any, generation_config: Mapping[str, Any] | None, *, source: str) -> None:
        """`tokenizer` is a transformers tokenizer; `source` names it in messages.

        Raises:
            UserError: there is no stop token at all, or generation_config's eos_token_id is no id or list of ids.
        """
        self._tokenizer = tokenizer
        self._generation_config = generation_config
        self._source = source
        self._token_ids = frozenset(tokenizer.get_vocab().values())
        self.vocab_size: int = len(tokenizer)
        self.has_chat_template: bool = bool(tokenizer.chat_template)

        eos = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        eos += _generation_eos(generation_config, source)
        turn_end = self._template_turn_end() if self.has_chat_template else None
        stops = list(dict.fromkeys(eos if turn_end is None else [*eos, turn_end]))
        if not stops:
            raise UserError(
                f"{source}: no stop token. A response could never end; set eos_token in tokenizer_config.json "
                f"or eos_token_id in {_GENERATION_CONFIG}"
            )
        self.stop_token_ids: tuple[int, ...] = tuple(stops)
        self.pad_token_id: int = stops[0] if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self._turn_end = stops[0] if turn_end is None else turn_end

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face folder, without any network access.

        Raises:
            UserError: no such folder, no tokenizer in it, an unreadable one, or one without a stop token.
        """
        path = Path(folder)
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; model.path must be a Hugging Face model folder")
        if not any((path / name).is_file() for name in _VOCABULARY_FILES):
            raise UserError(
                f"{path}: no tokenizer in this folder; "
                "copy the model's tokenizer.json and tokenizer_config.json into it"
            )
        generation_config = _read_generation_config(path / _GENERATION_CONFIG)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        # Whatever a broken file makes the library raise (OSError, ValueError, KeyError, bare Exception) is the
        # folder's fault.
        except Exception as error:
            raise UserError(
                f"{path}: cannot read the tokenizer ({type(error).__name__}: {error}); "
                "copy the model's tokenizer.json and tokenizer_config.json into it again"
            ) from error
        return cls(tokenizer, generation_config, source=str(path))

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids [L] of a prompt: one user turn of the chat template, opened for the answer, or the plain text.

        The plain text keeps a leading bos token if the tokenizer adds one, and never ends with eos.

        Raises:
            UserError: the text holds something the tokenizer has no token for, or gives no token at all.
        """
        if self.has_chat_template:
            rendered = self._render([{"role": "user", "content": text}], add_generation_prompt=True)
            ids = self._encode(rendered)
        else:
            ids = self._encode(text, add_special_tokens=True)
            eos = self._tokenizer.eos_token_id
            if ids and ids[-1] == eos and self._encode(text)[-1:] != [eos]:
                ids = ids[:-1]
        if not ids:
            raise UserError(f"prompt {text!r} has no token; a prompt needs at least one")
        return ids

    def encode_answer(self, text: str) -> list[int]:
        """Token ids [L] of a worked answer, with the stop token that ends the turn.

        Raises:
            UserError: the text holds something the tokenizer has no token for.
        """
        return [*self._encode(text), self._turn_end]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids [L], special tokens skipped. An id without a token becomes U+FFFD."""
        parts: list[str] = []
        known: list[int] = []
        for token_id in ids:
            if token_id in self._token_ids:
                known.append(token_id)
            else:
                parts += [self._decode(known), _UNKNOWN]
                known = []
        return "".join([*parts, self._decode(known)])

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files, and generation_config.json if it was loaded with one."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save_pretrained(path)
        if self._generation_config is not None:
            text = json.dumps(self._generation_config, indent=2) + "\n"
            (path / _GENERATION_CONFIG).write_text(text, encoding="utf-8")

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        # Clean-up would remove spaces before punctuation: the scorer must see what the model wrote.
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        try:
            # verbose: a text longer than the model's context is for the caller to judge, not for a log line.
            return list(self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
        # tokenizers raises a bare Exception for a character it has no token for.
        except Exception as error:
            known = self._tokenizer.get_vocab()
            foreign = sorted({character for character in text if character not in known})
            raise UserError(
                f"{self._source}: cannot encode {text!r} ({error}); characters that are no token: {foreign}. "
                "Use a tokenizer that covers them or change the prompt with task.prompt_pattern"
            ) from error

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise UserError(
                f"{self._source}: the chat template fails on {[m['role'] for m in messages]} ({error}); "
                "correct chat_template.jinja or the chat_template of tokenizer_config.json"
            ) from error

    def _template_turn_end(self) -> int | None:
        """The special token that follows an assistant's words in the chat template, if one does."""
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _MARKER}]
        rendered = self._render(messages, add_generation_prompt=False)
        _, marker, rest = rendered.rpartition(_MARKER)
        ids = self._encode(rest.lstrip()) if marker else []
        special = {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        return ids[0] if ids and ids[0] in special else None


def _read_generation_config(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); correct it or remove it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object, found {type(content).__name__}; correct it or remove it")
    return content


def _generation_eos(generation_config: Mapping[str, Any] | None, source: str) -> list[int]:
    value = None if generation_config is None else generation_config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise UserError(f"{source}/{_GENERATION_CONFIG}: eos_token_id={value!r} must be a token id or a list of them")
    return ids
