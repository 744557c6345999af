// Products of small matrices. Sums stay in the registers, whose number decides how many rows and columns are computed
// at once.

#include "vectors.h"

#include <type_traits>

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int SUMS = 24;  // registers for sums, of 32 that there are
#else
constexpr int SUMS = 12;  // of 16
#endif

// Calls f(size) with the size as a constant
template <int MOST, class F>
INLINE void with_constant(int size, F f) {
    if constexpr (MOST > 0) {
        if (size == MOST)
            f(std::integral_constant<int, MOST>{});
        else
            with_constant<MOST - 1>(size, f);
    }
}
// Calls f(rows, columns, first row, first column) for the blocks of a product whose sums fit in the registers; the
// number of rows and that of columns (in vectors) are constants
template <class F>
INLINE void for_sums(int rows, int columns, F f) {
    for_parts(columns, MOST_COLUMNS, [&](int width, int column) {
        with_constant<MOST_COLUMNS>(width, [&](auto n) {
            constexpr int MOST = SUMS / decltype(n)::value;
            for_parts(rows, MOST,
                      [&](int height, int row) { with_constant<MOST>(height, [&](auto m) { f(m, n, row, column); }); });
        });
    });
}
// sums (ROWS, COLUMNS vectors) += over `length`: a value of each row from x, `row` apart, times a row of vectors from v
template <int ROWS, int COLUMNS>
INLINE void multiply(vec (&sums)[ROWS][COLUMNS], int length, const float* x, int row, int x_step, const float* v,
                     int v_step) {
#pragma GCC unroll 1
    for (int l = 0; l < length; l++, x += x_step, v += v_step) {
        vec w[COLUMNS];
        for (int j = 0; j < COLUMNS; j++) {
            w[j] = load(v + j * LANES);
            KEEP(w[j]);
        }
        for (int i = 0; i < ROWS; i++) {
            const vec value = splat(x[i * row]);
            for (int j = 0; j < COLUMNS; j++) sums[i][j] += value * w[j];
        }
    }
}

}  // namespace

void product(int m, int k, int columns, const float* a, int from, const float* b, float* c, int to,
             const float* shift) {
    for_sums(m, columns, [&](auto rows, auto width, int row, int column) {
        constexpr int M = decltype(rows)::value, N = decltype(width)::value;
        vec sums[M][N] = {};
        for (int i = 0; i < M && shift; i++)
            for (int j = 0; j < N; j++) sums[i][j] = load(shift + (column + j) * LANES);
        multiply(sums, k, a + row * from, from, 1, b + column * LANES * k, N * LANES);
        for (int i = 0; i < M; i++)
            for (int j = 0; j < N; j++) store(c + (row + i) * to + (column + j) * LANES, sums[i][j]);
    });
}

void add_outer(int m, int rows, int columns, const float* a, int a_row, const float* b, int b_row, float* c) {
    for_sums(rows, columns, [&](auto height, auto width, int row, int column) {
        constexpr int M = decltype(height)::value, N = decltype(width)::value;
        vec sums[M][N];
        float* result = c + (row * columns + column) * LANES;
        for (int i = 0; i < M; i++)
            for (int j = 0; j < N; j++) sums[i][j] = load(result + (i * columns + j) * LANES);
        multiply(sums, m, a + row, 1, a_row, b + column * LANES, b_row);
        for (int i = 0; i < M; i++)
            for (int j = 0; j < N; j++) store(result + (i * columns + j) * LANES, sums[i][j]);
    });
}
