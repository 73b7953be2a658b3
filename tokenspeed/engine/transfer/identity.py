"""Which engines may exchange state: the same files, laid out alike."""

import hashlib
from array import array
from collections.abc import Sequence
from pathlib import Path

from ..config import PAGE_TOKENS
from ..errors import HandshakeError
from ..executor.memory import MemoryLayout
from .messages import Identity

_SAMPLES, _SAMPLE_BYTES = 32, 4096  # of each file of weights


def identity(layout: MemoryLayout, model: str, quantization: str, ranks: tuple[int, int] = (1, 1)) -> Identity:
    """Of an engine with this memory. model: the `fingerprint` of its checkpoint; ranks: that split the dense weights,
    and the experts."""
    parts = tuple((name, _name(dtype), tuple(shape)) for name, (dtype, shape) in layout.slot_parts().items())
    return Identity(
        model,
        quantization,
        ranks,
        _name(layout.dtype),
        _name(layout.page_dtype),
        PAGE_TOKENS,
        layout.page_shape,
        parts,
        layout.config.linear_layers,
        layout.slot_bytes,
        layout.hidden_bytes,
    )


def check(ours: Identity, theirs: Identity) -> None:
    """Raises HandshakeError for the first thing in which they differ."""
    for field in Identity.__struct_fields__:
        own, other = getattr(ours, field), getattr(theirs, field)
        if own != other:
            raise HandshakeError(field, _shown(own), _shown(other))


def fingerprint(directory: Path) -> str:
    """Of a checkpoint: its configuration, and of each file of weights the size, the names and places of its tensors,
    and bytes at even distances. Reads little of it, however large it is."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(8 + int.from_bytes(file.read(8), "little")))
            for sample in range(_SAMPLES):
                file.seek(size * sample // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def digest(name_space: str, tokens: Sequence[int]) -> bytes:
    """Of a prompt, so that a room's name alone does not make one engine take another prompt's state."""
    found = hashlib.blake2b(name_space.encode(), digest_size=16, person=b"tokenspeed")
    found.update(array("i", tokens).tobytes())
    return found.digest()


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(value) -> str:
    return str(value)[:500]
