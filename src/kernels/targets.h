// The instruction sets that kernels are compiled for; before Highway's foreach_target.h.
#pragma once

#include <hwy/detect_compiler_arch.h>
#if HWY_ARCH_X86
// Nothing here gains from AVX3_DL; processors older than SSE4 are served by the baseline.
#define HWY_DISABLED_TARGETS (HWY_AVX3_DL | HWY_SSSE3)
#elif HWY_ARCH_ARM
// Arrays of vectors need a size that the compiler knows.
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
#endif
