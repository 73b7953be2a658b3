"""flash-linear-attention's and FlashInfer's functions, against transformers' own and a loop in fp64."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from tokenspeed import ops
from tokenspeed.integrations import fla, flashinfer

NK, NV, DK, DV = 2, 4, 16, 24


def recurrence(q, k, v, g, beta, state) -> tuple[Tensor, Tensor]:
    """One sequence, token by token: q, k [T, nk, dk], v [T, nv, dv], state [nv, dv, dk]; fp64."""
    q, k, v, g, beta, state = (x.double() for x in (q, k, v, g, beta, state))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    out = []
    for t in range(len(q)):
        qt, kt = (x[t].repeat_interleave(v.shape[1] // x.shape[1], 0) for x in (q, k))
        state = state * g[t].exp()[:, None, None]
        u = beta[t][:, None] * (v[t] - (state @ kt[..., None])[..., 0])
        state = state + u[..., None] * kt[:, None]
        out.append((state @ qt[..., None])[..., 0] * q.shape[-1] ** -0.5)
    return torch.stack(out), state


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)

    def draw(batch, tokens):
        q, k = (torch.randn(batch, tokens, NK, DK, generator=generator) for _ in range(2))
        v = torch.randn(batch, tokens, NV, DV, generator=generator)
        g = -torch.rand(batch, tokens, NV, generator=generator) * 0.3
        g[:, ::7] = 0  # no decay at all
        beta = torch.rand(batch, tokens, NV, generator=generator)
        beta[:, 1::5], beta[:, 2::5] = 0, 1
        return q, k, v, g, beta, torch.randn(batch, NV, DV, DK, generator=generator)

    return draw


@pytest.mark.parametrize("function", [fla.chunk_gated_delta_rule, fla.fused_recurrent_gated_delta_rule])
@pytest.mark.parametrize("tokens", [1, 70, 128])
def test_fla_s_functions_are_the_recurrence(draw, function, tokens):
    *inputs, state = draw(2, tokens)
    given = state.clone()
    options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True, "state_layout": "VK"}
    out, after = function(*inputs, initial_state=state, **options)
    for i in range(2):
        expected = recurrence(*(x[i] for x in inputs), state[i])
        torch.testing.assert_close(out[i].double(), expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after[i].double(), expected[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(state, given), "the initial state is the caller's"


def test_fla_s_function_is_the_one_that_transformers_calls(draw):
    """Its arguments by name, states [K, V], a default of zeros."""
    q, k, v, g, beta, state = draw(2, 67)
    for start in (None, state.transpose(-1, -2)):
        arguments = dict(g=g, beta=beta, initial_state=start, output_final_state=True, use_qk_l2norm_in_kernel=True)
        out, after = fla.chunk_gated_delta_rule(q, k, v, **arguments)
        expected = torch_chunk_gated_delta_rule(q, k, v, **arguments)
        torch.testing.assert_close(out, expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after, expected[1], rtol=1e-4, atol=1e-5)
    assert fla.chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[1] is None


def test_packed_sequences_and_a_scale(draw):
    q, k, v, g, beta, _ = draw(1, 80)
    starts = torch.tensor([0, 1, 1, 66, 80])
    options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
    out, after = fla.chunk_gated_delta_rule(q, k, v, g, beta, 2.0, cu_seqlens=starts, state_layout="VK", **options)
    alpha, packed = g[0].exp(), [x[0] for x in (q, k, v)]
    theirs, states = flashinfer.chunk_gated_delta_rule(*packed, alpha, beta[0], 2.0, cu_seqlens=starts, **options)
    torch.testing.assert_close(theirs, out[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states, after, rtol=1e-4, atol=1e-4)
    for i, (a, b) in enumerate(pairwise(starts)):
        if a < b:
            expected = recurrence(*(x[0, a:b] for x in (q, k, v, g, beta)), torch.zeros(NV, DV, DK))
            torch.testing.assert_close(out[0, a:b].double(), expected[0] * 2 * DK**0.5, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(after[i].double(), expected[1], rtol=1e-4, atol=1e-4)
        else:
            assert not after[i].any(), "an empty sequence has the state it began with"


@pytest.mark.parametrize("layout", ["KV", "VK"])
def test_flashinfer_s_decode_writes_the_state_it_was_given(draw, layout):
    q, k, v, _, _, state = draw(3, 1)
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(3, 1, NV, generator=generator) for _ in range(2))
    a_log, dt_bias = (torch.randn(NV, generator=generator) for _ in range(2))
    g, beta = -a_log.exp() * torch.nn.functional.softplus(a + dt_bias), b.sigmoid()
    own = state.clone() if layout == "VK" else state.transpose(-1, -2).contiguous()
    output = torch.empty(3, 1, NV, DV)
    decode = flashinfer.gated_delta_rule_decode_pretranspose if layout == "VK" else flashinfer.gated_delta_rule_decode
    result, given = decode(q, k, v, own, a_log, a, dt_bias, b, output=output)
    assert given is own and result is output
    for i in range(3):
        out, after = recurrence(*(x[i] for x in (q, k, v, g, beta)), state[i])
        torch.testing.assert_close(result[i].double(), out, rtol=1e-4, atol=1e-5)
        now = own[i] if layout == "VK" else own[i].T if own[i].dim() == 2 else own[i].transpose(-1, -2)
        torch.testing.assert_close(now.double(), after, rtol=1e-4, atol=1e-5)


def test_what_is_not_served_is_refused_by_name(draw):
    q, k, v, g, beta, state = draw(2, 4)
    with pytest.raises(ValueError, match="use_qk_l2norm_in_kernel is False"):
        fla.chunk_gated_delta_rule(q, k, v, g, beta)
    with pytest.raises(ValueError, match=r"g has shape \[2, 4, 3\]; it must be \[2, 4, 4\]"):
        fla.chunk_gated_delta_rule(q, k, v, g[..., :3], beta, use_qk_l2norm_in_kernel=True)
    with pytest.raises(ValueError, match="initial_state has shape"):
        fla.chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, use_qk_l2norm_in_kernel=True)
    with pytest.raises(ValueError, match="batch of 2"):
        fla.chunk_gated_delta_rule(q, k, v, g, beta, cu_seqlens=torch.tensor([0, 4]), use_qk_l2norm_in_kernel=True)
    with pytest.raises(ValueError, match="cu_seqlens is None"):
        flashinfer.chunk_gated_delta_rule(q[0], k[0], v[0], use_qk_l2norm_in_kernel=True)
    with pytest.raises(ops.NoKernel, match="gated_delta_rule_prefill: the"):
        fla.chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True, strict=True)
