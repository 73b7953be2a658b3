// The sum over ranks, the draw over ranks, and memory that they share, as C functions: no operators, since their results
// depend on who else calls them. tokenspeed/engine/parallel/peers.py calls them. Each returns null, or why it failed.
#include <launch.h>

#include "kernels.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

using tokenspeed::AllReduce;
using tokenspeed::SampleRanks;

namespace {

#ifdef TOKENSPEED_EMULATED
void set_device(int) {}
#else
void set_device(int device) {
    cudaSetDevice(device);
}
#endif

}  // namespace

// size: of the caller's struct, which must be the kernel's.
EXPORTED const char* tokenspeed_all_reduce(const AllReduce* arguments, size_t size, int device, void* stream) {
    if (size != sizeof(AllReduce)) return "the arguments of all_reduce have another layout";
    if (!tokenspeed::all_reduce_supported(*arguments)) return "all_reduce does not serve these sizes";
    set_device(device);
    const cudaError_t status = tokenspeed::all_reduce(*arguments, static_cast<cudaStream_t>(stream));
    return status == cudaSuccess ? nullptr : tokenspeed::describe(status);
}

EXPORTED int64_t tokenspeed_all_reduce_memory(int ranks, int max_rows, int max_width) {
    return tokenspeed::all_reduce_memory(ranks, max_rows, max_width);
}

// size: as above.
EXPORTED const char* tokenspeed_sample_ranks(const SampleRanks* arguments, size_t size, int device, void* stream) {
    if (size != sizeof(SampleRanks)) return "the arguments of sample_ranks have another layout";
    if (!tokenspeed::sample_ranks_supported(*arguments)) return "sample_ranks does not serve these sizes";
    set_device(device);
    const cudaError_t status = tokenspeed::sample_ranks(*arguments, static_cast<cudaStream_t>(stream));
    return status == cudaSuccess ? nullptr : tokenspeed::describe(status);
}

EXPORTED int64_t tokenspeed_sample_ranks_memory(int ranks, int max_clusters) {
    return tokenspeed::sample_ranks_memory(ranks, max_clusters);
}

EXPORTED int tokenspeed_sample_ranks_clusters(int device, int blocks) {
    set_device(device);
    return tokenspeed::sample_ranks_clusters(blocks);
}

#ifndef TOKENSPEED_EMULATED
namespace {

const char* reason(cudaError_t status) {
    if (status == cudaSuccess) return nullptr;
    cudaGetLastError();  // or the next launch would report it
    return cudaGetErrorString(status);
}

}  // namespace

// Memory of a device, zeros, and the handle by which another process opens it.
EXPORTED const char* tokenspeed_peer_allocate(int device, size_t bytes, void** memory, cudaIpcMemHandle_t* handle) {
    set_device(device);
    cudaError_t status = cudaMalloc(memory, bytes);
    if (status == cudaSuccess) status = cudaMemset(*memory, 0, bytes);
    if (status == cudaSuccess) status = cudaDeviceSynchronize();
    if (status == cudaSuccess) status = cudaIpcGetMemHandle(handle, *memory);
    return reason(status);
}

// Another process's memory, for kernels of a device.
EXPORTED const char* tokenspeed_peer_open(int device, const cudaIpcMemHandle_t* handle, void** memory) {
    set_device(device);
    return reason(cudaIpcOpenMemHandle(memory, *handle, cudaIpcMemLazyEnablePeerAccess));
}
#endif
