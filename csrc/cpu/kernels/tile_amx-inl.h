// SPDX-License-Identifier: Apache-2.0
// The products of tile-inl.h for pairs of bf16 on AMX: 16 x 16 tiles instead of vectors.
//
// A staged line is one row of a tile. What a product of pixels reads is a tile as it lies, at any
// tap's distance; for the outer product the left lines are transposed in groups of 16, so that a
// tile's rows are channels and its columns pairs of pixels.

constexpr int64_t kAmxRows = 16;
constexpr int64_t kColumnBytes = kChannelBlock * sizeof(float);  // of a row of 32 columns

struct TilePair : Pair {
  static constexpr int64_t kRowStep = kAmxRows;
  static constexpr int64_t kOuterStep = kAmxRows;
  static constexpr int64_t kOuterLines = 256;  // each sum costs loads and stores of four tiles
  static constexpr int64_t kTapLines = 96;     // both operands stay in the first-level cache
  static constexpr int64_t kJoinedWidth = std::numeric_limits<int64_t>::max();
  static constexpr bool kMinimalFiltering = false;  // tiles multiply more than four times as fast
  // By count of instructions, a block takes tiles as long as four channels take vectors.
  static constexpr bool kNarrowGroups = false;

  // Eight tiles of 16 rows of 64 bytes, from here to the end of the scope.
  struct Registers {
    Registers() {
      // Static: gcc 12 takes _tile_loadconfig to read the first 8 of these bytes only, and would
      // drop the stores of a local one.
      alignas(64) static const Configuration configuration;
      _tile_loadconfig(&configuration);
    }
    ~Registers() { _tile_release(); }
    Registers(const Registers&) = delete;
    Registers& operator=(const Registers&) = delete;
  };

  static void arrange_left(float* lines) { transpose(lines, kLine, lines, kLine); }

 private:
  struct Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static_assert(sizeof(Configuration) == 64);
};

// What was written to memory before is there: gcc does not know that a tile load reads it.
inline void finish_stores() { __asm__ volatile("" ::: "memory"); }

// The sums of 16 or 32 rows and 32 columns, in the tiles 0 to 3: what is in memory, or zeros.
template <int row_tiles>
inline void begin_tiles(bool add, const float* c) {
  if (add) {
    _tile_loadd(0, c, kColumnBytes);
    _tile_loadd(1, c + kLine, kColumnBytes);
    if constexpr (row_tiles == 2) {
      _tile_loadd(2, c + kAmxRows * kChannelBlock, kColumnBytes);
      _tile_loadd(3, c + kAmxRows * kChannelBlock + kLine, kColumnBytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (row_tiles == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
}

template <int row_tiles>
inline void store_tiles(float* c) {
  _tile_stored(0, c, kColumnBytes);
  _tile_stored(1, c + kLine, kColumnBytes);
  if constexpr (row_tiles == 2) {
    _tile_stored(2, c + kAmxRows * kChannelBlock, kColumnBytes);
    _tile_stored(3, c + kAmxRows * kChannelBlock + kLine, kColumnBytes);
  }
}

// 16 or 32 rows of the product, added to what is there if so wished.
template <int row_tiles>
inline void multiply_tiles(const Pixels& a, const float* weights, bool add, float* c) {
  const int64_t row_bytes = a.row_stride * int64_t{sizeof(float)};
  begin_tiles<row_tiles>(add, c);
  for (int64_t tap = 0; tap < a.count; ++tap) {
    const float* lines = a.first + a.taps[tap].pixels;
    const float* b = weights + a.taps[tap].weights;
    for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
      _tile_loadd(4, lines, row_bytes);
      _tile_loadd(6, b, kColumnBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + kLine, kColumnBytes);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (row_tiles == 2) {
        _tile_loadd(5, lines + kAmxRows * a.row_stride, row_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      lines += a.panel_stride;
      b += kWeightLines;
    }
  }
  store_tiles<row_tiles>(c);
}

// The lines of so many panels at a time stay in the first-level cache from tap to tap.
template <>
inline void multiply<TilePair>(Pixels a, const float* b, float* c, int64_t rows) {
  constexpr int64_t kChunks = 8;
  finish_stores();
  for (int64_t chunk = 0; chunk < a.chunks; chunk += kChunks) {
    Pixels some = a;
    some.first += chunk * a.panel_stride;
    some.chunks = std::min(kChunks, a.chunks - chunk);
    float* to = c;
    for (int64_t row = 0; row < rows; row += 2 * kAmxRows) {
      if (rows - row > kAmxRows)
        multiply_tiles<2>(some, b + chunk * kWeightLines, chunk > 0, to);
      else
        multiply_tiles<1>(some, b + chunk * kWeightLines, chunk > 0, to);
      some.first += 2 * kAmxRows * a.row_stride;
      to += 2 * kAmxRows * kChannelBlock;
    }
  }
}

template <>
inline void outer_product<TilePair>(const Lines& a, const Lines& b, int64_t count, bool add,
                                    float* c) {
  finish_stores();
  // The sums that the next product adds to lie behind these. They come from far: those of a weight
  // of many channels do not stay in the second-level cache.
  constexpr int64_t kAskedAtOnce = 8 * kLine;
  const float *next = c + kPairSize, *end = add ? next + kPairSize : next;
  begin_tiles<2>(add, c);
  for (int64_t line = 0; line < count; line += kAmxRows) {
    const float *left = a.first + line * kLine, *right = b.first + line * kLine;
    if (next < end) {
      for (int64_t i = 0; i < kAskedAtOnce; i += kLine) __builtin_prefetch(next + i, 1);
      next += kAskedAtOnce;
    }
    _tile_loadd(4, left, kLineBytes);
    _tile_loadd(6, right, kLineBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + b.panel_stride, kLineBytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left + a.panel_stride, kLineBytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  store_tiles<2>(c);
}
