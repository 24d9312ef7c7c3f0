/* The noise of spec.py in C, the same bits: no float operation may be fused. build.py compiles it, native.py calls it; it knows no Python. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FAST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"))) /* the loader takes the best the processor can run */
#else
#define FAST
#endif
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

const char certify_noise_source[] = SOURCE; /* the digest of this file when it was compiled */

enum { CHUNK = 1024, MANY = -2 }; /* elements worked on at a time: all buffers stay in the first-level cache */

INLINE void philox(uint32_t c[4], uint64_t seed) {
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    for (int turn = 0; turn < 10; turn++) {
        const uint64_t a = (uint64_t)c[0] * 0xD2511F53u, b = (uint64_t)c[2] * 0xCD9E8D57u;
        c[0] = (uint32_t)(b >> 32) ^ c[1] ^ key0;
        c[2] = (uint32_t)(a >> 32) ^ c[3] ^ key1;
        c[1] = (uint32_t)b;
        c[3] = (uint32_t)a;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

INLINE void counter(uint32_t c[4], int64_t group, int64_t stream, int64_t sample) {
    c[0] = (uint32_t)group;
    c[1] = (uint32_t)sample;
    c[2] = (uint32_t)stream;
    c[3] = (uint32_t)((uint64_t)sample >> 32);
}

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
/* As `words`, eight groups at once. Compilers do not see that both factors have 32 bits, and take three times as long. */
__attribute__((target("avx512f"))) static void words_avx512(uint32_t *word, int64_t first, int64_t groups, int64_t stream, int64_t sample, uint64_t seed) {
    const __m512i lanes = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
    const __m512i early = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), late = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    for (int64_t g = 0; g < groups; g += 8) { /* only the lower 32 bits of each lane are the state; the others are never read */
        __m512i a = _mm512_add_epi64(lanes, _mm512_set1_epi64(first + g)), b = _mm512_set1_epi64(sample);
        __m512i c = _mm512_set1_epi64(stream), d = _mm512_set1_epi64((int64_t)((uint64_t)sample >> 32));
        uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
        for (int turn = 0; turn < 10; turn++) {
            const __m512i p = _mm512_mul_epu32(a, m0), q = _mm512_mul_epu32(c, m1);
            a = _mm512_ternarylogic_epi64(_mm512_srli_epi64(q, 32), b, _mm512_set1_epi64(key0), 0x96); /* exclusive or of three */
            c = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p, 32), d, _mm512_set1_epi64(key1), 0x96);
            b = q;
            d = p;
            key0 += 0x9E3779B9u;
            key1 += 0xBB67AE85u;
        }
        const __m512i ab = _mm512_mask_blend_epi32(0xAAAA, a, _mm512_slli_epi64(b, 32)), cd = _mm512_mask_blend_epi32(0xAAAA, c, _mm512_slli_epi64(d, 32));
        _mm512_storeu_si512(word + 4 * g, _mm512_permutex2var_epi64(ab, early, cd));
        _mm512_storeu_si512(word + 4 * g + 16, _mm512_permutex2var_epi64(ab, late, cd));
    }
}
#define WIDE_WORDS __builtin_cpu_supports("avx512f")
#else
#define WIDE_WORDS 0
#define words_avx512(...)
#endif

/* The words of `groups` groups of four elements from `first` on; `word` has room for a multiple of eight groups. */
INLINE void words(uint32_t *word, int64_t first, int64_t groups, int64_t stream, int64_t sample, uint64_t seed) {
    if (WIDE_WORDS) {
        words_avx512(word, first, groups, stream, sample, seed);
        return;
    }
    for (int64_t g = 0; g < groups; g++) {
        uint32_t c[4];
        counter(c, first + g, stream, sample);
        philox(c, seed);
        for (int lane = 0; lane < 4; lane++) word[4 * g + lane] = c[lane];
    }
}

INLINE float as_float(int32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE int32_t as_bits(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* out (count, width) = (float)(noise + image): each row of doubles plus the one row, rounded once. */
FAST void certify_noise_add(const double *noise, const double *image, int64_t count, int64_t width, float *out) {
    for (int64_t row = 0; row < count; row++) {
        const double *restrict a = noise + row * width, *restrict b = image;
        float *restrict y = out + row * width;
        for (int64_t i = 0; i < width; i++) y[i] = (float)(a[i] + b[i]);
    }
}

/* Votes as in counts.py: counts (slots, classes + 1) of logits (count, classes); rows are slot and two more, slot -1 is not counted. */
void certify_noise_votes(const float *logits, const int64_t *rows, int64_t count, int64_t classes, float margin, int64_t *counts) {
    for (int64_t row = 0; row < count; row++) {
        const float *x = logits + row * classes;
        const int64_t slot = rows[3 * row];
        if (slot < 0) continue;
        int64_t top = 0;
        int invalid = 0;
        for (int64_t k = 0; k < classes; k++) {
            invalid |= (as_bits(x[k]) & 0x7F800000) == 0x7F800000;
            top = x[k] > x[top] ? k : top;
        }
        if (!invalid && margin > 0)
            for (int64_t k = 0; k < classes; k++) invalid |= k != top && !(x[top] - x[k] > margin);
        counts[slot * (classes + 1) + (invalid ? classes : top)]++;
    }
}

/* |k| where the upper word does not decide: upwards from a lower bound, by 64-bit comparisons. */
static int32_t climb(int32_t magnitude, int32_t v, uint32_t low, const int32_t *high_of, const uint32_t *low_of) {
    while (v < high_of[magnitude] || (v == high_of[magnitude] && low < low_of[magnitude])) magnitude++;
    return magnitude;
}

/* out (count, elements): (images[slot] + k) scale + bias, row by row; NaN for slot -1. Scale and bias: CHUNK elements and a period more. */
FAST void certify_noise_grid(const int32_t *images, const int64_t *rows, int64_t count, int64_t elements, const float *scale, const float *bias,
                             int64_t period, uint64_t seed, const int64_t *lookup, int32_t shift, int32_t offset, const int32_t *high_of,
                             const uint32_t *low_of, float *out) {
    uint32_t word[CHUNK];
    for (int64_t row = 0; row < count; row++) {
        const int64_t slot = rows[3 * row], stream = rows[3 * row + 1], sample = rows[3 * row + 2];
        for (int64_t start = 0; start < elements; start += CHUNK) {
            const int64_t n = least(CHUNK, elements - start);
            float *restrict y = out + row * elements + start;
            if (slot < 0) {
                for (int64_t i = 0; i < n; i++) y[i] = NAN;
                continue;
            }
            const int32_t *restrict x = images + slot * elements + start;
            const float *restrict a = scale + start % period, *restrict b = bias + start % period;
            words(word, start / 4, (n + 3) / 4, stream, sample, seed);
            int32_t undecided = 0;
            for (int64_t i = 0; i < n; i++) {
                const int32_t down = -(int32_t)(~word[i] >> 31), v = (int32_t)(word[i] ^ ~(uint32_t)down); /* down: -1 for a negative k, else 0 */
                const int64_t entry = lookup[(as_bits((float)(v | 1)) >> shift) - offset];
                const int32_t step = (int32_t)entry, magnitude = (int32_t)(entry >> 32) + (v < step);
                undecided |= (v == step) | (step == MANY);
                y[i] = (float)(x[i] + ((magnitude ^ down) - down)) * a[i] + b[i];
            }
            if (!undecided) continue;
            for (int64_t i = 0; i < n; i++) {
                const int32_t down = -(int32_t)(~word[i] >> 31), v = (int32_t)(word[i] ^ ~(uint32_t)down);
                const int64_t entry = lookup[(as_bits((float)(v | 1)) >> shift) - offset];
                if (v != (int32_t)entry && (int32_t)entry != MANY) continue;
                uint32_t c[4];
                counter(c, (start + i) / 4, stream, sample);
                c[3] |= 0x80000000u;
                philox(c, seed);
                const int32_t magnitude = climb((int32_t)(entry >> 32), v, c[i % 4] ^ ~(uint32_t)down, high_of, low_of);
                y[i] = (float)(x[i] + ((magnitude ^ down) - down)) * a[i] + b[i];
            }
        }
    }
}

INLINE float minus_two_log(uint32_t word) {
    const int32_t bits = as_bits((float)(word | 1u)), exponent = (bits - 0x3F3504F3) >> 23;
    const float t = as_float(bits - exponent * (1 << 23)) - 1.0f, n = (float)(32 - exponent), square = t * t;
    float y = t * 7.0376836292e-2f + -1.1514610310e-1f;
    y = y * t + 1.1676998740e-1f;
    y = y * t + -1.2420140846e-1f;
    y = y * t + 1.4249322787e-1f;
    y = y * t + -1.6668057665e-1f;
    y = y * t + 2.0000714765e-1f;
    y = y * t + -2.4999993993e-1f;
    y = y * t + 3.3333331174e-1f;
    y = y * t * square - n * -2.12194440e-4f - 0.5f * square;
    y = n * 0.693359375f - (t + y);
    return y + y;
}

INLINE void cos_sin(uint32_t word, float *cosine, float *sine) {
    const uint32_t quarter = (word + 0x20000000u) >> 30;
    const float x = (float)(int32_t)(word - (quarter << 30)) * 1.4629180792671596e-09f, z = x * x; /* 2 pi / 2^32 */
    float s = z * -1.9515295891e-4f + 8.3321608736e-3f;
    s = s * z + -1.6666654611e-1f;
    s = s * z * x + x;
    float c = z * 2.443315711809948e-5f + -1.388731625493765e-3f;
    c = c * z + 4.166664568298827e-2f;
    c = c * z * z - 0.5f * z + 1.0f;
    const float first = quarter & 1 ? s : c, second = quarter & 1 ? c : s;
    *cosine = quarter == 1 || quarter == 2 ? -first : first;
    *sine = quarter >= 2 ? -second : second;
}

/* out (count, elements): (images[slot] + sigma z) scale + bias, row by row; NaN for slot -1. Scale and bias: CHUNK elements and a period more. */
FAST void certify_noise_gauss(const float *images, const int64_t *rows, int64_t count, int64_t elements, const float *scale, const float *bias,
                              int64_t period, uint64_t seed, float sigma, float *out) {
    uint32_t word[CHUNK];
    float z[CHUNK];
    for (int64_t row = 0; row < count; row++) {
        const int64_t slot = rows[3 * row], stream = rows[3 * row + 1], sample = rows[3 * row + 2];
        for (int64_t start = 0; start < elements; start += CHUNK) {
            const int64_t n = least(CHUNK, elements - start);
            float *restrict y = out + row * elements + start;
            if (slot < 0) {
                for (int64_t i = 0; i < n; i++) y[i] = NAN;
                continue;
            }
            words(word, start / 4, (n + 3) / 4, stream, sample, seed);
            for (int64_t g = 0; g < (n + 3) / 4; g++) {
                float cosine, sine;
                const float first = sqrtf(minus_two_log(word[4 * g])), second = sqrtf(minus_two_log(word[4 * g + 2]));
                cos_sin(word[4 * g + 1], &cosine, &sine);
                z[4 * g] = first * cosine;
                z[4 * g + 1] = first * sine;
                cos_sin(word[4 * g + 3], &cosine, &sine);
                z[4 * g + 2] = second * cosine;
                z[4 * g + 3] = second * sine;
            }
            const float *restrict x = images + slot * elements + start, *restrict a = scale + start % period, *restrict b = bias + start % period;
            for (int64_t i = 0; i < n; i++) y[i] = (x[i] + sigma * z[i]) * a[i] + b[i];
        }
    }
}
