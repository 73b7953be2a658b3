"""What OpenAI's endpoints take, checked by pydantic: names, types and caps. Unknown fields are ignored, as peers do."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from ..request import MOST_BIASES, MOST_LOGPROBS, MOST_SEQUENCES, MOST_STRINGS, SamplingParams

MOST_MESSAGES = 4096
MOST_TOOLS = 512

Text = Annotated[str, Field(max_length=64 << 20)]
Strings = Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=MOST_STRINGS)]
# Whatever counts or names tokens fits 32 bits, so that no later stage meets a number it cannot hold.
Count = Annotated[int, Field(ge=1, lt=2**31)]
CountFromZero = Annotated[int, Field(ge=0, lt=2**31)]
TokenId = CountFromZero
TokenIds = Annotated[list[TokenId], Field(max_length=MOST_BIASES)]

_FIRST_ERROR = Field(fail_fast=True)  # a million wrong ids would be a million errors, 15 s of them


def _few(biases: Any) -> Any:
    """Counted before anything in it is looked at."""
    if isinstance(biases, dict) and len(biases) > MOST_BIASES:
        raise ValueError(f"logit_bias has {len(biases)} entries; at most {MOST_BIASES} are taken")
    return biases


class StreamOptions(BaseModel):
    """include_usage: a last chunk with the usage; continuous_usage_stats: usage in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Sampling(BaseModel):
    """What both endpoints have in common."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    max_tokens: Count | None = None
    n: int = Field(1, ge=1, le=MOST_SEQUENCES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Annotated[str, Field(min_length=1, max_length=1024)] | Strings | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    temperature: float | None = Field(None, ge=0, le=1000, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
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
    prompt_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    thinking_token_budget: CountFromZero | None = None
    truncate_prompt_tokens: Count | None = None
    return_token_ids: bool = False
    cache_salt: str | None = Field(None, max_length=256)
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    timeout: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="seconds after which the request is ended"
    )
    request_id: str | None = Field(None, min_length=1, max_length=128)

    def sampling(self, **more: Any) -> dict[str, Any]:
        """The fields that SamplingParams has, where they were given."""
        names = SamplingParams.__dataclass_fields__.keys() & type(self).model_fields.keys() - {"logprobs", "max_tokens"}
        return {name: getattr(self, name) for name in names} | more


class JsonSchema(BaseModel):
    name: str = "schema"
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class NamedFunction(BaseModel):
    name: str


class NamedToolChoice(BaseModel):
    type: Literal["function"] = "function"
    function: NamedFunction


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MOST_MESSAGES)
    tools: list[dict[str, Any]] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool = True
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[TokenId], _FIRST_ERROR]
        | Annotated[list[Text], Field(max_length=64), _FIRST_ERROR]
        | Annotated[list[Annotated[list[TokenId], _FIRST_ERROR]], Field(max_length=64), _FIRST_ERROR]
    )
    max_tokens: Count | None = 16
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool = False
    response_format: ResponseFormat | None = None


class TokenizeRequest(BaseModel):
    """POST /tokenize: a prompt, or messages."""

    prompt: Text | None = None
    messages: list[dict[str, Any]] | None = Field(None, max_length=MOST_MESSAGES)
    tools: list[dict[str, Any]] | None = Field(None, max_length=MOST_TOOLS)
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    tokens: Annotated[list[TokenId], _FIRST_ERROR] = Field(max_length=1 << 20)


class AbortRequest(BaseModel):
    """POST /v1/abort."""

    request_id: str


def _kind(value: Any) -> Any:
    """A dictionary whose `type` is a string, and whose budget fits 32 bits."""
    if not isinstance(value.get("type"), str):
        raise ValueError(f"its type is {value.get('type')!r:.80}; it must be a string")
    budget = value.get("budget_tokens")
    if isinstance(budget, int) and not 0 <= budget < 2**31:
        raise ValueError(f"budget_tokens is {budget!r:.80}; it must be in [0, 2^31)")
    return value


Kind = Annotated[dict[str, Any], AfterValidator(_kind)]


class AnthropicRequest(BaseModel):
    """POST /v1/messages, text and tools."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_tokens: Count
    system: Text | Annotated[list[dict[str, Any]], Field(max_length=MOST_MESSAGES), _FIRST_ERROR] | None = None
    stop_sequences: Strings | None = None
    stream: bool = False
    temperature: float | None = Field(None, ge=0, le=1000, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    top_p: float | None = Field(None, gt=0, le=1)
    tools: list[dict[str, Any]] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Kind | None = None
    thinking: Kind | None = None
    metadata: dict[str, Any] | None = None
