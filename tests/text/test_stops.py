"""Stop strings: the same text and the same end however the text is cut into pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenspeed.engine.text.stops import StopStrings

LETTERS = "ab<|é"


def found_first(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Letter by letter: the text before the first stop string that is complete, of several the longest."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def run(pieces: list[str], stops: list[str], include: bool) -> tuple[list[str], str | None]:
    search, out = StopStrings(stops, include), []
    for piece in pieces:
        text, found = search.push(piece)
        out.append(text)
        if found is not None:
            return out, found
    return [*out, search.finish()], None


@given(
    st.lists(st.text(LETTERS, max_size=4), max_size=10),
    st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_pieces_give_what_the_whole_text_gives(pieces, stops, include):
    out, found = run(pieces, stops, include)
    assert ("".join(out), found) == found_first("".join(pieces), stops, include)


@given(st.lists(st.text(LETTERS, max_size=4), max_size=10), st.text(LETTERS, min_size=1, max_size=4))
def test_only_text_that_may_begin_a_stop_string_is_held_back(pieces, stop):
    search, text, said = StopStrings([stop], False), "", ""
    for piece in pieces:
        text += piece
        out, found = search.push(piece)
        if found:
            return
        said += out
        held = text[len(said) :]
        assert said + held == text and len(held) < len(stop) and stop.startswith(held)
        longer = [n for n in range(len(held) + 1, len(stop)) if text.endswith(stop[:n])]
        assert not longer, "what may begin the stop string was said"


@pytest.mark.parametrize("include", [False, True])
def test_nothing_is_held_back_once_a_stop_string_was_found(include):
    search = StopStrings(["bcd"], include)
    assert search.push("ab") == ("a", None)
    assert search.push("cde") == ("bcd" if include else "", "bcd")
    assert search.finish() == ""


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize("include", [False, True])
def test_before_the_end_of_the_reasoning_a_stop_string_is_text(size, include):
    thought, said, rest = "one stop, <two> stop </think", "three </think>four ", "stop five"
    text = thought + ">" + said + rest
    stops = StopStrings(["stop"], include, after="</think>")
    told, found = "", None
    for at in range(0, len(text), size):
        piece, found = stops.push(text[at : at + size])
        told += piece
        if found:
            break
    assert found == "stop" and told == thought + ">" + said + ("stop" if include else "")


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("early", range(12))
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_string_may_begin_where_none_may_end(include, early, size):
    """Against a plain search of the whole text for what ends behind the first `early` characters."""
    stops, text = ["ab", "xabz", "bz"], "xabxabzabq!"
    ends = [(at + len(s), -len(s), s) for s in stops for at in range(len(text)) if text.startswith(s, at)]
    end, length, wanted = min([found for found in ends if found[0] > early], default=(len(text), 0, None))
    search, told, found = StopStrings(stops, include), "", None
    for at in [*range(0, early, size), *range(early, len(text), size)]:
        late = at >= early
        piece, found = search.push(text[at : min(at + size, len(text) if late else early)], late)
        told += piece
        if found:
            break
    told += "" if found else search.finish()
    assert (told, found) == (text[: end if include or not wanted else end + length], wanted)


def test_what_is_passed_over_may_end_the_reasoning_too():
    stops = StopStrings(["stop"], False, after="</think>")
    assert stops.push("stop </thi") == ("stop </thi", None)
    assert stops.push("nk> stop", ends=False) == ("nk> stop", None)
    assert stops.push("a stop") == ("a ", "stop")
    assert StopStrings(["stop"], False, after="</think>").push("</think>") == ("</think>", None)
