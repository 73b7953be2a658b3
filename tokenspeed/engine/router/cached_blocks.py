"""What one engine's prefix cache holds, put together from its events."""

from array import array
from collections import defaultdict
from collections.abc import Sequence

from ..server.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent

_MAX_BLOCKS = 1 << 22


_MAX_ID = (1 << 31) - 1


class CachedBlocks:
    """Blocks by what they hold and what comes before them, as engines name them: how a name is made does not matter."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[int | None, bytes]] = {}  # of a block: its parent, and its tokens
        self._names: dict[tuple[int | None, bytes], set[int]] = defaultdict(set)  # several in several name spaces
        self._block_size = 0

    def __len__(self) -> int:
        return len(self._places)

    def apply(self, event: KvEvent) -> None:
        """Mutates it. What an engine says twice, or of blocks that are not known, changes nothing; nor does what makes
        no sense."""
        match event:
            case BlockStored(hashes, parent, tokens, size):
                if size < 1 or len(tokens) != size * len(hashes) or len(self._places) > _MAX_BLOCKS:
                    return
                if not hashes or min(tokens) < 0 or max(tokens) > _MAX_ID:
                    return
                self._block_size = size
                for number, name in enumerate(hashes):
                    self._remove(name)
                    place = parent, array("i", tokens[number * size : (number + 1) * size]).tobytes()
                    self._places[name] = place
                    self._names[place].add(name)
                    parent = name
            case BlockRemoved(hashes):
                for name in hashes:
                    self._remove(name)
            case AllBlocksCleared():
                self.clear()

    def _remove(self, name: int) -> None:
        if place := self._places.pop(name, None):
            self._names[place].discard(name)
            if not self._names[place]:
                del self._names[place]

    def clear(self) -> None:
        self._places.clear()
        self._names.clear()

    def match(self, tokens: Sequence[int]) -> int:
        """How many of a prompt's first tokens are held, in whole blocks."""
        size, known = self._block_size, 0
        before: set[int | None] = {None}
        while size and known + size <= len(tokens):
            block = array("i", tokens[known : known + size]).tobytes()
            before = {name for parent in before for name in self._names.get((parent, block), ())}
            if not before:
                break
            known += size
        return known
