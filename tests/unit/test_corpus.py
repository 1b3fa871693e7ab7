"""Tests of the tiny model's corpus and tokenizer on a small made-up library."""

from itertools import islice
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from dspark_ray.training import corpus, tokenizer
from dspark_ray.training.corpus import documents, held_out_prompts

MODULES = 300

PROSE = "\n".join(f"    Line {number} explains one more thing in plain words." for number in range(9))


def _module(number: int) -> str:
    """Write one module whose texts no other module shares."""
    return (
        f'"""Module number {number} of a made-up library.\n\n{PROSE}\n"""\n\n\n'
        f"def function_{number}(value):\n"
        f'    """Return the value with {number} added to it.\n\n{PROSE}\n    """\n'
        f"    return value + {number}\n\n\nTABLE = {list(range(40))}\n"
    )


@pytest.fixture(autouse=True)
def few_generated_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generate few documents, which is all that these tests need."""
    few = {"arithmetic": 20, "chat": 20}
    monkeypatch.setattr(corpus, "_GENERATED_DOCUMENTS", {"train": few, "heldout": few})


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a library of ordinary modules, test modules and files that must not be read."""
    root = tmp_path_factory.mktemp("library")
    for folder in ("package", "test", "site-packages"):
        (root / folder).mkdir()
    for number in range(MODULES):
        (root / "package" / f"module_{number}.py").write_text(_module(number))
        (root / "test" / f"test_{number}.py").write_text(_module(number + MODULES))
    (root / "site-packages" / "installed.py").write_text(_module(-1))
    (root / "latin.py").write_bytes(b"# caf\xe9\n")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a tokenizer on two modules and a few generated documents."""
    directory = tmp_path_factory.mktemp("tokenizer")
    generated = corpus.documents_of_kind("chat", "heldout", library=directory)
    texts = [Path(module.__file__).read_text() for module in (pytest, corpus, tokenizer)]
    texts += [document.text for document in islice(generated, 100)]
    tokenizer.train_tokenizer(directory, texts)
    return directory


@pytest.mark.parametrize("split", corpus.SPLITS)
def test_documents_are_deterministic(library: Path, split: str) -> None:
    first = list(documents(split, library=library))
    assert first == list(documents(split, library=library))
    assert {document.kind for document in first} == set(corpus.KINDS)


def test_seed_changes_generated_documents_only_within_their_split(library: Path) -> None:
    first = {document.text for document in documents("heldout", 0, library)}
    other = {document.text for document in documents("heldout", 1, library)}
    train = {document.text for document in documents("train", 2, library)}
    assert first != other
    assert not (first | other) & train


def test_held_out_documents_are_not_trained_on(library: Path) -> None:
    train = list(documents("train", library=library))
    held_out = list(documents("heldout", library=library))
    assert not {document.name for document in train} & {document.name for document in held_out}
    train_code = "\0".join(document.text for document in train if document.kind == "code")
    for document in held_out:
        if document.kind == "code":
            assert document.text not in train_code


def test_tests_are_capped_and_foreign_files_left_out(library: Path) -> None:
    both = [
        document for split in corpus.SPLITS for document in corpus.documents_of_kind("code", split, library=library)
    ]
    in_tests = sum(len(document.text) for document in both if "/test/" in document.name)
    assert 0 < in_tests <= sum(len(document.text) for document in both) / 3
    assert not [document for document in both if "installed" in document.name]
    assert not [document for document in both if "latin" in document.name]


@pytest.mark.parametrize("kind", corpus.KINDS)
def test_prompts_come_from_held_out_documents(library: Path, kind: str) -> None:
    prompts = held_out_prompts(kind, 5, library=library)
    assert prompts == held_out_prompts(kind, 5, library=library)
    assert len(set(prompts)) == 5
    held_out = [document.text for document in documents("heldout", library=library)]
    for prompt in prompts:
        assert any(prompt in text for text in held_out)
        if kind == "chat":
            assert prompt.endswith("<｜Assistant｜></think>")
        else:
            assert prompt.endswith("\n")
        if kind in ("code", "prose"):
            assert 200 <= len(prompt) <= 600


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="kind"):
        held_out_prompts("poetry", 1)
    with pytest.raises(ValueError, match="split"):
        next(documents("validation"))


def test_special_tokens_have_fixed_ids(trained: Path) -> None:
    loaded = Tokenizer.from_file(str(trained / "tokenizer.json"))
    ids = [loaded.token_to_id(token) for token in tokenizer.FIRST_SPECIAL]
    assert ids == [0, 1, 2]
    ids = [loaded.token_to_id(token) for token in (*tokenizer.MARKERS, tokenizer.NOISE)]
    assert ids == list(range(1018, 1024))
    assert loaded.get_vocab_size(with_added_tokens=True) == 1024


def test_chat_documents_are_encoded_in_chat_form(trained: Path) -> None:
    loaded = Tokenizer.from_file(str(trained / "tokenizer.json"))
    text = corpus.render_chat_prompt("What is 17 + 25?", "Be brief.") + "17 + 25 = 42."
    [ids] = tokenizer.encode_documents(loaded, [text])

    def plain(part: str) -> list[int]:
        return loaded.encode(part).ids

    expected = [0, *plain("Be brief."), 1018, *plain("What is 17 + 25?"), 1019, 1021]
    assert ids.tolist() == [*expected, *plain("17 + 25 = 42."), 1]
    assert loaded.decode(ids.tolist(), skip_special_tokens=True) == text


def test_long_documents_are_cut_into_whole_lines(trained: Path) -> None:
    loaded = Tokenizer.from_file(str(trained / "tokenizer.json"))
    text = "".join(f"value_{number} = {number} * 3\n" for number in range(2000)) + "9" * 5000
    pieces = list(tokenizer.encode_documents(loaded, [text]))
    assert max(map(len, pieces)) <= tokenizer.LONGEST_DOCUMENT
    decoded = [loaded.decode(piece.tolist()) for piece in pieces]
    assert len(decoded) > 3
    assert all(piece.startswith("value_") and piece.endswith("* 3\n") for piece in decoded)


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\treturn  x\n\n\n    \n  # trailing   \r\n",
        "naïve ｜ ▁ 漢字 👩‍👩‍👧 \u2028\u00a0\x00\x0c e\u0301",
        "  12345 - 6_789.0e-5,,  !",
        "a , b . c ' s n't <think>inside</think>",
        "",
    ],
)
def test_any_text_survives_encoding(trained: Path, text: str) -> None:
    loaded = Tokenizer.from_file(str(trained / "tokenizer.json"))
    assert loaded.decode(loaded.encode(text).ids) == text
    wrapped = PreTrainedTokenizerFast.from_pretrained(str(trained))
    assert wrapped.decode(wrapped(text)["input_ids"], skip_special_tokens=True) == text
    assert (wrapped.bos_token_id, wrapped.eos_token_id, wrapped.pad_token_id) == (0, 1, 1)
