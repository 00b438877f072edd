// SPDX-License-Identifier: Apache-2.0
// Where the CPU operators' results lie. Torch's allocator hands the memory of large tensors back to
// the system when they die, and each step of a training pays again for the pages to be mapped and
// cleared: 0.15 to 0.25 s of processor time for a ResNet-50 at batch 16. Large results therefore
// lie in memory that stays ours, in huge pages, and is used again by the next step.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "layout.h"

namespace fastresnet::cpu {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

Tensor new_result(Sizes sizes, ScalarType dtype, MemoryFormat format = MemoryFormat::Contiguous);

// Channels_last.
inline Tensor new_result_like(const Tensor& x) {
  return new_result(x.sizes(), x.scalar_type(), MemoryFormat::ChannelsLast);
}

// Uninitialised, channels_last: for batches of images, which come and go like results.
Tensor empty_images(int64_t batch, int64_t channels, int64_t height, int64_t width,
                    ScalarType dtype);

// Whether a result is so large that whoever reads it next will not find it in a cache of its own,
// and may be written past the caches by whole lines, which are then not read before: at twice the
// speed.
bool past_caches(const Tensor& result);

// Memory for the time of a call, from where results lie: what one call has done with is the next
// one's, or a result's. It holds what its last user left.
class Temporary {
 public:
  explicit Temporary(int64_t floats);
  ~Temporary();
  Temporary(const Temporary&) = delete;
  Temporary& operator=(const Temporary&) = delete;

  float* floats() const { return floats_; }

 private:
  float* floats_;
  bool of_heap_;
};

// Gives memory that no tensor uses back to the system; returns how many bytes that may be.
int64_t release_memory();

}  // namespace fastresnet::cpu
