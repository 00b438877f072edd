// SPDX-License-Identifier: Apache-2.0
// Convolution in one pass, forward and backward: blocks of pixels are staged (conv_stage-inl.h),
// multiplied (tile-inl.h) and stored (conv_store-inl.h). conv_plan.h says how a convolution is cut
// into blocks, phases and taps. Who works on which panels, rows and channels is the caller's
// business.

// Forward ------------------------------------------------------------------------------------

template <class E>
struct StagedInput {
  Plane planes[kMaxPhases] = {};
  int64_t floats;

  StagedInput(const ConvPlan& plan, float* memory) {
    Layout layout(memory);
    for (size_t i = 0; i < plan.phases.size(); ++i)
      if (plan.phases[i].taps && !plan.in_place)
        planes[i] = layout.plane<E>(plan, plan.shape.channels);
    floats = layout.floats();
  }
};

// What the convolution reads: patches, or each phase that a tap meets.
template <class E, class T>
void stage_input(const ConvPlan& plan, const ConvBlock& block, const Plane* planes, Range panels,
                 const InputValues<T>& values) {
  const int64_t channels = plan.shape.channels;
  if (plan.patches)
    return stage_plane<E>(plan, block, source_of_phase(plan, plan.phases[0]), planes[0], panels,
                          channels, PatchValues<T>{values.x, plan.given});
  for (size_t i = 0; i < plan.phases.size(); ++i)
    if (plan.phases[i].taps)
      stage_plane<E>(plan, block, source_of_phase(plan, plan.phases[i]), planes[i], panels,
                     channels, values);
}

template <class T>
void conv_stage_of(const ConvForwardParams& p, const ConvBlock& block, Range panels,
                   float* memory) {
  using E = Element<T>;
  const ConvPlan& plan = *p.plan;
  const int64_t channels = plan.shape.channels;
  const StagedInput<E> staged(plan, memory);
  stage_input<E>(plan, block, staged.planes, panels,
                 InputValues<T>{static_cast<const T*>(p.x), channels, p.scale, p.shift});
}

// A block's pixels as products read them, but for the taps: staged, or where they lie.
template <class E, class T>
Pixels pixels_of(const ConvForwardParams& p, const ConvBlock& block, const Plane& staged) {
  Pixels pixels{staged.lines, kLine, staged.panel_stride,
                nullptr,      0,     met_by_output(p.plan->shape, 0).count * kBlockPanels<E>};
  if (p.plan->in_place) {
    const int64_t channels = p.plan->shape.channels;
    pixels.first =
        reinterpret_cast<const float*>(static_cast<const T*>(p.x) + block.row * channels);
    pixels.row_stride = channels / E::kDepth;
    pixels.panel_stride = kLine;
    pixels.ahead = kStoreRows * pixels.row_stride;
  }
  return pixels;
}

template <class T>
void conv_forward_of(const ConvForwardParams& p, const ConvBlock& block, float* memory,
                     const float* weight, Range rows, Range out_blocks,
                     const ConvMoments& moments) {
  using E = Element<T>;
  [[maybe_unused]] const typename E::Registers registers;
  const ConvPlan& plan = *p.plan;
  const ConvShape& s = plan.shape;
  const StagedInput<E> staged(plan, memory);
  const Plane& first = staged.planes[plan.taps[0].phase];
  Pixels pixels = pixels_of<E, T>(p, block, first);
  const int64_t tap_block = tap_floats<E>(plan, met_by_output(s, 0).count);
  std::vector<TapOffset> taps;
  for (const Tap& tap : plan.taps)
    taps.push_back({staged.planes[tap.phase].lines - first.lines + plan.distance(tap) * kLine,
                    static_cast<int64_t>(taps.size()) * tap_block});
  const int64_t count = static_cast<int64_t>(taps.size());
  const auto taps_at = [&](int64_t row, int64_t column, std::vector<TapOffset>& at) {
    const int64_t place = (row * plan.pitch + column * plan.column_pitch) * kLine;
    for (int64_t i = 0; i < count; ++i)
      if (plan.rows_met(plan.taps[i]).has(row) && plan.columns_met(plan.taps[i]).has(column))
        at.push_back({taps[i].pixels + place, taps[i].weights});
  };

  pixels.taps = taps.data(), pixels.count = count;
  const std::optional<Groups> groups = narrow_groups(plan, E::kDepth);
  pixels.groups = groups ? &*groups : nullptr;
  const OutputStore<T> store_output{static_cast<T*>(p.y), s.out_channels, p.past_caches, moments};
  const auto operands_of = [&](int64_t n) -> Operands {
    const int64_t panel = met_by_output(s, n).first * kBlockPanels<E>;
    return {pixels.first + panel * pixels.panel_stride,
            weight + (n - out_blocks.begin) * count * tap_block};
  };
  // With the first tile of all blocks of channels.
  int64_t shifts_to_set = moments.first ? out_blocks.size() : 0;
  const InferenceStore<T> store_inference{p};
  const auto store = [&](const Tile& tile, const Runs& runs) {
    if (p.inference)
      return store_inference(tile, runs, stored_next(tile, runs, out_blocks, s.out_channels));
    store_output(tile, runs, shifts_to_set > 0);
    shifts_to_set -= tile.blocks;
  };
  const Source to = source_of_output(plan);
  if (plan.by_places)
    for_place_products<E>(block, to, rows, out_blocks, pixels, taps_at, operands_of, store);
  else
    for_products<E>(plan, block, to, rows, out_blocks, pixels, operands_of, store);
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
  stage_input<E>(plan, block, staged.planes, of_input,
                 InputValues<T>{static_cast<const T*>(p.x), s.channels, p.scale, p.shift});

  if constexpr (E::kDepth == 2) {
    const int64_t span = plan.span(block);
    const int64_t pixels = plan.staged_pixels(block);
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
                            const float* weight, Range rows, Range in_blocks, double* sums) {
  using E = Element<T>;
  [[maybe_unused]] const typename E::Registers registers;
  const ConvPlan& plan = *p.plan;
  const StagedBackward<E> staged(plan, memory);
  const Plane& gradients = staged.gradients;
  const MetBlocks met = met_by_input(plan.shape, 0);
  const int64_t tap_block = tap_floats<E>(plan, met.count);
  const std::optional<Groups> groups = narrow_groups(plan, E::kDepth);
  std::vector<TapOffset> taps;
  for (const Tap& tap : plan.taps)
    taps.push_back({-plan.distance(tap) * kLine, static_cast<int64_t>(taps.size()) * tap_block});
  const int64_t count = static_cast<int64_t>(taps.size());
  const InputGradientStore<T> store_gradient{p, sums, sums + plan.shape.channels};
  for (const Phase& phase : plan.phases) {
    const TapOffset* of_phase = taps.data() + phase.first_tap;
    Pixels pixels{nullptr,  kLine,      gradients.panel_stride,
                  of_phase, phase.taps, met.count * kBlockPanels<E>};
    pixels.groups = groups ? &*groups : nullptr;
    const auto taps_at = [&](int64_t row, int64_t column, std::vector<TapOffset>& at) {
      const int64_t place = (row * plan.pitch + column * plan.column_pitch) * kLine;
      for (int64_t i = 0; i < phase.taps; ++i) {
        const Tap& tap = plan.taps[phase.first_tap + i];
        if (plan.rows_met(tap).has(row - tap.row) && plan.columns_met(tap).has(column - tap.column))
          at.push_back({of_phase[i].pixels + place, of_phase[i].weights});
      }
    };
    const auto operands_of = [&](int64_t c) -> Operands {
      const int64_t panel = met_by_input(plan.shape, c).first * kBlockPanels<E>;
      return {gradients.lines + panel * gradients.panel_stride,
              weight + (c - in_blocks.begin) * count * tap_block};
    };
    const auto store = [&](const Tile& tile, const Runs& runs) {
      store_gradient(tile, runs, stored_next(tile, runs, in_blocks, plan.shape.channels));
    };
    const Source to = source_of_phase(plan, phase);
    if (plan.by_places)
      for_place_products<E>(block, to, rows, in_blocks, pixels, taps_at, operands_of, store);
    else
      for_products<E>(plan, block, to, rows, in_blocks, pixels, operands_of, store);
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
  // Of pixels in pairs: one channel an element.
  const std::optional<Groups> narrow = narrow_groups(plan, 1);
  const Groups* groups = narrow ? &*narrow : nullptr;
  // Where all taps read the same lines, some at a time stay in the first-level cache for them.
  const bool same_lines = plan.phases.size() == 1 && plan.taps.size() > 1 && !plan.by_places;
  const int64_t lines = same_lines ? E::kTapLines : steps;
  for (int64_t n = out_blocks.begin; n < out_blocks.end; ++n) {
    Lines left = staged.left;
    left.first += 2 * n * left.panel_stride;
    const int64_t first = met_by_output(plan.shape, n).first;
    for (int64_t c = first + met.begin; c < first + met.end; ++c) {
      for (int64_t line = 0; line < steps; line += lines) {
        float* of_tap = dweight;
        for (const Tap& tap : plan.taps) {
          const int64_t place = staged.place(plan, tap);
          Lines right = staged.right[tap.phase][place % E::kDepth];
          right.first += 2 * c * right.panel_stride;
          if (plan.by_places) {
            place_outer_products<E>(plan, tap, left, right, groups, add, of_tap);
          } else {
            right.first += (place / E::kDepth + line) * kLine;
            outer_product_of_block<E>({left.first + line * kLine, left.panel_stride}, right,
                                      std::min(lines, steps - line), groups, add || line > 0,
                                      of_tap);
          }
          of_tap += pair_size(plan);
        }
      }
      dweight += plan.products() * pair_size(plan);
    }
  }
}

// From run-time dtypes to the instances --------------------------------------------------------

// Calls body(zero of the dtype, the tile as a constant): 1, or one that conv_largest_tile allows.
template <class Body>
inline void for_tile(int64_t tile, DType dtype, Body body) {
  for_dtype(dtype, [&](auto zero) {
    if (tile == 1) return body(zero, std::integral_constant<int, 1>{});
    if constexpr (!std::is_same_v<decltype(zero), float>)
      if (tile == 4) return body(zero, std::integral_constant<int, 4>{});
    body(zero, std::integral_constant<int, 2>{});
  });
}

int64_t conv_largest_tile(DType dtype) {
  int64_t tile = 1;
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (Element<T>::kMinimalFiltering) tile = std::is_same_v<T, float> ? 2 : 4;
  });
  return tile;
}

bool conv_multiplies_groups(DType dtype) {
  bool multiplies = false;
  for_dtype(dtype, [&](auto zero) { multiplies = Element<decltype(zero)>::kNarrowGroups; });
  return multiplies;
}

int64_t conv_image_step(DType dtype) {
  int64_t step = 1;
  for_dtype(dtype, [&](auto zero) {
    using E = Element<decltype(zero)>;
    step = E::kDepth * E::kOuterStep;
  });
  return step;
}

int64_t conv_line_channels(int64_t tile, DType dtype) {
  int64_t channels = kLineChannels<Single>;
  if (tile == 1)
    for_dtype(dtype, [&](auto zero) { channels = kLineChannels<Element<decltype(zero)>>; });
  return channels;
}

int64_t conv_packed_floats(const ConvPlan& plan, DType dtype, bool transposed) {
  if (plan.tile > 1) return plan.products() * packed_position(plan, transposed);
  int64_t floats = 0;
  for_dtype(dtype, [&](auto zero) {
    using E = Element<decltype(zero)>;
    const MetBlocks met = transposed ? met_by_input(plan.shape, 0) : met_by_output(plan.shape, 0);
    floats = plan.products() * tap_floats<E>(plan, met.count);
  });
  return floats;
}

void conv_pack(const ConvWeight& weight, const ConvPlan& plan, DType dtype, bool transposed,
               int64_t column_block, float* packed) {
  for_tile(plan.tile, dtype, [&](auto zero, auto tile) {
    using T = decltype(zero);
    for_dtype(weight.dtype, [&](auto weight_zero) {
      using W = decltype(weight_zero);
      if constexpr (tile == 1)
        conv_pack_of<Element<T>, T, W>(weight, plan, transposed, column_block, packed);
      else
        winograd_pack<tile, T, W>(weight, plan, transposed, column_block, packed);
    });
  });
}

bool conv_reads_memory(DType dtype) {
  bool reads = false;
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using E = Element<T>;
    reads = std::is_same_v<typename E::Value, T> && E::kRowStep == 1;
  });
  return reads;
}

int64_t conv_staged_floats(const ConvPlan& plan, DType dtype) {
  if (plan.tile > 1) {
    Layout layout(nullptr);
    Positions(layout, plan, plan.shape.channels);
    return layout.floats();
  }
  int64_t floats = 0;
  for_dtype(dtype, [&](auto zero) {
    floats = StagedInput<Element<decltype(zero)>>(plan, nullptr).floats;
  });
  return floats;
}

int64_t conv_backward_staged_floats(const ConvPlan& plan, DType dtype) {
  if (plan.tile > 1) return WinogradBackward(plan, nullptr).layout.floats();
  int64_t floats = 0;
  for_dtype(dtype, [&](auto zero) {
    floats = StagedBackward<Element<decltype(zero)>>(plan, nullptr).floats;
  });
  return floats;
}

void conv_stage(const ConvForwardParams& p, const ConvBlock& block, Range panels, float* staged,
                float* window) {
  for_tile(p.plan->tile, p.dtype, [&](auto zero, auto tile) {
    using T = decltype(zero);
    if constexpr (tile == 1)
      conv_stage_of<T>(p, block, panels, staged);
    else
      winograd_stage<tile, T>(p, block, panels, staged, window);
  });
}

void conv_forward(const ConvForwardParams& p, const ConvBlock& block, float* staged,
                  const float* weight, Range rows, Range out_blocks, const ConvMoments& moments) {
  for_tile(p.plan->tile, p.dtype, [&](auto zero, auto tile) {
    using T = decltype(zero);
    if constexpr (tile == 1)
      conv_forward_of<T>(p, block, staged, weight, rows, out_blocks, moments);
    else
      winograd_forward<tile, T>(p, block, staged, weight, rows, out_blocks, moments);
  });
}

void conv_backward_stage(const ConvBackwardParams& p, const ConvBlock& block, Range panels,
                         float* staged, float* window) {
  for_tile(p.plan->tile, p.dtype, [&](auto zero, auto tile) {
    using T = decltype(zero);
    if constexpr (tile == 1)
      conv_backward_stage_of<T>(p, block, panels, staged);
    else
      winograd_backward_stage<tile, T>(p, block, panels, staged, window);
  });
}

void conv_input_gradient(const ConvBackwardParams& p, const ConvBlock& block, float* staged,
                         const float* weight, Range rows, Range in_blocks, double* sums) {
  for_tile(p.plan->tile, p.dtype, [&](auto zero, auto tile) {
    using T = decltype(zero);
    if constexpr (tile == 1)
      conv_input_gradient_of<T>(p, block, staged, weight, rows, in_blocks, sums);
    else
      winograd_input_gradient<tile, T>(p, block, staged, weight, rows, in_blocks, sums);
  });
}

void conv_weight_gradient(const ConvBackwardParams& p, const ConvBlock& block, float* staged,
                          Range out_blocks, Range met, bool add, float* dweight) {
  for_tile(p.plan->tile, p.dtype, [&](auto zero, auto tile) {
    using T = decltype(zero);
    if constexpr (tile == 1)
      conv_weight_gradient_of<T>(p, block, staged, out_blocks, met, add, dweight);
    else
      winograd_weight_gradient<tile>(p, block, staged, out_blocks, met, add, dweight);
  });
}

void conv_weight_taps(int64_t tile, const float* tiles, int64_t product_stride, int64_t count,
                      int64_t stride, float* taps) {
  if (tile == 2)
    winograd_weight_taps<2>(tiles, product_stride, count, stride, taps);
  else
    winograd_weight_taps<4>(tiles, product_stride, count, stride, taps);
}
