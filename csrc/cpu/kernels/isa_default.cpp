// SPDX-License-Identifier: Apache-2.0
// The default level: any processor.
#include "cpu/kernels/table.h"
#include "cpu/kernels/target.h"
#include "cpu/kernels/vec.h"

namespace fastresnet::cpu::portable {
namespace {

#include "cpu/kernels/vec_portable-inl.h"

#include "cpu/kernels/level-inl.h"

}  // namespace
}  // namespace fastresnet::cpu::portable

const fastresnet::cpu::KernelTable fastresnet::cpu::portable::table =
    fastresnet::cpu::portable::kKernels;
