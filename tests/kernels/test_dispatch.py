"""Claims about who serves a call: the kernel for every published size, torch for everything else."""

import pytest
import torch

from tests.kernels.launches import behind_a_copy, emulator, queued, torch_served
from tests.ops import reference
from tests.ops.backends import same_bits
from tests.ops.samples import SAMPLES

pytest_plugins = ["tests.kernels.schedules"]

EPS = 1e-6
KERNELS = (
    "rms_norm",
    "add_rms_norm",
    "gated_rms_norm",
    "silu_mul",
    "add_sigmoid_gated",
    "linear",
    "add_rms_norm_linear",
    "silu_mul_linear",
    "add_gated_silu_mul_linear",
    "gated_rms_norm_linear",
    "attention_prologue",
    "causal_conv1d",
    "gated_delta_rule_prefill",
    "copy_states",
    "copy_pages",
    "moe_route",
    "paged_attention_decode",
    "paged_attention_prefill",
    "moe_experts",
    "decode_rows",
    "paged_rows",
    "draft_rows",
    "accept_tokens",
    "moe_block",
    "ffn_block",
)
HIDDEN = (1024, 2048, 2560, 3072, 4096, 5120)
HEADS = ((8, 2), (16, 2), (16, 4), (24, 4), (32, 2))
GDN_CHANNELS = (6144, 8192, 10240, 12288)


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_serves_the_sample(backend, name):
    args = SAMPLES[name](backend)  # drawing them may call operators of its own
    assert torch_served(lambda: backend.op(name)(*args)) == []


@pytest.mark.parametrize("width", HIDDEN)
def test_the_norms_serve_every_published_hidden_size(backend, width):
    x, weight = backend.randn(2, width), backend.randn(width)
    assert torch_served(lambda: backend.op("rms_norm")(x, weight, EPS)) == []
    assert torch_served(lambda: backend.op("add_rms_norm")(x, x.clone(), weight, EPS)) == []


@pytest.mark.parametrize("hidden", HIDDEN)
def test_the_products_of_one_token_serve_every_published_hidden_size(backend, hidden):
    x, norm, weight = backend.randn(1, hidden), backend.randn(hidden), backend.randn(24, hidden)
    assert torch_served(lambda: backend.op("add_rms_norm_linear")(x, x.clone(), norm, EPS, weight)) == []
    x = backend.randn(1, 2 * hidden)
    assert torch_served(lambda: backend.op("silu_mul_linear")(x, weight)) == []


@pytest.mark.parametrize(("q_heads", "kv_heads"), HEADS)
def test_the_prologue_serves_every_published_head_count(backend, q_heads, kv_heads):
    qkv, norm = backend.randn(1, 2 * (q_heads + kv_heads) * 256), backend.randn(256)
    kv, angles = backend.randn(1, 2, kv_heads, 64, 256), backend.randn(1, 64, dtype=torch.float32)
    slots = backend.tensor([3], torch.int64)
    assert torch_served(lambda: backend.op("attention_prologue")(qkv, norm, norm, angles, kv, slots, EPS)) == []


@pytest.mark.parametrize("channels", GDN_CHANNELS)
def test_the_convolution_serves_every_published_channel_count(backend, channels):
    one, zero, none = backend.tensor([1]), backend.tensor([0]), backend.tensor([]).reshape(0, 3)
    window, starts = backend.randn(2, 6, channels), backend.tensor([0, 2])
    x, weight = backend.randn(2, channels), backend.randn(channels, 4)
    assert torch_served(lambda: backend.op("causal_conv1d")(x, weight, window, starts, zero, zero, one, none)) == []


def test_what_no_kernel_serves_goes_to_torch_and_is_right(backend):
    odd, weight = backend.randn(3, 20), backend.randn(20)
    results = []
    assert torch_served(lambda: results.append(backend.op("rms_norm")(odd, weight, EPS))) == [
        "tokenspeed_torch::rms_norm"
    ]
    backend.assert_close(results[0], reference.rms_norm(odd, weight, EPS))

    y, x, gate = backend.randn(3, 20), backend.randn(3, 20), backend.randn(3, 1)
    expected = reference.exact(y) + reference.sigmoid(gate) * reference.exact(x)
    assert torch_served(lambda: backend.op("add_sigmoid_gated")(y, x, gate)) == ["tokenspeed_torch::add_sigmoid_gated"]
    backend.assert_close(y, expected)

    logits = backend.randn(2, 24)
    served = torch_served(lambda: results.append(backend.op("moe_route")(logits, 3)))
    assert served == ["tokenspeed_torch::moe_route"]
    assert results[1][1].tolist() == reference.route(logits, 3)[1].tolist()


def test_fp32_and_misaligned_rows_go_to_torch(backend):
    x, weight = backend.randn(2, 64, dtype=torch.float32), backend.randn(64, dtype=torch.float32)
    assert torch_served(lambda: backend.op("rms_norm")(x, weight, EPS)) == ["tokenspeed_torch::rms_norm"]
    shifted, weight = backend.randn(2 * 64 + 1)[1:].view(2, 64), backend.randn(64)
    assert torch_served(lambda: backend.op("rms_norm")(shifted, weight, EPS)) == ["tokenspeed_torch::rms_norm"]


@pytest.mark.parametrize("name", KERNELS)
def test_a_captured_graph_replays_to_the_same_bits(backend, name):
    if backend.device != "cuda":
        pytest.skip("graphs need a card")
    args = SAMPLES[name](backend)
    fresh = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
    kept = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
    expected = backend.op(name)(*fresh)
    operator, graph = getattr(torch.ops.tokenspeed, name), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = operator(*args)
    for arg, before in zip(args, kept, strict=True):
        if isinstance(arg, torch.Tensor):
            arg.copy_(before)
    graph.replay()
    torch.cuda.synchronize()
    results = (
        [(result, expected)]
        if isinstance(result, torch.Tensor)
        else list(zip(result or (), expected or (), strict=True))
    )
    tensors = [(a, b) for a, b in zip(args, fresh, strict=True) if isinstance(a, torch.Tensor)]
    assert all(same_bits(a, b) for a, b in results + tensors)


# The arguments that are read before the wait, since nobody writes them while the model runs.
WEIGHTS = {
    "linear": {1},
    "add_rms_norm_linear": {2, 4},
    "silu_mul_linear": {1},
    "add_gated_silu_mul_linear": {2},
    "moe_block": {2, 4, 7, 8, 9},
    "ffn_block": {2, 4, 5},
}


@pytest.mark.thinned(2, "seed", "name")
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_that_starts_early_waits_for_what_it_reads(backend, name, seed):
    """One argument at a time comes from the kernel ahead: of several, only the last would still be on its way."""
    if backend.emulated is None:
        pytest.skip("only the emulated device always starts the successor first")
    args = SAMPLES[name](backend)

    def fresh():
        return [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]

    expected_args = fresh()
    expected = backend.op(name)(*expected_args)
    wanted = [expected] if isinstance(expected, torch.Tensor) else list(expected or ())
    from_slot, to_slot, device = backend.tensor([0]), backend.tensor([1]), emulator()
    for position, arg in enumerate(args):
        if not isinstance(arg, torch.Tensor) or position in WEIGHTS.get(name, ()):
            continue
        given = fresh()
        given[position], arena = behind_a_copy(arg)

        def copied_and_called(given=given, arena=arena):
            torch.ops.tokenspeed_emulated.copy_states(arena, from_slot, to_slot)
            return getattr(torch.ops.tokenspeed_emulated, name)(*given)

        result = queued(device, seed, copied_and_called)
        results = [result] if isinstance(result, torch.Tensor) else list(result or ())
        assert all(same_bits(a, b) for a, b in zip(results, wanted, strict=True)), f"argument {position}"
        for now, then in zip(given, expected_args, strict=True):
            if isinstance(then, torch.Tensor):
                assert same_bits(now, then), f"argument {position}"


@pytest.mark.parametrize(
    "name",
    [
        "add_rms_norm",
        "gated_rms_norm",
        "add_sigmoid_gated",
        "attention_prologue",
        "copy_states",
        "paged_rows",
        "draft_rows",
        "accept_tokens",
    ],
)
def test_arguments_of_different_lengths_are_refused(backend, name):
    args = list(SAMPLES[name](backend))
    args[1] = args[1][:-1] if args[1].shape[0] > 1 else torch.cat([args[1], args[1]])
    with pytest.raises((RuntimeError, IndexError)):
        backend.op(name)(*args)
