"""Arenas on one GPU, shared by two processes: the decoder copies from the prefiller's memory by itself."""

import logging

import msgspec
import torch
from torch import Tensor

from ..errors import TransferError
from .arenas import Arenas

log = logging.getLogger("tokenspeed.transfer")


class _Handle(msgspec.Struct, frozen=True, array_like=True):
    """What torch says of a storage for another process (`UntypedStorage._share_cuda_`), and where the arena lies in
    it."""

    storage: tuple[int, bytes, int, int, bytes, int, bytes, bool]
    offset: int
    length: int


def card(arenas: Arenas) -> str:
    """The GPU they are on, "" on a CPU."""
    if arenas.device.type != "cuda":
        return ""
    return str(torch.cuda.get_device_properties(arenas.device).uuid)


def export(arenas: Arenas, peer_card: str) -> tuple[bytes, ...]:
    """Handles of both arenas for a process on the same GPU; none for another one, nor where the system does not share
    memory: bytes then go over the socket. Made anew for each peer: torch counts who has them."""
    if not peer_card or peer_card != card(arenas):
        return ()
    handles = []
    for flat in arenas.flat:
        try:
            shared = flat.untyped_storage()._share_cuda_()
        except RuntimeError as error:  # not permitted in this container, or by this driver or allocator
            log.warning("memory is not shared with other processes, prompts go over sockets: %s", error)
            return ()
        handle = _Handle(shared, flat.storage_offset(), flat.numel())
        handles.append(msgspec.msgpack.encode(handle))
    return tuple(handles)


def map_arenas(arenas: Arenas, handles: tuple[bytes, ...]) -> list[Tensor] | None:
    """A peer's arenas as flat tensors of bytes on this process's GPU; None where they cannot be mapped, and then bytes
    go over the socket. Raises TransferError for what are no handles of two arenas."""
    if len(handles) != len(arenas.flat):
        raise TransferError(f"a peer sent {len(handles)} memory handles; one for each of {len(arenas.flat)} is needed")
    found = []
    for data, own in zip(handles, arenas.flat, strict=True):
        try:
            handle = msgspec.msgpack.decode(data, type=_Handle)
        except msgspec.DecodeError as error:
            raise TransferError(f"a peer sent something that is no memory handle: {error}") from None
        try:
            device = arenas.device.index if arenas.device.index is not None else torch.cuda.current_device()
            storage = torch.UntypedStorage._new_shared_cuda(device, *handle.storage[1:])
            flat = torch.empty(0, dtype=torch.uint8, device=own.device)
            found.append(flat.set_(storage, handle.offset, (handle.length,)))
        except RuntimeError:  # another container, or a driver that does not share
            return None
    return found
