// SPDX-License-Identifier: Apache-2.0
// Vec of 8 floats on AVX2, FMA and F16C. The interface is described in vec_avx512-inl.h.

constexpr int kWidth = 8;

struct Vec {
  __m256 v;
};
struct Lanes {
  __m256 v;  // all bits of a lane set, or none
};

inline Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// maxps returns its second operand where either is NaN.
inline Vec relu(Vec a) { return {_mm256_max_ps(_mm256_setzero_ps(), a.v)}; }

inline Vec widen(const Half*, __m128i v) { return {_mm256_cvtph_ps(v)}; }
inline Vec widen(const BFloat16*, __m128i v) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16))};
}

inline Vec load(const float* p, Full) { return {_mm256_loadu_ps(p)}; }
template <class T>
inline Vec load(const T* p, Full) {
  return widen(p, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline Vec load_apart(const float* p, int64_t stride) {
  const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const __m256i at = _mm256_mullo_epi32(lane, _mm256_set1_epi32(static_cast<int>(stride)));
  return {_mm256_i32gather_ps(p, at, 4)};
}

struct Order {
  __m256i v;
};
inline Order load_order(const int32_t* p, int more) {
  const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_add_epi32(lanes, _mm256_set1_epi32(more))};
}
inline Vec permute(Vec a, Order order) { return {_mm256_permutevar8x32_ps(a.v, order.v)}; }

inline __m128i narrow(const Half*, Vec a) {
  return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline __m128i narrow(const BFloat16*, Vec a) {
  // Round to nearest even by an integer addition, which would carry a NaN into an infinity.
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i high =
      _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
  return _mm256_castsi256_si128(
      _mm256_permute4x64_epi64(_mm256_packus_epi32(high, _mm256_setzero_si256()), 0xd8));
}

inline void store(float* p, Vec a, Full) { _mm256_storeu_ps(p, a.v); }
template <class T>
inline void store(T* p, Vec a, Full) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(p, a));
}

template <class T>
inline Vec load(const T* p, Part part) {
  T buffer[kWidth] = {};
  std::memcpy(buffer, p, part.count * sizeof(T));
  return load(buffer, Full{});
}
template <class T>
inline void store(T* p, Vec a, Part part) {
  T buffer[kWidth];
  store(buffer, a, Full{});
  std::memcpy(p, buffer, part.count * sizeof(T));
}

inline Vec rounded(const float*, Vec a) { return a; }
template <class T>
inline Vec rounded(const T* p, Vec a) {
  return widen(p, narrow(p, a));
}

inline void stream(float* p, const Vec (&a)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) _mm256_stream_ps(p + i * kWidth, a[i].v);
}
template <class T>
inline void stream(T* p, const Vec (&a)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p + i * kWidth), narrow(p, a[i]));
}

inline void finish_streams() { _mm_sfence(); }

inline Lanes passes_relu(Vec z) { return {_mm256_cmp_ps(z.v, _mm256_setzero_ps(), _CMP_NLE_UQ)}; }
inline Vec keep(Lanes lanes, Vec a) { return {_mm256_and_ps(lanes.v, a.v)}; }
inline Lanes load_lanes(const uint8_t* p, Full) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(*p), bit);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit))};
}
inline Lanes load_lanes(const uint8_t* p, Part) { return load_lanes(p, Full{}); }
inline void store_lanes(uint8_t* p, Lanes lanes, Full) {
  *p = static_cast<uint8_t>(_mm256_movemask_ps(lanes.v));
}
inline void store_lanes(uint8_t* p, Lanes lanes, Part part) {
  *p = static_cast<uint8_t>(_mm256_movemask_ps(lanes.v) & ((1 << part.count) - 1));
}

inline Lanes exceeds(Vec a, Vec b) {
  const __m256 nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
  return {_mm256_or_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ), nan)};
}
inline Vec select(Lanes lanes, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, lanes.v)}; }

struct Bytes {
  __m256i v;  // each widened to its lane
};

inline Bytes broadcast_byte(uint8_t x) { return {_mm256_set1_epi32(x)}; }
inline Bytes select(Lanes lanes, Bytes yes, Bytes no) {
  return {_mm256_blendv_epi8(no.v, yes.v, _mm256_castps_si256(lanes.v))};
}
inline Lanes equal(Bytes a, Bytes b) { return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.v, b.v))}; }
inline Bytes load_bytes(const uint8_t* p, Full) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
inline void store_bytes(uint8_t* p, Bytes a, Full) {
  const __m128i words =
      _mm_packus_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
inline Bytes load_bytes(const uint8_t* p, Part part) {
  uint8_t buffer[kWidth] = {};
  std::memcpy(buffer, p, part.count);
  return load_bytes(buffer, Full{});
}
inline void store_bytes(uint8_t* p, Bytes a, Part part) {
  uint8_t buffer[kWidth];
  store_bytes(buffer, a, Full{});
  std::memcpy(p, buffer, part.count);
}
inline Vec widen(Bytes a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline Bytes truncated(Vec a) { return {_mm256_cvttps_epi32(a.v)}; }

template <class T>
inline void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  static_assert(sizeof(T) == sizeof(float));
  // Squares of 8: pairs of rows, then of pairs, within 128 bits; then those.
  for (int row = 0; row < 16; row += 8)
    for (int column = 0; column < 16; column += 8) {
      const auto* first = reinterpret_cast<const float*>(from + row * from_stride + column);
      auto* last = reinterpret_cast<float*>(to + column * to_stride + row);
      __m256 a[8], b[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(first + i * from_stride);
#pragma GCC unroll 4
      for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
      }
#pragma GCC unroll 2
      for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256 low = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
        const __m256 high = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
        _mm256_storeu_ps(last + i * to_stride, low);
        _mm256_storeu_ps(last + (i + 4) * to_stride, high);
      }
    }
}
