"""A tokenizer of single bytes and the markers of the chat form, built without training."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dspark_ray.text.messages.deepseek_v4 import SPECIAL

BOS, EOS, NOISE = 0, 1, 2
_MARKERS = (SPECIAL.user, SPECIAL.assistant, SPECIAL.think_start, SPECIAL.think_end)
NUM_TOKENS = 3 + 256 + len(_MARKERS)


def save_byte_tokenizer(directory: Path) -> None:
    """Write tokenizer.json with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [SPECIAL.bos, SPECIAL.eos, "<noise>", *alphabet]
    backend = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names[:3]])
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in _MARKERS])
    assert backend.get_vocab_size() == NUM_TOKENS
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
