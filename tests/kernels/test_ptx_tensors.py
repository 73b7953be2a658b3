"""TMA against the driver's and the PTX manual's description: boxes, strides, swizzles, what lies outside, multicast."""

import numpy as np
import pytest

from .devices import KernelError

BF16, F16, F32, U8 = range(4)
NUMPY = {BF16: np.uint16, F16: np.uint16, F32: np.uint32, U8: np.uint8}


def swizzle_image(linear: np.ndarray, swizzle: int) -> np.ndarray:
    """Box bytes in box order -> bytes of shared memory: 16-byte piece bits are xored with bits 7.. of the address."""
    address = np.arange(linear.size)
    if swizzle:
        address ^= (address >> 7 & (1 << swizzle) - 1) << 4
    image = np.empty_like(linear)
    image[address] = linear
    return image


def run(device, rng, *, element, sizes, box, at, to, padding=None, swizzle=0):
    """Copies a box and compares shared memory and what is stored; sizes, padding and coordinates innermost first."""
    dtype = np.dtype(NUMPY[element])
    rank = len(sizes)
    strides = [dtype.itemsize]
    extent = sizes[0] * dtype.itemsize
    for size, pad in zip(sizes[1:], padding or [0] * (rank - 1), strict=True):
        strides.append(-(-extent // 16) * 16 + pad)
        extent = strides[-1] * size
    source = rng.integers(0, 256, extent, dtype=np.uint8)
    destination = rng.integers(0, 256, extent, dtype=np.uint8)
    shape, steps = sizes[::-1], strides[::-1]

    def view(memory):
        return np.lib.stride_tricks.as_strided(
            memory.view(dtype) if strides[0] == 1 else memory[:].view(dtype), shape, steps
        )

    loaded = np.zeros(box[::-1], dtype)
    for index in np.ndindex(*box[::-1]):
        position = [first + i for first, i in zip(at[::-1], index, strict=True)]
        if all(0 <= p < size for p, size in zip(position, shape, strict=True)):
            loaded[index] = view(source)[tuple(position)]
    expected = destination.copy()
    for index in np.ndindex(*box[::-1]):
        position = [first + i for first, i in zip(to[::-1], index, strict=True)]
        if all(0 <= p < size for p, size in zip(position, shape, strict=True)):
            view(expected)[tuple(position)] = loaded[index]
    image = np.zeros(loaded.nbytes, np.uint8)
    geometry = [sizes[0], box[0]]
    for i in range(1, 5):
        geometry += [sizes[i], strides[i], box[i]] if i < rank else [1, 16, 1]
    coordinates = [np.array(c, np.int32) for c in (at, to)]
    device.call("self_test_copy_box", source, destination, *coordinates, image, rank, element, swizzle, *geometry)
    np.testing.assert_array_equal(image, swizzle_image(loaded.view(np.uint8).reshape(-1), swizzle))
    np.testing.assert_array_equal(destination, expected)


CASES = {
    "1d": dict(element=U8, sizes=[100], box=[64], at=[48], to=[32]),
    "2d inside": dict(element=F16, sizes=[70, 20], padding=[16], box=[32, 8], at=[16, 5], to=[8, 12]),
    "2d beyond every edge": dict(element=F32, sizes=[20, 10], box=[12, 8], at=[-4, -2], to=[12, 7]),
    "3d": dict(element=BF16, sizes=[24, 6, 5], padding=[32, 16], box=[16, 4, 2], at=[8, 4, 4], to=[8, 1, 3]),
    "4d": dict(element=F16, sizes=[16, 3, 4, 3], box=[8, 2, 3, 2], at=[8, 2, 1, 0], to=[0, 0, 2, 1]),
    "5d": dict(element=BF16, sizes=[8, 3, 2, 3, 2], box=[8, 2, 2, 2, 2], at=[0, 1, 0, 2, 1], to=[0, 0, 1, 0, 0]),
}


@pytest.mark.parametrize("case", CASES)
def test_boxes_of_every_rank_read_zeros_and_write_nothing_outside(shuffled, rng, case):
    run(shuffled, rng, **CASES[case])


@pytest.mark.parametrize(("swizzle", "row"), [(1, 32), (2, 64), (3, 128), (0, 256)])
def test_swizzles_permute_16_byte_pieces(device, rng, swizzle, row):
    box = [row // 2, 24]
    run(device, rng, element=F16, sizes=[row, 40], box=box, at=[16, 10], to=[8, 3], swizzle=swizzle)


def test_multicast_fills_both_blocks(shuffled, rng):
    x = rng.standard_normal((16, 64)).astype(np.float16)
    out = np.zeros((2, 16, 64), np.float16)
    shuffled.call("self_test_multicast_box", x, out)
    np.testing.assert_array_equal(out, [x, x])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(box=[264, 2]), "box"),
        (dict(box=[4, 2]), "multiple of 16"),
        (dict(swizzle=2, box=[64, 2]), "128 bytes is not the swizzle's 64"),
        (dict(swizzle=3, box=[32, 2]), "64 bytes is not the swizzle's 128"),
    ],
)
def test_illegal_tensor_maps_are_refused(emulated, rng, change, reason):
    case = dict(element=F16, sizes=[300, 20], box=[32, 2], at=[0, 0], to=[0, 0])
    with pytest.raises(KernelError, match=reason):
        run(emulated, rng, **{**case, **change})


def test_a_box_that_starts_off_16_bytes_is_refused(emulated, rng):
    # A card answers it with an illegal instruction.
    with pytest.raises(KernelError, match=r"6 bytes .* not a multiple of 16"):
        run(emulated, rng, element=F16, sizes=[64, 4], box=[32, 2], at=[3, 0], to=[0, 0])
