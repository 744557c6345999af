// Vectors of LANES floats, and products of small matrices made of them. GCC's vector extensions (Clang has them, too)
// turn this one source into AVX2, AVX-512, NEON or SSE.

#pragma once

#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(__AVX512F__)
#define NATIVE_LANES 16
#elif defined(__AVX2__)
#define NATIVE_LANES 8
#else
#define NATIVE_LANES 4
#endif
#if !defined(LANES)  // another number is for tests: the compiler makes such vectors of several registers
#define LANES NATIVE_LANES
#endif

#define INLINE inline __attribute__((always_inline))
// Keeps a value in a register that the compiler would otherwise read from memory again
#if LANES != NATIVE_LANES
#define KEEP(x)
#elif defined(__x86_64__)
#define KEEP(x) asm("" : "+v"(x))
#elif defined(__aarch64__)
#define KEEP(x) asm("" : "+w"(x))
#else
#define KEEP(x)
#endif

namespace {

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef float unaligned_vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

INLINE vec load(const float* p) { return *(const unaligned_vec*)p; }
INLINE void store(float* p, vec v) { *(unaligned_vec*)p = v; }
INLINE void add(float* p, vec v) { store(p, load(p) + v); }
INLINE vec splat(float x) { return x - vec{}; }

constexpr int rounded_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// The larger or smaller of each two values; NaN if b is
#if LANES == NATIVE_LANES && defined(__AVX512F__)
INLINE vec larger(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE vec smaller(vec a, vec b) { return _mm512_min_ps(a, b); }
#elif LANES == NATIVE_LANES && defined(__AVX2__)
INLINE vec larger(vec a, vec b) { return _mm256_max_ps(a, b); }
INLINE vec smaller(vec a, vec b) { return _mm256_min_ps(a, b); }
#else
INLINE vec larger(vec a, vec b) { return a > b ? a : b; }
INLINE vec smaller(vec a, vec b) { return a < b ? a : b; }
#endif

// exp(-z) for |z| < 87, there within 2e-7 of its value; beyond, the values at the ends. NaN stays NaN.
INLINE vec exp_of_minus(vec z) {
    const vec t = smaller(splat(126), larger(splat(-126), z * -1.44269504f));  // exp(-z) = 2^t = 2^n 2^f, |f| <= 1/2
    const vec shifted = t + 12582912.f;  // 1.5 2^23: rounds t to an integer n, which is now in the lowest bits
    const vec f = t - (shifted - 12582912.f), f2 = f * f;
    const vec p = (0.693146967f * f + 1.f) +
                  f2 * ((0.0555071328f * f + 0.240221197f) + f2 * (0.00132764714f * f + 0.00967554133f));
    return (vec)((ivec)p + ((ivec)shifted << 23));
}
INLINE vec sigmoid(vec z) { return 1.f / (1.f + exp_of_minus(z)); }  // at least 2^-126

// Memory that a thread keeps from call to call, since fresh pages cost as much as the work on them. What `take` returns
// is aligned to a cache line and not cleared.
class Arena {
  public:
    float* take(size_t floats) {
        const size_t count = (floats + 15) / 16 * 16;
#if defined(__SANITIZE_ADDRESS__)  // each piece by itself, so that a step beyond its end is seen
        if (start) return pieces.emplace_back(allocate(floats)).get();
#endif
        float* p = start ? start + used : nullptr;
        used += count;
        return p;
    }
    // Calls `plan` twice: to count what it takes, with null for each piece, and then for good. Throws std::bad_alloc.
    template <class Plan>
    static void with(Plan plan) {
        Arena count, arena;
        plan(count);
        static thread_local Memory kept{nullptr, free};
        static thread_local size_t size = 0;
        if (size < count.used) {
            kept.reset();
            size = 0;
            kept = allocate(count.used);
            size = count.used;
        }
        arena.start = kept.get();
        plan(arena);
    }

  private:
    using Memory = std::unique_ptr<float, void (*)(void*)>;
    static Memory allocate(size_t floats) {
        Memory memory((float*)aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64), free);
        if (!memory) throw std::bad_alloc();
        return memory;
    }
    float* start = nullptr;
    size_t used = 0;
#if defined(__SANITIZE_ADDRESS__)
    std::vector<Memory> pieces;
#endif
};

}  // namespace

// --- products (products.cpp) -----------------------------------------------------------------------------------------

// c = a b + shift: a (m, k) and c (m, columns) have rows `from` and `to` floats apart. b has k rows of `columns`
// vectors, packed as `for_packed` says; shift, one row, may be null.
void product(int m, int k, int columns, const float* a, int from, const float* b, float* c, int to,
             const float* shift = nullptr);
// c (rows, columns) += a^T b: a (m, rows) and b (m, columns) have rows a_row and b_row floats apart; columns in vectors
void add_outer(int m, int rows, int columns, const float* a, int a_row, const float* b, int b_row, float* c);

namespace {

constexpr int MOST_COLUMNS = 3;  // vectors that a block of a product is wide

// Cut `total` into the fewest parts of at most `most`, of nearly the same size, and call f(size, start) for each
template <class F>
INLINE void for_parts(int total, int most, F f) {
    for (int start = 0, left = (total + most - 1) / most; left > 0; left--) {
        const int size = (total - start + left - 1) / left;
        f(size, start);
        start += size;
    }
}
// The packed second factor of `product`, [block of columns][row][vector of the block]: calls f(vector, index of its
// first row, floats to its next row)
template <class F>
INLINE void for_packed(int rows, int columns, F f) {
    for_parts(columns, MOST_COLUMNS, [&](int width, int first) {
        for (int j = 0; j < width; j++) f(first + j, (first * rows + j) * LANES, width * LANES);
    });
}

// --- images ----------------------------------------------------------------------------------------------------------

// Copy pixels of `channels` floats to pixels of `wide`, the rest of which becomes zero; `unpack` is the way back
inline void pack_pixels(size_t pixels, int channels, const float* from, int wide, float* to) {
    if (channels == wide) {
        memcpy(to, from, pixels * channels * sizeof(float));
        return;
    }
    for (size_t p = 0; p < pixels; p++) {
        memcpy(to + p * wide, from + p * channels, channels * sizeof(float));
        memset(to + p * wide + channels, 0, (wide - channels) * sizeof(float));
    }
}
inline void unpack_pixels(size_t pixels, int channels, const float* from, int wide, float* to) {
    if (channels == wide) {
        memcpy(to, from, pixels * channels * sizeof(float));
        return;
    }
    for (size_t p = 0; p < pixels; p++) memcpy(to + p * channels, from + p * wide, channels * sizeof(float));
}

}  // namespace
