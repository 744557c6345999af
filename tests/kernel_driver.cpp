// Calls every function of the library with arrays of exactly the size that they may touch, for a sanitizer to watch.

#include <cstdio>
#include <memory>
#include <vector>

extern "C" {
bool cell_forward(int, int, int, int, int, int, int, float, float, float, const float*, const float*, const float*,
                  const float*, float*, float* const*);
bool cell_backward(int, int, int, int, int, int, int, float, float, float, const float*, const float*, const float*,
                   const float*, const float*, const float* const*, float*, float*, float*, float*);
bool convolution(int, int, int, int, int, int, bool, const float*, const float*, const float*, float*);
bool convolution_weight_gradient(int, int, int, int, int, int, const float*, const float*, float*);
bool input_forward(int, int, int, int, int, int, int, float, const float*, const float*, const float*, const float*,
                   const float*, float*, float*);
bool input_backward(int, int, int, int, int, int, int, const float*, const float*, const float*, const float*,
                    const float*, const float*, float*, float*, float*, float*, float*);
int vector_lanes();
}

using Array = std::unique_ptr<float[]>;
Array some(size_t count) {  // on the heap, with nothing to spare
    Array values(new float[count]);
    for (size_t i = 0; i < count; i++) values[i] = (int)(i * 7919 % 101) / 101.f - 0.5f;
    return values;
}

int main() {
    bool good = true;
    for (int threads : {1, 2, 3})
        for (int images : {1, 4})
            for (int channels : {1, 7, 24, 33})
                for (auto [height, width] : {std::pair{1, 1}, {4, 4}, {5, 3}, {9, 14}, {3, 40}}) {
                    const size_t pixels = (size_t)images * height * width;
                    const int steps = 3, more = channels + 5,
                              wide = (channels + vector_lanes() - 1) / vector_lanes() * vector_lanes();
                    for (bool carried : {false, true}) {
                        Array h = some(pixels * channels), features = some(pixels * 2 * channels),
                              offset = some(images * 2 * channels);
                        Array weight = some(channels * channels * 9), output = some(pixels * channels),
                              of_h = some(pixels * channels);
                        Array of_features = some(pixels * 2 * channels), of_offset = some(images * 2 * channels),
                              of_weight = some(channels * channels * 9);
                        std::vector<Array> kept;
                        std::vector<float*> z;
                        for (int k = 0; k < steps; k++) {
                            kept.push_back(some(pixels * wide));
                            z.push_back(k || carried ? kept.back().get() : nullptr);
                        }
                        const float* start = carried ? h.get() : nullptr;
                        good &= cell_forward(threads, images, channels, height, width, steps, carried, 0.3, 0.5, 3,
                                             start, features.get(), offset.get(), weight.get(), output.get(), z.data());
                        good &= cell_backward(threads, images, channels, height, width, steps, carried, 0.3, 0.5, 3,
                                              output.get(), start, features.get(), offset.get(), weight.get(), z.data(),
                                              carried ? of_h.get() : nullptr, of_features.get(), of_offset.get(),
                                              of_weight.get());
                    }
                    Array x = some(pixels * channels), weight = some(channels * more * 9), bias = some(more),
                          result = some(pixels * more);
                    good &= convolution(threads, images, channels, more, height, width, false, x.get(), weight.get(),
                                        bias.get(), result.get());
                    good &= convolution(threads, images, more, channels, height, width, true, result.get(),
                                        weight.get(), nullptr, x.get());
                    good &= convolution_weight_gradient(threads, images, channels, more, height, width, x.get(),
                                                        result.get(), weight.get());
                    for (int side : {3, 5}) {
                        Array depth = some(channels * side * side), depth_bias = some(channels),
                              point = some(channels * more), means = some(images * 2);
                        good &= input_forward(threads, images, channels, more, side, height, width, 1e-5, x.get(),
                                              depth.get(), depth_bias.get(), point.get(), bias.get(), result.get(),
                                              means.get());
                        good &= input_backward(threads, images, channels, more, side, height, width, result.get(),
                                               x.get(), means.get(), depth.get(), depth_bias.get(), point.get(),
                                               x.get(), depth.get(), depth_bias.get(), point.get(), bias.get());
                    }
                }
    std::puts(good ? "good" : "out of memory");
    return !good;
}
