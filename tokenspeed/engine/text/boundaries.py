"""Where later prompts are likely to leave a rendered conversation: the places worth a snapshot of the state.

A template is a program, so no rule tells where a turn ends in its output. What is asked instead: how far does the
prompt agree with the same conversation gone on differently? Each place is moved back to the start of a control token in
both texts. A tokenizer cuts control tokens out before it looks at anything else, so up to there the ids agree as well.

All positions are characters of the text before literals are put back (`literals.Hidden`), where every occurrence of a
control token is one.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

from .reasoning import leaves_reasoning_open

Message = dict[str, Any]
Render = Callable[[list[Message]], str | None]  # without a generation prompt; None where the template refuses


def stable_cuts(
    prompt: str,
    bare: str | None,
    messages: list[Message],
    render: Render,
    control: re.Pattern[str],
    marks: Sequence[int],
) -> tuple[list[int], bool]:
    """Ascending positions in `prompt`, each the start of a control token, and whether an answer comes back behind it.

    - The end of system and tools: what a conversation with another first user message shares.
    - Before the generation prompt, or as far before it as a template that drops earlier reasoning makes necessary: what
      is shared after an answer and a next user message (the end of the last real user turn), and after a tool call and
      its result (the end of the prompt).
    - For each of `marks`, the end of that message: what is shared with the conversation up to it, or with another turn
      put after it, whichever is more.

    bare: the conversation without a generation prompt, None where the template refuses that. What it refuses to render
    gives no place. 2 or 3 renders, one of them of system and tools alone, and 1 or 2 for each mark.

    An answer does not come back where the template takes something off that the prompt opens it with, as it does with
    reasoning, once another user message follows.
    """
    compare = _Comparison(prompt, control)
    user, answer_and_user, call_and_result = _later_turns(messages, leaves_reasoning_open(prompt))
    end = len(prompt) if bare is None else compare.common(bare)

    system = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    found = {compare.cut(render([*messages[:system], user]), end)}
    later = render([*messages, *answer_and_user])
    after_query = compare.cut(later, end)
    found.add(after_query)
    if after_query < compare.last(end):  # a place further on may be left to find
        found.add(compare.cut(render([*messages, *call_and_result]), end))
    for mark in marks:
        upto, rest = messages[: mark + 1], messages[mark + 1 :]
        text = render(upto)
        place = compare.cut(text, end, also_at_its_end=True)
        if text is None or place < len(text):  # else the other turn would begin where the prompt goes on
            place = max(place, compare.cut(render([*upto, user, *rest]), end))
        found.add(place)
    return sorted(found - {0}), later is None or later.startswith(prompt)


class _Comparison:
    """Other renders against one prompt."""

    def __init__(self, prompt: str, control: re.Pattern[str]):
        self._prompt = prompt
        self._control = control
        spans = [match.span() for match in control.finditer(prompt)]
        self._starts = [start for start, _ in spans]
        self._ends = [end for _, end in spans]

    def common(self, other: str) -> int:
        """The length of the common beginning: a binary search, whose comparisons run at memory speed."""
        low, high = 0, min(len(self._prompt), len(other))
        while low < high:
            middle = (low + high + 1) // 2
            if self._prompt.startswith(other[low:middle], low):
                low = middle
            else:
                high = middle - 1
        return low

    def last(self, limit: int) -> int:
        """Where the last control token at or before `limit` starts; 0 where there is none."""
        found = bisect_right(self._starts, limit)
        return self._starts[found - 1] if found else 0

    def cut(self, other: str | None, limit: int, also_at_its_end: bool = False) -> int:
        """The last place at or before `limit` up to which the texts agree and where each has a control token.

        also_at_its_end: `other` may also end there. 0 where there is no such place.
        """
        if other is None:
            return 0
        limit = min(limit, self.common(other))
        for i in range(bisect_right(self._starts, limit) - 1, -1, -1):
            start = self._starts[i]
            # Where the control token before ends, so that none found lies across what it covers.
            found = self._control.search(other, self._ends[i - 1] if i else 0)
            if (found and found.start() == start) or (also_at_its_end and len(other) == start):
                return start
        return 0


def _content(message: Message) -> str:
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _later_turns(messages: list[Message], reasoning: bool) -> tuple[Message, list[Message], list[Message]]:
    """How a conversation might go on, in a word that no message holds: a user's message; the answer and that message;
    a call and its result. What the conversation ends with already is left out.

    reasoning: the answer brings some, as its prompt opens it.
    """
    text = "\n".join(_content(message) for message in messages)
    found = re.findall("nextx*", text)
    word = max(found, key=len) + "x" if found else "next"
    function = {"name": word, "arguments": {}}
    call = {"id": "000000000", "type": "function", "function": function}  # nine digits: some templates insist
    user = {"role": "user", "content": word}
    answer = {"role": "assistant", "content": word} | ({"reasoning_content": word} if reasoning else {})
    calls = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "content": word, "name": word, "tool_call_id": call["id"]}
    if messages[-1]["role"] == "assistant":
        return user, [user], [result]
    return user, [answer, user], [calls, result]
