"""Qwen3.5, dense or mixture of experts, as a flat program of stages."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..config import FULL, ModelConfig
from ..parallel.comm import ONE_RANK, Communicator
from ..parallel.compile import Call, compile_program, group_of_parts, link
from ..parallel.costs import IN_PARTS
from ..parallel.sharding import rank_share
from .inputs import Batch
from .layers import (
    DenseFFN,
    Embedding,
    GatedAttention,
    GatedDeltaNet,
    LMHead,
    LogitRows,
    MoE,
    Norm,
    Stage,
    feed_forward,
)
from .mtp import MtpHead, Output
from .parameters import Source
from .rope import rotary_frequencies


class Qwen3_5(nn.Module):
    """The network of one checkpoint, or a rank's part of it: `config` is the whole model, `share` what is held here.

    mtp: the MTP head where `config.mtp_layers` is 1, None where it is 0: the configuration is that of what is held.
    Built under `torch.device(...)` and a default dtype: `Qwen3_5.empty` does both.
    """

    def __init__(self, config: ModelConfig, communicator: Communicator):
        super().__init__()
        mesh = communicator.mesh
        self.config, self.share, self.mesh = config, rank_share(config, mesh), mesh
        embedding = Embedding(config, mesh)
        program: list[tuple[str, Stage]] = [("embed_tokens", embedding)]
        for i, kind in enumerate(config.layer_types):
            mixer = ("self_attn", GatedAttention) if kind == FULL else ("linear_attn", GatedDeltaNet)
            program += [
                (f"layers.{i}.input_layernorm", Norm(config, mesh, first=i == 0)),
                (f"layers.{i}.{mixer[0]}", mixer[1](config, mesh, i)),
                (f"layers.{i}.post_attention_layernorm", Norm(config, mesh)),
                (f"layers.{i}.mlp", feed_forward(config, mesh)),
            ]
        drafts = config.mtp_layers > 0
        head = LMHead(config, mesh, embedding if config.tied else None, picks_rows=drafts)
        if not drafts:
            program.append(("logit_rows", LogitRows(mesh)))
        program += [("norm", Norm(config, mesh)), ("lm_head", head)]
        self.names = [name for name, _ in program]
        self.program = nn.ModuleList(stage for _, stage in program)
        feed_forwards = [stage for stage in self.program if isinstance(stage, DenseFFN | MoE)]
        for stage in feed_forwards:
            stage.scratch = feed_forwards[0].scratch
        self.compiled = compile_program(program, mesh, head.output)
        self.communicator = communicator
        self.mtp = MtpHead(config, communicator, embedding, head) if drafts else None
        self.link()

    def link(self, communicator: Communicator | None = None) -> None:
        """Make the program's callables; again where a stage's `forward` was replaced, or with other collectives of the
        same mesh."""
        self.communicator = communicator or self.communicator
        self._calls = link(self.compiled, self.communicator)
        self._calls_in_parts: list[Call] = []
        if self.communicator.costs and self.communicator.costs.group == group_of_parts(self.compiled):
            self._calls_in_parts = link(self.compiled, self.communicator, in_parts=True)
        if self.mtp:
            self.mtp.link(communicator)

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        communicator: Communicator = ONE_RANK,
        mtp: bool = False,
    ) -> "Qwen3_5":
        """The parameters of the communicator's rank allocated, not filled; dtype is bf16 or fp32, decays are fp32 in
        any case. mtp: with the MTP head, where the model has one. Raises ConfigError for a model that does not split
        over the ranks."""
        config = config if mtp else replace(config, mtp_layers=0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                return cls(config, communicator)
        finally:
            torch.set_default_dtype(before)

    def sources(self, prefix: str) -> Iterator[Source]:
        """Every checkpoint tensor of the model, its keys below `prefix` (`model.`, say), with what this rank takes."""
        for name, stage in zip(self.names, self.program, strict=True):
            below = name if name == "lm_head" else prefix + name
            for source in stage.sources():
                yield source._replace(key=f"{below}.{source.key}")
        if self.mtp:
            yield from self.mtp.sources()

    def lay_out_by_columns(self) -> None:
        """Let the loaded weights lie as a CPU likes them; see `parameters.by_columns`."""
        for stage in self.modules():
            if isinstance(stage, Stage):
                stage.lay_out_by_columns()

    def rotary(self, device: torch.device) -> tuple[Tensor, float]:
        return rotary_frequencies(self.config.rope, device)

    def forward(self, batch: Batch) -> Output:
        """Logits of the tokens that are wanted, [L, the rank's vocabulary], and with an MTP head the state of all N
        tokens after the final norm, [N, hidden]. Mutates the batch's pages and slots."""
        x = residual = None
        costs, calls = self.communicator.costs, self._calls
        if self._calls_in_parts and batch.prefill is not None and costs.pick(len(batch.tokens)) == IN_PARTS:
            calls = self._calls_in_parts
        for call in calls:
            x, residual = call(x, residual, batch)
        return Output(x, residual if self.mtp else None)
