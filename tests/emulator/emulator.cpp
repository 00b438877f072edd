// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the host: every CUDA thread is a fiber with a stack of its own, all on one
// thread of the host. A fiber runs until it waits for others, so the order in which fibers are
// taken is a schedule; it is drawn from a seed, and a fiber may be held back before any store to
// global memory until nobody else can run. It shows wrong results, not speed.
#include "emulator.h"

#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <algorithm>
#include <array>
#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "memory.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kGuardBytes = 4096;
constexpr int kWarp = 32;
// After so many looks in a row a thread lets others run at each; after so many more it is stuck.
constexpr int kPatience = 64;
constexpr int kLivelock = 2000;

struct Block;

struct Copy {
  void* shared;
  const void* global;
  size_t bytes;
};

// A store that other blocks do not see yet: while one of them runs, memory holds what was there
// before, and these bytes are here.
struct Unfenced {
  char* address;
  size_t bytes;
  std::array<char, 16> hidden;
  int thread, epoch;
};

enum class State { ready, at_barrier, at_collective, done };

struct Fiber {
  char* memory = nullptr;  // a guard page, then the stack
  bool started = false;
  std::jmp_buf resume;
  State state = State::done;
  bool held = false;
  Block* block = nullptr;
  int index = 0;
  std::source_location site;  // of the barrier or collective
  Collective collective = nullptr;
  void* arguments = nullptr;
  unsigned mask = 0;
  const volatile void* looked_at = nullptr;
  int looks = 0;                                      // at that address, one after another
  std::vector<Copy> open_copies;                      // of no group yet
  std::vector<std::vector<Copy>> copy_groups;         // not yet performed, oldest first
  std::vector<std::pair<uint32_t, uint32_t>> visits;  // place in the source, accesses made there
};

struct Block {
  uint3 index{};
  std::vector<std::unique_ptr<Fiber>> fibers;  // kept from launch to launch, with their stacks
  std::span<std::unique_ptr<Fiber>> threads;   // those in use
  std::vector<char> shared;                    // its shared memory while another block runs
  std::vector<std::array<char, 16>> dynamic_shared;
  std::vector<Request> requests;
  std::vector<Unfenced> unfenced;  // oldest first
  int epoch = 0;                   // how many barriers it has passed
  int waiting = 0, done = 0;
};

struct Schedule {
  uint64_t seed = 0;  // 0: in order
  int resident_blocks = 1;
  int hold_permille = 0;  // of the stores to global memory
};

// All of this is ordinary memory, since thread-local memory is the kernels' shared memory.
Schedule schedule;
Faults planted;
std::mt19937_64 random_source;
GlobalMemory memory;
std::map<const void*, size_t> dynamic_limits;
std::set<unsigned> barrier_lines, fence_lines;
unsigned skipped_line;  // whose barrier or fence does nothing
std::string error;

const std::function<void()>* kernel;
size_t dynamic_bytes, dynamic_limit;  // of the kernel
std::vector<std::unique_ptr<Block>> pool;
Block* current_block;
Fiber* current;
bool communicates;  // blocks, in this launch
std::jmp_buf scheduler;

// ---- Fibers. Entered through ucontext once, then switched by longjmp, which makes no system call.

// AddressSanitizer has to know on which stack the program is.
struct Stack {
  const void* bottom = nullptr;
  size_t size = 0;
};
Stack scheduler_stack;

void leave_for([[maybe_unused]] const Stack& stack) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, stack.bottom, stack.size);
#endif
}

Stack arrived() {
  Stack left;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &left.bottom, &left.size);
#endif
  return left;
}

[[noreturn]] void leave_fiber() {
  leave_for(scheduler_stack);
  _longjmp(scheduler, 1);
}

[[gnu::noinline]] void to_scheduler() {
  if (_setjmp(current->resume) == 0) leave_fiber();
  scheduler_stack = arrived();
}

void finish_thread() {
  Block& block = *current->block;
  current->state = State::done;
  ++block.done;
  if (block.waiting > 0) fail("a thread exits while others wait at a barrier");
  if (!current->open_copies.empty() || !current->copy_groups.empty())
    fail("a thread exits with copies that it has not waited for");
  for (const auto& other : block.threads)
    if (other->state == State::at_collective && other->index / kWarp == current->index / kWarp &&
        (other->mask >> (current->index % kWarp) & 1))
      fail("a lane exits while others of its warp wait for it");
}

void fiber_main() {
  scheduler_stack = arrived();
  for (;;) {
    (*kernel)();
    finish_thread();
    to_scheduler();  // and back, for a later block
  }
}

[[gnu::noinline]] void run(Fiber& fiber) {
  current = &fiber;
  const unsigned width = blockDim.x, plane = blockDim.x * blockDim.y, index = fiber.index;
  threadIdx = {index % width, index / width % blockDim.y, index / plane};
  if (_setjmp(scheduler) != 0) {
    arrived();
    return;
  }
  if (fiber.memory != nullptr) leave_for({fiber.memory + kGuardBytes, kStackBytes});
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  if (fiber.memory == nullptr) {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    mprotect(memory, kGuardBytes, PROT_NONE);
    fiber.memory = static_cast<char*>(memory);
    leave_for({fiber.memory + kGuardBytes, kStackBytes});
  }
  static ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.memory + kGuardBytes;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
}

// ---- Shared memory: this library's thread-local variables.

thread_local char shared_anchor;

struct Segment {
  char* begin = nullptr;
  size_t size = 0;
};

Segment find_shared_memory() {
  static Segment found;
  if (found.begin != nullptr) return found;
  *const_cast<volatile char*>(&shared_anchor) = 0;  // allocated at its first use
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        const auto here = reinterpret_cast<uintptr_t>(&find_shared_memory);
        bool ours = false;
        Segment segment;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
          if (header.p_type == PT_LOAD && here >= begin && here < begin + header.p_memsz)
            ours = true;
          if (header.p_type == PT_TLS)
            segment = {static_cast<char*>(info->dlpi_tls_data), header.p_memsz};
        }
        if (ours) *static_cast<Segment*>(result) = segment;
        return ours ? 1 : 0;
      },
      &found);
  if (found.begin == nullptr) std::abort();
  return found;
}

void exchange(Unfenced& store) {
  std::swap_ranges(store.address, store.address + store.bytes, store.hidden.begin());
}
void hide_stores(Block& block) {
  std::for_each(block.unfenced.rbegin(), block.unfenced.rend(), exchange);
}
void show_stores(Block& block) {
  std::for_each(block.unfenced.begin(), block.unfenced.end(), exchange);
}

// From here on blocks may ask for what others store. Most kernels never do.
void begin_to_communicate() {
  if (communicates) return;
  communicates = true;
  for (auto& block : pool)
    if (block.get() != current_block) hide_stores(*block);
}

void enter(Block& block) {
  if (current_block != &block) {
    const Segment segment = find_shared_memory();
    if (current_block != nullptr) {
      std::memcpy(current_block->shared.data(), segment.begin, segment.size);
      if (communicates) hide_stores(*current_block);
    }
    std::memcpy(segment.begin, block.shared.data(), segment.size);
    if (communicates) show_stores(block);
    current_block = &block;
  }
  blockIdx = block.index;
}

// ---- The schedule.

// A store: the moment at which others may be ahead of this thread.
void overtake() {
  if (schedule.hold_permille == 0) return;
  if (static_cast<int>(random_source() % 1000) >= schedule.hold_permille) return;
  current->held = true;
  to_scheduler();
}

template <typename Items>
void shuffle(Items& items) {
  if (schedule.seed != 0) std::shuffle(items.begin(), items.end(), random_source);
}

void start(Block& block, int64_t linear, int threads) {
  block.index = {static_cast<unsigned>(linear % gridDim.x),
                 static_cast<unsigned>(linear / gridDim.x % gridDim.y),
                 static_cast<unsigned>(linear / gridDim.x / gridDim.y)};
  block.waiting = block.done = block.epoch = 0;
  // All bits set: NaN to whoever reads what nobody has written.
  block.shared.assign(find_shared_memory().size, static_cast<char>(0xff));
  std::array<char, 16> unwritten;
  unwritten.fill(static_cast<char>(0xff));
  block.dynamic_shared.assign((dynamic_bytes + 15) / 16, unwritten);
  if (block.fibers.size() < static_cast<size_t>(threads)) block.fibers.resize(threads);
  block.threads = std::span(block.fibers).first(threads);
  for (int i = 0; i < threads; ++i) {
    auto& fiber = block.threads[i];
    if (fiber == nullptr) fiber = std::make_unique<Fiber>();
    fiber->state = State::ready;
    fiber->held = false;
    fiber->block = &block;
    fiber->index = i;
    fiber->looked_at = nullptr;
    fiber->looks = 0;
    fiber->open_copies.clear();
    fiber->copy_groups.clear();
    fiber->visits.clear();
  }
  // A new kernel in this block's place must not meet the memory of the last one.
  if (current_block == &block) current_block = nullptr;
}

enum class Round { stuck, looked, ran };

// Runs each thread of the block that can run up to where it waits. Whether any could, and whether
// it did more than look. Unless all goes in order, every other warp sits a round out, so that warps
// get ahead of one another between barriers.
Round run_round(Block& block) {
  Round round = Round::stuck;
  std::vector<int> order(block.threads.size());
  std::iota(order.begin(), order.end(), 0);
  shuffle(order);
  enter(block);
  const uint64_t sitting_out = schedule.seed == 0 ? 0 : random_source();
  for (int i : order) {
    Fiber& fiber = *block.threads[i];
    if (fiber.state != State::ready || fiber.held) continue;
    if (sitting_out >> (i / kWarp) & 1) {
      round = std::max(round, Round::looked);
      continue;
    }
    run(fiber);
    const bool looks = fiber.state == State::ready && fiber.looks > kPatience;
    round = std::max(round, looks ? Round::looked : Round::ran);
    if (!error.empty()) break;
  }
  return round;
}

// What the kernel has written of its library's static shared memory, at least.
void finish(Block& block) {
  memory.finish_block(block.requests);
  enter(block);
  block.unfenced.clear();
  const Segment segment = find_shared_memory();
  const size_t used = segment.size - std::count(segment.begin, segment.begin + segment.size,
                                                static_cast<char>(0xff));
  if (used > kSharedLimit)
    error = "a kernel with more static shared memory than a device accepts";
  else if (used + dynamic_bytes > dynamic_limit)
    error = "more static and dynamic shared memory together than the kernel may have";
}

// Lets one of the threads that were held back go on, if there is any.
bool release_held(const std::vector<Block*>& active) {
  std::vector<Fiber*> held;
  for (Block* block : active)
    for (auto& fiber : block->threads)
      if (fiber->held) held.push_back(fiber.get());
  if (held.empty()) return false;
  held[random_source() % held.size()]->held = false;
  return true;
}

void run_blocks(int threads) {
  std::vector<int64_t> order(int64_t{gridDim.x} * gridDim.y * gridDim.z);
  std::iota(order.begin(), order.end(), 0);
  shuffle(order);
  size_t next = 0;
  const size_t resident = std::min<size_t>(schedule.resident_blocks, order.size());
  while (pool.size() < resident) pool.push_back(std::make_unique<Block>());

  std::vector<Block*> active;
  for (size_t i = 0; i < resident; ++i) {
    start(*pool[i], order[next++], threads);
    active.push_back(pool[i].get());
  }
  while (!active.empty()) {
    Round round = Round::stuck;
    shuffle(active);
    for (Block*& block : active) {
      round = std::max(round, run_round(*block));
      if (!error.empty()) return;
      if (block->done == threads) {
        finish(*block);
        if (next < order.size())
          start(*block, order[next++], threads);
        else
          block = nullptr;
      }
    }
    std::erase(active, nullptr);
    if (round == Round::ran || active.empty() || release_held(active)) continue;
    if (round == Round::stuck) {
      error = "deadlock: no thread can run";
      return;
    }
  }
}

}  // namespace

void launch(dim3 grid, dim3 block, size_t dynamic, size_t limit,
            const std::function<void()>& body) {
  if (!error.empty()) return;
  const int64_t threads = int64_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > 1024 || block.z > 64 || grid.x < 1 || grid.x > 0x7fffffffu ||
      grid.y < 1 || grid.y > 65535 || grid.z < 1 || grid.z > 65535) {
    error = "a launch that no device accepts";
    return;
  }
  if (dynamic > limit) {
    error = "more dynamic shared memory than the kernel may have";
    return;
  }
  dynamic_bytes = dynamic, dynamic_limit = limit;
  communicates = false;
  for (auto& used : pool) used->unfenced.clear();
  memory.begin_launch();
  gridDim = grid;
  blockDim = block;
  kernel = &body;
  run_blocks(static_cast<int>(threads));
  current_block = nullptr;
  current = nullptr;
  if (!error.empty()) {  // fibers stopped in the middle start afresh
    for (auto& stopped : pool)
      for (auto& fiber : stopped->fibers) fiber->started = false;
  }
}

bool is_same(const std::source_location& a, const std::source_location& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

void barrier(const std::source_location& site) {
  barrier_lines.insert(site.line());
  if (site.line() == skipped_line) return;
  Block& block = *current->block;
  current->site = site;
  current->state = State::at_barrier;
  if (block.done > 0) fail("line %u: a barrier that other threads exited before", site.line());
  if (++block.waiting < static_cast<int>(block.threads.size())) return to_scheduler();
  for (auto& fiber : block.threads)
    if (!is_same(fiber->site, site))
      fail("threads of one block wait at different barriers, lines %u and %u", fiber->site.line(),
           site.line());
  block.waiting = 0;
  ++block.epoch;
  for (auto& fiber : block.threads) fiber->state = State::ready;
}

int lane() { return current->index % kWarp; }

void warp_collective(Collective perform, void* arguments, unsigned mask,
                     const std::source_location& site) {
  Block& block = *current->block;
  if (!(mask >> lane() & 1)) fail("lane %d calls for a mask %08x without it", lane(), mask);
  current->collective = perform;
  current->arguments = arguments;
  current->mask = mask;
  current->site = site;
  current->state = State::at_collective;

  void* lanes[kWarp] = {};
  const size_t first = current->index - lane();
  for (int i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    if (first + i >= block.threads.size()) fail("mask %08x names a lane that is not there", mask);
    const Fiber& other = *block.threads[first + i];
    if (other.state == State::done) fail("mask %08x names lane %d, which has exited", mask, i);
    if (other.state != State::at_collective) return to_scheduler();
    if (other.collective != perform || other.mask != mask || !is_same(other.site, site))
      fail("lanes of one warp wait for one another in different collectives");
    lanes[i] = other.arguments;
  }
  perform(lanes);
  for (int i = 0; i < kWarp; ++i)
    if (mask >> i & 1) block.threads[first + i]->state = State::ready;
}

size_t& dynamic_shared_limit(const void* kernel) {
  return dynamic_limits.try_emplace(kernel, kSharedLimit).first->second;
}

void* dynamic_shared() { return current->block->dynamic_shared.data(); }

void look(const volatile void* address) {
  begin_to_communicate();
  current->looks = address == current->looked_at ? current->looks + 1 : 0;
  current->looked_at = address;
  if (current->looks > kLivelock) fail("livelock: a thread waits for what never happens");
  if (current->looks > kPatience) to_scheduler();
}

void copy_later(void* shared, const void* global, size_t bytes) {
  // Whoever reads it too early finds NaN, not what was there.
  std::memset(shared, 0xff, bytes);
  current->open_copies.push_back({shared, global, bytes});
}

void close_copy_group() {
  current->copy_groups.push_back(std::move(current->open_copies));
  current->open_copies.clear();
}

void wait_for_copies(int groups_left) {
  auto& groups = current->copy_groups;
  while (static_cast<int>(groups.size()) > groups_left) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.shared, copy.global, copy.bytes);
    groups.erase(groups.begin());
  }
}

void access(const volatile void* address, size_t bytes, Access kind,
            const std::source_location& site) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  if (const char* wrong = memory.access(begin, bytes, kind)) {
    fail("%s %s of %zu bytes", wrong, kind == Access::store ? "store" : "load", bytes);
  }
  const uint32_t place = site.line() << 12 | (site.column() & 0xfff);
  auto visit = std::find_if(current->visits.begin(), current->visits.end(),
                            [&](const auto& known) { return known.first == place; });
  if (visit == current->visits.end()) visit = current->visits.insert(visit, {place, 0});
  const uint64_t turn = visit->second++, warp = current->index / kWarp;
  current->block->requests.push_back(
      {uint64_t{place} << 32 | turn << 5 | warp, begin / kSectorBytes, kind});
  if (kind == Access::store) overtake();
}

void store(void* address, const void* value, size_t bytes) {
  char* to = static_cast<char*>(address);
  Block& block = *current->block;
  Unfenced& open =
      block.unfenced.emplace_back(Unfenced{to, bytes, {}, current->index, block.epoch});
  std::memcpy(open.hidden.data(), to, bytes);
  std::memcpy(to, value, bytes);
}

// Orders what this thread has stored, and what others of its block had before the last barrier.
void fence(const std::source_location& site) {
  fence_lines.insert(site.line());
  if (site.line() == skipped_line) return;
  const Block& block = *current->block;
  std::erase_if(current->block->unfenced, [&](const Unfenced& store) {
    return store.thread == current->index || store.epoch < block.epoch;
  });
}

bool may_set(const void* address, size_t bytes) {
  const bool declared = memory.holds(reinterpret_cast<uintptr_t>(address), bytes);
  if (!declared) error = "outside of every tensor: the host's memset";
  return declared && !planted.no_memset;
}

Faults& faults() { return planted; }

void fail(const char* format, ...) {
  char text[256], where[96];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  std::snprintf(where, sizeof(where), " (block %u,%u thread %u,%u)", blockIdx.x, blockIdx.y,
                threadIdx.x, threadIdx.y);
  error = std::string(text) + where;
  leave_fiber();
}

int copy_lines(const std::set<unsigned>& found, unsigned* lines, int capacity) {
  int n = 0;
  for (unsigned line : found)
    if (n++ < capacity) lines[n - 1] = line;
  return n;
}

}  // namespace emulator

// ---- What the tests call, through ctypes.

extern "C" {

// Forgets the memory, counts, faults and error of the last run.
void emulator_reset() {
  emulator::memory.forget();
  emulator::planted = {};
  emulator::skipped_line = 0;
  emulator::error.clear();
}

void emulator_schedule(uint64_t seed, int resident_blocks, int hold_permille) {
  emulator::schedule = {seed, resident_blocks, hold_permille};
  emulator::random_source.seed(seed);
}

void emulator_declare(const void* address, int64_t bytes) {
  emulator::memory.declare(address, bytes);
}

void emulator_skip(unsigned line) { emulator::skipped_line = line; }
void emulator_skip_memset() { emulator::planted.no_memset = true; }
void emulator_spoil_tickets(int error) { emulator::planted.ticket_error = error; }

// Lines of the barriers, or fences, met since the library was loaded; returns how many there are.
int emulator_barriers(unsigned* lines, int capacity) {
  return emulator::copy_lines(emulator::barrier_lines, lines, capacity);
}
int emulator_fences(unsigned* lines, int capacity) {
  return emulator::copy_lines(emulator::fence_lines, lines, capacity);
}

// Six numbers: bytes, transactions and sectors loaded, then stored, since the last reset.
void emulator_traffic(int64_t* counts) {
  const auto& traffic = emulator::memory.traffic();
  for (const auto& count : {traffic.loaded, traffic.stored}) {
    *counts++ = count.bytes;
    *counts++ = count.transactions;
    *counts++ = count.sectors;
  }
}

const char* emulator_error() { return emulator::error.c_str(); }
}
