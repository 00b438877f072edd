// SPDX-License-Identifier: Apache-2.0
// Pixel: red, green, blue and a fourth value that nobody reads, as four floats. On x86-64 with the
// instructions that every such processor has, in the encoding of the level that includes this.

// Weights of bilinear interpolation add up to 2^14, so that each is a signed 16-bit word.
constexpr int kBlendBits = 14;

#if defined(__x86_64__)

struct Pixel {
  __m128 v;
};

inline Pixel load_pixel(const float* p) { return {_mm_loadu_ps(p)}; }
inline Pixel operator+(Pixel a, Pixel b) { return {_mm_add_ps(a.v, b.v)}; }
inline Pixel operator*(Pixel a, Pixel b) { return {_mm_mul_ps(a.v, b.v)}; }
inline Pixel clamped(Pixel a, Pixel low, Pixel high) {
  return {_mm_min_ps(_mm_max_ps(a.v, low.v), high.v)};
}
template <int channel>
inline Pixel everywhere(Pixel a) {
  return {_mm_shuffle_ps(a.v, a.v, channel * 0x55)};
}

inline Pixel pixel_of(const uint8_t* p) {
  int32_t bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  const __m128i zero = _mm_setzero_si128();
  const __m128i words = _mm_unpacklo_epi8(_mm_cvtsi32_si128(bytes), zero);
  return {_mm_cvtepi32_ps(_mm_unpacklo_epi16(words, zero))};
}

// 2^14 times the mean of two pixels at `top` and the two below. `left`, `right`: the weights of the
// upper one in the low word, of the lower one in the high.
inline Pixel blend(const uint8_t* top, const uint8_t* bottom, uint32_t left, uint32_t right) {
  const __m128i zero = _mm_setzero_si128();
  const __m128i pairs =
      _mm_unpacklo_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(top)),
                        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bottom)));
  const __m128i sums = _mm_add_epi32(
      _mm_madd_epi16(_mm_unpacklo_epi8(pairs, zero), _mm_set1_epi32(static_cast<int32_t>(left))),
      _mm_madd_epi16(_mm_unpackhi_epi8(pairs, zero), _mm_set1_epi32(static_cast<int32_t>(right))));
  return {_mm_cvtepi32_ps(sums)};
}

// All four values.
inline void store(float* p, Pixel a) { _mm_storeu_ps(p, a.v); }
inline void store(BFloat16* p, Pixel a) {
#if defined(FASTRESNET_AVX512_BF16)
  const __m128i packed = (__m128i)_mm_cvtneps_pbh(a.v);
#else
  // Round to nearest even by an integer addition; no NaN comes of bytes and finite numbers.
  const __m128i bits = _mm_castps_si128(a.v);
  const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
  const __m128i rounded = _mm_add_epi32(bits, _mm_add_epi32(odd, _mm_set1_epi32(0x7fff)));
  const __m128i high = _mm_srai_epi32(rounded, 16);  // signed, as the pack below takes it
  const __m128i packed = _mm_packs_epi32(high, high);
#endif
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), packed);
}

#else

struct Pixel {
  float v[4];
};

template <class F>
inline Pixel map_pixel(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}

inline Pixel load_pixel(const float* p) {
  return map_pixel([=](int i) { return p[i]; });
}
inline Pixel operator+(Pixel a, Pixel b) {
  return map_pixel([&](int i) { return a.v[i] + b.v[i]; });
}
inline Pixel operator*(Pixel a, Pixel b) {
  return map_pixel([&](int i) { return a.v[i] * b.v[i]; });
}
inline Pixel clamped(Pixel a, Pixel low, Pixel high) {
  return map_pixel([&](int i) { return std::min(std::max(a.v[i], low.v[i]), high.v[i]); });
}
template <int channel>
inline Pixel everywhere(Pixel a) {
  return map_pixel([&](int) { return a.v[channel]; });
}

inline Pixel pixel_of(const uint8_t* p) {
  return map_pixel([=](int i) { return static_cast<float>(p[i]); });
}

inline Pixel blend(const uint8_t* top, const uint8_t* bottom, uint32_t left, uint32_t right) {
  return map_pixel([=](int i) {
    return static_cast<float>(top[i] * (left & 0xffff) + bottom[i] * (left >> 16) +
                              top[4 + i] * (right & 0xffff) + bottom[4 + i] * (right >> 16));
  });
}

template <class T>
inline void store(T* p, Pixel a) {
  for (int i = 0; i < 4; ++i) p[i] = static_cast<T>(a.v[i]);
}

#endif

template <int channels, class T>
inline void store_channels(T* p, Pixel a) {
  T values[4];
  store(values, a);
  std::memcpy(p, values, channels * sizeof(T));
}
