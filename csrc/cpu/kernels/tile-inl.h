// SPDX-License-Identifier: Apache-2.0
// The products of small matrices that convolutions are made of, on vector registers.
//
// Operands are staged as lines of 64 bytes, 16 elements of 4 bytes. An element is one float, or a
// pair of neighbouring bf16 that the processor multiplies and adds in one go; all else is the same:
//   - to multiply, a line is one pixel and its elements are channels (or pairs of channels);
//   - for the outer product, a line is one pixel (or a pair of pixels) and its elements 16
//   channels.
//
// An Element says what a line holds (values of kDepth channels an element) and how its products are
// computed. kRowStep: rows of a product come in so many, the last ones read and written though not
// wanted. kOuterStep: so do the lines of an outer product, zeros behind the last; kOuterLines:
// lines of one sum; kTapLines: the same where every tap has a sum of these lines. kJoinedWidth:
// narrower rows of an image are multiplied together with the padding between them.
// kMinimalFiltering: whether a 3x3 convolution is better done by winograd-inl.h. kNarrowGroups:
// whether groups narrower than a block are better multiplied by tile_groups-inl.h than with zeros
// between them.

constexpr int64_t kLine = 16;

// Registers of a product's sums: kProductRows x kProductVecs of them, and a few for the operands.
constexpr bool kManyRegisters = kWidth == 16;
constexpr int kProductVecs = 2;
constexpr int kProductColumns = kProductVecs * kWidth;
constexpr int kProductRows = kManyRegisters ? 14 : 6;
// Turns of a product's innermost loop that are unrolled into one: with few sums a turn is short.
constexpr int kUnrolled = kManyRegisters ? 1 : 4;

// What the Elements on vectors have in common.
struct OnVectors {
  static constexpr int64_t kRowStep = 1;
  static constexpr int64_t kOuterStep = 1;
  static constexpr int64_t kOuterLines = 128;
  static constexpr int64_t kTapLines = 128;
  static constexpr int64_t kJoinedWidth = kProductRows / 2;
  static constexpr bool kMinimalFiltering = true;
  static constexpr bool kNarrowGroups = true;

  struct Registers {};  // held while products are computed
  // Brings kOuterStep lines into the form that an outer product's left operand has.
  static void arrange_left(float*) {}
};

// One float an element: every dtype, on every level.
struct Single : OnVectors {
  using Value = float;
  static constexpr int kDepth = 1;

  static Vec dot(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
  // A line's values at channel c, and one element of two neighbouring channels' values.
  static void store_values(float* line, int64_t c, Vec value) { store(line + c, value, Full{}); }
  static Vec element(Vec first, Vec) { return first; }
};

#if defined(FASTRESNET_AVX512_BF16)
// Two bf16 an element.
struct Pair : OnVectors {
  using Value = BFloat16;
  static constexpr int kDepth = 2;

  static Vec dot(Vec a, Vec b, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_castps_si512(a.v),
                             (__m512bh)_mm512_castps_si512(b.v))};
  }
  static void store_values(float* line, int64_t c, Vec value) {
    store(reinterpret_cast<BFloat16*>(line) + c, value, Full{});
  }
  static Vec element(Vec first, Vec second) {
    const BFloat16* bf16 = nullptr;
    const __m512i low = _mm512_cvtepu16_epi32(narrow(bf16, first));
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(bf16, second)), 16);
    return {_mm512_castsi512_ps(_mm512_or_si512(low, high))};
  }
  // The lines of two pixels, 32 channels each, as two lines of pairs of pixels, 16 channels each.
  static void pair_pixels(const float* first, const float* second, float* low, float* high) {
    const __m512i order =
        _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                         37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
    _mm512_storeu_si512(low, _mm512_permutex2var_epi16(a, order, b));
    _mm512_storeu_si512(
        high, _mm512_permutex2var_epi16(a, _mm512_add_epi16(order, _mm512_set1_epi16(16)), b));
  }
};
#endif

// Where a tap's pixels and its weights begin, in floats from the first ones.
struct TapOffset {
  int64_t pixels, weights;
};

struct Groups;  // tile_groups-inl.h

// A matrix of pixels: lines of so many rows, row_stride floats apart, in `chunks` panels,
// panel_stride floats apart, read once a tap.
struct Pixels {
  const float* first;
  int64_t row_stride, panel_stride;
  const TapOffset* taps;
  int64_t count, chunks;
  // How many floats ahead lines are asked for that are not in the second-level cache; 0: all are.
  int64_t ahead = 0;
  const Groups* groups = nullptr;  // narrow ones
};

// The weights of a tap are read panel by panel, a panel being the columns that registers hold:
// [panel][chunk][16][kProductColumns].
constexpr int64_t kWeightLines = kLine * kProductColumns;  // floats of a panel's chunk

// Weights are asked for so many floats ahead: those of many channels come from the third-level
// cache. With fewer registers that takes more of the processor's time than it saves, as more loads
// are needed for a sum.
constexpr int64_t kAhead = kManyRegisters ? 32 * kProductColumns : 0;

// The sums of some rows of a product, which stay in registers: all loops over them are unrolled.
template <int rows>
inline void clear(Vec (&sums)[rows][kProductVecs]) {
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kProductVecs; ++v) sums[r][v] = broadcast(0.0f);
}

// Into rows of 32 columns, added to what is there if so wished.
template <int rows>
inline void store_sums(const Vec (&sums)[rows][kProductVecs], bool add, float* c) {
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kProductVecs; ++v) {
      float* to = c + r * kChannelBlock + v * kWidth;
      store(to, add ? load(to, Full{}) + sums[r][v] : sums[r][v], Full{});
    }
}

// sums[rows, columns] += the values of the rows, `stride` floats apart, times those of the columns.
template <class Element, int rows>
inline void add_products(const float* values, int64_t stride, const Vec (&columns)[kProductVecs],
                         Vec (&sums)[rows][kProductVecs]) {
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    const Vec value = broadcast(values[r * stride]);
#pragma GCC unroll 4
    for (int v = 0; v < kProductVecs; ++v) sums[r][v] = Element::dot(value, columns[v], sums[r][v]);
  }
}

// dense: rows follow one another line by line, which spares the registers that hold their places.
template <class Element, bool dense, int rows>
inline void multiply_rows(const Pixels& a, const float* weights, bool add, float* c) {
  const int64_t row_stride = dense ? kLine : a.row_stride;
  Vec sums[rows][kProductVecs];
  clear(sums);
  for (int64_t tap = 0; tap < a.count; ++tap) {
    const float* lines = a.first + a.taps[tap].pixels;
    const float* b = weights + a.taps[tap].weights;
    for (int64_t chunk = 0; chunk < a.chunks; ++chunk, lines += a.panel_stride) {
      if (a.ahead)
        for (int r = 0; r < rows; ++r) __builtin_prefetch(lines + a.ahead + r * row_stride);
#pragma GCC unroll kUnrolled
      for (int k = 0; k < kLine; ++k, b += kProductColumns) {
        Vec columns[kProductVecs];
#pragma GCC unroll 4
        for (int v = 0; v < kProductVecs; ++v) {
          columns[v] = load(b + v * kWidth, Full{});
          if constexpr (kAhead > 0) __builtin_prefetch(b + kAhead + v * kWidth);
        }
        add_products<Element>(lines + k, row_stride, columns, sums);
      }
    }
  }
  store_sums(sums, add, c);
}

// Calls body(count as a constant), count being at most `most`.
template <int most = kProductRows, class Body>
inline void for_count(int64_t count, Body body) {
  if (count == most)
    body(std::integral_constant<int, most>{});
  else if constexpr (most > 1)
    for_count<most - 1>(count, body);
}

// Calls body(first column, rows) for what registers hold of a product of so many rows, shared out
// evenly: a product of few rows waits for the ones before it.
template <class Body>
inline void for_product_parts(int64_t rows, Body body) {
  const int64_t parts = (rows + kProductRows - 1) / kProductRows;
  for (int64_t column = 0; column < kChannelBlock; column += kProductColumns)
    for (int64_t part = 0; part < parts; ++part) body(column, part_of(rows, parts, part));
}

// c[rows, 32] = the pixels from a.first on, times the weights b of each tap, whose panels are
// panel_stride floats apart, added to c if so wished.
template <class Element>
inline void multiply_once(Pixels a, const float* b, int64_t panel_stride, bool add, float* c,
                          int64_t rows) {
  const float* first = a.first;
  for_product_parts(rows, [&](int64_t column, Range part) {
    a.first = first + part.begin * a.row_stride;
    const float* weights = b + column / kProductColumns * panel_stride;
    float* to = c + part.begin * kChannelBlock + column;
    for_count(part.size(), [&](auto count) {
      if (a.row_stride == kLine)
        multiply_rows<Element, true, count>(a, weights, add, to);
      else
        multiply_rows<Element, false, count>(a, weights, add, to);
    });
  });
}

// The same without adding, of any number of taps and chunks: one sum over many of them would lose
// more bits than a sum of sums does.
template <class Element>
inline void multiply(Pixels a, const float* b, float* c, int64_t rows) {
  constexpr int64_t kChunks = 32;
  const int64_t taps = std::max<int64_t>(1, kChunks / a.chunks);
  int64_t tap = 0;  // there may be none
  do {
    for (int64_t chunk = 0; chunk < a.chunks; chunk += kChunks) {
      Pixels some = a;
      some.first += chunk * a.panel_stride;
      some.taps += tap;
      some.count = std::min(taps, a.count - tap);
      some.chunks = std::min(kChunks, a.chunks - chunk);
      multiply_once<Element>(some, b + chunk * kWeightLines, a.chunks * kWeightLines,
                             tap + chunk > 0, c, rows);
    }
    tap += taps;
  } while (tap < a.count);
}

// A matrix of pixels of which 32 channels are taken: panels of 16.
struct Lines {
  float* first;
  int64_t panel_stride;
};

// c[rows, kProductColumns] = the sum over `count` lines of the left one's channels times those of
// the right one, added to c if so wished.
template <class Element, int rows>
inline void outer_product_rows(const float* left, const float* const (&right)[kProductVecs],
                               int64_t count, bool add, float* c) {
  Vec sums[rows][kProductVecs];
  clear(sums);
#pragma GCC unroll kUnrolled
  for (int64_t i = 0; i < count; ++i) {
    Vec columns[kProductVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kProductVecs; ++v) columns[v] = load(right[v] + i * kLine, Full{});
    add_products<Element>(left + i * kLine, 1, columns, sums);
  }
  store_sums(sums, add, c);
}

// c[32, 32] = the sum over `count` lines of a's channels times b's, added to c if so wished: a sum
// of sums, which loses fewer bits than one over all lines of all blocks.
template <class Element>
inline void outer_product(const Lines& a, const Lines& b, int64_t count, bool add, float* c) {
  constexpr int kParts = (kLine + kProductRows - 1) / kProductRows;  // of a panel of a's
  constexpr int kMost = (kLine + kParts - 1) / kParts;               // rows of one
  for (int64_t part = 0; part < kChannelBlock / kLine * kParts; ++part) {
    const Range rows = part_of(kLine, kParts, part % kParts);
    const float* left = a.first + part / kParts * a.panel_stride + rows.begin;
    float* first = c + (part / kParts * kLine + rows.begin) * kChannelBlock;
    for (int64_t column = 0; column < kChannelBlock; column += kProductColumns) {
      const float* right[kProductVecs];
      for (int v = 0; v < kProductVecs; ++v) {
        const int64_t at = column + v * kWidth;
        right[v] = b.first + at / kLine * b.panel_stride + at % kLine;
      }
      // What is added to, of this turn and of the next.
      for (int64_t r = 0; add && r < 2 * rows.size(); ++r)
        for (int v = 0; v < kProductVecs; ++v)
          __builtin_prefetch(first + r * kChannelBlock + column + v * kWidth, 1);
      for_count<kMost>(rows.size(), [&](auto of_part) {
        outer_product_rows<Element, of_part>(left, right, count, add, first + column);
      });
    }
  }
}

// The same of many lines, of which one sum would lose more bits than a sum of sums does.
template <class Element, int64_t kLines = Element::kOuterLines>
inline void long_outer_product(Lines a, Lines b, int64_t count, bool add, float* c) {
  for (int64_t first = 0; first < count; first += kLines) {
    outer_product<Element>(a, b, std::min(kLines, count - first), add || first > 0, c);
    a.first += kLines * kLine, b.first += kLines * kLine;
  }
}
