// The queries of NeighborTree, compiled for several instruction sets; the machine chooses one.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "fusion_tree.h"
#include "parallel.h"

#ifdef __GNUC__
#define GEN3R_INLINE inline __attribute__((always_inline))
#else
#error "fusion_kernel.h needs the vector types of GCC or clang"
#endif

#define GEN3R_ISA baseline
#define GEN3R_LANES 2
#include "fusion_kernel.h"
#undef GEN3R_ISA
#undef GEN3R_LANES

#if defined(__x86_64__) && !defined(__clang__)  // clang has no such pragma
#define GEN3R_DISPATCH 1
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,popcnt")
#define GEN3R_ISA avx2
#define GEN3R_LANES 4
#include "fusion_kernel.h"
#undef GEN3R_ISA
#undef GEN3R_LANES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,popcnt")
#define GEN3R_ISA avx512
#define GEN3R_LANES 8
#include "fusion_kernel.h"
#undef GEN3R_ISA
#undef GEN3R_LANES
#pragma GCC pop_options
#endif

namespace gen3r {
namespace {

constexpr int64_t kRun = 64;  // blocks that a thread takes at a time

using Run = void (*)(const NeighborTree&, size_t, size_t, size_t, double*);

template <bool kMean>
Run choose([[maybe_unused]] Isa isa) {
#ifdef GEN3R_DISPATCH
    if (isa == Isa::avx512 && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        return avx512::run<kMean>;
    }
    if (isa != Isa::baseline && __builtin_cpu_supports("avx2")) return avx2::run<kMean>;
#endif
    return baseline::run<kMean>;
}

}  // namespace

template <bool kMean>
std::vector<double> NeighborTree::distances(size_t count, Isa isa) const {
    std::vector<double> out(size());
    const Run run = choose<kMean>(isa);
    parallel_for(static_cast<int64_t>(buffer_.block_count()), kRun, threads_,
                 [&](int64_t begin, int64_t end) { run(*this, count, begin, end, out.data()); });
    return out;
}

std::vector<double> NeighborTree::mean_distances(size_t count, Isa isa) const {
    return distances<true>(count, isa);
}

std::vector<double> NeighborTree::kth_distances(size_t count, Isa isa) const {
    return distances<false>(count, isa);
}

}  // namespace gen3r
