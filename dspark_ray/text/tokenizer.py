"""Text to tokens and back, by a checkpoint's `tokenizer.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from dspark_ray.config import ConfigError
from dspark_ray.text.messages.deepseek_v4 import SPECIAL, Message, PromptPart, render, render_parts


class TokenizerError(ConfigError):
    """An unusable tokenizer; the message names the file and the problem."""


class Tokenizer:
    """A byte-level BPE tokenizer: every token is a sequence of bytes; special tokens are empty in text."""

    def __init__(self, backend: tokenizers.Tokenizer, bos_token_id: int, eos_token_id: int) -> None:
        self._backend = backend
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id

    @staticmethod
    def from_directory(path: Path | str) -> Tokenizer:
        """Read `tokenizer.json`, and `tokenizer_config.json` if there is one.

        Raises TokenizerError for missing or unsupported files.
        """
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise TokenizerError(f"{file}: no such file; expected a checkpoint folder with a tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises no narrower type
            raise TokenizerError(f"{file}: expected a tokenizer, found {error}") from None
        if not _is_byte_level(json.loads(backend.to_str())["decoder"]):
            raise TokenizerError(f"{file}: expected a ByteLevel decoder, found another one")
        ids = _named_ids(path / "tokenizer_config.json", backend, bos_token=SPECIAL.bos, eos_token=SPECIAL.eos)
        return Tokenizer(backend, ids["bos_token"], ids["eos_token"])

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's vocabulary may be larger."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def longest_token(self) -> int | None:
        """Largest number of characters per token, which bounds the number of tokens of a text from below.

        None if the tokenizer may drop characters.
        """
        content = json.loads(self._backend.to_str())
        normalizer = content["normalizer"] or {}
        may_shrink = normalizer.get("normalizers", normalizer)
        swallows = any(token["lstrip"] or token["rstrip"] for token in content["added_tokens"])
        if may_shrink or swallows:
            return None
        # Byte-level BPE spells a token with one character per byte, and a text has at most as many characters as bytes.
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without added tokens; special strings in it become special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for each text, without holding the GIL."""
        return _ids(self._backend, texts)

    def encode_parts(self, parts: Sequence[PromptPart]) -> list[int]:
        """Token ids of a prompt: only markers become control tokens. Does not hold the GIL while encoding."""
        texts = iter(_ids(self._literal, [part.text for part in parts if not part.is_marker]))
        ids: list[int] = []
        for part in parts:
            ids += self._marker_ids(part.text) if part.is_marker else next(texts)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, without special tokens; invalid UTF-8 becomes U+FFFD."""
        return self._backend.decode(list(token_ids), skip_special_tokens=True)

    def token_bytes(self, token_id: int, special: bool = False) -> bytes:
        """Bytes that one token adds to the text; empty for unknown ids.

        Special tokens are empty too, unless `special` is set.
        """
        added = self._added.get(token_id)
        if added is not None:
            return b"" if added.special and not special else added.content.encode()
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else bytes(_BYTES[character] for character in token)

    def apply_chat(self, messages: Sequence[Message], **options: Any) -> str:
        """The prompt of a conversation as one string; see `dspark_ray.text.messages.deepseek_v4.render`."""
        return render(messages, **options)

    def encode_chat(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """Token ids of the prompt of a conversation; see `dspark_ray.text.messages.deepseek_v4.render_parts`."""
        return self.encode_parts(render_parts(messages, **options))

    @cached_property
    def _added(self) -> dict[int, tokenizers.AddedToken]:
        return dict(self._backend.get_added_tokens_decoder())

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        """The tokenizer without added tokens: it encodes markers as plain text."""
        content = json.loads(self._backend.to_str())
        content["added_tokens"] = []
        return tokenizers.Tokenizer.from_str(json.dumps(content))

    def _marker_ids(self, marker: str) -> list[int]:
        token_id = self._backend.token_to_id(marker)
        return [token_id] if token_id is not None else self.encode(marker)


def _ids(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _bytes_by_character() -> dict[str, int]:
    """Byte-level BPE spells printable Latin-1 bytes as themselves and the others, in order, from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_BYTES = _bytes_by_character()


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    if decoder is None:
        return False
    return decoder["type"] == "ByteLevel" or any(_is_byte_level(inner) for inner in decoder.get("decoders", ()))


def _named_ids(file: Path, backend: tokenizers.Tokenizer, **defaults: str) -> dict[str, int]:
    """Ids of the tokens that `tokenizer_config.json` names under these keys, with defaults."""
    names = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ids = {}
    for key, default in defaults.items():
        named = names.get(key) or default
        content = named["content"] if isinstance(named, dict) else named
        token_id = backend.token_to_id(content)
        if token_id is None:
            raise TokenizerError(f"{file}: {key}={content!r}: expected a token of tokenizer.json")
        ids[key] = token_id
    return ids
