// SPDX-License-Identifier: Apache-2.0
// AMX tiles in plain C++, for processors without them: put before every file of the CPU library
// (-include), it replaces the intrinsics, and isa.cpp takes the amx level for supported wherever
// AVX-512 bf16 is. After Intel's reference: tile shapes from the configuration, rows beyond them
// zero, bf16 products summed in order with denormals taken and left as zeros. What real tiles would
// refuse (no configuration, a shape beyond 16 x 64 bytes, operands that do not fit) ends the
// process with a message.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define FASTRESNET_EMULATED_AMX

namespace emulated_amx {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "emulated AMX: %s\n", what);
  std::abort();
}

struct Tile {
  alignas(64) unsigned char data[kRows][kRowBytes];
  int rows, row_bytes;
};

struct Tiles {
  bool configured = false;
  Tile tile[kTiles];
};

inline thread_local Tiles tiles;

inline Tile& tile(int index) {
  require(tiles.configured, "no tile configuration");
  require(index >= 0 && index < kTiles, "no such tile");
  return tiles.tile[index];
}

inline void load_config(const void* from) {
  unsigned char bytes[64];
  std::memcpy(bytes, from, sizeof bytes);
  require(bytes[0] == 1 && bytes[1] == 0, "expected palette 1 from row 0");
  for (int i = 0; i < kTiles; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, sizeof row_bytes);
    require(bytes[48 + i] <= kRows && row_bytes <= kRowBytes, "a tile beyond 16 rows of 64 bytes");
    tiles.tile[i].rows = bytes[48 + i];
    tiles.tile[i].row_bytes = row_bytes;
    std::memset(tiles.tile[i].data, 0, sizeof tiles.tile[i].data);
  }
  tiles.configured = true;
}

inline void release() { tiles.configured = false; }

inline void zero(int index) { std::memset(tile(index).data, 0, sizeof(Tile::data)); }

inline void load(int index, const void* base, long stride) {
  zero(index);
  Tile& to = tile(index);
  for (int row = 0; row < to.rows; ++row)
    std::memcpy(to.data[row], static_cast<const char*>(base) + row * stride, to.row_bytes);
}

inline void store(int index, void* base, long stride) {
  const Tile& from = tile(index);
  for (int row = 0; row < from.rows; ++row)
    std::memcpy(static_cast<char*>(base) + row * stride, from.data[row], from.row_bytes);
}

inline float without_denormal(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}

inline float bf16(const unsigned char* from) {
  uint16_t half;
  std::memcpy(&half, from, sizeof half);
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return without_denormal(value);
}

// sums[m][n] += a[m][2 k] * b[k][2 n] + a[m][2 k + 1] * b[k][2 n + 1], the even and the odd
// products in sums of their own.
inline void dot(int sums_index, int a_index, int b_index) {
  const Tile &a = tile(a_index), &b = tile(b_index);
  Tile& sums = tile(sums_index);
  require(sums.rows == a.rows && sums.row_bytes == b.row_bytes && a.row_bytes == 4 * b.rows,
          "shapes of a product that do not fit");
  const int depth = b.rows, columns = b.row_bytes / 4;
  float right[2][kRows][kRowBytes / 4];
  for (int k = 0; k < depth; ++k)
    for (int n = 0; n < columns; ++n)
      for (int odd = 0; odd < 2; ++odd) right[odd][k][n] = bf16(b.data[k] + 4 * n + 2 * odd);
  for (int m = 0; m < sums.rows; ++m) {
    float total[2][kRowBytes / 4] = {};
    for (int k = 0; k < depth; ++k)
      for (int odd = 0; odd < 2; ++odd) {
        const float left = bf16(a.data[m] + 4 * k + 2 * odd);
        for (int n = 0; n < columns; ++n)
          total[odd][n] = without_denormal(std::fma(left, right[odd][k][n], total[odd][n]));
      }
    float row[kRowBytes / 4];
    std::memcpy(row, sums.data[m], sizeof row);
    for (int n = 0; n < columns; ++n)
      row[n] = without_denormal(row[n] + without_denormal(total[0][n] + total[1][n]));
    std::memcpy(sums.data[m], row, sizeof row);
  }
}

}  // namespace emulated_amx

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) emulated_amx::load_config(from)
#define _tile_release() emulated_amx::release()
#define _tile_zero(tile) emulated_amx::zero(tile)
#define _tile_loadd(tile, base, stride) emulated_amx::load(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated_amx::store(tile, base, stride)
#define _tile_dpbf16ps(sums, a, b) emulated_amx::dot(sums, a, b)
