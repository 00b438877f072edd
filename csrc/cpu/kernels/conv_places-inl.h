// SPDX-License-Identifier: Apache-2.0
// Products of planes that hold place after place, each of all images of a block (conv_plan.h).

// The products of some rows of a block, counted through all images' first rows, then their second:
// as for_products. taps_at(row, column, taps) appends what a place of `to` is multiplied with; `a`
// without its first pixel and taps.
template <class E, class TapsAt, class OperandsOf, class Store>
inline void for_place_products(const ConvBlock& block, const Source& to, Range rows,
                               Range channel_blocks, Pixels a, TapsAt taps_at,
                               OperandsOf operands_of, Store store) {
  alignas(64) float products[kStoreBlocks * Tile::kBlockFloats];
  std::vector<TapOffset> taps;
  const int64_t end_row = std::min(to.height, (rows.end + block.images - 1) / block.images);
  for (int64_t row = rows.begin / block.images; row < end_row; ++row) {
    const int64_t before = row * block.images;
    const Range images{std::max<int64_t>(0, rows.begin - before),
                       std::min(block.images, rows.end - before)};
    const int64_t pieces = (images.size() + kStoreRows - 1) / kStoreRows;
    for (int64_t column = 0; column < to.width; ++column) {
      taps.clear();
      taps_at(row, column, taps);
      a.taps = taps.data(), a.count = static_cast<int64_t>(taps.size());
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const Range part = part_of(images.size(), pieces, piece);
        const int64_t begin = images.begin + part.begin;
        Runs runs;
        runs.add(0, part.size(), to.pixel(block.image + begin, row, column), to.image_pitch);
        for_store_blocks(channel_blocks, [&](Range blocks) {
          for (int64_t c = blocks.begin; c < blocks.end; ++c) {
            const Operands operands = operands_of(c);
            a.first = operands.lines + begin * a.row_stride;
            multiply_block<E>(a, operands.weights,
                              products + (c - blocks.begin) * Tile::kBlockFloats, part.size());
          }
          store(Tile{products, blocks.begin * kChannelBlock, blocks.size()}, runs);
        });
      }
    }
  }
}

// The gradient of the weight at one tap: the outer products of the places that it meets, the rest
// as outer_product_of_block. `left` and `right` begin with the first place of the output and of the
// input.
template <class E>
inline void place_outer_products(const ConvPlan& plan, const Tap& tap, const Lines& left,
                                 const Lines& right, const Groups* groups, bool add, float* c) {
  const Range rows = plan.rows_met(tap), columns = plan.columns_met(tap);
  if (!add && plan.places_met(tap) == 0) std::fill(c, c + pair_size(plan), 0.0f);
  // Rows of the grid's width follow one another.
  const int64_t together = columns.size() == plan.grid_width ? rows.size() : 1;
  const int64_t lines = together * columns.size() * plan.column_pitch / E::kDepth;
  for (int64_t row = rows.begin; row < rows.end; row += together) {
    const int64_t of_output = row * plan.pitch + columns.begin * plan.column_pitch;
    const int64_t of_input = of_output + plan.distance(tap);
    outer_product_of_block<E>({left.first + of_output / E::kDepth * kLine, left.panel_stride},
                              {right.first + of_input / E::kDepth * kLine, right.panel_stride},
                              lines, groups, add || row > rows.begin, c);
  }
}
