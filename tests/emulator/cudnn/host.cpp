// SPDX-License-Identifier: Apache-2.0
// What csrc/cuda/conv.cpp and its graphs find around them where there is no GPU. They are compiled
// as they are. CUDA's functions are the three below; calls of cuDNN's library and of torch's C
// functions are led here by the linker (--wrap). So the operators work on CPU tensors, in a
// namespace of their own (STAND_IN_NAMESPACE).
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstring>

extern "C" {

// For tests to set.
const char* stand_in_cudnn = "";  // the library that is found as cuDNN's
void* stand_in_current_stream = nullptr;

void* stand_in_memset_stream = nullptr;  // that of the last memset

void* __real_dlopen(const char* name, int flags);
int32_t __real_aoti_torch_library_init_impl(const char* space, const char* key, const char* file,
                                            uint32_t line, void** library);

void* __wrap_dlopen(const char* name, int flags) {
  const bool is_cudnn = std::strcmp(name, "libcudnn.so.9") == 0;
  return __real_dlopen(is_cudnn ? stand_in_cudnn : name, flags);
}

int32_t __wrap_aoti_torch_library_init_impl(const char*, const char* key, const char* file,
                                            uint32_t line, void** library) {
  const bool is_cuda = std::strcmp(key, "CUDA") == 0;
  return __real_aoti_torch_library_init_impl(STAND_IN_NAMESPACE, is_cuda ? "CPU" : key, file, line,
                                             library);
}

int32_t __wrap_aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = stand_in_current_stream;
  return 0;
}

int32_t __wrap_aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}

int32_t __wrap_aoti_torch_delete_device_guard(void*) { return 0; }

}  // extern "C"

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  stand_in_memset_stream = stream;
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t) { return "an error"; }
