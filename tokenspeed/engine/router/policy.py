"""Where a request goes."""

import secrets
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from .backends import DECODE, PREFILL, REPLICA, Backend, Backends, Peer
from .prompts import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Prompt

_REMEMBERED = 1 << 16  # conversations
_LEAST_ANSWER = {
    COMPLETIONS: {"max_tokens": 1, "n": 1},
    CHAT: {"max_tokens": 1, "n": 1},
    MESSAGES: {"max_tokens": 1},
    RESPONSES: {"max_output_tokens": 1, "store": False},
}


@dataclass(frozen=True, slots=True)
class Choice:
    """backend: who answers; tokens: that it prefills for this; prefill: who prefills for it, if somebody else does, and
    prefill_tokens: how many."""

    backend: Backend
    tokens: int
    prefill: Backend | None = None
    prefill_tokens: int = 0


@dataclass(slots=True)
class Policy:
    """Least tokens to compute before the answer begins: those that are not in a backend's cache, and those that it has
    to do for others. least_prefill: new tokens from which a prompt is prefilled apart, where there is who does."""

    backends: Backends
    least_prefill: int = 1024
    # Of conversations, with about how many tokens they had there, where that is known.
    _homes: OrderedDict[str, tuple[Backend, int | None]] = field(default_factory=OrderedDict)

    def choose(self, prompt: Prompt, transferable: bool, without: frozenset[Backend] = frozenset()) -> Choice | None:
        """None where nobody is left. transferable: whether its request can name a prefill; without: who has been tried
        in vain."""
        candidates = [b for b in self.backends.alive(REPLICA, DECODE) if b not in without]
        if prompt.resumes and (home := self.home_of(prompt.conversation)) and home.alive:
            candidates = [b for b in candidates if b is home]  # nobody else has what it goes on with
        if not candidates:
            return None
        backend = min(candidates, key=lambda b: self._rank(b, prompt))
        new = prompt.size - self._known(backend, prompt)
        self.backends.used(backend)
        self._settle(prompt, backend)
        helpers = [b for b in self.backends.alive(PREFILL) if b.lends]
        takes = transferable and backend.kind == DECODE and backend.about.transfer is not None
        if not takes or not helpers or new < self.least_prefill:
            return Choice(backend, new)
        helper = min(helpers, key=lambda b: self._rank(b, prompt))
        self.backends.used(helper)
        return Choice(backend, 1, helper, prompt.size - self._known(helper, prompt))

    def home_of(self, conversation: str) -> Backend | None:
        """The backend that `home` was told."""
        return self._homes.get(conversation, (None, None))[0]

    def home(self, conversation: str, backend: Backend, size: int | None = None) -> None:
        """What begins so is at this backend. size: tokens of it, None for all."""
        self._homes[conversation] = backend, size
        self._homes.move_to_end(conversation)
        if len(self._homes) > _REMEMBERED:
            self._homes.popitem(last=False)

    def _settle(self, prompt: Prompt, backend: Backend) -> None:
        if prompt.conversation:
            self.home(prompt.conversation, backend, None if prompt.resumes else prompt.size)

    def _rank(self, backend: Backend, prompt: Prompt) -> tuple[int, int, int]:
        return backend.cost(prompt.size, self._known(backend, prompt)), backend.in_flight, backend.last_used

    def _known(self, backend: Backend, prompt: Prompt) -> int:
        """Tokens of the prompt in its cache: as its events say, and without them all that a conversation had there."""
        if prompt.tokens is not None and backend.listener is not None:
            return backend.cached.match(prompt.tokens)
        home, size = self._homes.get(prompt.conversation, (None, None))
        return 0 if home is not backend else prompt.size if size is None else min(size, prompt.size)


def split(path: str, body: dict[str, Any], peer: Peer) -> tuple[dict[str, Any], dict[str, Any]]:
    """The bodies for who prefills, which is `peer`, and for who decodes, under a name that both know."""
    name = secrets.token_hex(16)
    asked = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": name}
    beside = ("stream_options", "max_completion_tokens", "min_tokens", "logprobs", "top_logprobs", "prompt_logprobs")
    prefill = {key: value for key, value in body.items() if key not in beside}  # of what is said, nobody hears its id
    prefill |= {"stream": False, "kv_transfer_params": asked, **_LEAST_ANSWER[path]}
    given = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": peer.engine_id,
        "remote_host": peer.host,
        "remote_port": peer.port,
        "remote_block_ids": None,
        "transfer_id": name,
    }
    return prefill, body | {"kv_transfer_params": given}
