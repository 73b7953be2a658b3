"""The hybrid prefix cache as the engine sees it: typed errors around `tokenspeed._cache`.

`csrc/cache/cache.h` is the contract: who owns which page and slot when, and when each call may be made.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from tokenspeed._cache import Admission, Cache, Error, Fork, Loan, Match, NoRoom, Policy, Reason, Reception

from ..errors import CapacityError, ConfigError, RequestError
from .step import Move

__all__ = [
    "Admission",
    "CacheConfig",
    "Fork",
    "Loan",
    "Match",
    "NoRoom",
    "Policy",
    "PrefixCache",
    "Reason",
    "Reception",
    "TokenBuffer",
]


class TokenBuffer(Protocol):
    """A contiguous one-dimensional int32 buffer: a `numpy.int32` array, an `array.array("i")`. Never copied."""

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Budgets are counts of pages and slots, on the device and of the host tier."""

    pages: int
    slots: int
    host_pages: int = 0
    host_slots: int = 0
    page_tokens: int = 64
    ghost_nodes: int = 0  # evicted pages whose token ids are remembered
    grid_tokens: int = 0  # distance of the optional snapshots in a long prefill; 0: none
    policy: Policy = Policy.VALUE
    branch_points: bool = True
    enabled: bool = True  # False: pages and slots are allotted, nothing is shared


class PrefixCache:
    """Every method but `probe`, `stats` and `check` mutates the cache.

    Raises RequestError for a call that is wrong whatever the load, and CapacityError for a sequence that does not fit
    an empty cache. `NoRoom` is returned, not raised: it is an ordinary outcome under load.
    """

    def __init__(self, config: CacheConfig):
        self.config = config
        try:
            self._cache = Cache(**asdict(config))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"impossible cache: {config}") from error

    def probe(self, name_space: str, prompt: TokenBuffer, *, prompt_logprobs: bool = False) -> Match:
        """How much of `prompt` ([tokens] int32) is known, and why not more. Changes nothing."""
        return self._cache.probe(name_space, prompt, prompt_logprobs)

    def admit(
        self,
        request: int,
        name_space: str,
        prompt: TokenBuffer,
        boundaries: Sequence[int] = (),
        *,
        prompt_logprobs: bool = False,
    ) -> Admission | NoRoom:
        """All or nothing: pages for `prompt` ([tokens] int32) and one token, a working slot, promised snapshots.

        `boundaries` are token counts at which a later prompt is likely to leave this one. Raises RequestError for an
        empty prompt or an id that is running, CapacityError for a prompt that can never fit.
        """
        result = self._cache.admit(request, name_space, prompt, boundaries, prompt_logprobs)
        if isinstance(result, Error):
            raise self._error(result, request, len(prompt) + 1)
        return result

    def extend(self, request: int, count: int) -> tuple[int, ...] | NoRoom:
        """Room for `count` tokens in all. Returns the pages appended, () when they were there already."""
        result = self._cache.extend(request, count)
        if type(result) is tuple:  # once per sequence and step
            return result
        if isinstance(result, Error):
            raise self._error(result, request, count)
        return result

    def commit(self, request: int, tokens: TokenBuffer, count: int) -> None:
        """Publishes the first `count` of `tokens` ([>= count] int32, the whole sequence): computed and verified."""
        if (error := self._cache.commit(request, tokens, count)) is not None:
            raise self._error(error, request, count)

    def fork(self, parent: int, child: int, tokens: TokenBuffer, count: int) -> Fork | NoRoom:
        """`child` continues at `count` tokens of `parent`, the number its launched steps have consumed."""
        result = self._cache.fork(parent, child, tokens, count)
        if isinstance(result, Error):
            raise self._error(result, child if result == Error.DUPLICATE_REQUEST else parent, count)
        return result

    def finish(self, request: int, tokens: TokenBuffer, count: int, *, donate: bool = True) -> None:
        """Commits `count` tokens, keeps the state there as a snapshot, returns the rest. Also how to preempt."""
        if (error := self._cache.finish(request, tokens, count, donate)) is not None:
            raise self._error(error, request, count)

    def abort(self, request: int) -> bool:
        """Returns everything. False if no such request runs: aborting twice is harmless."""
        error = self._cache.abort(request)
        if error == Error.MOVING:
            raise self._error(error, request, 0)
        return error is None

    def receive(self, id: int, name_space: str, prefix: TokenBuffer) -> Reception | NoRoom:
        """All or nothing: pages for what is missing of `prefix` ([tokens] int32), and a slot for the state after it.

        The caller brings the bytes of rows [kv_tokens, tokens) and of the slot; then `received`, or `release`. Until
        then a prompt that begins so sees it as pending. `id` as of requests. Raises RequestError and CapacityError as
        `admit` does, RequestError too where the cache is off.
        """
        result = self._cache.receive(id, name_space, prefix)
        if isinstance(result, Error):
            raise self._error(result, id, len(prefix))
        return result

    def received(self, id: int) -> None:
        """The bytes are there: prompts match the prefix. It stays pinned until `release`."""
        if (error := self._cache.received(id)) is not None:
            raise self._error(error, id, 0)

    def lend(self, id: int, name_space: str, prefix: TokenBuffer) -> Loan:
        """Pins what is there of `prefix` ([tokens] int32), so that its bytes can be read until `release`: whole pages,
        and the deepest state at or below its end. Errors as of `receive`."""
        result = self._cache.lend(id, name_space, prefix)
        if isinstance(result, Error):
            raise self._error(result, id, len(prefix))
        return result

    def release(self, id: int) -> bool:
        """Ends a reception or a loan, whatever it has come to: what was not received returns, and nobody may write
        there any more. False if there is none of this id."""
        return self._cache.release(id) is None

    def take_moves(self) -> tuple[Move, ...]:
        """What is to be copied between the device and host memory, in order; called once per plan. Each must be
        started, and be told to be `moved`."""
        return tuple(Move(*move) for move in self._cache.take_moves())

    def moved(self, move: int) -> None:
        """A move is done. Raises RequestError for a number that is not under way."""
        if (error := self._cache.moved(move)) is not None:
            raise self._error(error, move, 0)

    def set_costs(self, page: float, slot: float, token: float) -> None:
        """Seconds to move a page, to move a slot, and to compute a token: what decides whether a state that is in host
        memory is brought back or computed again. Before they are known everything is brought back."""
        self._cache.set_costs(page, slot, token)

    def clear(self, name_space: str) -> bool:
        """Forgets a namespace; its running sequences go on and leave nothing. False if there was none."""
        return self._cache.clear(name_space)

    def log_events(self, entries: int) -> None:
        """Keep a log of whole pages that become matchable or are let go, of at most `entries`; 0 stops it."""
        self._cache.log_events(entries)

    def drain_events(self) -> tuple[tuple, ...]:
        """The log since the last call, oldest first, and empties it.

        ("stored", block, parent block or None, name space where there is no parent, tokens); ("removed", block), after
        which that block number may come again; ("cleared",): forget every block, those that are there follow.
        """
        return self._cache.drain_events()

    def clear_all(self) -> int:
        """`clear` of every namespace. Returns how many there were."""
        return self._cache.clear_all()

    def stats(self) -> dict[str, int]:
        """Counters since construction and gauges of now; `csrc/cache/cache.h`, `Stats`, explains each."""
        return self._cache.stats()

    def check(self) -> str:
        """The first broken invariant as a sentence, "" when all hold. Visits everything: for tests and debugging."""
        return self._cache.check()

    def _error(self, error: Error, request: int, count: int) -> Exception:
        config = self.config
        if error == Error.TOO_LARGE:
            room = f"{config.pages} pages of {config.page_tokens} tokens and {config.slots} state slots"
            return CapacityError(f"request {request} needs room for {count} tokens; the cache has {room}")
        return RequestError(
            {
                Error.UNKNOWN_REQUEST: f"request {request} is not running",
                Error.DUPLICATE_REQUEST: f"request {request} is running already; ids must be unique",
                Error.EMPTY_PROMPT: f"request {request} has no tokens; it needs at least one",
                Error.BEYOND_PAGES: f"request {request} holds no pages for {count} tokens; extend it first",
                Error.TOKENS_MISSING: f"request {request}: {count} tokens named, but the buffer is shorter",
                Error.MOVING: f"request {request} waits for what it resumes from; its move must be done first",
                Error.UNKNOWN_MOVE: f"move {request} is not under way",
                Error.DISABLED: "the cache is off: it neither receives nor lends a prefix",
                Error.BACKWARDS: f"request {request} has committed more than {count} tokens; counts only grow",
            }[error]
        )
