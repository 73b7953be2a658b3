"""Incremental decoding equals decoding at once, and never shows half a character."""

import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenspeed.engine.text.detokenizer import Detokenizer
from tokenspeed.engine.text.tokenizer import Tokenizer

FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def byte_ids(tokenizer, data):
    """One id per byte: the alphabet of byte-level BPE is in every vocabulary."""
    ids = {tokenizer.token_bytes(id): id for id in range(tokenizer.vocab_size) if id not in tokenizer.control_ids}
    return [ids[bytes([byte])] for byte in data]


@FEW
@given(data=st.data(), skip=st.booleans())
def test_after_each_id_at_most_one_unfinished_character_is_held_back(tokenizer, data, skip):
    known = st.integers(0, tokenizer.vocab_size + 20)  # ids past the vocabulary decode to nothing
    raw = st.binary(max_size=6).map(lambda content: byte_ids(tokenizer, content))
    text = st.text(max_size=4).map(tokenizer.encode)
    control = st.sampled_from(sorted(tokenizer.control_ids)).map(lambda id: [id])
    chunks = data.draw(st.lists(known.map(lambda id: [id]) | raw | text | control, max_size=8))
    ids = [id for chunk in chunks for id in chunk]

    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    shown = ""
    for i, id in enumerate(ids):
        shown += detokenizer.push(id)
        so_far = tokenizer.decode(ids[: i + 1], skip_special_tokens=skip)
        # Two: Python sees that the first two bytes of an encoded surrogate are invalid only at the third.
        assert so_far in (shown, shown + "\ufffd", shown + "\ufffd\ufffd")
    assert shown + detokenizer.finish() == tokenizer.decode(ids, skip_special_tokens=skip)


@FEW
@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=20))
def test_valid_text_cut_into_bytes_never_shows_a_replacement_character(tokenizer, text):
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(id) for id in byte_ids(tokenizer, text.encode())]
    assert "".join(pieces) == text and detokenizer.finish() == ""


def test_a_character_appears_with_its_last_byte(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(id) for id in byte_ids(tokenizer, "🙂a".encode())] == ["", "", "", "🙂", "a"]


def test_invalid_bytes_appear_at_once_and_an_unfinished_character_at_the_end(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(id) for id in byte_ids(tokenizer, b"\xff\xffa\xf0\x9f")] == [
        "\ufffd",
        "\ufffd",
        "a",
        "",
        "",
    ]
    assert detokenizer.finish() == "\ufffd"


def test_special_tokens_are_skipped_but_markup_is_not(tokenizer):
    ids = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<think>")]
    shown, hidden = Detokenizer(tokenizer, skip_special_tokens=False), Detokenizer(tokenizer)
    assert [shown.push(id) for id in ids] == ["<|im_end|>", "<think>"]
    assert [hidden.push(id) for id in ids] == ["", "<think>"]


def test_an_added_token_outside_the_byte_alphabet_reads_as_it_is_spelled(made_checkpoint):
    backend = tokenizers.Tokenizer.from_file(str(made_checkpoint / "tokenizer.json"))
    backend.add_tokens(["<a b 🙂>"])
    tokenizer = Tokenizer(backend)
    id = tokenizer.token_to_id("<a b 🙂>")
    assert Detokenizer(tokenizer).push(id) == tokenizer.decode([id]) == "<a b 🙂>"
