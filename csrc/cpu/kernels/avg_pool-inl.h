// SPDX-License-Identifier: Apache-2.0
// The average of each channel over an image, and its gradient.

// Vectors of a pixel that are added up together: few enough for their sums to stay in registers.
constexpr int kPooledVecs = kManyRegisters ? 8 : 4;

// Averages of `vectors` vectors of channels of one image, from its first pixel's on. Rows are added
// up one by one, then their sums: one sum over the whole image would lose more bits.
template <int vectors, class T, class P>
inline void average_image(const T* x, const AvgPoolShape& s, P part, T* out) {
  Vec total[vectors];
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) total[v] = broadcast(0.0f);
  for (int64_t row = 0; row < s.height; ++row) {
    Vec sum[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[v] = broadcast(0.0f);
    for (int64_t column = 0; column < s.width; ++column, x += s.channels)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[v] = sum[v] + load(x + v * kWidth, part);
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) total[v] = total[v] + sum[v];
  }
  const Vec share = broadcast(1.0f / static_cast<float>(s.height * s.width));
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) store(out + v * kWidth, total[v] * share, part);
}

void global_avg_pool(const AvgPoolParams& p, int64_t begin, int64_t end) {
  for_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const AvgPoolShape& s = p.shape;
    constexpr int64_t kTogether = kPooledVecs * kWidth;
    for (int64_t image = begin; image < end; ++image) {
      const T* x = static_cast<const T*>(p.x) + image * s.height * s.width * s.channels;
      T* out = static_cast<T*>(p.out) + image * s.channels;
      int64_t c = 0;
      for (; c + kTogether <= s.channels; c += kTogether)
        average_image<kPooledVecs>(x + c, s, Full{}, out + c);
      for_channels(s.channels - c, [&](int64_t rest, auto part) {
        average_image<1>(x + c + rest, s, part, out + c + rest);
      });
    }
  });
}

// Every pixel of an image has the same gradient.
void global_avg_pool_backward(const AvgPoolBackwardParams& p, int64_t begin, int64_t end) {
  for_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const AvgPoolShape& s = p.shape;
    const int64_t pixels = s.height * s.width;
    const Vec share = broadcast(1.0f / static_cast<float>(pixels));
    for (int64_t image = begin; image < end; ++image) {
      const T* grad = static_cast<const T*>(p.grad) + image * s.channels;
      T* dx = static_cast<T*>(p.dx) + image * pixels * s.channels;
      for_channels(s.channels, [&](int64_t c, auto part) {
        store(dx + c, load(grad + c, part) * share, part);
      });
      for (int64_t pixel = 1; pixel < pixels; ++pixel)
        std::memcpy(dx + pixel * s.channels, dx, s.channels * sizeof(T));
    }
  });
}
