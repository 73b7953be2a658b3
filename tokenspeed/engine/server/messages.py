"""What the HTTP process and the engine process say to each other: msgspec values as MessagePack, never code."""

import msgspec

from ..config import EngineConfig
from ..request import Failure, Request, Update
from ..text.grammar import GrammarSpec
from ..transfer.params import Address, Transfer, TransferSettings


class Settings(msgspec.Struct, frozen=True):
    """What the engine process is started with. kv_events: the endpoint to publish cache events at, None for none;
    transfer: how it takes part in transfers, None where it does not."""

    directory: str
    config: EngineConfig
    kv_events: str | None = None
    transfer: TransferSettings | None = None


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Run a request. grammar: what its output must look like, as `text.grammar` takes it; grammar_bytes: what it takes
    when it is compiled; transfer: where it is prefilled or decoded, if elsewhere."""

    request: Request
    grammar: GrammarSpec | None = None
    grammar_bytes: int = 0
    transfer: Transfer | None = None


class Abort(msgspec.Struct, tag=True, frozen=True):
    request_id: str


class Clear(msgspec.Struct, tag=True, frozen=True):
    """Forget every cached prefix."""


class Ping(msgspec.Struct, tag=True, frozen=True):
    number: int


class Stop(msgspec.Struct, tag=True, frozen=True):
    """Leave at once."""


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The engine takes requests. max_model_len, max_num_seqs: its limits; transfer: where peers find it."""

    max_model_len: int
    max_num_seqs: int
    transfer: Address | None = None


class News(msgspec.Struct, tag=True, frozen=True):
    """What one step brought."""

    updates: list[Update]


class Refused(msgspec.Struct, tag=True, frozen=True):
    """A request that was not taken."""

    request_id: str
    failure: Failure


class Pong(msgspec.Struct, tag=True, frozen=True):
    """The engine's answer, between two steps. stats: of scheduler and cache, by name."""

    number: int
    stats: dict[str, float]


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The engine cannot go on, and its process ends."""

    reason: str


ToEngine = Submit | Abort | Clear | Ping | Stop
FromEngine = Ready | News | Refused | Pong | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
