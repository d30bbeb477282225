/* Vectors of as many floats as the processor takes at a time. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint8_t octets __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t whole __attribute__((vector_size(4 * LANES)));

INLINE vec load(const float *at) { return *(const vec *)at; }
INLINE void store(float *at, vec v) { *(vec *)at = v; }

/* a b + c, in this order: the compiler would rather add up products first, with more instructions. */
INLINE vec multiply_add(vec a, vec b, vec c) {
#ifdef __AVX512F__
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return a * b + c;
#endif
}

INLINE float sum(vec v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
#endif
}

/* a where the mask is set, b elsewhere. */
INLINE vec choose(whole mask, vec a, vec b) {
    return (vec)(((whole)a & mask) | ((whole)b & ~mask));
}

/* e^x to about 1e-6: e^(n ln 2 + r), and of e^r for |r| < 0.35 the polynomial of degree 5 with the least relative
 * error that is 1 at 0 (9e-8 before rounding). */
INLINE vec exponential(vec x) {
#ifdef __AVX512F__ /* what is no number is the second of two, which it then is */
    x = (vec)_mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_max_ps(_mm512_set1_ps(-87.0f), (__m512)x));
    vec n = (vec)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    x = choose(x < -87.0f, (vec){0} - 87.0f, choose(x > 88.0f, (vec){0} + 88.0f, x));
    vec turns = x * 1.44269504f, half = choose(turns < 0.0f, (vec){0} - 0.5f, (vec){0} + 0.5f);
    vec n = __builtin_convertvector(__builtin_convertvector(turns + half, whole), vec);
#endif
    vec r = multiply_add(n, (vec){0} - 0.69314718f, x), series = (vec){0} + 0.0082903147f;
    const float rest[] = {0.0418979293f, 0.166676362f, 0.499991495f, 0.999999707f, 1.0f};
    UNROLL for (int i = 0; i < 5; i++) series = multiply_add(series, r, (vec){0} + rest[i]);
#ifdef __AVX512F__
    return (vec)_mm512_scalef_ps((__m512)series, (__m512)n);
#else
    return series * (vec)((__builtin_convertvector(n, whole) + 127) << 23);
#endif
}
