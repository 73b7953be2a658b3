"""Which dimensions of a model are split over which group, and what a rank's part of the model is. Values only."""

from dataclasses import dataclass, replace

from ..config import DenseConfig, ModelConfig, MoeConfig
from ..errors import ConfigError
from .mesh import Mesh


@dataclass(frozen=True, slots=True)
class Split:
    """A dimension of `count` pieces of `width` elements, dealt out in order over the ranks of `group`, never cut.

    name: the count's key in config.json, for errors; shared: a group larger than the count gives each piece to several
    ranks. Methods raise ConfigError where the pieces do not come out even.
    """

    name: str
    count: int
    group: str
    width: int = 1
    shared: bool = False

    @property
    def size(self) -> int:
        """Elements of the whole dimension."""
        return self.count * self.width

    def of(self, width: int) -> "Split":
        """The same pieces, `width` elements each: heads as rows of one weight and as columns of another."""
        return replace(self, width=width)

    def pieces(self, mesh: Mesh) -> int:
        """How many pieces a rank holds."""
        ranks = mesh.size(self.group)
        if self.count % ranks == 0:
            return self.count // ranks
        if self.shared and ranks % self.count == 0:
            return 1
        also = ", or a multiple of it" if self.shared else ""
        raise ConfigError(
            f"{self.name} {self.count} cannot be split over the {ranks} ranks of group {self.group!r}: "
            f"their number must divide it{also}."
        )

    def local(self, mesh: Mesh) -> int:
        """Elements that a rank holds."""
        return self.pieces(mesh) * self.width

    def slice(self, mesh: Mesh) -> slice:
        """Which elements the mesh's rank holds."""
        pieces = self.pieces(mesh)
        first = mesh.place(self.group) * self.count // mesh.size(self.group)
        return slice(first * self.width, (first + pieces) * self.width)


def vocab(config: ModelConfig) -> Split:
    return Split("vocab_size", config.vocab, "tp")


def q_heads(config: ModelConfig) -> Split:
    return Split("num_attention_heads", config.q_heads, "tp")


def kv_heads(config: ModelConfig) -> Split:
    return Split("num_key_value_heads", config.kv_heads, "tp", shared=True)


def key_heads(config: ModelConfig) -> Split:
    return Split("linear_num_key_heads", config.key_heads, "tp")


def value_heads(config: ModelConfig) -> Split:
    return Split("linear_num_value_heads", config.value_heads, "tp")


def intermediate(ffn: DenseConfig) -> Split:
    return Split("intermediate_size", ffn.intermediate, "tp")


def experts(moe: MoeConfig) -> Split:
    return Split("num_experts", moe.experts, "ep")


def expert_intermediate(moe: MoeConfig) -> Split:
    return Split("moe_intermediate_size", moe.intermediate, "expert_tp")


def shared_intermediate(moe: MoeConfig) -> Split:
    return Split("shared_expert_intermediate_size", moe.shared_intermediate, "world")


def rank_share(config: ModelConfig, mesh: Mesh) -> ModelConfig:
    """A rank's part of a model, as a model: its heads, columns, experts and vocabulary; hidden and layers are whole.

    Every rank's share has the same sizes. Raises ConfigError, naming the dimension, for one that does not split.
    """
    ffn = config.ffn
    if isinstance(ffn, DenseConfig):
        if mesh.ep > 1:
            raise ConfigError(f"ep is {mesh.ep}, but this model is dense: it has no experts to split, so ep must be 1.")
        part = DenseConfig(intermediate(ffn).pieces(mesh))
    else:
        part = replace(
            ffn,
            experts=experts(ffn).pieces(mesh),
            intermediate=expert_intermediate(ffn).pieces(mesh),
            shared_intermediate=shared_intermediate(ffn).pieces(mesh),
        )
    return replace(
        config,
        vocab=vocab(config).pieces(mesh),
        q_heads=q_heads(config).pieces(mesh),
        kv_heads=kv_heads(config).pieces(mesh),
        key_heads=key_heads(config).pieces(mesh),
        value_heads=value_heads(config).pieces(mesh),
        ffn=part,
    )
