"""The gated delta rule: chunked prefill, and decode of one or more tokens from raw projections to gated norm.

Per value head, with k and q of unit length and all decays as exponentials of differences (Yang et al. 2024):

    S_t = exp(g_t) S_{t-1} + u_t k_t^T,   u_t = beta_t (v_t - exp(g_t) S_{t-1} k_t),   o_t = S_t q_t / sqrt(dk)

S is [dv, dk]; g = -exp(A_log) softplus(a + dt_bias); beta = sigmoid(b); value head j uses key head j // (nv / nk).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import operator
from .norm import constant, normalised, unit_length
from .sequences import CHUNK, check_longest, check_slots, grid_of_tokens, snapshot_rows


def _gates(a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Log decay g <= 0 and write strength beta, both fp32 in the shape of a."""
    return F.softplus(a + dt_bias).mul_(a_log.exp().neg_()), torch.sigmoid(b.float())


def _split_heads(qkv: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 2 nk dk + nv dv] -> unit-length q and k as one [..., 2, nk, dk], and v [..., nv, dv], in fp32."""
    _, nv, dv, dk = state.shape
    qk, v = torch.split_with_sizes(qkv.float(), [qkv.shape[-1] - nv * dv, nv * dv], -1)
    return unit_length(qk.unflatten(-1, (2, -1, dk)), 1e-6), v.unflatten(-1, (nv, dv))


def _per_value_head(x: Tensor, nv: int, dim: int) -> Tensor:
    """Repeat key heads so that value head j finds its key head j // (nv / nk)."""
    return x if x.shape[dim] == nv else x.repeat_interleave(nv // x.shape[dim], dim)


def _decays(g: Tensor) -> tuple[Tensor, Tensor]:
    """G = cumsum(g) over the last dimension, and P[i, j] = exp(G_i - G_j) for j <= i, else 0."""
    total = g.cumsum(-1)
    return total, (total.unsqueeze(-1) - total.unsqueeze(-2)).exp_().tril_()


def _read_state(state: Tensor, ring: Tensor, cursor: Tensor, slots: Tensor, context_lens: Tensor) -> Tensor:
    """The recurrent state of each sequence after `context_lens` tokens, [B, nv, dv, dk] fp32; zeros for a new one.

    slots: [B] int64. Updates that are still in the ring, those of tokens cursor .. context - 1, are folded in.
    """
    # A first prompt, and one that goes on, where reading a tensor costs nothing.
    contexts = None if slots.is_cuda else context_lens.tolist()
    if contexts is not None and not any(contexts):
        return state.new_zeros(len(slots), *state.shape[1:])
    out = state.index_select(0, slots)
    if count := ring.shape[1]:
        token = context_lens.unsqueeze(1) + torch.arange(-count, 0, dtype=context_lens.dtype, device=ring.device)
        folded = token.unsqueeze(1) < cursor.index_select(0, slots).unsqueeze(2)  # [B, nv, R], oldest first
        if contexts is None or not bool(folded.all()):
            out = _fold(out, ring[slots.unsqueeze(1), token.remainder(count)], folded)
    if contexts is not None and all(contexts):
        return out
    return out.masked_fill_((context_lens == 0)[:, None, None, None], 0)


def _fold(state: Tensor, rows: Tensor, folded: Tensor) -> Tensor:
    """A state [B, nv, dv, dk] after those rows of the ring [B, R, width] that are not folded into it [B, nv, R]. Both
    are overwritten."""
    rows.masked_fill_(folded.all(1).unsqueeze(2), 0)  # which may hold anything, and 0 * NaN must not reach the sum
    k, u, g = _split_updates(rows, state)
    total = g.masked_fill(folded, 0).cumsum(-1)
    last = total[..., -1:]
    weight = (last - total).exp_().masked_fill_(folded, 0)
    return _added(state.mul_(last.exp().unsqueeze(-1)), (u * weight.unsqueeze(-1)).transpose(-1, -2), k)


def _added(state: Tensor, values: Tensor, keys: Tensor) -> Tensor:
    """state [B, nv, dv, dk] += values [B, nv, dv, T] keys [B, nk, T, dk], value head j with key head j // (nv / nk)."""
    batch, nk, tokens, dk = keys.shape
    grouped = values.reshape(batch * nk, -1, tokens), keys.reshape(batch * nk, tokens, dk)
    state.view(batch * nk, -1, dk).baddbmm_(*grouped)
    return state


def _split_updates(rows: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ring rows [B, R, nk dk + nv dv + nv] -> k [B, nk, R, dk], u [B, nv, R, dv], g [B, nv, R]."""
    _, nv, dv, dk = state.shape
    k, u, g = torch.split_with_sizes(rows, [rows.shape[-1] - nv * dv - nv, nv * dv, nv], -1)
    return k.unflatten(-1, (-1, dk)).transpose(1, 2), u.unflatten(-1, (nv, dv)).transpose(1, 2), g.transpose(1, 2)


def _prefill_fake(
    qkv,
    a,
    b,
    a_log,
    dt_bias,
    state,
    ring,
    cursor,
    cu_seqlens,
    context_lens,
    read_slot,
    write_slot,
    snapshots,
    max_seqlen,
):
    return qkv.new_empty(qkv.shape[0], *state.shape[1:3])


@operator(fake=_prefill_fake, mutates=("state", "cursor"))
def gated_delta_rule_prefill(
    qkv: Tensor,
    a: Tensor,
    b: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    ring: Tensor,
    cursor: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    read_slot: Tensor,
    write_slot: Tensor,
    snapshots: Tensor,
    max_seqlen: int,
) -> Tensor:
    """Run the gated delta rule over a packed batch of prefills, in chunks of 64 that lie at absolute multiples of 64.

    qkv: [N, 2 nk dk + nv dv], q | k | v after convolution and SiLU; a, b: [N, nv], raw projections in qkv's dtype, or
    both in fp32, any row stride;
    a_log, dt_bias: [nv] fp32; state: [slots, nv, dv, dk] fp32; ring: [slots, R, nk dk + nv dv + nv] fp32, rows of
    (k, u, g), token t in row t mod R; cursor: [slots, nv] int32, tokens folded into each head's state;
    cu_seqlens: [B + 1] int32; context_lens: [B] int32, tokens before this call, 0 for a sequence that starts here
    (nothing of its read slot is used); read_slot, write_slot: [B] int32, a negative write slot stores nothing;
    snapshots: [M, 3] int32 rows of (sequence, token count, slot), context < count <= end, a negative slot is padding;
    max_seqlen: no sequence of the batch is longer. Returns [N, nv, dv] of qkv's dtype.
    Mutates state and cursor at each write slot (the state at the sequence's end) and each snapshot slot (the state
    after `count` tokens), with an empty ring. Outputs are bit-equal with and without snapshots.
    """
    check_longest(cu_seqlens, max_seqlen)
    check_slots(write_slot, snapshots)
    (nv, dv), tokens = state.shape[1:3], len(qkv)
    if tokens == 0:  # nothing but states to copy: one row of padding gives the gathers below something to read
        qkv, a, b = (x.new_zeros(1, x.shape[1]) for x in (qkv, a, b))
    phase = context_lens.long() % CHUNK
    chunks, full = (max_seqlen + 2 * (CHUNK - 1)) // CHUNK, False
    if not cu_seqlens.is_cuda:  # where reading a tensor costs nothing, the bound is exact
        chunks = max([1, *((phase + cu_seqlens.diff() + CHUNK - 1) // CHUNK).tolist()])
        full = 0 < tokens == len(phase) * chunks * CHUNK
    grid = padding = None
    if full:  # whole chunks alone: there is no padding, and nothing to move
        qkv, a, b = (x.unflatten(0, (len(phase), -1)) for x in (qkv, a, b))
    else:
        grid = rows, valid = grid_of_tokens(cu_seqlens, -phase, chunks * CHUNK)
        padding = ~valid[:, None, :, None]
        qkv, a, b = qkv[rows], a[rows], b[rows]

    def chunked(x: Tensor) -> Tensor:  # [B, T, heads, D] -> [B, heads, chunks, CHUNK, D], zero in padding
        x = x.transpose(1, 2)
        return (x.contiguous() if padding is None else x.masked_fill(padding, 0)).unflatten(2, (chunks, CHUNK))

    qk, v = _split_heads(qkv, state)
    q, k, v = (chunked(x) for x in (qk[:, :, 0] * constant(state.shape[3] ** -0.5), qk[:, :, 1], v))
    g, beta = _gates(a, b, a_log, dt_bias)
    g, beta = chunked(g[..., None])[..., 0], chunked(beta[..., None])
    total, decay = _decays(g)
    decay_of_key_heads = decay.unflatten(1, (k.shape[1], -1))
    lower, attention = ((x @ k.transpose(-1, -2))[:, :, None] * decay_of_key_heads for x in (k, q))
    lower, attention = lower.flatten(1, 2).mul_(beta), attention.flatten(1, 2)
    q, k = _per_value_head(q, nv, 1), _per_value_head(k, nv, 1)
    from_start = total.exp()[..., None]
    q = q * from_start
    rhs = v.new_empty(*v.shape[:-1], dv + k.shape[-1])
    torch.mul(v, beta, out=rhs[..., :dv])
    torch.mul(k, from_start * beta, out=rhs[..., dv:])
    solved = torch.linalg.solve_triangular(lower, rhs, upper=False, unitriangular=True)
    k_to_end = k * (total[..., -1:] - total).exp()[..., None]

    snapshot_sequence, snapshot_count, snapshot_slot = snapshot_rows(snapshots)
    snapshot_at = snapshot_count - (context_lens.long() - phase)[snapshot_sequence] - 1  # its last token in the grid
    current = _read_state(state, ring, cursor, read_slot.clamp(min=0).long(), context_lens)
    snapshot_base = current[snapshot_sequence]
    updates, outputs = [], []
    for c in range(chunks):
        if c:
            here = (snapshot_at // CHUNK == c)[:, None, None, None]
            snapshot_base = torch.where(here, current[snapshot_sequence], snapshot_base)
        state_t = current.transpose(-1, -2)
        update = solved[:, :, c, :, :dv] - solved[:, :, c, :, dv:] @ state_t
        outputs.append(q[:, :, c] @ state_t + attention[:, :, c] @ update)
        updates.append(update)
        current = current * total[:, :, c, -1].exp()[..., None, None] + update.transpose(-1, -2) @ k_to_end[:, :, c]
    out = torch.stack([x.transpose(1, 2) for x in outputs], 1).flatten(1, 2)  # [B, T, nv, dv]
    if grid is None:
        result = out.flatten(0, 1)
    else:
        rows, valid = grid
        result = out.new_zeros(tokens, nv, dv)
        result[rows[valid]] = out[valid]

    kept = (write_slot >= 0).nonzero().squeeze(1)
    slots, counts = write_slot.long()[kept], (context_lens + cu_seqlens.diff())[kept]
    state[slots], cursor[slots] = current[kept], counts[:, None].to(cursor.dtype)
    if len(snapshot_slot):
        chunk, last = snapshot_at // CHUNK, snapshot_at % CHUNK
        update, key = torch.stack(updates, 2)[snapshot_sequence, :, chunk], k[snapshot_sequence, :, chunk]
        row = last[:, None, None, None].expand(-1, nv, 1, CHUNK)
        weight = decay[snapshot_sequence, :, chunk].gather(2, row).transpose(-1, -2)  # exp(G_p - G_i), 0 after p
        at_p = total[snapshot_sequence, :, chunk].gather(2, last[:, None, None].expand(-1, nv, 1))
        state[snapshot_slot] = snapshot_base * at_p.exp()[..., None] + (update * weight).transpose(-1, -2) @ key
        cursor[snapshot_slot] = snapshot_count[:, None].to(cursor.dtype)
    return result.to(qkv.dtype)


def _update_once(qk: Tensor, v: Tensor, g: Tensor, beta: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """One token a sequence, the commonest call: qk [B, 2, nv, dk], v [B, nv, dv], g and beta [B, nv], before
    [B, nv, dv, dk], which is overwritten. Returns the outputs [B, nv, dv] without 1 / sqrt(dk), and the state after.

    Half the torch calls of `_verify`, which is what a step of a small model costs.
    """
    q, k = qk[..., None].unbind(1)
    after = before.mul_(g.exp()[..., None, None])
    update = (v[..., None] - after @ k).mul_(beta[..., None, None])
    after.addcmul_(update, k.transpose(-1, -2))
    return (after @ q)[..., 0], after


def _verify(qk: Tensor, v: Tensor, g: Tensor, beta: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """T tokens a sequence, the first of them certain: qk [B, T, 2, nk, dk], v [B, T, nv, dv], g and beta [B, T, nv],
    before [B, nv, dv, dk], which is overwritten. Returns the outputs [B, T, nv, dv] without 1 / sqrt(dk), the state
    after the first token, and all updates u, [B, T, nv, dv]. One pass over the state, then a T x T triangle.
    """
    (batch, tokens, _, nk, dk), (nv, dv) = qk.shape, v.shape[2:]
    # Tokens are columns, and the value heads of a key head are neighbours: so no key is repeated, and none moved.
    rows = qk.permute(0, 3, 2, 1, 4).reshape(batch * nk, 2 * tokens, dk)  # queries, then keys
    columns = rows.transpose(1, 2)
    total = g.transpose(1, 2).cumsum(-1)
    decay = (total.unsqueeze(-2) - total.unsqueeze(-1)).exp_().triu_()  # [B, nv, T, T], row to column
    read = torch.bmm(before.view(batch * nk, -1, dk), columns).view(batch, nv, dv, 2, tokens)
    from_q, from_k = read.mul_(total.exp()[:, :, None, None]).unbind(3)
    products = torch.bmm(rows[:, tokens:], columns).view(batch, nk, 1, tokens, 2, tokens)
    of_q, of_k = (products * decay.view(batch, nk, -1, tokens, 1, tokens)).flatten(0, 2).unbind(2)
    beta = beta.transpose(1, 2).unsqueeze(2)
    rhs = (v.permute(0, 2, 3, 1) - from_k).mul_(beta).flatten(0, 1)
    upper = of_k * beta.flatten(0, 1)
    update = torch.linalg.solve_triangular(upper, rhs, upper=True, left=False, unitriangular=True)
    heads = torch.baddbmm(from_q.flatten(0, 1), update, of_q).view(batch, nv, dv, tokens)
    update = update.view(heads.shape)
    first = _added(before.mul_(g[:, 0, :, None, None].exp()), update[..., :1], qk[:, 0, 1].unsqueeze(2))
    return heads.permute(0, 3, 1, 2), first, update.permute(0, 3, 1, 2)


def _decode_fake(
    qkv,
    z,
    a,
    b,
    conv_weight,
    a_log,
    dt_bias,
    norm_weight,
    eps,
    state,
    ring,
    cursor,
    window,
    context_lens,
    read_slot,
    write_slot,
    settled=False,
):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


@operator(fake=_decode_fake, mutates=("state", "ring", "cursor", "window"))
def gated_delta_rule_decode(
    qkv: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    conv_weight: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
    state: Tensor,
    ring: Tensor,
    cursor: Tensor,
    window: Tensor,
    context_lens: Tensor,
    read_slot: Tensor,
    write_slot: Tensor,
    settled: bool = False,
) -> Tensor:
    """One decode step of a whole Gated DeltaNet mixer: convolution, gates, T >= 1 delta-rule updates, gated norm.

    qkv: [B T, 2 nk dk + nv dv], z: [B T, nv dv], a, b: [B T, nv]: raw projections, T consecutive tokens of each of B
    sequences, any row stride; conv_weight: [2 nk dk + nv dv, taps]; a_log, dt_bias: [nv] fp32; norm_weight: [dv];
    state, ring, cursor: as in `gated_delta_rule_prefill`; window: [slots, W, 2 nk dk + nv dv], as in `causal_conv1d`;
    context_lens: [B] int32, true tokens before this call; read_slot, write_slot: [B] int32. A row with a negative
    write slot is padding: it reads and writes no slot, and its output is zero. Returns [B T, nv dv] of z's dtype.
    Mutates state, ring, cursor and window of each write slot.

    settled: whoever wrote state, ring, cursor, window, context_lens and the slots was done before the kernel ahead of
    this one on the stream began its work, as where that is the projection (`linear` and its kind, or a kernel that is
    launched in the ordinary way): the records may then be read while that one still runs. Nothing else depends on it.

    Verify and commit: the next call may name any context_lens from this one's + 1 to + T. Tokens beyond it were drafts
    that were not accepted; their updates stand in the ring and are ignored. That needs R >= T - 1 ring rows and
    W >= T + taps - 2 window entries; an implementation may keep more updates in the ring than that.
    """
    batch, written = len(context_lens), write_slot.tolist()
    if batch == 0 or min(written) < 0:
        kept = write_slot >= 0
        out = torch.zeros_like(z, memory_format=torch.contiguous_format)
        if bool(kept.any()):
            rows = (x.unflatten(0, (batch, -1))[kept].flatten(0, 1) for x in (qkv, z, a, b))
            weights = (conv_weight, a_log, dt_bias, norm_weight, eps, state, ring, cursor, window)
            of_rows = (x[kept] for x in (context_lens, read_slot, write_slot))
            done = gated_delta_rule_decode.__wrapped__(*rows, *weights, *of_rows)  # pyright: ignore[reportCallIssue]
            out.unflatten(0, (batch, -1))[kept] = done.unflatten(0, (-1, len(z) // batch))
        return out
    check_slots(write_slot)
    slots, context = write_slot.long(), context_lens.long()
    reads = slots if read_slot.tolist() == written else read_slot.long()
    (nv, _, dk), taps, tokens = state.shape[1:], conv_weight.shape[1], len(z) // batch
    qkv, z, a, b = (x.unflatten(0, (batch, tokens)) for x in (qkv, z, a, b))

    positions = context.unsqueeze(1) + torch.arange(1 - taps, tokens, device=qkv.device)  # from the first tap's on
    entries = positions.remainder(window.shape[1])
    before, new = torch.split_with_sizes(entries, [taps - 1, tokens], 1)
    history = window[reads.unsqueeze(1), before]
    if min(context_lens.tolist()) < taps - 1:
        history.masked_fill_((positions[:, : taps - 1] < 0).unsqueeze(2), 0)
    history = torch.cat([history, qkv], dim=1).float()
    by_tap = history.unfold(1, taps, 1).transpose(2, 3)  # [B, T, taps, C]
    mixed = F.silu((by_tap * conv_weight.float().t()).sum(2)).to(qkv.dtype)
    if reads is not slots:
        window[slots] = window[reads]
    window.index_put_((slots.unsqueeze(1), new), qkv)

    qk, v = _split_heads(mixed, state)
    g, beta = _gates(a, b, a_log, dt_bias)
    before = _read_state(state, ring, cursor, reads, context_lens)
    if tokens == 1:
        heads, after = _update_once(_per_value_head(qk[:, 0], nv, 2), v[:, 0], g[:, 0], beta[:, 0], before)
        heads = heads[:, None]
    else:
        heads, after, updates = _verify(qk, v, g, beta, before)
        rows = torch.cat([x[:, 1:].flatten(2) for x in (qk[:, :, 1], updates, g)], dim=-1)
        ring.index_put_((slots.unsqueeze(1), positions[:, taps:].remainder(ring.shape[1])), rows)
    state.index_copy_(0, slots, after)
    cursor.index_copy_(0, slots, (context_lens + 1).unsqueeze(1).expand(-1, nv))
    normed = normalised((heads * constant(dk**-0.5)).to(z.dtype).float(), eps)
    gated = F.silu(z.float()).mul_(normed.mul_(norm_weight.float()).flatten(2))  # rows lie as z's, not as the heads'
    return gated.flatten(0, 1).to(z.dtype)
