// SPDX-License-Identifier: Apache-2.0
// Batch norm with its epilogue over [rows, channels] (channels_last), forward and backward.
// Included once per ISA level, after that level's vec_*-inl.h, inside its namespace and target.
// It knows nothing of threads: the entries in bn_act.cpp give each a range of rows.
//
// Every pass reads its tensors once. The forward takes one row after another. The others take a
// block of several rows at a time, so that a channel's coefficients and sums are loaded once for
// all of them. The rows of a block are read side by side, which hides their order from the
// hardware's prefetcher; so each block asks for the next one in memory order (3 to 4 times the
// bandwidth where the tensor is not in cache). Sums run over kTileRows rows in float and are then
// added up in double, which keeps the error of the total at a few roundings.

constexpr int64_t kTileRows = 64;

// A block of `count` rows from `row`, and where the block lies that comes after it.
template <int n>
struct Block {
  static constexpr int count = n;
  int64_t row, next;

  // The share of the next block that belongs to the step at channel c.
  template <class T>
  __attribute__((always_inline)) void prefetch(const T* tensor, int64_t channels, int64_t c) const {
    prefetch_values(tensor + next * channels + c * n, n * kWidth);
  }
};

template <int n, class Step>
inline void for_blocks(int64_t begin, int64_t end, Step step) {
  int64_t row = begin;
  for (; row + n <= end; row += n) step(Block<n>{row, row + n});
  for (; row < end; ++row) step(Block<1>{row, row + 1});
}

// The passes that follow a reduction visit the rows from the last to the first: what the reduction
// read last is still in cache.
template <int n, class Step>
inline void for_blocks_backwards(int64_t begin, int64_t end, Step step) {
  int64_t row = end;
  for (; row - n >= begin; row -= n) step(Block<n>{row - n, row - 2 * n});
  for (; row > begin; --row) step(Block<1>{row - 1, row - 2});
}

template <class T>
void bn_moments_of(const T* __restrict__ x, int64_t channels, int64_t begin, int64_t end,
                   float* __restrict__ scratch, double* __restrict__ mean,
                   double* __restrict__ m2) {
  // Sums are taken about a value near the mean, so a large mean costs no digits.
  float* __restrict__ shift = scratch;
  float* __restrict__ sum = scratch + channels;
  float* __restrict__ square = scratch + 2 * channels;
  const int64_t sample = std::min<int64_t>(end - begin, 8);
  for_channels(channels, [&](int64_t c, auto part) {
    Vec total = broadcast(0.0f);
    for (int64_t r = begin; r < begin + sample; ++r)
      total = total + load(x + r * channels + c, part);
    store(shift + c, total * broadcast(1.0f / sample), part);
    store(sum + c, broadcast(0.0f), part);
    store(square + c, broadcast(0.0f), part);
  });
  std::fill(mean, mean + channels, 0.0);
  std::fill(m2, m2 + channels, 0.0);
  for (int64_t tile = begin; tile < end; tile += kTileRows) {
    for_blocks<8>(tile, std::min(end, tile + kTileRows), [&](auto block) {
      for_channels(channels, [&](int64_t c, auto part) {
        block.prefetch(x, channels, c);
        const Vec centre = load(shift + c, part);
        Vec s = load(sum + c, part), q = load(square + c, part);
        for (int i = 0; i < block.count; ++i) {
          const Vec d = load(x + (block.row + i) * channels + c, part) - centre;
          s = s + d;
          q = fma(d, d, q);
        }
        store(sum + c, s, part);
        store(square + c, q, part);
      });
    });
    for (int64_t c = 0; c < channels; ++c) {
      mean[c] += sum[c];
      m2[c] += square[c];
      sum[c] = square[c] = 0.0f;
    }
  }
  const double count = static_cast<double>(end - begin);
  for (int64_t c = 0; c < channels; ++c) {
    const double offset = mean[c] / count;
    m2[c] = std::max(0.0, m2[c] - offset * mean[c]);
    mean[c] = shift[c] + offset;
  }
}

template <class T, Epilogue epilogue>
void bn_forward_of(const BnForwardParams& p, int64_t begin, int64_t end) {
  const int64_t channels = p.channels, ahead = rows_ahead(channels * sizeof(T));
  const T* __restrict__ x = static_cast<const T*>(p.x);
  const T* __restrict__ residual = static_cast<const T*>(p.residual);
  T* __restrict__ out = static_cast<T*>(p.out);
  for (int64_t row = begin; row < end; ++row)
    for (int64_t first = 0; first < channels; first += kChannelBlock)
      for_block_vectors(channels, first, [&](int64_t c, auto count, auto part) {
        constexpr int kVecs = count;
        const int64_t at = row * channels + c;
        prefetch_values(x + at + ahead * channels, kVecs * kWidth);
        if constexpr (has_residual(epilogue))
          prefetch_values(residual + at + ahead * channels, kVecs * kWidth);
        Vec values[kVecs];
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          const int64_t i = c + v * kWidth;
          Vec z = fma(load(x + at + v * kWidth, part), load(p.scale + i, part),
                      load(p.shift + i, part));
          if constexpr (has_residual(epilogue)) {
            Vec other = load(residual + at + v * kWidth, part);
            if constexpr (epilogue == Epilogue::add_bn_relu)
              other =
                  fma(other, load(p.residual_scale + i, part), load(p.residual_shift + i, part));
            z = z + other;
            store_lanes(p.mask + row * mask_bytes(channels) + i / 8, passes_relu(z), part);
          }
          values[v] = epilogue == Epilogue::none ? z : relu(z);
        }
        store_values(out + at, values, part, p.past_caches);
      });
  finish_streams();
}

// What tells where the gradient passes: for relu, z computed again exactly as in the forward.
template <Epilogue epilogue>
struct Activation {
  template <class P>
  Activation(const float*, const float*, int64_t, P) {}
};
template <>
struct Activation<Epilogue::relu> {
  Vec scale, shift;

  template <class P>
  Activation(const float* scale, const float* shift, int64_t c, P part)
      : scale(load(scale + c, part)), shift(load(shift + c, part)) {}
};

// The gradient behind the ReLU, of kWidth channels of one row.
template <class T, Epilogue epilogue, class P>
inline Vec masked_gradient(const BnBackwardParams& p, const T* grad,
                           const Activation<epilogue>& activation, int64_t row, int64_t c, Vec x,
                           P part) {
  const Vec g = load(grad + row * p.channels + c, part);
  if constexpr (epilogue == Epilogue::none) {
    return g;
  } else if constexpr (epilogue == Epilogue::relu) {
    return keep(passes_relu(fma(x, activation.scale, activation.shift)), g);
  } else {
    return keep(load_lanes(p.mask + row * mask_bytes(p.channels) + c / 8, part), g);
  }
}

template <class T, Epilogue epilogue>
void bn_backward_sums_of(const BnBackwardParams& p, int64_t begin, int64_t end,
                         float* __restrict__ scratch, double* __restrict__ sums) {
  constexpr int kSums = epilogue == Epilogue::add_bn_relu ? 3 : 2;
  const int64_t channels = p.channels;
  const T* __restrict__ x = static_cast<const T*>(p.x);
  const T* __restrict__ grad = static_cast<const T*>(p.grad);
  const T* __restrict__ residual = static_cast<const T*>(p.residual);
  float* __restrict__ sum_g = scratch;
  float* __restrict__ sum_gx = scratch + channels;
  float* __restrict__ sum_gr = scratch + 2 * channels;
  std::fill(scratch, scratch + kSums * channels, 0.0f);
  std::fill(sums, sums + kSums * channels, 0.0);
  for (int64_t tile = begin; tile < end; tile += kTileRows) {
    for_blocks<4>(tile, std::min(end, tile + kTileRows), [&](auto block) {
      for_channels(channels, [&](int64_t c, auto part) {
        block.prefetch(x, channels, c);
        block.prefetch(grad, channels, c);
        if constexpr (kSums == 3) block.prefetch(residual, channels, c);
        const Vec mean = load(p.mean + c, part);
        const Activation<epilogue> activation(p.scale, p.shift, c, part);
        Vec s_g = load(sum_g + c, part), s_gx = load(sum_gx + c, part);
        [[maybe_unused]] Vec s_gr = s_g;
        if constexpr (kSums == 3) s_gr = load(sum_gr + c, part);
        for (int i = 0; i < block.count; ++i) {
          const int64_t at = (block.row + i) * channels + c;
          const Vec value = load(x + at, part);
          const Vec g = masked_gradient(p, grad, activation, block.row + i, c, value, part);
          s_g = s_g + g;
          s_gx = fma(g, value - mean, s_gx);
          if constexpr (kSums == 3)
            s_gr = fma(g, load(residual + at, part) - load(p.residual_mean + c, part), s_gr);
        }
        store(sum_g + c, s_g, part);
        store(sum_gx + c, s_gx, part);
        if constexpr (kSums == 3) store(sum_gr + c, s_gr, part);
      });
    });
    for (int64_t i = 0; i < kSums * channels; ++i) {
      sums[i] += scratch[i];
      scratch[i] = 0.0f;
    }
  }
}

// The coefficients of kWidth channels, and dx from them. Without offset and slope (in evaluation)
// dx does not depend on x, not even where x is NaN.
struct InputGradientVec {
  bool of_statistics;
  Vec mean, scale, offset, slope;

  template <class P>
  InputGradientVec(const float* mean, const BnCoefficients& k, int64_t c, P part)
      : of_statistics(k.slope != nullptr),
        mean(load(mean + c, part)),
        scale(load(k.scale + c, part)),
        offset(of_statistics ? load(k.offset + c, part) : broadcast(0.0f)),
        slope(of_statistics ? load(k.slope + c, part) : broadcast(0.0f)) {}

  Vec operator()(Vec g, Vec x) const {
    return of_statistics ? scale * ((g - offset) - slope * (x - mean)) : scale * g;
  }
};

template <class T, Epilogue epilogue>
void bn_backward_of(const BnBackwardParams& p, const BnCoefficients& k, const BnCoefficients& rk,
                    int64_t begin, int64_t end) {
  const int64_t channels = p.channels;
  const T* __restrict__ x = static_cast<const T*>(p.x);
  const T* __restrict__ grad = static_cast<const T*>(p.grad);
  const T* __restrict__ residual = static_cast<const T*>(p.residual);
  T* __restrict__ dx = static_cast<T*>(p.dx);
  T* __restrict__ dresidual = static_cast<T*>(p.dresidual);
  for_blocks_backwards<4>(begin, end, [&](auto block) {
    for_channels(channels, [&](int64_t c, auto part) {
      block.prefetch(x, channels, c);
      block.prefetch(grad, channels, c);
      if constexpr (epilogue == Epilogue::add_bn_relu) block.prefetch(residual, channels, c);
      const InputGradientVec gradient(p.mean, k, c, part);
      const Activation<epilogue> activation(p.scale, p.shift, c, part);
      for (int i = 0; i < block.count; ++i) {
        const int64_t at = (block.row + i) * channels + c;
        const Vec value = load(x + at, part);
        const Vec g = masked_gradient(p, grad, activation, block.row + i, c, value, part);
        store(dx + at, gradient(g, value), part);
        if constexpr (epilogue == Epilogue::add_relu) store(dresidual + at, g, part);
        if constexpr (epilogue == Epilogue::add_bn_relu) {
          const InputGradientVec residual_gradient(p.residual_mean, rk, c, part);
          store(dresidual + at, residual_gradient(g, load(residual + at, part)), part);
        }
      }
    });
  });
}

// From run-time dtype and epilogue to the instance: f(a value of the dtype, a constant).
template <Epilogue e>
struct Constant {
  static constexpr Epilogue value = e;
};
template <class F>
inline void for_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::float32:
      return f(float{});
    case DType::bfloat16:
      return f(BFloat16{});
    case DType::float16:
      return f(Half{});
  }
}
template <class F>
inline void for_instance(DType dtype, Epilogue epilogue, F f) {
  for_dtype(dtype, [&](auto zero) {
    switch (epilogue) {
      case Epilogue::none:
        return f(zero, Constant<Epilogue::none>{});
      case Epilogue::relu:
        return f(zero, Constant<Epilogue::relu>{});
      case Epilogue::add_relu:
        return f(zero, Constant<Epilogue::add_relu>{});
      case Epilogue::add_bn_relu:
        return f(zero, Constant<Epilogue::add_bn_relu>{});
    }
  });
}

void bn_moments(const void* x, DType dtype, int64_t channels, int64_t begin, int64_t end,
                float* scratch, double* mean, double* m2) {
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    bn_moments_of(static_cast<const T*>(x), channels, begin, end, scratch, mean, m2);
  });
}

void bn_forward(const BnForwardParams& p, int64_t begin, int64_t end) {
  for_instance(p.dtype, p.epilogue, [&](auto zero, auto epilogue) {
    bn_forward_of<decltype(zero), decltype(epilogue)::value>(p, begin, end);
  });
}

void bn_backward_sums(const BnBackwardParams& p, int64_t begin, int64_t end, float* scratch,
                      double* sums) {
  for_instance(p.dtype, p.epilogue, [&](auto zero, auto epilogue) {
    bn_backward_sums_of<decltype(zero), decltype(epilogue)::value>(p, begin, end, scratch, sums);
  });
}

void bn_backward(const BnBackwardParams& p, const BnCoefficients& x, const BnCoefficients& residual,
                 int64_t begin, int64_t end) {
  for_instance(p.dtype, p.epilogue, [&](auto zero, auto epilogue) {
    bn_backward_of<decltype(zero), decltype(epilogue)::value>(p, x, residual, begin, end);
  });
}
