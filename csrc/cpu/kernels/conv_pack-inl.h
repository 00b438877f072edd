// SPDX-License-Identifier: Apache-2.0
// A convolution's weight in the order in which its products read it.

// What the output channel n has for `count` input channels from c on, zeros beyond its group.
// Weights come from memory: those of `ahead` values later are asked for.
template <class W>
inline void load_weights(const ConvWeight& weight, const ConvShape& s, int64_t n, int64_t c,
                         int64_t count, int64_t tap_offset, int64_t ahead, float* values) {
  const int64_t width = n < s.out_channels ? s.group_width() : 0;
  const int64_t group = n / (s.out_channels / s.groups) * width;
  const int64_t begin = std::clamp<int64_t>(group - c, 0, count);
  const int64_t end = std::clamp<int64_t>(group + width - c, begin, count);
  const int64_t stride = weight.strides[1];
  const W* from = static_cast<const W*>(weight.data) + n * weight.strides[0] +
                  (c - group) * stride + tap_offset;
  if (stride == 1 && end - begin == count) {
    prefetch_values(from + ahead, count);
    for (int64_t i = 0; i < count; i += kWidth) store(values + i, load(from + i, Full{}), Full{});
    return;
  }
  if (end - begin == count) {
    for (int64_t i = 0; i < count; i += kWidth)
      store(values + i, load_apart(from + i * stride, stride), Full{});
    return;
  }
  std::fill(values, values + count, 0.0f);
  for (int64_t i = begin; i < end; ++i) values[i] = static_cast<float>(from[i * stride]);
}

// One chunk of the lines of a column block and tap: 16 elements from the channel `from` on, of 32
// columns from `column` on, rounded as values of T. Their panels are panel_stride floats apart.
template <class E, class T, class W>
inline void pack_chunk(const ConvWeight& weight, const ConvShape& s, bool transposed,
                       int64_t column, int64_t from, int64_t tap_offset, float* packed,
                       int64_t panel_stride) {
  constexpr int64_t kRowsAhead = 16, kChannelsAhead = 128;
  float values[2][kChannelBlock];
  const auto place = [&](int64_t i) {
    return packed + i / kProductColumns * panel_stride + i % kProductColumns;
  };
  const auto at = [&](int64_t row, int64_t i) {
    const T* as_used = nullptr;
    return rounded(as_used, load(values[row] + i, Full{}));
  };
  if (transposed) {
    for (int64_t k = 0; k < kLine; ++k) {
      for (int64_t i = 0; i < E::kDepth; ++i)
        load_weights<W>(weight, s, from + k * E::kDepth + i, column, kChannelBlock, tap_offset,
                        kRowsAhead * weight.strides[0], values[i]);
      for (int64_t i = 0; i < kChannelBlock; i += kWidth)
        store(place(i) + k * kProductColumns, E::element(at(0, i), at(E::kDepth - 1, i)), Full{});
    }
    return;
  }
  for (int64_t half = 0; half < kChannelBlock; half += kLine) {
    alignas(64) float lines[kLine * kLine];
    for (int64_t i = 0; i < kLine; ++i) {
      load_weights<W>(weight, s, column + half + i, from, kLineChannels<E>, tap_offset,
                      kChannelsAhead, values[0]);
      for (int64_t c = 0; c < kLineChannels<E>; c += kWidth)
        E::store_values(lines + i * kLine, c, at(0, c));
    }
    transpose(lines, kLine, place(half), kProductColumns);
  }
}

// A tap of a column block whose groups are narrow: [steps][32 columns from `column` on].
template <class E, class T, class W>
inline void pack_groups(const ConvWeight& weight, const ConvShape& s, bool transposed,
                        int64_t column, int64_t tap_offset, float* packed) {
  const Groups groups(s.group_width(), E::kDepth);
  const int64_t columns = std::min(kChannelBlock, s.channels - column);
  const W* from = static_cast<const W*>(weight.data) + tap_offset;
  const T* as_used = nullptr;
  for (int64_t step = 0; step < groups.steps; ++step, packed += kChannelBlock) {
    float values[2][kChannelBlock] = {};
    for (int64_t i = 0; i < columns; ++i)
      for (int64_t d = 0; d < E::kDepth; ++d) {
        const int64_t other = (groups.element(i) + step) * E::kDepth + d;
        if (other / groups.width != i / groups.width) continue;
        const int64_t n = column + (transposed ? other : i);
        const int64_t within = (transposed ? i : other) % groups.width;
        values[d][i] = static_cast<float>(from[n * weight.strides[0] + within * weight.strides[1]]);
      }
    for (int64_t i = 0; i < kChannelBlock; i += kWidth)
      store(packed + i,
            E::element(rounded(as_used, load(values[0] + i, Full{})),
                       rounded(as_used, load(values[E::kDepth - 1] + i, Full{}))),
            Full{});
  }
}

// Floats of a column block's weights at one tap, if it meets so many blocks of channels.
template <class E>
int64_t tap_floats(const ConvPlan& plan, int64_t met) {
  if (const auto groups = narrow_groups(plan, E::kDepth)) return groups->steps * kChannelBlock;
  return met * kBlockPanels<E> * kLine * kChannelBlock;
}

template <class E, class T, class W>
void conv_pack_of(const ConvWeight& weight, const ConvPlan& plan, bool transposed, int64_t block,
                  float* packed) {
  const ConvShape& s = plan.shape;
  const MetBlocks met = transposed ? met_by_input(s, block) : met_by_output(s, block);
  const int64_t column = block * kChannelBlock, row = met.first * kChannelBlock;
  const int64_t chunks = plan.narrow_groups ? 1 : met.count * kBlockPanels<E>;
  const int64_t floats = tap_floats<E>(plan, met.count);
  const auto pack = [&](int64_t tap, int64_t chunk) {
    const Tap& t = plan.taps[tap];
    if (plan.by_places && plan.places_met(t) == 0) return;  // never read
    const int64_t offset = t.weight / s.kernel_width * weight.strides[2] +
                           t.weight % s.kernel_width * weight.strides[3];
    float* to = packed + tap * floats;
    if (plan.narrow_groups) return pack_groups<E, T, W>(weight, s, transposed, column, offset, to);
    pack_chunk<E, T, W>(weight, s, transposed, column, row + chunk * kLineChannels<E>, offset,
                        to + chunk * kWeightLines, chunks * kWeightLines);
  };
  // In the order in which they lie in memory: channels of a tap, or taps of a channel, next to each
  // other.
  const auto taps = static_cast<int64_t>(plan.taps.size());
  if (weight.strides[1] == 1) {
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t chunk = 0; chunk < chunks; ++chunk) pack(tap, chunk);
  } else {
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t tap = 0; tap < taps; ++tap) pack(tap, chunk);
  }
}
