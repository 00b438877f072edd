// SPDX-License-Identifier: Apache-2.0
// Vec of 16 floats on AVX-512; with FASTRESNET_AVX512_BF16, bf16 is rounded by its own instruction.
//
// The interface of every Vec: kWidth lanes (a multiple of 8, so that a mask is whole bytes),
// broadcast, +, -, *, fma, relu (a NaN stays), load and store of float, BFloat16 and Half with
// Full{} or, for the last channels, Part{count}; Lanes, one bit a lane: passes_relu, keep (zero
// elsewhere), load_lanes, store_lanes (bit i of the bytes is lane i; bits beyond a Part are 0),
// exceeds (greater, or the first is NaN), select; load_apart, of float alone and only
// where it is faster than row-inl.h's; Bytes, one a lane: broadcast_byte, select, equal,
// load_bytes, store_bytes, widen (to floats), truncated (from floats in 0..255); Order, the lane
// that each lane of a permuted vector comes from: load_order (each of them `more` lanes on, modulo
// kWidth), permute; transpose of 16 x 16 floats or words, rows a stride apart; rounded, stream,
// finish_streams.

constexpr int kWidth = 16;

struct Vec {
  __m512 v;
};
struct Lanes {
  __mmask16 bits;
};

inline __mmask16 first(Part part) { return static_cast<__mmask16>((1u << part.count) - 1); }

inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// maxps returns its second operand where either is NaN.
inline Vec relu(Vec a) { return {_mm512_max_ps(_mm512_setzero_ps(), a.v)}; }

inline Vec widen(const Half*, __m256i bits) { return {_mm512_cvtph_ps(bits)}; }
inline Vec widen(const BFloat16*, __m256i bits) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline __m256i narrow(const Half*, Vec a) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline __m256i narrow(const BFloat16*, Vec a) {
#if defined(FASTRESNET_AVX512_BF16)
  return (__m256i)_mm512_cvtneps_pbh(a.v);
#else
  // Round to nearest even by an integer addition, which would carry a NaN into an infinity.
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16));
#endif
}

inline Vec load(const float* p, Full) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const float* p, Part part) { return {_mm512_maskz_loadu_ps(first(part), p)}; }
template <class T>
inline Vec load(const T* p, Full) {
  return widen(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <class T>
inline Vec load(const T* p, Part part) {
  return widen(p, _mm256_maskz_loadu_epi16(first(part), p));
}

// Values that lie `stride` apart.
inline Vec load_apart(const float* p, int64_t stride) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i at = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(stride)));
  return {_mm512_i32gather_ps(at, p, 4)};
}

struct Order {
  __m512i v;
};
inline Order load_order(const int32_t* p, int more) {
  return {_mm512_add_epi32(_mm512_loadu_si512(p), _mm512_set1_epi32(more))};
}
inline Vec permute(Vec a, Order order) { return {_mm512_permutexvar_ps(order.v, a.v)}; }

inline void store(float* p, Vec a, Full) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, Part part) { _mm512_mask_storeu_ps(p, first(part), a.v); }
template <class T>
inline void store(T* p, Vec a, Full) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(p, a));
}
template <class T>
inline void store(T* p, Vec a, Part part) {
  _mm256_mask_storeu_epi16(p, first(part), narrow(p, a));
}

// What storing makes of it.
inline Vec rounded(const float*, Vec a) { return a; }
template <class T>
inline Vec rounded(const T* p, Vec a) {
  return widen(p, narrow(p, a));
}

// 32 values, past the caches; p on a line. Other threads see them after finish_streams.
inline void stream(float* p, const Vec (&a)[2]) {
  _mm512_stream_ps(p, a[0].v);
  _mm512_stream_ps(p + 16, a[1].v);
}
template <class T>
inline void stream(T* p, const Vec (&a)[2]) {
  const __m512i low = _mm512_castsi256_si512(narrow(p, a[0]));
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_inserti64x4(low, narrow(p, a[1]), 1));
}

inline void finish_streams() { _mm_sfence(); }

inline Lanes passes_relu(Vec z) {
  return {_mm512_cmp_ps_mask(z.v, _mm512_setzero_ps(), _CMP_NLE_UQ)};
}
inline Vec keep(Lanes lanes, Vec a) { return {_mm512_maskz_mov_ps(lanes.bits, a.v)}; }
inline Lanes load_lanes(const uint8_t* p, Full) {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return {bits};
}
inline Lanes load_lanes(const uint8_t* p, Part part) {
  uint16_t bits = 0;
  std::memcpy(&bits, p, (part.count + 7) / 8);
  return {bits};
}
inline void store_lanes(uint8_t* p, Lanes lanes, Full) {
  const uint16_t bits = lanes.bits;
  std::memcpy(p, &bits, sizeof bits);
}
inline void store_lanes(uint8_t* p, Lanes lanes, Part part) {
  const uint16_t bits = lanes.bits & first(part);
  std::memcpy(p, &bits, (part.count + 7) / 8);
}

template <class T>
inline void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  static_assert(sizeof(T) == sizeof(float));
  // Pairs of rows, then of pairs, within 128 bits; then those by fours.
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * from_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 low = _mm512_shuffle_f32x4(a[i], a[4 + i], 0x88);
    const __m512 high = _mm512_shuffle_f32x4(a[i], a[4 + i], 0xdd);
    const __m512 low2 = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x88);
    const __m512 high2 = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xdd);
    _mm512_storeu_ps(to + i * to_stride, _mm512_shuffle_f32x4(low, low2, 0x88));
    _mm512_storeu_ps(to + (8 + i) * to_stride, _mm512_shuffle_f32x4(low, low2, 0xdd));
    _mm512_storeu_ps(to + (4 + i) * to_stride, _mm512_shuffle_f32x4(high, high2, 0x88));
    _mm512_storeu_ps(to + (12 + i) * to_stride, _mm512_shuffle_f32x4(high, high2, 0xdd));
  }
}

inline Lanes exceeds(Vec a, Vec b) {
  const __mmask16 greater = _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ);
  return {static_cast<__mmask16>(greater | _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q))};
}
inline Vec select(Lanes lanes, Vec yes, Vec no) {
  return {_mm512_mask_mov_ps(no.v, lanes.bits, yes.v)};
}

struct Bytes {
  __m128i v;
};

inline Bytes broadcast_byte(uint8_t x) { return {_mm_set1_epi8(static_cast<char>(x))}; }
inline Bytes select(Lanes lanes, Bytes yes, Bytes no) {
  return {_mm_mask_mov_epi8(no.v, lanes.bits, yes.v)};
}
inline Lanes equal(Bytes a, Bytes b) { return {_mm_cmpeq_epi8_mask(a.v, b.v)}; }
inline Bytes load_bytes(const uint8_t* p, Full) {
  return {_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))};
}
inline Bytes load_bytes(const uint8_t* p, Part part) {
  return {_mm_maskz_loadu_epi8(first(part), p)};
}
inline void store_bytes(uint8_t* p, Bytes a, Full) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), a.v);
}
inline void store_bytes(uint8_t* p, Bytes a, Part part) {
  _mm_mask_storeu_epi8(p, first(part), a.v);
}
inline Vec widen(Bytes a) { return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(a.v))}; }
inline Bytes truncated(Vec a) { return {_mm512_cvtepi32_epi8(_mm512_cvttps_epi32(a.v))}; }
