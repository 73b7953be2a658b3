"""wgmma against the PTX manual: fragments, descriptors of every canonical layout, shapes, operands in registers."""

import numpy as np
import pytest

from .devices import from_bf16, to_bf16

WIDTH = {0: 16, 1: 32, 2: 64, 3: 128}  # bytes of a row of 8, by swizzle


def accumulators(matrix: np.ndarray) -> np.ndarray:
    """[64, N] -> [N / 2, 128]: register i of thread t."""
    thread, register = np.arange(128)[None, :], np.arange(matrix.shape[1] // 2)[:, None]
    row = thread // 32 * 16 + thread % 32 // 4 + register // 2 % 2 * 8
    column = register // 4 * 8 + thread % 4 * 2 + register % 2
    return np.ascontiguousarray(matrix[row, column])


def image(matrix: np.ndarray, swizzle: int, transposed: bool) -> tuple[np.ndarray, int, int]:
    """[rows of M or N, k] 16-bit bits -> (shared memory, leading bytes, stride bytes) of a canonical layout."""
    rows, depth = matrix.shape
    width = WIDTH[swizzle]
    i, k = np.meshgrid(np.arange(rows), np.arange(depth), indexing="ij")
    if not transposed:
        if swizzle == 0:
            # Core matrices of 8 rows x 16 bytes: along the rows first, then along k.
            leading, stride = rows // 8 * 128, 128
            offset = i // 8 * stride + i % 8 * 16 + k % 8 * 2 + k // 8 * leading
        else:
            leading, stride = 16, 8 * width
            offset = i // 8 * stride + i % 8 * width + k * 2
    elif swizzle == 0:
        leading, stride = 128, 2 * 128
        offset = i // 8 * stride + i % 8 * 2 + k % 8 * 16 + k // 8 * leading
    else:
        per_row = width // 2
        stride = 8 * width
        leading = depth // 8 * stride
        offset = i // per_row * leading + i % per_row * 2 + k % 8 * width + k // 8 * stride
    if swizzle:
        offset = offset ^ (offset >> 7 & width // 16 - 1) << 4
    size = -(-(int(offset.max()) + 2) // 16) * 16
    memory = np.zeros(size // 2, np.uint16)
    memory[offset // 2] = matrix
    return memory, leading, stride


def random_bits(rng, shape, bf16: bool) -> tuple[np.ndarray, np.ndarray]:
    values = rng.standard_normal(shape).astype(np.float32)
    if bf16:
        bits = to_bf16(values)
        return bits, from_bf16(bits).astype(np.float64)
    half = values.astype(np.float16)
    return half.view(np.uint16), half.astype(np.float64)


def run(device, rng, columns, bf16, swizzles, transposed, accumulate=True):
    a, a_values = random_bits(rng, (64, 16), bf16)
    b, b_values = random_bits(rng, (columns, 16), bf16)
    d = rng.standard_normal((64, columns)).astype(np.float32)
    expected = a_values @ b_values.T + (d if accumulate else 0)
    registers = accumulators(d)
    operands = []
    for matrix, swizzle, flip in zip((a, b), swizzles, transposed, strict=True):
        memory, leading, stride = image(matrix, swizzle, flip)
        operands += [memory, memory.nbytes, swizzle, leading, stride]
    device.call("self_test_product", *operands, registers, columns, int(bf16), int(accumulate), *map(int, transposed))
    np.testing.assert_allclose(registers, accumulators(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("swizzle", WIDTH)
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
def test_operands_in_every_canonical_layout(device, rng, swizzle, transposed):
    run(device, rng, 64, False, (swizzle, swizzle), transposed)


@pytest.mark.parametrize("columns", [64, 80, 96, 112, 128, 144, 160, 176, 192])
def test_shapes_from_shared_memory_under_every_schedule(shuffled, rng, columns):
    transposed = columns % 64 == 0  # a swizzle of 128 bytes takes 64 columns
    run(shuffled, rng, columns, columns != 128, (3, 3 if transposed else 1), (False, transposed))


def test_a_product_may_ignore_its_accumulators(device, rng):
    run(device, rng, 64, True, (3, 0), (False, False), accumulate=False)


@pytest.mark.parametrize(("columns", "bf16"), [(256, False), (256, True)])
def test_a_from_registers_in_two_depth_steps(shuffled, rng, columns, bf16):
    a, a_values = random_bits(rng, (64, 32), bf16)
    b, b_values = random_bits(rng, (columns, 32), bf16)
    memory, _, stride = image(b, 2, False)
    registers = np.full((columns // 2, 128), np.nan, np.float32)
    shuffled.call("self_test_product_from_registers", a, memory, memory.nbytes, stride, registers, int(bf16))
    np.testing.assert_allclose(registers, accumulators(a_values @ b_values.T), rtol=1e-4, atol=1e-4)


def e4m3_values() -> np.ndarray:
    """Of every bit pattern, by definition; NaN of 0x7f and 0xff."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    values = np.where(exponent == 0, mantissa / 8, 1 + mantissa / 8) * 2.0 ** (np.maximum(exponent, 1) - 7)
    values[bits & 127 == 127] = np.nan
    return np.where(bits >= 128, -values, values)


def bytes_image(matrix: np.ndarray, swizzle: int) -> tuple[np.ndarray, int, int]:
    """[rows of M or N, 32] bytes -> (shared memory, leading bytes, stride bytes) of a canonical layout."""
    i, k = np.meshgrid(np.arange(matrix.shape[0]), np.arange(matrix.shape[1]), indexing="ij")
    width = WIDTH[swizzle]
    leading, stride = (matrix.shape[0] // 8 * 128, 128) if swizzle == 0 else (16, 8 * width)
    offset = i // 8 * stride + i % 8 * width + k % width + k // width * leading
    if swizzle:
        offset = offset ^ (offset >> 7 & width // 16 - 1) << 4
    memory = np.zeros(-(-(int(offset.max()) + 1) // 128) * 128, np.uint8)
    memory[offset] = matrix
    return memory, leading, stride


@pytest.mark.parametrize("swizzle", WIDTH)
@pytest.mark.parametrize(
    ("columns", "accumulate"),
    [(128, True), (128, False), *((columns, True) for columns in (32, 48, 64, 80, 96, 112, 144))],
)
def test_e4m3_operands_are_32_deep(shuffled, rng, swizzle, columns, accumulate):
    """A card's sums of e4m3 keep fewer bits than fp32."""
    values = e4m3_values()
    operands, read = [], []
    for rows in (64, columns):
        bits = rng.integers(0, 256, (rows, 32)).astype(np.uint8)
        bits[bits & 127 >= 0x68] &= 0x9F  # no NaN, nothing above 8
        memory, leading, stride = bytes_image(bits, swizzle)
        operands += [memory, memory.nbytes, swizzle, leading, stride]
        read.append(values[bits])
    d = 1000 * rng.standard_normal((64, columns)).astype(np.float32)  # far beyond the tolerance of the products
    expected = read[0] @ read[1].T + (d if accumulate else 0)
    registers = accumulators(d)
    shuffled.call("self_test_product_e4m3", *operands, registers, columns, int(accumulate), tolerance=1e-3)
    np.testing.assert_allclose(registers, accumulators(expected), rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_e4m3_unpacks_to_fp16_exactly(device):
    bits = np.arange(256, dtype=np.uint8)
    out = np.zeros(128, np.uint32)
    device.call("self_test_unpack_e4m3", bits.view(np.uint32), out)
    np.testing.assert_array_equal(out.view(np.float16), e4m3_values().astype(np.float16))
