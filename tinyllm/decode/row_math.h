/* Vectors of as many floats as the processor takes at a time, and products with rows of weights.
 * Sizes need not be multiples of anything, except that bfloat16 rows are multiples of 2 * LANES.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#define LANES 16
#else
#define LANES 8
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t whole __attribute__((vector_size(4 * LANES)));

INLINE vec load(const float *at) { return *(const vec *)at; }
INLINE void store(float *at, vec v) { *(vec *)at = v; }

INLINE float sum(vec v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
#endif
}

/* Of 2 * LANES bfloat16 numbers the first half lies in the lower halves of words (see halves.py). */
INLINE void open_pair(const void *w, int64_t at, vec *low, vec *high) {
    words pair = *(const words *)((const uint16_t *)w + at);
    *low = (vec)(pair << 16), *high = (vec)(pair & 0xffff0000u);
}

/* a where the mask is set, b elsewhere. */
INLINE vec choose(whole mask, vec a, vec b) {
    return (vec)(((whole)a & mask) | ((whole)b & ~mask));
}

/* e^x to about 1e-6: e^(n ln 2 + r), and the Taylor series of e^r for |r| < 0.35. */
INLINE vec exponential(vec x) {
    x = choose(x < -87.0f, (vec){0} - 87.0f, choose(x > 88.0f, (vec){0} + 88.0f, x));
    vec turns = x * 1.44269504f, half = choose(turns < 0.0f, (vec){0} - 0.5f, (vec){0} + 0.5f);
    whole n;
    vec turned; /* lane by lane: __builtin_convertvector is younger than many a GCC */
    for (int i = 0; i < LANES; i++) n[i] = (int32_t)(turns[i] + half[i]), turned[i] = (float)n[i];
    vec r = x - turned * 0.69314718f;
    vec series = 1.0f + r * (1.0f + r * (0.5f + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r / 720)))));
    return series * (vec)((n + 127) << 23);
}

/* One row of W . x, read from front to back: memory is fetched ahead only for a steady reader. */
INLINE float dot(const void *w, const int half, int64_t at, int64_t in, const float *x) {
    vec acc[4] = {{0}, {0}, {0}, {0}}, low, high;
    int64_t i = 0;
    for (; i + 4 * LANES <= in; i += 4 * LANES)
        UNROLL for (int j = 0; j < 4; j += 2) {
            if (half) open_pair(w, at + i + LANES * j, &low, &high);
            else {
                low = load((const float *)w + at + i + LANES * j);
                high = load((const float *)w + at + i + LANES * (j + 1));
            }
            acc[j] += low * load(x + i + LANES * j);
            acc[j + 1] += high * load(x + i + LANES * (j + 1));
        }
    for (; half && i < in; i += 2 * LANES) {
        open_pair(w, at + i, &low, &high);
        acc[0] += low * load(x + i), acc[1] += high * load(x + i + LANES);
    }
    for (; i + LANES <= in; i += LANES) acc[2] += load((const float *)w + at + i) * load(x + i);
    float rest = 0.0f;
    for (; i < in; i++) rest += ((const float *)w)[at + i] * x[i];
    return sum((acc[0] + acc[1]) + (acc[2] + acc[3])) + rest;
}

/* y[t][o] (+)= W[o] . x[t] for `rows` outputs from o on and four tokens. */
INLINE void tile(const void *w, const int half, int64_t in, int64_t out, const float *x, float *y,
                 int64_t o, const int rows, const int add) {
    vec acc[2][4], low, high;
    float rest[2][4] = {{0}};
    int64_t i = 0;
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int t = 0; t < 4; t++) acc[r][t] = (vec){0};
    for (; i + (half ? 2 : 1) * LANES <= in; i += (half ? 2 : 1) * LANES)
        UNROLL for (int r = 0; r < rows; r++) {
            int64_t at = (o + r) * in + i;
            if (half) {
                open_pair(w, at, &low, &high);
                UNROLL for (int t = 0; t < 4; t++)
                    acc[r][t] += low * load(x + t * in + i) + high * load(x + t * in + i + LANES);
            } else {
                low = load((const float *)w + at);
                UNROLL for (int t = 0; t < 4; t++) acc[r][t] += low * load(x + t * in + i);
            }
        }
    for (; i < in; i++)
        for (int r = 0; r < rows; r++)
            for (int t = 0; t < 4; t++) rest[r][t] += ((const float *)w)[(o + r) * in + i] * x[t * in + i];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int t = 0; t < 4; t++) {
            float *to = y + t * out + o + r;
            *to = (add ? *to : 0.0f) + sum(acc[r][t]) + rest[r][t];
        }
}

/* The outputs `from` to `end` of n tokens; `add` adds them to what is there. */
INLINE void product(const void *w, const int half, int64_t in, int64_t from, int64_t end, int64_t out,
                    const float *x, float *y, int n, const int add) {
    int t = 0;
    for (; t + 4 <= n; t += 4, x += 4 * in, y += 4 * out) {
        int64_t o = from;
        for (; o + 2 <= end; o += 2) tile(w, half, in, out, x, y, o, 2, add);
        for (; o < end; o++) tile(w, half, in, out, x, y, o, 1, add);
    }
    for (; t < n; t++, x += in, y += out)
        for (int64_t o = from; o < end; o++) y[o] = (add ? y[o] : 0.0f) + dot(w, half, o * in, in, x);
}

