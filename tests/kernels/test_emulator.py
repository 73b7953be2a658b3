"""The emulated device itself: it sees what is left out of a kernel, and says what is wrong and where."""

import numpy as np
import pytest

from .devices import EmulatedDevice, KernelError
from .test_ptx_products import image

SCHEDULES = range(10)

PIPELINE_FAULTS = [
    "full wait",
    "parity",
    "empty wait",
    "empty arrival",
    "release after the product",
    "announced bytes",
    "fence after mbarrier_init",
    "wgmma fence",
    "wgmma wait",
    "wgmma commit",
    "proxy fence before the store",
    "barrier before the store",
    "wait for the store's reads",
    "store commit",
    "last wait for the stores",
]
EXCHANGE_FAULTS = [
    "cluster_sync at the start",
    "wait for the remote arrivals",
    "cluster_sync at the end",
    "__syncthreads",
    "wait for cp.async",
    "wait for the flag",
    "__syncwarp",
]


def pipeline_is_right(device: EmulatedDevice, rng, fault: int) -> bool:
    chunks = 6
    a = rng.standard_normal((64, 16)).astype(np.float16)
    b = rng.standard_normal((chunks, 8, 16)).astype(np.float16)
    out = np.full((chunks, 64, 8), np.nan, np.float32)
    images = [image(matrix.view(np.uint16), 0, False)[0] for matrix in (a, *b)]
    try:
        device.call("self_test_pipeline", fault, images[0], np.concatenate(images[1:]), out, chunks, golden=False)
    except KernelError:
        return False
    expected = np.einsum("ik,cjk->cij", a.astype(np.float64), b.astype(np.float64))
    return np.allclose(out, expected, rtol=1e-4, atol=1e-4)


def exchange_is_right(device: EmulatedDevice, rng, fault: int) -> bool:
    clusters = 3
    x = rng.integers(0, 2**20, (clusters, 2, 64), dtype=np.uint32)
    out, carry = np.zeros_like(x), np.zeros_like(x)
    flags = np.zeros(clusters, np.uint32)
    try:
        device.call("self_test_exchange", fault, x, out, carry, flags, 2 * clusters, golden=False)
    except KernelError:
        return False
    reverse = x[..., ::-1]
    paired = reverse + reverse.reshape(clusters, 2, 32, 2)[..., ::-1].reshape(x.shape)
    expected = (paired[:, ::-1] + x[:, ::-1]).cumsum(0, dtype=np.uint32)
    return np.array_equal(out, expected)


def outcomes(device: EmulatedDevice, rng, runs, fault: int) -> list[bool]:
    results = []
    for seed in SCHEDULES:
        device.seed(seed)
        results.append(runs(device, rng, fault))
    return results


@pytest.mark.parametrize("runs", [pipeline_is_right, exchange_is_right])
def test_a_right_kernel_is_right_under_every_schedule(emulated, rng, runs):
    assert all(outcomes(emulated, rng, runs, 0))


@pytest.mark.parametrize("fault", range(len(PIPELINE_FAULTS)), ids=PIPELINE_FAULTS)
def test_a_pipeline_without_it_fails(emulated, rng, fault):
    assert not all(outcomes(emulated, rng, pipeline_is_right, fault + 1))


@pytest.mark.parametrize("fault", range(len(EXCHANGE_FAULTS)), ids=EXCHANGE_FAULTS)
def test_an_exchange_without_it_fails(emulated, rng, fault):
    assert not all(outcomes(emulated, rng, exchange_is_right, fault + 1))


def test_a_seed_repeats_its_schedule(emulated, rng):
    # A kernel with a race gives different answers under different schedules, and the same under the same.
    fault = EXCHANGE_FAULTS.index("__syncthreads") + 1
    x = rng.integers(0, 2**20, (2, 64), dtype=np.uint32)

    def run(seed: int) -> bytes:
        out, carry, flags = np.zeros_like(x), np.zeros_like(x), np.zeros(1, np.uint32)
        emulated.seed(seed)
        emulated.call("self_test_exchange", fault, x, out, carry, flags, 2, golden=False)
        return out.tobytes()

    assert [run(seed) for seed in SCHEDULES] == [run(seed) for seed in SCHEDULES]
    assert len({run(seed) for seed in SCHEDULES}) > 1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (0, r"mbarrier at shared offset 0x400 .* is not initialised\n.*block \(0, 0, 0\) thread \(0, 0, 0\)"),
        (1, r"deadlock(.|\n)*threads 32-63: mbarrier at shared offset 0x400, parity 0.*1 of 1 arrivals"),
        (2, r"deadlock(.|\n)*threads 0-31: named barrier 3; 32 threads arrived of 64"),
        (3, r"more arrivals in a phase than its count of 1"),
        (4, r"deadlock(.|\n)*threads 0-15: __shfl_xor_sync of the warp; lanes 0x0000ffff of 0xffffffff"),
        (5, r"bulk load: shared offset 0x8 is not aligned to 16 bytes"),
        (6, r"bulk load: shared offset 0x400 \+ 1024 bytes runs past the 1032 bytes"),
        (7, r"wrote past the end of its 1032 bytes of dynamic shared memory"),
        (8, r"access to shared offset 0x10000, past the 1032 bytes(.|\n)*thread \(5, 0, 0\)"),
        (9, r"illegal address 0x10(.|\n)*thread \(7, 0, 0\)"),
        (10, r"exits while a bulk load still writes its shared memory"),
        (11, r"deadlock(.|\n)*threads 0: flag at .*, which holds 3, for 5"),
        (12, r"initialised twice"),
        (13, r"livelock"),
    ],
)
def test_a_fault_ends_in_a_report_that_names_the_place(emulated, kind, reason):
    if kind in (7, 8, 9) and emulated.sanitized:
        pytest.skip("AddressSanitizer ends the process at a bad address")
    with pytest.raises(KernelError, match=reason):
        emulated.call("self_test_misbehave", kind, np.full(512, 3, np.uint32))
    emulated.call("self_test_misbehave", -1, np.zeros(512, np.uint32))  # the device works on


def test_a_launch_past_the_limits_is_refused(emulated):
    with pytest.raises(KernelError, match="233472 bytes of dynamic shared memory"):
        emulated.call("self_test_too_much_shared_memory", np.zeros(512, np.uint32))


def test_blocks_hand_on_words_that_carry_their_flag(shuffled, rng):
    blocks = 9
    words = rng.integers(0, 7, 4 * blocks, dtype=np.uint64) << np.uint64(32)  # tags of launches before
    taken, sums = np.zeros(2, np.uint32), np.zeros(blocks, np.uint32)
    shuffled.call("self_test_tagged_words", words, taken, sums, blocks, 7, golden=False)
    expected = sum(40 * block + 6 for block in range(blocks))
    assert (sums == expected).all()
    assert taken.tolist() == [blocks, blocks * expected]
    assert (words == [7 << 32 | 10 * block + i for block in range(blocks) for i in range(4)]).all()
