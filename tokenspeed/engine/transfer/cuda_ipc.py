"""Arenas on one GPU, or on two of one host that reach each other's memory (NVLink, PCIe), shared by two processes: the
decoder copies from the prefiller's memory by itself."""

import logging

import msgspec
import torch
from torch import Tensor

from ..errors import TransferError
from .arenas import Arenas

log = logging.getLogger("tokenspeed.transfer")


class _Handle(msgspec.Struct, frozen=True, array_like=True):
    """What torch says of a storage for another process (`UntypedStorage._share_cuda_`), on which GPU it is, and where
    the arena lies in it."""

    card: str
    storage: tuple[int, bytes, int, int, bytes, int, bytes, bool]
    offset: int
    length: int


def card(arenas: Arenas) -> str:
    """The GPU they are on, "" on a CPU."""
    return _uuid(arenas.device) if arenas.device.type == "cuda" else ""


def readable(arenas: Arenas) -> tuple[str, ...]:
    """The GPUs from whose memory these can be filled: their own first; none on a CPU."""
    if arenas.device.type != "cuda":
        return ()
    own = _index(arenas)
    others = [other for other in range(torch.cuda.device_count()) if other != own]
    reached = [other for other in others if torch.cuda.can_device_access_peer(own, other)]
    return tuple(_uuid(torch.device("cuda", index)) for index in (own, *reached))


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _index(arenas: Arenas) -> int:
    return arenas.device.index if arenas.device.index is not None else torch.cuda.current_device()


def export(arenas: Arenas, readable: tuple[str, ...]) -> tuple[bytes, ...]:
    """Handles of both arenas for a process that reads from their GPU; none for another one, nor where the system does
    not share memory: bytes then go over the socket. Made anew for each peer: torch counts who has them."""
    own = card(arenas)
    if not own or own not in readable:
        return ()
    handles = []
    for flat in arenas.flat:
        try:
            shared = flat.untyped_storage()._share_cuda_()
        except RuntimeError as error:  # not permitted in this container, or by this driver or allocator
            log.warning("memory is not shared with other processes, prompts go over sockets: %s", error)
            return ()
        handle = _Handle(own, shared, flat.storage_offset(), flat.numel())
        handles.append(msgspec.msgpack.encode(handle))
    return tuple(handles)


def map_arenas(arenas: Arenas, handles: tuple[bytes, ...]) -> list[Tensor] | None:
    """A peer's arenas as flat tensors of bytes on its GPU; None where they cannot be mapped, and then bytes go over the
    socket. Raises TransferError for what are no handles of two arenas."""
    if len(handles) != len(arenas.flat):
        raise TransferError(f"a peer sent {len(handles)} memory handles; one for each of {len(arenas.flat)} is needed")
    found = []
    visible = {_uuid(torch.device("cuda", index)): index for index in range(torch.cuda.device_count())}
    for data in handles:
        try:
            handle = msgspec.msgpack.decode(data, type=_Handle)
        except msgspec.DecodeError as error:
            raise TransferError(f"a peer sent something that is no memory handle: {error}") from None
        if handle.card not in visible:
            return None
        try:
            device = visible[handle.card]
            storage = torch.UntypedStorage._new_shared_cuda(device, *handle.storage[1:])
            flat = torch.empty(0, dtype=torch.uint8, device=torch.device("cuda", device))
            found.append(flat.set_(storage, handle.offset, (handle.length,)))
        except RuntimeError:  # another container, or a driver that does not share
            return None
    return found
