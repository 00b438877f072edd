// SPDX-License-Identifier: Apache-2.0
// Winograd's minimal filtering, as Lavin and Gray ("Fast Algorithms for Convolutional Neural
// Networks", 2015) use it: a square of `tile` x `tile` outputs of a 3x3 convolution by (tile + 2)^2
// products, where the sum over taps takes 9 * tile^2. In their notation
//
//     y = A^T [(G g G^T) * (B^T d B)] A
//
// with d the (tile + 2)^2 inputs, g the weight, y the outputs. The gradient of the weight is that
// formula's, G^T [(A dy A^T) * (B^T d B)] G; that of the input is a convolution of the same kind.
//
// Winograd<tile> has the five matrices along one dimension. Of the two, F(2, 3) rounds no worse
// than the sum over taps; F(4, 3) loses some bits of float32, which do not show in 16-bit results.

template <int tile>
struct Winograd;

template <>
struct Winograd<2> {
  static constexpr int kSide = 4;

  static void input(const Vec (&d)[4], Vec (&v)[4]) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[1] - d[3];
  }
  static void output(const Vec (&m)[4], Vec (&y)[2]) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
  static void output_gradient(const Vec (&y)[2], Vec (&v)[4]) {
    v[0] = y[0];
    v[1] = y[0] + y[1];
    v[2] = y[0] - y[1];
    v[3] = broadcast(0.0f) - y[1];
  }
  static void weight(const Vec (&g)[3], Vec (&u)[4]) {
    const Vec half = broadcast(0.5f), sum = g[0] + g[2];
    u[0] = g[0];
    u[1] = half * (sum + g[1]);
    u[2] = half * (sum - g[1]);
    u[3] = g[2];
  }
  static void weight_gradient(const Vec (&u)[4], Vec (&g)[3]) {
    const Vec half = broadcast(0.5f), sum = half * (u[1] + u[2]);
    g[0] = u[0] + sum;
    g[1] = half * (u[1] - u[2]);
    g[2] = sum + u[3];
  }
};

template <>
struct Winograd<4> {
  static constexpr int kSide = 6;

  static void input(const Vec (&d)[6], Vec (&v)[6]) {
    const Vec four = broadcast(4.0f), minus_four = broadcast(-4.0f), minus_five = broadcast(-5.0f);
    const Vec even = fma(minus_four, d[2], d[4]), odd = fma(minus_four, d[1], d[3]);
    const Vec even2 = d[4] - d[2], odd2 = d[3] - d[1];
    v[0] = fma(four, d[0], fma(minus_five, d[2], d[4]));
    v[1] = even + odd;
    v[2] = even - odd;
    v[3] = fma(broadcast(2.0f), odd2, even2);
    v[4] = fma(broadcast(-2.0f), odd2, even2);
    v[5] = fma(four, d[1], fma(minus_five, d[3], d[5]));
  }
  static void output(const Vec (&m)[6], Vec (&y)[4]) {
    const Vec sum = m[1] + m[2], difference = m[1] - m[2];
    const Vec sum2 = m[3] + m[4], difference2 = m[3] - m[4];
    y[0] = m[0] + sum + sum2;
    y[1] = fma(broadcast(2.0f), difference2, difference);
    y[2] = fma(broadcast(4.0f), sum2, sum);
    y[3] = fma(broadcast(8.0f), difference2, difference) + m[5];
  }
  static void output_gradient(const Vec (&y)[4], Vec (&v)[6]) {
    const Vec even = y[0] + y[2], odd = y[1] + y[3];
    const Vec even2 = fma(broadcast(4.0f), y[2], y[0]);
    const Vec odd2 = broadcast(2.0f) * fma(broadcast(4.0f), y[3], y[1]);
    v[0] = y[0];
    v[1] = even + odd;
    v[2] = even - odd;
    v[3] = even2 + odd2;
    v[4] = even2 - odd2;
    v[5] = y[3];
  }
  static void weight(const Vec (&g)[3], Vec (&u)[6]) {
    const Vec sum = broadcast(-1.0f / 6) * (g[0] + g[2]), middle = broadcast(1.0f / 6) * g[1];
    const Vec outer = fma(broadcast(1.0f / 24), g[0], broadcast(1.0f / 6) * g[2]);
    const Vec inner = broadcast(1.0f / 12) * g[1];
    u[0] = broadcast(0.25f) * g[0];
    u[1] = sum - middle;
    u[2] = sum + middle;
    u[3] = outer + inner;
    u[4] = outer - inner;
    u[5] = g[2];
  }
  static void weight_gradient(const Vec (&u)[6], Vec (&g)[3]) {
    const Vec sixth = broadcast(1.0f / 6), sum = sixth * (u[1] + u[2]), sum2 = u[3] + u[4];
    g[0] = fma(broadcast(0.25f), u[0], fma(broadcast(1.0f / 24), sum2, broadcast(0.0f) - sum));
    g[1] = fma(broadcast(1.0f / 12), u[3] - u[4], sixth * (u[2] - u[1]));
    g[2] = fma(sixth, sum2, u[5] - sum);
  }
};

// to(i, j, value) for each value of the matrix times [from(i, j)] times the matrix transposed;
// `times` is one of the above.
template <int in, int out, class Times, class From, class To>
inline void transform(Times times, From from, To to) {
  Vec columns[in][out];
#pragma GCC unroll 6
  for (int j = 0; j < in; ++j) {
    Vec values[in];
#pragma GCC unroll 6
    for (int i = 0; i < in; ++i) values[i] = from(i, j);
    times(values, columns[j]);
  }
#pragma GCC unroll 6
  for (int i = 0; i < out; ++i) {
    Vec values[in], results[out];
#pragma GCC unroll 6
    for (int j = 0; j < in; ++j) values[j] = columns[j][i];
    times(values, results);
#pragma GCC unroll 6
    for (int j = 0; j < out; ++j) to(i, j, results[j]);
  }
}
