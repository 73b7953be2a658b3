// Self-tests of wgmma: shapes, element types, operands from shared memory in every layout and from registers; e4m3
// bytes as they come and unpacked to bf16.
#include <fp8.h>
#include <launch.h>
#include <ptx_wgmma.h>
#include <vector.h>

#include <utility>

namespace tokenspeed {

// How the test lays an operand out in shared memory: byte images prepared by the host and copied in by the threads.
struct OperandImage {
    const uint8_t* bytes;
    uint32_t size;  // bytes, a multiple of 16
    Swizzle swizzle;
    uint32_t leading, stride;  // bytes
};

// d[64 x N] (+)= a[64 x 16] b[16 x N], 32 deep of e4m3; `registers` of each thread hold the accumulators before and
// after.
template <typename T, int kColumns, bool kTransposedA, bool kTransposedB>
__global__ void __launch_bounds__(128) product(OperandImage a, OperandImage b, float* registers, int accumulate) {
    DYNAMIC_SHARED(raw);
    uint8_t* shared_b = raw + 16384;
    for (uint32_t i = threadIdx.x * 16; i < a.size; i += 128 * 16) {
        *reinterpret_cast<uint4*>(raw + i) = *reinterpret_cast<const uint4*>(a.bytes + i);
    }
    for (uint32_t i = threadIdx.x * 16; i < b.size; i += 128 * 16) {
        *reinterpret_cast<uint4*>(shared_b + i) = *reinterpret_cast<const uint4*>(b.bytes + i);
    }
    float d[kColumns / 2];
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) d[i] = registers[i * 128 + threadIdx.x];
    ptx::fence_async_shared();
    __syncthreads();
    const uint64_t of_a = ptx::matrix_descriptor(ptx::shared_address(raw), a.swizzle, a.leading, a.stride);
    const uint64_t of_b = ptx::matrix_descriptor(ptx::shared_address(shared_b), b.swizzle, b.leading, b.stride);
    ptx::wgmma_fence(d);
    ptx::wgmma<T, kColumns, kTransposedA, kTransposedB>(d, of_a, of_b, accumulate != 0);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(d);
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) registers[i * 128 + threadIdx.x] = d[i];
}

// A[64 x 32] from registers (row-major in global memory) times B of two depth steps; K-major B, 64-byte swizzle.
template <typename T, int kColumns>
__global__ void __launch_bounds__(128) product_from_registers(const T* a, OperandImage b, float* registers) {
    DYNAMIC_SHARED(raw);
    for (uint32_t i = threadIdx.x * 16; i < b.size; i += 128 * 16) {
        *reinterpret_cast<uint4*>(raw + i) = *reinterpret_cast<const uint4*>(b.bytes + i);
    }
    ptx::fence_async_shared();
    __syncthreads();
    const uint32_t row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    uint32_t fragments[2][4];
    for (int step = 0; step < 2; ++step) {
        for (int i = 0; i < 4; ++i) {
            const T* at = a + (row + i % 2 * 8) * 32 + step * 16 + column + i / 2 * 8;
            fragments[step][i] = pack<T>(to_float(at[0]), to_float(at[1]));
        }
    }
    float d[kColumns / 2];
    ptx::wgmma_fence(d);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
        const uint64_t of_b =
            ptx::matrix_descriptor(ptx::shared_address(raw) + step * 32, b.swizzle, b.leading, b.stride);
        ptx::wgmma<T, kColumns>(d, fragments[step], of_b, step > 0);
        ptx::wgmma_commit();
    }
    ptx::wgmma_wait<0>(d);
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) registers[i * 128 + threadIdx.x] = d[i];
}

// out[i]: the four bytes of in[i] as fp16.
__global__ void __launch_bounds__(64) unpacked(const uint32_t* in, uint2* out) {
    uint2 both;
    ptx::unpack_e4m3(in[threadIdx.x], both.x, both.y);
    out[threadIdx.x] = both;
}

template <typename T, int kColumns>
static cudaError_t launch_product(OperandImage a, OperandImage b, float* registers, int accumulate, bool ta, bool tb) {
    const LaunchConfig config{.grid = 1, .block = 128, .shared_bytes = 32768};
    if (ta && tb) return launch(product<T, kColumns, true, true>, config, a, b, registers, accumulate);
    if (ta) return launch(product<T, kColumns, true, false>, config, a, b, registers, accumulate);
    if (tb) return launch(product<T, kColumns, false, true>, config, a, b, registers, accumulate);
    return launch(product<T, kColumns, false, false>, config, a, b, registers, accumulate);
}

}  // namespace tokenspeed

using namespace tokenspeed;

extern "C" {
int self_test_product(const uint8_t* a, int a_size, int a_swizzle, int a_leading, int a_stride, const uint8_t* b,
                      int b_size, int b_swizzle, int b_leading, int b_stride, float* registers, int columns, int bf16,
                      int accumulate, int transposed_a, int transposed_b) {
    const auto image = [](const uint8_t* bytes, int size, int swizzle, int leading, int stride) {
        return OperandImage{bytes, static_cast<uint32_t>(size), static_cast<Swizzle>(swizzle),
                            static_cast<uint32_t>(leading), static_cast<uint32_t>(stride)};
    };
    const auto of_a = image(a, a_size, a_swizzle, a_leading, a_stride);
    const auto of_b = image(b, b_size, b_swizzle, b_leading, b_stride);
    const bool ta = transposed_a != 0, tb = transposed_b != 0;
    if (columns == 64 && bf16) return launch_product<__nv_bfloat16, 64>(of_a, of_b, registers, accumulate, ta, tb);
    if (columns == 64) return launch_product<__half, 64>(of_a, of_b, registers, accumulate, ta, tb);
    if (columns == 128) return launch_product<__half, 128>(of_a, of_b, registers, accumulate, ta, tb);
    if (columns == 80) return launch_product<__nv_bfloat16, 80>(of_a, of_b, registers, accumulate, ta, tb);
    if (columns == 96) return launch_product<__nv_bfloat16, 96>(of_a, of_b, registers, accumulate, ta, tb);
    if (columns == 112) return launch_product<__nv_bfloat16, 112>(of_a, of_b, registers, accumulate, ta, tb);
    if (columns == 144) return launch_product<__nv_bfloat16, 144>(of_a, of_b, registers, accumulate, ta, tb);
    if (columns == 160) return launch_product<__nv_bfloat16, 160>(of_a, of_b, registers, accumulate, ta, tb);
    if (columns == 176) return launch_product<__nv_bfloat16, 176>(of_a, of_b, registers, accumulate, ta, tb);
    if (columns == 192) return launch_product<__nv_bfloat16, 192>(of_a, of_b, registers, accumulate, ta, tb);
    return cudaErrorInvalidValue;
}
int self_test_product_e4m3(const uint8_t* a, int a_size, int a_swizzle, int a_leading, int a_stride, const uint8_t* b,
                           int b_size, int b_swizzle, int b_leading, int b_stride, float* registers, int columns,
                           int accumulate) {
    const OperandImage of_a{a, static_cast<uint32_t>(a_size), static_cast<Swizzle>(a_swizzle),
                            static_cast<uint32_t>(a_leading), static_cast<uint32_t>(a_stride)};
    const OperandImage of_b{b, static_cast<uint32_t>(b_size), static_cast<Swizzle>(b_swizzle),
                            static_cast<uint32_t>(b_leading), static_cast<uint32_t>(b_stride)};
    const LaunchConfig config{.grid = 1, .block = 128, .shared_bytes = 36864};
    cudaError_t status = cudaErrorInvalidValue;
    const auto run = [&]<int... kColumns>(std::integer_sequence<int, kColumns...>) {
        ((status = columns == kColumns ? launch(product<__nv_fp8_e4m3, kColumns, false, false>, config, of_a, of_b,
                                                registers, accumulate)
                                       : status),
         ...);
    };
    run(std::integer_sequence<int, 32, 48, 64, 80, 96, 112, 128, 144>());
    return status;
}
int self_test_unpack_e4m3(const uint32_t* in, uint32_t* out) {
    return launch(unpacked, LaunchConfig{.grid = 1, .block = 64}, in, reinterpret_cast<uint2*>(out));
}
int self_test_product_from_registers(const void* a, const uint8_t* b, int b_size, int b_stride, float* registers,
                                     int bf16) {
    const OperandImage of_b{b, static_cast<uint32_t>(b_size), Swizzle::k64, 16, static_cast<uint32_t>(b_stride)};
    const LaunchConfig config{.grid = 1, .block = 128, .shared_bytes = 32768};
    if (bf16) {
        const auto* operand = static_cast<const __nv_bfloat16*>(a);
        return launch(product_from_registers<__nv_bfloat16, 256>, config, operand, of_b, registers);
    }
    return launch(product_from_registers<__half, 256>, config, static_cast<const __half*>(a), of_b, registers);
}
}
