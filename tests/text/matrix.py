"""Conversations of every shape against `transformers` on the same checkpoint's tokenizer and template:

    python -m tests.text.matrix DIRECTORY ...

prints for each directory how many prompts were compared, and fails at the first that differs.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenspeed.engine.text.template import ChatTemplate
from tokenspeed.engine.text.tokenizer import Tokenizer

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "array"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": PARAMETERS}}
ARGUMENTS = {"city": "Zürich", "days": [1, 2], "exact": True, "unit": None, "height": 408, "where": {"x": 1.5}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
USER = {"role": "user", "content": "Wie ist das Wetter? ☀️"}
PARTS = {"role": "user", "content": [{"type": "text", "text": " a"}, {"type": "text", "text": "b "}]}
SYSTEM, DEVELOPER = {"role": "system", "content": " Be brief.\n"}, {"role": "developer", "content": "Be kind."}


class Case(NamedTuple):
    """ours: messages as a client sends them; theirs: as the published templates take them, where they differ."""

    name: str
    ours: list[dict[str, Any]]
    theirs: list[dict[str, Any]]


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


# What stands before the first query: as it is sent, and as one system message.
OPENINGS = {
    "nothing": ([], []),
    "a system message": ([SYSTEM], [SYSTEM]),
    "a system message in parts": ([SYSTEM | {"content": PARTS["content"]}],) * 2,
    "developer": ([DEVELOPER], [system("Be kind.")]),
    "system and developer": ([SYSTEM, DEVELOPER], [system("Be brief.\n\nBe kind.")]),
    "a null system message": ([SYSTEM | {"content": None}], [system("")]),
}
TURNS = {
    "an answer": [{"role": "assistant", "content": "21 °C"}],
    "reasoning": [{"role": "assistant", "content": "21 °C", "reasoning_content": " hm\n"}],
    "reasoning in the content": [{"role": "assistant", "content": "<think>\nhm\n</think>\n\n21 °C"}],
    "an empty answer": [{"role": "assistant", "content": None}],
    "a call": [{"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "21"}],
    "text and two calls": [
        {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": '{"t": 21}'},
        {"role": "tool", "content": [{"type": "text", "text": "rain"}]},
    ],
    "a null result": [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": None}],
}
AFTER = {"the end": [], "a query": [PARTS], "a late system message": [system("Now in German."), USER]}


def cases() -> Iterator[Case]:
    for (opening, (ours, theirs)), (turn, said), (end, after) in itertools.product(
        OPENINGS.items(), TURNS.items(), AFTER.items()
    ):
        folded = theirs
        if end == "a late system message":
            before = theirs[0]["content"] if theirs else ""
            before = before if isinstance(before, str) else "".join(part["text"] for part in before)
            folded = [system("\n\n".join(filter(None, (before.strip(), after[0]["content"]))))]
        rest = [message for message in after if message["role"] != "system"]
        yield Case(f"{opening}, {turn}, {end}", [*ours, USER, *said, *after], [*folded, USER, *said, *rest])


def compare(tokenizer: Tokenizer, template: ChatTemplate, oracle: Any) -> int:
    """How many prompts are equal. Raises AssertionError, which names the first that is not."""
    count = 0
    options = itertools.product((None, [TOOL]), (None, True, False), (None, True))
    for (tools, thinking, preserve), case in itertools.product(options, cases()):
        kwargs = {} if thinking is None else {"enable_thinking": thinking}
        template_kwargs = {} if preserve is None else {"preserve_thinking": preserve}
        found = template.encode(case.ours, tools, enable_thinking=thinking, template_kwargs=template_kwargs).ids
        expected = oracle.apply_chat_template(
            case.theirs, tools=tools, add_generation_prompt=True, return_dict=False, **kwargs, **template_kwargs
        )
        shown = (
            tokenizer.decode(found, skip_special_tokens=False),
            tokenizer.decode(expected, skip_special_tokens=False),
        )
        assert found == expected, (case.name, tools, kwargs, *shown)
        count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "directories", nargs="+", metavar="DIRECTORY", help="checkpoints with a tokenizer and a template"
    )
    options = parser.parse_args()
    from transformers import AutoTokenizer

    for directory in options.directories:
        tokenizer = Tokenizer.from_directory(Path(directory))
        template = ChatTemplate.from_directory(Path(directory), tokenizer)
        print(directory, compare(tokenizer, template, AutoTokenizer.from_pretrained(directory)), "prompts are equal")


if __name__ == "__main__":
    main()
