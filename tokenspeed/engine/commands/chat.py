"""`chat`: a conversation that keeps its history, at a terminal or from a pipe."""

import argparse
import sys
from collections.abc import Callable

from ..errors import EngineError, RequestError, TokenSpeedError
from . import terminal
from .dialogue import Dialogue, Turn
from .generate import read_tools
from .options import add_engine_options, add_run_options, add_sampling_options, chosen_sampling, note, open_model
from .shown import TurnPrinter

_BLOCK = '"""'


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "chat",
        help="hold a conversation",
        description="Hold a conversation; figures of each turn go to standard error. A line that ends in \\ goes on in "
        'the next one, and so does everything between """ and """; what is pasted is one message. /help lists the '
        "commands. Ctrl-C ends an answer, Ctrl-D the program.",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message (default: none)")
    parser.add_argument("--tools", metavar="FILE", help="JSON list of OpenAI tool definitions (default: none)")
    parser.add_argument(
        "--load", metavar="FILE", help="go on with a conversation that /save wrote (default: a new one)"
    )
    parser.add_argument("--no-thinking", action="store_true", help="ask the template for answers at once (default off)")
    add_sampling_options(parser, max_tokens=1024)
    add_engine_options(parser)
    add_run_options(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    chosen = chosen_sampling(options)
    if chosen.get("n", 1) != 1:
        raise RequestError(f"n is {chosen['n']}; a conversation has one answer to each message.")
    with open_model(options) as llm:
        conversation = Dialogue(llm, chosen, enable_thinking=False if options.no_thinking else None)
        conversation.system = options.system
        conversation.use_tools(read_tools(options.tools))
        if options.load:
            conversation.load(options.load)
        chat = Chat(conversation, options.quiet)
        if sys.stdin.isatty():
            note(f"{llm.frontend.directory.name}: /help lists the commands, Ctrl-D ends.")
            return _at_terminal(chat)
        failed = False
        while not chat.ended and (message := read_message(_piped)) is not None:
            failed |= not chat.take(message)
    return int(failed)


def _at_terminal(chat: "Chat") -> int:
    terminal.prepare()
    interrupted = False
    while not chat.ended:
        try:
            message = read_message(_typed)
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            note("\nCtrl-C again ends the program.")
            continue
        interrupted = False
        if message is None:
            note("")
            break
        with terminal.keys_held():
            chat.take(message)
    return 0


Read = Callable[[bool], str | None]  # the next line, or None at the end; told whether it goes on with a message


def _typed(more: bool) -> str | None:
    try:
        return terminal.read_block("... " if more else ">>> ")
    except EOFError:
        return None


def _piped(more: bool) -> str | None:
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


def read_message(read: Read) -> str | None:
    """Lines put together to a message: those that end in a backslash with the next one, and everything between two
    triple quotes. Empty ones are passed over; what the end of the input cuts short counts. None: there is no more."""
    while (line := read(False)) is not None:
        parts = []
        if line.lstrip().startswith(_BLOCK):
            line = line.lstrip().removeprefix(_BLOCK)
            while line is not None and not line.rstrip().endswith(_BLOCK):
                parts.append(line)
                line = read(True)
            parts.append((line or "").rstrip().removesuffix(_BLOCK))
        else:
            while line is not None and line.endswith("\\"):
                parts.append(line[:-1])
                line = read(True)
            parts.append(line or "")
        message = "\n".join(parts).strip("\n")
        if message.strip():
            return message
    return None


class Chat:
    """What is typed, done: messages answered, commands obeyed."""

    def __init__(self, conversation: Dialogue, quiet: bool = False):
        self.conversation, self._quiet = conversation, quiet
        self.ended = False

    def take(self, text: str) -> bool:
        """Raises EngineError where nothing more can be answered. Returns whether it worked; if not, the error has been
        shown and the conversation is as before."""
        try:
            if text.startswith("/") and not text.startswith("//"):
                self._command(text)
            else:
                self._answer(self.conversation.ask(text.removeprefix("/") if text.startswith("//") else text))
        except EngineError:
            raise
        except TokenSpeedError as error:
            note(f"error: {error}")
            return False
        return True

    def _answer(self, turn: Turn) -> None:
        printer = TurnPrinter(reasoning=not self._quiet)
        try:
            for events in turn:
                printer.show(events)
        except KeyboardInterrupt:
            turn.close()
            note(" (interrupted)")
        printer.end()
        if not self._quiet:
            note(turn.summary())
        if turn.tool_calls:
            note(f"{len(turn.tool_calls)} tool call{'s' * (len(turn.tool_calls) > 1)}: /result TEXT gives its result")

    def _command(self, text: str) -> None:
        name, _, rest = text[1:].partition(" ")
        command = next((c for c in _COMMANDS if c.split()[0] == f"/{name}"), None)
        if command is None:
            raise RequestError(f"/{name} is no command; /help lists them (// begins a message with a slash).")
        getattr(self, f"_do_{name}")(rest.strip())

    def _do_help(self, rest: str) -> None:
        for command, meaning in _COMMANDS.items():
            print(f"{command:20} {meaning}")

    def _do_system(self, rest: str) -> None:
        if rest:
            self.conversation.system = rest
        print(f"system: {self.conversation.system or '(none)'}")

    def _do_tools(self, rest: str) -> None:
        if rest:
            self.conversation.use_tools(None if rest == "off" else read_tools(rest))
        names = [tool.get("function", tool)["name"] for tool in self.conversation.tools or []]
        print(f"tools: {', '.join(names) or '(none)'}")

    def _do_result(self, rest: str) -> None:
        if (turn := self.conversation.result(rest)) is not None:
            self._answer(turn)

    def _do_reset(self, rest: str) -> None:
        self.conversation.reset()

    def _do_undo(self, rest: str) -> None:
        print(f"taken back: {self.conversation.undo()}")

    def _do_retry(self, rest: str) -> None:
        self._answer(self.conversation.retry())

    def _do_set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if name:
            self.conversation.set(name, value.strip())
        for name, value in self.conversation.sampling.items():
            print(f"{name} {value}")

    def _do_history(self, rest: str) -> None:
        for message in self.conversation.history:
            for part, content in message.items():
                if part != "role" and content:
                    print(f"{message['role']:9} {'' if part == 'content' else part + ': '}{content}")

    def _do_save(self, rest: str) -> None:
        self.conversation.save(rest)

    def _do_load(self, rest: str) -> None:
        self.conversation.load(rest)
        print(f"{len(self.conversation.messages)} messages")

    def _do_stats(self, rest: str) -> None:
        for line in self.conversation.stats():
            print(line)

    def _do_quit(self, rest: str) -> None:
        self.ended = True


_COMMANDS = {
    "/help": "this list",
    "/system TEXT": "set the system message; without TEXT, show it",
    "/tools FILE": "offer the tools of a JSON file, none after `/tools off`; without FILE, show them",
    "/result TEXT": "what a tool call came to; the model goes on once each call has its result",
    "/reset": "forget the conversation, keep system message, tools and settings",
    "/undo": "take back the last message and what followed it",
    "/retry": "answer the last message anew",
    "/set NAME VALUE": "a sampling field (/set temperature 0.5; `default` is the model's own); alone: show them",
    "/history": "the conversation so far",
    "/save FILE": "write the conversation to a JSON file",
    "/load FILE": "go on with a saved conversation",
    "/stats": "figures of all turns and of the prefix cache",
    "/quit": "end the program",
}
