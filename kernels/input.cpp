// The input of a liquid cell in fp32: normalisation over an image, a depthwise 3x3 convolution, a pointwise one.
//
//     n = (x - mean(x)) / sqrt(var(x) + eps),   d = depthwise(n) + bias,   features = pointwise(d) + bias
//
// Between the three, nothing goes to memory. liquid_kernel.py compiles and calls this file; InputConv has the same in
// torch.

#include "vectors.h"

namespace {

constexpr int ROWS = 4;  // of an image that are taken through all three at once

struct Shape {
    int inputs, outputs, height, width;
    int in() const { return rounded_up(inputs, LANES); }
    int out() const { return rounded_up(outputs, LANES); }
    int columns() const { return out() / LANES; }
    int row() const { return (width + 2) * in(); }  // of an image with a border of zeros
    size_t pixels() const { return (size_t)height * width; }
};

struct Layers {                  // as the loops read them
    float *taps, *tap_bias;      // (9, in), (in)
    float *points, *point_bias;  // packed (inputs, out), (out)
    float* points_back;          // packed (outputs, in)
    static Layers take(Arena& arena, const Shape& g, bool back) {
        return {arena.take(9 * g.in()), arena.take(g.in()), arena.take(g.inputs * g.out()), arena.take(g.out()),
                back ? arena.take(g.outputs * g.in()) : nullptr};
    }
    // depthwise (inputs, 1, 3, 3), pointwise (outputs, inputs, 1, 1)
    void read(const Shape& g, const float* depthwise, const float* bias, const float* pointwise,
              const float* point_shift) {
        memset(taps, 0, 9 * g.in() * sizeof(float));
        for (int c = 0; c < g.inputs; c++)
            for (int t = 0; t < 9; t++) taps[t * g.in() + c] = depthwise[c * 9 + t];
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
        float* pixels = to + g.in();
        memset(to, 0, g.in() * sizeof(float)), memset(pixels + g.width * g.in(), 0, g.in() * sizeof(float));
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

// A depthwise convolution of `count` rows, from rows with a border to rows without; `sign` -1 turns it by 180 degrees
INLINE void depthwise(const Shape& g, const float* taps, const float* bias, int sign, const float* from, int count,
                      float* to) {
    const int in = g.in(), row = g.row();
    for (int c = 0; c < in; c += LANES) {
        vec w[9];
        for (int t = 0; t < 9; t++) w[t] = load(taps + (sign > 0 ? t : 8 - t) * in + c);
        const vec shift = bias ? load(bias + c) : vec{};
        for (int y = 0; y < count; y++)
            for (int x = 0; x < g.width; x++) {
                const float* n = from + y * row + x * in + c;
                vec a = shift, b = vec{}, d = vec{};
                for (int j = 0; j < 3; j++) {
                    a += w[j] * load(n + j * in);
                    b += w[3 + j] * load(n + row + j * in);
                    d += w[6 + j] * load(n + 2 * row + j * in);
                }
                store(to + (y * g.width + x) * in + c, a + (b + d));
            }
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
bool input_forward(int threads, int images, int inputs, int outputs, int height, int width, float eps, const float* x,
                   const float* depth_weight, const float* depth_bias, const float* point_weight,
                   const float* point_bias, float* features, float* means) try {
    const Shape g{inputs, outputs, height, width};
    const int blocks = (height + ROWS - 1) / ROWS;
    Arena::with([&](Arena& arena) {
        Layers layers = Layers::take(arena, g, false);
        float *n[threads], *d[threads], *f[threads];
        for (int t = 0; t < threads; t++) {
            n[t] = arena.take((ROWS + 2) * g.row()), d[t] = arena.take(ROWS * width * g.in());
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
                normalised(g, x + image * g.pixels() * inputs, means + 2 * image, y - 1, count + 2, n[me]);
                depthwise(g, layers.taps, layers.tap_bias, 1, n[me], count, d[me]);
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

bool input_backward(int threads, int images, int inputs, int outputs, int height, int width, const float* gradient,
                    const float* x, const float* means, const float* depth_weight, const float* depth_bias,
                    const float* point_weight, float* of_x, float* of_depth_weight, float* of_depth_bias,
                    float* of_point_weight, float* of_point_bias) try {
    const Shape g{inputs, outputs, height, width};
    const int in = g.in(), out = g.out(), row = g.row();
    Arena::with([&](Arena& arena) {
        Layers layers = Layers::take(arena, g, true);
        float *n[threads], *d[threads], *of_d[threads], *rows[threads], *of_f[threads];
        float *of_taps[threads], *of_points[threads];  // with the bias as a tenth tap, a last row
        for (int t = 0; t < threads; t++) {
            n[t] = arena.take((height + 2) * row), of_d[t] = arena.take((height + 2) * row);
            d[t] = arena.take(height * width * in), rows[t] = arena.take(ROWS * width * in);
            of_f[t] = arena.take(ROWS * width * out);
            of_taps[t] = arena.take(10 * in), of_points[t] = arena.take((inputs + 1) * out);
        }
        if (!n[0]) return;  // only counted
        float zeros[g.out()] = {};
        layers.read(g, depth_weight, depth_bias, point_weight, zeros);
#pragma omp parallel num_threads(threads)
        {
            const int me = omp_get_thread_num();
            float *own_n = n[me], *own_d = d[me], *own_of_d = of_d[me];
            memset(of_taps[me], 0, 10 * in * sizeof(float)),
                memset(of_points[me], 0, (inputs + 1) * out * sizeof(float));
            memset(own_of_d, 0, (height + 2) * row * sizeof(float));  // the border stays zero
#pragma omp for schedule(static)
            for (int image = 0; image < images; image++) {
                normalised(g, x + image * g.pixels() * inputs, means + 2 * image, -1, height + 2, own_n);
                for (int y = 0; y < height; y += ROWS) {
                    const int count = std::min(ROWS, height - y), pixels = count * width;
                    const float* from = gradient + (image * g.pixels() + y * width) * outputs;
                    if (outputs != out) {
                        pack_pixels(pixels, outputs, from, out, of_f[me]);
                        from = of_f[me];
                    }
                    depthwise(g, layers.taps, layers.tap_bias, 1, own_n + y * row, count, rows[me]);
                    add_outer(pixels, inputs, g.columns(), rows[me], in, from, out, of_points[me]);
                    for (int c = 0; c < out; c += LANES) {
                        vec sum = load(of_points[me] + inputs * out + c);
                        for (int p = 0; p < pixels; p++) sum += load(from + p * out + c);
                        store(of_points[me] + inputs * out + c, sum);
                    }
                    for (int i = 0; i < count; i++)
                        product(width, outputs, in / LANES, from + i * width * out, out, layers.points_back,
                                own_of_d + (y + i + 1) * row + in, in);
                }
                for (int c = 0; c < in; c += LANES) {
                    vec sums[10];
                    for (int t = 0; t < 10; t++) sums[t] = load(of_taps[me] + t * in + c);
                    for (int y = 0; y < height; y++)
                        for (int p = 0; p < width; p++) {
                            const float* at = own_n + y * row + p * in + c;
                            const vec of = load(own_of_d + (y + 1) * row + (p + 1) * in + c);
                            for (int t = 0; t < 9; t++) sums[t] += of * load(at + t / 3 * row + t % 3 * in);
                            sums[9] += of;
                        }
                    for (int t = 0; t < 10; t++) store(of_taps[me] + t * in + c, sums[t]);
                }
                depthwise(g, layers.taps, nullptr, -1, own_of_d, height, own_d);  // the gradient of n
                double sum = 0, with_n = 0;
                for (int y = 0; y < height; y++) {
                    vec line = {}, line_n = {};
                    for (int i = 0; i < width * in; i += LANES) {
                        const vec of = load(own_d + y * width * in + i);
                        line += of, line_n += of * load(own_n + (y + 1) * row + in + i);
                    }
                    for (int lane = 0; lane < LANES; lane++) sum += line[lane], with_n += line_n[lane];
                }
                const float mean = sum / (g.pixels() * inputs), mean_n = with_n / (g.pixels() * inputs),
                            scale = means[2 * image + 1];
                for (int y = 0; y < height; y++) {
                    float* line = own_d + y * width * in;
                    for (int i = 0; i < width * in; i += LANES)
                        store(line + i,
                              scale * (load(line + i) - mean - load(own_n + (y + 1) * row + in + i) * mean_n));
                }
                unpack_pixels(g.pixels(), inputs, own_d, in, of_x + image * g.pixels() * inputs);
            }
            add_parts(omp_get_num_threads(), of_taps, 10 * in);
            add_parts(omp_get_num_threads(), of_points, (inputs + 1) * out);
        }
        for (int c = 0; c < inputs; c++) {
            for (int t = 0; t < 9; t++) of_depth_weight[c * 9 + t] = of_taps[0][t * in + c];
            of_depth_bias[c] = of_taps[0][9 * in + c];
            for (int k = 0; k < outputs; k++) of_point_weight[k * inputs + c] = of_points[0][c * out + k];
        }
        memcpy(of_point_bias, of_points[0] + inputs * out, outputs * sizeof(float));
    });
    return true;
} catch (const std::bad_alloc&) {
    return false;
}
}
