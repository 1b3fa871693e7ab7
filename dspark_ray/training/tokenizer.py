"""Train the tiny model's byte-level tokenizer and encode its corpus into token streams."""

import argparse
import json
import math
import random
import re
from collections.abc import Iterable, Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from dspark_ray.training.corpus import (
    ASSISTANT,
    KINDS,
    THINK_END,
    USER,
    Document,
    documents_of_kind,
    lines_of,
)

VOCABULARY_SIZE = 1024
MODEL_MAX_LENGTH = 8192

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
THINK_START = "<think>"
DSML = "｜DSML｜"
NOISE = "<｜noise｜>"

FIRST_SPECIAL = (BOS, EOS, PAD)
MARKERS = (USER, ASSISTANT, THINK_START, THINK_END, DSML)

LONGEST_DOCUMENT = 4096

# Shares of the tokens of the training stream.
MIX = {"code": 0.60, "prose": 0.15, "arithmetic": 0.15, "chat": 0.10}

_TRAINING_CHARACTERS = 16_000_000
_BATCH = 256


def train_tokenizer(directory: Path, texts: Iterable[str] | None = None) -> None:
    """Train the tokenizer on the corpus, or on other texts, and save it into a directory."""
    tokenizer = _untrained_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(MARKERS) - 1,
        special_tokens=[AddedToken(token, special=True) for token in FIRST_SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    plain = map(_without_markers, _sample_texts() if texts is None else texts)
    tokenizer.train_from_iterator(plain, trainer)
    # The markers stay in decoded text, where the chat and tool parsers look for them.
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKERS])
    tokenizer.add_special_tokens([AddedToken(NOISE, special=True, normalized=False)])
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size != VOCABULARY_SIZE:
        raise ValueError(f"the texts gave {size} of {VOCABULARY_SIZE} tokens: train on more text")
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_config(directory / "tokenizer_config.json")


def _untrained_tokenizer() -> Tokenizer:
    """Build the byte-level pipeline, which is lossless."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _without_markers(text: str) -> str:
    """Remove chat markers, so that no merge is spent on spelling them."""
    return re.sub("|".join(map(re.escape, MARKERS)), "\n", text)


def _sample_texts() -> Iterator[str]:
    """Yield training documents of each kind up to its share of the training characters."""
    for kind in KINDS:
        missing = MIX[kind] * _TRAINING_CHARACTERS
        for document in _shuffled(kind, "train", seed=0):
            if missing <= 0:
                break
            missing -= len(document.text)
            yield document.text


def _write_config(path: Path) -> None:
    """Write tokenizer_config.json for transformers."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MODEL_MAX_LENGTH,
    }
    path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def encode_corpus(tokenizer_file: Path, output: Path, max_tokens: int | None, seed: int = 0) -> None:
    """Write the token streams of both splits, documents shuffled and kinds mixed.

    Without a limit the training stream holds the library's code once. With one, the library is
    repeated as often as its share needs, each time beside newly generated documents. The
    held-out stream never repeats a document.
    """
    if max_tokens is not None and max_tokens < LONGEST_DOCUMENT:
        raise ValueError(f"a corpus needs at least {LONGEST_DOCUMENT} tokens, not {max_tokens}")
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    output.mkdir(parents=True, exist_ok=True)
    _write_stream(_mixed(tokenizer, "train", max_tokens, seed), output / "train.npy", seed)
    _write_stream(_mixed(tokenizer, "heldout", None, seed), output / "heldout.npy", seed)


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> Iterator[np.ndarray]:
    """Encode texts between begin and end markers; texts that are too long are cut until all pieces fit."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    while texts:
        too_long: list[str] = []
        for text, encoding in zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
            ids = encoding.ids
            if len(ids) + 2 > LONGEST_DOCUMENT:
                too_long += _cut(text, len(ids))
            else:
                yield np.array([bos, *ids, eos], dtype=np.uint16)
        texts = too_long


def _mixed(tokenizer: Tokenizer, split: str, max_tokens: int | None, seed: int) -> list[np.ndarray]:
    """Collect the encoded documents of every kind up to its share."""
    collected: dict[str, list[np.ndarray]] = {}
    passes = None if split == "train" else 1
    if max_tokens is None:
        collected["code"] = list(_encoded_pass(tokenizer, "code", split, seed))
        max_tokens = math.ceil(_length(collected["code"]) / MIX["code"])
    for kind in KINDS:
        if kind not in collected:
            wanted = round(MIX[kind] * max_tokens)
            collected[kind] = _collect(tokenizer, kind, split, wanted, seed, passes)
        tokens = _length(collected[kind])
        print(f"{split}: {kind}: {tokens} tokens, {len(collected[kind])} documents", flush=True)
    return [piece for kind in KINDS for piece in collected[kind]]


def _collect(
    tokenizer: Tokenizer, kind: str, split: str, wanted: int, seed: int, passes: int | None
) -> list[np.ndarray]:
    """Encode documents of one kind, pass after pass, until there are enough tokens."""
    pieces: list[np.ndarray] = []
    missing = wanted
    for number in count() if passes is None else range(passes):
        before = missing
        for piece in _encoded_pass(tokenizer, kind, split, seed + number):
            if missing <= 0:
                return pieces
            missing -= len(piece)
            pieces.append(piece)
        if missing == before:
            return pieces
        print(f"{split}: {kind}: pass {number + 1}, {wanted - missing}/{wanted}", flush=True)
    return pieces


def _encoded_pass(tokenizer: Tokenizer, kind: str, split: str, seed: int) -> Iterator[np.ndarray]:
    """Encode one pass over the documents of one kind in shuffled order."""
    texts = (document.text for document in _shuffled(kind, split, seed))
    while batch := list(islice(texts, _BATCH)):
        yield from encode_documents(tokenizer, batch)


def _shuffled(kind: str, split: str, seed: int) -> list[Document]:
    """List one pass over the documents of one kind in an order that the seed decides."""
    found = list(documents_of_kind(kind, split, seed))
    random.Random(f"order:{kind}:{split}:{seed}").shuffle(found)
    return found


def _cut(text: str, tokens: int) -> list[str]:
    """Cut a text at line ends into pieces of about equal length; none if it is a single line."""
    lines = lines_of(text)
    if len(lines) == 1:
        # Only tables of data have lines this long, and a model learns nothing from them.
        return []
    # A margin below the limit, because pieces differ in length and few should need a second cut.
    parts = math.ceil(tokens / (0.85 * LONGEST_DOCUMENT))
    pieces: list[str] = []
    piece, ends = "", 0
    for line in lines:
        piece += line
        if ends + len(piece) >= len(text) * (len(pieces) + 1) / parts:
            pieces.append(piece)
            ends += len(piece)
            piece = ""
    if piece:
        pieces.append(piece)
    # With a very long last line the only piece would be the full text, indefinitely.
    return pieces if len(pieces) > 1 else ["".join(lines[:-1]), lines[-1]]


def _length(pieces: list[np.ndarray]) -> int:
    """Count the tokens of pieces."""
    return sum(map(len, pieces))


def _write_stream(pieces: list[np.ndarray], path: Path, seed: int) -> None:
    """Shuffle pieces and write their concatenation."""
    random.Random(f"stream:{seed}").shuffle(pieces)
    stream = np.concatenate(pieces)
    np.save(path, stream)
    print(f"{path.name}: {len(stream)} tokens, {len(pieces)} documents", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Train the tokenizer and encode the corpus from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="output folder")
    parser.add_argument("--tokens", type=int, help="training tokens (default: all code once)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    train_tokenizer(options.output)
    print(f"tokenizer: {VOCABULARY_SIZE} tokens", flush=True)
    encode_corpus(options.output / "tokenizer.json", options.output, options.tokens, options.seed)


if __name__ == "__main__":
    main()
