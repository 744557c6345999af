// The whole integration of a liquid cell in fp32, one image at a time, on any processor with vectors:
//
//     h_{k+1} = h_k + share (silu(z_k) - h_k),   z_k = W_rec * h_k + drive,   k = 0 .. steps - 1
//     share = g(dt / tau),   tau = tau_min + (tau_max - tau_min) sigmoid(logit),   where g depends on the scheme
//
// (drive, logit) = features + offset, where `features` has a value for every pixel and `offset` one for all pixels.
//
// The weights are those of every step, so Winograd's transform of them is paid once per call; and an image's state
// stays in the cache from the first step to the last. The forward pass keeps z_k, from which the backward pass computes
// the states again, pixel by pixel. Gradients stay transformed: those of W_rec are summed over all steps and images
// there.
//
// liquid_kernel.py compiles and calls this file; RealLiquidCell has the same equations in torch.

#include "winograd.h"

namespace {

// One step moves the state by the fraction `share` of its way to f: a, a / (1 + a) or 1 - exp(-a), where a = dt / tau
enum Scheme { EULER, SEMI_IMPLICIT, EXPONENTIAL };

INLINE vec share_of(Scheme scheme, vec a) {
    if (scheme == EULER) return a;
    if (scheme == SEMI_IMPLICIT) return a / (1.f + a);
    const vec series = a * (1.f - a / 2.f * (1.f - a / 3.f * (1.f - a / 4.f * (1.f - a / 5.f * (1.f - a / 6.f)))));
    return a < 0.2f ? series : 1.f - exp_of_minus(a);  // the difference is not exact for a small a
}
INLINE vec share_slope(Scheme scheme, vec a) {
    if (scheme == EULER) return splat(1);
    return scheme == SEMI_IMPLICIT ? 1.f / ((1.f + a) * (1.f + a)) : exp_of_minus(a);
}

struct Cell {
    int channels, height, width, steps;
    Scheme scheme;
    float dt, tau_min, tau_range;

    int wide() const { return rounded_up(channels, LANES); }  // floats of a pixel here; the last ones are zero
    int down() const { return (height + TILE - 1) / TILE; }   // in tiles
    int across() const { return (width + TILE - 1) / TILE; }
    int line() const { return width * wide(); }
    size_t area() const { return (size_t)height * line(); }
    // The state has a border of zeros around the tiles
    int row() const { return (across() * TILE + 2) * wide(); }
    size_t padded() const { return (size_t)(down() * TILE + 2) * row(); }
    int inside(int y) const { return (y + 1) * row() + wide(); }  // index of pixel (y, 0)
    Weights weights() const { return {channels, channels}; }
};

// Tiles of a block: what its products read stays in the caches. Backward, a block has whole rows of tiles.
constexpr int FORWARD_TILES = 8, BACKWARD_TILES = 16;
int whole_rows(const Cell& g) { return std::max(BACKWARD_TILES, g.across()); }

// The threads of a call. With fewer images than threads, several share an image, each with some of its rows of tiles.
struct Team {
    int threads, thread, size, groups, group, index;
    Team(int images, int rows)
        : threads(omp_get_num_threads()), thread(omp_get_thread_num()), size(std::clamp(threads / images, 1, rows)),
          groups(threads / size), group(thread / size), index(thread % size) {}
    // Calls f(image) on all threads equally often, so that they can wait for each other; image < 0: nothing to do
    template <class F>
    void each(int images, F f) const {
        for (int first = 0; first < images; first += groups)
            f(group < groups && first + group < images ? first + group : -1);
    }
    void wait() const {
        if (size > 1) {
#pragma omp barrier
        }
    }
    int top(int rows) const { return rows * index / size; }
    int bottom(int rows) const { return rows * (index + 1) / size; }
};

struct Band {  // a thread's part of an image, in tiles and in pixels
    int top, bottom, first, last;
    Band(const Cell& g, const Team& team)
        : top(team.top(g.down())), bottom(team.bottom(g.down())), first(std::min(top * TILE, g.height)),
          last(std::min(bottom * TILE, g.height)) {}
};

// Calls f(index of the first float in an image, in a padded image, in the block; floats) for the pixel rows of a block
template <class F>
INLINE void for_rows(const Cell& g, const Block& b, F f) {
    const int x = b.left * TILE, width = std::min(b.across * TILE, g.width - x) * g.wide();
    const int y = b.top * TILE, height = std::min(b.down * TILE, g.height - y);
    for (int i = 0; i < height; i++)
        f((size_t)(y + i) * g.line() + x * g.wide(), g.inside(y + i) + x * g.wide(), i * b.across * TILE * g.wide(),
          width);
}
INLINE int tile_in(const Cell& g, const Block& b, int t) {  // index of a tile's border in a padded image
    return (b.top + t / b.across) * TILE * g.row() + (b.left + t % b.across) * TILE * g.wide();
}
INLINE int tile_in(const Block& b, int t, int wide) {  // and of the tile in the block
    return (t / b.across * b.across * TILE + t % b.across) * TILE * wide;
}

// The cell's own input: features (pixels, 2 channels) and offset (2 channels) of an image
struct Input {
    const float *features, *offset;

    // Calls f(pixel, channel, drive, logit) for the vectors of some rows
    template <class F>
    INLINE void each(const Cell& g, const Band& band, F f) const {
        const int wide = g.wide(), c2 = 2 * g.channels;
        float shift[2 * wide], row[2 * wide];
        for (int half = 0; half < 2; half++)
            pack_pixels(1, g.channels, offset + half * g.channels, wide, shift + half * wide);
        for (size_t p = (size_t)band.first * g.width; p < (size_t)band.last * g.width; p++) {
            const float *drive = features + p * c2, *logit = drive + g.channels;
            if (g.channels != wide) {
                pack_pixels(1, g.channels, drive, wide, row);
                pack_pixels(1, g.channels, logit, wide, row + wide);
                drive = row, logit = row + wide;
            }
            for (int c = 0; c < wide; c += LANES)
                f(p, c, load(drive + c) + load(shift + c), load(logit + c) + load(shift + wide + c));
        }
    }
    void read(const Cell& g, const Band& band, float* drive, float* share) const {
        each(g, band, [&](size_t p, int c, vec d, vec logit) {
            store(drive + p * g.wide() + c, d);
            store(share + p * g.wide() + c, share_of(g.scheme, g.dt / (g.tau_min + g.tau_range * sigmoid(logit))));
        });
    }
    // of_features (pixels, 2 channels), and its sums over the pixels of these rows, (2, wide)
    void gradient(const Cell& g, const Band& band, const float* of_drive, const float* of_share, float* of_features,
                  float* sums) const {
        const int wide = g.wide();
        memset(sums, 0, 2 * wide * sizeof(float));
        float row[2][LANES];
        each(g, band, [&](size_t p, int c, vec, vec logit) {
            const vec s = sigmoid(logit), a = g.dt / (g.tau_min + g.tau_range * s);
            const vec d = load(of_drive + p * wide + c);
            const vec l =
                load(of_share + p * wide + c) * share_slope(g.scheme, a) * a * a * (-g.tau_range / g.dt) * (s - s * s);
            add(sums + c, d), add(sums + wide + c, l);
            float* to = of_features + p * 2 * g.channels + c;
            if (c + LANES <= g.channels) {
                store(to, d), store(to + g.channels, l);
            } else {
                store(row[0], d), store(row[1], l);
                memcpy(to, row[0], (g.channels - c) * sizeof(float));
                memcpy(to + g.channels, row[1], (g.channels - c) * sizeof(float));
            }
        });
    }
};

INLINE vec moved(vec h, vec z, vec share) { return h + share * (z * sigmoid(z) - h); }

void clear_border(const Cell& g, float* padded) {  // all but the pixels
    const size_t row = g.row();
    memset(padded, 0, row * sizeof(float));
    for (int y = 0; y < g.height; y++) {
        float* pixels = padded + g.inside(y);
        memset(pixels - g.wide(), 0, g.wide() * sizeof(float));
        memset(pixels + g.line(), 0, (row - g.line() - g.wide()) * sizeof(float));
    }
    memset(padded + (g.height + 1) * row, 0, (g.padded() - (g.height + 1) * row) * sizeof(float));
}
void copy_rows(const Cell& g, const Band& band, const float* pixels, float* padded) {  // null pixels: zeros
    for (int y = band.first; y < band.last; y++) {
        float* to = padded + g.inside(y);
        if (pixels)
            pack_pixels(g.width, g.channels, pixels + (size_t)y * g.width * g.channels, g.wide(), to);
        else
            memset(to, 0, g.line() * sizeof(float));
    }
}
void rows_back(const Cell& g, const Band& band, const float* padded, float* pixels) {
    for (int y = band.first; y < band.last; y++)
        unpack_pixels(g.width, g.channels, padded + g.inside(y), g.wide(), pixels + (size_t)y * g.width * g.channels);
}

struct Workspace {  // of a thread
    float *v, *m, *pixels;
    int apart;
};
void take(Arena& arena, const Cell& g, int tiles, Workspace& w) {
    w.apart = point_apart(tiles, g.wide());
    w.v = arena.take(ALL_POINTS * w.apart), w.m = arena.take(ALL_POINTS * w.apart);
    w.pixels = arena.take(tiles * TILE * TILE * g.wide());
}

// The rows of a band one step further: from h to next, both padded. z (null: not wanted) is kept.
void step(const Cell& g, const Band& band, const float* weights, const float* h, const float* drive, const float* share,
          float* next, float* z, const Workspace& w) {
    const int wide = g.wide();
    for_blocks(band.top, band.bottom, g.across(), FORWARD_TILES, [&](const Block& b) {
        for (int t = 0; t < b.count(); t++) input_points(h + tile_in(g, b, t), g.row(), wide, w.v + t * wide, w.apart);
        for (int p = 0; p < ALL_POINTS; p++)
            product(b.count(), g.channels, wide / LANES, w.v + p * w.apart, wide, weights + p * g.weights().point(),
                    w.m + p * w.apart, wide);
        for (int t = 0; t < b.count(); t++)
            output_pixels(w.m + t * wide, w.apart, wide, w.pixels + tile_in(b, t, wide), b.across * TILE * wide);
        for_rows(g, b, [=](size_t at, int in, int from, int count) {
            const float *sum = w.pixels + from, *d = drive + at, *a = share + at, *now = h + in;
            float *to = next + in, *kept = z ? z + at : nullptr;
#pragma GCC unroll 2
            for (int i = 0; i < count; i += LANES) {
                const vec z_ = load(sum + i) + load(d + i);
                if (kept) store(kept + i, z_);
                store(to + i, moved(load(now + i), z_, load(a + i)));
            }
        });
    });
}
// The same without a convolution, from a known z
void step_from(const Cell& g, const Band& band, const float* z, const float* h, const float* share, float* next) {
    for (int y = band.first; y < band.last; y++) {
        const float *zs = z + (size_t)y * g.line(), *a = share + (size_t)y * g.line(), *now = h + g.inside(y);
        float* to = next + g.inside(y);
#pragma GCC unroll 2
        for (int i = 0; i < g.line(); i += LANES) store(to + i, moved(load(now + i), load(zs + i), load(a + i)));
    }
}

// A step's gradients for the rows of a band. of_next: of the state after it. of_h: of the state before it, h, with a
// border. of_drive and of_share are added to, unless this is the last step. of_points: of the weights, or null for a
// first step from zeros.
void step_gradient(const Cell& g, const Band& band, const float* exchanged, const float* h, const float* z,
                   const float* share, bool last, const float* of_next, float* of_h, float* of_drive, float* of_share,
                   float* of_points, const Workspace& w) {
    const int wide = g.wide();
    auto clear = [=](int row, int count) { memset(of_h + (size_t)row * g.row(), 0, count * g.row() * sizeof(float)); };
    clear(band.top * TILE, 2);  // the border, and the first row
    for_blocks(band.top, band.bottom, g.across(), whole_rows(g), [&](const Block& b) {
        const int bottom = (b.top + b.down) * TILE, inside = std::min(bottom, g.height);
        if (bottom > g.height || b.across * TILE > g.width)
            memset(w.pixels, 0, b.count() * TILE * TILE * wide * sizeof(float));
        for_rows(g, b, [=](size_t at, int in, int from, int count) {
            const bool begun = from == 0;  // the tiles above have added to the first row
            const float *zs = z + at, *shares = share + at, *now = h + in, *next = of_next + in;
            float *of_sum = w.pixels + from, *to = of_h + in, *drives = of_drive + at, *of_shares = of_share + at;
#pragma GCC unroll 2
            for (int i = 0; i < count; i += LANES) {
                const vec z_ = load(zs + i), a = load(shares + i), of = load(next + i);
                const vec s = sigmoid(z_), f = z_ * s, m = of * a, of_z = m * (s + f - f * s);
                const vec of_a = of * (f - load(now + i));
                store(of_sum + i, of_z);
                store(to + i, begun ? load(to + i) + (of - m) : of - m);
                store(drives + i, last ? of_z : load(drives + i) + of_z);
                store(of_shares + i, last ? of_a : load(of_shares + i) + of_a);
            }
        });
        clear(inside + 1, bottom - inside + 1);  // the row below, to which the tiles add
        if (!of_points) return;
        for (int t = 0; t < b.count(); t++) {
            output_gradient(w.pixels + tile_in(b, t, wide), b.across * TILE * wide, wide, w.m + t * wide, w.apart);
            input_points(h + tile_in(g, b, t), g.row(), wide, w.v + t * wide, w.apart);
        }
        for (int p = 0; p < ALL_POINTS; p++) {
            float *v = w.v + p * w.apart, *m = w.m + p * w.apart;
            add_outer(b.count(), g.channels, wide / LANES, v, wide, m, wide, of_points + p * g.weights().point());
            product(b.count(), g.channels, wide / LANES, m, wide, exchanged + p * g.weights().point(), v, wide);
        }
        for (int t = 0; t < b.count(); t++)
            add_input_gradient(w.v + t * wide, w.apart, wide, of_h + tile_in(g, b, t), g.row());
    });
}

void add_row(const Cell& g, const float* from, float* to, int y) {  // y: of the padded image
    for (int i = 0; i < g.row(); i += LANES) add(to + (size_t)y * g.row() + i, load(from + (size_t)y * g.row() + i));
}

}  // namespace

extern "C" {

int vector_lanes() { return LANES; }

// Both functions return whether there was enough memory. h (null for zeros), output, gradient: (images, height, width,
// channels). features: (images, height, width, 2 channels). offset: (images, 2 channels). weight: (channels, channels,
// 3, 3). z: null, or a pointer per step to (images, height, width, channels rounded up to lanes); the first is null if
// h is.
bool cell_forward(int threads, int images, int channels, int height, int width, int steps, int scheme, float dt,
                  float tau_min, float tau_max, const float* h, const float* features, const float* offset,
                  const float* weight, float* output, float* const* z) try {
    const Cell g{channels, height, width, steps, Scheme(scheme), dt, tau_min, tau_max - tau_min};
    const size_t pixels = (size_t)height * width;
    Arena::with([&](Arena& arena) {
        float* weights = arena.take(g.weights().all());
        float *now[threads], *next[threads], *drive[threads], *share[threads];  // of a group of threads
        Workspace own[threads];
        for (int t = 0; t < threads; t++) {
            now[t] = arena.take(g.padded()), next[t] = arena.take(g.padded());
            drive[t] = arena.take(g.area()), share[t] = arena.take(g.area());
            take(arena, g, FORWARD_TILES, own[t]);
        }
        if (!weights) return;  // only counted
#pragma omp parallel num_threads(threads)
        {
            const Team team(images, g.down());
            const Band band(g, team);
            g.weights().transform(weight, weights, false, false);
            const int mine = team.group;
            if (team.index == 0 && mine < team.groups) clear_border(g, now[mine]), clear_border(g, next[mine]);
            team.wait();
            team.each(images, [&](int image) {
                const bool busy = image >= 0;
                const Input input{features + image * pixels * 2 * channels, offset + (int64_t)image * 2 * channels};
                float *from = now[mine], *to = next[mine], *d = drive[mine], *a = share[mine];
                if (busy) {
                    input.read(g, band, d, a);
                    copy_rows(g, band, h ? h + image * pixels * channels : nullptr, from);
                }
                team.wait();
                for (int k = 0; k < steps; k++) {
                    if (busy && k == 0 && !h)
                        step_from(g, band, d, from, a, to);
                    else if (busy)
                        step(g, band, weights, from, d, a, to, z ? z[k] + image * g.area() : nullptr, own[team.thread]);
                    std::swap(from, to);
                    team.wait();
                }
                if (busy) rows_back(g, band, from, output + image * pixels * channels);
            });
        }
    });
    return true;
} catch (const std::bad_alloc&) {
    return false;
}

// z: what the forward pass kept. The gradients are those of h (null if h was null), features, offset and weight.
bool cell_backward(int threads, int images, int channels, int height, int width, int steps, int scheme, float dt,
                   float tau_min, float tau_max, const float* gradient, const float* h, const float* features,
                   const float* offset, const float* weight, const float* const* z, float* of_h, float* of_features,
                   float* of_offset, float* of_weight) try {
    const Cell g{channels, height, width, steps, Scheme(scheme), dt, tau_min, tau_max - tau_min};
    const size_t pixels = (size_t)height * width;
    const int wide = g.wide();
    Arena::with([&](Arena& arena) {
        float* exchanged = arena.take(g.weights().all());
        float *states[threads], *drive[threads], *share[threads], *of_drive[threads], *of_share[threads];  // of a group
        float *before[threads], *after[threads], *points[threads], *sums[threads];  // gradients, of a thread
        Workspace own[threads];
        for (int t = 0; t < threads; t++) {
            states[t] = arena.take(steps * g.padded());
            drive[t] = arena.take(g.area()), share[t] = arena.take(g.area());
            of_drive[t] = arena.take(g.area()), of_share[t] = arena.take(g.area());
            before[t] = arena.take(g.padded()), after[t] = arena.take(g.padded());
            points[t] = arena.take(g.weights().all()), sums[t] = arena.take(2 * wide);
            take(arena, g, whole_rows(g), own[t]);
        }
        if (!exchanged) return;  // only counted
#pragma omp parallel num_threads(threads)
        {
            const Team team(images, g.down());
            const Band band(g, team);
            g.weights().transform(weight, exchanged, true, false);
            const int mine = team.group, me = team.thread;
            memset(points[me], 0, g.weights().all() * sizeof(float));
            clear_border(g, before[me]), clear_border(g, after[me]);
            for (int k = 0; k < steps && team.index == 0 && mine < team.groups; k++)
                clear_border(g, states[mine] + k * g.padded());
            team.wait();
            team.each(images, [&](int image) {
                const bool busy = image >= 0;
                const Input input{features + image * pixels * 2 * channels, offset + (int64_t)image * 2 * channels};
                float *of_next = after[me], *of_now = before[me];
                auto z_of = [&](int k) { return k == 0 && !h ? drive[mine] : z[k] + image * g.area(); };
                auto state = [&](int k) { return states[mine] + k * g.padded(); };
                if (busy) {
                    input.read(g, band, drive[mine], share[mine]);
                    copy_rows(g, band, h ? h + image * pixels * channels : nullptr, state(0));
                    for (int k = 0; k + 1 < steps; k++)
                        step_from(g, band, z_of(k), state(k), share[mine], state(k + 1));
                    copy_rows(g, band, gradient + image * pixels * channels, of_next);
                }
                team.wait();
                for (int k = steps - 1; k >= 0; k--) {
                    const bool still = k == 0 && !h;  // W_rec * 0 = 0
                    if (busy)
                        step_gradient(g, band, exchanged, state(k), z_of(k), share[mine], k == steps - 1, of_next,
                                      of_now, of_drive[mine], of_share[mine], still ? nullptr : points[me], own[me]);
                    team.wait();
                    std::swap(of_now, of_next);
                    if (!busy || team.size == 1) continue;
                    // the rows next to the bands of other threads, whose tiles have added to them, too
                    auto of = [&](int thread) { return of_next == after[me] ? after[thread] : before[thread]; };
                    if (band.top > 0) add_row(g, of(me - 1), of_next, band.top * TILE + 1);
                    if (band.bottom < g.down()) add_row(g, of(me + 1), of_next, band.bottom * TILE);
                }
                if (busy) {
                    if (h) rows_back(g, band, of_next, of_h + image * pixels * channels);
                    input.gradient(g, band, of_drive[mine], of_share[mine], of_features + image * pixels * 2 * channels,
                                   sums[me]);
                }
                team.wait();
                if (busy && team.index == 0)
                    for (int half = 0; half < 2; half++)
                        for (int c = 0; c < channels; c++) {
                            float sum = 0;
                            for (int t = 0; t < team.size; t++) sum += sums[me + t][half * wide + c];
                            of_offset[(size_t)image * 2 * channels + half * channels + c] = sum;
                        }
                team.wait();
            });
#pragma omp barrier
            g.weights().gradient(team.threads, points, of_weight);
        }
    });
    return true;
} catch (const std::bad_alloc&) {
    return false;
}
}
