// SPDX-License-Identifier: Apache-2.0
// Runs the operations of the stand-in for cuDNN on host memory, one after another. Values are
// double, rounded where they are stored or of 16 bits: what is asked is what a graph means, not
// what float32 makes of it, so results can be held against float64 to the last bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "operations.h"

namespace stand_in {

// How memory is read, and what was just written there.
struct Reading {
  // A tensor that one operation produces and another reads: whether as stored, or as computed.
  // Nothing that we know of says which cuDNN does.
  bool as_stored;
  // cuDNN's documentation has the first of eight values in the lowest bit of a byte. Here for a
  // test that notices the other order.
  bool bits_from_the_highest;
};

// ---- Floats of 16 bits, of which so many are the fraction.

inline int fraction_bits(DataType type) { return type == DataType::bfloat16 ? 7 : 10; }

inline int exponent_bias(int fraction) { return (1 << (14 - fraction)) - 1; }

// Rounds to nearest, ties to even.
inline uint16_t encode(float value, int fraction) {
  const int sign = std::signbit(value) ? 0x8000 : 0, bias = exponent_bias(fraction);
  const int infinity = ((1 << (15 - fraction)) - 1) << fraction;
  if (std::isnan(value)) return 0x7fff;
  if (std::isinf(value)) return static_cast<uint16_t>(sign | infinity);
  const int exponent = value == 0 ? 1 - bias : std::max(std::ilogb(value), 1 - bias);
  const double steps = std::nearbyint(std::ldexp(std::abs(value), fraction - exponent));
  // A leading one among the steps, or a carry out of them, counts the exponent up.
  const int magnitude = ((exponent + bias - 1) << fraction) + static_cast<int>(steps);
  return static_cast<uint16_t>(sign | std::min(magnitude, infinity));
}

inline double decode(uint16_t bits, int fraction) {
  const int bias = exponent_bias(fraction), magnitude = bits & 0x7fff;
  const int exponent = magnitude >> fraction, steps = magnitude & ((1 << fraction) - 1);
  double value = std::ldexp(steps, 1 - bias - fraction);
  if (exponent == (1 << (15 - fraction)) - 1)
    value = steps == 0 ? INFINITY : NAN;
  else if (exponent > 0)
    value = std::ldexp((1 << fraction) + steps, exponent - bias - fraction);
  return bits & 0x8000 ? -value : value;
}

// ---- Memory.

inline double load(const Tensor& t, const char* memory, int64_t offset, const Reading& reading) {
  switch (t.type) {
    case DataType::float32:
      return reinterpret_cast<const float*>(memory)[offset];
    case DataType::bit: {
      const int bit = reading.bits_from_the_highest ? 7 - offset % 8 : offset % 8;
      return memory[offset / 8] >> bit & 1;
    }
    default:
      return decode(reinterpret_cast<const uint16_t*>(memory)[offset], fraction_bits(t.type));
  }
}

// By way of float32, in which a kernel has a value before it stores it.
inline void store(const Tensor& t, double value, char* memory, int64_t offset) {
  const auto single = static_cast<float>(value);
  if (t.type == DataType::float32)
    reinterpret_cast<float*>(memory)[offset] = single;
  else
    reinterpret_cast<uint16_t*>(memory)[offset] = encode(single, fraction_bits(t.type));
}

inline double rounded(const Tensor& t, double value) {
  const auto single = static_cast<float>(value);
  if (t.type == DataType::float32) return single;
  return decode(encode(single, fraction_bits(t.type)), fraction_bits(t.type));
}

// ---- Operations.

using Values = std::vector<double>;  // of a tensor, row by row

template <class Visit>
void for_each_place(const Tensor& t, Visit visit) {
  for (int64_t n = 0; n < t.sizes[0]; ++n)
    for (int64_t c = 0; c < t.sizes[1]; ++c)
      for (int64_t h = 0; h < t.sizes[2]; ++h)
        for (int64_t w = 0; w < t.sizes[3]; ++w) visit(n, c, h, w);
}

template <class Visit>
void for_each_product(const Convolution& c, const Tensor& x, const Tensor& w, const Tensor& y,
                      Visit visit) {
  const int64_t groups = x.sizes[1] / w.sizes[1], group_outputs = w.sizes[0] / groups;
  for_each_place(w, [&](int64_t k, int64_t i, int64_t r, int64_t s) {
    const int64_t channel = k / group_outputs * w.sizes[1] + i;
    for (int64_t n = 0; n < y.sizes[0]; ++n)
      for (int64_t p = 0; p < y.sizes[2]; ++p)
        for (int64_t q = 0; q < y.sizes[3]; ++q) {
          const int64_t row = p * c.strides[0] + r * c.dilations[0] - c.before[0];
          const int64_t column = q * c.strides[1] + s * c.dilations[1] - c.before[1];
          if (row >= 0 && row < x.sizes[2] && column >= 0 && column < x.sizes[3])
            visit(x.index(n, channel, row, column), w.index(k, i, r, s), y.index(n, k, p, q));
        }
  });
}

inline double compute(Pointwise mode, double x, double other) {
  switch (mode) {
    case Pointwise::add:
      return x + other;
    case Pointwise::mul:
      return x * other;
    case Pointwise::sub:
      return x - other;
    case Pointwise::relu_backward:
      return x > 0 ? other : 0;
  }
  return NAN;
}

inline Values compute(const Operation& o, const std::vector<const Values*>& inputs) {
  const Tensor& out = o.output;
  const Values& first = *inputs[0];
  Values values(out.count());
  switch (o.type) {
    case kConvolutionForward:
      for_each_product(
          o.convolution, o.inputs[0], o.inputs[1], out,
          [&](int64_t x, int64_t w, int64_t y) { values[y] += first[x] * (*inputs[1])[w]; });
      break;
    case kConvolutionBackwardData:
      for_each_product(
          o.convolution, out, o.inputs[1], o.inputs[0],
          [&](int64_t dx, int64_t w, int64_t dy) { values[dx] += first[dy] * (*inputs[1])[w]; });
      break;
    case kReductionOperation:
      for_each_place(o.inputs[0], [&](int64_t n, int64_t c, int64_t h, int64_t w) {
        values[c] += first[o.inputs[0].index(n, c, h, w)];
      });
      break;
    default:
      for_each_place(out, [&](int64_t n, int64_t c, int64_t h, int64_t w) {
        const auto at = [&](int i) {  // a size of 1 is read again and again
          const Sizes& sizes = o.inputs[i].sizes;
          return (*inputs[i])[o.inputs[i].index(n % sizes[0], c % sizes[1], h % sizes[2],
                                                w % sizes[3])];
        };
        values[out.index(n, c, h, w)] = compute(o.mode, at(0), at(1));
      });
  }
  return values;
}

inline void run(const std::vector<Operation>& operations, const std::map<int64_t, char*>& addresses,
                const Reading& reading) {
  const auto for_each_offset = [](const Tensor& t, auto visit) {
    for_each_place(t, [&](int64_t n, int64_t c, int64_t h, int64_t w) {
      visit(t.index(n, c, h, w),
            n * t.strides[0] + c * t.strides[1] + h * t.strides[2] + w * t.strides[3]);
    });
  };
  std::map<int64_t, Values> values;
  for (const Operation& o : operations) {
    std::vector<const Values*> inputs;
    for (const Tensor& t : o.inputs) {
      const auto [entry, is_new] = values.try_emplace(t.id);
      Values& loaded = entry->second;
      if (is_new) {
        loaded.resize(t.count());
        for_each_offset(t, [&](int64_t index, int64_t offset) {
          loaded[index] = load(t, addresses.at(t.id), offset, reading);
        });
      }
      inputs.push_back(&loaded);
    }
    const Tensor& out = o.output;
    Values found = compute(o, inputs);
    if (!out.is_virtual)
      for_each_offset(out, [&](int64_t index, int64_t offset) {
        char* memory = addresses.at(out.id);
        // A kernel may add its part of a sum to those of others.
        const bool is_sum = o.type == kReductionOperation;
        const double before = is_sum ? load(out, memory, offset, reading) : 0;
        store(out, before + found[index], memory, offset);
      });
    if (out.is_virtual ? out.bits() == 16 : reading.as_stored)
      for (double& value : found) value = rounded(out, value);
    values.emplace(out.id, std::move(found));
  }
}

}  // namespace stand_in
