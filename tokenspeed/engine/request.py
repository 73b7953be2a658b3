"""What a caller asks for and gets back, as checked values. Names, defaults and shapes are vLLM's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from . import errors
from .errors import EngineError, RequestError, TokenSpeedError

if TYPE_CHECKING:
    from .text.turn import Answer

MAX_SEQUENCES = 64  # n of one request
MAX_LOGPROBS = 20
MAX_BIASES = 1024  # ids with a logit_bias, allowed ids, stop ids
MAX_STRINGS = 64  # stop strings, bad words
MAX_STRING_CHARACTERS = 1024


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when generation ends.

    n: how many continuations of one prompt. temperature: 0 is greedy. top_k: 0 or -1 is off. top_p in (0, 1], min_p in
    [0, 1]. presence_penalty, frequency_penalty in [-2, 2]: taken from the logits of generated ids, once and per
    occurrence. repetition_penalty > 0: logits of ids in prompt or output are divided by it where positive, multiplied
    where negative. logit_bias: added, by id. allowed_token_ids: no other id is chosen. bad_words: texts that are never
    completed. seed: noise is a function of it, the output's number and the id alone; None draws one.

    max_tokens: at most this many, None for as many as fit. min_tokens: no end id is chosen, and no stop counts that
    ends, in so many first tokens; a stop that only begins in them counts. stop: texts that end generation, also across
    token borders, and are cut off unless include_stop_str_in_output.
    stop_token_ids: ids that do. ignore_eos: the model's own end ids do not. thinking_token_budget: after this many
    tokens without it, `</think>` is forced. logprobs: alternatives per token (0: the chosen one alone; None: none);
    prompt_logprobs likewise. skip_special_tokens: leave special tokens out of the text.

    Raises RequestError for a value outside its range.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = None
    allowed_token_ids: Sequence[int] | None = None
    thinking_token_budget: int | None = None

    def __post_init__(self):
        # Sequences become tuples, so that the value is immutable and can be hashed and sent.
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        bias = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias
        for name, values in (
            ("stop", stop),
            ("stop_token_ids", self.stop_token_ids),
            ("bad_words", self.bad_words),
            ("allowed_token_ids", self.allowed_token_ids),
            ("logit_bias", bias),
        ):
            object.__setattr__(self, name, _as_tuple(name, values))
        for name, valid, wanted in _ranges(self):
            if not valid:
                raise RequestError(f"{name} is {getattr(self, name)!r}; it must be {wanted}.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def _as_tuple(name: str, values: Any) -> tuple:
    try:
        return tuple(values or ())
    except TypeError:
        raise RequestError(f"{name} is {values!r}; it must be a list.") from None


def _integer(value: Any, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def _ids(values: tuple) -> bool:
    return len(values) <= MAX_BIASES and all(_integer(id, 0) for id in values)


def _strings(values: tuple) -> bool:
    return len(values) <= MAX_STRINGS and all(
        isinstance(text, str) and 0 < len(text) <= MAX_STRING_CHARACTERS for text in values
    )


def _ranges(p: SamplingParams) -> tuple[tuple[str, bool, str], ...]:
    finite = math.inf  # exclusive below: NaN and infinity fail a comparison or the bound
    strings = f"up to {MAX_STRINGS} strings of 1 to {MAX_STRING_CHARACTERS} characters"
    return (
        ("n", _integer(p.n, 1, MAX_SEQUENCES), f"an integer from 1 to {MAX_SEQUENCES}"),
        ("presence_penalty", _number(p.presence_penalty, -2, 2), "in [-2, 2]"),
        ("frequency_penalty", _number(p.frequency_penalty, -2, 2), "in [-2, 2]"),
        ("repetition_penalty", _number(p.repetition_penalty) and 0 < p.repetition_penalty < finite, "a number > 0"),
        ("temperature", _number(p.temperature) and 0 <= p.temperature < finite, "a finite number >= 0"),
        ("top_p", _number(p.top_p) and 0 < p.top_p <= 1, "in (0, 1]"),
        ("top_k", _integer(p.top_k, -1), "an integer >= 0 (0 and -1 are off)"),
        ("min_p", _number(p.min_p, 0, 1), "in [0, 1]"),
        ("seed", p.seed is None or _integer(p.seed, 0, 2**63 - 1), "in [0, 2^63)"),
        ("stop", _strings(p.stop), strings),
        ("stop_token_ids", _ids(p.stop_token_ids), f"up to {MAX_BIASES} token ids"),
        ("bad_words", _strings(p.bad_words), strings),
        ("max_tokens", p.max_tokens is None or _integer(p.max_tokens, 1), "at least 1, or None"),
        ("min_tokens", _integer(p.min_tokens, 0, p.max_tokens or math.inf), "from 0 to max_tokens"),
        ("logprobs", p.logprobs is None or _integer(p.logprobs, 0, MAX_LOGPROBS), f"from 0 to {MAX_LOGPROBS}"),
        (
            "prompt_logprobs",
            p.prompt_logprobs is None or _integer(p.prompt_logprobs, 0, MAX_LOGPROBS),
            f"from 0 to {MAX_LOGPROBS}",
        ),
        (
            "logit_bias",
            len(p.logit_bias) <= MAX_BIASES
            and all(_pair(pair) and _integer(pair[0], 0) and _number(pair[1], -100, 100) for pair in p.logit_bias),
            f"up to {MAX_BIASES} pairs of a token id and a number in [-100, 100]",
        ),
        ("allowed_token_ids", _ids(p.allowed_token_ids), f"up to {MAX_BIASES} token ids"),
        (
            "thinking_token_budget",
            p.thinking_token_budget is None or _integer(p.thinking_token_budget, 0),
            "an integer >= 0",
        ),
    )


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and what is wanted of it.

    id: unique among the running; boundaries: token counts at which a later prompt is likely to leave this one;
    name_space: prompts of different ones never share memory; priority: lower goes first, arrival breaks ties;
    snapshot_token_id: the state after the output is kept only where the output holds this id, because otherwise no
    later prompt begins with it; None: it is kept in any case.
    stops_after: stop strings count only once the output holds this text; None: from its start.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    boundaries: tuple[int, ...] = ()
    name_space: str = ""
    priority: int = 0
    snapshot_token_id: int | None = None
    stops_after: str | None = None

    def check(self, vocab: int, max_tokens: int) -> None:
        """Raises RequestError where a model of this vocabulary and this much room cannot take the request."""
        if not self.prompt:
            raise RequestError("the prompt is empty; at least one token is needed.")
        if not all(isinstance(id, int) for id in self.prompt):
            raise RequestError("the prompt holds something that is no integer; it must be token ids.")
        if bad := [b for b in self.boundaries if not isinstance(b, int) or not 0 <= b <= len(self.prompt)]:
            raise RequestError(f"boundary {bad[0]!r} is outside the prompt of {len(self.prompt)} tokens.")
        try:
            self.name_space.encode()
        except UnicodeEncodeError:
            raise RequestError(f"the name space {self.name_space!r} is not valid Unicode.") from None
        if min(self.prompt) < 0 or max(self.prompt) >= vocab:
            position = next(i for i, id in enumerate(self.prompt) if not 0 <= id < vocab)
            raise RequestError(
                f"token id {self.prompt[position]} at position {position} is outside the vocabulary of {vocab}."
            )
        named = [*self.params.stop_token_ids, *self.params.allowed_token_ids, *(id for id, _ in self.params.logit_bias)]
        if named and max(named) >= vocab:
            raise RequestError(
                f"token id {max(named)} in the sampling parameters is outside the vocabulary of {vocab}."
            )
        wanted = self.params.max_tokens or 1
        if len(self.prompt) + wanted > max_tokens:
            raise RequestError(
                f"the prompt of {len(self.prompt)} tokens and max_tokens {wanted} exceed the context of {max_tokens} "
                "tokens; shorten either (contexts beyond the model's own need YaRN in its rope_parameters)."
            )


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural log of a token's probability before penalties and temperature, its rank from 1, and its text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True, slots=True)
class PrefixReuse:
    """How a prompt was met by the prefix cache, in tokens: what of it was known, had keys and values, was resumed
    (`cached_tokens`), and was computed although its keys and values were there; reason: why not more was reused;
    moved_tokens: of those resumed, how many came back from host memory."""

    known_tokens: int
    kv_tokens: int
    cached_tokens: int
    recomputed_tokens: int
    reason: str
    moved_tokens: int = 0

    def __str__(self) -> str:
        moved = f" ({self.moved_tokens} from host memory)" if self.moved_tokens else ""
        return (
            f"{self.cached_tokens} resumed{moved}, {self.recomputed_tokens} recomputed, known to {self.known_tokens} "
            f"({self.reason.lower().replace('_', ' ')})"
        )


@dataclass(slots=True)
class Acceptance:
    """How drafts fared. steps: in which some were verified; ids: that those steps gave; drafted, accepted: of the first
    draft behind an id, the second, and so on, how many were verified and how many were right."""

    steps: int = 0
    ids: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def count(self, drafts: int, ids: int) -> None:
        """A step verified as many drafts and gave as many ids."""
        self.steps += 1
        self.ids += ids
        for counts, verified in ((self.drafted, drafts), (self.accepted, ids - 1)):
            counts += [0] * (drafts - len(counts))
            for place in range(verified):
                counts[place] += 1

    def add(self, other: "Acceptance | None") -> None:
        """Mutates this one. None: nothing was verified."""
        if other is None:
            return
        self.steps += other.steps
        self.ids += other.ids
        for own, more in ((self.drafted, other.drafted), (self.accepted, other.accepted)):
            own += [0] * (len(more) - len(own))
            for place, count in enumerate(more):
                own[place] += count

    def since(self, before: "Acceptance") -> "Acceptance":
        """What has come to it since it was as `before`."""

        def left(now: list[int], then: list[int]) -> list[int]:
            return [count - (then[place] if place < len(then) else 0) for place, count in enumerate(now)]

        drafted, accepted = left(self.drafted, before.drafted), left(self.accepted, before.accepted)
        while drafted and not drafted[-1]:
            drafted, accepted = drafted[:-1], accepted[:-1]
        return Acceptance(self.steps - before.steps, self.ids - before.ids, drafted, accepted)

    @property
    def ids_a_step(self) -> float:
        return self.ids / self.steps if self.steps else 1.0

    @property
    def rates(self) -> list[float]:
        """Of the first draft behind an id, the second, and so on, what share was right."""
        return [right / made if made else 0.0 for made, right in zip(self.drafted, self.accepted, strict=True)]

    def prediction_tokens(self) -> dict[str, int]:
        """OpenAI's names for them in a usage; empty where nothing was verified."""
        if not self.steps:
            return {}
        accepted = sum(self.accepted)
        return {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": sum(self.drafted) - accepted,
        }

    def __str__(self) -> str:
        if not self.steps:
            return "no drafts"
        rates = " ".join(f"{100 * rate:.0f}%" for rate in self.rates)
        return f"{self.ids_a_step:.2f} tokens a step, drafts right by position: {rates}"


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Seconds since the request was submitted: scheduled, first token, last token; preemptions: how often it gave way;
    waited_steps: steps it waited for another request to prefill what both begin with; drafts: how they fared, None
    where none were verified."""

    scheduled_s: float
    first_token_s: float
    finished_s: float
    preemptions: int
    waited_steps: int
    drafts: Acceptance | None = None


class TokenScores(NamedTuple):
    """Log-probabilities of one token: the chosen id, then the likeliest ids, each with its logarithm and rank."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]


class Failure(msgspec.Struct, frozen=True):
    """An error as a message between processes. kind: its class in `errors`; what is none of them is an EngineError."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        if isinstance(error, TokenSpeedError):
            return cls(type(error).__name__, str(error))
        return cls(EngineError.__name__, f"{type(error).__name__}: {error}")

    @property
    def error(self) -> TokenSpeedError:
        return getattr(errors, self.kind, EngineError)(self.message)

    def __str__(self) -> str:
        return self.message


class Update(msgspec.Struct):
    """News of one continuation: index says which; ids and the text they complete, which may come later than they do.

    scores: an entry an id where log-probabilities are wanted.
    finish_reason: "stop", "length", "abort" or "error" with the last news of it; stop_reason: the stop string or id.
    prompt_scores: with the first update, one entry a prompt token from the second on. error: what went wrong, where the
    finish_reason is "error": RequestError, CorruptedError or EngineError.
    """

    request_id: str
    index: int
    ids: list[int] = []
    text: str = ""
    scores: list[TokenScores] = []
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_scores: list[TokenScores] | None = None
    reuse: PrefixReuse | None = None
    metrics: RequestMetrics | None = None
    error: Failure | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One continuation. finish_reason: "stop", "length", "abort" or "error"; stop_reason: the stop string or id,
    None for the model's own end. answer: the turn taken apart, where a conversation was asked."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    answer: "Answer | None" = None


@dataclass(slots=True)
class RequestOutput:
    """A prompt with its continuations. prompt_logprobs: one entry a prompt token, None for the first; error: why its
    finish reasons are "error"."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = False
    reuse: PrefixReuse | None = None
    metrics: RequestMetrics | None = None
    error: TokenSpeedError | None = None

    @property
    def num_cached_tokens(self) -> int:
        return self.reuse.cached_tokens if self.reuse else 0
