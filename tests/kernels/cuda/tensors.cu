// Self-tests of TMA: boxes of tensors of rank 1 to 5, every swizzle, what lies outside, multicast.
#include <launch.h>
#include <ptx_tma.h>

namespace tokenspeed {

// Loads the box at `at`, hands the bytes of shared memory to `image`, and stores the same bytes as the box at `to`.
template <int kRank>
__global__ void __launch_bounds__(64)
    copy_box(const __grid_constant__ CUtensorMap source, const __grid_constant__ CUtensorMap destination,
             const int32_t* at, const int32_t* to, uint8_t* image, uint32_t bytes) {
    DYNAMIC_SHARED(raw);
    auto* barrier = reinterpret_cast<uint64_t*>(raw + 8192);
    if (threadIdx.x == 0) {
        ptx::prefetch_tensor_map(&source);
        ptx::mbarrier_init(barrier, 1);
        ptx::fence_mbarrier_init();
        int32_t c[kRank];
        for (int i = 0; i < kRank; ++i) c[i] = at[i];
        if constexpr (kRank == 2) ptx::tma_prefetch_l2(&source, c);
        ptx::mbarrier_arrive_expect_tx(barrier, bytes);
        ptx::tma_load(raw, &source, barrier, c);
    }
    __syncthreads();
    ptx::mbarrier_wait(barrier, 0);
    for (uint32_t i = threadIdx.x; i < bytes; i += 64) image[i] = raw[i];
    if (threadIdx.x == 0) {
        int32_t c[kRank];
        for (int i = 0; i < kRank; ++i) c[i] = to[i];
        ptx::tma_store(&destination, raw, c);  // written by the async proxy, read by it: no fence between
        ptx::bulk_commit();
        ptx::bulk_wait<0>();
    }
}

// geometry: per dimension, size, stride in bytes and box, innermost first.
template <int kRank>
static cudaError_t launch_copy_box(const void* source, void* destination, const int64_t* geometry, const int32_t* at,
                                   const int32_t* to, uint8_t* image, TensorElement element, Swizzle swizzle) {
    TensorLayout<kRank> layout{.base = source, .sizes = {}, .strides = {}, .box = {}};
    uint32_t bytes = element_bytes(element);
    for (int i = 0; i < kRank; ++i) {
        layout.sizes[i] = static_cast<uint64_t>(geometry[i * 3]);
        layout.strides[i] = static_cast<uint64_t>(geometry[i * 3 + 1]);
        layout.box[i] = static_cast<uint32_t>(geometry[i * 3 + 2]);
        bytes *= layout.box[i];
    }
    CUtensorMap from, onto;
    if (const auto status = encode_tensor_map(&from, element, layout, swizzle); status != cudaSuccess) return status;
    layout.base = destination;
    if (const auto status = encode_tensor_map(&onto, element, layout, swizzle); status != cudaSuccess) return status;
    return launch(copy_box<kRank>, {.grid = 1, .block = 64, .shared_bytes = 8192 + 8}, from, onto, at, to, image,
                  bytes);
}

// A cluster of two: each block loads half the rows of a 16 x 64 box and multicasts it; both end with the whole box.
__global__ void __launch_bounds__(32) multicast_box(const __grid_constant__ CUtensorMap map, __half* out) {
    DYNAMIC_SHARED(raw);
    auto* barrier = reinterpret_cast<uint64_t*>(raw + 2048);
    const uint32_t rank = ptx::cluster_rank();
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(barrier, 1);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect_tx(barrier, 2048);
    }
    ptx::cluster_sync();
    if (threadIdx.x == 0) {
        const int32_t half = static_cast<int32_t>(rank) * 8;
        ptx::tma_load_multicast(raw + rank * 1024, &map, barrier, {0, half}, 0b11);
    }
    ptx::mbarrier_wait_cluster(barrier, 0);
    const auto* values = reinterpret_cast<const __half*>(raw);
    for (uint32_t i = threadIdx.x; i < 1024; i += 32) out[rank * 1024 + i] = values[i];
    ptx::cluster_sync();
}

}  // namespace tokenspeed

using namespace tokenspeed;

extern "C" {
// The geometry comes in numbers, since the host reads it; the arrays are the device's. The innermost stride is the
// element.
int self_test_copy_box(const void* source, void* destination, const int32_t* at, const int32_t* to, uint8_t* image,
                       int rank, int element, int swizzle, int size0, int box0, int size1, int stride1, int box1,
                       int size2, int stride2, int box2, int size3, int stride3, int box3, int size4, int stride4,
                       int box4) {
    const int64_t geometry[] = {size0, 0,     box0,    size1, stride1, box1,    size2, stride2,
                                box2,  size3, stride3, box3,  size4,   stride4, box4};
    const auto e = static_cast<TensorElement>(element);
    const auto s = static_cast<Swizzle>(swizzle);
    switch (rank) {
        case 1:
            return launch_copy_box<1>(source, destination, geometry, at, to, image, e, s);
        case 2:
            return launch_copy_box<2>(source, destination, geometry, at, to, image, e, s);
        case 3:
            return launch_copy_box<3>(source, destination, geometry, at, to, image, e, s);
        case 4:
            return launch_copy_box<4>(source, destination, geometry, at, to, image, e, s);
        case 5:
            return launch_copy_box<5>(source, destination, geometry, at, to, image, e, s);
        default:
            return cudaErrorInvalidValue;
    }
}
int self_test_multicast_box(const __half* in, __half* out) {
    CUtensorMap map;
    const TensorLayout<2> layout{.base = in, .sizes = {64, 16}, .strides = {2, 128}, .box = {64, 8}};
    const auto status = encode_tensor_map(&map, TensorElement::kF16, layout, Swizzle::kNone);
    if (status != cudaSuccess) return status;
    return launch(multicast_box, {.grid = 2, .block = 32, .shared_bytes = 2056, .cluster = 2}, map, out);
}
}
