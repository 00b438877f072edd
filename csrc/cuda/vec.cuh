// SPDX-License-Identifier: Apache-2.0
// Global memory in octets: eight neighbouring channels of one row, the work of one thread and the
// span of one byte of a gradient mask. Values travel in float32, bfloat16 or float16, 16 bytes an
// access where the layout allows it, and are float in registers. Nothing here knows of batch norm.
// Conversions are named ones: torch compiles CUDA without the implicit ones of half and bfloat16.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace fastresnet::cuda {

constexpr int kOctet = 8;

// Every store to global memory goes through here, as every load through __ldg or __ldcg: where the
// emulator of tests/emulator looks on. A plain store, since __stwb is an ordered one under nvcc.
template <typename T>
__device__ __forceinline__ void store_global(T* p, T value) {
#if defined(__CUDACC__)
  *p = value;
#else
  __stwb(p, value);
#endif
}

// Two neighbouring values of a storage type: what the conversion instructions take.
template <typename scalar_t>
struct Pair;

template <>
struct Pair<float> {
  using type = float2;
  static __device__ __forceinline__ float2 widen(float2 v) { return v; }
  static __device__ __forceinline__ float2 narrow(float2 v) { return v; }
};

template <>
struct Pair<__half> {
  using type = __half2;
  static __device__ __forceinline__ float2 widen(__half2 v) { return __half22float2(v); }
  static __device__ __forceinline__ __half2 narrow(float2 v) { return __float22half2_rn(v); }
};

template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
  static __device__ __forceinline__ float2 widen(__nv_bfloat162 v) { return __bfloat1622float2(v); }
  static __device__ __forceinline__ __nv_bfloat162 narrow(float2 v) {
    return __float22bfloat162_rn(v);
  }
};

// An octet as it lies in memory. Kept apart from its floats, so that the loads of several rows can
// be in flight in few registers. `valid` says how many of the eight channels exist.
//   kPacked: 16 bytes an access; p is 16-byte aligned and channels fill whole accesses.
//   otherwise: one value an access, any alignment, any number of channels.
template <typename scalar_t, bool kPacked>
struct Octet {
  static constexpr int kPerAccess = kPacked ? 16 / sizeof(scalar_t) : 1;
  static constexpr int kAccesses = kOctet / kPerAccess;
  using pair_t = typename Pair<scalar_t>::type;

  alignas(16) scalar_t values[kOctet];

  __device__ __forceinline__ void load(const scalar_t* __restrict__ p, int valid) {
    if constexpr (kPacked) {
      uint4 words[kAccesses];
#pragma unroll
      for (int i = 0; i < kAccesses; ++i)
        words[i] = i * kPerAccess < valid ? __ldg(reinterpret_cast<const uint4*>(p) + i)
                                          : make_uint4(0, 0, 0, 0);
      memcpy(static_cast<void*>(values), words, sizeof(values));
    } else {
      memset(static_cast<void*>(values), 0, sizeof(values));
#pragma unroll
      for (int i = 0; i < kOctet; ++i)
        if (i < valid) values[i] = __ldg(p + i);
    }
  }

  __device__ __forceinline__ void store(scalar_t* __restrict__ p, int valid) const {
    if constexpr (kPacked) {
      uint4 words[kAccesses];
      memcpy(words, values, sizeof(values));
#pragma unroll
      for (int i = 0; i < kAccesses; ++i)
        if (i * kPerAccess < valid) store_global(reinterpret_cast<uint4*>(p) + i, words[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kOctet; ++i)
        if (i < valid) store_global(p + i, values[i]);
    }
  }

  __device__ __forceinline__ void widen(float (&out)[kOctet]) const {
    pair_t pairs[kOctet / 2];
    memcpy(static_cast<void*>(pairs), values, sizeof(values));
#pragma unroll
    for (int i = 0; i < kOctet / 2; ++i) {
      const float2 v = Pair<scalar_t>::widen(pairs[i]);
      out[2 * i] = v.x;
      out[2 * i + 1] = v.y;
    }
  }

  __device__ __forceinline__ void narrow(const float (&in)[kOctet]) {
    pair_t pairs[kOctet / 2];
#pragma unroll
    for (int i = 0; i < kOctet / 2; ++i)
      pairs[i] = Pair<scalar_t>::narrow(make_float2(in[2 * i], in[2 * i + 1]));
    memcpy(static_cast<void*>(values), pairs, sizeof(values));
  }
};

// The same of bytes, which are only moved: 8 bytes an access where packed.
template <bool kPacked>
struct ByteOctet {
  uint8_t values[kOctet];

  __device__ __forceinline__ void load(const uint8_t* __restrict__ p, int valid) {
    if constexpr (kPacked) {
      const uint2 word = valid > 0 ? __ldg(reinterpret_cast<const uint2*>(p)) : make_uint2(0, 0);
      memcpy(values, &word, sizeof(values));
    } else {
#pragma unroll
      for (int i = 0; i < kOctet; ++i) values[i] = i < valid ? __ldg(p + i) : uint8_t{0};
    }
  }

  __device__ __forceinline__ void store(uint8_t* __restrict__ p, int valid) const {
    if constexpr (kPacked) {
      uint2 word;
      memcpy(&word, values, sizeof(values));
      if (valid > 0) store_global(reinterpret_cast<uint2*>(p), word);
    } else {
#pragma unroll
      for (int i = 0; i < kOctet; ++i)
        if (i < valid) store_global(p + i, values[i]);
    }
  }
};

}  // namespace fastresnet::cuda
