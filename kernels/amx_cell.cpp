// The whole integration of a liquid cell, one image at a time: the state stays in the cache from the first ODE step to
// the last, and the recurrent 3x3 convolution runs on the matrix unit of the processor (AMX: bf16 products, fp32 sums).
//
//     h_{k+1} = h_k + share (silu(W_rec * h_k + drive) - h_k),   k = 0 .. steps - 1
//     share = g(dt / tau),   tau = tau_min + (tau_max - tau_min) sigmoid(logit),   where g depends on the scheme
//
// (drive, logit) = features + offset, where `features` has a value for every pixel and `offset` one for all pixels.
//
// An image is stored as one line of positions with CHANNELS bf16 values each. Rows are separated by one position of
// zeros, so each neighbour of a pixel is a fixed number of positions away, and there are zeros beyond every border.
// `share` is zero there, too, so these positions stay zero: h + 0 (f - h) = 0.
//
// liquid_kernel.py compiles and calls this file; RealLiquidCell has the same equations in torch.

#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <vector>

namespace {

constexpr int CHANNELS = 32;  // per position; fewer are padded with zeros
constexpr int CHUNK = 32;     // positions that the matrix unit multiplies at once
constexpr int TILE = 16;      // rows of a tile, 64 bytes each
constexpr int TAPS = 9;
constexpr int BLOCK = 8 * CHUNK;  // positions per block of the weight's gradient
using bf16 = uint16_t;

struct Grid {
    int channels, height, width;
    int row() const { return width + 1; }
    int guard() const { return row() + 1; }  // positions of zeros before the first and after the last pixel
    int positions() const { return (height * row() + CHUNK - 1) / CHUNK * CHUNK; }
    int padded() const { return guard() + positions() + guard(); }
    int line() const { return padded() * CHANNELS; }  // bf16 values per image
    int first() const { return guard() * CHANNELS; }  // index of the first pixel
    int offset(int tap) const { return (tap / 3 - 1) * row() + tap % 3 - 1; }
    __mmask32 mask() const { return channels == CHANNELS ? ~0u : (1u << channels) - 1; }
};

template <typename T>
struct Buffer {  // filled with zeros, aligned to a cache line
    std::unique_ptr<T[], void (*)(void*)> data;
    explicit Buffer(size_t count) : data(static_cast<T*>(aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)), free) {
        if (!data) throw std::bad_alloc();
        std::memset(data.get(), 0, count * sizeof(T));
    }
    operator T*() { return data.get(); }
};

// A permutation of 16-bit values: v_i, w_i, v_{i+1}, w_{i+1}, ..., where w starts `apart` values after v
__m512i alternating(int i, int apart) {
    alignas(64) uint16_t order[32];
    for (int at = 0; at < 32; at++) order[at] = i + at / 2 + at % 2 * apart;
    return _mm512_load_si512(order);
}
const __m512i ZIP = alternating(0, 16), PAIR_LOW = alternating(0, 32), PAIR_HIGH = alternating(16, 32);

struct Pair {  // the 32 values of a position in fp32: the even channels, the odd channels
    __m512 even, odd;
};

inline Pair widen(__m512i v) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(0xffff0000)))};
}
inline Pair load(const bf16* p) { return widen(_mm512_loadu_si512(p)); }
inline Pair load(const float* p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)}; }
inline __m512i narrow(Pair v) { return _mm512_permutexvar_epi16(ZIP, (__m512i)_mm512_cvtne2ps_pbh(v.odd, v.even)); }
inline void store(bf16* p, Pair v) { _mm512_storeu_si512(p, narrow(v)); }
inline void store(float* p, Pair v) {
    _mm512_storeu_ps(p, v.even);
    _mm512_storeu_ps(p + 16, v.odd);
}
// 2^t as 2^floor(t) times a Chebyshev polynomial of the rest, within 1e-4
inline __m512 exp2(__m512 t) {
    const __m512 x = _mm512_reduce_ps(t, 1);  // t - floor(t)
    __m512 e = _mm512_set1_ps(0.07790716f);
    for (float c : {0.22623319f, 0.69577710f, 0.99992783f}) e = _mm512_fmadd_ps(e, x, _mm512_set1_ps(c));
    return _mm512_scalef_ps(e, t);
}
inline __m512 exp_of_minus(__m512 z) { return exp2(_mm512_mul_ps(z, _mm512_set1_ps(-1.44269504f))); }
inline __m512 sigmoid(__m512 z) { return _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1), exp_of_minus(z))); }

// Copy (height, width) pixels of `channels` bf16 values to the layout described above, and back
void gather(const Grid& g, const bf16* pixels, bf16* line) {
    for (int y = 0; y < g.height; y++)
        for (int x = 0; x < g.width; x++)
            _mm512_store_si512(line + (y * g.row() + x) * CHANNELS,
                               _mm512_maskz_loadu_epi16(g.mask(), pixels + (int64_t(y) * g.width + x) * g.channels));
}
template <typename T>
void scatter(const Grid& g, const T* line, bf16* pixels) {
    for (int y = 0; y < g.height; y++)
        for (int x = 0; x < g.width; x++)
            _mm512_mask_storeu_epi16(pixels + (int64_t(y) * g.width + x) * g.channels, g.mask(),
                                     narrow(load(line + (y * g.row() + x) * CHANNELS)));
}

// One step moves the state by the fraction `share` of its way to f: a, a / (1 + a) or 1 - exp(-a), where a = dt / tau
enum Scheme { EULER, SEMI_IMPLICIT, EXPONENTIAL };

// The input of the cell: `features`, 2 * channels values per pixel, and `offset`, 2 * channels values per image
struct Input {
    const bf16 *features, *offset;
    Scheme scheme;
    float dt, tau_min, tau_range;

    Input of(const Grid& g, int64_t image) const {
        const int width = 2 * g.channels;
        return {features + image * g.height * g.width * width, offset + image * width, scheme, dt, tau_min, tau_range};
    }
    Pair at(const Grid& g, int64_t pixel, int half) const {  // 0: drive, 1: logit
        const Pair x = widen(_mm512_maskz_loadu_epi16(g.mask(), features + (2 * pixel + half) * g.channels));
        const Pair t = widen(_mm512_maskz_loadu_epi16(g.mask(), offset + half * g.channels));
        return {_mm512_add_ps(x.even, t.even), _mm512_add_ps(x.odd, t.odd)};
    }
    __m512 step(__m512 p) const {  // a = dt / tau, from p = sigmoid(logit)
        const __m512 tau = _mm512_fmadd_ps(p, _mm512_set1_ps(tau_range), _mm512_set1_ps(tau_min));
        return _mm512_mul_ps(_mm512_set1_ps(dt), _mm512_rcp14_ps(tau));
    }
    __m512 share(__m512 logit) const {
        const __m512 one = _mm512_set1_ps(1), a = step(sigmoid(logit));
        if (scheme == EULER) return a;
        if (scheme == SEMI_IMPLICIT) return _mm512_mul_ps(a, _mm512_rcp14_ps(_mm512_add_ps(one, a)));
        return _mm512_sub_ps(one, exp_of_minus(a));
    }
    __m512 slope_of_share(__m512 logit) const {  // d share / d logit
        // da / d logit = -dt / tau^2 (tau_max - tau_min) p (1 - p)
        const __m512 p = sigmoid(logit), a = step(p), one = _mm512_set1_ps(1);
        const __m512 of_p = _mm512_mul_ps(_mm512_mul_ps(a, a), _mm512_set1_ps(-tau_range / dt));
        const __m512 of_logit = _mm512_mul_ps(of_p, _mm512_fnmadd_ps(p, p, p));
        if (scheme == EULER) return of_logit;
        if (scheme == EXPONENTIAL) return _mm512_mul_ps(of_logit, exp_of_minus(a));
        const __m512 r = _mm512_rcp14_ps(_mm512_add_ps(one, a));
        return _mm512_mul_ps(of_logit, _mm512_mul_ps(r, r));
    }
};

void gather(const Grid& g, const Input& input, bf16* drive, bf16* share) {
    for (int y = 0; y < g.height; y++)
        for (int x = 0; x < g.width; x++) {
            const int at = (y * g.row() + x) * CHANNELS;
            const Pair logit = input.at(g, y * g.width + x, 1);
            store(drive + at, input.at(g, y * g.width + x, 0));
            store(share + at, {input.share(logit.even), input.share(logit.odd)});
        }
}

// Compute the gradients of the input from those of drive and share
void scatter(const Grid& g, const Input& input, const float* of_drive, const float* of_share, bf16* of_features,
             bf16* of_offset) {
    Pair sums[2] = {};
    for (int y = 0; y < g.height; y++)
        for (int x = 0; x < g.width; x++) {
            const int at = (y * g.row() + x) * CHANNELS;
            const int64_t pixel = y * g.width + x;
            const Pair logit = input.at(g, pixel, 1), a = load(of_share + at);
            const Pair found[2] = {load(of_drive + at),
                                   {_mm512_mul_ps(a.even, input.slope_of_share(logit.even)),
                                    _mm512_mul_ps(a.odd, input.slope_of_share(logit.odd))}};
            for (int half = 0; half < 2; half++) {
                sums[half] = {_mm512_add_ps(sums[half].even, found[half].even),
                              _mm512_add_ps(sums[half].odd, found[half].odd)};
                _mm512_mask_storeu_epi16(of_features + (2 * pixel + half) * g.channels, g.mask(), narrow(found[half]));
            }
        }
    for (int half = 0; half < 2; half++)
        _mm512_mask_storeu_epi16(of_offset + half * g.channels, g.mask(), narrow(sums[half]));
}

// Tiles 0 to 3 are the sums, 32 rows (0, 2: the first 16) by 32 columns (0, 1: the first 16). 4 to 7 are the factors.
class Tiles {
    alignas(64) uint8_t before[64];  // restored at the end: oneDNN remembers what it has configured

  public:
    Tiles() {
        alignas(64) uint8_t config[64] = {1};
        for (int tile = 0; tile < 8; tile++) {
            config[16 + 2 * tile] = 64;
            config[48 + tile] = TILE;
        }
        _tile_storeconfig(before);
        _tile_loadconfig(config);
    }
    ~Tiles() { before[0] ? _tile_loadconfig(before) : _tile_release(); }
};
inline void written() { asm volatile("" ::: "memory"); }  // tells gcc that tiles read and write memory
inline void sums_zero() {
    written();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}
inline void sums_load(const float* p) {  // rows of 32 values
    written();
    _tile_loadd(0, p, 128);
    _tile_loadd(2, p + TILE, 128);
    _tile_loadd(1, p + TILE * CHANNELS, 128);
    _tile_loadd(3, p + TILE * CHANNELS + TILE, 128);
}
inline void sums_store(float* p) {
    _tile_stored(0, p, 128);
    _tile_stored(2, p + TILE, 128);
    _tile_stored(1, p + TILE * CHANNELS, 128);
    _tile_stored(3, p + TILE * CHANNELS + TILE, 128);
    written();
}
inline void multiply(const bf16* a, size_t a_row, const bf16* b, size_t b_row) {  // rows in bytes; b has pairs of rows
    _tile_loadd(4, a, a_row);
    _tile_loadd(5, a + TILE * a_row / sizeof(bf16), a_row);
    _tile_loadd(6, b, b_row);
    _tile_loadd(7, b + 2 * TILE, b_row);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
}

inline bf16 rounded(float v) { return (bf16)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(v)), 0); }

// One tap of the weight (channels, channels, 3, 3) as the second factor, [tap][input / 2][output][input % 2], with the
// even outputs first, as in a Pair; with input and output exchanged for the gradient of the state.
void second_factor(const Grid& g, const float* weight, int tap, bool exchanged, bf16* factor) {
    for (int output = 0; output < g.channels; output++)
        for (int input = 0; input < g.channels; input++) {
            const int k = exchanged ? output : input, n = exchanged ? input : output;
            factor[((tap * CHANNELS / 2 + k / 2) * CHANNELS + n % 2 * TILE + n / 2) * 2 + k % 2] =
                rounded(weight[(output * g.channels + input) * TAPS + tap]);
        }
}

// Interleave positions 2i and 2i + 1: [i][channel][2]
inline void pair_up(const bf16* line, bf16* paired) {
    const __m512i first = _mm512_load_si512(line), second = _mm512_load_si512(line + CHANNELS);
    _mm512_store_si512(paired, _mm512_permutex2var_epi16(first, PAIR_LOW, second));
    _mm512_store_si512(paired + CHANNELS, _mm512_permutex2var_epi16(first, PAIR_HIGH, second));
}

// Transpose a 16 x 16 block of pairs; from_row and to_row are the distances between rows in bf16 values
inline void transpose(const bf16* from, int from_row, bf16* to, int to_row) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * from_row);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {  // a[4m + i]: columns i, i + 4, i + 8, i + 12 of rows 4m .. 4m + 3
        __m512i p = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), q = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
        __m512i r = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd), s = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
        b[i] = _mm512_shuffle_i32x4(p, q, 0x88), b[8 + i] = _mm512_shuffle_i32x4(p, q, 0xdd);
        b[4 + i] = _mm512_shuffle_i32x4(r, s, 0x88), b[12 + i] = _mm512_shuffle_i32x4(r, s, 0xdd);
    }
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * to_row, b[i]);
}

// The memory that a thread needs for an image. It is kept between calls, since to allocate and zero it takes as long as
// half of the work on a small image. Beyond the borders all lines stay zero. At 32x32 and 7 steps it has 1.7 MB, which
// fit in a second-level cache.
struct Scratch {
    Buffer<bf16> drive, share, paired, columns, states, drives;
    Buffer<float> of_h, of_share;
    explicit Scratch(const Grid& g, int steps)
        : drive(g.line()), share(g.line()), paired(g.line()), columns(g.line()), states((steps + 1) * g.line()),
          drives(steps * g.line()), of_h(g.line()), of_share(g.line()) {}
    static Scratch& of(const Grid& g, int steps) {
        static thread_local std::map<std::array<int, 3>, std::unique_ptr<Scratch>> all;
        auto& mine = all[{g.height, g.width, steps}];
        if (!mine) mine = std::make_unique<Scratch>(g, steps);
        return *mine;
    }
};

// The result of `make`; if memory runs out, null and `failed` is set, since no exception may leave a parallel region
template <typename Make>
auto made(Make make, bool& failed) -> decltype(make()) {
    try {
        return make();
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
        failed = true;
        return nullptr;
    }
}

// Compute the state after each step: h_k is in line k % kept of `states`, and so is h_0 unless the state starts from
// zeros. If `drives` is not null, W_rec * h_k + drive is written to its line k.
void integrate(const Grid& g, int steps, bool from_zeros, const bf16* drive, const bf16* share, const bf16* factor,
               bf16* states, int kept, bf16* drives) {
    alignas(64) float sums[2][CHUNK * CHANNELS] = {};
    for (int step = 0; step < steps; step++) {
        const bf16* h = states + step % kept * g.line() + g.first();
        bf16* next = states + (step + 1) % kept * g.line() + g.first();
        const bool still = from_zeros && step == 0;  // W_rec * 0 = 0
        auto move = [&](int position) {
            const int at = position * CHANNELS;
            const Pair sum = load(sums[position / CHUNK % 2] + position % CHUNK * CHANNELS);
            const Pair d = load(drive + at), a = load(share + at);
            const Pair z{_mm512_add_ps(d.even, sum.even), _mm512_add_ps(d.odd, sum.odd)};
            const Pair now = still ? Pair{_mm512_setzero_ps(), _mm512_setzero_ps()} : load(h + at);
            auto moved = [](__m512 h, __m512 z, __m512 a) {
                return _mm512_fmadd_ps(a, _mm512_fmsub_ps(z, sigmoid(z), h), h);
            };
            store(next + at, {moved(now.even, z.even, a.even), moved(now.odd, z.odd, a.odd)});
            if (drives) store(drives + step * g.line() + g.first() + at, z);
        };
        for (int q = 0; q <= g.positions(); q += CHUNK) {  // the matrix unit is one chunk ahead of the vector units
            const bool more = !still && q < g.positions();
            if (more) sums_zero();
            for (int tap = 0; tap < TAPS; tap++) {
                if (more) multiply(h + (q + g.offset(tap)) * CHANNELS, 64, factor + tap * CHANNELS * CHANNELS, 128);
                if (q > 0)
                    for (int i = tap * CHUNK / TAPS; i < (tap + 1) * CHUNK / TAPS; i++) move(q - CHUNK + i);
            }
            if (more) sums_store(sums[q / CHUNK % 2]);
        }
    }
}

// Add the gradient from one convolution to that of the weight, [tap][input][output]; h and of_z have their guards
void add_weight_gradient(const Grid& g, const bf16* h, const bf16* of_z, bf16* columns, bf16* paired,
                         float* of_weight) {
    const int plane = g.padded();  // columns: [channel][position]
    int q = 0;
    for (; q + CHUNK <= plane; q += CHUNK) {
        for (int i = 0; i < CHUNK; i += 2) pair_up(h + (q + i) * CHANNELS, paired + i * CHANNELS);
        for (int half = 0; half < 2; half++)
            transpose(paired + CHANNELS * half, 2 * CHANNELS, columns + TILE * half * plane + q, plane);
    }
    for (; q < plane; q++)
        for (int c = 0; c < CHANNELS; c++) columns[c * plane + q] = h[q * CHANNELS + c];
    for (int q = 0; q < g.positions(); q += 2) pair_up(of_z + g.first() + q * CHANNELS, paired + q * CHANNELS);
    for (int from = 0; from < g.positions(); from += BLOCK) {  // a block of both stays in the first-level cache
        const int to = std::min(from + BLOCK, g.positions());
        for (int tap = 0; tap < TAPS; tap++) {
            sums_load(of_weight + tap * CHANNELS * CHANNELS);
            for (int q = from; q < to; q += CHUNK)
                multiply(columns + g.guard() + q + g.offset(tap), 2 * plane, paired + q * CHANNELS, 128);
            sums_store(of_weight + tap * CHANNELS * CHANNELS);
        }
    }
}

}  // namespace

extern "C" {

// Whether this process may use the matrix unit; asks Linux for the permission
bool amx_permitted() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// Both functions return whether there was enough memory. state (null for zeros), output, gradient: (images, height,
// width, channels). features: (images, height, width, 2 channels). offset: (images, 2 channels). weight: (channels,
// channels, 3, 3).
bool amx_cell_forward(int threads, int images, int channels, int height, int width, int steps, Scheme scheme, float dt,
                      float tau_min, float tau_max, const bf16* state, const bf16* features, const bf16* offset,
                      const float* weight, bf16* output) try {
    const Grid g{channels, height, width};
    const Input input{features, offset, scheme, dt, tau_min, tau_max - tau_min};
    const int64_t area = int64_t(height) * width;
    Buffer<bf16> factor(TAPS * CHANNELS * CHANNELS);
    bool failed = false;
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        Scratch* own = made([&] { return &Scratch::of(g, steps); }, failed);
#pragma omp for schedule(static)
        for (int tap = 0; tap < TAPS; tap++) second_factor(g, weight, tap, false, factor);
#pragma omp for schedule(static)
        for (int image = 0; image < images; image++) {
            if (failed) continue;
            bf16 *d = own->drive, *s = own->share, *states = own->states;
            gather(g, input.of(g, image), d, s);
            std::fill_n(states, g.line(), 0);
            if (state) gather(g, state + image * area * channels, states + g.first());
            integrate(g, steps, !state, d, s, factor, states, 2, nullptr);
            scatter(g, states + steps % 2 * g.line() + g.first(), output + image * area * channels);
        }
    }
    return !failed;
} catch (const std::bad_alloc&) {
    return false;
}

// The gradients of state (null if the state was null), features, offset and weight. The state of every step is computed
// again in the cache, image by image, instead of being written to memory and read back.
bool amx_cell_backward(int threads, int images, int channels, int height, int width, int steps, Scheme scheme, float dt,
                       float tau_min, float tau_max, const bf16* gradient, const bf16* state, const bf16* features,
                       const bf16* offset, const float* weight, bf16* state_gradient, bf16* features_gradient,
                       bf16* offset_gradient, float* weight_gradient) try {
    const Grid g{channels, height, width};
    const Input input{features, offset, scheme, dt, tau_min, tau_max - tau_min};
    const int64_t area = int64_t(height) * width;
    const int inner = g.positions() * CHANNELS;
    const int weights = TAPS * CHANNELS * CHANNELS;
    Buffer<bf16> factor(weights), exchanged(weights);
    std::vector<std::unique_ptr<Buffer<float>>> parts(threads);  // of the weight's gradient, per thread
    bool failed = false;
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        Scratch* own = made([&] { return &Scratch::of(g, steps); }, failed);
        auto& part = parts[omp_get_thread_num()];
        part.reset(made([&] { return new Buffer<float>(weights); }, failed));
        const Pair zero{_mm512_setzero_ps(), _mm512_setzero_ps()};
#pragma omp for schedule(static)
        for (int tap = 0; tap < TAPS; tap++) {
            second_factor(g, weight, tap, false, factor);
            second_factor(g, weight, tap, true, exchanged);
        }
#pragma omp for schedule(static)
        for (int image = 0; image < images; image++) {
            if (failed) continue;
            bf16 *d = own->drive, *s = own->share, *states = own->states, *drives = own->drives;
            float *of_h = own->of_h, *of_share = own->of_share;
            gather(g, input.of(g, image), d, s);
            std::fill_n(states, g.line(), 0);
            if (state) gather(g, state + image * area * channels, states + g.first());
            integrate(g, steps, !state, d, s, factor, states, steps + 1, drives);
            bf16* last = states + steps * g.line() + g.first();  // overwritten by the gradient
            gather(g, gradient + image * area * channels, last);
            for (int at = 0; at < inner; at += CHANNELS) {
                store(of_h + at, load(last + at));
                store(of_share + at, zero);
            }
            for (int step = steps - 1; step >= 0; step--) {
                const bf16* h = states + step * g.line();  // h_0 is zeros without a state
                bf16* of_z = drives + step * g.line();     // overwrites z
                for (int at = 0; at < inner; at += CHANNELS) {
                    const Pair z = load(of_z + g.first() + at), a = load(s + at), now = load(h + g.first() + at);
                    Pair g_h = load(of_h + at), g_s = load(of_share + at), g_z;
                    auto back = [](__m512 z, __m512 a, __m512 h, __m512& g_h, __m512& g_s) {
                        const __m512 p = sigmoid(z), f = _mm512_mul_ps(z, p);
                        const __m512 slope = _mm512_fnmadd_ps(f, p, _mm512_add_ps(p, f));  // p + z p (1 - p)
                        const __m512 moved = _mm512_mul_ps(g_h, a);
                        g_s = _mm512_fmadd_ps(g_h, _mm512_sub_ps(f, h), g_s);
                        g_h = _mm512_sub_ps(g_h, moved);
                        return _mm512_mul_ps(moved, slope);
                    };
                    g_z.even = back(z.even, a.even, now.even, g_h.even, g_s.even);
                    g_z.odd = back(z.odd, a.odd, now.odd, g_h.odd, g_s.odd);
                    store(of_h + at, g_h);
                    store(of_share + at, g_s);
                    store(of_z + g.first() + at, g_z);
                }
                if (!state && step == 0) break;
                for (int q = 0; q < g.positions(); q += CHUNK) {
                    sums_load(of_h + q * CHANNELS);
                    for (int tap = 0; tap < TAPS; tap++)
                        multiply(of_z + g.first() + (q - g.offset(tap)) * CHANNELS, 64,
                                 exchanged + tap * CHANNELS * CHANNELS, 128);
                    sums_store(of_h + q * CHANNELS);
                }
                add_weight_gradient(g, h, of_z, own->columns, own->paired, *part);
            }
            if (state) scatter(g, of_h, state_gradient + image * area * channels);
            for (int at = 0; at < inner; at += CHANNELS) {
                Pair sum = zero;
                for (int step = 0; step < steps; step++) {
                    const Pair of_z = load(drives + step * g.line() + g.first() + at);
                    sum = {_mm512_add_ps(sum.even, of_z.even), _mm512_add_ps(sum.odd, of_z.odd)};
                }
                store(of_h + at, sum);
            }
            scatter(g, input.of(g, image), of_h, of_share, features_gradient + image * area * 2 * channels,
                    offset_gradient + image * 2 * channels);
        }
    }
    for (int output = 0; output < channels; output++)
        for (int input = 0; input < channels; input++)
            for (int tap = 0; tap < TAPS; tap++) {
                float sum = 0;
                for (auto& part : parts)  // always in the same order, so that the bytes are the same
                    if (part) sum += (*part)[(tap * CHANNELS + input) * CHANNELS + output];
                weight_gradient[(output * channels + input) * TAPS + tap] = sum;
            }
    return !failed;
} catch (const std::bad_alloc&) {
    return false;
}
}
