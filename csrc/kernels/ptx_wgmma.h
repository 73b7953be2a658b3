// wgmma: D[64 x N] (+)= A[64 x 16] B[16 x N], or 32 deep of e4m3, by the four warps of a warpgroup, fp32 accumulation,
// running on its own between wgmma_commit and wgmma_wait. csrc/emulator/ptx_wgmma.h has the same names. Async proxy:
// see ptx.h for fences.
//
// A comes from shared memory (a descriptor) or from registers, B from shared memory. Accumulator register 4j + i of
// thread t is row 16 (t / 32) + t % 32 / 4 + 8 (i / 2), column 8j + 2 (t % 4) + i % 2. A fragment in registers is that
// of mma_m16n8k16, for the 16 rows of the warp.
#pragma once
#include <cuda_fp8.h>
#include <ptx.h>
#include <tensor_layout.h>

namespace tokenspeed::ptx {

// Describes an operand in shared memory. Swizzle::kNone means 8 rows of 16 bytes, contiguous; else 8 rows of 32, 64 or
// 128 bytes as TMA writes them with that swizzle, and the start of each 8 rows aligned to 8 times that width.
//   K contiguous:  stride_bytes leads from 8 rows (of M or N) to the next 8; leading_bytes, without swizzle, from 8 k
//   to the next.
//                  With swizzle a step of 16 k (32 of e4m3) is + 32 bytes on the address.
//   M or N contiguous (the transposed flags below): with swizzle, leading_bytes leads from one width of M or N to the
//   next, and
//                  stride_bytes from 8 k to the next 8; without swizzle the two change places.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t shared, Swizzle swizzle, uint32_t leading_bytes,
                                                      uint32_t stride_bytes) {
    const uint64_t mode = (4 - static_cast<uint64_t>(swizzle)) & 3;  // none 0, 32 bytes 3, 64 bytes 2, 128 bytes 1
    return static_cast<uint64_t>((shared & 0x3FFFF) >> 4) |
           static_cast<uint64_t>((leading_bytes & 0x3FFFF) >> 4) << 16 |
           static_cast<uint64_t>((stride_bytes & 0x3FFFF) >> 4) << 32 | mode << 62;
}

// Keeps the compiler from moving uses of the registers across this point.
template <int kRegisters>
__device__ __forceinline__ void hold_registers(float (&d)[kRegisters]) {
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The same for A fragments: call it before the fence that precedes their product.
template <int kSteps>
__device__ __forceinline__ void hold_registers(uint32_t (&a)[kSteps][4]) {
#pragma unroll
    for (int i = 0; i < kSteps * 4; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

// Before the first wgmma, and again after a wait: orders register accesses (accumulators, A fragments) before the
// products.
template <int... kRegisters>
__device__ __forceinline__ void wgmma_fence(float (&... d)[kRegisters]) {
    (hold_registers(d), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending committed groups are incomplete; name the accumulators that are read next.
template <int kPending, int... kRegisters>
__device__ __forceinline__ void wgmma_wait(float (&... d)[kRegisters]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
    (hold_registers(d), ...);
}

namespace detail {
template <typename T, int kColumns>
struct Wgmma;
}

// A and B from shared memory. T is __nv_bfloat16, __half or __nv_fp8_e4m3, of which the depth is 32 and both operands
// are K contiguous; its sums keep fewer bits than fp32. kColumns is N: 64 to 192 in steps of 16, or 256; of e4m3 32 to
// 144 in steps of 16. D is the first kColumns / 2 registers of d. !accumulate: D = A B.
template <typename T, int kColumns, bool kTransposedA = false, bool kTransposedB = false, int kRegisters>
__device__ __forceinline__ void wgmma(float (&d)[kRegisters], uint64_t a, uint64_t b, bool accumulate) {
    static_assert(kRegisters >= kColumns / 2);
    detail::Wgmma<T, kColumns>::template from_shared<kTransposedA, kTransposedB>(d, a, b, accumulate);
}

// A from registers (not of e4m3), which stay unchanged until the product has been waited for.
template <typename T, int kColumns, bool kTransposedB = false>
__device__ __forceinline__ void wgmma(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    detail::Wgmma<T, kColumns>::template from_registers<kTransposedB>(d, a, b, accumulate);
}

// ---- one specialisation per element and shape: text only

// Of each N what the N before has, and eight registers more.
#define WGMMA_OPERANDS_8(i)                                                                                     \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define WGMMA_OPERANDS_32 WGMMA_OPERANDS_8(0), WGMMA_OPERANDS_8(8)
#define WGMMA_OPERANDS_48 WGMMA_OPERANDS_32, WGMMA_OPERANDS_8(16)
#define WGMMA_OPERANDS_64 WGMMA_OPERANDS_48, WGMMA_OPERANDS_8(24)
#define WGMMA_OPERANDS_80 WGMMA_OPERANDS_64, WGMMA_OPERANDS_8(32)
#define WGMMA_OPERANDS_96 WGMMA_OPERANDS_80, WGMMA_OPERANDS_8(40)
#define WGMMA_OPERANDS_112 WGMMA_OPERANDS_96, WGMMA_OPERANDS_8(48)
#define WGMMA_OPERANDS_128 WGMMA_OPERANDS_112, WGMMA_OPERANDS_8(56)
#define WGMMA_OPERANDS_144 WGMMA_OPERANDS_128, WGMMA_OPERANDS_8(64)
#define WGMMA_OPERANDS_160 WGMMA_OPERANDS_144, WGMMA_OPERANDS_8(72)
#define WGMMA_OPERANDS_176 WGMMA_OPERANDS_160, WGMMA_OPERANDS_8(80)
#define WGMMA_OPERANDS_192 WGMMA_OPERANDS_176, WGMMA_OPERANDS_8(88)
#define WGMMA_OPERANDS_256 \
    WGMMA_OPERANDS_192, WGMMA_OPERANDS_8(96), WGMMA_OPERANDS_8(104), WGMMA_OPERANDS_8(112), WGMMA_OPERANDS_8(120)
#define WGMMA_REGISTERS_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_REGISTERS_48 WGMMA_REGISTERS_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_REGISTERS_64 WGMMA_REGISTERS_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_REGISTERS_80 WGMMA_REGISTERS_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_REGISTERS_96 WGMMA_REGISTERS_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_REGISTERS_112 WGMMA_REGISTERS_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_REGISTERS_128 WGMMA_REGISTERS_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_REGISTERS_144 WGMMA_REGISTERS_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define WGMMA_REGISTERS_160 WGMMA_REGISTERS_144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_REGISTERS_176 WGMMA_REGISTERS_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define WGMMA_REGISTERS_192 WGMMA_REGISTERS_176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_REGISTERS_256                                                                                      \
    WGMMA_REGISTERS_192                                                                                          \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, " \
    "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// The numbers are those of the operands after the N / 2 accumulators.
#define WGMMA_SHAPE(TYPE, NAME, N, R0, R1, R2, R3, R4, R5, R6)                                                       \
    template <>                                                                                                      \
    struct Wgmma<TYPE, N> {                                                                                          \
        template <bool kTransposedA, bool kTransposedB>                                                              \
        __device__ __forceinline__ static void from_shared(float* d, uint64_t a, uint64_t b, bool accumulate) {      \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " R2                                                      \
                         ", 0;\n"                                                                                    \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" WGMMA_REGISTERS_##N    \
                         "}, " R0 ", " R1 ", p, 1, 1, " R3 ", " R4 ";\n}\n"                                          \
                         : WGMMA_OPERANDS_##N                                                                        \
                         : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposedA), "n"(kTransposedB)); \
        }                                                                                                            \
        template <bool kTransposedB>                                                                                 \
        __device__ __forceinline__ static void from_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, \
                                                              bool accumulate) {                                     \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " R5                                                      \
                         ", 0;\n"                                                                                    \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" WGMMA_REGISTERS_##N    \
                         "}, {" R0 ", " R1 ", " R2 ", " R3 "}, " R4 ", p, 1, 1, " R6 ";\n}\n"                        \
                         : WGMMA_OPERANDS_##N                                                                        \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),    \
                           "n"(kTransposedB));                                                                       \
        }                                                                                                            \
    };
#define WGMMA_SHAPE_E4M3(N, R0, R1, R2)                                                                         \
    template <>                                                                                                 \
    struct Wgmma<__nv_fp8_e4m3, N> {                                                                            \
        template <bool kTransposedA, bool kTransposedB>                                                         \
        __device__ __forceinline__ static void from_shared(float* d, uint64_t a, uint64_t b, bool accumulate) { \
            static_assert(!kTransposedA && !kTransposedB);                                                      \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " R2                                                 \
                         ", 0;\n"                                                                               \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" WGMMA_REGISTERS_##N       \
                         "}, " R0 ", " R1 ", p, 1, 1;\n}\n"                                                     \
                         : WGMMA_OPERANDS_##N                                                                   \
                         : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                  \
        }                                                                                                       \
    };
#define WGMMA_SHAPES(N, ...)                           \
    WGMMA_SHAPE(__nv_bfloat16, "bf16", N, __VA_ARGS__) \
    WGMMA_SHAPE(__half, "f16", N, __VA_ARGS__)

namespace detail {
WGMMA_SHAPES(64, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
WGMMA_SHAPES(80, "%40", "%41", "%42", "%43", "%44", "%45", "%46")
WGMMA_SHAPES(96, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
WGMMA_SHAPES(112, "%56", "%57", "%58", "%59", "%60", "%61", "%62")
WGMMA_SHAPES(128, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
WGMMA_SHAPES(144, "%72", "%73", "%74", "%75", "%76", "%77", "%78")
WGMMA_SHAPES(160, "%80", "%81", "%82", "%83", "%84", "%85", "%86")
WGMMA_SHAPES(176, "%88", "%89", "%90", "%91", "%92", "%93", "%94")
WGMMA_SHAPES(192, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
WGMMA_SHAPES(256, "%128", "%129", "%130", "%131", "%132", "%133", "%134")
WGMMA_SHAPE_E4M3(32, "%16", "%17", "%18")
WGMMA_SHAPE_E4M3(48, "%24", "%25", "%26")
WGMMA_SHAPE_E4M3(64, "%32", "%33", "%34")
WGMMA_SHAPE_E4M3(80, "%40", "%41", "%42")
WGMMA_SHAPE_E4M3(96, "%48", "%49", "%50")
WGMMA_SHAPE_E4M3(112, "%56", "%57", "%58")
WGMMA_SHAPE_E4M3(128, "%64", "%65", "%66")
WGMMA_SHAPE_E4M3(144, "%72", "%73", "%74")
}  // namespace detail

#undef WGMMA_REGISTERS_32
#undef WGMMA_OPERANDS_32
#undef WGMMA_REGISTERS_48
#undef WGMMA_OPERANDS_48
#undef WGMMA_REGISTERS_64
#undef WGMMA_OPERANDS_64
#undef WGMMA_REGISTERS_80
#undef WGMMA_OPERANDS_80
#undef WGMMA_REGISTERS_96
#undef WGMMA_OPERANDS_96
#undef WGMMA_REGISTERS_112
#undef WGMMA_OPERANDS_112
#undef WGMMA_REGISTERS_128
#undef WGMMA_OPERANDS_128
#undef WGMMA_REGISTERS_144
#undef WGMMA_OPERANDS_144
#undef WGMMA_REGISTERS_160
#undef WGMMA_OPERANDS_160
#undef WGMMA_REGISTERS_176
#undef WGMMA_OPERANDS_176
#undef WGMMA_REGISTERS_192
#undef WGMMA_OPERANDS_192
#undef WGMMA_REGISTERS_256
#undef WGMMA_OPERANDS_256
#undef WGMMA_OPERANDS_8
#undef WGMMA_SHAPES
#undef WGMMA_SHAPE_E4M3
#undef WGMMA_SHAPE

}  // namespace tokenspeed::ptx
