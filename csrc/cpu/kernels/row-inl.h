// SPDX-License-Identifier: Apache-2.0
// A row of channels in memory: its vectors, what is asked for ahead of time, and what is written
// past the caches.

// Calls body(first channel, Full or Part) over all channels.
template <class Body>
inline void for_channels(int64_t channels, Body body) {
  int64_t c = 0;
  for (; c + kWidth <= channels; c += kWidth) body(c, Full{});
  if (c < channels) body(c, Part{static_cast<int>(channels - c)});
}

// The vectors of a block of channels, in one row.
constexpr int kBlockVecs = kChannelBlock / kWidth;

// Calls body(first channel, vectors, Full or Part) so that every channel of a block is met: all
// together where the block is full, one vector at a time elsewhere.
template <class Body>
inline void for_block_vectors(int64_t channels, int64_t first, Body body) {
  if (first + kChannelBlock <= channels) {
    body(first, std::integral_constant<int, kBlockVecs>{}, Full{});
    return;
  }
  for_channels(channels - first, [&](int64_t c, auto part) {
    body(first + c, std::integral_constant<int, 1>{}, part);
  });
}

// Values that lie `stride` apart, where the level has no instruction for it.
template <class T>
inline Vec load_apart(const T* p, int64_t stride) {
  float values[kWidth];
  for (int i = 0; i < kWidth; ++i) values[i] = static_cast<float>(p[i * stride]);
  return load(values, Full{});
}

// How far ahead memory is asked for, a line with every line that is read: this reads twice as fast
// as asking for many lines at a time, and a third faster than the processor left to itself.
constexpr int64_t kBytesAhead = 4096;

// Rows of so many bytes that lie so far ahead.
constexpr int64_t rows_ahead(int64_t row_bytes) { return (kBytesAhead - 1) / row_bytes + 1; }

// Asks for the lines of memory that hold `count` values. Forced inline, as is what calls it and
// does nothing else: gcc takes a function that only prefetches for one without effect, and drops
// the call.
template <class T>
__attribute__((always_inline)) inline void prefetch_values(const T* values, int64_t count) {
  constexpr int64_t kStep = kLineBytes / sizeof(T);
  for (int64_t i = 0; i < count; i += kStep) __builtin_prefetch(values + i);
}

// Large results go past the caches: whole lines at a time, which need not be read before.
template <class T, int vectors, class P>
inline void store_values(T* to, const Vec (&values)[vectors], P part, bool past_caches) {
  if constexpr (vectors % kBlockVecs == 0) {
    if (past_caches) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v += kBlockVecs)
        stream(to + v * kWidth, reinterpret_cast<const Vec(&)[kBlockVecs]>(values[v]));
      return;
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) store(to + v * kWidth, values[v], part);
}
