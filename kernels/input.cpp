// The input of a liquid cell in fp32: normalisation over an image, a depthwise convolution (3x3 or 5x5), a pointwise
// one.
//
//     n = (x - mean(x)) / sqrt(var(x) + eps),   d = depthwise(n) + bias,   features = pointwise(d) + bias
//
// Between the three, nothing goes to memory. liquid_kernel.py compiles and calls this file; InputConv has the same in
// torch.

#include "vectors.h"

namespace {

constexpr int ROWS = 4;  // of an image that are taken through all three at once

struct Shape {
    int inputs, outputs, side, height, width;  // side: of the depthwise kernel, 3 or 5
    int in() const { return rounded_up(inputs, LANES); }
    int out() const { return rounded_up(outputs, LANES); }
    int columns() const { return out() / LANES; }
    int border() const { return side / 2; }
    int taps() const { return side * side; }
    int row() const { return (width + 2 * border()) * in(); }  // of an image with a border of zeros
    size_t pixels() const { return (size_t)height * width; }
};

struct Layers {                  // as the loops read them
    float *taps, *tap_bias;      // (side^2, in), (in)
    float *points, *point_bias;  // packed (inputs, out), (out)
    float* points_back;          // packed (outputs, in)
    static Layers take(Arena& arena, const Shape& g, bool back) {
        return {arena.take(g.taps() * g.in()), arena.take(g.in()), arena.take(g.inputs * g.out()), arena.take(g.out()),
                back ? arena.take(g.outputs * g.in()) : nullptr};
    }
    // depthwise (inputs, 1, side, side), pointwise (outputs, inputs, 1, 1)
    void read(const Shape& g, const float* depthwise, const float* bias, const float* pointwise,
              const float* point_shift) {
        memset(taps, 0, g.taps() * g.in() * sizeof(float));
        for (int c = 0; c < g.inputs; c++)
            for (int t = 0; t < g.taps(); t++) taps[t * g.in() + c] = depthwise[c * g.taps() + t];
        pack_pixels(1, g.inputs, bias, g.in(), tap_bias);
        pack_pixels(1, g.outputs, point_shift, g.out(), point_bias);
        auto packed = [](int rows, int columns, auto value, float* to) {
            const int vectors = rounded_up(columns, LANES) / LANES;
            for_packed(rows, vectors, [&](int vector, int start, int apart) {
                for (int k = 0; k < rows; k++)
                    for (int lane = 0; lane < LANES; lane++) {
                        const int n = vector * LANES + lane;
                        to[start + k * apart + lane] = n < columns ? value(k, n) : 0;
                    }
            });
        };
        packed(g.inputs, g.outputs, [&](int k, int n) { return pointwise[n * g.inputs + k]; }, points);
        if (points_back)
            packed(g.outputs, g.inputs, [&](int k, int n) { return pointwise[k * g.inputs + n]; }, points_back);
    }
};

// The mean and 1 / sqrt(var + eps) of an image; var in a second pass, so that a large mean does not spoil it
void statistics(const Shape& g, const float* x, float eps, float* result) {
    const size_t count = g.pixels() * g.inputs;
    auto mean_of = [&](auto f) {
        double sum = 0;
        for (size_t from = 0; from < count; from += 4096) {  // sums of many floats lose digits
            const size_t to = std::min(count, from + 4096);
            vec part[4] = {};
            size_t i = from;
            for (; i + 4 * LANES <= to; i += 4 * LANES)
                for (int j = 0; j < 4; j++) part[j] += f(load(x + i + j * LANES));
            const vec total = (part[0] + part[1]) + (part[2] + part[3]);
            for (int lane = 0; lane < LANES; lane++) sum += total[lane];
            for (; i < to; i++) sum += f(splat(x[i]))[0];
        }
        return sum / count;
    };
    const float mean = mean_of([](vec v) { return v; });
    result[0] = mean;
    result[1] = 1 / std::sqrt((float)mean_of([=](vec v) { return (v - mean) * (v - mean); }) + eps);
}

// Rows [y, y + count) of the normalised image, with a border of zeros and with zeros in the added channels
void normalised(const Shape& g, const float* x, const float* mean_scale, int y, int count, float* to) {
    for (int i = y; i < y + count; i++, to += g.row()) {
        if (i < 0 || i >= g.height) {
            memset(to, 0, g.row() * sizeof(float));
            continue;
        }
        const size_t edge = g.border() * g.in();
        float* pixels = to + edge;
        memset(to, 0, edge * sizeof(float)), memset(pixels + g.width * g.in(), 0, edge * sizeof(float));
        const float* from = x + (size_t)i * g.width * g.inputs;
        for (int p = 0; p < g.width; p++, from += g.inputs, pixels += g.in()) {
            int c = 0;
            for (; c + LANES <= g.inputs; c += LANES)
                store(pixels + c, (load(from + c) - mean_scale[0]) * mean_scale[1]);
            for (; c < g.inputs; c++) pixels[c] = (from[c] - mean_scale[0]) * mean_scale[1];
            for (; c < g.in(); c++) pixels[c] = 0;
        }
    }
}

// PIXELS neighbours in a row of a depthwise convolution, in the channels of one vector. apart: from tap to tap
template <int SIDE, int PIXELS>
INLINE void depthwise_pixels(const float* taps, int apart, vec shift, const float* from, int row, int in, float* to) {
    vec sums[PIXELS];
    for (int p = 0; p < PIXELS; p++) sums[p] = shift;
    for (int j = 0; j < SIDE; j++)
        for (int i = 0; i < SIDE; i++) {
            const vec w = load(taps + (j * SIDE + i) * apart);
            for (int p = 0; p < PIXELS; p++) sums[p] += w * load(from + j * row + (i + p) * in);
        }
    for (int p = 0; p < PIXELS; p++) store(to + p * in, sums[p]);
}

// A depthwise convolution of `count` rows, from rows with a border to rows without; `sign` -1 turns it by 180 degrees
template <int SIDE>
void depthwise(const Shape& g, const float* taps, const float* bias, int sign, const float* from, int count,
               float* to) {
    const int in = g.in(), row = g.row(), last = (SIDE * SIDE - 1) * in;
    for (int c = 0; c < in; c += LANES) {
        const vec shift = bias ? load(bias + c) : vec{};
        const float* w = taps + c + (sign > 0 ? 0 : last);
        for (int y = 0; y < count; y++) {
            int x = 0;
            const float* n = from + y * row + c;
            float* out = to + y * g.width * in + c;
            for (; x + 8 <= g.width; x += 8)
                depthwise_pixels<SIDE, 8>(w, sign * in, shift, n + x * in, row, in, out + x * in);
            for (; x < g.width; x++) depthwise_pixels<SIDE, 1>(w, sign * in, shift, n + x * in, row, in, out + x * in);
        }
    }
}

// f<SIDE>(arguments) for the side of the kernel
#define FOR_SIDE(side, f, ...) ((side) == 5 ? f<5>(__VA_ARGS__) : f<3>(__VA_ARGS__))

// Adds the gradient of the taps, and of the bias behind them, over an image. n: normalised, of_d: the gradient of what
// the convolution gave, both with a border
template <int SIDE>
void add_taps(const Shape& g, const float* n, const float* of_d, float* of_taps) {
    constexpr int AT_ONCE = 11 / SIDE;  // rows of taps whose sums stay in registers
    const int in = g.in(), row = g.row();
    for (int c = 0; c < in; c += LANES)
        for (int first = 0; first < SIDE; first += AT_ONCE) {
            vec sums[AT_ONCE * SIDE] = {}, bias = {};
            for (int y = 0; y < g.height; y++)
                for (int p = 0; p < g.width; p++) {
                    const float* at = n + (y + first) * row + p * in + c;
                    const vec of = load(of_d + (y + SIDE / 2) * row + (p + SIDE / 2) * in + c);
                    for (int j = 0; j < AT_ONCE && first + j < SIDE; j++)
                        for (int i = 0; i < SIDE; i++) sums[j * SIDE + i] += of * load(at + j * row + i * in);
                    bias += of;
                }
            const int taps = SIDE * std::min(AT_ONCE, SIDE - first);
            for (int t = 0; t < taps; t++) add(of_taps + (first * SIDE + t) * in + c, sums[t]);
            if (!first) add(of_taps + SIDE * SIDE * in + c, bias);
        }
}

void add_parts(int threads, float* const* parts, size_t count) {  // into part 0, in the order of the threads
#pragma omp for schedule(static)
    for (size_t i = 0; i < count; i++)
        for (int t = 1; t < threads; t++) parts[0][i] += parts[t][i];
}

}  // namespace

extern "C" {

// x: (images, height, width, inputs). features: (images, height, width, outputs). means: (images, 2), the mean of each
// image and 1 / its standard deviation. Returns whether there was enough memory, as the other function does.
bool input_forward(int threads, int images, int inputs, int outputs, int side, int height, int width, float eps,
                   const float* x, const float* depth_weight, const float* depth_bias, const float* point_weight,
                   const float* point_bias, float* features, float* means) try {
    const Shape g{inputs, outputs, side, height, width};
    const int blocks = (height + ROWS - 1) / ROWS;
    Arena::with([&](Arena& arena) {
        Layers layers = Layers::take(arena, g, false);
        float *n[threads], *d[threads], *f[threads];
        for (int t = 0; t < threads; t++) {
            n[t] = arena.take((ROWS + 2 * g.border()) * g.row()), d[t] = arena.take(ROWS * width * g.in());
            f[t] = arena.take(ROWS * width * g.out());
        }
        if (!n[0]) return;  // only counted
        layers.read(g, depth_weight, depth_bias, point_weight, point_bias);
#pragma omp parallel num_threads(threads)
        {
            const int me = omp_get_thread_num();
#pragma omp for schedule(static)
            for (int image = 0; image < images; image++)
                statistics(g, x + image * g.pixels() * inputs, eps, means + 2 * image);
#pragma omp for schedule(static)
            for (int unit = 0; unit < images * blocks; unit++) {
                const int image = unit / blocks, y = unit % blocks * ROWS, count = std::min(ROWS, height - y);
                normalised(g, x + image * g.pixels() * inputs, means + 2 * image, y - g.border(),
                           count + 2 * g.border(), n[me]);
                FOR_SIDE(side, depthwise, g, layers.taps, layers.tap_bias, 1, n[me], count, d[me]);
                float* to = features + (image * g.pixels() + y * width) * outputs;
                float* wide = outputs == g.out() ? to : f[me];
                product(count * width, inputs, g.columns(), d[me], g.in(), layers.points, wide, g.out(),
                        layers.point_bias);
                if (wide != to) unpack_pixels(count * width, outputs, wide, g.out(), to);
            }
        }
    });
    return true;
} catch (const std::bad_alloc&) {
    return false;
}

bool input_backward(int threads, int images, int inputs, int outputs, int side, int height, int width,
                    const float* gradient, const float* x, const float* means, const float* depth_weight,
                    const float* depth_bias, const float* point_weight, float* of_x, float* of_depth_weight,
                    float* of_depth_bias, float* of_point_weight, float* of_point_bias) try {
    const Shape g{inputs, outputs, side, height, width};
    const int in = g.in(), out = g.out(), row = g.row(), border = g.border(), taps = g.taps();
    Arena::with([&](Arena& arena) {
        Layers layers = Layers::take(arena, g, true);
        float *n[threads], *d[threads], *of_d[threads], *rows[threads], *of_f[threads];
        float *of_taps[threads], *of_points[threads];  // with the bias as a last tap, a last row
        for (int t = 0; t < threads; t++) {
            n[t] = arena.take((height + 2 * border) * row), of_d[t] = arena.take((height + 2 * border) * row);
            d[t] = arena.take(height * width * in), rows[t] = arena.take(ROWS * width * in);
            of_f[t] = arena.take(ROWS * width * out);
            of_taps[t] = arena.take((taps + 1) * in), of_points[t] = arena.take((inputs + 1) * out);
        }
        if (!n[0]) return;  // only counted
        float zeros[g.out()] = {};
        layers.read(g, depth_weight, depth_bias, point_weight, zeros);
#pragma omp parallel num_threads(threads)
        {
            const int me = omp_get_thread_num();
            float *own_n = n[me], *own_d = d[me], *own_of_d = of_d[me];
            memset(of_taps[me], 0, (taps + 1) * in * sizeof(float)),
                memset(of_points[me], 0, (inputs + 1) * out * sizeof(float));
            memset(own_of_d, 0, (height + 2 * border) * row * sizeof(float));  // the border stays zero
#pragma omp for schedule(static)
            for (int image = 0; image < images; image++) {
                normalised(g, x + image * g.pixels() * inputs, means + 2 * image, -border, height + 2 * border, own_n);
                for (int y = 0; y < height; y += ROWS) {
                    const int count = std::min(ROWS, height - y), pixels = count * width;
                    const float* from = gradient + (image * g.pixels() + y * width) * outputs;
                    if (outputs != out) {
                        pack_pixels(pixels, outputs, from, out, of_f[me]);
                        from = of_f[me];
                    }
                    FOR_SIDE(side, depthwise, g, layers.taps, layers.tap_bias, 1, own_n + y * row, count, rows[me]);
                    add_outer(pixels, inputs, g.columns(), rows[me], in, from, out, of_points[me]);
                    for (int c = 0; c < out; c += LANES) {
                        vec sum = load(of_points[me] + inputs * out + c);
                        for (int p = 0; p < pixels; p++) sum += load(from + p * out + c);
                        store(of_points[me] + inputs * out + c, sum);
                    }
                    for (int i = 0; i < count; i++)
                        product(width, outputs, in / LANES, from + i * width * out, out, layers.points_back,
                                own_of_d + (y + i + border) * row + border * in, in);
                }
                FOR_SIDE(side, add_taps, g, own_n, own_of_d, of_taps[me]);
                FOR_SIDE(side, depthwise, g, layers.taps, nullptr, -1, own_of_d, height, own_d);  // the gradient of n
                double sum = 0, with_n = 0;
                for (int y = 0; y < height; y++) {
                    vec line = {}, line_n = {};
                    for (int i = 0; i < width * in; i += LANES) {
                        const vec of = load(own_d + y * width * in + i);
                        line += of, line_n += of * load(own_n + (y + border) * row + border * in + i);
                    }
                    for (int lane = 0; lane < LANES; lane++) sum += line[lane], with_n += line_n[lane];
                }
                const float mean = sum / (g.pixels() * inputs), mean_n = with_n / (g.pixels() * inputs),
                            scale = means[2 * image + 1];
                for (int y = 0; y < height; y++) {
                    float* line = own_d + y * width * in;
                    for (int i = 0; i < width * in; i += LANES)
                        store(line + i, scale * (load(line + i) - mean -
                                                 load(own_n + (y + border) * row + border * in + i) * mean_n));
                }
                unpack_pixels(g.pixels(), inputs, own_d, in, of_x + image * g.pixels() * inputs);
            }
            add_parts(omp_get_num_threads(), of_taps, (taps + 1) * in);
            add_parts(omp_get_num_threads(), of_points, (inputs + 1) * out);
        }
        for (int c = 0; c < inputs; c++) {
            for (int t = 0; t < taps; t++) of_depth_weight[c * taps + t] = of_taps[0][t * in + c];
            of_depth_bias[c] = of_taps[0][taps * in + c];
            for (int k = 0; k < outputs; k++) of_point_weight[k * inputs + c] = of_points[0][c * out + k];
        }
        memcpy(of_point_bias, of_points[0] + inputs * out, outputs * sizeof(float));
    });
    return true;
} catch (const std::bad_alloc&) {
    return false;
}
}
