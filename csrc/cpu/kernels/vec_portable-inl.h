// SPDX-License-Identifier: Apache-2.0
// Vec of 8 floats in plain C++, for the default level: any processor, whatever the compiler makes
// of the loops. The interface is described in vec_avx512-inl.h.

constexpr int kWidth = 8;

struct Vec {
  float v[kWidth];
};
struct Lanes {
  uint8_t bits;
};

template <class F>
inline Vec map(F f) {
  Vec r;
  for (int i = 0; i < kWidth; ++i) r.v[i] = f(i);
  return r;
}

inline float to_float(float v) { return v; }
inline float to_float(Half v) { return static_cast<float>(v); }
inline float to_float(BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.x) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

inline Vec broadcast(float x) {
  return map([=](int) { return x; });
}
inline Vec operator+(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return map([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Vec relu(Vec a) {
  return map([&](int i) { return a.v[i] <= 0.0f ? 0.0f : a.v[i]; });
}

template <class T>
inline Vec load(const T* p, Full) {
  return map([&](int i) { return to_float(p[i]); });
}
template <class T>
inline Vec load(const T* p, Part part) {
  Vec r = broadcast(0.0f);
  for (int i = 0; i < part.count; ++i) r.v[i] = to_float(p[i]);
  return r;
}
template <class T>
inline void store(T* p, Vec a, Part part) {
  for (int i = 0; i < part.count; ++i) p[i] = static_cast<T>(a.v[i]);
}
template <class T>
inline void store(T* p, Vec a, Full) {
  store(p, a, Part{kWidth});
}

template <class T>
inline Vec rounded(const T*, Vec a) {
  T buffer[kWidth];
  store(buffer, a, Full{});
  return load(buffer, Full{});
}

// Not past the caches: no processor of interest stops at this level.
template <class T>
inline void stream(T* p, const Vec (&a)[32 / kWidth]) {
  for (int i = 0; i < 32 / kWidth; ++i) store(p + i * kWidth, a[i], Full{});
}

inline void finish_streams() {}

struct Order {
  int v[kWidth];
};
inline Order load_order(const int32_t* p, int more) {
  Order order;
  for (int i = 0; i < kWidth; ++i) order.v[i] = (p[i] + more) % kWidth;
  return order;
}
inline Vec permute(Vec a, Order order) {
  return map([&](int i) { return a.v[order.v[i]]; });
}

inline Lanes passes_relu(Vec z) {
  uint8_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= static_cast<uint8_t>(!(z.v[i] <= 0.0f)) << i;
  return {bits};
}
inline Vec keep(Lanes lanes, Vec a) {
  return map([&](int i) { return lanes.bits >> i & 1 ? a.v[i] : 0.0f; });
}
inline Lanes load_lanes(const uint8_t* p, Full) { return {*p}; }
inline Lanes load_lanes(const uint8_t* p, Part) { return {*p}; }
inline void store_lanes(uint8_t* p, Lanes lanes, Full) { *p = lanes.bits; }
inline void store_lanes(uint8_t* p, Lanes lanes, Part part) {
  *p = static_cast<uint8_t>(lanes.bits & ((1 << part.count) - 1));
}

inline Lanes exceeds(Vec a, Vec b) {
  uint8_t bits = 0;
  for (int i = 0; i < kWidth; ++i)
    bits |= static_cast<uint8_t>(a.v[i] > b.v[i] || a.v[i] != a.v[i]) << i;
  return {bits};
}
inline Vec select(Lanes lanes, Vec yes, Vec no) {
  return map([&](int i) { return lanes.bits >> i & 1 ? yes.v[i] : no.v[i]; });
}

struct Bytes {
  uint8_t v[kWidth];
};

inline Bytes broadcast_byte(uint8_t x) {
  Bytes r;
  std::memset(r.v, x, kWidth);
  return r;
}
inline Bytes select(Lanes lanes, Bytes yes, Bytes no) {
  for (int i = 0; i < kWidth; ++i)
    if (lanes.bits >> i & 1) no.v[i] = yes.v[i];
  return no;
}
inline Lanes equal(Bytes a, Bytes b) {
  uint8_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= static_cast<uint8_t>(a.v[i] == b.v[i]) << i;
  return {bits};
}
inline Bytes load_bytes(const uint8_t* p, Part part) {
  Bytes r = {};
  std::memcpy(r.v, p, part.count);
  return r;
}
inline Bytes load_bytes(const uint8_t* p, Full) { return load_bytes(p, Part{kWidth}); }
inline void store_bytes(uint8_t* p, Bytes a, Part part) { std::memcpy(p, a.v, part.count); }
inline void store_bytes(uint8_t* p, Bytes a, Full) { store_bytes(p, a, Part{kWidth}); }
inline Vec widen(Bytes a) {
  return map([&](int i) { return static_cast<float>(a.v[i]); });
}
inline Bytes truncated(Vec a) {
  Bytes r;
  for (int i = 0; i < kWidth; ++i) r.v[i] = static_cast<uint8_t>(a.v[i]);
  return r;
}

template <class T>
inline void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[j * to_stride + i] = from[i * from_stride + j];
}
