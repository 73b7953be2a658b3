"""What the endpoints take, checked by pydantic: names, types and caps.

Unknown fields are ignored, as peers do, and null is a field that was not given. A field that would change what an
answer means and is not done here is refused by its name.
"""

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..errors import RequestError
from ..request import MAX_BIASES, MAX_LOGPROBS, MAX_SEQUENCES, MAX_STRINGS, SamplingParams

MAX_MESSAGES = 4096
MAX_TOOLS = 512
MAX_ITEMS = 4 * MAX_MESSAGES  # of responses: an answer is reasoning, a text and its calls

Text = Annotated[str, Field(max_length=64 << 20)]
Strings = Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=MAX_STRINGS)]
# One string is a list of one, before anything is checked: an error then names the string, and not the other form.
OneOrMore = Annotated[Strings, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
# Whatever counts or names tokens fits 32 bits, so that no later stage meets a number it cannot hold.
Count = Annotated[int, Field(ge=1, lt=2**31)]
CountFromZero = Annotated[int, Field(ge=0, lt=2**31)]
TokenId = CountFromZero
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_BIASES)]

_REASONING_TEXTS = ("content", "summary", "encrypted_content")
_FIRST_ERROR = Field(fail_fast=True)  # a million wrong ids would be a million errors, 15 s of them


def _only(harmless: Any) -> AfterValidator:
    """Refuses a field that would change what an answer means and is not done here, unless it asks for nothing."""

    def check(value: Any) -> Any:
        if value != harmless and value not in ([], {}, ""):
            raise ValueError("this server does not support it: leave it out")
        return value

    return AfterValidator(check)


Refused = Annotated[Any, _only(None)]


def _few(biases: Any) -> Any:
    """Counted before anything in it is looked at."""
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise ValueError(f"logit_bias has {len(biases)} entries; at most {MAX_BIASES} are taken")
    return biases


class Body(BaseModel):
    """An object of a request."""

    model_config = ConfigDict(extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, value: Any) -> Any:
        return {name: v for name, v in value.items() if v is not None} if isinstance(value, Mapping) else value


class StreamOptions(Body):
    """include_usage: a last chunk with the usage; continuous_usage_stats: usage in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Answering(Body):
    """What every endpoint that answers takes."""

    model: str | None = None
    stream: bool = False
    temperature: float | None = Field(None, ge=0, le=1000, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    kv_transfer_params: dict[str, Any] | None = Field(None, max_length=32)


class Sampling(Answering):
    """What chat completions and text completions have in common."""

    max_tokens: Count | None = None
    n: int = Field(1, ge=1, le=MAX_SEQUENCES)
    stream_options: StreamOptions | None = None
    stop: OneOrMore | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_few)] | None = None
    user: str | None = None
    # Beyond OpenAI, by vLLM's names.
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=1000)
    min_tokens: CountFromZero | None = None
    stop_token_ids: TokenIds | None = None
    bad_words: Strings | None = None
    allowed_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    thinking_token_budget: CountFromZero | None = None
    truncate_prompt_tokens: Count | None = None
    return_token_ids: bool = False
    cache_salt: str | None = Field(None, max_length=256)
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    timeout: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="seconds after which the request is ended"
    )
    request_id: str | None = Field(None, min_length=1, max_length=128)
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], _FIRST_ERROR] | None = None
    guided_grammar: Refused = None
    use_beam_search: Annotated[Any, _only(False)] = None
    length_penalty: Annotated[Any, _only(1)] = None
    best_of: Any = None  # as n alone

    def sampling(self, **more: Any) -> dict[str, Any]:
        """The fields that SamplingParams has, where they were given."""
        if self.best_of not in (None, self.n):
            raise RequestError(f"best_of is {reprlib.repr(self.best_of)}; it must be n, which is {self.n}.")
        names = SamplingParams.__dataclass_fields__.keys() & type(self).model_fields.keys() - {"logprobs", "max_tokens"}
        seed = None if self.seed is None else self.seed % 2**63
        return {name: getattr(self, name) for name in names} | {"seed": seed} | more

    def prefilling(self) -> "Sampling":
        """The request as an engine takes it that only prefills for another one: nothing is asked of an answer."""
        fields = type(self).model_fields
        names = fields.keys() & {"n", "min_tokens", "logprobs", "top_logprobs", "prompt_logprobs", "echo"}
        return self.model_copy(update={name: fields[name].default for name in names})

    def structure(self) -> dict[str, Any] | None:
        """vLLM's structured_outputs, also by their older names."""
        older = {"json": self.guided_json, "regex": self.guided_regex, "choice": self.guided_choice}
        older = {name: value for name, value in older.items() if value is not None}
        if self.structured_outputs is not None and older:
            raise RequestError("structured_outputs and guided fields are given; one is needed.")
        return self.structured_outputs if self.structured_outputs is not None else older or None


class ResponseFormat(Body):
    """schema: of a json_object, as some peers take it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None
    json_object_schema: dict[str, Any] | None = Field(None, alias="schema")

    def asked(self) -> dict[str, Any]:
        return {"type": self.type, "json_schema": self.json_schema, "schema": self.json_object_schema}


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_MESSAGES)
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    functions: Refused = None
    function_call: Refused = None
    modalities: Annotated[Any, _only(["text"])] = None
    audio: Refused = None
    web_search_options: Refused = None
    chat_template: Refused = None
    documents: Refused = None
    echo: Annotated[Any, _only(False)] = None


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[TokenId], _FIRST_ERROR]
        | Annotated[list[Text], Field(max_length=64), _FIRST_ERROR]
        | Annotated[list[Annotated[list[TokenId], _FIRST_ERROR]], Field(max_length=64), _FIRST_ERROR]
    )
    max_tokens: CountFromZero | None = 16
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    response_format: ResponseFormat | None = None
    suffix: Refused = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompt, or the prompts where several were given."""
        one = isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt


def is_reference(item: Mapping[str, Any]) -> bool:
    """Whether an item of a response's input stands by its id for one of an earlier response: reasoning may, too."""
    kind = item.get("type")
    return kind == "item_reference" or (kind == "reasoning" and not any(item.get(name) for name in _REASONING_TEXTS))


class ResponsesRequest(Answering):
    """POST /v1/responses."""

    input: Text | Annotated[list[dict[str, Any]], Field(max_length=MAX_ITEMS), _FIRST_ERROR]
    instructions: Text | None = None
    previous_response_id: str | None = Field(None, max_length=256)
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    max_output_tokens: Count | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    include: Annotated[list[str], Field(max_length=64), _FIRST_ERROR] | None = None
    truncation: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool = True
    # Beyond OpenAI, by vLLM's names.
    stop: OneOrMore | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    repetition_penalty: float | None = Field(None, gt=0, le=1000)
    logit_bias: Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_few)] | None = None
    ignore_eos: bool | None = None
    structured_outputs: dict[str, Any] | None = None
    cache_salt: str | None = Field(None, max_length=256)
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    background: Annotated[Any, _only(False)] = None
    conversation: Refused = None
    prompt: Refused = None
    max_tool_calls: Refused = None

    @property
    def resumes(self) -> bool:
        """Whether it goes on with what was stored."""
        items = () if isinstance(self.input, str) else self.input
        return self.previous_response_id is not None or any(map(is_reference, items))

    def format(self) -> dict[str, Any] | None:
        """text.format as a response_format."""
        form = (self.text or {}).get("format")
        if not isinstance(form, Mapping) or form.get("type") != "json_schema":
            return form
        return {"type": "json_schema", "json_schema": {"schema": form.get("schema")}}


class TokenizeRequest(Body):
    """POST /tokenize: a prompt, or messages."""

    prompt: Text | None = None
    messages: list[dict[str, Any]] | None = Field(None, max_length=MAX_MESSAGES)
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    """POST /detokenize."""

    tokens: Annotated[list[TokenId], _FIRST_ERROR] = Field(max_length=1 << 20)


class AbortRequest(Body):
    """POST /v1/abort."""

    request_id: str


class ToolChoice(Body):
    """Anthropic's tool_choice. name: of a tool."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Body):
    """Anthropic's thinking; a type other than enabled and disabled leaves it to the template."""

    type: str
    budget_tokens: CountFromZero | None = None


class AnthropicPrompt(Body):
    """What is counted at POST /v1/messages/count_tokens: text and tools."""

    model: str | None = None
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Text | Annotated[list[dict[str, Any]], Field(max_length=MAX_MESSAGES), _FIRST_ERROR] | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None
    cache_salt: str | None = Field(None, max_length=256)
    thread: Any = None  # refused in words of its own
    mcp_servers: Refused = None
    container: Refused = None


class AnthropicRequest(AnthropicPrompt, Answering):
    """POST /v1/messages."""

    max_tokens: CountFromZero
    stop_sequences: Strings | None = None
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    metadata: dict[str, Any] | None = None
    compaction: Refused = None
