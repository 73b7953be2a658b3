"""`info`: what a model and its MTP head need, and what this machine has for them."""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from ... import ops
from ...ops.fp8 import FP8
from ..checkpoint import resolve
from ..config import PAGE_TOKENS, DenseConfig, EngineConfig, ModelConfig
from ..errors import CapacityError
from ..executor.device import pick_device, pick_dtype, pick_kv_dtype
from ..executor.loading import (
    check_draft_vocabulary,
    copy_head_to_draft,
    decodes_by_kernel,
    fit_memory,
    read_model_config,
    slot_sizes,
)
from ..executor.memory import MemoryLayout, divide_host_memory, free_memory, total_memory
from ..model.qwen3_5 import Qwen3_5
from ..model.weights import holds_mtp
from ..parallel.comm import Communicator
from ..parallel.compile import group_of_parts
from ..parallel.costs import ALL_REDUCE, IN_PARTS
from ..parallel.mesh import Mesh
from ..parallel.program import describe_program, traffic
from ..quantization import PRODUCTS
from ..sizes import PUBLISHED, RELEASES, published
from .options import add_engine_options, engine_settings

_CONTEXTS = (4096, 32_768, 131_072, 262_144)
_TURNS = (512, 4096, 32_768)  # tokens that one agent turn adds: a short answer, a file read, a long tool result


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "info",
        help="what a model needs, and what fits here",
        description="Weights, KV and state bytes of a model and of its MTP head, what drafts add to them, how many "
        "sequences fit, and which kernels serve them.",
    )
    parser.add_argument(
        "--size",
        help=f"a size without a checkpoint: {', '.join([*PUBLISHED, *RELEASES])} (default: the checkpoint)",
    )
    parser.add_argument(
        "--memory-gib",
        type=float,
        metavar="GIB",
        help="what fits a GPU with this much free, of the memory a GPU's kernels use (default: this device, as is)",
    )
    parser.add_argument(
        "--program",
        action="store_true",
        help="print a rank's program and that of its MTP head: stages, weights, collectives (default off)",
    )
    add_engine_options(parser)
    return parser


class Parts(NamedTuple):
    """A rank of a model, without and with its MTP head, of which one is loaded: `whole` where drafts are wanted.

    whole is None where there is no head; absent says why.
    """

    trunk: Qwen3_5
    whole: Qwen3_5 | None
    absent: str = ""

    def loaded(self, engine: EngineConfig, on_gpu: bool) -> Qwen3_5:
        return self.whole if self.whole and engine.draft_depths(True, on_gpu) else self.trunk


def run(options: argparse.Namespace) -> int:
    device, absent, engine = pick_device(options.device), "", EngineConfig(**engine_settings(options))
    if options.size is None:
        directory = resolve(options.model, engine.load_format)
        name, config = str(options.model or directory.name), read_model_config(directory, engine)
        if engine.load_format != "dummy" and not holds_mtp(config, directory):
            absent = "the checkpoint has no mtp.* tensors" + (
                ", though its config.json names a head" if config.mtp_layers else ""
            )
    else:
        name, config = options.size, published(options.size)
        config = replace(config, fp8=PRODUCTS if options.quantization == "fp8" else frozenset())
    if not config.mtp_layers:
        absent = absent or "its config.json names none"
    # For a GPU, what one would use: its dtype, and slots with a ring of updates.
    dtype = pick_dtype(options.dtype, torch.device("cuda") if options.memory_gib else device)
    mesh = Mesh(options.tensor_parallel_size, options.expert_parallel_size)

    def empty(mtp: bool) -> Qwen3_5:
        return Qwen3_5.empty(config, dtype, torch.device("meta"), Communicator(mesh), mtp)

    parts = Parts(empty(False), None if absent else empty(True), absent)
    for line in describe(name, parts, dtype, device, options.memory_gib, engine):
        print(line)
    if options.program:
        for line in program(parts.loaded(engine, bool(options.memory_gib) or device.type == "cuda")):
            print(line)
    return 0


def program(model: Qwen3_5) -> Iterator[str]:
    """The lines of --program."""
    yield ""
    yield from describe_program(model.compiled, model.mesh)
    if model.mtp:
        yield ""
        own = model.mtp.program[-1] is not model.mtp.head
        shared = "embed_tokens is the one above" if own else "embed_tokens and lm_head are the ones above"
        yield f"MTP head, once a draft; {shared}"
        yield from describe_program(model.mtp.compiled, model.mesh)


def describe(
    name: str,
    parts: Parts,
    dtype: torch.dtype,
    device: torch.device,
    memory_gib: float | None,
    engine: EngineConfig,
) -> Iterator[str]:
    """The lines of the report: what the model and a rank of it need, then what fits here. memory_gib: of a GPU that is
    assumed, None for the device as it is. Of the model that is loaded, copies the head as the engine does."""
    on_gpu = memory_gib is not None or device.type == "cuda"
    model, kernel = parts.loaded(engine, on_gpu), memory_gib is not None or decodes_by_kernel(device)
    check_draft_vocabulary(engine.draft_vocabulary, model.config.vocab, model.mtp is not None)
    depths = engine.draft_depths(model.mtp is not None, on_gpu)
    drafts = max((drafts for _, drafts in depths), default=0)
    kv_dtype = pick_kv_dtype(engine.kv_cache_dtype)
    plain = MemoryLayout(parts.trunk.share, dtype, *slot_sizes(model.config, 0, kernel), kv_dtype=kv_dtype)
    layout = MemoryLayout(model.share, dtype, *slot_sizes(model.config, drafts, kernel), kv_dtype=kv_dtype)
    yield from needs(name, parts.trunk, plain)
    yield from head_needs(parts, plain, loaded=model is parts.whole)
    yield f"drafts             {_drafts(engine, depths, model.mtp is not None)}"
    if drafts:
        window = f"{layout.window_entries} entries of the convolution's window instead of {plain.window_entries}"
        updates = "" if layout.ring_rows == plain.ring_rows else f", {layout.ring_rows} updates beside the state"
        rest = layout.slot_bytes - layout.hidden_bytes - plain.slot_bytes
        yield f"                   taking them back needs {window}{updates}: {_bytes(rest)} more a sequence"
    without_copy = weight_bytes(model)
    copy_head_to_draft(model, engine.draft_vocabulary, kernel)
    weights = weight_bytes(model)
    if weights > without_copy:
        ids = f"the {engine.draft_vocabulary} lowest ids" if engine.draft_vocabulary else "all ids"
        copy = f"a copy of the head{' in FP8' * model.mtp.drafts_in_fp8}"
        yield f"                   chosen among {ids} by {copy}: {_bytes(weights - without_copy)} more"
    free = free_memory(device) if memory_gib is None else int(memory_gib * 2**30)
    yield f"memory             {_bytes(free)} {'free on ' + str(device) if memory_gib is None else 'assumed'}"
    total = total_memory(device) if memory_gib is None else free
    left = free - weights
    if left <= 0:
        yield f"sequences          none: the weights alone need {_bytes(weights)}"
    else:
        for context in (c for c in _CONTEXTS if c <= model.config.max_context):
            each = context * layout.kv_token_bytes + layout.slot_bytes
            yield f"sequences          {left // each:6d} of {context:7d} tokens ({_bytes(each)} each)"
        kind = device.type if memory_gib is None else "cuda"
        yield f"prefix cache       {_turns(model.config, layout, engine, left, weights, total, kind)}"
        pages, slots = divide_host_memory(layout, engine, model.mesh.world)
        if slots:
            yield f"                   in host memory {pages * PAGE_TOKENS} tokens and {slots} states more"
    yield f"kernels            {_kernels(device)}"


def needs(name: str, model: Qwen3_5, layout: MemoryLayout) -> Iterator[str]:
    """What holds on any machine: the size of a model without its MTP head, and what one rank holds and sends."""
    config, mesh, ffn, dtype = model.config, model.mesh, model.config.ffn, layout.dtype
    whole = Qwen3_5.empty(config, dtype, torch.device("meta"))
    parameters = sum(p.numel() for p in whole.parameters() if p.dims)  # without scales
    fp8 = sum(p.numel() for p in whole.parameters() if p.dtype == FP8)
    held = f"in {str(dtype)[6:]}" if fp8 == 0 else f"({fp8 / 1e9:.3f} G in FP8 blocks, the rest in {str(dtype)[6:]})"
    width = (
        f"dense, intermediate {ffn.intermediate}"
        if isinstance(ffn, DenseConfig)
        else f"{ffn.experts} experts, {ffn.top_k} a token, intermediate {ffn.intermediate}"
    )
    yield f"model              {name}: {config.linear_layers} Gated DeltaNet + {config.full_layers} attention layers"
    yield f"                   hidden {config.hidden}, {width}, context {config.max_context} tokens"
    yield f"weights            {parameters / 1e9:.3f} G parameters, {_bytes(weight_bytes(whole))} {held}"
    if mesh.world > 1:
        sent = traffic(model.compiled, mesh, config.hidden * dtype.itemsize, model.share.vocab * dtype.itemsize)
        yield f"a rank             one of {mesh.world} (tp {mesh.tp}, ep {mesh.ep}); what follows is its own"
        yield f"weights            {_bytes(weight_bytes(model))}"
        terms = f"{_bytes(sent.token)} of terms a token and {_bytes(sent.logit_row)} a logit row"
        yield f"traffic            {sent.collectives} collectives a step, {terms}"
        yield f"                   a ring sends {_bytes(round(sent.sent))} for each decoded token"
        group = group_of_parts(model.compiled)
        forms = f"{ALL_REDUCE}, or {IN_PARTS} where GPUs find it faster at start" if group else ALL_REDUCE
        yield f"                   sums of a prefill by {forms}"
    yield f"KV per token       {_bytes(layout.kv_token_bytes)}{' in FP8' if layout.kv_dtype else ''}"
    split = f"{_bytes(layout.recurrent_bytes)} fp32 recurrence"
    if layout.ring_rows:
        split += f" beside a ring of {layout.ring_rows} updates"
    yield f"state per sequence {_bytes(layout.slot_bytes)}, of which {split}"


def head_needs(parts: Parts, plain: MemoryLayout, loaded: bool = True) -> Iterator[str]:
    """What a rank's MTP head adds to `plain`, the layout without one. loaded: whether it is."""
    if parts.whole is None:
        yield f"MTP head           none: {parts.absent}"
        return
    whole, trunk, dtype = parts.whole, parts.trunk, plain.dtype
    layout = MemoryLayout(whole.share, dtype, plain.ring_rows, plain.window_entries, plain.kv_dtype)
    parameters = sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in trunk.parameters())
    size = f"{parameters / 1e9:.3f} G" if parameters >= 1e7 else f"{parameters / 1e6:.3f} M"
    added = f"{size} parameters, {_bytes(weight_bytes(whole) - weight_bytes(trunk))}"
    yield f"MTP head           {added}{'' if loaded else '; not loaded, for nothing is drafted'}"
    kv, state = layout.kv_token_bytes - plain.kv_token_bytes, layout.slot_bytes - plain.slot_bytes
    yield f"                   adds {_bytes(kv)} to the KV of a token and {_bytes(state)} to the state of a sequence"
    if whole.mesh.world > 1:
        row = whole.config.hidden * dtype.itemsize
        sent = traffic(whole.mtp.compiled, whole.mesh, row, whole.share.vocab * dtype.itemsize)
        yield f"                   {sent.collectives} collectives a draft, {_bytes(sent.token)} of terms a token"


def _drafts(engine: EngineConfig, depths: tuple[tuple[int, int], ...], mtp: bool) -> str:
    """How deeply is drafted, and by what."""
    if not depths:
        return "none (--draft-tokens 0)" if engine.draft_tokens == 0 else "none: auto drafts with an MTP head"
    by = "by the MTP head" if mtp else "looked up in the sequence"
    if engine.draft_tokens != "auto":
        return f"{engine.draft_tokens} behind each token, {by}"
    (few, deepest), *rest = depths
    more = "".join(f", {drafts} up to {sequences}" for sequences, drafts in rest)
    return f"{deepest} behind each token where up to {few} sequences decode{more}, else none, {by}"


def weight_bytes(model: Qwen3_5) -> int:
    return sum(p.nbytes for p in model.parameters())


def _turns(
    config: ModelConfig, layout: MemoryLayout, engine: EngineConfig, free: int, held: int, total: int, device_type: str
) -> str:
    """How many agent turns of which length stay known: each is its tokens' KV and the state at its end."""
    try:
        sizes = fit_memory(config, layout, engine, free, held, total, device_type)
    except CapacityError as error:
        return f"none: {error}"
    spare = max(sizes.slots - engine.max_num_seqs, 0) if engine.enable_prefix_caching else 0
    lengths = [tokens for tokens in _TURNS if tokens <= config.max_context]
    fit = [f"{min(spare, sizes.pages * PAGE_TOKENS // tokens)} of {tokens} tokens" for tokens in lengths]
    return f"agent turns kept: {', '.join(fit)} ({sizes.pages} pages, {spare} of {sizes.slots} slots)"


def _kernels(device: torch.device) -> str:
    compiled = ops.compiled_operators() if device.type == "cuda" else []
    if not compiled:
        return f"torch implementations of all {len(ops.__all__)} operators (no compiled kernel for {device})"
    rest = sorted(set(ops.__all__) - set(compiled))
    return f"compiled: {', '.join(compiled)}; torch: {', '.join(rest) or 'none'}"


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
