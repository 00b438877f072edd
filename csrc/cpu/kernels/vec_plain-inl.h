// SPDX-License-Identifier: Apache-2.0
// The rest of a Vec's interface (vec_avx512-inl.h) by its loads and stores, for levels that have no
// instructions of their own for it.

template <class T>
inline Vec rounded(const T*, Vec a) {
  T buffer[kWidth];
  store(buffer, a, Full{});
  return load(buffer, Full{});
}

// Not past the caches on this level: no processor of interest stops here.
template <class T>
inline void stream(T* p, const Vec (&a)[32 / kWidth]) {
  for (int i = 0; i < 32 / kWidth; ++i) store(p + i * kWidth, a[i], Full{});
}

inline void finish_streams() {}

template <class T>
inline void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[j * to_stride + i] = from[i * from_stride + j];
}
