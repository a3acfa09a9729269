"""Incremental text equals the tokenizer's decoding of everything, up to the first stop string."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from manyhats.engine.detokenize import Detokenizer, StopFinder


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
    return Tokenizer.from_file(str(smollm2_path / "tokenizer.json"))


@pytest.fixture(scope="session")
def byte_fallback():
    """Of the Llama-2 kind: bytes as tokens, a marker for spaces, the first one dropped."""
    words = [f"<0x{i:02X}>" for i in range(256)] + ["▁Hello", "▁world", "b", "▁"]
    made = Tokenizer(
        models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True)
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return made


def run(tokenizer, ids, stops=()):
    """The pieces, and whether a push stopped; pieces after a stop are never asked for."""
    machine = Detokenizer(tokenizer, stops)
    pieces = []
    for token in ids:
        piece = machine.push(token)
        pieces.append(piece.text)
        if piece.stopped:
            break
    return [*pieces, machine.flush()], machine.stopped


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


TEXTS = [
    "Hello world",
    " two  leading and trailing  ",
    "naïve 日本語 👩‍👩‍👧‍👦 and 🇩🇪, עברית; e\u0301",
    "a\ufffdb\ufffd",
    "one<|im_end|>two<|im_start|>\n\n\t",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_real_text_comes_back_whole(smollm2, text):
    ids = smollm2.encode(text, add_special_tokens=False).ids
    pieces, stopped = run(smollm2, ids)
    assert "".join(pieces) == decode(smollm2, ids)
    assert not stopped
    if "<|" not in text:
        assert "".join(pieces) == text


def test_no_piece_holds_half_a_character(smollm2):
    ids = smollm2.encode("👩‍👩‍👧‍👦 日本語", add_special_tokens=False).ids
    pieces, _ = run(smollm2, ids)
    assert len(ids) > sum(map(bool, pieces)) > 3
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_is_shown_at_the_end_as_the_tokenizer_shows_it(smollm2):
    ids = smollm2.encode("ok 👩", add_special_tokens=False).ids[:-1]
    pieces, _ = run(smollm2, ids)
    assert not any("\ufffd" in piece for piece in pieces[:-1])
    assert "".join(pieces) == decode(smollm2, ids) == "ok \ufffd"


def token_lists(tokenizer):
    """Random ids, with the single bytes and special tokens as likely as all the rest."""
    bytes_ = st.integers(0, 300)
    return st.lists(st.one_of(bytes_, st.integers(0, tokenizer.get_vocab_size() - 1)), max_size=40)


@given(st.data())
def test_random_tokens_equal_the_full_decoding(smollm2, data):
    ids = data.draw(token_lists(smollm2))
    assert "".join(run(smollm2, ids)[0]) == decode(smollm2, ids)


def first_end(text, stops):
    """Where the stop that ends first begins, found by looking at ever longer prefixes."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts)
    return None


@given(st.data())
def test_stops_cut_where_they_first_occur(smollm2, data):
    ids = data.draw(token_lists(smollm2))
    text = decode(smollm2, ids)
    inside = st.integers(0, max(0, len(text) - 1)).flatmap(
        lambda at: st.integers(1, 6).map(lambda n: text[at : at + n])
    )
    stops = data.draw(st.lists(inside.filter(bool) if text else st.just("x"), max_size=4))
    pieces, stopped = run(smollm2, ids, stops)
    cut = first_end(text, stops)
    assert "".join(pieces) == text[:cut]
    assert stopped == (cut is not None)
    if len(stops) == 1 and stopped:
        assert cut == text.find(stops[0])


@given(st.data())
def test_the_stop_finder_does_not_depend_on_how_the_text_is_divided(data):
    text = data.draw(st.text("ab", max_size=40))
    stops = data.draw(st.lists(st.text("ab", min_size=1, max_size=6), max_size=4))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    finder, out, stopped = StopFinder(stops), "", False
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        piece, stopped = finder.push(text[start:end])
        out += piece
        # What is out can never have to be taken back, and nothing is held that no stop begins with.
        held = text[len(out) : end]
        if stopped:
            break
        assert held == "" or any(stop.startswith(held) for stop in stops)
    cut = first_end(text, stops)
    assert stopped == (cut is not None)
    assert out + finder.flush() == text[:cut]


def test_a_stop_over_several_tokens_with_characters_of_several_bytes(smollm2):
    text = "before 🙂é日 after it there is more"
    ids = smollm2.encode(text, add_special_tokens=False).ids
    pieces, stopped = run(smollm2, ids, ["never", "🙂é日"])
    assert stopped
    assert "".join(pieces) == "before "
    assert len(pieces) < len(ids)


def test_a_stop_that_only_begins_is_given_back_at_the_end(smollm2):
    ids = smollm2.encode("count: one, tw", add_special_tokens=False).ids
    machine = Detokenizer(smollm2, ["two"])
    before = "".join(machine.push(token).text for token in ids)
    assert before == "count: one, "
    assert machine.flush() == "tw"
    assert machine.flush() == ""
    assert not machine.stopped


def test_a_stop_in_the_unfinished_tail_is_cut_too(smollm2):
    ids = smollm2.encode("ok 👩", add_special_tokens=False).ids[:-1]
    pieces, stopped = run(smollm2, ids, ["\ufffd"])
    assert "".join(pieces) == "ok "
    assert stopped


def test_nothing_follows_a_stop(smollm2):
    machine = Detokenizer(smollm2, ["l"])
    piece = machine.push(smollm2.encode("Hello", add_special_tokens=False).ids[0])
    assert (piece.text, piece.stopped) == ("He", True)
    assert machine.flush() == ""
    with pytest.raises(RuntimeError, match="stopped"):
        machine.push(5)


def test_an_empty_stop_is_refused(smollm2):
    with pytest.raises(ValueError, match="empty"):
        Detokenizer(smollm2, ["x", ""])


def test_ids_beyond_the_tokenizer_are_silent_as_in_its_decoding(smollm2):
    ids = [smollm2.encode("Hi", add_special_tokens=False).ids[0], 10**6, 100]
    assert "".join(run(smollm2, ids)[0]) == decode(smollm2, ids)


def test_byte_fallback_with_valid_text(byte_fallback):
    emoji = list("é🙂".encode())
    ids = [256, *emoji, 257, 258, 259, *emoji[:2], 256]
    pieces, _ = run(byte_fallback, ids)
    assert pieces[0] == "Hello"
    assert "".join(pieces) == decode(byte_fallback, ids) == "Helloé🙂 worldb é Hello"


def test_byte_fallback_with_broken_bytes_keeps_what_was_given_out(byte_fallback):
    # The full decoding turns the whole run of bytes into U+FFFD; the "a" is out by then.
    assert "".join(run(byte_fallback, [0x61, 0xFF, 258])[0]) == "a\ufffdb"
    assert "".join(run(byte_fallback, [0x61, 0xFF])[0]) == "a\ufffd"
    rng = random.Random(3)
    for _ in range(500):
        ids = [rng.choice([256, 257, 258, 259, 0x61, rng.randrange(256)]) for _ in range(12)]
        pieces, _ = run(byte_fallback, ids)
        shown, full = "".join(pieces), decode(byte_fallback, ids)
        words = [shown.replace("\ufffd", ""), full.replace("\ufffd", "")]
        assert words[0].count("Hello") == words[1].count("Hello") == ids.count(256)
