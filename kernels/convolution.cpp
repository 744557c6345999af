// A 3x3 convolution (stride 1, zeros beyond the borders) in fp32, and its gradients, by Winograd's method.
//
// The tiles of all images are one list, which the threads share; a thread takes some tiles at a time through all three
// maps while they are in its cache. convolution.py compiles and calls this file.

#include "winograd.h"

namespace {

struct Images {
    int images, height, width;
    int down() const { return (height + TILE - 1) / TILE; }
    int across() const { return (width + TILE - 1) / TILE; }
    int tiles() const { return images * down() * across(); }
};
struct Tile {  // where a tile is, in pixels, and how much of it is inside the image
    size_t image;
    int y, x, height, width;
    Tile(const Images& g, int tile)
        : image(tile / (g.down() * g.across())), y(tile / g.across() % g.down() * TILE), x(tile % g.across() * TILE),
          height(std::min(TILE, g.height - y)), width(std::min(TILE, g.width - x)) {}
    size_t pixel(const Images& g) const { return (image * g.height + y) * g.width + x; }
};

// Tiles that a thread takes at once: few enough for the caches, enough to use each weight often
int tiles_at_once(int inputs, int outputs) { return std::clamp(1536 / (inputs + outputs) * 2, 16, 64); }

// Calls f(first tile, number) for the tiles of this thread
template <class F>
void for_tiles(const Images& g, int at_once, F f) {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int first = g.tiles() * thread / threads, last = g.tiles() * (thread + 1) / threads;
    const int pieces = (last - first + at_once - 1) / at_once;
    for (int64_t i = 0; i < pieces; i++) {
        const int from = first + (last - first) * i / pieces, to = first + (last - first) * (i + 1) / pieces;
        f(from, to - from);
    }
}

// The points of some tiles with their borders, from pixels of `channels` floats. border: room for 6x6 pixels of `wide`
void read_points(const Images& g, int first, int count, const float* pixels, int channels, int wide, float* border,
                 float* v, int apart) {
    for (int i = 0; i < count; i++) {
        const Tile t(g, first + i);
        const float* corner = pixels + (t.pixel(g) - g.width - 1) * channels;
        if (channels == wide && t.y > 0 && t.x > 0 && t.y + TILE < g.height && t.x + TILE < g.width) {
            input_points(corner, g.width * wide, wide, v + i * wide, apart);
            continue;
        }
        memset(border, 0, ALL_POINTS * wide * sizeof(float));
        const int left = t.x > 0 ? 0 : 1, right = std::min(POINTS, g.width - t.x + 1);
        for (int y = t.y > 0 ? 0 : 1; y < std::min(POINTS, g.height - t.y + 1); y++)
            pack_pixels(right - left, channels, corner + (y * g.width + left) * channels, wide,
                        border + (y * POINTS + left) * wide);
        input_points(border, POINTS * wide, wide, v + i * wide, apart);
    }
}

}  // namespace

extern "C" {

// x: (images, height, width, inputs), result: (images, height, width, outputs), bias: (outputs) or null. weight:
// (outputs, inputs, 3, 3); or, `transposed`, that of the convolution whose gradient this is, (inputs, outputs, 3, 3).
// Returns whether there was enough memory, as the other function does.
bool convolution(int threads, int images, int inputs, int outputs, int height, int width, bool transposed,
                 const float* x, const float* weight, const float* bias, float* result) try {
    const Images g{images, height, width};
    const Weights w{inputs, outputs};
    const int in = rounded_up(inputs, LANES), out = rounded_up(outputs, LANES), most = tiles_at_once(in, out);
    const int v_apart = point_apart(most, in), m_apart = point_apart(most, out);
    Arena::with([&](Arena& arena) {
        float *weights = arena.take(w.all()), *wide_bias = arena.take(out);
        float *v[threads], *m[threads], *border[threads];
        for (int t = 0; t < threads; t++) {
            v[t] = arena.take(ALL_POINTS * v_apart), m[t] = arena.take(ALL_POINTS * m_apart);
            border[t] = arena.take(ALL_POINTS * std::max(in, out));
        }
        if (!weights) return;  // only counted
        memset(wide_bias, 0, out * sizeof(float));
        if (bias) memcpy(wide_bias, bias, outputs * sizeof(float));
#pragma omp parallel num_threads(threads)
        {
            float *own_v = v[omp_get_thread_num()], *own_m = m[omp_get_thread_num()],
                  *own_border = border[omp_get_thread_num()];
            w.transform(weight, weights, transposed, transposed);
            for_tiles(g, most, [&](int first, int count) {
                read_points(g, first, count, x, inputs, in, own_border, own_v, v_apart);
                for (int p = 0; p < ALL_POINTS; p++)
                    product(count, inputs, w.columns(), own_v + p * v_apart, in, weights + p * w.point(),
                            own_m + p * m_apart, out);
                for (int i = 0; i < count; i++) {
                    const Tile t(g, first + i);
                    float* to = result + t.pixel(g) * outputs;
                    const bool direct = outputs == out && t.height == TILE && t.width == TILE;
                    float* pixels = direct ? to : own_border;
                    const int row = direct ? g.width * out : TILE * out;
                    for (int c = 0; c < out; c += LANES) {
                        const vec shift = load(wide_bias + c);
                        const float* from = own_m + i * out + c;
                        both<POINTS, TILE>(
                            output_map, [=](int y, int x) { return load(from + (y * POINTS + x) * m_apart); },
                            [=](int y, int x, vec value) { store(pixels + y * row + x * out + c, value + shift); });
                    }
                    for (int y = 0; y < t.height && !direct; y++)
                        unpack_pixels(t.width, outputs, pixels + y * row, out, to + (size_t)y * g.width * outputs);
                }
            });
        }
    });
    return true;
} catch (const std::bad_alloc&) {
    return false;
}

// The gradient of the weight, (outputs, inputs, 3, 3), from x and the gradient of the result
bool convolution_weight_gradient(int threads, int images, int inputs, int outputs, int height, int width,
                                 const float* x, const float* gradient, float* of_weight) try {
    const Images g{images, height, width};
    const Weights w{inputs, outputs};
    const int in = rounded_up(inputs, LANES), out = rounded_up(outputs, LANES), most = tiles_at_once(in, out);
    const int v_apart = point_apart(most, in), m_apart = point_apart(most, out);
    Arena::with([&](Arena& arena) {
        float *v[threads], *m[threads], *border[threads], *points[threads];
        for (int t = 0; t < threads; t++) {
            v[t] = arena.take(ALL_POINTS * v_apart), m[t] = arena.take(ALL_POINTS * m_apart);
            border[t] = arena.take(ALL_POINTS * std::max(in, out)), points[t] = arena.take(w.all());
        }
        if (!points[0]) return;  // only counted
#pragma omp parallel num_threads(threads)
        {
            const int me = omp_get_thread_num();
            memset(points[me], 0, w.all() * sizeof(float));
            for_tiles(g, most, [&](int first, int count) {
                read_points(g, first, count, x, inputs, in, border[me], v[me], v_apart);
                for (int i = 0; i < count; i++) {
                    const Tile t(g, first + i);
                    const float* from = gradient + t.pixel(g) * outputs;
                    int row = g.width * out;
                    if (outputs != out || t.height != TILE || t.width != TILE) {
                        memset(border[me], 0, TILE * TILE * out * sizeof(float));
                        for (int y = 0; y < t.height; y++)
                            pack_pixels(t.width, outputs, from + (size_t)y * g.width * outputs, out,
                                        border[me] + y * TILE * out);
                        from = border[me], row = TILE * out;
                    }
                    output_gradient(from, row, out, m[me] + i * out, m_apart);
                }
                for (int p = 0; p < ALL_POINTS; p++)
                    add_outer(count, inputs, w.columns(), v[me] + p * v_apart, in, m[me] + p * m_apart, out,
                              points[me] + p * w.point());
            });
#pragma omp barrier
            w.gradient(omp_get_num_threads(), points, of_weight);
        }
    });
    return true;
} catch (const std::bad_alloc&) {
    return false;
}
}
