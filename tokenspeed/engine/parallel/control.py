"""How rank 0 tells the others what to run: each Step as one message, so that ranks cannot diverge.

Only rank 0 plans. The others receive on a thread of their own, so that rank 0 never waits for them to have time.
"""

import queue
import threading
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist

from ..schedule.step import Edit, Step

Message = Step | list[Edit] | None  # None: the end

_FRAME = 1 << 14  # bytes of a message; a longer one is followed by the rest of it
_LENGTH = 8
_PATIENCE = timedelta(days=365)  # an idle engine sends nothing

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode


class StepChannel:
    """A group of all ranks over gloo, on any device. Every rank must construct it alike."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def smallest(self, values: list[int]) -> list[int]:
        """Of each value the smallest that any rank has."""
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self._group)
        return tensor.tolist()

    def send(self, message: Message) -> None:
        """Rank 0's."""
        payload = _encode(message)
        frame = torch.zeros(_FRAME, dtype=torch.uint8)
        whole = torch.frombuffer(bytearray(len(payload).to_bytes(_LENGTH, "little") + payload), dtype=torch.uint8)
        frame[: len(whole)] = whole[:_FRAME]
        dist.broadcast(frame, 0, group=self._group)
        if len(whole) > _FRAME:
            dist.broadcast(whole[_FRAME:].clone(), 0, group=self._group)

    def receive(self) -> Message:
        """The other ranks'. Raises RuntimeError where rank 0 is gone."""
        frame = torch.zeros(_FRAME, dtype=torch.uint8)
        dist.broadcast(frame, 0, group=self._group)
        length = int.from_bytes(frame[:_LENGTH].numpy().tobytes(), "little")
        missing = max(length + _LENGTH - _FRAME, 0)
        if missing:
            rest = torch.zeros(missing, dtype=torch.uint8)
            dist.broadcast(rest, 0, group=self._group)
            frame = torch.cat([frame, rest])
        return _decode(frame[_LENGTH : _LENGTH + length].numpy().tobytes())


class Inbox:
    """A rank's messages as they come, in order."""

    def __init__(self, channel: StepChannel):
        self._queue: queue.SimpleQueue[Message | Exception] = queue.SimpleQueue()
        threading.Thread(target=self._receive, args=(channel,), name="tokenspeed-steps", daemon=True).start()

    def get(self) -> Message:
        """Waits for the next. Raises what ended the channel."""
        message = self._queue.get()
        if isinstance(message, Exception):
            raise message
        return message

    def _receive(self, channel: StepChannel) -> None:
        message: Message = Step()
        while message is not None:
            try:
                message = channel.receive()
            except RuntimeError as error:
                self._queue.put(error)
                return
            self._queue.put(message)
