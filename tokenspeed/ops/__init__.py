"""The operators of Qwen3.5 as `torch.ops.tokenspeed.*`: documented, graph-capturable, without hidden state.

Each has a torch implementation for every device; where the compiled extension is built and has a kernel for the card
at hand, torch's dispatcher picks it. Operators mutate only what their docstring says and allocate nothing but outputs;
kernels never synchronise. docs/ops.md shows how another engine uses them.
"""

import torch

from .attention import attention_prologue, paged_attention_decode, paged_attention_prefill, rope, write_kv
from .conv import causal_conv1d
from .copies import copy_pages, copy_states
from .delta_rule import gated_delta_rule_decode, gated_delta_rule_prefill
from .ffn_block import ffn_block
from .fp8 import linear_fp8, quantise_groups
from .linear import (
    add_gated_silu_mul_linear,
    add_rms_norm_linear,
    gated_rms_norm_linear,
    linear,
    silu_mul_linear,
)
from .moe import moe_experts, moe_route
from .moe_block import moe_block
from .norm import add_rms_norm, add_sigmoid_gated, gated_rms_norm, rms_norm, silu_mul
from .progress import accept_tokens, decode_rows, draft_rows, paged_rows
from .sampling import sample
from .strict import NoKernel as NoKernel
from .strict import strict as strict
from .strict import why_not as why_not

__all__ = [
    "accept_tokens",
    "add_gated_silu_mul_linear",
    "add_rms_norm",
    "add_rms_norm_linear",
    "add_sigmoid_gated",
    "attention_prologue",
    "causal_conv1d",
    "copy_pages",
    "copy_states",
    "decode_rows",
    "draft_rows",
    "ffn_block",
    "gated_delta_rule_decode",
    "gated_delta_rule_prefill",
    "gated_rms_norm",
    "gated_rms_norm_linear",
    "linear",
    "linear_fp8",
    "moe_block",
    "moe_experts",
    "moe_route",
    "paged_attention_decode",
    "paged_attention_prefill",
    "paged_rows",
    "quantise_groups",
    "rms_norm",
    "rope",
    "sample",
    "silu_mul",
    "silu_mul_linear",
    "write_kv",
]

# Last: the operators must be declared before kernels register for them.
from . import extension

extension.load()


def compiled_operators() -> list[str]:
    """The operators for which the loaded extension has a CUDA kernel; none where it is not built."""
    return [name for name in __all__ if torch._C._dispatch_has_kernel_for_dispatch_key(f"tokenspeed::{name}", "CUDA")]
