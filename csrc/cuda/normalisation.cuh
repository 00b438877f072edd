// SPDX-License-Identifier: Apache-2.0
// What the kernels know of one batch norm: its vectors, what they make of a value and of a
// gradient.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "batch_norm.h"
#include "cuda/vec.cuh"

namespace fastresnet::cuda {

// One batch norm's vectors, [channels] each. Backward passes leave bias null unless they need it.
struct Normalisation {
  const float* mean;
  const float* var;
  const float* weight;
  const float* bias;
  float eps;

  __device__ __forceinline__ Affine<float> affine(int64_t c) const {
    return normalise(__ldg(mean + c), __ldg(var + c), __ldg(weight + c), __ldg(bias + c), eps);
  }
};

// As torch's ReLU: NaN passes.
__device__ __forceinline__ bool relu_passes(float z) { return !(z <= 0.0f); }

template <int kSums>
struct alignas(16) OctetSums {
  float sum[kSums][kOctet];

  __device__ __forceinline__ void merge(const OctetSums& other) {
#pragma unroll
    for (int s = 0; s < kSums; ++s)
#pragma unroll
      for (int i = 0; i < kOctet; ++i) sum[s][i] += other.sum[s][i];
  }
};

// dx of one channel, from the gradient behind the activation and x.
struct alignas(16) ChannelGradient {
  InputGradient<float> of;
  float mean;

  __device__ __forceinline__ float operator()(float g, float x) const {
    return of.scale * fmaf(-of.slope, x - mean, g - of.offset);
  }
};

// That of channel c, from the sums of g and of g * (x - mean) over `rows` values.
__device__ __forceinline__ ChannelGradient channel_gradient(const Normalisation& norm,
                                                            const float* sum_g, const float* sum_gx,
                                                            int64_t rows, bool training,
                                                            int64_t c) {
  return {input_gradient(__ldg(sum_g + c), __ldg(sum_gx + c), static_cast<float>(rows),
                         __ldg(norm.var + c), __ldg(norm.weight + c), norm.eps, training),
          __ldg(norm.mean + c)};
}

}  // namespace fastresnet::cuda
