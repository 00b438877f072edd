// SPDX-License-Identifier: Apache-2.0
// Argument checks shared by the CPU and the CUDA entries. They throw std::invalid_argument, which
// reaches Python as a ValueError with just this text (torch's own macro adds C++ file and line).
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "layout.h"
#include "params.h"

namespace fastresnet {

template <class... Args>
void check(bool ok, const Args&... args) {
  if (ok) return;
  std::ostringstream text;
  (text << ... << args);
  throw std::invalid_argument(text.str());
}

inline std::string shape(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::string s = "[";
  for (size_t i = 0; i < sizes.size(); ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + "]";
}
inline std::string shape(const Tensor& t) { return shape(t.sizes()); }

inline DType dtype_of(const char* op, const Tensor& t, const char* name = "x") {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      check(false, op, ": expected ", name, " of float32, bfloat16 or float16, got ",
            torch::headeronly::toString(t.scalar_type()));
      return {};
  }
}

inline std::string device_name(const Tensor& t) {
  const auto device = t.device();
  if (device.is_cpu()) return "cpu";
  const std::string type =
      device.is_cuda() ? "cuda"
                       : "a device of type " + std::to_string(static_cast<int>(device.type()));
  return type + ":" + std::to_string(device.index());
}

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check(t.device() == x.device(), op, ": expected ", name, " on x's device ", device_name(x),
        ", got ", device_name(t));
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check(t.scalar_type() == x.scalar_type(), op, ": expected ", name, " of x's dtype ",
        torch::headeronly::toString(x.scalar_type()), ", got ",
        torch::headeronly::toString(t.scalar_type()));
}

inline void check_channels_last(const char* op, const char* name, const Tensor& t) {
  check(is_channels_last(t), op, ": expected ", name, " to be dense in channels_last, got shape ",
        shape(t), " with strides ", shape(t.strides()));
}

// x of an operator: [N, C, H, W], dense channels_last, at least one value.
inline void check_input(const char* op, const Tensor& x, const char* name = "x") {
  check(x.dim() == 4, op, ": expected ", name, " of 4 dimensions (N, C, H, W), got shape ",
        shape(x));
  check(x.numel() > 0, op, ": expected ", name, " to hold values, got shape ", shape(x));
  check_channels_last(op, name, x);
  dtype_of(op, x, name);
}

// residual, grad: the shape, dtype, layout and device of x.
inline void check_like_input(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check(t.defined() && t.dim() == 4, op, ": expected ", name, " of shape ", shape(x), ", got ",
        t.defined() ? shape(t) : "None");
  bool same_shape = true;
  for (int d = 0; d < 4; ++d) same_shape = same_shape && t.size(d) == x.size(d);
  check(same_shape, op, ": expected ", name, " of x's shape ", shape(x), ", got ", shape(t));
  check_dtype(op, name, t, x);
  check_channels_last(op, name, t);
  check_device(op, name, t, x);
}

// mean, var, weight, bias: float32 [C].
inline const float* check_vector(const char* op, const char* name, const Tensor& t,
                                 const Tensor& x) {
  check(t.defined() && t.dim() == 1 && t.size(0) == x.size(1), op, ": expected ", name, " of ",
        x.size(1), " values, one a channel, got ", t.defined() ? shape(t) : "None");
  check(t.scalar_type() == ScalarType::Float, op, ": expected ", name, " of float32, got ",
        torch::headeronly::toString(t.scalar_type()));
  check(t.size(0) == 1 || t.stride(0) == 1, op, ": expected ", name,
        " to be contiguous, got a stride of ", t.stride(0));
  check_device(op, name, t, x);
  return t.const_data_ptr<float>();
}

inline const uint8_t* check_mask(const char* op, const Tensor& t, const Tensor& x) {
  check(t.defined() && t.dim() == 4 && t.size(0) == x.size(0) && t.size(1) == x.size(2) &&
            t.size(2) == x.size(3) && t.size(3) == mask_bytes(x.size(1)) && t.is_contiguous() &&
            t.scalar_type() == ScalarType::Byte && t.device() == x.device(),
        op, ": expected the mask that the forward returned, uint8 [N, H, W, C / 8], got shape ",
        t.defined() ? shape(t) : "None");
  return t.const_data_ptr<uint8_t>();
}

inline PoolShape check_pool(const char* op, const Tensor& x, int64_t kernel, int64_t stride,
                            int64_t padding) {
  check_input(op, x);
  check(kernel >= 1 && kernel <= kMaxPoolKernel, op, ": expected a kernel_size of 1 to ",
        kMaxPoolKernel, ", got ", kernel);
  check(stride >= 1, op, ": expected a stride of 1 or more, got ", stride);
  check(padding >= 0 && 2 * padding <= kernel, op,
        ": expected a padding of at most half the kernel_size, got ", padding);
  PoolShape s{x.size(0), x.size(2), x.size(3), x.size(1), 0, 0, kernel, stride, padding};
  check(s.height + 2 * padding >= kernel && s.width + 2 * padding >= kernel, op,
        ": expected x of at least the window's size, got ", shape(x));
  s.out_height = (s.height + 2 * padding - kernel) / stride + 1;
  s.out_width = (s.width + 2 * padding - kernel) / stride + 1;
  return s;
}

// grad, index: of the pooled output's shape, channels_last.
inline void check_pooled(const char* op, const char* name, const Tensor& t, const Tensor& x,
                         const PoolShape& s, ScalarType dtype) {
  check(t.defined() && t.dim() == 4 && t.size(0) == s.batch && t.size(1) == s.channels &&
            t.size(2) == s.out_height && t.size(3) == s.out_width,
        op, ": expected ", name, " of shape [", s.batch, ", ", s.channels, ", ", s.out_height, ", ",
        s.out_width, "], got ", t.defined() ? shape(t) : "None");
  check(t.scalar_type() == dtype, op, ": expected ", name, " of ",
        torch::headeronly::toString(dtype), ", got ", torch::headeronly::toString(t.scalar_type()));
  check_channels_last(op, name, t);
  check_device(op, name, t, x);
}

// grad of averages over images of so many pixels: [N, C, 1, 1].
inline AvgPoolShape check_averages(const char* op, const Tensor& grad, int64_t height,
                                   int64_t width) {
  check_input(op, grad, "grad");
  check(grad.size(2) == 1 && grad.size(3) == 1, op, ": expected grad of shape [N, C, 1, 1], got ",
        shape(grad));
  check(height >= 1 && width >= 1, op, ": expected height and width of 1 or more, got ", height,
        " and ", width);
  return {grad.size(0), height, width, grad.size(1)};
}

}  // namespace fastresnet
