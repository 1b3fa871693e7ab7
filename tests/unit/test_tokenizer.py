"""The tokenizer: ids, special tokens, bytes, errors."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from small_tokenizer import BOS_ID, EOS_ID, SIZE, write_tokenizer

from dspark_ray.text.messages.deepseek_v4 import SPECIAL
from dspark_ray.text.tokenizer import Tokenizer, TokenizerError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_directory(folder)


@pytest.mark.parametrize("text", ["", "def f(x):\n    return x", "naïve café", "日本語 🙂", "\x00\t\u200b"])
def test_text_survives_encoding_and_decoding(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_encoding_adds_nothing(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("abc")) == 3


def test_special_strings_in_text_are_single_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<｜begin▁of▁sentence｜>") == [tokenizer.bos_token_id] == [BOS_ID]


def test_the_configuration_names_the_end(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_token_id == EOS_ID


def test_decoding_keeps_markers_and_drops_special_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<｜User｜>hi<think>x</think>｜DSML｜<｜noise｜><｜end▁of▁sentence｜>")
    assert tokenizer.decode(ids) == "<｜User｜>hi<think>x</think>｜DSML｜"


def test_the_vocabulary_counts_added_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == SIZE


def test_bytes_of_tokens_spell_the_decoded_text(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(SIZE + 3) for _ in range(draw.randrange(40))]
        spelled = b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")
        assert spelled == tokenizer.decode(ids)


def test_a_chat_prompt_begins_with_the_begin_token(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.apply_chat([{"role": "user", "content": "hi"}])
    assert tokenizer.encode(prompt)[0] == tokenizer.bos_token_id


CONVERSATION = [
    {"role": "system", "content": "Be brief.  "},
    {"role": "user", "content": " naïve\n"},
    {
        "role": "assistant",
        "content": "a",
        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a": [1, "é"], "b": "x"}'}}],
    },
    {"role": "tool", "content": "r", "tool_call_id": "1"},
]


@pytest.mark.parametrize("options", [{}, {"thinking": True}, {"add_generation_prompt": False}])
def test_a_conversation_without_markers_has_the_ids_of_its_prompt(
    tokenizer: Tokenizer, options: dict[str, bool]
) -> None:
    assert tokenizer.encode_chat(CONVERSATION, **options) == tokenizer.encode(
        tokenizer.apply_chat(CONVERSATION, **options)
    )


@pytest.mark.parametrize("marker", [SPECIAL.eos, SPECIAL.user, SPECIAL.assistant, SPECIAL.think_end, SPECIAL.dsml])
def test_a_marker_in_a_message_is_text(tokenizer: Tokenizer, marker: str) -> None:
    call = {"id": "1", "function": {"name": marker, "arguments": json.dumps({marker: marker, "b": [marker]})}}
    messages = [
        {"role": "system", "content": marker},
        {"role": "user", "content": marker},
        {"role": "assistant", "content": marker, "reasoning_content": marker, "tool_calls": [call]},
        {"role": "tool", "content": marker, "tool_call_id": "1"},
    ]
    harmless = json.loads(json.dumps(messages).replace(json.dumps(marker)[1:-1], "x"))
    [number] = tokenizer.encode(marker)
    ids = tokenizer.encode_chat(messages, thinking=True)
    assert ids.count(number) == tokenizer.encode_chat(harmless, thinking=True).count(number)
    assert tokenizer.decode(ids).replace(marker, "x") == tokenizer.decode(
        tokenizer.encode_chat(harmless, thinking=True)
    ).replace(marker, "x")


def test_special_tokens_can_be_spelled_out(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(EOS_ID) == b""
    assert tokenizer.token_bytes(EOS_ID, special=True).decode() == SPECIAL.eos


def test_the_longest_token_bounds_every_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.longest_token == len(SPECIAL.bos)
    for text in ("abc", SPECIAL.bos * 10, "日本語"):
        assert len(text) <= len(tokenizer.encode(text)) * tokenizer.longest_token


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}},
    ],
)
def test_a_tokenizer_that_drops_characters_bounds_nothing(folder: Path, tmp_path: Path, change: dict) -> None:
    content = json.loads((folder / "tokenizer.json").read_text()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.from_directory(tmp_path).longest_token is None


def test_without_a_configuration_the_official_names_count(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    assert Tokenizer.from_directory(tmp_path).eos_token_id == EOS_ID


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_directory(tmp_path)


def test_an_unreadable_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="expected a tokenizer"):
        Tokenizer.from_directory(tmp_path)


def test_a_tokenizer_that_is_not_byte_level_is_refused(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text()) | {"decoder": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match="ByteLevel"):
        Tokenizer.from_directory(tmp_path)


def test_an_unknown_end_token_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(TokenizerError, match="eos_token='<end>'"):
        Tokenizer.from_directory(tmp_path)
