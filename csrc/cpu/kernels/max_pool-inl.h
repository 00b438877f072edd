// SPDX-License-Identifier: Apache-2.0
// Batch norm, ReLU and max-pool over square windows in one pass, forward and backward.
// Included once per ISA level, after bn_act-inl.h, inside that level's namespace and target.
//
// The normalised map is never stored. The forward leaves one byte a pooled value, the position in
// the window where the value was found, or kNoPosition where the ReLU stopped it; so the backward
// needs neither the map nor the pooled values. It writes each pixel of dx once, gathered from the
// windows that cover the pixel: no two threads write the same place, and the order of every sum is
// fixed.

// The rows or columns of a window that lie on the image, counted from the window's first.
struct Span {
  int64_t begin, end;
};

inline Span span_on_image(int64_t start, int64_t kernel, int64_t size) {
  return {std::max<int64_t>(0, -start), std::min(kernel, size - start)};
}

// A window that hangs over the image's border, or of any size.
struct Window {
  int64_t kernel;
  Span rows, columns;
};

// One that does not: loops over it are unrolled.
template <int size>
struct WholeWindow {
  static constexpr int64_t kernel = size;
  static constexpr Span rows{0, size}, columns{0, size};
};

// Calls tap(position in the window, offset from its corner in x), row by row.
template <class W, class Tap>
inline __attribute__((always_inline)) void for_taps(const PoolShape& s, W window, Tap tap) {
  for (int64_t i = window.rows.begin; i < window.rows.end; ++i)
    for (int64_t j = window.columns.begin; j < window.columns.end; ++j)
      tap(static_cast<uint8_t>(i * window.kernel + j), (i * s.width + j) * s.channels);
}

// Calls body(first pooled value, the window's corner in x, window) for the windows of columns
// [begin, end) of one row of the output. A corner may lie outside the image.
template <class Body>
inline void for_windows(const PoolShape& s, int64_t row, int64_t begin, int64_t end, Body body) {
  constexpr int kUnrolled = 3;
  const int64_t image = row / s.out_height;
  const int64_t top = row % s.out_height * s.stride - s.padding;
  const Span rows = span_on_image(top, s.kernel, s.height);
  const bool whole_rows = s.kernel == kUnrolled && rows.end - rows.begin == kUnrolled;
  for (int64_t column = begin; column < end; ++column) {
    const int64_t left = column * s.stride - s.padding;
    const int64_t at = (row * s.out_width + column) * s.channels;
    const int64_t corner = ((image * s.height + top) * s.width + left) * s.channels;
    if (whole_rows && left >= 0 && left + kUnrolled <= s.width)
      body(at, corner, WholeWindow<kUnrolled>{});
    else
      body(at, corner, Window{s.kernel, rows, span_on_image(left, s.kernel, s.width)});
  }
}

template <class T>
void max_pool_forward_of(const MaxPoolForwardParams& p, int64_t begin, int64_t end) {
  const PoolShape& s = p.shape;
  const T* __restrict__ x = static_cast<const T*>(p.x);
  T* __restrict__ out = static_cast<T*>(p.out);
  // From the last row to the first: the statistics were taken before, and what they read last is
  // still in cache.
  for (int64_t row = end - 1; row >= begin; --row)
    for_windows(s, row, 0, s.out_width, [&](int64_t at, int64_t corner, auto window) {
      for_channels(s.channels, [&](int64_t c, auto part) {
        const Vec scale = load(p.scale + c, part), shift = load(p.shift + c, part);
        Vec largest = broadcast(-INFINITY);
        Bytes position = broadcast_byte(kNoPosition);
        // As in torch, the first of equal values counts and the last of several NaN.
        for_taps(s, window, [&](uint8_t tap, int64_t offset) {
          const Vec z = fma(load(x + corner + offset + c, part), scale, shift);
          const Lanes larger = exceeds(z, largest);
          largest = select(larger, z, largest);
          position = select(larger, broadcast_byte(tap), position);
        });
        store(out + at + c, relu(largest), part);
        position = select(passes_relu(largest), position, broadcast_byte(kNoPosition));
        store_bytes(p.index + at + c, position, part);
      });
    });
}

template <class T>
void max_pool_backward_sums_of(const MaxPoolBackwardParams& p, int64_t begin, int64_t end,
                               float* __restrict__ scratch, double* __restrict__ sums) {
  const PoolShape& s = p.shape;
  const T* __restrict__ x = static_cast<const T*>(p.x);
  const T* __restrict__ grad = static_cast<const T*>(p.grad);
  float* __restrict__ sum_g = scratch;
  float* __restrict__ sum_gx = scratch + s.channels;
  std::fill(scratch, scratch + 2 * s.channels, 0.0f);
  std::fill(sums, sums + 2 * s.channels, 0.0);
  for (int64_t row = begin; row < end; ++row)
    for (int64_t tile = 0; tile < s.out_width; tile += kTileRows) {
      const int64_t tile_end = std::min(s.out_width, tile + kTileRows);
      for_windows(s, row, tile, tile_end, [&](int64_t at, int64_t corner, auto window) {
        for_channels(s.channels, [&](int64_t c, auto part) {
          const Bytes position = load_bytes(p.index + at + c, part);
          const Lanes nowhere = equal(position, broadcast_byte(kNoPosition));
          const Vec g = select(nowhere, broadcast(0.0f), load(grad + at + c, part));
          const Vec mean = load(p.mean + c, part);
          Vec value = mean;
          for_taps(s, window, [&](uint8_t tap, int64_t offset) {
            value = select(equal(position, broadcast_byte(tap)),
                           load(x + corner + offset + c, part), value);
          });
          store(sum_g + c, load(sum_g + c, part) + g, part);
          store(sum_gx + c, fma(g, value - mean, load(sum_gx + c, part)), part);
        });
      });
      for (int64_t i = 0; i < 2 * s.channels; ++i) {
        sums[i] += scratch[i];
        scratch[i] = 0.0f;
      }
    }
}

// The rows or columns of windows that cover row or column `pixel`, moved on from those of the one
// before.
struct Cover {
  int64_t begin = 0, end = 0;

  void move_to(int64_t pixel, const PoolShape& s, int64_t out_size) {
    while (begin < out_size && begin * s.stride - s.padding + s.kernel <= pixel) ++begin;
    while (end < out_size && end * s.stride - s.padding <= pixel) ++end;
  }
};

template <int n>
struct Count {
  constexpr operator int() const { return n; }
};

template <class T>
void max_pool_backward_of(const MaxPoolBackwardParams& p, const BnCoefficients& k, int64_t begin,
                          int64_t end) {
  const PoolShape& s = p.shape;
  const T* __restrict__ x = static_cast<const T*>(p.x);
  const T* __restrict__ grad = static_cast<const T*>(p.grad);
  T* __restrict__ dx = static_cast<T*>(p.dx);
  struct {
    int64_t at;  // of the window's pooled values
    uint8_t position;
  } windows[kMaxPoolKernel * kMaxPoolKernel];
  const int64_t ahead = rows_ahead(s.channels * sizeof(T)) * s.channels;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / s.height, i = row % s.height;
    Cover rows, columns;
    rows.move_to(i, s, s.out_height);
    for (int64_t j = 0; j < s.width; ++j) {
      columns.move_to(j, s, s.out_width);
      int count = 0;
      for (int64_t r = rows.begin; r < rows.end; ++r)
        for (int64_t q = columns.begin; q < columns.end; ++q) {
          const int64_t at = ((image * s.out_height + r) * s.out_width + q) * s.channels;
          const int64_t down = i - (r * s.stride - s.padding);
          const int64_t right = j - (q * s.stride - s.padding);
          windows[count++] = {at, static_cast<uint8_t>(down * s.kernel + right)};
        }
      const int64_t pixel = (row * s.width + j) * s.channels;
      const auto write = [&](auto number) {
        const auto write_block = [&](int64_t first, auto vectors, auto part) {
          constexpr int kVecs = vectors;
          prefetch_values(x + pixel + first + ahead, kVecs * kWidth);
          Vec values[kVecs];
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v) {
            const int64_t c = first + v * kWidth;
            Vec g = broadcast(0.0f);
            for (int w = 0; w < number; ++w) {
              const Bytes position = load_bytes(p.index + windows[w].at + c, part);
              const Lanes here = equal(position, broadcast_byte(windows[w].position));
              g = g + keep(here, load(grad + windows[w].at + c, part));
            }
            const InputGradientVec gradient(p.mean, k, c, part);
            values[v] = gradient(g, load(x + pixel + c, part));
          }
          store_values(dx + pixel + first, values, part, p.past_caches);
        };
        for (int64_t first = 0; first < s.channels; first += kChannelBlock)
          for_block_vectors(s.channels, first, write_block);
      };
      switch (count) {  // those of a 3x3 window of stride 2 are unrolled
        case 1:
          write(Count<1>{});
          break;
        case 2:
          write(Count<2>{});
          break;
        case 4:
          write(Count<4>{});
          break;
        default:
          write(count);
      }
    }
  }
  finish_streams();
}

void max_pool_forward(const MaxPoolForwardParams& p, int64_t begin, int64_t end) {
  for_dtype(p.dtype, [&](auto zero) { max_pool_forward_of<decltype(zero)>(p, begin, end); });
}

void max_pool_backward_sums(const MaxPoolBackwardParams& p, int64_t begin, int64_t end,
                            float* scratch, double* sums) {
  for_dtype(p.dtype, [&](auto zero) {
    max_pool_backward_sums_of<decltype(zero)>(p, begin, end, scratch, sums);
  });
}

void max_pool_backward(const MaxPoolBackwardParams& p, const BnCoefficients& k, int64_t begin,
                       int64_t end) {
  for_dtype(p.dtype, [&](auto zero) { max_pool_backward_of<decltype(zero)>(p, k, begin, end); });
}
