// SPDX-License-Identifier: Apache-2.0
// Convolution in one pass, forward and backward: blocks of pixels are staged (conv_stage-inl.h),
// multiplied (tile-inl.h) and stored (conv_store-inl.h). conv_plan.h says how a convolution is cut
// into blocks, phases and taps. Who works on which panels, rows and channels is the caller's
// business.

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

// Forward ------------------------------------------------------------------------------------

template <class E>
struct StagedInput {
  Plane planes[kMaxPhases];
  int64_t floats;

  StagedInput(const ConvPlan& plan, float* memory) {
    Layout layout(memory);
    for (size_t i = 0; i < plan.phases.size(); ++i)
      if (plan.phases[i].taps) planes[i] = layout.plane<E>(plan, plan.shape.channels);
    floats = layout.floats();
  }
};

template <class T>
void conv_stage_of(const ConvForwardParams& p, const ConvBlock& block, Range panels,
                   float* memory) {
  using E = Element<T>;
  const ConvPlan& plan = *p.plan;
  const int64_t channels = plan.shape.channels;
  const StagedInput<E> staged(plan, memory);
  const InputValues<T> values{static_cast<const T*>(p.x), channels, p.scale, p.shift};
  for (size_t i = 0; i < plan.phases.size(); ++i)
    if (plan.phases[i].taps)
      stage_plane<E>(plan, block, source_of_phase(plan, plan.phases[i]), staged.planes[i], panels,
                     channels, values);
}

template <class T>
void conv_forward_of(const ConvForwardParams& p, const ConvBlock& block, float* memory, Range rows,
                     Range out_blocks, const ConvMoments& moments) {
  using E = Element<T>;
  [[maybe_unused]] const typename E::Registers registers;
  const ConvPlan& plan = *p.plan;
  const ConvShape& s = plan.shape;
  const StagedInput<E> staged(plan, memory);
  const Plane& first = staged.planes[plan.taps[0].phase];
  std::vector<int64_t> distances;
  for (const Tap& tap : plan.taps)
    distances.push_back(staged.planes[tap.phase].lines - first.lines + plan.distance(tap) * kLine);

  const int64_t taps = static_cast<int64_t>(distances.size());
  const int64_t chunks = met_by_output(s, 0).count * kBlockPanels<E>;
  const Pixels pixels{nullptr, first.panel_stride, distances.data(), taps, chunks};
  const int64_t weight_block = taps * chunks * kLine * kChannelBlock;
  const OutputStore<T> store_output{static_cast<T*>(p.y), s.out_channels, p.past_caches, moments};
  for (int64_t n = out_blocks.begin; n < out_blocks.end; ++n) {
    bool set_shift = moments.first;
    const int64_t panel = met_by_output(s, n).first * kBlockPanels<E>;
    for_products<E>(plan, block, source_of_output(plan), rows, pixels,
                    first.lines + panel * first.panel_stride, p.weight + n * weight_block,
                    [&](const float* tile, const Runs& runs) {
                      store_output(tile, runs, n * kChannelBlock, set_shift);
                      set_shift = false;
                    });
  }
  finish_streams();
}

// Backward -----------------------------------------------------------------------------------

// Lines of a panel of `count` pixels in pairs, with those that an outer product reads behind the
// last one, and an odd number of them.
template <class E>
int64_t pair_lines(int64_t count) {
  return ((count + 1) / 2 + 2 * E::kOuterStep) | 1;
}

// The gradient of y and the input, and both as the outer product takes them: with one value an
// element the planes themselves; with two, their pixels in pairs, the input's from an even and from
// an odd pixel on, as the phase's taps need them.
template <class E>
struct StagedBackward {
  Plane gradients;
  Plane planes[kMaxPhases];
  Lines left;
  Lines right[kMaxPhases][E::kDepth];
  int64_t floats;

  StagedBackward(const ConvPlan& plan, float* memory) {
    Layout layout(memory);
    gradients = layout.plane<E>(plan, plan.shape.out_channels);
    left = pairs(plan, layout, gradients);
    if constexpr (E::kDepth == 1) left.first += plan.first_place() * kLine;
    for (size_t i = 0; i < plan.phases.size(); ++i) {
      if (plan.phases[i].taps == 0) continue;
      planes[i] = layout.plane<E>(plan, plan.shape.channels);
      for (int64_t odd = 0; odd < E::kDepth; ++odd)
        right[i][odd] = reads(plan, plan.phases[i], odd) ? pairs(plan, layout, planes[i]) : Lines{};
    }
    floats = layout.floats();
  }

  // The place of a tap's first pixel, and whether any tap of the phase has an even or odd one.
  static int64_t place(const ConvPlan& plan, const Tap& tap) {
    return plan.first_place() + plan.distance(tap);
  }
  static bool reads(const ConvPlan& plan, const Phase& phase, int64_t odd) {
    const Tap* tap = plan.taps.data() + phase.first_tap;
    return std::any_of(tap, tap + phase.taps,
                       [&](const Tap& t) { return place(plan, t) % E::kDepth == odd; });
  }

 private:
  static Lines pairs(const ConvPlan& plan, Layout& layout, const Plane& plane) {
    if constexpr (E::kDepth == 1) return {plane.lines, plane.panel_stride};
    const int64_t stride = pair_lines<E>(plan.plane_pixels() + 1) * kLine;
    return {layout.take(2 * plane.panels * stride), stride};
  }
};

// Panels of a plane in pairs of pixels from `from` on, zeros from `count` pixels on.
template <class E>
inline void pair_plane(const Plane& plane, Range panels, int64_t from, int64_t count,
                       const Lines& lines) {
  const int64_t pairs = (count + 1) / 2, padding = 2 * E::kOuterStep;
  alignas(64) static const float none[kLine] = {};
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const float* pixel = plane.lines + panel * plane.panel_stride + from * kLine;
    float* low = lines.first + 2 * panel * lines.panel_stride;
    float* high = low + lines.panel_stride;
    for (int64_t i = 0; i < pairs; ++i)
      E::pair_pixels(pixel + 2 * i * kLine, 2 * i + 1 < count ? pixel + (2 * i + 1) * kLine : none,
                     low + i * kLine, high + i * kLine);
    for (float* half : {low, high})
      std::fill(half + pairs * kLine, half + (pairs + padding) * kLine, 0.0f);
  }
}

// Of `panels`, the first are those of the gradient of y, those of the input follow.
template <class T>
void conv_backward_stage_of(const ConvBackwardParams& p, const ConvBlock& block, Range panels,
                            float* memory) {
  using E = Element<T>;
  const ConvPlan& plan = *p.plan;
  const ConvShape& s = plan.shape;
  const StagedBackward<E> staged(plan, memory);
  const int64_t out_panels = staged.gradients.panels;
  const Range of_output{panels.begin, std::min(panels.end, out_panels)};
  const Range of_input{std::max<int64_t>(0, panels.begin - out_panels), panels.end - out_panels};
  stage_plane<E>(plan, block, source_of_output(plan), staged.gradients, of_output, s.out_channels,
                 OutputGradients<T>(p));
  const InputValues<T> values{static_cast<const T*>(p.x), s.channels, p.scale, p.shift};
  for (size_t i = 0; i < plan.phases.size(); ++i)
    if (plan.phases[i].taps)
      stage_plane<E>(plan, block, source_of_phase(plan, plan.phases[i]), staged.planes[i], of_input,
                     s.channels, values);

  if constexpr (E::kDepth == 2) {
    const int64_t span = plan.span(block);
    const int64_t pixels = plan.at(block.images, 0, block) + plan.margin + 1;
    pair_plane<E>(staged.gradients, of_output, plan.first_place(), span, staged.left);
    for (int64_t panel = 2 * of_output.begin; panel < 2 * of_output.end; ++panel)
      for (int64_t i = 0; 2 * i < span; i += E::kOuterStep)
        E::arrange_left(staged.left.first + panel * staged.left.panel_stride + i * kLine);
    for (size_t i = 0; i < plan.phases.size(); ++i)
      for (int64_t odd = 0; odd < E::kDepth; ++odd)
        if (staged.reads(plan, plan.phases[i], odd))
          pair_plane<E>(staged.planes[i], of_input, odd, pixels - odd, staged.right[i][odd]);
  }
}

// For each phase of x, the taps that read it, in the opposite direction.
template <class T>
void conv_input_gradient_of(const ConvBackwardParams& p, const ConvBlock& block, float* memory,
                            Range rows, Range in_blocks, double* sums) {
  using E = Element<T>;
  [[maybe_unused]] const typename E::Registers registers;
  const ConvPlan& plan = *p.plan;
  const StagedBackward<E> staged(plan, memory);
  const Plane& gradients = staged.gradients;
  std::vector<int64_t> distances;
  for (const Tap& tap : plan.taps) distances.push_back(-plan.distance(tap) * kLine);

  const int64_t taps = static_cast<int64_t>(distances.size());
  const int64_t chunks = met_by_input(plan.shape, 0).count * kBlockPanels<E>;
  const int64_t tap_block = chunks * kLine * kChannelBlock;
  const InputGradientStore<T> store_gradient{p, sums, sums + plan.shape.channels};
  for (const Phase& phase : plan.phases) {
    const Pixels pixels{nullptr, gradients.panel_stride, distances.data() + phase.first_tap,
                        phase.taps, chunks};
    for (int64_t c = in_blocks.begin; c < in_blocks.end; ++c) {
      const int64_t panel = met_by_input(plan.shape, c).first * kBlockPanels<E>;
      for_products<E>(plan, block, source_of_phase(plan, phase), rows, pixels,
                      gradients.lines + panel * gradients.panel_stride,
                      p.weight + (c * taps + phase.first_tap) * tap_block,
                      [&](const float* tile, const Runs& runs) {
                        store_gradient(tile, runs, c * kChannelBlock);
                      });
    }
  }
  finish_streams();
}

// y's gradient times x at the tap's distance, over all pixels of the block.
template <class T>
void conv_weight_gradient_of(const ConvBackwardParams& p, const ConvBlock& block, float* memory,
                             Range out_blocks, Range met, bool add, float* dweight) {
  using E = Element<T>;
  [[maybe_unused]] const typename E::Registers registers;
  const ConvPlan& plan = *p.plan;
  const StagedBackward<E> staged(plan, memory);
  const int64_t steps = (plan.span(block) + E::kDepth - 1) / E::kDepth;
  for (int64_t n = out_blocks.begin; n < out_blocks.end; ++n) {
    Lines left = staged.left;
    left.first += 2 * n * left.panel_stride;
    const int64_t first = met_by_output(plan.shape, n).first;
    for (int64_t c = first + met.begin; c < first + met.end; ++c)
      for (const Tap& tap : plan.taps) {
        const int64_t place = staged.place(plan, tap);
        Lines right = staged.right[tap.phase][place % E::kDepth];
        right.first += 2 * c * right.panel_stride + place / E::kDepth * kLine;
        outer_product<E>(left, right, steps, add, dweight);
        dweight += kChannelBlock * kChannelBlock;
      }
  }
}

// Weights ------------------------------------------------------------------------------------

// What the output channel n has for 32 input channels from c on, zeros beyond its group.
template <class W>
inline void load_weights(const ConvWeight& weight, const ConvShape& s, int64_t n, int64_t c,
                         int64_t tap_offset, float* values) {
  const int64_t width = n < s.out_channels ? s.channels / s.groups : 0;
  const int64_t group = n / (s.out_channels / s.groups) * width;
  const int64_t begin = std::clamp<int64_t>(group - c, 0, kChannelBlock);
  const int64_t end = std::clamp<int64_t>(group + width - c, begin, kChannelBlock);
  const int64_t stride = weight.strides[1];
  const W* from = static_cast<const W*>(weight.data) + n * weight.strides[0] +
                  (c - group) * stride + tap_offset;
  if (stride == 1 && end - begin == kChannelBlock) {
    for (int64_t i = 0; i < kChannelBlock; i += kWidth)
      store(values + i, load(from + i, Full{}), Full{});
    return;
  }
  std::fill(values, values + kChannelBlock, 0.0f);
  for (int64_t i = begin; i < end; ++i) values[i] = static_cast<float>(from[i * stride]);
}

template <class E, class W>
void conv_pack_of(const ConvWeight& weight, const ConvPlan& plan, bool transposed, int64_t block,
                  float* packed) {
  const ConvShape& s = plan.shape;
  const MetBlocks met = transposed ? met_by_input(s, block) : met_by_output(s, block);
  const int64_t column = block * kChannelBlock, row = met.first * kChannelBlock;
  for (const Tap* tap = plan.taps.data(); tap != plan.taps.data() + plan.taps.size(); ++tap) {
    const int64_t offset = tap->weight / s.kernel_width * weight.strides[2] +
                           tap->weight % s.kernel_width * weight.strides[3];
    for (int64_t chunk = 0; chunk < met.count * kBlockPanels<E>; ++chunk) {
      const int64_t from = row + chunk * kLineChannels<E>;
      float values[2][kChannelBlock];
      if (transposed) {
        for (int64_t k = 0; k < kLine; ++k) {
          for (int64_t i = 0; i < E::kDepth; ++i)
            load_weights<W>(weight, s, from + k * E::kDepth + i, column, offset, values[i]);
          for (int64_t i = 0; i < kChannelBlock; i += kWidth)
            store(packed + k * kChannelBlock + i,
                  E::element(load(values[0] + i, Full{}), load(values[E::kDepth - 1] + i, Full{})),
                  Full{});
        }
      } else {
        for (int64_t half = 0; half < kChannelBlock; half += kLine) {
          alignas(64) float lines[kLine * kLine];
          for (int64_t i = 0; i < kLine; ++i) {
            load_weights<W>(weight, s, column + half + i, from, offset, values[0]);
            for (int64_t c = 0; c < kLineChannels<E>; c += kWidth)
              E::store_values(lines + i * kLine, c, load(values[0] + c, Full{}));
          }
          transpose(lines, kLine, packed + half, kChannelBlock);
        }
      }
      packed += kLine * kChannelBlock;
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

int64_t conv_staged_floats(const ConvPlan& plan, DType dtype) {
  int64_t floats = 0;
  for_dtype(dtype, [&](auto zero) {
    floats = StagedInput<Element<decltype(zero)>>(plan, nullptr).floats;
  });
  return floats;
}

int64_t conv_backward_staged_floats(const ConvPlan& plan, DType dtype) {
  int64_t floats = 0;
  for_dtype(dtype, [&](auto zero) {
    floats = StagedBackward<Element<decltype(zero)>>(plan, nullptr).floats;
  });
  return floats;
}

void conv_stage(const ConvForwardParams& p, const ConvBlock& block, Range panels, float* staged) {
  for_dtype(p.dtype, [&](auto zero) { conv_stage_of<decltype(zero)>(p, block, panels, staged); });
}

void conv_forward(const ConvForwardParams& p, const ConvBlock& block, float* staged, Range rows,
                  Range out_blocks, const ConvMoments& moments) {
  for_dtype(p.dtype, [&](auto zero) {
    conv_forward_of<decltype(zero)>(p, block, staged, rows, out_blocks, moments);
  });
}

void conv_backward_stage(const ConvBackwardParams& p, const ConvBlock& block, Range panels,
                         float* staged) {
  for_dtype(p.dtype,
            [&](auto zero) { conv_backward_stage_of<decltype(zero)>(p, block, panels, staged); });
}

void conv_input_gradient(const ConvBackwardParams& p, const ConvBlock& block, float* staged,
                         Range rows, Range in_blocks, double* sums) {
  for_dtype(p.dtype, [&](auto zero) {
    conv_input_gradient_of<decltype(zero)>(p, block, staged, rows, in_blocks, sums);
  });
}

void conv_weight_gradient(const ConvBackwardParams& p, const ConvBlock& block, float* staged,
                          Range out_blocks, Range met, bool add, float* dweight) {
  for_dtype(p.dtype, [&](auto zero) {
    conv_weight_gradient_of<decltype(zero)>(p, block, staged, out_blocks, met, add, dweight);
  });
}
