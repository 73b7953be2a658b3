"""A conversation as text, in pieces that know whether the model has to produce them.

Written apart from chat_template.jinja, so that each checks the other.
"""

import json
from dataclasses import dataclass
from enum import Enum

from examples.tiny_agent.data import Exchange, Transcript


class Part(Enum):
    """Who a piece of a rendered conversation comes from."""

    CONTEXT = "context"  # never produced by the model
    EARLIER = "earlier"  # an answer to an earlier query, shown without its reasoning
    ANSWER = "answer"  # what the model generates after a generation prompt


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    part: Part
    kind: str = ""  # of an ANSWER: the kind of turn


def render_head(conversation: Transcript) -> list[Piece]:
    """The system turn: tools as JSON lines, then the system prompt; nothing when there is neither."""
    blocks = []
    if conversation.tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in conversation.tools)
        blocks.append(f"# Tools\n\n<tools>\n{listed}\n</tools>\n\nCall a tool when it helps.")
    if conversation.system:
        blocks.append(conversation.system)
    if not blocks:
        return []
    return [Piece("<|im_start|>system\n" + "\n\n".join(blocks) + "<|im_end|>\n", Part.CONTEXT)]


def render_exchange(exchange: Exchange, thinking: bool, last: bool) -> list[Piece]:
    """One exchange. In the last one every assistant turn keeps its think block, earlier ones show only content.

    With `thinking` the model's part starts inside the think block, else after the empty one.
    """
    pieces: list[Piece] = []
    kinds = iter(exchange.kinds)
    previous = None
    for message in exchange.messages:
        role = message["role"]
        if role == "user":
            pieces.append(Piece(f"<|im_start|>user\n{message['content']}<|im_end|>\n", Part.CONTEXT))
        elif role == "tool":
            opening = "" if previous == "tool" else "<|im_start|>user"
            pieces.append(Piece(f"{opening}\n<tool_response>\n{message['content']}\n</tool_response>", Part.CONTEXT))
        else:
            if previous == "tool":
                pieces.append(Piece("<|im_end|>\n", Part.CONTEXT))
            pieces += _assistant_turn(message, next(kinds), thinking, last)
        previous = role
    return pieces


def render(conversation: Transcript) -> list[Piece]:
    """The whole conversation, as its template renders it after the last answer."""
    pieces = render_head(conversation)
    for i, exchange in enumerate(conversation.exchanges):
        pieces += render_exchange(exchange, conversation.thinking, i == len(conversation.exchanges) - 1)
    return pieces


def _assistant_turn(message: dict, kind: str, thinking: bool, last: bool) -> list[Piece]:
    calls = "\n".join(_tool_call(call["function"]) for call in message.get("tool_calls", ()))
    text = "\n\n".join(filter(None, (message["content"], calls))) + "<|im_end|>"
    start, reasoning = "<|im_start|>assistant\n", message["reasoning_content"]
    if not last:
        pieces = [Piece(start, Part.CONTEXT), Piece(text, Part.EARLIER, kind)]
    elif thinking:
        answer = Piece(f"{reasoning}\n</think>\n\n{text}", Part.ANSWER, f"{kind}, thinking" if reasoning else kind)
        pieces = [Piece(f"{start}<think>\n", Part.CONTEXT), answer]
    else:
        pieces = [Piece(f"{start}<think>\n\n</think>\n\n", Part.CONTEXT), Piece(text, Part.ANSWER, kind)]
    return [*pieces, Piece("\n", Part.CONTEXT)]


def _tool_call(function: dict) -> str:
    lines = [f"<function={function['name']}>"]
    for name, value in function["arguments"].items():
        shown = json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else str(value)
        lines += [f"<parameter={name}>", shown, "</parameter>"]
    return "\n".join(["<tool_call>", *lines, "</function>", "</tool_call>"])
