// Loops compiled for the plain machine and for AVX2, the better one chosen when the module is loaded.
#pragma once

// Only GCC on x86-64 Linux: elsewhere, and under sanitizers (whose runtime is not yet up when the
// choice is made), there is the plain one alone. Results are the same: no fused multiply-add.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define GEN3R_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define GEN3R_CLONES
#endif
