// What the binding files share: how a launcher becomes the implementation of an operator, on torch's stable ABI.
//
// A binding is a function with the operator's arguments. It checks whether its kernel serves this call, and returns the
// result, or std::nullopt (false, where the operator returns nothing) before it has touched anything; the call then
// goes to the torch implementation, `tokenspeed_torch::<operator>`, which tokenspeed/ops/extension.py declares. So
// every case that the operator's contract allows is served, and which cases have a kernel is said in one place.
//
// The same files serve the emulator: compiled with TOKENSPEED_EMULATED they implement torch.ops.tokenspeed_emulated.*
// for CPU tensors.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <launch.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#ifndef TOKENSPEED_EMULATED
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

// TOKENSPEED_KERNELS(library) { TOKENSPEED_KERNEL(library, rms_norm); ... }
#ifdef TOKENSPEED_EMULATED
#define TOKENSPEED_KERNELS(library) STABLE_TORCH_LIBRARY_IMPL(tokenspeed_emulated, CPU, library)
#else
#define TOKENSPEED_KERNELS(library) STABLE_TORCH_LIBRARY_IMPL(tokenspeed, CUDA, library)
#endif
#define TOKENSPEED_KERNEL(library, name)                                                  \
    library.impl(#name, [](StableIValue* stack, uint64_t arguments, uint64_t) {           \
        ::tokenspeed::binding::call(&name, stack, arguments, "tokenspeed_torch::" #name); \
    })

namespace tokenspeed::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxIndex = INT32_MAX;  // what kernels count in 32 bits stays below

// ---- operator calls

namespace detail {

template <typename... Results>
void put_results(StableIValue* stack, std::tuple<Results...> results) {
    torch::stable::detail::box_from_tuple<Results...>(stack, std::move(results));
}

template <typename Result>
void put_results(StableIValue* stack, Result result) {
    stack[0] = torch::stable::detail::from<Result>(result);
}

}  // namespace detail

template <typename Served, typename... Arguments>
void call(Served (*binding)(Arguments...), StableIValue* stack, uint64_t arguments, const char* torch_operator) {
    STD_TORCH_CHECK(arguments == sizeof...(Arguments), torch_operator, " takes ", arguments, " arguments, its binding ",
                    sizeof...(Arguments));
    using Values = std::tuple<std::decay_t<Arguments>...>;
    Values values = torch::stable::detail::unbox_to_tuple<std::decay_t<Arguments>...>(stack);
    Served served = std::apply(binding, values);
    if (served) {
        if constexpr (!std::is_same_v<Served, bool>) detail::put_results(stack, std::move(*served));
        return;
    }
    torch::stable::detail::box_from_tuple<std::decay_t<Arguments>...>(stack, std::move(values));
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(torch_operator, "", stack, TORCH_ABI_VERSION));
}

inline void check_launch(cudaError_t status, const char* name) {
    STD_TORCH_CHECK(status == cudaSuccess, name, ": the kernel did not start: ", describe(status));
}

// ---- device

#ifdef TOKENSPEED_EMULATED

inline bool has_kernels(const Tensor&) {
    return true;
}

class Launch {
  public:
    explicit Launch(const Tensor&) {}
    cudaStream_t stream() const { return nullptr; }

    // Scratch memory must outlive launches that the emulated device defers: the latest are kept.
    void keep(const Tensor& scratch) const {
        constexpr size_t kKept = 64;
        static std::vector<Tensor> kept;
        if (kept.size() == kKept) kept.erase(kept.begin());
        kept.push_back(scratch);
    }
};

#else

// Whether the tensor's card is of the architecture in this build; the torch implementation serves the others.
inline bool has_kernels(const Tensor& tensor) {
    constexpr int kDevices = 64;
    static int8_t known[kDevices];  // 0: not asked yet; a race writes the same answer twice
    const int device = tensor.get_device_index();
    if (device < 0 || device >= kDevices) return false;
    if (known[device] == 0) {
        int major = 0, minor = 0;
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
        known[device] = major == 9 && minor == 0 ? 1 : -1;
    }
    return known[device] > 0;
}

// Makes the tensor's device current, and gives torch's current stream on it. The stream's accessor lies in
// libtorch_cuda, which a CPU build of torch lacks, so it is looked up when first needed.
class Launch {
  public:
    explicit Launch(const Tensor& tensor) : device_(tensor.get_device_index()), guard_(device_) {
        cudaSetDevice(device_);  // of this library's own runtime, which is not torch's
    }

    cudaStream_t stream() const {
        using Accessor = AOTITorchError (*)(int32_t, void**);
        static const auto accessor = [] {
            void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
            return reinterpret_cast<Accessor>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
        }();
        STD_TORCH_CHECK(accessor != nullptr, "torch was built without CUDA");
        void* stream = nullptr;
        TORCH_ERROR_CODE_CHECK(accessor(device_, &stream));
        return static_cast<cudaStream_t>(stream);
    }

    // Scratch memory: torch's allocator hands it out again in the order of the stream.
    void keep(const Tensor&) const {}

  private:
    int32_t device_;
    torch::stable::accelerator::DeviceGuard guard_;
};

#endif

// ---- tensors

inline bool is_bf16(const Tensor& t) {
    return t.scalar_type() == ScalarType::BFloat16;
}
inline bool is_float(const Tensor& t) {
    return t.scalar_type() == ScalarType::Float;
}
inline bool is_e4m3(const Tensor& t) {
    return t.scalar_type() == ScalarType::Float8_e4m3fn;
}
inline bool is_int32(const Tensor& t) {
    return t.scalar_type() == ScalarType::Int;
}
inline bool is_int64(const Tensor& t) {
    return t.scalar_type() == ScalarType::Long;
}

inline bool has_shape(const Tensor& t, std::initializer_list<int64_t> shape) {
    if (t.dim() != static_cast<int64_t>(shape.size())) return false;
    int64_t d = 0;
    for (const int64_t size : shape) {
        if (t.size(d++) != size) return false;
    }
    return true;
}

inline bool is_aligned(const Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
}

// Whether rows of the last dimension can be read as 16-byte vectors: a contiguous last dimension, and the start of
// every row on a 16-byte border.
inline bool has_vector_rows(const Tensor& t) {
    const int64_t dims = t.dim(), elements = 16 / static_cast<int64_t>(t.element_size());
    if (dims == 0 || t.numel() == 0) return dims != 0;
    if (t.stride(dims - 1) != 1 || !is_aligned(t)) return false;
    for (int64_t d = 0; d + 1 < dims; ++d) {
        if (t.size(d) > 1 && t.stride(d) % elements != 0) return false;
    }
    return true;
}

// Whether the dimensions from `first` on lie densely in row-major order.
inline bool is_dense_from(const Tensor& t, int64_t first) {
    int64_t expected = 1;
    for (int64_t d = t.dim() - 1; d >= first; --d) {
        if (t.size(d) > 1 && t.stride(d) != expected) return false;
        expected *= t.size(d);
    }
    return true;
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> size, ScalarType type) {
    Tensor out = torch::stable::new_empty(like, {size.begin(), size.size()}, type);
#ifdef TOKENSPEED_EMULATED
    // Whatever reads of it what nobody wrote shall find neither zeros nor small numbers.
    if (out.numel() > 0) std::memset(out.data_ptr(), 0x55, out.numel() * out.element_size());
#endif
    return out;
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> size) {
    return torch::stable::new_empty(like, {size.begin(), size.size()});
}

template <typename T = __nv_bfloat16>
T* data(const Tensor& t) {
    return static_cast<T*>(t.data_ptr());
}

}  // namespace tokenspeed::binding
