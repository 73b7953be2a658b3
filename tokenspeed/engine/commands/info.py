"""`info`: what a model needs and what this machine has for it."""

import argparse
from collections.abc import Iterator
from dataclasses import replace

import torch

from ... import ops
from ...ops.fp8 import FP8
from ..checkpoint import resolve
from ..config import PAGE_TOKENS, DenseConfig, EngineConfig, ModelConfig
from ..device import pick_device, pick_dtype, pick_kv_dtype
from ..errors import CapacityError
from ..loading import RING_ROWS, decodes_by_kernel, fit_memory
from ..memory import MemoryLayout, free_memory
from ..model.qwen3_5 import Qwen3_5
from ..model.weights import with_formats
from ..parallel.comm import Communicator
from ..parallel.mesh import Mesh
from ..parallel.plan import describe_plan, traffic
from ..quantization import PRODUCTS
from ..sizes import PUBLISHED, RELEASES, published
from .options import add_engine_options, engine_settings

_CONTEXTS = (4096, 32_768, 131_072, 262_144)
_TURNS = (512, 4096, 32_768)  # tokens that one agent turn adds: a short answer, a file read, a long tool result


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "info",
        help="what a model needs, and what fits here",
        description="Weights, KV and state bytes of a model, how many sequences fit, and which kernels serve them.",
    )
    parser.add_argument(
        "--size",
        help=f"a size without a checkpoint: {', '.join([*PUBLISHED, *RELEASES])} (default: the checkpoint)",
    )
    parser.add_argument(
        "--memory-gib",
        type=float,
        metavar="GIB",
        help="plan for a GPU with this much free, of the memory a GPU's kernels use (default: this device, as is)",
    )
    parser.add_argument(
        "--plan", action="store_true", help="print a rank's program: stages, weights, collectives (default off)"
    )
    add_engine_options(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    device = pick_device(options.device)
    if options.size is None:
        directory = resolve(options.model)
        name, config = str(options.model or directory.name), ModelConfig.from_directory(directory)
        config = with_formats(config, directory, options.quantization)
    else:
        name, config = options.size, published(options.size)
        config = replace(config, fp8=PRODUCTS if options.quantization == "fp8" else frozenset())
    # A plan for a GPU is of what one would use: its dtype, and slots with a ring of updates.
    dtype = pick_dtype(options.dtype, torch.device("cuda") if options.memory_gib else device)
    mesh = Mesh(options.tp, options.ep)
    model = Qwen3_5.empty(config, dtype, torch.device("meta"), Communicator(mesh))
    for line in describe(name, model, dtype, device, options.memory_gib, EngineConfig(**engine_settings(options))):
        print(line)
    if options.plan:
        print()
        for line in describe_plan(model.plan, mesh):
            print(line)
    return 0


def describe(
    name: str,
    model: Qwen3_5,
    dtype: torch.dtype,
    device: torch.device,
    memory_gib: float | None,
    engine: EngineConfig,
) -> Iterator[str]:
    """The lines of the report: what the model and a rank of it need, then what fits here. memory_gib: of a GPU that is
    assumed, None for the device as it is."""
    kernel = memory_gib is not None or decodes_by_kernel(device)
    kv_dtype = pick_kv_dtype(engine.kv_dtype)
    layout = MemoryLayout(model.share, dtype, ring_rows=RING_ROWS if kernel else 0, kv_dtype=kv_dtype)
    weights = weight_bytes(model)
    yield from needs(name, model, layout)
    free = free_memory(device) if memory_gib is None else int(memory_gib * 2**30)
    yield f"memory             {_bytes(free)} {'free on ' + str(device) if memory_gib is None else 'assumed'}"
    left = free - weights
    if left <= 0:
        yield f"sequences          none: the weights alone need {_bytes(weights)}"
    else:
        for context in (c for c in _CONTEXTS if c <= model.config.max_context):
            each = context * layout.kv_token_bytes + layout.slot_bytes
            yield f"sequences          {left // each:6d} of {context:7d} tokens ({_bytes(each)} each)"
        kind = device.type if memory_gib is None else "cuda"
        yield f"prefix cache       {_turns(model.config, layout, engine, left, kind)}"
    yield f"kernels            {_kernels(device)}"


def needs(name: str, model: Qwen3_5, layout: MemoryLayout) -> Iterator[str]:
    """What holds on any machine: the size of the model, and what one rank holds and sends."""
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
        sent = traffic(model.plan, mesh, config.hidden * dtype.itemsize, model.share.vocab * dtype.itemsize)
        yield f"a rank             one of {mesh.world} (tp {mesh.tp}, ep {mesh.ep}); what follows is its own"
        yield f"weights            {_bytes(weight_bytes(model))}"
        terms = f"{_bytes(sent.token)} of terms a token and {_bytes(sent.logit_row)} a logit row"
        yield f"traffic            {sent.collectives} collectives a step, {terms}"
        yield f"                   a ring sends {_bytes(round(sent.sent))} for each decoded token"
    yield f"KV per token       {_bytes(layout.kv_token_bytes)}{' in FP8' if layout.kv_dtype else ''}"
    parts = f"{_bytes(layout.recurrent_bytes)} fp32 recurrence"
    if layout.ring_rows:
        parts += f" beside a ring of {layout.ring_rows} updates"
    yield f"state per sequence {_bytes(layout.slot_bytes)}, of which {parts}"


def weight_bytes(model: Qwen3_5) -> int:
    return sum(p.nbytes for p in model.parameters())


def _turns(config: ModelConfig, layout: MemoryLayout, engine: EngineConfig, free: int, device_type: str) -> str:
    """How many agent turns of which length stay known: each is its tokens' KV and the state at its end."""
    try:
        plan = fit_memory(config, layout, engine, free, device_type)
    except CapacityError:
        return f"none: {_bytes(free)} hold no page and slot"
    spare = max(plan.slots - engine.max_num_seqs, 0) if engine.prefix_cache else 0
    lengths = [tokens for tokens in _TURNS if tokens <= config.max_context]
    fit = [f"{min(spare, plan.pages * PAGE_TOKENS // tokens)} of {tokens} tokens" for tokens in lengths]
    return f"agent turns kept: {', '.join(fit)} ({plan.pages} pages, {spare} of {plan.slots} slots)"


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
