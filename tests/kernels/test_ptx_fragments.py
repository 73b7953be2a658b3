"""The warp's wrappers against the PTX manual: fragment layouts, shuffles, votes, reductions, cache-hinted accesses."""

import numpy as np
import pytest

from .devices import from_bf16, to_bf16

LANES = np.arange(32)


def fragments_of(matrices: np.ndarray, transposed: bool) -> np.ndarray:
    """[count, 8, 8] 16-bit matrices -> [32 lanes, count] registers of two elements, by the layout of ldmatrix."""
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    row, column = LANES // 4, LANES % 4 * 2
    low, high = matrices[:, row, column].astype(np.uint32), matrices[:, row, column + 1].astype(np.uint32)
    return (low | high << 16).T


def test_ldmatrix_distributes_rows_and_columns_as_documented(shuffled, rng):
    matrices = rng.integers(0, 2**16, (4, 8, 8), dtype=np.uint16)
    out = np.zeros((2, 32, 4), np.uint32)
    shuffled.call("self_test_load_matrices", matrices, out)
    np.testing.assert_array_equal(out[0], fragments_of(matrices, False))
    np.testing.assert_array_equal(out[1], fragments_of(matrices, True))


def test_stmatrix_is_the_inverse_of_ldmatrix(shuffled, rng):
    matrices = rng.integers(0, 2**16, (4, 8, 8), dtype=np.uint16)
    for mode, transposed in enumerate([False, True]):
        out = np.zeros((2, 4, 8, 8), np.uint16)
        shuffled.call("self_test_store_matrices", fragments_of(matrices, transposed), out)
        np.testing.assert_array_equal(out[mode], matrices)


@pytest.mark.parametrize("element", ["f16", "bf16"])
def test_mma_multiplies_16x8x16_tiles(shuffled, rng, element):
    a, b = rng.standard_normal((16, 16)).astype(np.float32), rng.standard_normal((16, 8)).astype(np.float32)
    d = rng.standard_normal((16, 8)).astype(np.float32)
    if element == "f16":
        a_bits, b_bits = a.astype(np.float16), b.astype(np.float16)
        expected = d + a_bits.astype(np.float64) @ b_bits.astype(np.float64)
    else:
        a_bits, b_bits = to_bf16(a), to_bf16(b)
        expected = d + from_bf16(a_bits).astype(np.float64) @ from_bf16(b_bits).astype(np.float64)
    shuffled.call(f"self_test_multiply_{element}", a_bits, b_bits, d)
    np.testing.assert_allclose(d, expected, rtol=1e-5, atol=1e-5)


def test_warp_intrinsics_follow_the_programming_guide(shuffled, rng):
    x = rng.integers(1, 2**31 - 1, 32, dtype=np.int32)
    x[7] = x[3]
    out = np.zeros((17, 32), np.int32)
    shuffled.call("self_test_intrinsics", x, out)
    segment = LANES & ~7
    expected = [
        np.full(32, x[5]),
        x[segment | ((LANES + 3) & 7)],
        x[np.where(LANES % 16 >= 3, LANES - 3, LANES)],
        x[np.where(LANES % 8 + 5 < 8, LANES + 5, LANES)],
        x[LANES ^ 9],
        x[np.where((LANES ^ 9) <= (LANES | 7), LANES ^ 9, LANES)],  # earlier segments may be read
        np.full(32, sum(1 << i for i in range(32) if x[i] & 1), np.uint32).view(np.int32),
        np.ones(32),
        np.zeros(32),
        np.array([sum(1 << j for j in range(32) if x[j] & 3 == x[i] & 3) for i in range(32)], np.uint32).view(np.int32),
        np.full(32, x.sum(dtype=np.int32)),
        np.full(32, x.max()),
        np.full(32, x.min()),
        x[np.where(LANES < 16, LANES ^ 4, LANES ^ 8)],
    ]
    for row, values in enumerate(expected):
        np.testing.assert_array_equal(out[row], values, err_msg=f"row {row}")
    bits = out.view(np.uint32)
    for lane in range(32):
        v = int(x[lane])
        popc, ffs, clz = v.bit_count(), (v & -v).bit_length(), 32 - v.bit_length()
        assert out[14, lane] == popc + 64 * ffs + 4096 * clz
        inverted = (~v & 0xFFFFFFFF).to_bytes(4, "little")
        own = v.to_bytes(4, "little")
        # selector 0x7A10: bytes 0, 1 and 2 of x (the top bit of a selector is ignored), byte 3 of ~x
        permuted = int.from_bytes(bytes([*own[:3], inverted[3]]), "little")
        assert bits[15, lane] == permuted ^ int(f"{v:032b}"[::-1], 2)
        high = v * 0x9E3779B9 >> 32
        rotated = (v << 7 | v >> 25) & 0xFFFFFFFF
        assert bits[16, lane] == (high + rotated) & 0xFFFFFFFF


def test_atomics_and_approximate_functions(shuffled, rng):
    x = rng.uniform(0.1, 5.0, 128).astype(np.float32)
    cells, values = np.array([0, -5, 500, 0, 0, 0, 0], np.int32), np.zeros((128, 9), np.float32)
    shuffled.call("self_test_arithmetic", x, cells, values, tolerance=1e-3)
    i = np.arange(128)
    assert cells[:6].tolist() == [i.sum(), (i * 7 % 128).max(), (i * 5 % 128 - 9).min(), 2**20 - 1, 1, 77]
    assert cells[6:].view(np.float32)[0] == 64.0
    exact = x.astype(np.float64)
    expected = [
        np.exp(-exact),
        np.log(exact),
        np.log2(exact),
        np.sin(exact) + 2 * np.cos(exact),
        exact**-0.5 + 4 / exact,
        np.rint((x * np.float32(100)).astype(np.float64)),
        np.exp2(-exact),
        1 / exact,
        np.maximum(np.minimum(exact, 2), i * 0.01) + exact,
    ]
    np.testing.assert_allclose(values, np.stack(expected, 1), rtol=1e-3, atol=1e-5)


def test_reductions_cover_quad_block_and_cluster(shuffled, rng):
    clusters = 3
    x = rng.integers(-100, 100, (clusters, 4, 128)).astype(np.float32)  # integers: exact in any order
    out = np.full((clusters, 4, 128, 4), np.nan, np.float32)
    shuffled.call("self_test_reductions", x, out, clusters)
    np.testing.assert_array_equal(out[..., 0], x.reshape(-1, 4).sum(1).repeat(4).reshape(x.shape))
    np.testing.assert_array_equal(out[..., 1], np.broadcast_to(x.sum(2, keepdims=True), x.shape))
    np.testing.assert_array_equal(out[..., 2], np.broadcast_to(x.max(2, keepdims=True), x.shape))
    np.testing.assert_array_equal(out[..., 3], np.broadcast_to(x.sum((1, 2), keepdims=True), x.shape))


def test_every_cache_hint_moves_the_same_bytes(device, rng):
    n = 1032
    x = rng.integers(0, 2**16, n, dtype=np.uint16)
    out = np.zeros((4, n), np.uint16)
    device.call("self_test_vectors", x, out, n)
    np.testing.assert_array_equal(out, np.broadcast_to(x, (4, n)))


def test_named_barriers_hand_over_between_warps(shuffled, rng):
    rounds = 5
    x = rng.integers(-1000, 1000, (rounds, 32), dtype=np.int32)
    out = np.zeros_like(x)
    shuffled.call("self_test_named_barriers", x, out, rounds)
    np.testing.assert_array_equal(out, 3 * x[:, ::-1])
