// Self-tests of the warp: fragments of ldmatrix, stmatrix and mma.sync, shuffles, votes, reductions, 16-byte accesses.
// Every launcher takes plain pointers and returns a cudaError_t; the tests compare with the published semantics.
#include <launch.h>
#include <ptx.h>
#include <reduce.h>
#include <vector.h>

namespace tokenspeed {

// One warp: `matrices` holds 32 rows of 16 bytes; out[mode] is what each lane receives, 4 registers a lane.
__global__ void __launch_bounds__(32) load_matrices(const uint4* matrices, uint32_t* out) {
    DYNAMIC_SHARED(raw);
    auto* rows = reinterpret_cast<uint4*>(raw);
    rows[threadIdx.x] = matrices[threadIdx.x];
    __syncwarp();
    const uint32_t address = ptx::shared_address(rows + threadIdx.x);
    uint32_t four[4];
    ptx::ldmatrix_x4(four, address);
    for (int i = 0; i < 4; ++i) out[(0 * 32 + threadIdx.x) * 4 + i] = four[i];
    ptx::ldmatrix_x4_transposed(four, address);
    for (int i = 0; i < 4; ++i) out[(1 * 32 + threadIdx.x) * 4 + i] = four[i];
}

// The inverse: `registers` holds 4 a lane; out[mode] is 32 rows of 16 bytes of shared memory.
__global__ void __launch_bounds__(32) store_matrices(const uint32_t* registers, uint4* out) {
    DYNAMIC_SHARED(raw);
    auto* rows = reinterpret_cast<uint4*>(raw);
    const uint32_t address = ptx::shared_address(rows + threadIdx.x);
    uint32_t four[4];
    for (int i = 0; i < 4; ++i) four[i] = registers[threadIdx.x * 4 + i];
    for (int mode = 0; mode < 2; ++mode) {
        rows[threadIdx.x] = make_uint4(0, 0, 0, 0);
        __syncwarp();
        if (mode == 0) ptx::stmatrix_x4(address, four);
        if (mode == 1) ptx::stmatrix_x4_transposed(address, four);
        __syncwarp();
        out[mode * 32 + threadIdx.x] = rows[threadIdx.x];
        __syncwarp();
    }
}

// d[16 x 8] += a[16 x 16] b[16 x 8], all row-major in global memory, through the documented fragment layout.
template <typename T>
__global__ void __launch_bounds__(32) multiply(const T* a, const T* b, float* d) {
    const int group = threadIdx.x / 4, pair = threadIdx.x % 4 * 2;
    const auto packed = [](T low, T high) { return pack<T>(to_float(low), to_float(high)); };
    uint32_t fragment[4];
    for (int i = 0; i < 4; ++i) {
        const T* at = a + (group + i % 2 * 8) * 16 + pair + i / 2 * 8;
        fragment[i] = packed(at[0], at[1]);
    }
    const uint32_t b0 = packed(b[pair * 8 + group], b[(pair + 1) * 8 + group]);
    const uint32_t b1 = packed(b[(pair + 8) * 8 + group], b[(pair + 9) * 8 + group]);
    float accumulator[4];
    for (int i = 0; i < 4; ++i) accumulator[i] = d[(group + i / 2 * 8) * 8 + pair + i % 2];
    ptx::mma_m16n8k16<T>(accumulator, fragment, b0, b1);
    for (int i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + pair + i % 2] = accumulator[i];
}

// One warp; out[row][lane] is what each intrinsic gives. The last rows run on the two half-warps separately.
__global__ void __launch_bounds__(32) intrinsics(const int* in, int* out) {
    const int lane = static_cast<int>(threadIdx.x);
    const int value = in[lane];
    int row = 0;
    const auto put = [&](int result) { out[row++ * 32 + lane] = result; };
    put(__shfl_sync(0xffffffffu, value, 5));
    put(__shfl_sync(0xffffffffu, value, lane + 3, 8));
    put(__shfl_up_sync(0xffffffffu, value, 3, 16));
    put(__shfl_down_sync(0xffffffffu, value, 5, 8));
    put(__shfl_xor_sync(0xffffffffu, value, 9));
    put(__shfl_xor_sync(0xffffffffu, value, 9, 8));
    put(static_cast<int>(__ballot_sync(0xffffffffu, value & 1)));
    put(__any_sync(0xffffffffu, value == in[7]));
    put(__all_sync(0xffffffffu, value == in[7]));
    put(static_cast<int>(__match_any_sync(0xffffffffu, value & 3)));
    put(__reduce_add_sync(0xffffffffu, value));
    put(__reduce_max_sync(0xffffffffu, value));
    put(__reduce_min_sync(0xffffffffu, value));
    if (lane < 16) {
        put(__shfl_xor_sync(0x0000ffffu, value, 4));
    } else {
        put(__shfl_xor_sync(0xffff0000u, value, 8));
    }
    put(__popc(value) + 64 * __ffs(value) + 4096 * __clz(value));
    put(static_cast<int>(__byte_perm(value, ~value, 0x7A10) ^ __brev(value)));
    put(static_cast<int>(__umulhi(value, 0x9E3779B9u) + __funnelshift_l(value, value, 7)));
}

// Every thread of two blocks updates the cells; `values` are the approximate and rounded functions of in[i].
__global__ void __launch_bounds__(64) arithmetic(const float* in, int* cells, float* values) {
    const int i = static_cast<int>(blockIdx.x * 64 + threadIdx.x);
    atomicAdd(cells, i);
    atomicMax(cells + 1, i * 7 % 128);
    atomicMin(cells + 2, i * 5 % 128 - 9);
    atomicOr(cells + 3, 1 << i % 20);
    if (atomicCAS(cells + 4, 0, 1) == 0) atomicExch(cells + 5, 77);
    atomicAdd(reinterpret_cast<float*>(cells + 6), 0.5f);
    const float x = in[i];
    float* to = values + i * 9;
    to[0] = __expf(-x);
    to[1] = __logf(x);
    to[2] = __log2f(x);
    to[3] = __sinf(x) + 2.0f * __cosf(x);
    to[4] = rsqrtf(x) + __frcp_rn(x) + __fdividef(3.0f, x);
    to[5] = static_cast<float>(__float2int_rn(__fmul_rn(x, 100.0f)));
    to[6] = ptx::exp2_approximate(-x);
    to[7] = ptx::reciprocal_approximate(x);
    to[8] =
        max(min(x, 2.0f), static_cast<float>(max(i, -3)) * 0.01f) + __uint_as_float(__float_as_uint(x) & 0x7fffffffu);
}

constexpr int kReduceThreads = 128;

// Each block of a cluster reduces its 128 values, then the cluster reduces the blocks'; out: [block][warp, block,
// cluster].
__global__ void __launch_bounds__(kReduceThreads) reductions(const float* in, float* out) {
    DYNAMIC_SHARED(raw);
    auto* scratch = reinterpret_cast<float*>(raw);
    ptx::cluster_sync();
    const float value = in[blockIdx.x * kReduceThreads + threadIdx.x];
    const float of_quad = warp_sum<4>(value);
    const float of_block = block_sum<kReduceThreads>(value, scratch);
    const float greatest = block_maximum<kReduceThreads>(value, scratch + 8);
    const float of_cluster = cluster_sum(of_block, scratch + 16);
    float* to = out + (blockIdx.x * kReduceThreads + threadIdx.x) * 4;
    *reinterpret_cast<float4*>(to) = make_float4(of_quad, of_block, greatest, of_cluster);
}

// Copies n 16-bit elements with each cache hint in turn: out[hint][n].
__global__ void vectors(const __half* in, __half* out, int n) {
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (i >= n) return;
    *reinterpret_cast<Vector<__half, 8>*>(out + i) = load_vector<8>(in + i);
    ptx::store_16_streaming(out + n + i, ptx::load_16_streaming(in + i));
    *reinterpret_cast<uint4*>(out + 2 * n + i) = ptx::load_16_no_allocate(in + i);
    *reinterpret_cast<uint4*>(out + 3 * n + i) = ptx::load_16_no_allocate(in + i);
}

// A running maximum of warps that hand over through two named barriers: out[i] = maximum of in[0..i], a warp at a time.
__global__ void __launch_bounds__(64) named_barriers(const int* in, int* out, int rounds) {
    DYNAMIC_SHARED(raw);
    auto* cell = reinterpret_cast<int*>(raw);
    const bool producer = ptx::warp_id() == 0;
    for (int i = 0; i < rounds; ++i) {
        if (producer) {
            if (i > 0) ptx::named_barrier_sync(2, 64);  // the cell is free
            cell[threadIdx.x] = in[i * 32 + threadIdx.x];
            ptx::named_barrier_arrive(1, 64);  // the cell is full
        } else {
            ptx::named_barrier_sync(1, 64);
            out[i * 32 + threadIdx.x - 32] = 3 * cell[63 - threadIdx.x];
            if (i + 1 < rounds) ptx::named_barrier_arrive(2, 64);
        }
    }
}

}  // namespace tokenspeed

using namespace tokenspeed;

extern "C" {
int self_test_load_matrices(const uint4* matrices, uint32_t* out) {
    return launch(load_matrices, {.grid = 1, .block = 32, .shared_bytes = 512}, matrices, out);
}
int self_test_store_matrices(const uint32_t* registers, uint4* out) {
    return launch(store_matrices, {.grid = 1, .block = 32, .shared_bytes = 512}, registers, out);
}
int self_test_multiply_f16(const __half* a, const __half* b, float* d) {
    return launch(multiply<__half>, {.grid = 1, .block = 32}, a, b, d);
}
int self_test_multiply_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d) {
    return launch(multiply<__nv_bfloat16>, {.grid = 1, .block = 32}, a, b, d);
}
int self_test_intrinsics(const int* in, int* out) {
    return launch(intrinsics, {.grid = 1, .block = 32}, in, out);
}
int self_test_arithmetic(const float* in, int* cells, float* values) {
    return launch(arithmetic, {.grid = 2, .block = 64}, in, cells, values);
}
int self_test_reductions(const float* in, float* out, int clusters) {
    return launch(reductions, {.grid = dim3(4 * clusters), .block = kReduceThreads, .shared_bytes = 128, .cluster = 4},
                  in, out);
}
int self_test_vectors(const __half* in, __half* out, int n) {
    return launch(vectors, {.grid = dim3((n / 8 + 63) / 64), .block = 64}, in, out, n);
}
int self_test_named_barriers(const int* in, int* out, int rounds) {
    return launch(named_barriers, {.grid = 1, .block = 64, .shared_bytes = 128}, in, out, rounds);
}
}
