/* Products with rows of weights, of which a model of one row is made.
 * Sizes need not be multiples of anything, except that rows of HALVES and PACKED are whole steps.
 */
#pragma once
#include "../native/vectors.h"

#define AHEAD 16384 /* bytes; 4 to 16 thousand were measured, the more the better */

/* How the weights of a matrix lie in memory (made by compact.py). */
enum { FLOATS, HALVES, PACKED };

typedef struct {
    const void *weight;   /* (out, in) */
    const uint8_t *table; /* PACKED only: upper, then lower byte of the exponent of each of 16 codes */
    int32_t in, out, kind;
} Matrix;

/* How many weights are read together, and how many bytes they take. */
INLINE int step(const int kind) { return (kind == PACKED ? 8 : kind == HALVES ? 2 : 1) * LANES; }
INLINE int64_t bytes(const int kind, int64_t num) {
    return kind == PACKED ? num * 3 / 2 : kind == HALVES ? num * 2 : num * 4;
}

/* Of each pair of bfloat16 numbers, which is a word, the lower and the upper one. */
INLINE void open_pairs(words pairs, vec *open) {
    open[0] = (vec)(pairs << 16), open[1] = (vec)(pairs & 0xffff0000u);
}

#ifdef __AVX512BW__
#define SHUFFLE(a, b) (octets)_mm512_shuffle_epi8((__m512i)(a), (__m512i)(b))
#define LOW_BYTES(a, b) (words)_mm512_unpacklo_epi8((__m512i)(a), (__m512i)(b))
#define HIGH_BYTES(a, b) (words)_mm512_unpackhi_epi8((__m512i)(a), (__m512i)(b))
#define REPEAT(at) (octets)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(at)))
#elif defined(__AVX2__) && !defined(__AVX512F__)
#define SHUFFLE(a, b) (octets)_mm256_shuffle_epi8((__m256i)(a), (__m256i)(b))
#define LOW_BYTES(a, b) (words)_mm256_unpacklo_epi8((__m256i)(a), (__m256i)(b))
#define HIGH_BYTES(a, b) (words)_mm256_unpackhi_epi8((__m256i)(a), (__m256i)(b))
#define REPEAT(at) (octets)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(at)))
#endif

#ifdef SHUFFLE
/* 8 * LANES weights of 12 bits: two vectors of (sign, mantissa), then one of codes, two a byte. */
INLINE void open_packed(const uint8_t *at, const uint8_t *table, vec *open) {
    const octets upper = REPEAT(table), lower = REPEAT(table + 16);
    words codes = *(const words *)(at + 8 * LANES);
    UNROLL for (int i = 0; i < 2; i++) {
        words signs = *(const words *)(at + 4 * LANES * i);
        words code = (i ? codes >> 4 : codes) & 0x0f0f0f0fu;
        words high = (words)SHUFFLE(upper, code) | (signs & 0x80808080u);
        words low = (words)SHUFFLE(lower, code) | (signs & 0x7f7f7f7fu);
        open_pairs(LOW_BYTES(low, high), open + 4 * i);
        open_pairs(HIGH_BYTES(low, high), open + 4 * i + 2);
    }
}
#endif

/* `step(kind)` weights as floats; `at` is a whole number of steps from the start. */
INLINE void open_step(const Matrix *m, const int kind, int64_t at, vec *open) {
    const char *from = (const char *)m->weight + bytes(kind, at);
    if (kind == FLOATS) open[0] = *(const vec *)from;
    if (kind == HALVES) open_pairs(*(const words *)from, open);
#ifdef SHUFFLE
    if (kind == PACKED) open_packed((const uint8_t *)from, m->table, open);
#endif
}

/* Ask for what is read `AHEAD` bytes later: alone, the processor does not look far enough ahead. */
INLINE void prefetch_step(const Matrix *m, const int kind, int64_t at) {
    const char *from = (const char *)m->weight + bytes(kind, at) + AHEAD;
    UNROLL for (int64_t i = 0; i < bytes(kind, step(kind)); i += 64) __builtin_prefetch(from + i);
}

/* One row of W . x, read from front to back. */
INLINE float dot(const Matrix *m, const int kind, int64_t row, const float *x, const int ahead) {
    vec acc[4] = {{0}, {0}, {0}, {0}}, open[8];
    int64_t i = 0, in = m->in, at = row * in;
    const int group = step(kind) / LANES;
    for (; i + 4 * LANES <= in && kind != PACKED; i += 4 * LANES)
        UNROLL for (int j = 0; j < 4; j += group) {
            open_step(m, kind, at + i + j * LANES, open);
            if (ahead) prefetch_step(m, kind, at + i + j * LANES);
            UNROLL for (int k = 0; k < group; k++)
                acc[j + k] = multiply_add(open[k], load(x + i + (j + k) * LANES), acc[j + k]);
        }
    for (; i + step(kind) <= in; i += step(kind)) {
        open_step(m, kind, at + i, open);
        if (ahead && kind == PACKED) prefetch_step(m, kind, at + i);
        UNROLL for (int k = 0; k < group; k++)
            acc[k % 4] = multiply_add(open[k], load(x + i + k * LANES), acc[k % 4]);
    }
    float rest = 0.0f;
    for (; i < in; i++) rest += ((const float *)m->weight)[at + i] * x[i];
    return sum((acc[0] + acc[1]) + (acc[2] + acc[3])) + rest;
}

/* y[t][o] (+)= W[o] . x[t] for `rows` outputs from o on and four tokens. */
INLINE void tile(const Matrix *m, const int kind, const float *x, float *y, int64_t o, const int rows,
                 const int add) {
    vec acc[2][4], open[8];
    float rest[2][4] = {{0}};
    int64_t i = 0, in = m->in;
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int t = 0; t < 4; t++) acc[r][t] = (vec){0};
    for (; i + step(kind) <= in; i += step(kind))
        UNROLL for (int r = 0; r < rows; r++) {
            open_step(m, kind, (o + r) * in + i, open);
            UNROLL for (int k = 0; k < step(kind) / LANES; k++)
                UNROLL for (int t = 0; t < 4; t++)
                    acc[r][t] = multiply_add(open[k], load(x + t * in + i + k * LANES), acc[r][t]);
        }
    for (; i < in; i++)
        for (int r = 0; r < rows; r++)
            for (int t = 0; t < 4; t++)
                rest[r][t] += ((const float *)m->weight)[(o + r) * in + i] * x[t * in + i];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int t = 0; t < 4; t++) {
            float *to = y + (int64_t)t * m->out + o + r;
            *to = (add ? *to : 0.0f) + sum(acc[r][t]) + rest[r][t];
        }
}

/* The outputs `from` to `end` of n tokens; `add` adds them to what is there. */
INLINE void product(const Matrix *m, const int kind, int64_t from, int64_t end, const float *x, float *y,
                    int n, const int add, const int ahead) {
    int t = 0;
    for (; t + 4 <= n; t += 4, x += 4 * (int64_t)m->in, y += 4 * (int64_t)m->out) {
        int64_t o = from;
        for (; o + 2 <= end; o += 2) tile(m, kind, x, y, o, 2, add);
        for (; o < end; o++) tile(m, kind, x, y, o, 1, add);
    }
    for (; t < n; t++, x += m->in, y += m->out)
        for (int64_t o = from; o < end; o++) y[o] = (add ? y[o] : 0.0f) + dot(m, kind, o, x, ahead);
}
