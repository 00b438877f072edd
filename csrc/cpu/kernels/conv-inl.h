// SPDX-License-Identifier: Apache-2.0
// Convolution in one pass: what comes before (batch norm and ReLU, forward or backward) is computed
// as a block of pixels is staged, what comes after (statistics, mask, sums) as a tile of the
// result is stored. conv_plan.h says how a convolution is cut into blocks, phases and taps,
// tile-inl.h what a staged line is and how lines are multiplied.

// Rows of a product that are computed, then stored, at a time: 32 columns of floats in L1. A
// multiple of the rows that the registers hold.
#if defined(FASTRESNET_AMX)
constexpr int kStoreRows = 64;
#else
constexpr int kStoreRows = kManyRegisters ? 56 : 48;
#endif

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
int64_t panels(int64_t channels) {
  return channel_blocks(channels) * kChannelBlock / kLineChannels<E>;
}

// Staging ------------------------------------------------------------------------------------

// The staged pixels of a block: panels of lines, one line a pixel.
struct Plane {
  float* lines;
  int64_t panel_stride, panels;

  void zero(int64_t pixel, int64_t count) const {
    for (int64_t panel = 0; panel < panels; ++panel)
      std::memset(lines + panel * panel_stride + pixel * kLine, 0, count * kLine * sizeof(float));
  }
};

// A line behind the last pixel, for the last pair, or as many as a product reads too far; and an
// odd number of lines, so that panels do not fall on the same sets of the cache.
template <class E>
int64_t plane_lines(const ConvPlan& plan) {
  return (plan.plane_pixels() + E::kRowStep) | 1;
}

// Scratch that the taps' distances take: whole lines, so that the planes behind them are aligned.
inline int64_t distance_floats(const ConvPlan& plan) {
  const int64_t floats = static_cast<int64_t>(plan.taps.size() * sizeof(int64_t) / sizeof(float));
  return (floats + kLine - 1) / kLine * kLine;
}

template <class E>
Plane make_plane(const ConvPlan& plan, int64_t channels, float*& scratch) {
  const Plane plane{scratch, plane_lines<E>(plan) * kLine, panels<E>(channels)};
  scratch += plane.panels * plane.panel_stride;
  return plane;
}

// `count` pixels from `pixel` on of what make(c, part) makes: given the channels, a function from
// a source pixel to a Vec. Source pixels begin at `from`, `step` apart.
template <class E, class Make>
inline void stage_run(const Plane& plane, int64_t channels, int64_t pixel, int64_t count,
                      int64_t from, int64_t step, const Make& make) {
  constexpr int64_t kPixels = 8;  // for which coefficients stay in registers
  const int64_t padded = plane.panels * kLineChannels<E>;
  for (int64_t begin = 0; begin < count; begin += kPixels) {
    const int64_t end = std::min(count, begin + kPixels);
    for (int64_t c = 0; c < padded; c += kWidth) {
      float* line = plane.lines + c / kLineChannels<E> * plane.panel_stride + pixel * kLine;
      const int64_t within = c % kLineChannels<E>;
      const auto stage = [&](auto part) {
        const auto value = make(c, part);
        for (int64_t i = begin; i < end; ++i)
          E::store_values(line + i * kLine, within, value(from + i * step));
      };
      if (c + kWidth <= channels)
        stage(Full{});
      else if (c < channels)
        stage(Part{static_cast<int>(channels - c)});
      else
        for (int64_t i = begin; i < end; ++i)
          E::store_values(line + i * kLine, within, broadcast(0.0f));
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

// The whole plane of a block, its halo included, zeros wherever there is no value.
template <class E, class Make>
void stage_plane(const ConvPlan& plan, const ConvBlock& block, const Source& source,
                 const Plane& plane, int64_t channels, const Make& make) {
  plane.zero(0, plan.margin);
  for (int64_t image = 0; image < block.images; ++image) {
    // One column without padding: all rows are one run.
    if (plan.pitch == 1 && plan.halo == 0) {
      const int64_t rows = std::clamp<int64_t>(source.height - block.row, 0, block.rows);
      const int64_t at = plan.at(image, 0, block);
      stage_run<E>(plane, channels, at, rows, source.pixel(block.image + image, block.row, 0),
                   source.row_pitch, make);
      plane.zero(at + rows, block.rows - rows);
      continue;
    }
    for (int64_t row = image == 0 ? -plan.halo : 0; row < block.rows + plan.halo; ++row) {
      const int64_t at = plan.at(image, row, block), grid_row = block.row + row;
      const bool inside = grid_row >= 0 && grid_row < source.height;
      const int64_t width = inside ? source.width : 0;
      stage_run<E>(plane, channels, at, width, source.pixel(block.image + image, grid_row, 0),
                   source.column_pitch, make);
      plane.zero(at + width, plan.pitch - width);
    }
  }
  plane.zero(plan.at(block.images, 0, block), plan.margin + 1);
}

// x, or relu(scale * x + shift).
template <class T>
auto input_values(const T* x, int64_t channels, const float* scale, const float* shift) {
  return [=](int64_t c, auto part) {
    const bool normalised = scale != nullptr;
    const Vec a = normalised ? load(scale + c, part) : broadcast(1.0f);
    const Vec b = normalised ? load(shift + c, part) : broadcast(0.0f);
    return [=](int64_t pixel) {
      const Vec value = load(x + pixel * channels + c, part);
      return normalised ? relu(fma(value, a, b)) : value;
    };
  };
}

// The gradient of y, behind the batch norm: see InputGradientVec.
template <class T>
auto output_gradients(const ConvBackwardParams& p) {
  const int64_t channels = p.plan->shape.out_channels;
  const T* grad = static_cast<const T*>(p.grad);
  const T* y = static_cast<const T*>(p.y);
  return [=, &p](int64_t c, auto part) {
    const InputGradientVec gradient(p.mean, p.coefficients, c, part);
    return [=, &p](int64_t pixel) {
      Vec g = load(grad + pixel * channels + c, part);
      if (p.grad_mask)
        g = keep(load_lanes(p.grad_mask + pixel * mask_bytes(channels) + c / 8, part), g);
      return gradient(g, load(y + pixel * channels + c, part));
    };
  };
}

// Storing ------------------------------------------------------------------------------------

// Rows [begin, begin + count) of a product, which lie at `place` of the plane (counted from the
// image's first pixel of the block), and the pixels of memory where they belong.
struct Run {
  int64_t begin, count, place, pixel, step;
};

struct Runs {
  Run run[kStoreRows];
  int count = 0;
  // The product covers the places between the runs too: [run[0].place, + rows) in one piece.
  bool joined = false;
  int64_t rows = 0;

  void add(int64_t place, int64_t length, int64_t pixel, int64_t step) {
    const int64_t begin = joined && count ? place - run[0].place : rows;
    run[count++] = {begin, length, place, pixel, step};
    rows = begin + length;
  }
};

// Calls body(runs) over the block's values of one image, at most kStoreRows at a time. A run is a
// row of the image, or several where they follow each other in the plane and in memory; rows of few
// pixels are multiplied together with the padding between them.
template <class E, class Body>
inline void for_tiles(const ConvPlan& plan, const ConvBlock& block, const Source& source,
                      int64_t image, Body body) {
  const int64_t height = std::min(block.rows, source.height - block.row);
  const int64_t first_image = block.image + image, step = source.column_pitch;
  if (source.width == plan.pitch && source.row_pitch == plan.pitch * step) {
    const int64_t total = height * plan.pitch, pixel = source.pixel(first_image, block.row, 0);
    for (int64_t place = 0; place < total; place += kStoreRows) {
      Runs runs;
      runs.add(place, std::min<int64_t>(kStoreRows, total - place), pixel + place * step, step);
      body(runs);
    }
    return;
  }
  if (source.width < E::kJoinedWidth) {
    const int64_t total = (height - 1) * plan.pitch + source.width;
    for (int64_t place = 0; place < total; place += kStoreRows) {
      Runs runs;
      runs.joined = true;
      for (int64_t row = place / plan.pitch; row * plan.pitch < place + kStoreRows; ++row) {
        if (row == height) break;
        const int64_t begin = std::max<int64_t>(0, place - row * plan.pitch);
        const int64_t end = std::min(source.width, place + kStoreRows - row * plan.pitch);
        if (begin < end)
          runs.add(row * plan.pitch + begin, end - begin,
                   source.pixel(first_image, block.row + row, begin), step);
      }
      if (runs.count) body(runs);
    }
    return;
  }
  const int64_t together = std::max<int64_t>(1, kStoreRows / source.width);
  const int64_t pieces = (source.width + kStoreRows - 1) / kStoreRows;
  for (int64_t row = 0; row < height; row += together)
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t begin = source.width * piece / pieces;
      const int64_t end = source.width * (piece + 1) / pieces;
      Runs runs;
      for (int64_t r = row; r < std::min(height, row + together); ++r)
        runs.add(r * plan.pitch + begin, end - begin,
                 source.pixel(first_image, block.row + r, begin), step);
      body(runs);
    }
}

// The runs' rows of a product, `at` being the plane's line of place 0.
template <class E>
inline void multiply_runs(const Runs& runs, Pixels a, const float* at, const float* b,
                          float* tile) {
  if (runs.joined) {
    a.first = at + runs.run[0].place * kLine;
    multiply<E>(a, b, tile, runs.rows);
    return;
  }
  for (int i = 0; i < runs.count; ++i) {
    a.first = at + runs.run[i].place * kLine;
    multiply<E>(a, b, tile + runs.run[i].begin * kChannelBlock, runs.run[i].count);
  }
}

// Calls body(c, Full or Part) over the channels of one block.
template <class Body>
inline void for_block_channels(int64_t channels, int64_t first, Body body) {
  for (int64_t c = first; c < std::min(channels, first + kChannelBlock); c += kWidth) {
    if (c + kWidth <= channels)
      body(c, Full{});
    else
      body(c, Part{static_cast<int>(channels - c)});
  }
}

template <class P>
inline void add_to(double* sums, Vec value, P part) {
  float lanes[kWidth];
  store(lanes, value, Full{});
  int count = kWidth;
  if constexpr (std::is_same_v<P, Part>) count = part.count;
  for (int i = 0; i < count; ++i) sums[i] += lanes[i];
}

// y, and the sums of its values (as stored) about `shift`, which is set from the first tile.
template <class T>
struct OutputStore {
  T* y;
  int64_t channels;
  float* shift;
  double *sum, *square;

  void operator()(const float* tile, const Runs& runs, int64_t first, bool set_shift) const {
    for_block_channels(channels, first, [&](int64_t c, auto part) {
      const float* column = tile + c - first;
      if (set_shift) {
        Vec total = broadcast(0.0f);
        int64_t count = 0;
        for (int i = 0; i < runs.count; ++i) {
          const Run& run = runs.run[i];
          for (int64_t r = 0; r < run.count; ++r)
            total = total + load(column + (run.begin + r) * kChannelBlock, Full{});
          count += run.count;
        }
        store(shift + c, total * broadcast(1.0f / std::max<int64_t>(count, 1)), part);
      }
      const Vec centre = load(shift + c, part);
      Vec s = broadcast(0.0f), q = s;
      for (int i = 0; i < runs.count; ++i) {
        const Run& run = runs.run[i];
        for (int64_t r = 0; r < run.count; ++r) {
          T* out = y + (run.pixel + r * run.step) * channels + c;
          store(out, load(column + (run.begin + r) * kChannelBlock, Full{}), part);
          const Vec d = load(out, part) - centre;
          s = s + d;
          q = fma(d, d, q);
        }
      }
      add_to(sum + c, s, part);
      add_to(square + c, q, part);
    });
  }
};

// dx, with what the layer in front wants of it.
template <class T>
struct InputGradientStore {
  const ConvBackwardParams& p;
  double *sum_g, *sum_gx;

  void operator()(const float* tile, const Runs& runs, int64_t first) const {
    if (p.scale)
      store_tile<true, false>(tile, runs, first);
    else if (p.addend)
      store_tile<false, true>(tile, runs, first);
    else
      store_tile<false, false>(tile, runs, first);
  }

 private:
  template <bool normalised, bool added>
  void store_tile(const float* tile, const Runs& runs, int64_t first) const {
    const int64_t channels = p.plan->shape.channels;
    const T* x = static_cast<const T*>(p.x);
    const T* addend = static_cast<const T*>(p.addend);
    T* dx = static_cast<T*>(p.dx);
    for_block_channels(channels, first, [&](int64_t c, auto part) {
      Vec scale = broadcast(0.0f), shift = scale, mean = scale, s = scale, q = scale;
      if constexpr (normalised) {
        scale = load(p.scale + c, part);
        shift = load(p.shift + c, part);
        mean = load(p.x_mean + c, part);
      }
      for (int i = 0; i < runs.count; ++i) {
        const Run& run = runs.run[i];
        for (int64_t r = 0; r < run.count; ++r) {
          const int64_t pixel = run.pixel + r * run.step, at = pixel * channels + c;
          Vec g = load(tile + (run.begin + r) * kChannelBlock + c - first, Full{});
          if constexpr (added) {
            Vec other = load(addend + at, part);
            if (p.addend_mask)
              other = keep(load_lanes(p.addend_mask + pixel * mask_bytes(channels) + c / 8, part),
                           other);
            g = g + other;
          }
          if constexpr (normalised) {
            const Vec value = load(x + at, part);
            g = keep(passes_relu(fma(value, scale, shift)), g);
            store(dx + at, g, part);
            g = load(dx + at, part);
            s = s + g;
            q = fma(g, value - mean, q);
          } else {
            store(dx + at, g, part);
          }
        }
      }
      if constexpr (normalised) {
        add_to(sum_g + c, s, part);
        add_to(sum_gx + c, q, part);
      }
    });
  }
};

// Forward ------------------------------------------------------------------------------------

template <class E>
int64_t conv_forward_scratch_of(const ConvPlan& plan) {
  const int64_t phases = static_cast<int64_t>(plan.phases.size());
  return phases * panels<E>(plan.shape.channels) * plane_lines<E>(plan) * kLine +
         kStoreRows * kChannelBlock + plan.shape.out_channels + distance_floats(plan);
}

template <class T>
void conv_forward_of(const ConvForwardParams& p, int64_t begin, int64_t end, float* scratch,
                     double* mean, double* m2) {
  using E = Element<T>;
  [[maybe_unused]] const typename E::Registers registers;
  const ConvPlan& plan = *p.plan;
  const ConvShape& s = plan.shape;
  const int64_t phases = static_cast<int64_t>(plan.phases.size());
  const int64_t taps = static_cast<int64_t>(plan.taps.size());
  const int64_t chunks = panels<E>(s.channels);
  int64_t* distances = reinterpret_cast<int64_t*>(scratch);
  scratch += distance_floats(plan);
  float* tile = scratch;
  scratch += kStoreRows * kChannelBlock;
  Plane planes[kMaxPhases];
  for (int64_t i = 0; i < phases; ++i)
    if (plan.phases[i].taps) planes[i] = make_plane<E>(plan, s.channels, scratch);
  for (int64_t i = 0; i < taps; ++i)
    distances[i] = planes[plan.taps[i].phase].lines - planes[plan.taps[0].phase].lines +
                   plan.distance(plan.taps[i]) * kLine;
  float* shift = scratch;

  std::fill(mean, mean + s.out_channels, 0.0);
  std::fill(m2, m2 + s.out_channels, 0.0);
  const OutputStore<T> store_output{static_cast<T*>(p.y), s.out_channels, shift, mean, m2};
  const auto values = input_values(static_cast<const T*>(p.x), s.channels, p.scale, p.shift);
  const Source output = source_of_output(plan);
  const int64_t weight_block = taps * chunks * kLine * kChannelBlock;
  int64_t count = 0;
  for (int64_t index = begin; index < end; ++index) {
    const ConvBlock block = plan.block(index);
    if (plan.outputs(block) == 0) continue;
    for (int64_t i = 0; i < phases; ++i)
      if (plan.phases[i].taps)
        stage_plane<E>(plan, block, source_of_phase(plan, plan.phases[i]), planes[i], s.channels,
                       values);
    for (int64_t n = 0; n < channel_blocks(s.out_channels); ++n) {
      bool set_shift = count == 0;
      for (int64_t image = 0; image < block.images; ++image)
        for_tiles<E>(plan, block, output, image, [&](const Runs& runs) {
          const Plane& plane = planes[plan.taps[0].phase];
          multiply_runs<E>(runs, {nullptr, plane.panel_stride, distances, taps, chunks},
                           plane.lines + plan.at(image, 0, block) * kLine,
                           p.weight + n * weight_block, tile);
          store_output(tile, runs, n * kChannelBlock, set_shift);
          set_shift = false;
        });
    }
    count += plan.outputs(block);
  }
  for (int64_t c = 0; c < s.out_channels && count > 0; ++c) {
    const double offset = mean[c] / count;
    m2[c] = std::max(0.0, m2[c] - offset * mean[c]);
    mean[c] = shift[c] + offset;
  }
}

// Backward -----------------------------------------------------------------------------------

// Lines of a panel of `count` pixels in pairs: those that an outer product reads behind the last
// one, and an odd number of them.
template <class E>
int64_t pair_lines(int64_t count) {
  return ((count + 1) / 2 + 2 * E::kOuterStep) | 1;
}

// The lines of a plane as the outer product takes them: with one value an element, the plane
// itself; with two, its pixels in pairs from `from` on, zeros from `count` pixels on.
template <class E>
inline Lines outer_lines(const Plane& plane, int64_t from, int64_t count, float*& scratch) {
  if constexpr (E::kDepth == 1) {
    return {plane.lines + from * kLine, plane.panel_stride};
  } else {
    const int64_t pairs = (count + 1) / 2, stride = pair_lines<E>(count) * kLine;
    const Lines lines{scratch, stride};
    alignas(64) static const float none[kLine] = {};
    for (int64_t panel = 0; panel < plane.panels; ++panel, scratch += 2 * stride) {
      const float* pixel = plane.lines + panel * plane.panel_stride + from * kLine;
      for (int64_t i = 0; i < pairs; ++i)
        E::pair_pixels(pixel + 2 * i * kLine,
                       2 * i + 1 < count ? pixel + (2 * i + 1) * kLine : none, scratch + i * kLine,
                       scratch + stride + i * kLine);
      for (float* half : {scratch, scratch + stride})
        std::fill(half + pairs * kLine, half + stride, 0.0f);
    }
    return lines;
  }
}

// The same for the left operand.
template <class E>
inline Lines left_outer_lines(const Plane& plane, int64_t from, int64_t count, float*& scratch) {
  float* begin = scratch;
  const Lines lines = outer_lines<E>(plane, from, count, scratch);
  if constexpr (E::kOuterStep > 1)
    for (; begin != scratch; begin += lines.panel_stride)
      for (int64_t i = 0; 2 * i < count; i += E::kOuterStep) E::arrange_left(begin + i * kLine);
  return lines;
}

template <class E>
int64_t conv_backward_scratch_of(const ConvPlan& plan) {
  const int64_t phases = static_cast<int64_t>(plan.phases.size());
  const int64_t in = panels<E>(plan.shape.channels), out = panels<E>(plan.shape.out_channels);
  const int64_t pairs = E::kDepth == 1 ? 0 : 2 * pair_lines<E>(plane_lines<E>(plan));
  return (phases * in + out) * plane_lines<E>(plan) * kLine +
         (2 * phases * in + out) * pairs * kLine + kStoreRows * kChannelBlock +
         distance_floats(plan);
}

template <class T>
void conv_backward_of(const ConvBackwardParams& p, int64_t begin, int64_t end, float* scratch,
                      float* dweight, double* sums) {
  using E = Element<T>;
  [[maybe_unused]] const typename E::Registers registers;
  const ConvPlan& plan = *p.plan;
  const ConvShape& s = plan.shape;
  const int64_t phases = static_cast<int64_t>(plan.phases.size());
  const int64_t taps = static_cast<int64_t>(plan.taps.size());
  const int64_t in_blocks = channel_blocks(s.channels), out_blocks = channel_blocks(s.out_channels);
  const int64_t chunks = panels<E>(s.out_channels);
  int64_t* distances = reinterpret_cast<int64_t*>(scratch);
  scratch += distance_floats(plan);
  float* tile = scratch;
  scratch += kStoreRows * kChannelBlock;
  const Plane gradients = make_plane<E>(plan, s.out_channels, scratch);
  Plane planes[kMaxPhases];
  for (int64_t i = 0; i < phases; ++i)
    if (plan.phases[i].taps) planes[i] = make_plane<E>(plan, s.channels, scratch);
  for (int64_t i = 0; i < taps; ++i) distances[i] = -plan.distance(plan.taps[i]) * kLine;

  const auto values = input_values(static_cast<const T*>(p.x), s.channels, p.scale, p.shift);
  const auto output_gradient = output_gradients<T>(p);
  const InputGradientStore<T> store_gradient{p, sums, sums + s.channels};
  const int64_t tap_block = chunks * kLine * kChannelBlock;
  for (int64_t index = begin; index < end; ++index) {
    const ConvBlock block = plan.block(index);
    stage_plane<E>(plan, block, source_of_output(plan), gradients, s.out_channels, output_gradient);
    for (int64_t i = 0; i < phases; ++i)
      if (plan.phases[i].taps)
        stage_plane<E>(plan, block, source_of_phase(plan, plan.phases[i]), planes[i], s.channels,
                       values);

    // The gradient of x: for each phase, the taps that read it, in the opposite direction.
    for (int64_t i = 0; p.dx && i < phases; ++i) {
      const Phase& phase = plan.phases[i];
      const Source input = source_of_phase(plan, phase);
      for (int64_t c = 0; c < in_blocks; ++c) {
        const float* weight = p.weight + (c * taps + phase.first_tap) * tap_block;
        for (int64_t image = 0; image < block.images; ++image)
          for_tiles<E>(plan, block, input, image, [&](const Runs& runs) {
            multiply_runs<E>(
                runs,
                {nullptr, gradients.panel_stride, distances + phase.first_tap, phase.taps, chunks},
                gradients.lines + plan.at(image, 0, block) * kLine, weight, tile);
            store_gradient(tile, runs, c * kChannelBlock);
          });
      }
    }

    // The gradient of the weight: y's gradient times x at the tap's distance, over all pixels.
    float* free = scratch;
    const int64_t from = plan.at(0, 0, block), span = plan.span(block);
    const int64_t pixels = plan.at(block.images, 0, block) + plan.margin + 1;
    const int64_t steps = (span + E::kDepth - 1) / E::kDepth;
    const Lines left = left_outer_lines<E>(gradients, from, span, free);
    for (int64_t i = 0; i < phases; ++i) {
      const Phase& phase = plan.phases[i];
      if (phase.taps == 0) continue;
      float* lines_scratch = free;
      Lines right[E::kDepth];
      for (int64_t odd = 0; odd < E::kDepth; ++odd)
        right[odd] = outer_lines<E>(planes[i], odd, pixels - odd, lines_scratch);
      for (int64_t n = 0; n < out_blocks; ++n)
        for (int64_t c = 0; c < in_blocks; ++c)
          for (int64_t t = phase.first_tap; t < phase.first_tap + phase.taps; ++t) {
            const int64_t at = from + plan.distance(plan.taps[t]);
            Lines shifted = right[at % E::kDepth];
            shifted.first += 2 * c * shifted.panel_stride + at / E::kDepth * kLine;
            outer_product<E>(
                {left.first + 2 * n * left.panel_stride, left.panel_stride}, shifted, steps,
                dweight + ((n * in_blocks + c) * taps + t) * kChannelBlock * kChannelBlock);
          }
    }
  }
}

// Weights ------------------------------------------------------------------------------------

// 32 values of the weight along `along` (0: output channels, 1: input channels), zeros beyond.
template <class W>
inline void load_weights(const ConvWeight& weight, int64_t n, int64_t c, int64_t tap_offset,
                         int64_t along, int64_t limit, float* values) {
  const int64_t at = along ? c : n;
  const int64_t count = std::clamp<int64_t>(limit - at, 0, kChannelBlock);
  const int64_t stride = weight.strides[along];
  const W* from = static_cast<const W*>(weight.data) + n * weight.strides[0] +
                  c * weight.strides[1] + tap_offset;
  if (stride == 1 && count == kChannelBlock) {
    for (int64_t i = 0; i < kChannelBlock; i += kWidth)
      store(values + i, load(from + i, Full{}), Full{});
    return;
  }
  for (int64_t i = 0; i < kChannelBlock; ++i)
    values[i] = i < count ? static_cast<float>(from[i * stride]) : 0.0f;
}

template <class E, class W>
void conv_pack_of(const ConvWeight& weight, const ConvPlan& plan, bool transposed, int64_t block,
                  float* packed) {
  const ConvShape& s = plan.shape;
  const int64_t depth = transposed ? s.out_channels : s.channels;
  const int64_t first = block * kChannelBlock;
  for (const Tap* tap = plan.taps.data(); tap != plan.taps.data() + plan.taps.size(); ++tap) {
    const int64_t offset = tap->weight / s.kernel_width * weight.strides[2] +
                           tap->weight % s.kernel_width * weight.strides[3];
    for (int64_t chunk = 0; chunk < panels<E>(depth); ++chunk, packed += kLine * kChannelBlock) {
      const int64_t from = chunk * kLineChannels<E>;
      float values[2][kChannelBlock] = {};
      if (transposed) {
        for (int64_t k = 0; k < kLine; ++k) {
          for (int64_t i = 0; i < E::kDepth; ++i) {
            const int64_t n = from + k * E::kDepth + i;
            if (n < s.out_channels)
              load_weights<W>(weight, n, first, offset, 1, s.channels, values[i]);
            else
              std::fill(values[i], values[i] + kChannelBlock, 0.0f);
          }
          for (int64_t i = 0; i < kChannelBlock; i += kWidth)
            store(packed + k * kChannelBlock + i,
                  E::element(load(values[0] + i, Full{}), load(values[1] + i, Full{})), Full{});
        }
        continue;
      }
      for (int64_t half = 0; half < kChannelBlock; half += kLine) {
        alignas(64) float lines[kLine * kLine] = {};
        for (int64_t i = 0; i < kLine && first + half + i < s.out_channels; ++i) {
          load_weights<W>(weight, first + half + i, from, offset, 1, s.channels, values[0]);
          for (int64_t c = 0; c < kLineChannels<E>; c += kWidth)
            E::store_values(lines + i * kLine, c, load(values[0] + c, Full{}));
        }
        transpose(lines, kLine, packed + half, kChannelBlock);
      }
    }
  }
}

// From run-time dtypes to the instances --------------------------------------------------------

int64_t conv_line_channels(DType dtype) {
  int64_t channels = 0;
  for_dtype(dtype, [&](auto zero) { channels = kLineChannels<Element<decltype(zero)>>; });
  return channels;
}

void conv_pack(const ConvWeight& weight, const ConvPlan& plan, DType dtype, bool transposed,
               int64_t column_block, float* packed) {
  for_dtype(dtype, [&](auto zero) {
    for_dtype(weight.dtype, [&](auto weight_zero) {
      conv_pack_of<Element<decltype(zero)>, decltype(weight_zero)>(weight, plan, transposed,
                                                                   column_block, packed);
    });
  });
}

int64_t conv_forward_scratch(const ConvPlan& plan, DType dtype) {
  int64_t floats = 0;
  for_dtype(dtype,
            [&](auto zero) { floats = conv_forward_scratch_of<Element<decltype(zero)>>(plan); });
  return floats;
}

int64_t conv_backward_scratch(const ConvPlan& plan, DType dtype) {
  int64_t floats = 0;
  for_dtype(dtype,
            [&](auto zero) { floats = conv_backward_scratch_of<Element<decltype(zero)>>(plan); });
  return floats;
}

void conv_forward(const ConvForwardParams& p, int64_t begin, int64_t end, float* scratch,
                  double* mean, double* m2) {
  for_dtype(p.dtype,
            [&](auto zero) { conv_forward_of<decltype(zero)>(p, begin, end, scratch, mean, m2); });
}

void conv_backward(const ConvBackwardParams& p, int64_t begin, int64_t end, float* scratch,
                   float* dweight, double* sums) {
  for_dtype(p.dtype, [&](auto zero) {
    conv_backward_of<decltype(zero)>(p, begin, end, scratch, dweight, sums);
  });
}
