// SPDX-License-Identifier: Apache-2.0
// The amx level: avx512_bf16 and AMX tiles with bf16 (Sapphire Rapids and newer). Batch norm has
// no matrix product, so its kernels are those of avx512_bf16, compiled for this target.
#if defined(__x86_64__)
#include "cpu/kernels/table.h"
#include "cpu/kernels/target.h"
#include "cpu/kernels/vec.h"

#define FASTRESNET_AVX512_BF16
#define FASTRESNET_AMX
FASTRESNET_TARGET_BEGIN(
    "amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
namespace fastresnet::cpu::amx {
namespace {

#include "cpu/kernels/vec_avx512-inl.h"

#include "cpu/kernels/level-inl.h"

}  // namespace
}  // namespace fastresnet::cpu::amx
FASTRESNET_TARGET_END

const fastresnet::cpu::KernelTable fastresnet::cpu::amx::table = fastresnet::cpu::amx::kKernels;
#endif
