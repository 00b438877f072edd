// SPDX-License-Identifier: Apache-2.0
// ldmatrix and mma.m16n8k16, which CUDA offers as PTX only, as functions of a whole warp. Which
// lane holds what is in the PTX manual's figures for them; sums are taken in double and rounded
// once, so a device may differ in the last bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda_runtime.h"

// Four 8 x 8 matrices of 16-bit values from shared memory. Lane 8 * m + r hands in the address of
// row r of matrix m; lane l gets values 2 * (l % 4) and the next of row l / 4 of each.
inline void ldmatrix_x4(unsigned (&result)[4], const void* row, EMULATOR_SITE) {
  struct Arguments {
    unsigned* result;
    const char* row;
  };
  Arguments arguments{result, static_cast<const char*>(row)};
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulator::fail("misaligned row for ldmatrix");
  emulator::warp_collective(
      [](void* const* lanes) {
        for (int lane = 0; lane < 32; ++lane)
          for (int m = 0; m < 4; ++m) {
            const auto* holder = static_cast<const Arguments*>(lanes[8 * m + lane / 4]);
            std::memcpy(static_cast<Arguments*>(lanes[lane])->result + m,
                        holder->row + lane % 4 * sizeof(unsigned), sizeof(unsigned));
          }
      },
      &arguments, 0xffffffffu, site);
}

// d += a * b for a [16, 16], b [16, 8] and d [16, 8], a warp's registers together.
template <typename scalar_t>
void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], EMULATOR_SITE) {
  static_assert(std::is_same_v<scalar_t, __half> || std::is_same_v<scalar_t, __nv_bfloat16>);
  struct Arguments {
    float* d;
    const unsigned *a, *b;
  };
  struct Pair {
    float values[2];
    explicit Pair(unsigned bits) {
      scalar_t halves[2];
      std::memcpy(static_cast<void*>(halves), &bits, sizeof(bits));
      for (int i = 0; i < 2; ++i) values[i] = static_cast<float>(halves[i]);
    }
  };
  Arguments arguments{d, a, b};
  emulator::warp_collective(
      [](void* const* lanes) {
        float a[16][16], b[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const auto* own = static_cast<const Arguments*>(lanes[lane]);
          const int group = lane / 4, first = lane % 4 * 2;
          for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 2; ++j)
              a[group + i % 2 * 8][first + i / 2 * 8 + j] = Pair(own->a[i]).values[j];
          for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 2; ++j) b[first + i * 8 + j][group] = Pair(own->b[i]).values[j];
        }
        for (int lane = 0; lane < 32; ++lane) {
          float* d = static_cast<Arguments*>(lanes[lane])->d;
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            double sum = d[i];
            for (int k = 0; k < 16; ++k) sum += double{a[row][k]} * b[k][column];
            d[i] = static_cast<float>(sum);
          }
        }
      },
      &arguments, 0xffffffffu, site);
}
