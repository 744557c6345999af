// A 3x3 convolution with zeros beyond the borders as Winograd's F(4x4, 3x3): four times fewer products.
//
// Lavin & Gray 2016, "Fast algorithms for convolutional neural networks", section 4.3: y = A^T [(G g G^T) (B^T d B)] A.
// The image is cut into tiles of 4x4 pixels. Each tile with its border, d (6x6), becomes 36 points, and at each point
// there is a small product of matrices, (tiles, inputs) times (inputs, outputs). All three maps are linear, so the
// gradients are the transposed maps.

#pragma once

#include "vectors.h"

namespace {

constexpr int TILE = 4, POINTS = 6, ALL_POINTS = POINTS * POINTS;

// One dimension of the three maps and of the transposed ones
constexpr float G[POINTS][3] = {{1 / 4.f, 0, 0},
                                {-1 / 6.f, -1 / 6.f, -1 / 6.f},
                                {-1 / 6.f, 1 / 6.f, -1 / 6.f},
                                {1 / 24.f, 1 / 12.f, 1 / 6.f},
                                {1 / 24.f, -1 / 12.f, 1 / 6.f},
                                {0, 0, 1}};
INLINE void input_map(const vec* d, vec* v) {  // B^T
    const vec a = d[4] - 4.f * d[2], b = d[3] - 4.f * d[1], c = d[4] - d[2], e = d[3] - d[1];
    v[0] = 4.f * d[0] - 5.f * d[2] + d[4], v[1] = a + b, v[2] = a - b;
    v[3] = c + 2.f * e, v[4] = c - 2.f * e, v[5] = 4.f * d[1] - 5.f * d[3] + d[5];
}
INLINE void input_map_transposed(const vec* v, vec* d) {  // B
    const vec a = v[1] + v[2], b = v[1] - v[2], c = v[3] + v[4], e = v[3] - v[4];
    d[0] = 4.f * v[0], d[1] = 4.f * (v[5] - b) - 2.f * e, d[2] = -5.f * v[0] - 4.f * a - c;
    d[3] = b + 2.f * e - 5.f * v[5], d[4] = v[0] + a + c, d[5] = v[5];
}
INLINE void output_map(const vec* m, vec* y) {  // A^T
    const vec a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], d = m[3] - m[4];
    y[0] = m[0] + a + c, y[1] = b + 2.f * d, y[2] = a + 4.f * c, y[3] = b + 8.f * d + m[5];
}
INLINE void output_map_transposed(const vec* y, vec* m) {  // A
    const vec a = y[0] + y[2], b = y[1] + y[3], c = y[0] + 4.f * y[2], d = 2.f * y[1] + 8.f * y[3];
    m[0] = y[0], m[1] = a + b, m[2] = a - b, m[3] = c + d, m[4] = c - d, m[5] = y[3];
}

// Both dimensions: the map of every column, then of every row. from(i, j) gives a vector, to(i, j, vector) takes one.
// The loops stay loops: unrolled, they need more registers than there are.
template <int FROM, int TO, class Map, class From, class To>
INLINE void both(Map map, From from, To to) {
    vec half[TO][FROM];
#pragma GCC unroll 1
    for (int j = 0; j < FROM; j++) {
        vec x[FROM], y[TO];
        for (int i = 0; i < FROM; i++) x[i] = from(i, j);
        map(x, y);
        for (int i = 0; i < TO; i++) half[i][j] = y[i];
    }
#pragma GCC unroll 1
    for (int i = 0; i < TO; i++) {
        vec y[TO];
        map(half[i], y);
        for (int j = 0; j < TO; j++) to(i, j, y[j]);
    }
}

// Floats from one point to the next where each has `count` tiles; the odd cache line keeps points in different sets
constexpr int point_apart(int count, int wide) { return count * wide + 16; }

// Of a tile with its border, at `d` in rows of `row` floats: B^T d B, point p of it to v + p * apart
INLINE void input_points(const float* d, int row, int wide, float* v, int apart) {
    for (int c = 0; c < wide; c += LANES)
        both<POINTS, POINTS>(
            input_map, [=](int i, int j) { return load(d + i * row + j * wide + c); },
            [=](int i, int j, vec x) { store(v + (i * POINTS + j) * apart + c, x); });
}
// The gradient of such a tile: added to `d`
INLINE void add_input_gradient(const float* v, int apart, int wide, float* d, int row) {
    for (int c = 0; c < wide; c += LANES)
        both<POINTS, POINTS>(
            input_map_transposed, [=](int i, int j) { return load(v + (i * POINTS + j) * apart + c); },
            [=](int i, int j, vec x) { add(d + i * row + j * wide + c, x); });
}
// The pixels of a tile from its points: y (4x4) at `y` in rows of `row` floats
INLINE void output_pixels(const float* m, int apart, int wide, float* y, int row) {
    for (int c = 0; c < wide; c += LANES)
        both<POINTS, TILE>(
            output_map, [=](int i, int j) { return load(m + (i * POINTS + j) * apart + c); },
            [=](int i, int j, vec x) { store(y + i * row + j * wide + c, x); });
}
// The gradient of a tile's points from that of its pixels
INLINE void output_gradient(const float* y, int row, int wide, float* m, int apart) {
    for (int c = 0; c < wide; c += LANES)
        both<TILE, POINTS>(
            output_map_transposed, [=](int i, int j) { return load(y + i * row + j * wide + c); },
            [=](int i, int j, vec x) { store(m + (i * POINTS + j) * apart + c, x); });
}

// The weights of a convolution, (outputs, inputs, 3, 3), as the second factors of the products: G g G^T at 36 points
struct Weights {
    int inputs, outputs;  // of the product; `exchanged`, for the gradient of the input, they are the other way around
    int columns() const { return rounded_up(outputs, LANES) / LANES; }
    size_t point() const { return (size_t)inputs * columns() * LANES; }  // floats
    size_t all() const { return ALL_POINTS * point(); }

    // turned: by 180 degrees, as a convolution needs it that computes the gradient of another's input
    void transform(const float* weight, float* to, bool exchanged, bool turned) const {
#pragma omp for schedule(static)
        for (int k = 0; k < inputs; k++)
            for_packed(inputs, columns(), [&](int vector, int start, int apart) {
                float taps[9][LANES] = {};
                for (int lane = 0; lane < LANES && vector * LANES + lane < outputs; lane++) {
                    const int n = vector * LANES + lane;
                    const float* w = weight + (exchanged ? (size_t)k * outputs + n : (size_t)n * inputs + k) * 9;
                    for (int t = 0; t < 9; t++) taps[turned ? 8 - t : t][lane] = w[t];
                }
                vec half[POINTS][3];
                for (int i = 0; i < POINTS; i++)
                    for (int x = 0; x < 3; x++)
                        half[i][x] =
                            G[i][0] * load(taps[x]) + G[i][1] * load(taps[3 + x]) + G[i][2] * load(taps[6 + x]);
                float* row = to + start + k * apart;
                for (int i = 0; i < POINTS; i++)
                    for (int j = 0; j < POINTS; j++)
                        store(row + (i * POINTS + j) * point(),
                              half[i][0] * G[j][0] + half[i][1] * G[j][1] + half[i][2] * G[j][2]);
            });
    }
    // The gradient of `weight` from that of its points, [point][input][output], which each thread has a part of. The
    // parts are added in the order of the threads, so that the same call gives the same bytes.
    void gradient(int threads, float* const* points, float* of_weight) const {
#pragma omp for schedule(static)
        for (int k = 0; k < inputs; k++)
            for (int vector = 0; vector < columns(); vector++) {
                vec half[3][POINTS];
                for (int j = 0; j < POINTS; j++) {
                    vec column[POINTS];
                    for (int i = 0; i < POINTS; i++) {
                        const size_t at = (i * POINTS + j) * point() + (k * columns() + vector) * LANES;
                        column[i] = load(points[0] + at);
                        for (int t = 1; t < threads; t++) column[i] += load(points[t] + at);
                    }
                    for (int y = 0; y < 3; y++) {
                        half[y][j] = vec{};
                        for (int i = 0; i < POINTS; i++) half[y][j] += G[i][y] * column[i];
                    }
                }
                for (int y = 0; y < 3; y++)
                    for (int x = 0; x < 3; x++) {
                        vec sum{};
                        for (int j = 0; j < POINTS; j++) sum += half[y][j] * G[j][x];
                        for (int lane = 0; lane < LANES && vector * LANES + lane < outputs; lane++)
                            of_weight[((size_t)(vector * LANES + lane) * inputs + k) * 9 + y * 3 + x] = sum[lane];
                    }
            }
    }
};

// A rectangle of tiles
struct Block {
    int top, left, down, across;  // in tiles
    int count() const { return down * across; }
};
// Calls f(block) for the tile rows from `top` to `bottom` of an image that is `across` tiles wide; blocks of about
// `size` tiles
template <class F>
INLINE void for_blocks(int top, int bottom, int across, int size, F f) {
    const int rows = across < size ? size / across : 1, pieces = (across + size - 1) / size;
    for (int y = top; y < bottom; y += rows)
        for (int i = 0; i < pieces; i++) {
            const int left = across * i / pieces, right = across * (i + 1) / pieces;
            f(Block{y, left, std::min(rows, bottom - y), right - left});
        }
}

}  // namespace
