// SPDX-License-Identifier: Apache-2.0
// The ISA level that this process computes with.
#pragma once

#include "cpu/kernels/table.h"

namespace fastresnet::cpu {

// The functions of the level in use: the best one that the processor and the system support, or the
// one that FASTRESNET_ISA names. Throws std::invalid_argument if that is unknown or unsupported.
const KernelTable& kernels();

}  // namespace fastresnet::cpu
