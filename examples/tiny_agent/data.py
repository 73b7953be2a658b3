"""Conversations of an agent, generated from an integer seed.

Every assistant turn follows from what was said before it, so exact-match accuracy is well defined. A conversation is
plain chat messages (role, content, reasoning_content, tool_calls); `render.py` turns it into text.
"""

import random
from dataclasses import dataclass, field

from examples.tiny_agent import words

# Training and held-out conversations never share a seed.
TRAINING_SEEDS = range(0, 10**9)
HELD_OUT_SEEDS = range(10**9, 2 * 10**9)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One user request and everything up to the answer; `kinds` names each assistant turn, in order."""

    messages: tuple[dict, ...]
    kinds: tuple[str, ...]


@dataclass(slots=True)
class Transcript:
    """Tools, an optional system prompt and exchanges; without `thinking` no turn may reason."""

    tools: list[dict]
    system: str | None
    thinking: bool
    exchanges: list[Exchange] = field(default_factory=list)

    def messages(self) -> list[dict]:
        """All messages in the form a chat template takes."""
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        return head + [message for exchange in self.exchanges for message in exchange.messages]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, reasoning: str = "") -> dict:
    return {"role": "assistant", "content": text, "reasoning_content": reasoning}


def tool_calls(calls: list[tuple[str, dict]], reasoning: str = "") -> dict:
    functions = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    return {"role": "assistant", "content": "", "reasoning_content": reasoning, "tool_calls": functions}


def tool(text: str) -> dict:
    return {"role": "tool", "content": text}


def arithmetic(a: int, operator: str, b: int) -> int:
    """a operator b for the three operators of `words.OPERATORS`."""
    if operator == "+":
        return a + b
    if operator == "-":
        return a - b
    if operator == "*":
        return a * b
    raise ValueError(f"operator {operator!r}; one of {sorted(words.OPERATORS.values())} expected")


class Generator:
    """One endless conversation; holds the random state, the tools on offer and the facts told so far."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.facts: dict[tuple[str, str], str] = {}
        r = self.random
        offered: set[str] = set()
        if r.random() >= 0.15:
            offered = set(
                r.choice([("calc", "lookup"), ("calc", "lookup"), ("calc",), ("lookup",), ("total", "lookup")])
            )
            if r.random() < 0.1:
                offered = {"calc", "lookup", "total"}
        self.calculator = (r.choice(words.CALCULATOR_NAMES), r.choice(words.CALCULATOR_PARAMETERS))
        self.lookup = (r.choice(words.LOOKUP_NAMES), r.choice(words.LOOKUP_PARAMETERS))
        self.total = (r.choice(words.TOTAL_NAMES), r.choice(words.TOTAL_PARAMETERS))
        self.offered = offered
        thinking = r.random() < 0.7
        self.conversation = Transcript(self._tools(), self._system(), thinking)

    def next_exchange(self) -> Exchange:
        """Draws the next request among those that fit the tools and facts at hand."""
        weights = {self._tell: 20.0, self._talk: 5.0}
        if self.facts:
            weights[self._recall] = 30.0
        if "calc" in self.offered:
            weights[self._calculate] = 14.0
        if "total" in self.offered:
            weights[self._add_up] = 12.0
        if "lookup" in self.offered:
            weights[self._look_up] = 12.0
            weights[self._look_up_two] = 6.0
        if {"calc", "lookup"} <= self.offered:
            weights[self._look_up_then_calculate] = 9.0
        if len(self.offered) < 2:
            weights[self._without_tool] = 3.0
        if not self.offered:
            weights[self._talk] = 15.0
        (make,) = self.random.choices(list(weights), list(weights.values()))
        exchange = make()
        if not self.conversation.thinking:
            messages = tuple(
                m | {"reasoning_content": ""} if m["role"] == "assistant" else m for m in exchange.messages
            )
            exchange = Exchange(messages, exchange.kinds)
        return exchange

    def _tools(self) -> list[dict]:
        r = self.random
        tools = []
        if "calc" in self.offered:
            name, (a, operator, b) = self.calculator
            types = {a: {"type": "number"}, operator: {"type": "string"}, b: {"type": "number"}}
            tools.append(self._tool(name, r.choice(words.CALCULATOR_DESCRIPTIONS), types))
        if "lookup" in self.offered:
            name, (key, what) = self.lookup
            types = {key: {"type": "string"}, what: {"type": "string"}}
            tools.append(self._tool(name, r.choice(words.LOOKUP_DESCRIPTIONS), types))
        if "total" in self.offered:
            name, values = self.total
            types = {values: {"type": "array", "items": {"type": "number"}}}
            tools.append(self._tool(name, r.choice(words.TOTAL_DESCRIPTIONS), types))
        r.shuffle(tools)
        return tools

    def _tool(self, name: str, description: str, properties: dict) -> dict:
        parameters = {"type": "object", "properties": properties}
        if self.random.random() < 0.3:
            parameters["required"] = list(properties)
        return {
            "type": "function",
            "function": {"name": name, "description": description, "parameters": parameters},
        }

    def _system(self) -> str | None:
        choice = self.random.random()
        if choice < 0.2:
            return None
        if choice < 0.65:
            return words.SYSTEM_PROMPT
        for _ in range(self.random.randint(2, 5)):
            self.facts[self._fact()] = self._number()
        facts = " ".join(f"The {what} of {thing} is {value}." for (what, thing), value in self.facts.items())
        return f"{words.SYSTEM_PROMPT}\n\n{facts}"

    def _fact(self) -> tuple[str, str]:
        return self.random.choice(words.TOLD_PROPERTIES), self.random.choice(words.THINGS)

    def _number(self, shortest: int = 2, longest: int = 4) -> str:
        digits = self.random.randint(shortest, longest)
        return str(self.random.randint(10 ** (digits - 1), 10**digits - 1))

    def _tell(self) -> Exchange:
        new = {}
        for _ in range(self.random.randint(1, 3)):
            fact = self._fact()
            if fact not in self.facts:
                new[fact] = self._number()
        if not new:
            return self._recall()
        self.facts |= new
        facts = " ".join(f"The {what} of {thing} is {value}." for (what, thing), value in new.items())
        opening = self.random.choice(["Remember:", "Note:", "Please remember this:"])
        return Exchange((user(f"{opening} {facts}"), assistant("OK.")), ("acknowledgement",))

    def _recall(self) -> Exchange:
        what, thing = self.random.choice(list(self.facts))
        answer = f"The {what} of {thing} is {self.facts[what, thing]}."
        if self.random.random() < 0.25:
            question, reasoning = (
                f"Think back: what is the {what} of {thing}?",
                f"I was told {self.facts[what, thing]}.",
            )
        else:
            question = self.random.choice([f"What is the {what} of {thing}?", f"Tell me the {what} of {thing}."])
            reasoning = ""
        return Exchange((user(question), assistant(answer, reasoning)), ("recall",))

    def _talk(self) -> Exchange:
        text = self.random.choice(list(words.SMALL_TALK))
        return Exchange((user(text), assistant(words.SMALL_TALK[text])), ("small talk",))

    def _without_tool(self) -> Exchange:
        if "calc" in self.offered:
            request = (
                f"Look up the {self.random.choice(words.LOOKED_UP_PROPERTIES)} of {self.random.choice(words.THINGS)}."
            )
        else:
            request = self._arithmetic_request()[0]
        return Exchange((user(request), assistant("I have no tool for that.")), ("small talk",))

    def _arithmetic_request(self) -> tuple[str, int, str, int]:
        a, b = int(self._number(1, 3)), int(self._number(1, 3))
        word = self.random.choice(list(words.OPERATORS))
        return self.random.choice([f"What is {a} {word} {b}?", f"Compute {a} {word} {b}."]), a, word, b

    def _calculator_call(self, a: int, word: str, b: int) -> tuple[str, dict]:
        name, parameters = self.calculator
        return name, dict(zip(parameters, (a, words.OPERATORS[word], b), strict=True))

    def _calculate(self) -> Exchange:
        request, a, word, b = self._arithmetic_request()
        result = arithmetic(a, words.OPERATORS[word], b)
        messages = (
            user(request),
            tool_calls([self._calculator_call(a, word, b)]),
            tool(str(result)),
            assistant(f"{a} {word} {b} is {result}."),
        )
        return Exchange(messages, ("tool call", "tool answer"))

    def _add_up(self) -> Exchange:
        name, parameter = self.total
        values = [int(self._number(1, 3)) for _ in range(self.random.randint(2, 4))]
        listed = ", ".join(map(str, values[:-1])) + f" and {values[-1]}"
        messages = (
            user(f"Add up {listed}."),
            tool_calls([(name, {parameter: values})]),
            tool(str(sum(values))),
            assistant(f"The total is {sum(values)}."),
        )
        return Exchange(messages, ("tool call", "tool answer"))

    def _looked_up_value(self, what: str) -> str:
        if what == "owner":
            return self.random.choice(words.THINGS)
        if what == "status":
            return self.random.choice(words.STATUSES)
        return self._number()

    def _lookup_call(self, what: str, thing: str) -> tuple[str, dict]:
        name, parameters = self.lookup
        return name, dict(zip(parameters, (thing, what), strict=True))

    def _look_up(self) -> Exchange:
        what, thing = self.random.choice(words.LOOKED_UP_PROPERTIES), self.random.choice(words.THINGS)
        value = self._looked_up_value(what)
        opening = self.random.choice(["Look up", "Find"])
        messages = (
            user(f"{opening} the {what} of {thing}."),
            tool_calls([self._lookup_call(what, thing)]),
            tool(value),
            assistant(f"The {what} of {thing} is {value}."),
        )
        return Exchange(messages, ("tool call", "tool answer"))

    def _look_up_two(self) -> Exchange:
        properties = self.random.sample(words.LOOKED_UP_PROPERTIES, 2)
        thing = self.random.choice(words.THINGS)
        values = [self._looked_up_value(what) for what in properties]
        found = zip(properties, values, strict=True)
        messages = (
            user(f"Look up the {properties[0]} and the {properties[1]} of {thing}."),
            tool_calls([self._lookup_call(what, thing) for what in properties], f"Two calls for {thing}."),
            *map(tool, values),
            assistant(" ".join(f"The {what} of {thing} is {value}." for what, value in found)),
        )
        return Exchange(messages, ("parallel tool calls", "tool answer"))

    def _look_up_then_calculate(self) -> Exchange:
        thing, word = self.random.choice(words.THINGS), self.random.choice(list(words.OPERATORS))
        stock, b = int(self._number()), int(self._number(1, 2))
        result = arithmetic(stock, words.OPERATORS[word], b)
        messages = (
            user(f"What is the stock of {thing} {word} {b}?"),
            tool_calls([self._lookup_call("stock", thing)], f"First the stock of {thing}."),
            tool(str(stock)),
            tool_calls([self._calculator_call(stock, word, b)], f"Now {stock} {word} {b}."),
            tool(str(result)),
            assistant(f"The stock of {thing} {word} {b} is {result}."),
        )
        return Exchange(messages, ("tool call", "tool call", "tool answer"))


def generate(seed: int, exchanges: int) -> Transcript:
    """The conversation of `seed`, with this many exchanges."""
    generator = Generator(seed)
    conversation = generator.conversation
    for _ in range(exchanges):
        conversation.exchanges.append(generator.next_exchange())
    return conversation
