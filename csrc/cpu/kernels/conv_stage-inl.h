// SPDX-License-Identifier: Apache-2.0
// Staging: the pixels of a block, and what comes before the convolution (batch norm and ReLU,
// forward or backward) computed on the way. tile-inl.h says what a staged line is.

// Elements and lines -------------------------------------------------------------------------

template <class T>
struct ElementOf {
  using type = Single;
};
#if defined(FASTRESNET_AMX)
template <>
struct ElementOf<BFloat16> {
  using type = TilePair;
};
#elif defined(FASTRESNET_AVX512_BF16)
template <>
struct ElementOf<BFloat16> {
  using type = Pair;
};
#endif
template <class T>
using Element = typename ElementOf<T>::type;

template <class E>
constexpr int64_t kLineChannels = kLine * E::kDepth;

template <class E>
constexpr int64_t kBlockPanels = kChannelBlock / kLineChannels<E>;

template <class E>
int64_t panels(int64_t channels) {
  return channel_blocks(channels) * kBlockPanels<E>;
}

// Staging ------------------------------------------------------------------------------------

// The staged pixels of a block: panels of lines, one line a pixel.
struct Plane {
  float* lines;
  int64_t panel_stride, panels;

  void zero(Range range, int64_t pixel, int64_t count) const {
    for (int64_t panel = range.begin; panel < range.end; ++panel)
      std::memset(lines + panel * panel_stride + pixel * kLine, 0, count * kLine * sizeof(float));
  }
};

// A line behind the last pixel, for the last pair, or as many as a product reads too far; and an
// odd number of lines, so that panels do not fall on the same sets of the cache.
template <class E>
int64_t plane_lines(const ConvPlan& plan) {
  return (plan.plane_pixels() + E::kRowStep) | 1;
}

// Where a block's staged pixels lie in memory, one after another, on whole lines.
class Layout {
 public:
  explicit Layout(float* memory) : memory_(memory) {}

  template <class E>
  Plane plane(const ConvPlan& plan, int64_t channels) {
    const int64_t stride = plane_lines<E>(plan) * kLine, count = panels<E>(channels);
    return {take(stride * count), stride, count};
  }
  float* take(int64_t floats) {
    float* begin = memory_ ? memory_ + floats_ : nullptr;
    floats_ += floats;
    return begin;
  }
  int64_t floats() const { return floats_; }

 private:
  float* memory_;
  int64_t floats_ = 0;
};

// `count` pixels from `pixel` on of some panels; the source's pixels begin at `from`, `step` apart.
// The function's arguments are copies, which no store of a line can change: they stay in registers.
template <class E, class Values>
inline void stage_run(Plane plane, Range panels, int64_t channels, int64_t pixel, int64_t count,
                      int64_t from, int64_t step, Values values) {
  const int64_t ahead = step * rows_ahead(values.pixel_bytes());
  const int64_t first = panels.begin * kLineChannels<E>, padded = panels.end * kLineChannels<E>;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t source = from + i * step;
    float* line = plane.lines + panels.begin * plane.panel_stride + (pixel + i) * kLine;
    for (int64_t c = first; c < padded; c += kLineChannels<E>, line += plane.panel_stride) {
      values.prefetch(source + ahead, c, kLineChannels<E>);
      for (int64_t within = 0; within < kLineChannels<E>; within += kWidth) {
        const int64_t at = c + within;
        if (at + kWidth <= channels)
          E::store_values(line, within, values(source, at, Full{}));
        else if (at < channels)
          E::store_values(line, within, values(source, at, Part{static_cast<int>(channels - at)}));
        else
          E::store_values(line, within, broadcast(0.0f));
      }
    }
  }
}

// Where a plane's pixels lie in memory: rows and columns of the grid that hold values, and the
// pixel of memory at (image, row, column).
struct Source {
  int64_t height, width;
  int64_t image_pitch, row_pitch, column_pitch, first;

  int64_t pixel(int64_t image, int64_t row, int64_t column) const {
    return first + image * image_pitch + row * row_pitch + column * column_pitch;
  }
};

inline Source source_of_output(const ConvPlan& plan) {
  const ConvShape& s = plan.shape;
  return {s.out_height, s.out_width, s.out_height * s.out_width, s.out_width, 1, 0};
}

inline Source source_of_phase(const ConvPlan& plan, const Phase& phase) {
  const ConvShape& s = plan.shape;
  return {phase.height,       phase.width, s.height * s.width,
          s.stride * s.width, s.stride,    phase.row * s.width + phase.column};
}

// Some panels of a block's plane of places.
template <class E, class Values>
void stage_places(const ConvPlan& plan, const ConvBlock& block, const Source& source,
                  const Plane& plane, Range panels, int64_t channels, const Values& values) {
  for (int64_t row = 0; row < plan.grid_height; ++row)
    for (int64_t column = 0; column < plan.grid_width; ++column) {
      const int64_t at = row * plan.pitch + column * plan.column_pitch;
      const bool inside = row < source.height && column < source.width;
      const int64_t images = inside ? block.images : 0;
      stage_run<E>(plane, panels, channels, at, images, source.pixel(block.image, row, column),
                   source.image_pitch, values);
      plane.zero(panels, at + images, plan.column_pitch - images);
    }
}

// Some panels of a block's plane, its halo included, zeros wherever there is no value.
template <class E, class Values>
void stage_plane(const ConvPlan& plan, const ConvBlock& block, const Source& source,
                 const Plane& plane, Range panels, int64_t channels, const Values& values) {
  if (panels.begin >= panels.end) return;
  if (plan.by_places) return stage_places<E>(plan, block, source, plane, panels, channels, values);
  plane.zero(panels, 0, plan.margin);
  for (int64_t image = 0; image < block.images; ++image) {
    // One column without padding: all rows are one run.
    if (plan.pitch == 1 && plan.halo == 0) {
      const int64_t rows = std::clamp<int64_t>(source.height - block.row, 0, block.rows);
      const int64_t at = plan.at(image, 0, block);
      stage_run<E>(plane, panels, channels, at, rows,
                   source.pixel(block.image + image, block.row, 0), source.row_pitch, values);
      plane.zero(panels, at + rows, block.rows - rows);
      continue;
    }
    for (int64_t row = image == 0 ? -plan.halo : 0; row < block.rows + plan.halo; ++row) {
      const int64_t at = plan.at(image, row, block), grid_row = block.row + row;
      const bool inside = grid_row >= 0 && grid_row < source.height;
      const int64_t width = inside ? source.width : 0;
      stage_run<E>(plane, panels, channels, at, width,
                   source.pixel(block.image + image, grid_row, 0), source.column_pitch, values);
      plane.zero(panels, at + width, plan.pitch - width);
    }
  }
  plane.zero(panels, plan.at(block.images, 0, block), plan.margin + 1);
}

// What is staged: a function from a pixel of memory and some of its channels to a Vec.
//
// x, or relu(scale * x + shift).
template <class T>
struct InputValues {
  const T* x;
  int64_t channels;
  const float *scale, *shift;

  template <class P>
  Vec operator()(int64_t pixel, int64_t c, P part) const {
    const Vec value = load(x + pixel * channels + c, part);
    return scale ? relu(fma(value, load(scale + c, part), load(shift + c, part))) : value;
  }
  int64_t pixel_bytes() const { return channels * int64_t{sizeof(T)}; }
  __attribute__((always_inline)) void prefetch(int64_t pixel, int64_t c, int64_t count) const {
    prefetch_values(x + pixel * channels + c, count);
  }
};

// The gradient of y, behind the batch norm: see InputGradientVec.
template <class T>
struct OutputGradients {
  const T *grad, *y;
  const uint8_t* mask;  // null: the gradient counts everywhere
  int64_t channels;
  const float* mean;
  BnCoefficients coefficients;

  explicit OutputGradients(const ConvBackwardParams& p)
      : grad(static_cast<const T*>(p.grad)),
        y(static_cast<const T*>(p.y)),
        mask(p.grad_mask),
        channels(p.plan->shape.out_channels),
        mean(p.mean),
        coefficients(p.coefficients) {}

  template <class P>
  Vec operator()(int64_t pixel, int64_t c, P part) const {
    Vec g = load(grad + pixel * channels + c, part);
    if (mask) g = keep(load_lanes(mask + pixel * mask_bytes(channels) + c / 8, part), g);
    return InputGradientVec(mean, coefficients, c, part)(g, load(y + pixel * channels + c, part));
  }
  int64_t pixel_bytes() const { return channels * int64_t{sizeof(T)}; }
  __attribute__((always_inline)) void prefetch(int64_t pixel, int64_t c, int64_t count) const {
    prefetch_values(grad + pixel * channels + c, count);
    prefetch_values(y + pixel * channels + c, count);
  }
};
