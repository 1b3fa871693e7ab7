"""Streamed text: complete characters, stop strings across tokens, no text held longer than needed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from small_tokenizer import SIZE, write_tokenizer

from dspark_ray.text.stream import TextStream
from dspark_ray.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_directory(write_tokenizer(Path(tmp_path_factory.mktemp("tokenizer"))))


def pieces(ids: list[int], draw: random.Random) -> list[list[int]]:
    """The ids cut at random places; some pieces are empty."""
    cuts = sorted(draw.randrange(len(ids) + 1) for _ in range(draw.randrange(6)))
    return [ids[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(ids)])]


def streamed(stream: TextStream, parts: list[list[int]]) -> str:
    return "".join(stream.push(part).text for part in parts) + stream.flush()


@pytest.mark.parametrize("seed", range(5))
def test_any_split_of_any_tokens_gives_the_decoded_text(tokenizer: Tokenizer, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(60):
        ids = [draw.randrange(SIZE) for _ in range(draw.randrange(60))]
        assert streamed(TextStream(tokenizer), pieces(ids, draw)) == tokenizer.decode(ids)


@pytest.mark.parametrize("include_stop", [False, True])
def test_any_split_ends_at_the_stop_string_that_completes_first(tokenizer: Tokenizer, include_stop: bool) -> None:
    draw, stops = random.Random(7), ("abab", "bb", "cabé", "ca")
    for _ in range(300):
        text = "".join(draw.choice("abcé") for _ in range(draw.randrange(20)))
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        end, start = min(ends, default=(len(text), len(text)))
        stream = TextStream(tokenizer, stops, include_stop)
        assert streamed(stream, pieces(tokenizer.encode(text), draw)) == text[: end if include_stop else start]


def test_an_unfinished_character_waits(tokenizer: Tokenizer) -> None:
    stream, ids = TextStream(tokenizer), tokenizer.encode("🙂")
    assert [stream.push([token]).text for token in ids] == ["", "", "", "🙂"]


def test_a_character_that_stays_unfinished_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    assert stream.push(tokenizer.encode("é")[:1]).text == ""
    assert stream.flush() == "\ufffd"


def test_bytes_that_begin_no_character_do_not_hold_back_what_follows(tokenizer: Tokenizer) -> None:
    lone = tokenizer.encode("é")[1]
    assert TextStream(tokenizer).push([lone] * 50 + tokenizer.encode("x")).text == "\ufffd" * 50 + "x"


def test_only_the_beginning_of_a_stop_string_waits(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ("stop",))
    assert [stream.push(tokenizer.encode(text)).text for text in ("go st", "ay s", "!")] == ["go ", "stay ", "s!"]


def test_an_unfinished_stop_string_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ("stop",))
    assert (stream.push(tokenizer.encode("a sto")).text, stream.flush()) == ("a ", "sto")


def test_a_stop_string_is_found_across_pushes(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ("stop",))
    stream.push(tokenizer.encode("a st"))
    delta = stream.push(tokenizer.encode("op and on"))
    assert (delta.text, delta.stopped, delta.stop) == ("", True, "stop")


def test_tokens_are_kept_up_to_the_one_that_completes_the_stop_string(tokenizer: Tokenizer) -> None:
    delta = TextStream(tokenizer, ("bc",)).push(tokenizer.encode("abcd"))
    assert (delta.text, delta.num_tokens_kept) == ("a", 3)


def test_without_a_stop_string_all_tokens_are_kept(tokenizer: Tokenizer) -> None:
    assert TextStream(tokenizer, ("x",)).push(tokenizer.encode("abcd")).num_tokens_kept == 4


def test_after_a_stop_string_nothing_more_is_shown(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ("b",))
    stream.push(tokenizer.encode("ab"))
    delta = stream.push(tokenizer.encode("more"))
    assert (delta.text, delta.num_tokens_kept, stream.flush()) == ("", 0, "")


def test_the_stop_string_is_shown_on_request(tokenizer: Tokenizer) -> None:
    assert TextStream(tokenizer, ("bc",), include_stop=True).push(tokenizer.encode("abcd")).text == "abc"


def test_a_marker_can_be_a_stop_string(tokenizer: Tokenizer) -> None:
    delta = TextStream(tokenizer, ("</think>",)).push(tokenizer.encode("yes</think>no"))
    assert (delta.text, delta.stopped) == ("yes", True)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_stop_string_before_min_tokens_is_text(tokenizer: Tokenizer, size: int) -> None:
    stream, ids = TextStream(tokenizer, ("ab",), min_tokens=3), tokenizer.encode("ababab")
    deltas = [stream.push(ids[start : start + size]) for start in range(0, len(ids), size)]
    assert "".join(delta.text for delta in deltas) + stream.flush() == "ab"
    assert sum(delta.num_tokens_kept for delta in deltas) == 4


def test_special_tokens_are_shown_on_request(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("a"), tokenizer.eos_token_id]
    assert TextStream(tokenizer, show_special=True).push(ids).text == "a<｜end▁of▁sentence｜>"
    assert TextStream(tokenizer).push(ids).text == "a"


def test_a_stop_string_that_ended_before_min_tokens_does_not_stop_the_text_later(tokenizer: Tokenizer) -> None:
    """Not even where it is a part of text that another stop string holds back."""
    ids = [token for letter in "abababab" for token in tokenizer.encode(letter)]
    assert len(ids) == 8

    def shown(min_tokens: int, stops: tuple[str, ...]) -> str:
        return streamed(TextStream(tokenizer, stops, min_tokens=min_tokens), [[token] for token in ids])

    assert [shown(least, ("ab",)) for least in (1, 2, 3, 4, 5)] == ["", "", "ab", "ab", "abab"]
    assert shown(4, ("b", "abab")) == ""
    assert shown(5, ("b", "baba")) == "a"
    assert shown(6, ("b", "baba")) == "ababa"
