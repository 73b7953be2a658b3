"""Copies beside the threads and talk between blocks, against the PTX manual and the programming guide."""

import numpy as np
import pytest

from .devices import KernelError


def test_cp_async_fills_with_zeros_behind_its_source_bytes(shuffled, rng):
    x = rng.integers(1, 256, (32, 16), dtype=np.uint8)
    out = np.full((2, 32, 16), 7, np.uint8)
    shuffled.call("self_test_thread_copies", x, out)
    expected = x.copy()
    for lane in range(32):
        expected[lane, lane % 5 * 4 :] = 0
    np.testing.assert_array_equal(out[0], expected)
    small = x.copy()
    small[::2, 4:8] = 0
    np.testing.assert_array_equal(out[1], small)


def test_cp_async_completes_on_an_mbarrier(shuffled, rng):
    x = rng.integers(0, 2**32, (32, 4), dtype=np.uint32)
    out = np.zeros_like(x)
    shuffled.call("self_test_thread_copies_with_barrier", x, out)
    np.testing.assert_array_equal(out, x[::-1])


@pytest.mark.parametrize("chunks", [0, 1, 2, 7])
def test_bulk_copies_stream_through_a_ring_of_mbarriers(shuffled, rng, chunks):
    x = rng.integers(0, 255, (chunks + 1, 256), dtype=np.uint8)
    out = np.full_like(x, 9)
    shuffled.call("self_test_bulk_ring", x, out, chunks)
    np.testing.assert_array_equal(out[:chunks], x[:chunks] + 1)
    assert (out[chunks] == 9).all()


def test_clusters_share_memory_multicast_and_remote_arrivals(shuffled, rng):
    x = rng.integers(0, 2**31, 32, dtype=np.uint32)
    out = np.zeros((2, 3, 16), np.uint32)
    shuffled.call("self_test_cluster_copies", x, out)
    np.testing.assert_array_equal(out[:, 0], [x[:16], x[:16]])
    np.testing.assert_array_equal(out[0, 1], x[16:] + 1)  # what block 1 sent
    assert (out[1, 1] == 2).all()  # the cluster's size
    assert (out[0, 2] == 1002).all() and (out[1, 2] == 1001).all()


def test_blocks_hand_on_through_flags(shuffled):
    blocks = 12
    flags, value = np.zeros(blocks, np.uint32), np.ones(1, np.uint32)
    arrivals, last = np.zeros(2, np.uint32), np.zeros(1, np.uint32)
    shuffled.call("self_test_flag_chain", flags, value, arrivals, last, blocks)
    expected = 1
    for block in range(blocks):
        expected = expected * 3 + block
    assert value[0] == expected
    assert last[0] == 2 * blocks + expected


def chain(rng, blocks: int, links: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(weights, buffers with only the input filled in, what the buffers must hold afterwards)."""
    n = blocks * 64
    weights = rng.integers(0, 1000, n, dtype=np.uint32)
    buffers = np.full((links + 1, n), 0xDEADBEEF, np.uint32)
    buffers[0] = rng.integers(0, 1000, n)
    expected = buffers.copy()
    for link in range(links):
        expected[link + 1] = expected[link] * 5 + weights
    return weights, buffers, expected


def test_programmatic_launches_see_their_predecessor_after_the_wait(shuffled, rng):
    weights, buffers, expected = chain(rng, blocks=3, links=4)
    shuffled.call("self_test_chain", weights, buffers, 3, 4, 1)
    np.testing.assert_array_equal(buffers, expected)


def test_queued_programmatic_launches_start_early_and_still_agree(emulated, rng):
    for seed in range(6):
        weights, buffers, expected = chain(rng, blocks=3, links=4)
        emulated.seed(seed)
        emulated.defer(True)
        emulated.call("self_test_chain", weights, buffers, 3, 4, 1)
        assert (buffers[1:] == 0xDEADBEEF).all()  # nothing has run yet
        emulated.synchronize()
        np.testing.assert_array_equal(buffers, expected)


def test_a_missing_dependency_wait_is_seen(emulated, rng):
    weights, buffers, expected = chain(rng, blocks=3, links=4)
    emulated.defer(True)
    emulated.call("self_test_chain", weights, buffers, 3, 4, 0)
    emulated.synchronize()
    assert (buffers != expected).any()


def test_registers_move_between_warpgroups(shuffled):
    out = np.zeros((3, 128), np.int32)
    shuffled.call("self_test_move_registers", out)
    assert (out[0] == 40).all() and (out[1:] == 232).all()


def test_a_warp_waits_until_registers_are_free(emulated):
    for seed in range(20):
        emulated.seed(seed)
        out = np.zeros((4, 128), np.int32)
        emulated.call("self_test_share_registers", out)
        assert (out == np.array([[208], [128], [128], [40]])).all()


def test_a_grid_too_large_to_be_resident_is_refused_by_its_launcher(emulated):
    emulated.multiprocessors(1)
    arrays = [np.zeros(64, np.uint32) for _ in range(4)]
    with pytest.raises(KernelError):
        emulated.call("self_test_flag_chain", *arrays, 33)
