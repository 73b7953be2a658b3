"""The tags of Qwen3.5's tool calls as patterns, and what of a text may still become one of them."""

import re

MAX_NAME = 256  # characters of a function's or argument's name, and of white space between two tags
CALL, CALL_END, FUNCTION, ARGUMENT_START = "<tool_call>", "</tool_call>", "<function=", "<parameter="
VALUE_END, FUNCTION_END = "</parameter>", "</function>"
# Patterns as their atoms, so that `_beginning` can tell what may still become a match.
_NAME = [rf"([^>\n]{{1,{MAX_NAME}}})", ">"]
_GAP = [rf"\s{{0,{MAX_NAME}}}"]
_NEWLINE = ["\n?"]
_FUNCTION_OPENS = [*FUNCTION, *_NAME]
_ARGUMENT_OPENS = [*ARGUMENT_START, *_NAME]
_CLOSING = [*_NEWLINE, *VALUE_END]


def _beginning(*alternatives: list[str]) -> re.Pattern[str]:
    """For fullmatch: what more text may make a match of one of these."""

    def nested(atoms: list[str]) -> str:
        end = ""
        for atom in reversed(atoms):
            end = f"(?:{atom}{end})?"
        return end

    return re.compile("|".join(map(nested, alternatives)))


class _Tag:
    """`atoms`, and then an argument's opening, the function's end or the call's end."""

    def __init__(self, atoms: list[str]):
        follow = [[*_GAP, *_ARGUMENT_OPENS], [*_GAP, *FUNCTION_END], [*_GAP, *CALL_END]]
        argument, function_end, call_end = map("".join, follow)
        self._whole = re.compile(f"{''.join(atoms)}(?:{argument}|{function_end}|({call_end}))")
        self._part = _beginning(*([*atoms, *rest] for rest in follow))

    def match(self, text: str, at: int) -> re.Match[str] | None:
        """Its last group: the call's end, where the function's is missing; the one before: the argument's name."""
        return self._whole.match(text, at)

    def may_match(self, text: str, at: int) -> bool:
        """Whether more text may make a match."""
        return self._part.fullmatch(text, at) is not None


OPENS = _Tag([*CALL, *_GAP, *_FUNCTION_OPENS])
OPENS_BARE = _Tag(_FUNCTION_OPENS)
CLOSES = _Tag(_CLOSING)
NEXT_ARGUMENT, MAY_BE_ARGUMENT = re.compile("".join(_ARGUMENT_OPENS)), _beginning(_ARGUMENT_OPENS)
# The end of a call whose last `</parameter>` is missing, and what must follow it: nothing, or the next call.
_ENDS = [[*FUNCTION_END, *_GAP, *CALL_END], [*FUNCTION_END], [*CALL_END]]
_GOES_ON = [[*CALL, *_GAP, *_FUNCTION_OPENS], _FUNCTION_OPENS]
CALL_ENDS = re.compile(
    f"({''.join(_NEWLINE)}(?:{'|'.join(map(''.join, _ENDS))}))(?:{''.join(_GAP)}(?:{''.join(CALL)}{''.join(_GAP)})?"
    rf"{''.join(_FUNCTION_OPENS)}|({''.join(_GAP)}\Z))"
)
MAY_END = _beginning(*([*_NEWLINE, *end, *_GAP, *rest] for end in _ENDS for rest in _GOES_ON))
ANY_START, CALL_START = re.compile(f"{CALL}|{FUNCTION}"), re.compile(CALL)
ANY_MARK = re.compile("|".join((VALUE_END, ARGUMENT_START, FUNCTION_END, CALL_END)))
VALUE_MARK = re.compile(VALUE_END)
