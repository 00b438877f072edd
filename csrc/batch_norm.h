// SPDX-License-Identifier: Apache-2.0
// The vector mathematics of batch normalisation (Ioffe & Szegedy, 2015), one channel at a time:
// merging moments, the affine form of the forward, the coefficients of the backward. Written once
// for the CPU kernels, the CUDA kernels and their tests; it is not a kernel itself.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define FASTRESNET_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTRESNET_HOST_DEVICE inline
#endif

namespace fastresnet {

// Mean and centred sum of squares of `count` values.
template <class acc_t>
struct Moments {
  acc_t count, mean, m2;

  FASTRESNET_HOST_DEVICE acc_t biased_variance() const { return m2 / count; }
};

// Chan, Golub & LeVeque (1979): never a plain difference of large sums.
template <class acc_t>
FASTRESNET_HOST_DEVICE Moments<acc_t> merge(const Moments<acc_t>& a, const Moments<acc_t>& b) {
  const acc_t count = a.count + b.count;
  if (count == acc_t(0)) return a;
  const acc_t delta = b.mean - a.mean;
  const acc_t share = b.count / count;
  return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
}

// y = scale * x + shift
template <class acc_t>
struct Affine {
  acc_t scale, shift;
};

FASTRESNET_HOST_DEVICE float inverse_std(float var, float eps) {
  return 1.0f / std::sqrt(var + eps);
}

FASTRESNET_HOST_DEVICE Affine<float> normalise(float mean, float var, float weight, float bias,
                                               float eps) {
  const float scale = weight * inverse_std(var, eps);
  return {scale, std::fma(-mean, scale, bias)};  // one rounding, whatever the compiler contracts
}

// dx = scale * ((g - offset) - slope * (x - mean)), where g is the gradient behind the activation.
// The differences come first: where they cancel, they do so without the rounding of a product.
template <class acc_t>
struct InputGradient {
  acc_t scale, offset, slope;
};

// sum_g and sum_gx are the sums of g and of g * (x - mean) over `count` values. In evaluation the
// statistics are constants, so offset and slope vanish.
template <class acc_t>
FASTRESNET_HOST_DEVICE InputGradient<acc_t> input_gradient(acc_t sum_g, acc_t sum_gx, acc_t count,
                                                           float var, float weight, float eps,
                                                           bool training) {
  const acc_t invstd = inverse_std(var, eps);
  const acc_t scale = weight * invstd;
  if (!training) return {scale, acc_t(0), acc_t(0)};
  return {scale, sum_g / count, invstd * invstd * sum_gx / count};
}

template <class acc_t>
FASTRESNET_HOST_DEVICE acc_t weight_gradient(acc_t sum_gx, float var, float eps) {
  return sum_gx * acc_t(inverse_std(var, eps));
}

}  // namespace fastresnet
