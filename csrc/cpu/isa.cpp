// SPDX-License-Identifier: Apache-2.0
// Chooses one table of kernels for the process, at the first use.
#include "cpu/isa.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastresnet::cpu {
namespace {

struct Level {
  const char* name;
  bool (*supported)();
  const KernelTable* table;
};

#if defined(__x86_64__)

struct CpuidLeaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;

  CpuidLeaf(unsigned leaf, unsigned subleaf) {
    __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx);
  }
};

bool bit(unsigned word, int i) { return word >> i & 1; }

// Which register states the system saves and restores; a feature without them is unusable.
uint64_t saved_states() {
  if (!bit(CpuidLeaf(1, 0).ecx, 27)) return 0;  // OSXSAVE
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

// Linux gives tile data to a process that asks for it.
[[maybe_unused]] bool request_tile_data() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

bool has_avx2() {
  constexpr uint64_t kYmm = 0x6;
  const CpuidLeaf one(1, 0), seven(7, 0);
  return (saved_states() & kYmm) == kYmm && bit(seven.ebx, 5) && bit(one.ecx, 12) &&  // avx2, fma
         bit(one.ecx, 29);                                                            // f16c
}
bool has_avx512() {
  constexpr uint64_t kZmm = 0xe6;
  const CpuidLeaf seven(7, 0);
  return has_avx2() && (saved_states() & kZmm) == kZmm && bit(seven.ebx, 16) &&  // f
         bit(seven.ebx, 17) && bit(seven.ebx, 30) && bit(seven.ebx, 31);         // dq, bw, vl
}
bool has_avx512_bf16() { return has_avx512() && bit(CpuidLeaf(7, 1).eax, 5); }
#if defined(FASTRESNET_EMULATED_AMX)  // tests/emulator/amx.h: tiles that need no processor
bool has_amx() { return has_avx512_bf16(); }
#else
bool has_amx() {
  const CpuidLeaf seven(7, 0);
  return has_avx512_bf16() && bit(seven.edx, 24) && bit(seven.edx, 22) &&  // tile, bf16
         request_tile_data();
}
#endif

// Intel's processors since Sapphire Rapids (the first with avx512_fp16) multiply pairs of bf16 at
// half the speed of floats; AMD's at twice that.
bool multiplies_pairs_slowly() {
  const CpuidLeaf zero(0, 0);
  const bool intel = zero.ebx == signature_INTEL_ebx && zero.edx == signature_INTEL_edx &&
                     zero.ecx == signature_INTEL_ecx;
  return intel && bit(CpuidLeaf(7, 0).edx, 23);
}

#endif

// Best first. A level that the processor lacks falls through to the next.
std::vector<Level> levels() {
  std::vector<Level> all{
#if defined(__x86_64__)
      {"amx", has_amx, &amx::table},
      {"avx512_bf16", has_avx512_bf16, &avx512_bf16::table},
      {"avx512", has_avx512, &avx512::table},
      {"avx2", has_avx2, &avx2::table},
#endif
      {"default", [] { return true; }, &portable::table},
  };
#if defined(__x86_64__)
  if (multiplies_pairs_slowly()) std::swap(all[1], all[2]);
#endif
  return all;
}

Level choose() {
  const char* variable = std::getenv("FASTRESNET_ISA");
  const std::string wanted = variable ? variable : "";
  std::string known;
  for (const Level& level : levels()) {
    if (wanted.empty() ? level.supported() : wanted == level.name) {
      check(level.supported(), "FASTRESNET_ISA=", wanted,
            ": this processor or system does not support that level");
      return level;
    }
    known += (known.empty() ? "" : ", ") + std::string(level.name);
  }
  throw std::invalid_argument("FASTRESNET_ISA=" + wanted + " is unknown; known levels: " + known);
}

const Level& level_in_use() {
  static const Level chosen = choose();
  return chosen;
}

std::string isa() { return level_in_use().name; }

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (const Level& level : levels())
    if (level.supported()) names.push_back(level.name);
  return names;
}

}  // namespace

const KernelTable& kernels() { return *level_in_use().table; }

}  // namespace fastresnet::cpu

STABLE_TORCH_LIBRARY_IMPL(fastresnet, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&fastresnet::cpu::isa));
  m.impl("isa_levels", TORCH_BOX(&fastresnet::cpu::isa_levels));
}
