// SPDX-License-Identifier: Apache-2.0
// The vectors of length C that the CPU entries make of a batch norm's arguments and sums.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "batch_norm.h"
#include "check.h"

namespace fastresnet::cpu {

// The [channels] vectors of one batch norm, and what they make of x in the forward.
struct BatchNorm {
  const float *mean, *var, *weight, *bias;
  float eps;
  std::vector<float> scale, shift;

  BatchNorm(int64_t channels, const float* mean, const float* var, const float* weight,
            const float* bias, double eps)
      : mean(mean),
        var(var),
        weight(weight),
        bias(bias),
        eps(static_cast<float>(eps)),
        scale(channels),
        shift(channels) {
    for (int64_t c = 0; c < channels; ++c) {
      const auto affine = normalise(mean[c], var[c], weight[c], bias ? bias[c] : 0.0f, this->eps);
      scale[c] = affine.scale;
      shift[c] = affine.shift;
    }
  }
};

// The coefficients of dx from the sums, and the gradient of weight.
struct Gradient {
  bool training;
  std::vector<float> scale, offset, slope;

  Gradient(const BatchNorm& bn, const double* sum_g, const double* sum_gx, int64_t rows,
           bool training, float* dweight)
      : training(training), scale(bn.scale.size()), offset(scale.size()), slope(scale.size()) {
    for (size_t c = 0; c < scale.size(); ++c) {
      const auto k = input_gradient<double>(sum_g[c], sum_gx[c], static_cast<double>(rows),
                                            bn.var[c], bn.weight[c], bn.eps, training);
      scale[c] = static_cast<float>(k.scale);
      offset[c] = static_cast<float>(k.offset);
      slope[c] = static_cast<float>(k.slope);
      dweight[c] = static_cast<float>(weight_gradient(sum_gx[c], bn.var[c], bn.eps));
    }
  }

  BnCoefficients coefficients() const {
    if (!training) return {scale.data(), nullptr, nullptr};
    return {scale.data(), offset.data(), slope.data()};
  }
};

// prefix: of the arguments' names, such as "residual_".
inline BatchNorm check_batch_norm(const char* op, const Tensor& x, const Tensor& mean,
                                  const Tensor& var, const Tensor& weight, const Tensor* bias,
                                  double eps, const char* prefix = "") {
  const auto vector = [&](const char* name, const Tensor& t) {
    return check_vector(op, (std::string(prefix) + name).c_str(), t, x);
  };
  return BatchNorm(x.size(1), vector("mean", mean), vector("var", var), vector("weight", weight),
                   bias ? vector("bias", *bias) : nullptr, eps);
}

inline Tensor to_vector(const Tensor& like, const double* values) {
  Tensor out = empty_vector(like, like.size(1));
  std::copy(values, values + like.size(1), out.mutable_data_ptr<float>());
  return out;
}

}  // namespace fastresnet::cpu
