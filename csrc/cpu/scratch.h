// SPDX-License-Identifier: Apache-2.0
// Memory that stays from call to call: fresh pages would cost more than the kernels save. It is as
// large as the largest call needed. Instances are thread_local.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "check.h"

namespace fastresnet::cpu {

class Scratch {
 public:
  // Finite values, whatever the last user left.
  float* floats(int64_t count) {
    if (count > size_) {
      memory_.reset();
      const bool large = count * int64_t{sizeof(float)} >= kLargePage / 2;
      const int64_t alignment = large ? kLargePage : kPage;
      const int64_t bytes =
          (count * int64_t{sizeof(float)} + alignment - 1) / alignment * alignment;
      memory_.reset(static_cast<float*>(std::aligned_alloc(alignment, bytes)));
      size_ = memory_ ? count : 0;
      check(memory_ != nullptr, "out of memory: ", bytes, " bytes of scratch");
      if (large) madvise(memory_.get(), bytes, MADV_HUGEPAGE);
      std::fill(memory_.get(), memory_.get() + count, 0.0f);
    }
    return memory_.get();
  }

 private:
  static constexpr int64_t kPage = 4096, kLargePage = 2 << 20;
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace fastresnet::cpu
