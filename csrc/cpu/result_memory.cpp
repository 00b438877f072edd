// SPDX-License-Identifier: Apache-2.0
#include "cpu/result_memory.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <vector>

#include "check.h"

namespace fastresnet::cpu {
namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kLeast = 128 << 10;  // smaller tensors are malloc's business

// One range of addresses as large as the machine's memory, of which only what is written takes
// memory. Results take the smallest gap that they fit in, the last one, which is open, only if none
// else will do: what was used before is used again.
class Heap {
 public:
  // nullptr where the range is full or the system gave none.
  void* allocate(int64_t bytes) {
    bytes = (bytes + kPage - 1) / kPage * kPage;
    const std::lock_guard lock(mutex_);
    if (gaps_.empty() && used_.empty()) reserve();
    auto gap = gaps_.end();
    for (auto it = gaps_.begin(); it != gaps_.end(); ++it)
      if (it->second >= bytes && (gap == gaps_.end() || it->second < gap->second)) gap = it;
    if (gap == gaps_.end()) return nullptr;
    const auto [begin, size] = *gap;
    gaps_.erase(gap);
    if (size > bytes) gaps_.emplace(begin + bytes, size - bytes);
    used_.emplace(begin, bytes);
    written_ = std::max(written_, begin + bytes);
    return begin;
  }

  void release(void* memory) {
    const std::lock_guard lock(mutex_);
    const auto block = used_.find(static_cast<char*>(memory));
    char* begin = block->first;
    int64_t size = block->second;
    used_.erase(block);
    const auto after = gaps_.lower_bound(begin);
    if (after != gaps_.begin()) {
      const auto before = std::prev(after);
      if (before->first + before->second == begin) {
        begin = before->first;
        size += before->second;
        gaps_.erase(before);
      }
    }
    if (after != gaps_.end() && begin + size == after->first) {
      size += after->second;
      gaps_.erase(after);
    }
    gaps_.emplace(begin, size);
  }

  int64_t trim() {
    const std::lock_guard lock(mutex_);
    int64_t total = 0;
    for (const auto& [begin, size] : gaps_) {
      const int64_t bytes = std::min(size, written_ - begin);
      if (bytes <= 0) break;
      madvise(begin, bytes, MADV_DONTNEED);
      total += bytes;
    }
    written_ = used_.empty() ? nullptr : used_.rbegin()->first + used_.rbegin()->second;
    return total;
  }

 private:
  void reserve() {
    const int64_t bytes = sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE) / kHugePage * kHugePage;
    void* range = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) return;
    char* begin = static_cast<char*>(range);
    begin += -reinterpret_cast<intptr_t>(begin) & (kHugePage - 1);
    madvise(begin, bytes, MADV_HUGEPAGE);
    gaps_.emplace(begin, bytes);
  }

  std::mutex mutex_;
  std::map<char*, int64_t> gaps_, used_;  // sizes by address; no gap touches another
  char* written_ = nullptr;               // the end of what has taken memory
};

// Never destroyed: tensors may outlive everything else.
Heap& heap() {
  static Heap& instance = *new Heap;
  return instance;
}

// torch 2.11 and newer; the library is built for 2.10, where all results are torch's.
using FromBlob = AOTITorchError (*)(void*, int64_t, const int64_t*, const int64_t*, int64_t,
                                    int32_t, int32_t, int32_t, AtenTensorHandle*, int32_t,
                                    const uint8_t*, int64_t, void (*)(void*, void*), void*);

std::vector<int64_t> strides_of(Sizes sizes, MemoryFormat format) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  const auto set = [&](size_t d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  };
  if (format == MemoryFormat::ChannelsLast)
    for (size_t d : {1, 3, 2, 0}) set(d);
  else
    for (size_t d = sizes.size(); d-- > 0;) set(d);
  return strides;
}

int64_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
      return 1;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    case ScalarType::Double:
      return 8;
    default:
      return 4;
  }
}

}  // namespace

Tensor new_result(Sizes sizes, ScalarType dtype, MemoryFormat format) {
  static const auto from_blob = reinterpret_cast<FromBlob>(dlsym(RTLD_DEFAULT, "torch_from_blob"));
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  int64_t bytes = element_size(dtype);
  for (int64_t size : sizes) bytes *= size;
  void* memory = from_blob && bytes >= kLeast ? heap().allocate(bytes) : nullptr;
  if (memory == nullptr)
    return torch::stable::empty(sizes, dtype, std::nullopt, cpu, std::nullopt, format);

  using torch::stable::detail::from;
  using torch::stable::detail::to;
  AtenTensorHandle handle;
  const std::vector<int64_t> strides = strides_of(sizes, format);
  TORCH_ERROR_CODE_CHECK(from_blob(
      memory, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0,
      to<int32_t>(from(dtype)), to<int32_t>(from(cpu.type())), cpu.index(), &handle,
      to<int32_t>(from(torch::headeronly::Layout::Strided)), nullptr, 0,
      [](void* data, void*) { heap().release(data); }, nullptr));
  return Tensor(handle);
}

bool past_caches(const Tensor& result) {
  constexpr int64_t kLeastPast = 2 << 20, kLine = 64;
  const int64_t row_bytes = result.size(1) * element_size(result.scalar_type());
  return result.numel() * element_size(result.scalar_type()) >= kLeastPast &&
         row_bytes % kLine == 0 && reinterpret_cast<intptr_t>(result.const_data_ptr()) % kLine == 0;
}

Temporary::Temporary(int64_t floats) : floats_(nullptr), of_heap_(false) {
  if (floats == 0) return;
  const int64_t bytes = (floats * int64_t{sizeof(float)} + kPage - 1) / kPage * kPage;
  floats_ = static_cast<float*>(heap().allocate(bytes));
  of_heap_ = floats_ != nullptr;
  if (!of_heap_) floats_ = static_cast<float*>(std::aligned_alloc(kPage, bytes));
  check(floats_ != nullptr, "out of memory: ", bytes, " bytes");
}

Temporary::~Temporary() {
  if (of_heap_)
    heap().release(floats_);
  else
    std::free(floats_);
}

Tensor empty_images(int64_t batch, int64_t channels, int64_t height, int64_t width,
                    ScalarType dtype) {
  return new_result({batch, channels, height, width}, dtype, MemoryFormat::ChannelsLast);
}

int64_t release_memory() { return heap().trim(); }

}  // namespace fastresnet::cpu

STABLE_TORCH_LIBRARY_IMPL(fastresnet, CompositeExplicitAutograd, m) {
  m.impl("empty_images", TORCH_BOX(&fastresnet::cpu::empty_images));
  m.impl("release_memory", TORCH_BOX(&fastresnet::cpu::release_memory));
}
