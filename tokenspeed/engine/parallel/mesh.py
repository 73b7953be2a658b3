"""The ranks of one model and their named groups. Values only."""

from dataclasses import dataclass

from ..errors import ConfigError

GROUPS = {
    "tp": "heads, feed-forward columns, vocabulary",
    "ep": "experts",
    "expert_tp": "columns of each expert, where tp is larger than ep",
    "world": "every rank: columns of the shared expert, the sum of a mixture",
}


@dataclass(frozen=True, slots=True)
class Mesh:
    """tp: ranks that split the dense weights; ep: ranks that split the experts; rank: which one this is.

    Both count the same ranks: there are max(tp, ep), and the smaller count divides the larger. With tp > ep each expert
    is cut into tp / ep column slices; with ep > tp the dense part is computed ep / tp times over. Neighbours in rank
    share a tp group and an expert's slices. Raises ConfigError for counts or a rank that do not fit.
    """

    tp: int = 1
    ep: int = 1
    rank: int = 0

    def __post_init__(self):
        for name, count in (("tp", self.tp), ("ep", self.ep)):
            if count < 1:
                raise ConfigError(f"{name} is {count}; at least 1 rank is needed.")
        if max(self.tp, self.ep) % min(self.tp, self.ep):
            raise ConfigError(f"tp {self.tp} and ep {self.ep} do not fit: one must divide the other.")
        if not 0 <= self.rank < self.world:
            raise ConfigError(f"rank {self.rank} is outside the {self.world} ranks of tp {self.tp} and ep {self.ep}.")

    @property
    def world(self) -> int:
        return max(self.tp, self.ep)

    def size(self, group: str) -> int:
        """How many ranks a group has."""
        return {"tp": self.tp, "ep": self.ep, "expert_tp": self.world // self.ep, "world": self.world}[group]

    def place(self, group: str) -> int:
        """This rank's place in its group of that name."""
        if group == "ep":
            return self.rank // self.size("expert_tp")
        return self.rank % self.size(group)

    def members(self, group: str) -> list[tuple[int, ...]]:
        """Every group of that name, each with its ranks in order of their place in it."""
        size = self.size(group)
        if group == "ep":
            stride = self.size("expert_tp")
            return [tuple(range(first, self.world, stride)) for first in range(stride)]
        return [tuple(range(first, first + size)) for first in range(0, self.world, size)]

    def canonical(self, group: str) -> str:
        """The first name of the same ranks: groups that coincide are one group."""
        return next(name for name in GROUPS if self.members(name) == self.members(group))
