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

// Whether an error says no more than that the binary or the device lacks the kernel.
inline bool means_absent(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
         error == cudaErrorInvalidClusterSize;
}

template <class K>
cudaError_t ask_resident(K kernel, int device, int threads, int shared, int cluster, int& count) {
  count = 0;
  int most = 0;
  cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess || shared > most) return error;
  // The same limit for every shape, since it belongs to the kernel and not to a launch.
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  if (cluster > 1) {
    // Clusters exist only in code that was compiled for compute capability 9.0 or more, whatever the device could do.
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess || attributes.ptxVersion < 90) return error;
    cudaLaunchAttribute attribute;
    cudaLaunchConfig_t config = configuration(&attribute, cluster, threads, shared, cluster, nullptr);
    int clusters = 0;
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    count = error == cudaSuccess ? clusters * cluster : 0;
    return error;
  }
  int each = 0, multiprocessors = 0;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  count = error == cudaSuccess ? each * multiprocessors : 0;
  return error;
}

template <class K>
const char* count_resident(K kernel, int threads, int shared, int cluster, int& count) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int>, int> known;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return cudaGetErrorString(error);
  const std::tuple<const void*, int, int, int> key(reinterpret_cast<const void*>(kernel), device, shared, cluster);
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) {
    count = found->second;
    return nullptr;
  }
  const cudaError_t error = ask_resident(kernel, device, threads, shared, cluster, count);
  if (error == cudaSuccess) {  // only an answer is remembered
    known[key] = count;
    return nullptr;
  }
  cudaGetLastError();  // cleared, or the launch to come would be blamed for it
  return means_absent(error) ? nullptr : cudaGetErrorString(error);
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
