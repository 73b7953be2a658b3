"""What two engines say to each other: a version byte and a msgspec value as MessagePack, never code; data follows Data
as a frame of its own."""

import msgspec

from ..errors import TransferError

VERSION = 2
MAX_MESSAGE_BYTES = 1 << 18  # of anything but data
MAX_READ_BYTES = 1 << 20  # that one Read asks for
MAX_ROOM_CHARACTERS = 128
MAX_LEASE_SECONDS = 3600.0  # as of --transfer-lease
KV, SLOTS = 0, 1  # the arenas


class Part(msgspec.Struct, frozen=True, array_like=True):
    """Bytes of an arena."""

    arena: int
    offset: int
    length: int


class Identity(msgspec.Struct, frozen=True):
    """What two engines must have in common before bytes of one mean anything to the other.

    model: of the checkpoint's files; ranks: that split the dense weights, and the experts; dtype: of weights and
    activations; page: shape of one, (layers, keys and values, heads, tokens, dimensions); slot: the parts of one for
    each layer, (name, dtype, shape); slot_layers, slot_bytes: how often they come, and what all take; hidden_bytes: of
    a slot, for the MTP head.
    """

    model: str
    quantization: str
    ranks: tuple[int, int]
    dtype: str
    page_dtype: str
    page_tokens: int
    page: tuple[int, ...]
    slot: tuple[tuple[str, str, tuple[int, ...]], ...]
    slot_layers: int
    slot_bytes: int
    hidden_bytes: int


class Agent(msgspec.Struct, frozen=True):
    """Of NIXL, through which arenas can be read. metadata: how it describes itself; kind, device: of its memory;
    addresses: where each arena begins there."""

    metadata: bytes
    kind: str
    device: int
    addresses: tuple[int, ...]


class Hello(msgspec.Struct, tag=True, frozen=True):
    """engine: who asks; cards: the GPUs whose memory it can read by itself; nixl: whether it can read through NIXL."""

    engine: str
    identity: Identity
    cards: tuple[str, ...] = ()
    nixl: bool = False


class Welcome(msgspec.Struct, tag=True, frozen=True):
    """lease: seconds of silence after which either side gives a room up. handles: of the arenas, where the asker can
    map them (`cuda_ipc`); agent: where it can read them through NIXL; ports: of the engine's other ranks, in their
    order."""

    engine: str
    lease: float
    handles: tuple[bytes, ...] = ()
    agent: Agent | None = None
    ports: tuple[int, ...] = ()


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The two engines do not fit: in `field` one has `ours`, who refuses, and the other `theirs`, who asked."""

    field: str
    ours: str
    theirs: str


class Stranger(msgspec.Struct, tag=True, frozen=True):
    """Say Hello first: this engine has started since, or has forgotten."""


class Ask(msgspec.Struct, tag=True, frozen=True):
    """What is there of a room beyond `pages` of its `epoch`? digest: of the prompt that the room should be of."""

    room: str
    digest: bytes
    epoch: int = -1
    pages: int = 0


class Waiting(msgspec.Struct, tag=True, frozen=True):
    """Nothing new yet. offered: whether there is such a room."""

    room: str
    offered: bool


class Ready(msgspec.Struct, tag=True, frozen=True):
    """Pages from number `first` on, one after the other in `parts`; state: the slot, with which all pages are there."""

    room: str
    epoch: int
    first: int
    parts: tuple[Part, ...]
    state: Part | None = None


class Gone(msgspec.Struct, tag=True, frozen=True):
    """There will be nothing (more) of this room."""

    room: str
    reason: str


class Read(msgspec.Struct, tag=True, frozen=True):
    """Send these parts. number: which Read it is, for its Data."""

    room: str
    epoch: int
    number: int
    parts: tuple[Part, ...]


class Data(msgspec.Struct, tag=True, frozen=True):
    """A frame with the parts' bytes follows."""

    room: str
    number: int


class Done(msgspec.Struct, tag=True, frozen=True):
    """Everything was read, in this epoch."""

    room: str
    epoch: int


class Closed(msgspec.Struct, tag=True, frozen=True):
    """And all of it was whole."""

    room: str


class Leave(msgspec.Struct, tag=True, frozen=True):
    """The room is not wanted any more."""

    room: str


FromDecoder = Hello | Ask | Read | Done | Leave
FromPrefiller = Welcome | Refused | Stranger | Waiting | Ready | Gone | Data | Closed

_encode = msgspec.msgpack.Encoder().encode
_from_decoder = msgspec.msgpack.Decoder(FromDecoder)
_from_prefiller = msgspec.msgpack.Decoder(FromPrefiller)


class OtherVersion(TransferError):
    """A message of another version of this protocol."""


def encode(message: FromDecoder | FromPrefiller) -> bytes:
    return bytes([VERSION]) + _encode(message)


def decode_from_decoder(frame: bytes) -> FromDecoder:
    """Raises OtherVersion, or TransferError for what is no message."""
    return _decode(frame, _from_decoder)


def decode_from_prefiller(frame: bytes) -> FromPrefiller:
    """As `decode_from_decoder`."""
    return _decode(frame, _from_prefiller)


def _decode(frame: bytes, decoder: msgspec.msgpack.Decoder):
    if not frame or frame[0] != VERSION:
        raise OtherVersion(
            f"a message of version {frame[0] if frame else None} of the transfer protocol came; this engine speaks "
            f"version {VERSION}."
        )
    try:
        return decoder.decode(memoryview(frame)[1:])
    except (msgspec.DecodeError, RecursionError) as error:
        raise TransferError(f"a peer sent something that is no message: {error}") from None
