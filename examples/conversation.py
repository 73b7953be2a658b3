"""A short agent conversation with the shipped model: it calls tools, this program runs them. `make demo` runs it.

python -m examples.conversation
"""

import operator

from tokenspeed.engine.chat.conversation import Conversation
from tokenspeed.engine.commands.generate import Meter
from tokenspeed.engine.commands.shown import TurnPrinter
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.request import SamplingParams
from tokenspeed.engine.text.turn import Answer, TurnText

SYSTEM = "You are a helpful agent.\n\nThe code of cedar is 8214."
STOCK = {("stock", "maple"): "42", ("owner", "onyx"): "falcon"}
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
QUESTIONS = [
    "Remember: The price of kelp is 551.",
    "Find the owner of onyx.",
    "What is the stock of maple times 7?",
    "What is the price of kelp?",
    "What is the code of cedar?",
]


def function(called: str, description: str, **types: str) -> dict:
    properties = {parameter: {"type": kind} for parameter, kind in types.items()}
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": called, "description": description, "parameters": parameters}}


TOOLS = [
    function("calc", "Do arithmetic.", a="number", op="string", b="number"),
    function("lookup", "Look up a value.", name="string", field="string"),
]


def run_tool(name: str, arguments: dict) -> str:
    """What the model's call comes to; an error message where the call makes no sense."""
    try:
        if name == "calc":
            return str(OPERATORS[arguments["op"]](arguments["a"], arguments["b"]))
        return STOCK[arguments["field"], arguments["name"]]
    except (KeyError, TypeError) as error:
        return f"error: {error}"


def say(llm: LLM, messages: list[dict], meter: Meter) -> Answer:
    """The model's turn, printed as it comes."""
    turn = llm.prepare(Conversation(messages, TOOLS), SamplingParams(temperature=0, max_tokens=160))
    meter.prompt_tokens = len(turn.request.prompt)
    printer, text = TurnPrinter(indent=" " * 11), TurnText()
    print("assistant  ", end="", flush=True)
    for update, events in llm.follow_turn(turn):
        meter.count(len(update.ids))
        meter.cached += update.reuse.cached_tokens if update.reuse else 0
        text.add(events)
        printer.show(events)
    printer.end()
    return text.answer()


def main() -> None:
    llm = LLM()
    messages = [{"role": "system", "content": SYSTEM}]
    meters: list[Meter] = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        print(f"\nuser       {question}")
        for _ in range(4):  # a question needs at most a few calls
            meters.append(Meter(0))
            answer = say(llm, messages, meters[-1])
            messages.append(answer.message())
            if not answer.tool_calls:
                break
            for call in answer.tool_calls:
                result = run_tool(call.name, call.arguments)
                messages.append({"role": "tool", "content": result})
                print(f"tool       {result}")
    tokens, seconds = sum(m.tokens for m in meters), sum(m.decode_s for m in meters)
    first = sorted(m.first_s for m in meters)[len(meters) // 2]
    print(
        f"\n{len(meters)} assistant turns, {sum(m.prompt_tokens for m in meters)} prompt tokens, "
        f"{sum(m.cached for m in meters)} resumed from the prefix cache, {tokens} generated: "
        f"{(tokens - len(meters)) / seconds:.0f} tok/s, first token after {first * 1000:.0f} ms (median)."
    )


if __name__ == "__main__":
    main()
