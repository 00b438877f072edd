// SPDX-License-Identifier: Apache-2.0
// 3x3 convolutions of stride 1 by Winograd's minimal filtering (winograd_transform-inl.h), in
// float32 whatever the dtype of the tensors.
//
// A plan's grid is one of tiles. Staging a tile transforms it into a line for each of its (tile +
// 2)^2 positions, so that forward, gradient of the input and gradient of the weight are products of
// matrices, one a position, of tiles times channels. Storing transforms those back.

// A number of floats that is an odd number of lines, so that neighbours fall on different sets of
// the cache.
constexpr int64_t odd_lines(int64_t floats) { return (floats / kLine | 1) * kLine; }

// [position][panel][tile of the block][16 channels]
struct Positions {
  float* lines;
  int64_t position_stride, panel_stride;

  Positions(Layout& layout, const ConvPlan& plan, int64_t channels)
      : panel_stride(odd_lines(plan.plane_pixels() * kLine)) {
    position_stride = odd_lines(panels<Single>(channels) * panel_stride);
    lines = layout.take(plan.products() * position_stride);
  }
};

// The values of one panel of an image of a block, and the zeros around them, as the plan's window.
template <int tile, class Values>
inline void stage_window(const ConvPlan& plan, const ConvBlock& block, int64_t image,
                         int64_t channels, int64_t panel, const Values& values, float* window) {
  const ConvShape& s = plan.shape;
  const int64_t pitch = plan.window_pitch(), first = block.row * tile - 1;
  const Plane plane{window, 0, 1};
  const Range only{0, 1}, panels{panel, panel + 1};
  for (int64_t i = 0; i < plan.window_rows(block.rows); ++i) {
    const int64_t row = first + i, begin = i * pitch;
    if (row < 0 || row >= s.height) {
      plane.zero(only, begin, pitch);
      continue;
    }
    plane.zero(only, begin, 1);
    stage_run<Single>(plane, panels, channels, begin + 1, s.width,
                      ((block.image + image) * s.height + row) * s.width, 1, values);
    plane.zero(only, begin + 1 + s.width, pitch - 1 - s.width);
  }
}

// Calls body(a tile's first pixel in the window, its place in the block) for an image's tiles.
template <int tile, class Body>
inline void for_windows(const ConvPlan& plan, const ConvBlock& block, int64_t image,
                        const float* window, Body body) {
  const int64_t pitch = plan.window_pitch();
  int64_t place = plan.at(image, 0, block);
  for (int64_t row = 0; row < block.rows; ++row)
    for (int64_t column = 0; column < plan.grid_width; ++column, ++place)
      body(window + (row * pitch + column) * tile * kLine, place);
}

// A tile's line in each position: `times` of the values at row i and column j from `first` on.
template <int tile, int in, class Times>
inline void store_positions(const Positions& to, int64_t panel, int64_t place, Times times,
                            const float* first, int64_t pitch) {
  constexpr int kSide = Winograd<tile>::kSide;
  for (int64_t lane = 0; lane < kLine; lane += kWidth) {
    float* line = to.lines + panel * to.panel_stride + place * kLine + lane;
    transform<in, kSide>(
        times, [&](int i, int j) { return load(first + (i * pitch + j) * kLine + lane, Full{}); },
        [&](int i, int j, Vec value) {
          store(line + (i * kSide + j) * to.position_stride, value, Full{});
        });
  }
}

template <int tile>
inline void store_inputs(const ConvPlan& plan, const ConvBlock& block, int64_t image, int64_t panel,
                         const float* window, const Positions& to) {
  using W = Winograd<tile>;
  for_windows<tile>(plan, block, image, window, [&](const float* first, int64_t place) {
    store_positions<tile, W::kSide>(
        to, panel, place, [](const auto& in, auto& out) { W::input(in, out); }, first,
        plan.window_pitch());
  });
}

// The pixels of the tiles themselves.
template <int tile>
inline void store_output_gradients(const ConvPlan& plan, const ConvBlock& block, int64_t image,
                                   int64_t panel, const float* window, const Positions& to) {
  using W = Winograd<tile>;
  const int64_t pitch = plan.window_pitch();
  for_windows<tile>(plan, block, image, window, [&](const float* first, int64_t place) {
    store_positions<tile, tile>(
        to, panel, place, [](const auto& in, auto& out) { W::output_gradient(in, out); },
        first + (pitch + 1) * kLine, pitch);
  });
}

// Floats of one position of a block of the packed weight.
inline int64_t packed_position(const ConvPlan& plan, bool transposed) {
  const int64_t chunks = panels<Single>(transposed ? plan.shape.out_channels : plan.shape.channels);
  return odd_lines(chunks * kLine * kChannelBlock);
}

// Products -----------------------------------------------------------------------------------

static_assert(kBlockTiles % kProductRows == 0);

// Products of tiles with 32 channels, [position][tile][channel].
template <int tile>
struct Products {
  static constexpr int kSide = Winograd<tile>::kSide;
  static constexpr int64_t kPosition = kBlockTiles * kChannelBlock;
  alignas(64) float values[kSide * kSide * kPosition];

  // Those of `count` tiles from the place `first` on, with one block of the packed weight.
  void multiply_tiles(const Positions& a, int64_t chunks, const float* weight,
                      int64_t weight_position, int64_t first, int64_t count) {
    const TapOffset only{};
    const int64_t ahead = a.panel_stride > 2 * kBlockTiles * kLine ? 2 * a.panel_stride : 0;
    for (int64_t p = 0; p < kSide * kSide; ++p) {
      const float* lines = a.lines + p * a.position_stride + first * kLine;
      multiply<Single>(Pixels{lines, kLine, a.panel_stride, &only, 1, chunks, ahead},
                       weight + p * weight_position, values + p * kPosition, count);
    }
  }

  // One tile's pixels, [row][column][channel].
  void pixels(int64_t of_tile, float* to) const {
    for (int64_t c = 0; c < kChannelBlock; c += kWidth) {
      const float* from = values + of_tile * kChannelBlock + c;
      transform<kSide, tile>(
          [](const auto& in, auto& out) { Winograd<tile>::output(in, out); },
          [&](int i, int j) { return load(from + (i * kSide + j) * kPosition, Full{}); },
          [&](int i, int j, Vec value) {
            store(to + (i * tile + j) * kChannelBlock + c, value, Full{});
          });
    }
  }
};

// Where the pixels of the tile at a place belong, `begin` being their first row of a product.
template <int tile>
inline void add_runs(const ConvPlan& plan, const ConvBlock& block, int64_t place, int64_t begin,
                     Runs& runs) {
  const ConvShape& s = plan.shape;
  const int64_t grid_row = place / plan.grid_width;
  const int64_t image = block.image + grid_row / block.rows;
  const int64_t row = (block.row + grid_row % block.rows) * tile;
  const int64_t column = place % plan.grid_width * tile;
  const int64_t width = std::min<int64_t>(tile, s.width - column);
  for (int64_t i = 0; i < std::min<int64_t>(tile, s.height - row); ++i)
    runs.run[runs.count++] = {begin + i * tile, width, 0,
                              (image * s.height + row + i) * s.width + column, 1};
}

// The outputs of some rows of a block's tiles in some blocks of channels: calls store(pixels, runs,
// whether these are the first of the block of channels).
template <int tile, class Store>
inline void for_winograd_products(const ConvPlan& plan, const ConvBlock& block, Range rows,
                                  const Positions& a, bool transposed, const float* weight,
                                  Range channel_blocks, Store store_pixels) {
  constexpr int kPixels = tile * tile, kStoreTiles = kStoreRows / kPixels;
  Products<tile> products;
  alignas(64) float pixels[kStoreTiles * kPixels * kChannelBlock];
  const int64_t chunks = panels<Single>(transposed ? plan.shape.out_channels : plan.shape.channels);
  const int64_t weight_position = packed_position(plan, transposed);
  const int64_t begin = rows.begin * plan.grid_width;
  const int64_t end = std::min(rows.end, block.images * block.rows) * plan.grid_width;
  for (int64_t place = begin; place < end; place += kBlockTiles) {
    const int64_t count = std::min(kBlockTiles, end - place);
    for (int64_t n = channel_blocks.begin; n < channel_blocks.end; ++n) {
      const float* of_block =
          weight + (n - channel_blocks.begin) * plan.products() * weight_position;
      products.multiply_tiles(a, chunks, of_block, weight_position, place, count);
      for (int64_t first = 0; first < count; first += kStoreTiles) {
        Runs runs;
        for (int64_t t = first; t < std::min<int64_t>(count, first + kStoreTiles); ++t) {
          const int64_t row = (t - first) * kPixels;
          products.pixels(t, pixels + row * kChannelBlock);
          add_runs<tile>(plan, block, place + t, row, runs);
        }
        store_pixels(Tile{pixels, n * kChannelBlock, 1}, runs, place == begin && first == 0);
      }
    }
  }
}

// Forward ------------------------------------------------------------------------------------

template <int tile, class T>
void winograd_stage(const ConvForwardParams& p, const ConvBlock& block, Range panels, float* memory,
                    float* window) {
  const ConvPlan& plan = *p.plan;
  const int64_t channels = plan.shape.channels;
  Layout layout(memory);
  const Positions staged(layout, plan, channels);
  const InputValues<T> values{static_cast<const T*>(p.x), channels, p.scale, p.shift};
  for (int64_t panel = panels.begin; panel < panels.end; ++panel)
    for (int64_t image = 0; image < block.images; ++image) {
      stage_window<tile>(plan, block, image, channels, panel, values, window);
      store_inputs<tile>(plan, block, image, panel, window, staged);
    }
}

template <int tile, class T>
void winograd_forward(const ConvForwardParams& p, const ConvBlock& block, float* memory,
                      const float* weight, Range rows, Range out_blocks,
                      const ConvMoments& moments) {
  const ConvPlan& plan = *p.plan;
  const ConvShape& s = plan.shape;
  Layout layout(memory);
  const Positions staged(layout, plan, s.channels);
  const OutputStore<T> store_output{static_cast<T*>(p.y), s.out_channels, p.past_caches, moments};
  const InferenceStore<T> store_inference{p};
  for_winograd_products<tile>(plan, block, rows, staged, false, weight, out_blocks,
                              [&](const Tile& pixels, const Runs& runs, bool first) {
                                if (p.inference)
                                  return store_inference(pixels, runs,
                                                         runs.pixels() * s.out_channels);
                                store_output(pixels, runs, first && moments.first);
                              });
  finish_streams();
}

// Backward -----------------------------------------------------------------------------------

// The gradient of y as the gradients of the input and of the weight need it, and the input.
struct WinogradBackward {
  Layout layout;
  Positions gradients, left, right;

  WinogradBackward(const ConvPlan& plan, float* memory)
      : layout(memory),
        gradients(layout, plan, plan.shape.out_channels),
        left(layout, plan, plan.shape.out_channels),
        right(layout, plan, plan.shape.channels) {}
};

template <int tile, class T>
void winograd_backward_stage(const ConvBackwardParams& p, const ConvBlock& block, Range range,
                             float* memory, float* window) {
  const ConvPlan& plan = *p.plan;
  const ConvShape& s = plan.shape;
  const WinogradBackward staged(plan, memory);
  const int64_t out_panels = panels<Single>(s.out_channels);
  const OutputGradients<T> gradients(p);
  const InputValues<T> inputs{static_cast<const T*>(p.x), s.channels, p.scale, p.shift};
  for (int64_t panel = range.begin; panel < range.end; ++panel)
    for (int64_t image = 0; image < block.images; ++image) {
      if (panel >= out_panels) {
        const int64_t of_input = panel - out_panels;
        stage_window<tile>(plan, block, image, s.channels, of_input, inputs, window);
        store_inputs<tile>(plan, block, image, of_input, window, staged.right);
        continue;
      }
      stage_window<tile>(plan, block, image, s.out_channels, panel, gradients, window);
      if (p.dx) store_inputs<tile>(plan, block, image, panel, window, staged.gradients);
      store_output_gradients<tile>(plan, block, image, panel, window, staged.left);
    }
}

template <int tile, class T>
void winograd_input_gradient(const ConvBackwardParams& p, const ConvBlock& block, float* memory,
                             const float* weight, Range rows, Range in_blocks, double* sums) {
  const ConvPlan& plan = *p.plan;
  const ConvShape& s = plan.shape;
  const WinogradBackward staged(plan, memory);
  const InputGradientStore<T> store_gradient{p, sums, sums + s.channels};
  for_winograd_products<tile>(plan, block, rows, staged.gradients, true, weight, in_blocks,
                              [&](const Tile& pixels, const Runs& runs, bool) {
                                store_gradient(pixels, runs, runs.pixels() * s.channels);
                              });
  finish_streams();
}

template <int tile>
void winograd_weight_gradient(const ConvBackwardParams& p, const ConvBlock& block, float* memory,
                              Range out_blocks, Range met, bool add, float* dweight) {
  constexpr int kPositions = Winograd<tile>::kSide * Winograd<tile>::kSide;
  const ConvPlan& plan = *p.plan;
  const WinogradBackward staged(plan, memory);
  const int64_t tiles = block.images * block.rows * plan.grid_width;
  const int64_t met_count = met.end - met.begin;
  const int64_t pairs = (out_blocks.end - out_blocks.begin) * met_count;
  const auto at = [](const Positions& of, int64_t position, int64_t channel_block) {
    return Lines{of.lines + position * of.position_stride + 2 * channel_block * of.panel_stride,
                 of.panel_stride};
  };
  for (int64_t position = 0; position < kPositions; ++position)
    for (int64_t n = out_blocks.begin; n < out_blocks.end; ++n)
      for (int64_t c = met.begin; c < met.end; ++c) {
        const int64_t pair = (n - out_blocks.begin) * met_count + c - met.begin;
        long_outer_product<Single, kBlockTiles>(at(staged.left, position, n),
                                                at(staged.right, position, c), tiles, add,
                                                dweight + (position * pairs + pair) * kPairSize);
      }
}

// Weights ------------------------------------------------------------------------------------

// A block of columns of the weight's transform, of each position in the order of a tap's weights.
// Transposed, the kernel is turned around: that is the gradient of the input.
template <int tile, class T, class W>
void winograd_pack(const ConvWeight& weight, const ConvPlan& plan, bool transposed, int64_t block,
                   float* packed) {
  constexpr int kSide = Winograd<tile>::kSide;
  const ConvShape& s = plan.shape;
  const int64_t chunks = panels<Single>(transposed ? s.out_channels : s.channels);
  const int64_t position_stride = packed_position(plan, transposed);
  constexpr int64_t kChunk = kLine * kChannelBlock;
  for (int64_t chunk = 0; chunk < chunks; ++chunk, packed += kWeightLines) {
    alignas(64) float taps[9][kChunk];
    for (int64_t tap = 0; tap < 9; ++tap)
      pack_chunk<Single, T, W>(weight, s, transposed, block * kChannelBlock, chunk * kLine,
                               tap / 3 * weight.strides[2] + tap % 3 * weight.strides[3],
                               taps[transposed ? 8 - tap : tap], kWeightLines);
    for (int64_t at = 0; at < kChunk; at += kWidth) {
      float* to = packed + at / kWeightLines * chunks * kWeightLines + at % kWeightLines;
      transform<3, kSide>([](const auto& in, auto& out) { Winograd<tile>::weight(in, out); },
                          [&](int i, int j) { return load(taps[i * 3 + j] + at, Full{}); },
                          [&](int i, int j, Vec value) {
                            store(to + (i * kSide + j) * position_stride, value, Full{});
                          });
    }
  }
}

// The sum of `count` gradients [position][32][32], `stride` floats apart, and their positions
// `position_stride`, as one [tap][32][32].
template <int tile>
void winograd_weight_taps(const float* tiles, int64_t position_stride, int64_t count,
                          int64_t stride, float* taps) {
  constexpr int kSide = Winograd<tile>::kSide;
  for (int64_t at = 0; at < kPairSize; at += kWidth)
    transform<kSide, 3>([](const auto& in, auto& out) { Winograd<tile>::weight_gradient(in, out); },
                        [&](int i, int j) {
                          const float* first = tiles + (i * kSide + j) * position_stride + at;
                          Vec sum = load(first, Full{});
                          for (int64_t k = 1; k < count; ++k)
                            sum = sum + load(first + k * stride, Full{});
                          return sum;
                        },
                        [&](int i, int j, Vec value) {
                          store(taps + (i * 3 + j) * kPairSize + at, value, Full{});
                        });
}
