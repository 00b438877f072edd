// SPDX-License-Identifier: Apache-2.0
// One image from bytes to normalised values: resize, turn, colour, scale and shift.
// Included once per ISA level, after bn_act-inl.h and pixel-inl.h, inside that level's namespace
// and target.
//
// The resize is one routine called twice: it makes rows of rows and stores them as columns, so that
// two calls have resized both ways and the crop is upright again. Then each row of the output walks
// along a straight line through the pixels. Where it enters and leaves them is known beforehand,
// so the loops between hold no test.

template <int channels>
inline uint32_t expanded(const uint8_t* p) {
  uint32_t pixel = p[0];
  for (int i = 1; i < channels; ++i) pixel |= static_cast<uint32_t>(p[i]) << (8 * i);
  return pixel;
}

// One resized row of `size` bytes.
inline void resize_row(const uint8_t* source, int64_t stride, int64_t count, const float* weights,
                       int64_t size, uint8_t* out) {
  const Vec unit = broadcast(1.0f / (1 << kResizeBits));
  for_channels(size, [&](int64_t c, auto part) {
    Vec sum = broadcast(1 << (kResizeBits - 1));  // bytes are made by truncation
    for (int64_t i = 0; i < count; ++i)
      sum = fma(widen(load_bytes(source + i * stride + c, part)), broadcast(weights[i]), sum);
    store_bytes(out + c, truncated(sum * unit), part);
  });
}

// The rows that `lines` asks for, `width` pixels each, as columns of `out`. That has whole squares
// of kSquare pixels to spare; what is written beyond the last row and column means nothing.
template <int channels>
void resize_rows(const uint8_t* source, int64_t source_stride, int64_t width,
                 const ResizedLine* lines, int64_t count, const float* weights, uint32_t* out,
                 int64_t out_stride) {
  constexpr int64_t kPixels = 4 * kSquare;
  uint8_t bytes[kPixels * channels];
  uint32_t block[kSquare][kPixels] = {};
  for (int64_t row = 0; row < count; row += kSquare) {
    const int64_t rows = std::min(kSquare, count - row);
    for (int64_t x = 0; x < width; x += kPixels) {
      const int64_t pixels = std::min(kPixels, width - x);
      for (int64_t i = 0; i < rows; ++i) {
        const ResizedLine& line = lines[row + i];
        resize_row(source + line.first * source_stride + x * channels, source_stride, line.count,
                   weights + line.weights, pixels * channels, bytes);
        for (int64_t j = 0; j < pixels; ++j) block[i][j] = expanded<channels>(bytes + j * channels);
      }
      for (int64_t j = 0; j < pixels; j += kSquare)
        transpose(block[0] + j, kPixels, out + (x + j) * out_stride + row, out_stride);
    }
  }
}

// The first and the one behind the last x of [0, size) with low <= origin + x * step < high.
inline Range steps_within(int64_t origin, int64_t step, int64_t low, int64_t high, int64_t size) {
  if (step == 0) return low <= origin && origin < high ? Range{0, size} : Range{0, 0};
  if (step < 0) {
    step = -step;
    origin = -origin;
    std::swap(low, high);
    low = 1 - low;
    high = 1 - high;
  }
  const auto steps_to = [&](int64_t position) {
    return std::clamp<int64_t>(position <= origin ? 0 : (position - origin - 1) / step + 1, 0,
                               size);
  };
  return {steps_to(low), steps_to(high)};
}

inline Range intersection(Range a, Range b) {
  const int64_t begin = std::max(a.begin, b.begin);
  return {begin, std::max(begin, std::min(a.end, b.end))};
}

// Pixels of 32 bits.
struct View {
  const uint8_t* pixels;
  int64_t rows, columns, stride;  // stride in pixels

  const uint8_t* at(int64_t row, int64_t column) const {
    return pixels + (row * stride + column) * 4;
  }

  // Where on a walk through `row` of the output all positions have u in [0, columns - margin) and v
  // alike, each widened by `before`, in units.
  Range inside(const Walk& u, const Walk& v, int64_t row, int64_t size, int64_t before,
               int64_t margin) const {
    constexpr int64_t one = int64_t{1} << kPositionBits;
    return intersection(
        steps_within(u.origin + row * u.down, u.across, -before, (columns - margin) * one, size),
        steps_within(v.origin + row * v.down, v.across, -before, (rows - margin) * one, size));
  }
};

struct BlendWeights {
  uint32_t left, right;  // as blend takes them

  BlendWeights(int64_t position_u, int64_t position_v) {
    constexpr uint32_t one = 1 << kBlendBits;
    const uint32_t u = fraction(position_u), v = fraction(position_v);
    const uint32_t both = (u * v + one / 2) >> kBlendBits;
    left = (one - u - v + both) | (v - both) << 16;
    right = (u - both) | both << 16;
  }

 private:
  // Rounded, so that it may be the whole way to the next pixel.
  static uint32_t fraction(int64_t position) {
    return ((static_cast<uint32_t>(position) >> (kPositionBits - kBlendBits - 1)) + 1) >> 1;
  }
};

// A pixel between four of which some lie outside, where all is black.
inline Pixel blend_at_border(const View& view, int64_t u, int64_t v) {
  const int64_t column = u >> kPositionBits, row = v >> kPositionBits;
  uint8_t taps[2][8] = {};
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j)
      if (row + i >= 0 && row + i < view.rows && column + j >= 0 && column + j < view.columns)
        std::memcpy(taps[i] + 4 * j, view.at(row + i, column + j), 4);
  const BlendWeights weights(u, v);
  return blend(taps[0], taps[1], weights.left, weights.right);
}

// value(0) ... value(count - 1).
template <int channels, class T, class Value>
inline void store_pixels(T* out, int64_t count, Value value) {
  int64_t i = 0;
  // The next pixel overwrites the fourth value.
  if (channels == 3)
    for (; i < count - 1; ++i) store(out + i * channels, value(i));
  for (; i < count; ++i) store_channels<channels>(out + i * channels, value(i));
}

// Pixels [begin, end) of a walk from (u, v), all four neighbours of each being inside.
template <int channels, class T, class Finish>
inline void blend_inside(View view, int64_t u, int64_t v, const Walk& walk_u, const Walk& walk_v,
                         Range range, Finish finish, T* out) {
  constexpr int kGroup = 16;
  int64_t across_u[kGroup], across_v[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    across_u[i] = i * walk_u.across;
    across_v[i] = i * walk_v.across;
  }
  const uint32_t stride = static_cast<uint32_t>(view.stride);
  for (int64_t x = range.begin; x < range.end; x += kGroup) {
    uint32_t at[kGroup], left[kGroup], right[kGroup];
    const int64_t group_u = u + x * walk_u.across, group_v = v + x * walk_v.across;
    for (int i = 0; i < kGroup; ++i) {
      const int64_t here_u = group_u + across_u[i], here_v = group_v + across_v[i];
      at[i] = static_cast<uint32_t>(here_v >> kPositionBits) * stride +
              static_cast<uint32_t>(here_u >> kPositionBits);
      const BlendWeights weights(here_u, here_v);
      left[i] = weights.left;
      right[i] = weights.right;
    }
    store_pixels<channels>(out + x * channels, std::min<int64_t>(kGroup, range.end - x),
                           [&](int64_t i) {
                             const uint8_t* top = view.pixels + int64_t{at[i]} * 4;
                             return finish(blend(top, top + view.stride * 4, left[i], right[i]));
                           });
  }
}

template <int channels, class T, class Finish>
void turn(const WarpParams& p, const View& view, const Finish& finish) {
  const Pixel black = finish(load_pixel(std::array<float, 4>{}.data()));
  for (int64_t row = 0; row < p.out_rows; ++row) {
    T* out = static_cast<T*>(p.out) + row * p.out_columns * channels;
    const int64_t u = p.u.origin + row * p.u.down, v = p.v.origin + row * p.v.down;
    const auto store_black = [&](int64_t begin, int64_t end) {
      store_pixels<channels>(out + begin * channels, end - begin, [&](int64_t) { return black; });
    };
    Range seen;
    if (p.whole_pixels) {
      seen = view.inside(p.u, p.v, row, p.out_columns, 0, 0);
      const int64_t first = (v >> kPositionBits) * view.stride + (u >> kPositionBits);
      const int64_t step =
          (p.v.across >> kPositionBits) * view.stride + (p.u.across >> kPositionBits);
      store_pixels<channels>(out + seen.begin * channels, seen.end - seen.begin, [&](int64_t i) {
        return finish(pixel_of(view.pixels + (first + (seen.begin + i) * step) * 4));
      });
    } else {
      constexpr int64_t one = int64_t{1} << kPositionBits;
      seen = view.inside(p.u, p.v, row, p.out_columns, one - 1, 0);
      const Range whole = intersection(seen, view.inside(p.u, p.v, row, p.out_columns, 0, 1));
      const auto blend_border = [&](int64_t begin, int64_t end) {
        store_pixels<channels>(out + begin * channels, end - begin, [&](int64_t i) {
          const int64_t x = begin + i;
          return finish(blend_at_border(view, u + x * p.u.across, v + x * p.v.across));
        });
      };
      blend_border(seen.begin, whole.begin);
      blend_inside<channels>(view, u, v, p.u, p.v, whole, finish, out);
      blend_border(whole.end, seen.end);
    }
    store_black(0, seen.begin);
    store_black(seen.end, p.out_columns);
  }
}

// value * scale + shift.
struct Affine {
  Pixel scale, shift;

  // unit: what a value of one grey level is given as.
  Affine(const WarpParams& p, int channels, float unit) {
    float scales[4] = {}, shifts[4] = {};
    for (int i = 0; i < channels; ++i) {
      scales[i] = p.scale[i] / unit;
      shifts[i] = p.shift[i];
    }
    scale = load_pixel(scales);
    shift = load_pixel(shifts);
  }

  Pixel operator()(Pixel value) const { return value * scale + shift; }
};

// The same after matrix * RGB + offset, clamped.
struct ColouredAffine {
  Pixel red, green, blue, offset, zero, white;
  Affine affine;

  ColouredAffine(const WarpParams& p, int channels, float unit) : affine(p, channels, 1) {
    const auto column = [&](int j, float factor) {
      return load_pixel(std::array<float, 4>{p.colour[j] * factor, p.colour[4 + j] * factor,
                                             p.colour[8 + j] * factor, 0}
                            .data());
    };
    red = column(0, 1 / unit);
    green = column(1, 1 / unit);
    blue = column(2, 1 / unit);
    offset = column(3, 255);
    zero = load_pixel(std::array<float, 4>{}.data());
    white = load_pixel(std::array<float, 4>{255, 255, 255, 255}.data());
  }

  Pixel operator()(Pixel value) const {
    const Pixel mixed = everywhere<0>(value) * red + everywhere<1>(value) * green +
                        (everywhere<2>(value) * blue + offset);
    return affine(clamped(mixed, zero, white));
  }
};

template <class T>
void turn_as(const WarpParams& p, const View& view) {
  const float unit = p.whole_pixels ? 1 : 1 << kBlendBits;
  if (p.channels == 1)
    turn<1, T>(p, view, Affine(p, 1, unit));
  else if (p.colour)
    turn<3, T>(p, view, ColouredAffine(p, 3, unit));
  else
    turn<3, T>(p, view, Affine(p, 3, unit));
}

template <int channels>
View prepared(const WarpParams& p) {
  if (p.resized_rows) {
    // Few rows at a time both ways: what lies between stays in the nearest cache.
    for (int64_t row = 0; row < p.rows; row += kSquare) {
      const int64_t rows = std::min(kSquare, p.rows - row);
      resize_rows<channels>(p.source, p.source_stride, p.source_columns, p.resized_rows + row, rows,
                            p.weights, p.sideways, kSquare);
      resize_rows<4>(reinterpret_cast<const uint8_t*>(p.sideways), kSquare * 4, rows,
                     p.resized_columns, p.columns, p.weights, p.upright + row * p.stride, p.stride);
    }
  } else if (p.upright) {
    for (int64_t row = 0; row < p.rows; ++row)
      for (int64_t column = 0; column < p.columns; ++column)
        p.upright[row * p.stride + column] =
            expanded<channels>(p.source + row * p.source_stride + column * channels);
  } else {
    return {p.source, p.rows, p.columns, p.source_stride / 4};
  }
  return {reinterpret_cast<const uint8_t*>(p.upright), p.rows, p.columns, p.stride};
}

void warp(const WarpParams& p) {
  const View view = p.channels == 1   ? prepared<1>(p)
                    : p.channels == 3 ? prepared<3>(p)
                                      : prepared<4>(p);
  if (p.dtype == DType::float32)
    turn_as<float>(p, view);
  else
    turn_as<BFloat16>(p, view);
}
