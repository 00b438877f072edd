// SPDX-License-Identifier: Apache-2.0
// The products of tile-inl.h for groups that are narrower than a block of channels: a block's lines
// then hold several groups, and of the dense product only their squares along the diagonal count.
//
// Columns stay lanes of vectors. Where the dense product broadcasts an element of a line to all
// columns, each gets one of its own group here: in the first step the group's first element, then
// its second.

// Steps of an outer product whose sums registers hold at a time; widths of groups are its multiples
// or less.
constexpr int kGroupSteps = kManyRegisters ? 8 : 4;

// Where the vectors of a block find their groups' elements in lines of `depth` channels an element.
struct Groups {
  int64_t width, depth;  // channels
  int64_t steps;
  // Each vector lies in one group, or else holds several.
  bool one_a_vector;
  // The vector's first element that is read: it is broadcast, or a vector from there is permuted.
  int64_t first[kBlockVecs];
  int32_t order[kBlockVecs][kWidth];

  Groups(int64_t width, int64_t depth)
      : width(width),
        depth(depth),
        steps(std::max<int64_t>(1, width / depth)),
        one_a_vector(width >= kWidth) {
    for (int64_t v = 0; v < kBlockVecs; ++v) {
      first[v] = element(v * kWidth);
      if (!one_a_vector) first[v] -= first[v] % kWidth;
      for (int64_t lane = 0; lane < kWidth; ++lane)
        order[v][lane] = static_cast<int32_t>(element(v * kWidth + lane) - first[v]);
    }
  }
  // The first one of a channel's group.
  int64_t element(int64_t channel) const { return channel / width * width / depth; }
  // Of panels of lines, where a vector's first element lies.
  int64_t place(int64_t v, int64_t panel_stride) const {
    return first[v] / kLine * panel_stride + first[v] % kLine;
  }
};

// Those of a convolution, if it has any.
inline std::optional<Groups> narrow_groups(const ConvPlan& plan, int64_t depth) {
  if (!plan.narrow_groups) return std::nullopt;
  return Groups(plan.shape.group_width(), depth);
}

// Of the vectors of columns from `vec` on.
template <class E, bool one_a_vector, int rows>
inline void multiply_group_rows(const Pixels& a, const Groups& groups, int64_t vec,
                                const float* weights, float* c) {
  Vec sums[rows][kProductVecs];
  clear(sums);
  for (int64_t tap = 0; tap < a.count; ++tap) {
    const float* lines = a.first + a.taps[tap].pixels;
    const float* b = weights + a.taps[tap].weights;
    for (int64_t step = 0; step < groups.steps; ++step, b += kChannelBlock)
#pragma GCC unroll 4
      for (int v = 0; v < kProductVecs; ++v) {
        const Vec column = load(b + v * kWidth, Full{});
        const float* line = lines + groups.place(vec + v, a.panel_stride);
        // Or gcc, which sees the same lines read in every step, would copy them all to the stack.
        __asm__("" : "+r"(line));
        const Order order = load_order(groups.order[vec + v], static_cast<int>(step));
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
          Vec value;
          if constexpr (one_a_vector)
            value = broadcast(line[r * kLine + step]);
          else
            value = permute(load(line + r * kLine, Full{}), order);
          sums[r][v] = E::dot(value, column, sums[r][v]);
        }
      }
  }
  store_sums(sums, false, c);
}

// c[rows, 32] = the pixels from a.first on, lines that follow one another, times b, [steps, 32] of
// each tap.
template <class E>
inline void multiply_groups(Pixels a, const float* b, float* c, int64_t rows) {
  const Groups& groups = *a.groups;
  const float* first = a.first;
  for_product_parts(rows, [&](int64_t column, Range part) {
    a.first = first + part.begin * kLine;
    float* to = c + part.begin * kChannelBlock + column;
    for_count(part.size(), [&](auto count) {
      if (groups.one_a_vector)
        multiply_group_rows<E, true, count>(a, groups, column / kWidth, b + column, to);
      else
        multiply_group_rows<E, false, count>(a, groups, column / kWidth, b + column, to);
    });
  });
}

// Either kind of product.
template <class E>
inline void multiply_block(const Pixels& a, const float* b, float* c, int64_t rows) {
  if constexpr (E::kNarrowGroups)
    if (a.groups) return multiply_groups<E>(a, b, c, rows);
  multiply<E>(a, b, c, rows);
}

// Some steps of an outer product: the sums of a's channels, of the vectors from `vec` on, times
// those that their groups have in b. c: [step][32].
template <class E, bool one_a_vector, int count>
inline void group_outer_steps(const Lines& a, const Lines& b, int64_t lines, const Groups& groups,
                              int64_t vec, int64_t step, bool add, float* c) {
  Vec sums[count][kProductVecs];
  clear(sums);
  const float *left[kProductVecs], *right[kProductVecs];
#pragma GCC unroll 4
  for (int v = 0; v < kProductVecs; ++v) {
    const int64_t channel = (vec + v) * kWidth;
    left[v] = a.first + channel / kLine * a.panel_stride + channel % kLine;
    right[v] = b.first + groups.place(vec + v, b.panel_stride) + (one_a_vector ? step : 0);
  }
  Order orders[count];  // of any vector: each begins with a whole group
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i)
    orders[i] = load_order(groups.order[0], static_cast<int>(step) + i);
  for (int64_t line = 0; line < lines; ++line)
#pragma GCC unroll 4
    for (int v = 0; v < kProductVecs; ++v) {
      const Vec rows = load(left[v] + line * kLine, Full{});
      const float* from = right[v] + line * kLine;
#pragma GCC unroll 8
      for (int i = 0; i < count; ++i) {
        Vec value;
        if constexpr (one_a_vector)
          value = broadcast(from[i]);
        else
          value = permute(load(from, Full{}), orders[i]);
        sums[i][v] = E::dot(rows, value, sums[i][v]);
      }
    }
  store_sums(sums, add, c + step * kChannelBlock + vec * kWidth);
}

// As long_outer_product, of narrow groups, whose lines hold one channel an element: c[width, 32].
template <class E>
inline void group_outer_product(Lines a, Lines b, int64_t count, const Groups& groups, bool add,
                                float* c) {
  constexpr int64_t kLines = E::kOuterLines;
  for (int64_t first = 0; first < count; first += kLines) {
    const int64_t lines = std::min(kLines, count - first);
    const bool adds = add || first > 0;
    for (int64_t vec = 0; vec < kBlockVecs; vec += kProductVecs)
      for (int64_t step = 0; step < groups.width; step += kGroupSteps)
        for_count<kGroupSteps>(std::min<int64_t>(kGroupSteps, groups.width), [&](auto steps) {
          if (groups.one_a_vector)
            group_outer_steps<E, true, steps>(a, b, lines, groups, vec, step, adds, c);
          else
            group_outer_steps<E, false, steps>(a, b, lines, groups, vec, step, adds, c);
        });
    a.first += kLines * kLine, b.first += kLines * kLine;
  }
}

// Either kind.
template <class E>
inline void outer_product_of_block(const Lines& a, const Lines& b, int64_t count,
                                   const Groups* groups, bool add, float* c) {
  if constexpr (E::kNarrowGroups)
    if (groups) return group_outer_product<E>(a, b, count, *groups, add, c);
  long_outer_product<E>(a, b, count, add, c);
}
