// Launching, and how much of a kernel fits on the current device.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

namespace attanchor::arch {

// `attribute` must live as long as the result.
inline cudaLaunchConfig_t configuration(cudaLaunchAttribute* attribute, int blocks, int threads, int shared,
                                        int cluster, void* stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  if (cluster > 1) {
    attribute->id = cudaLaunchAttributeClusterDimension;
    attribute->val.clusterDim.x = cluster;
    attribute->val.clusterDim.y = 1;
    attribute->val.clusterDim.z = 1;
    config.attrs = attribute;
    config.numAttrs = 1;
  }
  return config;
}

template <class K>
int count_resident_blocks(K kernel, int device, int threads, int shared, int cluster) {
  int most = 0;
  if (cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
  if (shared > most) return 0;
  // The same limit for every shape, since it belongs to the kernel and not to a launch.
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most) != cudaSuccess) return 0;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared) !=
      cudaSuccess) {
    return 0;
  }
  if (cluster > 1) {
    // Clusters exist only in code that was compiled for compute capability 9.0 or more, whatever the device could do.
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess || attributes.ptxVersion < 90) return 0;
    cudaLaunchAttribute attribute;
    cudaLaunchConfig_t config = configuration(&attribute, cluster, threads, shared, cluster, nullptr);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) return 0;
    return clusters * cluster;
  }
  int each = 0, multiprocessors = 0;
  if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
  return each * multiprocessors;
}

template <class K>
int resident_blocks(K kernel, int threads, int shared, int cluster) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int>, int> known;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  const std::tuple<const void*, int, int, int> key(reinterpret_cast<const void*>(kernel), device, shared, cluster);
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  const int count = count_resident_blocks(kernel, device, threads, shared, cluster);
  if (count == 0) cudaGetLastError();  // a refusal here is an answer, not an error of the launch to come
  return known[key] = count;
}

template <class Argument>
const char* launch(void (*kernel)(Argument), int blocks, int threads, int shared, int cluster, void* stream,
                   const Argument& argument) {
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = configuration(&attribute, blocks, threads, shared, cluster, stream);
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, argument);
  const cudaError_t last = cudaGetLastError();  // cleared in any case, or PyTorch would blame a kernel of its own for it
  if (error == cudaSuccess) error = last;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace attanchor::arch
