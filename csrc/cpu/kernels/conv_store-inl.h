// SPDX-License-Identifier: Apache-2.0
// Storing: the products of some pixels with some channels go to memory, and what comes after the
// convolution (statistics, ReLU's mask, sums) is computed on the way.

// Rows of a product that are computed, then stored, at a time: 32 columns of floats in L1. A
// multiple of the rows that the registers hold.
#if defined(FASTRESNET_AMX)
constexpr int kStoreRows = 64;
#else
constexpr int kStoreRows = kManyRegisters ? 56 : 54;
#endif

// Blocks of channels that are stored together: 128 bytes of a pixel of 16-bit values, which memory
// takes, and gives, at nearly twice the speed of 64.
constexpr int64_t kStoreBlocks = kManyRegisters ? 2 : 1;

// Products of some rows with some blocks of channels from `first` on, one block after another.
struct Tile {
  static constexpr int64_t kBlockFloats = kStoreRows * kChannelBlock;

  const float* products;
  int64_t first, blocks;

  // From a row's first vector of several, which may be of more blocks than one, to its vth.
  static constexpr int64_t vector(int v) {
    return v / kBlockVecs * kBlockFloats + v % kBlockVecs * kWidth;
  }
};

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

  const Run* begin() const { return run; }
  const Run* end() const { return run + count; }
  void add(int64_t place, int64_t length, int64_t pixel, int64_t step) {
    const int64_t begin = joined && count ? place - run[0].place : rows;
    run[count++] = {begin, length, place, pixel, step};
    rows = begin + length;
  }
  // How far behind the first pixel of the runs in memory those that follow them begin.
  int64_t pixels() const {
    const Run& last = run[count - 1];
    return last.pixel + last.count * last.step - run[0].pixel;
  }
};

// Calls body(runs) over some rows of a block's values of one image, at most kStoreRows of a product
// at a time. A run is a row of the image, or several where they follow each other in the plane and
// in memory; rows without padding between them are multiplied together, and rows of few pixels with
// it.
template <class E, class Body>
inline void for_tiles(const ConvPlan& plan, const ConvBlock& block, const Source& source,
                      int64_t image, Range rows, Body body) {
  const int64_t first_row = rows.begin;
  const int64_t end_row = std::min({rows.end, block.rows, source.height - block.row});
  const int64_t first_image = block.image + image, step = source.column_pitch;
  if (source.width == plan.pitch && source.row_pitch == plan.pitch * step) {
    const int64_t end = end_row * plan.pitch, pixel = source.pixel(first_image, block.row, 0);
    for (int64_t place = first_row * plan.pitch; place < end; place += kStoreRows) {
      Runs runs;
      runs.add(place, std::min<int64_t>(kStoreRows, end - place), pixel + place * step, step);
      body(runs);
    }
    return;
  }
  if (source.width == plan.pitch || source.width < E::kJoinedWidth) {
    const int64_t end = (end_row - 1) * plan.pitch + source.width;
    for (int64_t place = first_row * plan.pitch; place < end; place += kStoreRows) {
      Runs runs;
      runs.joined = true;
      const int64_t last_row = std::min(end_row, (place + kStoreRows - 1) / plan.pitch + 1);
      for (int64_t row = place / plan.pitch; row < last_row; ++row) {
        const int64_t begin = std::max<int64_t>(0, place - row * plan.pitch);
        const int64_t stop = std::min(source.width, place + kStoreRows - row * plan.pitch);
        if (begin < stop)
          runs.add(row * plan.pitch + begin, stop - begin,
                   source.pixel(first_image, block.row + row, begin), step);
      }
      if (runs.count) body(runs);
    }
    return;
  }
  const int64_t together = std::max<int64_t>(1, kStoreRows / source.width);
  const int64_t pieces = (source.width + kStoreRows - 1) / kStoreRows;
  for (int64_t row = first_row; row < end_row; row += together)
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const auto [begin, end] = part_of(source.width, pieces, piece);
      Runs runs;
      for (int64_t r = row; r < std::min(end_row, row + together); ++r)
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
    a.first = at + runs.run[0].place * a.row_stride;
    multiply_block<E>(a, b, tile, runs.rows);
    return;
  }
  for (int i = 0; i < runs.count; ++i) {
    a.first = at + runs.run[i].place * a.row_stride;
    multiply_block<E>(a, b, tile + runs.run[i].begin * kChannelBlock, runs.run[i].count);
  }
}

// Calls body(blocks) for the blocks of channels that are stored together.
template <class Body>
inline void for_store_blocks(Range channel_blocks, Body body) {
  for (int64_t c = channel_blocks.begin; c < channel_blocks.end; c += kStoreBlocks)
    body(Range{c, std::min(channel_blocks.end, c + kStoreBlocks)});
}

// What a block of channels is computed from: the plane's lines, and the block's weights.
struct Operands {
  const float *lines, *weights;
};

// The products of some rows of a block, counted through its images, for some blocks of channels:
// multiplies, calls store(tile, runs). `a` without its first pixel. Whole pixels are stored one
// after another, and what is read with them comes in order, too.
template <class E, class OperandsOf, class Store>
inline void for_products(const ConvPlan& plan, const ConvBlock& block, const Source& source,
                         Range rows, Range channel_blocks, const Pixels& a, OperandsOf operands_of,
                         Store store) {
  alignas(64) float products[kStoreBlocks * Tile::kBlockFloats];
  for (int64_t image = rows.begin / block.rows; image * block.rows < rows.end; ++image) {
    const int64_t before = image * block.rows, first = plan.at(image, 0, block) * a.row_stride;
    const Range of_image{std::max<int64_t>(0, rows.begin - before), rows.end - before};
    for_tiles<E>(plan, block, source, image, of_image, [&](const Runs& runs) {
      for_store_blocks(channel_blocks, [&](Range blocks) {
        for (int64_t c = blocks.begin; c < blocks.end; ++c) {
          const Operands operands = operands_of(c);
          Pixels pixels = a;
          if (c > channel_blocks.begin) pixels.ahead = 0;  // they were asked for
          multiply_runs<E>(runs, pixels, operands.lines + first, operands.weights,
                           products + (c - blocks.begin) * Tile::kBlockFloats);
        }
        store(Tile{products, blocks.begin * kChannelBlock, blocks.size()}, runs);
      });
    });
  }
}

// Not unrolled, or gcc would add them one by one.
inline void add_to(double* sums, Vec value, Full) {
  alignas(64) float lanes[kWidth];
  store(lanes, value, Full{});
#pragma GCC unroll 1
  for (int i = 0; i < kWidth; ++i) sums[i] += lanes[i];
}
inline void add_to(double* sums, Vec value, Part part) {
  float lanes[kWidth];
  store(lanes, value, Full{});
  for (int i = 0; i < part.count; ++i) sums[i] += lanes[i];
}

// Calls body(first channel, vectors, Full or Part, the first row's products) so that every channel
// of a tile is met: all vectors together where the blocks are full, fewer elsewhere.
template <class Body>
inline void for_tile_vectors(const Tile& tile, int64_t channels, Body body) {
  if (tile.blocks == kStoreBlocks && tile.first + kStoreBlocks * kChannelBlock <= channels) {
    body(tile.first, std::integral_constant<int, kStoreBlocks * kBlockVecs>{}, Full{},
         tile.products);
    return;
  }
  for (int64_t block = 0; block < tile.blocks; ++block) {
    const int64_t first = tile.first + block * kChannelBlock;
    for_block_vectors(channels, first, [&](int64_t c, auto count, auto part) {
      body(c, count, part, tile.products + block * Tile::kBlockFloats + c - first);
    });
  }
}

// Loops over vectors are unrolled: gcc keeps arrays in registers only where every index is known.

// y, and the sums of its values (as stored) about a shift, which is set from the first tile.
template <class T>
struct OutputStore {
  T* y;
  int64_t channels;
  bool past_caches;
  ConvMoments moments;

  void operator()(const Tile& tile, const Runs& runs, bool set_shift) const {
    if (set_shift) store_shift(tile, runs);
    const bool past_caches = this->past_caches;
    for_tile_vectors(tile, channels, [&](int64_t c, auto count, auto part, const float* products) {
      constexpr int kVecs = count;
      Vec centre[kVecs], sum[kVecs], square[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        centre[v] = load(moments.shift + c + v * kWidth, part);
        sum[v] = square[v] = broadcast(0.0f);
      }
      for (const Run& run : runs) {
        const float* row = products + run.begin * kChannelBlock;
        T* out = y + run.pixel * channels + c;
        for (int64_t r = 0; r < run.count; ++r) {
          Vec values[kVecs];
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v) {
            values[v] = rounded(out, load(row + Tile::vector(v), Full{}));
            const Vec d = values[v] - centre[v];
            sum[v] = sum[v] + d;
            square[v] = fma(d, d, square[v]);
          }
          store_values(out, values, part, past_caches);
          row += kChannelBlock, out += run.step * channels;
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        add_to(moments.sum + c + v * kWidth, sum[v], part);
        add_to(moments.square + c + v * kWidth, square[v], part);
      }
    });
  }

 private:
  void store_shift(const Tile& tile, const Runs& runs) const {
    for_tile_vectors(tile, channels, [&](int64_t c, auto count, auto part, const float* products) {
      for (int v = 0; v < count; ++v) {
        Vec total = broadcast(0.0f);
        int64_t rows = 0;
        for (const Run& run : runs) {
          const float* row = products + run.begin * kChannelBlock + Tile::vector(v);
          for (int64_t r = 0; r < run.count; ++r)
            total = total + load(row + r * kChannelBlock, Full{});
          rows += run.count;
        }
        store(moments.shift + c + v * kWidth, total * broadcast(1.0f / std::max<int64_t>(rows, 1)),
              part);
      }
    });
  }
};

// y in inference.
template <class T>
struct InferenceStore {
  const ConvForwardParams& p;

  // ahead: how far behind each value of the residual lies the one to ask for.
  void operator()(const Tile& tile, const Runs& runs, int64_t ahead) const {
    if (p.residual)
      store_tile<true>(tile, runs, ahead);
    else
      store_tile<false>(tile, runs, ahead);
  }

 private:
  template <bool added>
  void store_tile(const Tile& tile, const Runs& runs, int64_t ahead) const {
    const int64_t channels = p.plan->shape.out_channels;
    const T* residual = static_cast<const T*>(p.residual);
    const bool past_caches = p.past_caches, relu_wanted = p.relu;
    T* y = static_cast<T*>(p.y);
    for_tile_vectors(tile, channels, [&](int64_t c, auto count, auto part, const float* products) {
      constexpr int kVecs = count;
      Vec bias[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
        bias[v] = p.bias ? load(p.bias + c + v * kWidth, part) : broadcast(0.0f);
      for (const Run& run : runs)
        for (int64_t r = 0; r < run.count; ++r) {
          const float* row = products + (run.begin + r) * kChannelBlock;
          const int64_t at = (run.pixel + r * run.step) * channels + c;
          if constexpr (added) prefetch_values(residual + at + ahead, kVecs * kWidth);
          Vec values[kVecs];
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v) {
            Vec value = load(row + Tile::vector(v), Full{}) + bias[v];
            if constexpr (added) value = value + load(residual + at + v * kWidth, part);
            values[v] = relu_wanted ? relu(value) : value;
          }
          store_values(y + at, values, part, past_caches);
        }
    });
  }
};

// How far behind a tile's pixels lie those that are stored next: the next channels of the same
// ones, or the first of the blocks' channels of the pixels that follow.
inline int64_t stored_next(const Tile& tile, const Runs& runs, Range channel_blocks,
                           int64_t channels) {
  const int64_t next = tile.first + tile.blocks * kChannelBlock;
  return next < channel_blocks.end * kChannelBlock
             ? next - tile.first
             : runs.pixels() * channels + channel_blocks.begin * kChannelBlock - tile.first;
}

// dx, with what the layer in front wants of it.
template <class T>
struct InputGradientStore {
  const ConvBackwardParams& p;
  double *sum_g, *sum_gx;

  // ahead: how far behind each value of the addend lies the one to ask for; x was staged just now.
  void operator()(const Tile& tile, const Runs& runs, int64_t ahead) const {
    if (p.scale)
      store_tile<true, false>(tile, runs, ahead);
    else if (p.addend)
      store_tile<false, true>(tile, runs, ahead);
    else
      store_tile<false, false>(tile, runs, ahead);
  }

 private:
  template <bool normalised, bool added>
  void store_tile(const Tile& tile, const Runs& runs, int64_t ahead) const {
    const int64_t channels = p.plan->shape.channels;
    const T* x = static_cast<const T*>(p.x);
    const T* addend = static_cast<const T*>(p.addend);
    const uint8_t* addend_mask = p.addend_mask;
    const bool past_caches = p.past_caches;
    T* dx = static_cast<T*>(p.dx);
    for_tile_vectors(tile, channels, [&](int64_t c, auto count, auto part, const float* products) {
      constexpr int kVecs = count;
      Vec scale[kVecs], shift[kVecs], mean[kVecs], sum[kVecs], product[kVecs];
#pragma GCC unroll 4
      for (int v = 0; normalised && v < kVecs; ++v) {
        scale[v] = load(p.scale + c + v * kWidth, part);
        shift[v] = load(p.shift + c + v * kWidth, part);
        mean[v] = load(p.x_mean + c + v * kWidth, part);
        sum[v] = product[v] = broadcast(0.0f);
      }
      for (const Run& run : runs)
        for (int64_t r = 0; r < run.count; ++r) {
          const float* row = products + (run.begin + r) * kChannelBlock;
          const int64_t pixel = run.pixel + r * run.step, at = pixel * channels + c;
          if constexpr (added) prefetch_values(addend + at + ahead, kVecs * kWidth);
          Vec values[kVecs];
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v) {
            Vec g = load(row + Tile::vector(v), Full{});
            if constexpr (added) {
              Vec other = load(addend + at + v * kWidth, part);
              if (addend_mask) {
                const uint8_t* mask = addend_mask + pixel * mask_bytes(channels);
                other = keep(load_lanes(mask + (c + v * kWidth) / 8, part), other);
              }
              g = g + other;
            }
            if constexpr (normalised) {
              const Vec value = load(x + at + v * kWidth, part);
              g = rounded(dx, keep(passes_relu(fma(value, scale[v], shift[v])), g));
              sum[v] = sum[v] + g;
              product[v] = fma(g, value - mean[v], product[v]);
            }
            values[v] = g;
          }
          store_values(dx + at, values, part, past_caches);
        }
#pragma GCC unroll 4
      for (int v = 0; normalised && v < kVecs; ++v) {
        add_to(sum_g + c + v * kWidth, sum[v], part);
        add_to(sum_gx + c + v * kWidth, product[v], part);
      }
    });
  }
};
