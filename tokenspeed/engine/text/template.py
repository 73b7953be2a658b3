"""The checkpoint's own chat template: messages and tools -> the text the model was trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateSyntaxError

from ..errors import ConfigError, RequestError
from ..files import read_optional_json_object, read_text
from .boundaries import stable_cuts
from .interrupt import check_interrupt
from .literals import Hidden, Rendered, strings_in
from .messages import TOOL_CALL, check_messages, check_tools, hide_literals, merge_systems
from .reasoning import leaves_reasoning_open
from .sandbox import BoundedEnvironment, TemplateRefusal
from .tokenizer import Tokenizer

# What the family's templates know beside enable_thinking, and what it may be.
TEMPLATE_KWARGS: dict[str, tuple[bool | str, ...]] = {
    "preserve_thinking": (True, False),
    "reasoning_effort": ("minimal", "low", "medium", "high", "xhigh", "max"),
}
MAX_MARKS = 4


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A conversation as the model reads it.

    ids: the prompt. boundaries: ascending token counts in (0, len(ids)) at which a later prompt is likely to leave this
    one (`boundaries.stable_cuts`); a control token follows each. reasoning_open: the turn to come begins inside
    `<think>`. snapshot_token_id: the state at the end of that turn is worth keeping only where the turn holds this id,
    the one that opens a tool call, because the template will change any other answer; None: it always is.
    """

    ids: list[int]
    boundaries: tuple[int, ...]
    reasoning_open: bool
    snapshot_token_id: int | None = None


class ChatTemplate:
    """A compiled chat template, or several by name ("default", and "tool_use" for requests with tools)."""

    def __init__(self, sources: Mapping[str, str], tokenizer: Tokenizer, origin: str = "chat template"):
        """sources: Jinja source by name, with "default" among them. Raises ConfigError, naming `origin` and the line,
        for a template that does not compile."""
        if "default" not in sources:
            raise ConfigError(f"{origin}: no template is named 'default', only {sorted(sources)}")
        self._tokenizer = tokenizer
        self._sources = dict(sources)
        self._environment = BoundedEnvironment()
        # By template name and options, of which there are few.
        self._generation_prompts: dict[tuple, str | None] = {}
        self._templates = {}
        for name, source in sources.items():
            try:
                self._templates[name] = self._environment.compile_template(source)
            except TemplateSyntaxError as error:
                raise ConfigError(f"{origin}: template {name!r}, line {error.lineno}: {error.message}") from None
            except Exception as error:  # e.g. RecursionError: the source is the checkpoint's, anything may happen
                raise ConfigError(f"{origin}: template {name!r} cannot be compiled: {error!r}") from None

    @classmethod
    def from_directory(cls, path: str | Path, tokenizer: Tokenizer) -> "ChatTemplate":
        """chat_template.jinja, else tokenizer_config.json's chat_template (a string, or a list of named ones)."""
        directory = Path(path)
        file = directory / "chat_template.jinja"
        if file.exists():
            return cls({"default": read_text(file)}, tokenizer, str(file))
        file = directory / "tokenizer_config.json"
        found = read_optional_json_object(file).get("chat_template")
        if found is None:
            raise ConfigError(f"{directory} has no chat template: no chat_template.jinja and none in {file.name}")
        if isinstance(found, str):
            return cls({"default": found}, tokenizer, str(file))
        try:
            sources = {entry["name"]: entry["template"] for entry in found}
        except (TypeError, KeyError):
            sources = {}
        if not sources or not all(isinstance(text, str) for pair in sources.items() for text in pair):
            raise ConfigError(f"{file}: chat_template must be a string or a list of {{name, template}} objects")
        return cls(sources, tokenizer, str(file))

    def effort_kwargs(self, effort: str | None) -> dict[str, bool | str]:
        """template_kwargs for how much the model is to think: none where the template does not ask."""
        if effort in (None, "none") or not any("reasoning_effort" in source for source in self._sources.values()):
            return {}
        return {"reasoning_effort": effort}

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        template_kwargs: Mapping[str, bool | str] | None = None,
    ) -> Rendered:
        """The conversation as text, for `Tokenizer.encode_rendered`.

        messages, tools: as in OpenAI's chat API (`messages.check_messages` has the details); not changed. Where the
        template refuses several system messages, or one that is not the first, they are merged at the front.
        enable_thinking: None leaves it to the template. template_kwargs: only names in TEMPLATE_KWARGS.

        Without a control-token literal in any string the text is `transformers`' own; with one it is the same text,
        except that a template does not react to markup that a user or a tool wrote (`messages.hide_literals`).
        Raises RequestError for a bad message, tool or kwarg, and with the template's message when it refuses or fails.
        """
        rendering, _ = self._accepted(messages, tools, enable_thinking, template_kwargs)
        return rendering.hidden.reveal(rendering.text(rendering.messages, add_generation_prompt))

    def encode(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        template_kwargs: Mapping[str, bool | str] | None = None,
        marks: Sequence[int] = (),
        continue_final_message: bool = False,
        name_space: str | None = None,
    ) -> EncodedPrompt:
        """The conversation as ids with its stable boundaries. Arguments and errors as in `render`.

        continue_final_message: leave the last message open, for the model to go on with its content.
        marks: numbers of at most MAX_MARKS messages whose ends the caller wants boundaries at.
        name_space: as in `Tokenizer.encode_with_counts`.
        """
        rendering, places = self._accepted(messages, tools, enable_thinking, template_kwargs)
        count = len(places)
        if len(marks) > MAX_MARKS or not all(0 <= mark < count for mark in marks):
            raise RequestError(f"marks are {list(marks)}; give at most {MAX_MARKS} numbers of the {count} messages")
        marks = sorted({places[mark] for mark in marks})
        text = rendering.text(rendering.messages, add_generation_prompt)
        bare = rendering.without_generation_prompt(text) if add_generation_prompt else text
        if continue_final_message:
            text = _opened(text, rendering.messages[-1])
        control = self._tokenizer.guard.pattern
        cuts, comes_back = stable_cuts(text, bare, rendering.messages, rendering.text_or_none, control, marks)
        rendered = rendering.hidden.reveal(text)
        revealed = [len(rendering.hidden.reveal(text[:cut]).text) for cut in cuts]
        ids, counts = self._tokenizer.encode_with_counts(rendered, revealed, name_space)
        boundaries = tuple(count for count in counts if count)
        snapshot_token_id = None if comes_back else self._tokenizer.token_to_id(TOOL_CALL)
        return EncodedPrompt(ids, boundaries, leaves_reasoning_open(rendered.text), snapshot_token_id)

    def _accepted(
        self, messages: Any, tools: Any, enable_thinking: bool | None, kwargs: Mapping[str, bool | str] | None
    ) -> tuple["_Rendering", list[int]]:
        """The conversation as the template takes it, and for each of the messages its place there."""
        checked, places = check_messages(messages), list(range(len(messages)))
        rendering = _Rendering(self, checked, tools, enable_thinking, kwargs)
        if any(message["role"] == "system" for message in checked[1:]):
            merged, moved = merge_systems(checked)
            if rendering.text_or_none(rendering.messages) is None:
                return _Rendering(self, merged, tools, enable_thinking, kwargs), moved
        return rendering, places


def _opened(text: str, message: Mapping[str, Any]) -> str:
    """A rendered conversation up to where its last message's content ends, with the white space that ends it."""
    content = message.get("content") or ""
    given = content if isinstance(content, str) else content[-1].get("text", "")
    said = given.strip()
    place = text.rfind(said)
    if not said or place < 0:
        raise RequestError("continue_final_message needs a last message with content that the template shows as it is")
    return text[: place + len(said)] + given[len(given.rstrip()) :]


class _Rendering:
    """One request's checked messages and tools with their literals hidden, for rendering them and variations of them.

    hidden: the marks in the texts. messages: for `text`, which may also be given others that hold no literals.
    """

    def __init__(
        self,
        template: ChatTemplate,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        enable_thinking: bool | None,
        kwargs: Mapping[str, bool | str] | None,
    ):
        """messages: checked."""
        tools = check_tools(tools)
        tokenizer = template._tokenizer
        self._variables: dict[str, Any] = {**tokenizer.special_tokens, **_check_kwargs(kwargs)}
        if enable_thinking is not None:
            if not isinstance(enable_thinking, bool):
                raise RequestError(f"enable_thinking must be true or false, not {enable_thinking!r}")
            self._variables["enable_thinking"] = enable_thinking
        name = "tool_use" if tools is not None and "tool_use" in template._templates else "default"
        self._template = template._templates[name]
        self._environment = template._environment
        self.hidden = Hidden(chain(strings_in(messages), strings_in(tools), (template._sources[name],)))
        self.messages = [hide_literals(message, tokenizer.guard, self.hidden) for message in messages]
        self._options = (name, tuple(self._variables.items()))
        self._generation_prompts = template._generation_prompts
        self._variables["tools"] = tokenizer.guard.hide(tools, self.hidden)
        self._variables["documents"] = None

    def text(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        """Raises RequestError with the template's message when it refuses or fails."""
        check_interrupt()
        variables = {**self._variables, "messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return self._environment.render(self._template, variables)
        except TemplateRefusal as error:
            raise RequestError(f"the chat template refuses the conversation: {error}") from None
        except Exception as error:  # the template is the checkpoint's program: whatever it makes Python raise
            raise RequestError(f"the chat template failed: {type(error).__name__}: {error}") from None

    def text_or_none(self, messages: list[dict[str, Any]]) -> str | None:
        """Without a generation prompt; None where the template refuses or fails."""
        try:
            return self.text(messages, False)
        except RequestError:
            return None

    def without_generation_prompt(self, text: str) -> str | None:
        """What `text` is without its generation prompt; None where the template refuses that.

        Most templates put the same text there whatever was said, which spares a render: then they are known from a
        conversation of a word.
        """
        known = self._generation_prompts
        if self._options not in known:
            known[self._options] = self._generation_prompt()
        opening = known[self._options]
        if opening is not None and text.endswith(opening):
            return text.removesuffix(opening)
        return self.text_or_none(self.messages)

    def _generation_prompt(self) -> str | None:
        word = [{"role": "user", "content": "next"}]
        try:
            text = self.text(word, True)
        except RequestError:
            return None
        bare = self.text_or_none(word)
        return text.removeprefix(bare) if bare is not None and text.startswith(bare) else None


def _check_kwargs(kwargs: Mapping[str, bool | str] | None) -> dict[str, bool | str]:
    for name, value in (kwargs or {}).items():
        if name not in TEMPLATE_KWARGS:
            raise RequestError(f"template argument {name!r} is not allowed; allowed: {', '.join(TEMPLATE_KWARGS)}")
        choices = TEMPLATE_KWARGS[name]
        if not isinstance(value, type(choices[0])) or value not in choices:
            names = "true or false" if True in choices else f"one of {', '.join(map(str, choices))}"
            raise RequestError(f"template argument {name} must be {names}, not {value!r:.60}")
    return dict(kwargs or {})
