"""Tokenizer: chat template, stop tokens, exact text, and every folder a user can get wrong."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from gspo_megatron.errors import UserError
from gspo_megatron.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart" / "model"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def chat_folder(
    folder: Path,
    *,
    template: str | None = CHATML,
    eos: str | None = END_OF_TEXT,
    pad: str | None = None,
    generation_eos: Any = "unset",
) -> Path:
    """A byte-level tokenizer with ChatML tokens, written as Hugging Face writes one. Ids: 256 text, 257, 258 turns."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(t, special=True) for t in (END_OF_TEXT, IM_START, IM_END)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=eos, pad_token=pad)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    if generation_eos != "unset":
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    return folder


def test_chat_template_opens_the_assistants_turn(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path, generation_eos=[258, 256])
    tokenizer = Tokenizer.load(folder)
    plain = AutoTokenizer.from_pretrained(folder)
    expected = "<|im_start|>user\n2 + 2 = ?<|im_end|>\n<|im_start|>assistant\n"

    ids = tokenizer.encode_prompt("2 + 2 = ?")

    assert ids == plain(expected, add_special_tokens=False)["input_ids"]
    assert ids[0] == 257 and ids.count(257) == 2 and ids.count(258) == 1
    assert tokenizer.decode(ids) == "user\n2 + 2 = ?\nassistant\n"


def test_stop_tokens_are_the_tokenizers_and_generation_configs(tmp_path: Path) -> None:
    assert Tokenizer.load(chat_folder(tmp_path / "list", generation_eos=[258, 256])).stop_token_ids == (256, 258)
    assert Tokenizer.load(chat_folder(tmp_path / "int", generation_eos=258)).stop_token_ids == (256, 258)
    without_template = chat_folder(tmp_path / "plain", template=None, generation_eos=[258, 257])
    assert Tokenizer.load(without_template).stop_token_ids == (256, 258, 257)
    assert Tokenizer.load(chat_folder(tmp_path / "null", template=None, generation_eos=None)).stop_token_ids == (256,)


def test_the_templates_turn_end_stops_even_if_no_file_lists_it(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(chat_folder(tmp_path))
    assert tokenizer.stop_token_ids == (256, 258)


def test_worked_answer_ends_with_the_token_that_ends_the_turn(tmp_path: Path) -> None:
    with_template = Tokenizer.load(chat_folder(tmp_path / "chat", generation_eos=[256, 258]))
    plain = Tokenizer.load(chat_folder(tmp_path / "plain", template=None, generation_eos=[256, 258]))
    assert with_template.encode_answer("4")[1:] == [258]
    assert plain.encode_answer("4")[1:] == [256]
    assert with_template.decode(with_template.encode_answer(" a  b .")) == " a  b ."


def test_prompt_and_answer_together_are_the_templates_conversation(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path)
    tokenizer = Tokenizer.load(folder)
    whole = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "hé?"}, {"role": "assistant", "content": "yes"}], return_dict=False
    )
    ids = tokenizer.encode_prompt("hé?") + tokenizer.encode_answer("yes")
    assert whole[: len(ids)] == ids


def test_plain_prompt_keeps_bos_and_drops_eos(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path, template=None)
    content = json.loads((folder / "tokenizer.json").read_text())
    token = {"SpecialToken": {"id": IM_START, "type_id": 0}}, {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [token[0], {"Sequence": {"id": "A", "type_id": 0}}, token[1]],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            IM_START: {"id": IM_START, "ids": [257], "tokens": [IM_START]},
            END_OF_TEXT: {"id": END_OF_TEXT, "ids": [256], "tokens": [END_OF_TEXT]},
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode_prompt("a")
    assert ids[0] == 257 and len(ids) == 2
    assert 257 not in tokenizer.encode_answer("a")


def test_padding_falls_back_to_a_stop_token(tmp_path: Path) -> None:
    assert Tokenizer.load(chat_folder(tmp_path / "none")).pad_token_id == 256
    assert Tokenizer.load(chat_folder(tmp_path / "pad", pad=IM_START)).pad_token_id == 257


def test_save_keeps_template_and_stop_tokens(tmp_path: Path) -> None:
    first = Tokenizer.load(chat_folder(tmp_path / "a", generation_eos=[257, 256]))
    first.save(tmp_path / "b" / "weights")
    second = Tokenizer.load(tmp_path / "b" / "weights")
    assert second.stop_token_ids == first.stop_token_ids == (256, 257, 258)
    assert second.encode_prompt("x y") == first.encode_prompt("x y")
    assert second.pad_token_id == first.pad_token_id and second.vocab_size == first.vocab_size == 259


def test_an_id_without_a_token_is_not_dropped() -> None:
    tokenizer = Tokenizer.load(QUICKSTART)
    a, b = tokenizer.encode_prompt("ab")
    assert tokenizer.decode([a, 99, b, 98]) == "a\ufffdb\ufffd"
    assert tokenizer.decode([a, 0, b, 1]) == "ab"  # special tokens are skipped
    assert tokenizer.decode([]) == ""


def test_loading_uses_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("network access")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert Tokenizer.load(QUICKSTART).vocab_size == 97


# The quickstart's model folder


def test_quickstart_tokenizer_is_characters() -> None:
    tokenizer = Tokenizer.load(QUICKSTART)
    text = "".join(map(chr, range(32, 127)))
    assert tokenizer.encode_prompt(text) == list(range(2, 97))
    assert tokenizer.stop_token_ids == (1,) and tokenizer.pad_token_id == 0 and tokenizer.vocab_size == 97
    assert tokenizer.encode_answer("")[-1] == 1
    for exact in ("  two  spaces ", "a .b , c 's", " ", text):
        assert tokenizer.decode(tokenizer.encode_prompt(exact)) == exact
    assert AutoTokenizer.from_pretrained(QUICKSTART, local_files_only=True).is_fast


def test_quickstart_files_are_the_tools_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import make_char_tokenizer

    make_char_tokenizer.write(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert json.loads((tmp_path / name).read_text()) == json.loads((QUICKSTART / name).read_text()), name
    sys.modules.pop("make_char_tokenizer")


def test_quickstart_config_fits_its_tokenizer() -> None:
    config = AutoConfig.from_pretrained(QUICKSTART)
    assert config.model_type == "qwen3_moe" and config.architectures == ["Qwen3MoeForCausalLM"]
    tokenizer = Tokenizer.load(QUICKSTART)
    assert tokenizer.vocab_size <= config.vocab_size == 100
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.stop_token_ids[0])
    assert (config.num_experts, config.num_experts_per_tok, config.head_dim) == (8, 2, 32)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


# Bad input


def test_missing_folder_and_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no tokenizer in this folder; copy the model's tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_broken_tokenizer_file(tmp_path: Path) -> None:
    shutil.copytree(QUICKSTART, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        Tokenizer.load(tmp_path)


def test_no_stop_token_at_all(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path, template=None, eos=None)
    with pytest.raises(UserError, match=r"no stop token.*eos_token_id in generation_config.json"):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must hold a JSON object, found list"),
        ('{"eos_token_id": "x"}', "eos_token_id='x' must be a token id"),
        ('{"eos_token_id": [1, -3]}', r"eos_token_id=\[1, -3\]"),
    ],
)
def test_bad_generation_config(tmp_path: Path, text: str, message: str) -> None:
    shutil.copytree(QUICKSTART, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path)


def test_characters_without_a_token_are_refused() -> None:
    tokenizer = Tokenizer.load(QUICKSTART)
    with pytest.raises(UserError, match=r"cannot encode 'café\\n'.*\['\\n', 'é'\].*task.prompt_pattern"):
        tokenizer.encode_prompt("café\n")
    with pytest.raises(UserError, match="has no token"):
        tokenizer.encode_prompt("")


def test_failing_chat_template(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path, template="{{ raise_exception('only tools') }}")
    with pytest.raises(UserError, match=r"chat template fails.*only tools"):
        Tokenizer.load(folder)
