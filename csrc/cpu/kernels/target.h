// SPDX-License-Identifier: Apache-2.0
// FASTRESNET_TARGET_BEGIN("avx2,fma") ... FASTRESNET_TARGET_END: the functions between them may use
// these instructions, and no other function of the library may. That needs no flag per file.
// Nothing may be included between the two: a standard header's inline functions would be compiled
// with instructions that the processor may lack, and the linker might keep that copy for everyone.
#pragma once

#define FASTRESNET_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FASTRESNET_TARGET_BEGIN(isa) \
  FASTRESNET_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define FASTRESNET_TARGET_END _Pragma("clang attribute pop")
#else
#define FASTRESNET_TARGET_BEGIN(isa) _Pragma("GCC push_options") FASTRESNET_PRAGMA(GCC target(isa))
#define FASTRESNET_TARGET_END _Pragma("GCC pop_options")
#endif
