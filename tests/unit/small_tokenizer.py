"""A byte-level tokenizer like a checkpoint's, without merges: one token per byte, and some special ones."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from dspark_ray.text.messages.deepseek_v4 import SPECIAL

BOS_ID, EOS_ID = 256, 257
MARKERS = (SPECIAL.user, SPECIAL.assistant, SPECIAL.think_start, SPECIAL.think_end, SPECIAL.dsml)
SIZE = 258 + len(MARKERS) + 1


def write_tokenizer(directory: Path) -> Path:
    """Write tokenizer.json and tokenizer_config.json of `SIZE` tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({character: n for n, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in (SPECIAL.bos, SPECIAL.eos)])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKERS])
    backend.add_special_tokens([AddedToken("<｜noise｜>", special=True)])
    backend.save(str(directory / "tokenizer.json"))
    names = {"bos_token": SPECIAL.bos, "eos_token": {"content": SPECIAL.eos}}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    return directory
