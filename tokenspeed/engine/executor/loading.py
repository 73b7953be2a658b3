"""From a checkpoint and an engine's settings to a runner: weights and memory of one rank."""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from ... import ops
from ..config import EngineConfig, ModelConfig
from ..errors import CapacityError, ConfigError
from ..model.qwen3_5 import Qwen3_5
from ..model.weights import fill_with_noise, holds_mtp, load_weights, with_formats, with_stored_head
from ..parallel.comm import Communicator
from ..parallel.compile import group_of_parts
from ..parallel.costs import always_in_parts
from ..quantization import PRODUCTS
from ..schedule.scheduler import drafts_for
from .device import pick_dtype, pick_kv_dtype, use_threads
from .draft_costs import draft_costs
from .memory import (
    HostMemory,
    Memory,
    MemoryLayout,
    MemorySizes,
    divide_host_memory,
    divide_memory,
    free_memory,
    keep_freed_memory,
    total_memory,
)
from .mover import Mover
from .runner import Runner

_SHARED_BYTES = 64 << 20  # smaller models gain nothing from a second thread, and wait for it on a busy machine
RING_ROWS = 8  # updates that a slot keeps beside its state where a kernel decodes: the state is written once in nine


def load_runner(
    directory: Path,
    config: EngineConfig,
    device: torch.device,
    communicator: Communicator,
    smallest: Callable[[list[int]], list[int]],
    progress: bool,
) -> tuple[Runner, MemorySizes]:
    """A rank's weights and memory. smallest: of each number the smallest that any rank has, so that all get the same
    pages and slots. Raises ConfigError or CapacityError for what cannot be used."""
    dtype = pick_dtype(config.dtype, device)
    model_config = read_model_config(directory, config)
    on_gpu = device.type == "cuda"
    dummy = config.load_format == "dummy"
    has_head = bool(model_config.mtp_layers) if dummy else holds_mtp(model_config, directory)
    mtp = bool(config.draft_depths(True, on_gpu)) and has_head
    check_draft_vocabulary(config.draft_vocabulary, model_config.vocab, mtp)
    check_context(model_config, config)
    measured = config.max_num_batched_tokens if config.prefill_sums == "auto" else 0
    communicator.prepare(model_config.hidden, device, measured, dtype, progress)
    if config.prefill_sums == "in-parts":
        communicator.costs = always_in_parts(communicator.mesh)
    if progress and measured and communicator.costs:
        tqdm.write(str(communicator.costs), file=sys.stderr)
    sharers = communicator.mesh.world if device.type == "cpu" else 1
    free, total = free_memory(device) // sharers, total_memory(device) // sharers
    check_utilization(config, free, total)
    kernel = decodes_by_kernel(device)
    empty = Qwen3_5.empty(model_config, dtype, torch.device("meta"), communicator, mtp)
    copy_head_to_draft(empty, config.draft_vocabulary, kernel)
    check_weights(empty, free, device.type)
    model = Qwen3_5.empty(model_config, dtype, device, communicator, mtp)
    if config.prefill_sums == "in-parts" and model.mesh.world > 1 and group_of_parts(model.compiled) is None:
        raise ConfigError(
            "prefill_sums is 'in-parts', but not all sums of this model are over the same ranks: it must be 'auto' or "
            "'all-reduce', or tensor_parallel_size a multiple of expert_parallel_size."
        )
    if dummy:
        fill_with_noise(model)
    else:
        load_weights(model, directory, progress)
    model.lay_out_by_columns()
    copy_head_to_draft(model, config.draft_vocabulary, kernel)
    weights = sum(p.nbytes for p in model.parameters())
    threads = config.threads
    if threads is None and weights < _SHARED_BYTES:
        threads = 1
    if threads is not None:
        use_threads(threads)
    depths = config.draft_depths(mtp, on_gpu)
    drafts = max((drafts for _, drafts in depths), default=0)
    entries = slot_sizes(model_config, drafts, kernel)
    layout = MemoryLayout(model.share, dtype, *entries, kv_dtype=pick_kv_dtype(config.kv_cache_dtype))
    if not on_gpu:
        keep_freed_memory()
    left = free_memory(device) // sharers
    held = max(free - left, weights)  # others may have given memory back meanwhile
    sizes = fit_memory(model_config, layout, config, left, held, total, device.type)
    host = divide_host_memory(layout, config, communicator.mesh.world)
    sizes = MemorySizes(layout, *smallest([sizes.pages, sizes.slots, *host]))
    if progress:
        tqdm.write(f"memory: {sizes}", file=sys.stderr)  # standard output is the caller's
    memory = Memory(layout, sizes.pages, sizes.slots, device)
    mover = None
    if sizes.host_slots:
        host_memory = HostMemory(layout, sizes.host_pages, sizes.host_slots, device)
        mover = Mover(memory, host_memory, leads=communicator.mesh.rank == 0)
    runner = Runner(model, memory, config.max_num_seqs, longest_sequence(model_config, config, sizes), drafts, mover)

    def deep(sequences: int) -> int:
        return drafts_for(depths, sequences)

    captured = runner.capture(deep, progress)
    if smallest([int(captured)]) == [0]:  # ranks replay their collectives together or not at all
        runner.forget_graphs()
    elif config.draft_tokens == "auto":
        runner.draft_costs = draft_costs(runner, deep)
        if progress and runner.draft_costs:
            told = ", ".join(f"{cost:.2f} for {sequences}" for sequences, cost in runner.draft_costs)
            tqdm.write(f"drafts: a step with them takes as many times one without, by sequences: {told}", sys.stderr)
    return runner, sizes


def read_model_config(directory: Path, config: EngineConfig) -> ModelConfig:
    """The model's configuration, with what only the checkpoint's tensors tell. Raises ConfigError for what cannot be
    read."""
    named = ModelConfig.from_directory(directory)
    if config.load_format == "dummy":
        in_fp8 = config.quantization == "fp8" or (config.quantization == "auto" and named.stored is not None)
        return replace(named, fp8=PRODUCTS if in_fp8 else frozenset())
    found = with_stored_head(with_formats(named, directory, config.quantization), directory)
    if found.tied != named.tied:
        tqdm.write(
            f"{directory}: config.json says tie_word_embeddings, but the stored lm_head.weight is no embedding: it "
            "is used as it is stored, as transformers does.",
            file=sys.stderr,
        )
    return found


def decodes_by_kernel(device: torch.device) -> bool:
    """Whether a compiled kernel decodes there, whose slots have a ring of updates."""
    return device.type == "cuda" and "gated_delta_rule_decode" in ops.compiled_operators()


def copy_head_to_draft(model: Qwen3_5, vocabulary: int | None, kernel: bool) -> None:
    """Let an MTP head, where there is one, draft by a copy of the model's head that costs less: of the `vocabulary`
    lowest ids, None for all, in FP8, or both. A draft reads all of the head, the largest weight by far, and what FP8
    loses of it costs drafts at most. kernel: whether a compiled kernel multiplies by it."""
    if not model.mtp:
        return
    in_fp8 = drafts_in_fp8(model.mtp.head.weight.dtype, kernel)
    ids = None if vocabulary is None else torch.arange(vocabulary)
    if in_fp8 or ids is not None:
        model.mtp.copy_head(ids, in_fp8)


def drafts_in_fp8(dtype: torch.dtype, kernel: bool) -> bool:
    """Whether drafts are made by a copy of the head in FP8. Without a kernel each would make all of it fp32 first."""
    return kernel and dtype == torch.bfloat16


def check_draft_vocabulary(ids: int | None, vocab: int, mtp: bool) -> None:
    """Raises ConfigError for a draft vocabulary that the model, or a model without an MTP head, cannot have."""
    if ids is None:
        return
    if not mtp:
        raise ConfigError(
            f"draft_vocabulary is {ids}, but no MTP head drafts: the checkpoint has none, or draft_tokens is 0; "
            "it must be None."
        )
    if ids > vocab:
        raise ConfigError(f"draft_vocabulary is {ids}; it must be at most {vocab}, the model's number of ids.")


def check_context(model: ModelConfig, config: EngineConfig) -> None:
    """Raises ConfigError for a context that the model was not made for."""
    if config.max_model_len is not None and config.max_model_len > model.max_context:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}; the model's context is {model.max_context} tokens, and a longer "
            "one needs YaRN in its rope_parameters."
        )


def check_weights(empty: Qwen3_5, free: int, device_type: str) -> None:
    """Raises CapacityError where a rank's weights do not fit into `free` bytes. empty: the rank's model on the meta
    device, so that nothing is allocated to find out."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in (*empty.parameters(), *empty.buffers()):
        sizes[tensor.dtype] += tensor.nbytes
    needed = sizes.total()
    if needed > free:
        [(dtype, _)] = sizes.most_common(1)
        raise CapacityError(
            f"the weights take {needed / 2**30:.2f} GiB as {str(dtype).removeprefix('torch.')}, and {free / 2**30:.2f} "
            f"GiB of {device_type} memory are free: take a smaller model or dtype, or more ranks."
        )


def slot_sizes(config: ModelConfig, drafts: int, kernel: bool) -> tuple[int, int]:
    """Ring rows and window entries of a state slot from which `drafts` tokens can be taken back; kernel: decode has a
    kernel that keeps updates in the ring."""
    return (RING_ROWS if kernel else drafts), max(config.conv_taps, drafts + config.conv_taps - 1)


def longest_sequence(model: ModelConfig, config: EngineConfig, sizes: MemorySizes) -> int:
    """Tokens of one sequence at most: what is asked for, or the model's context, as far as the pages go."""
    return min(config.max_model_len or model.max_context, sizes.tokens)


def check_utilization(config: EngineConfig, unused: int, total: int) -> int | None:
    """Bytes of the device that gpu_memory_utilization asks for, None where it is not given. Raises CapacityError where
    they are more than others leave unused."""
    if config.gpu_memory_utilization is None:
        return None
    wanted = int(config.gpu_memory_utilization * total)
    if wanted > unused:
        raise CapacityError(
            f"gpu_memory_utilization is {config.gpu_memory_utilization}, {wanted / 2**30:.2f} GiB of this device, of "
            f"which others leave {unused / 2**30:.2f} GiB: it must be at most {unused / total:.2f}."
        )
    return wanted


def fit_memory(
    model: ModelConfig, layout: MemoryLayout, config: EngineConfig, free: int, held: int, total: int, device_type: str
) -> MemorySizes:
    """Pages and slots for an engine on a device of `total` bytes, of which it holds `held`, its weights, and `free` are
    left. Raises CapacityError where nothing fits, or where others hold what gpu_memory_utilization asks for."""
    on_gpu = device_type == "cuda"
    if (share := check_utilization(config, free + held, total)) is not None:
        usable = share - held
    else:
        usable = free - total // 10 if on_gpu else free // 2
    longest = config.max_model_len or model.max_context
    # A CPU's memory has other users: no more than twice what the sequences running at once can hold.
    max_tokens = None if on_gpu else 2 * config.max_num_seqs * longest
    return divide_memory(layout, config, usable, max_tokens)
