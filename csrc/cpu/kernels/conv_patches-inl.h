// SPDX-License-Identifier: Apache-2.0
// Staging of patches: all that a kernel reads for an output, as the channels of one pixel
// (conv_plan.h).

// Of each output: rows of the kernel, then columns, then channels.
template <class T>
struct PatchValues {
  const T* x;
  const ConvShape& given;

  struct Output {
    int64_t image, row, column;
  };
  Output output(int64_t index) const {
    const int64_t row = index / given.out_width;
    return {row / given.out_height, row % given.out_height, index % given.out_width};
  }
  Output behind(Output o) const {
    if (++o.column < given.out_width) return o;
    o.column = 0;
    if (++o.row < given.out_height) return o;
    return {o.image + 1, 0, 0};
  }

  // Writes the patch's values one behind another, and up to kMore more.
  static constexpr int64_t kMore = 32 / sizeof(T);
  void gather(const Output& output, T* patch) const {
    const ConvShape& s = given;
    const int64_t row_size = s.kernel_width * s.channels, pitch = s.width * s.channels;
    const int64_t row = output.row * s.stride - s.padding;
    const int64_t column = output.column * s.stride - s.padding;
    const T* from = x + (output.image * s.height + row) * pitch + column * s.channels;
    const T* end = x + s.batch * s.height * pitch;
    const Range rows = met(row, s.kernel_height, s.height);
    const Range columns = met(column, s.kernel_width, s.width);
    const T* last = from + (s.kernel_height - 1) * pitch + row_size;
    if (rows.size() == s.kernel_height && columns.size() == s.kernel_width && end - last >= kMore) {
      for (int64_t r = 0; r < s.kernel_height; ++r, from += pitch, patch += row_size)
        for (int64_t i = 0; i < row_size; i += kMore) {
          std::memcpy(patch + i, from + i, kMore * sizeof(T));
          __asm__ volatile("" ::: "memory");  // or gcc makes a call of the loop
        }
      return;
    }
    std::fill(patch, patch + s.kernel_height * row_size, T(0.0f));
    for (int64_t r = rows.begin; r < rows.end; ++r)
      std::copy(from + r * pitch + columns.begin * s.channels,
                from + r * pitch + columns.end * s.channels,
                patch + r * row_size + columns.begin * s.channels);
  }
};

// As stage_run of other values, whose pixels lie in memory: here those are outputs.
template <class E, class T>
inline void stage_run(const Plane& plane, Range panels, int64_t channels, int64_t pixel,
                      int64_t count, int64_t from, int64_t, const PatchValues<T>& values) {
  // Gathered before the first is read: a load waits for each store that it overlaps with.
  constexpr int64_t kPatches = 8;
  constexpr int64_t kValues = kLargestPatch + 2 * kChannelBlock;
  alignas(64) T patches[kPatches * kValues];
  const int64_t first = panels.begin * kLineChannels<E>, padded = panels.end * kLineChannels<E>;
  auto output = values.output(from);
  for (int64_t begin = 0; begin < count; begin += kPatches) {
    const int64_t some = std::min(kPatches, count - begin);
    for (int64_t i = 0; i < some; ++i, output = values.behind(output)) {
      T* patch = patches + i * kValues;
      values.gather(output, patch);
      std::memset(patch + channels, 0, kChannelBlock * sizeof(T));
    }
    constexpr bool kCopied = std::is_same_v<T, typename E::Value>;
    constexpr int64_t kStep = kCopied ? kLineChannels<E> : kWidth;
    for (int64_t c = first; c < padded; c += kStep) {
      float* line =
          plane.lines + c / kLineChannels<E> * plane.panel_stride + (pixel + begin) * kLine;
      for (int64_t i = 0; i < some; ++i, line += kLine) {
        const T* patch = patches + i * kValues + c;
        if constexpr (kCopied)
          std::memcpy(line, patch, kLine * sizeof(float));
        else
          E::store_values(line, c % kLineChannels<E>, load(patch, Full{}));
      }
    }
  }
}
