/* Arrays of float32 or, with `half` set, bfloat16, read and written as vectors of floats. */
#pragma once
#include "vectors.h"

typedef uint16_t shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE vec widen(shorts halves) {
#ifdef __AVX512F__ /* one instruction instead of the four that GCC makes of the general line */
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)halves), 16);
#else
    return (vec)(__builtin_convertvector(halves, words) << 16);
#endif
}

/* To bfloat16: to the nearest, ties to even. */
INLINE shorts narrow(vec v) {
#if defined(__AVX512F__) && defined(__AVX512BF16__)
    return (shorts)_mm512_cvtneps_pbh((__m512)v);
#else
    words bits = (words)v;
    return __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, shorts);
#endif
}

INLINE vec get(const void *at, int64_t i, const int half) {
    return half ? widen(*(const shorts *)((const uint16_t *)at + i)) : load((const float *)at + i);
}

INLINE void put(void *at, int64_t i, vec v, const int half) {
    if (half) *(shorts *)((uint16_t *)at + i) = narrow(v);
    else store((float *)at + i, v);
}

/* At most LANES numbers, the rest 0. */
INLINE vec get_some(const void *at, int64_t i, int num, const int half) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    __mmask16 mask = (1u << num) - 1;
    if (half) return widen((shorts)_mm256_maskz_loadu_epi16(mask, (const uint16_t *)at + i));
    return (vec)_mm512_maskz_loadu_ps(mask, (const float *)at + i);
#else
    if (num == LANES) return get(at, i, half);
    char lanes[4 * LANES] = {0};
    memcpy(lanes, (const char *)at + i * (half ? 2 : 4), num * (half ? 2 : 4));
    return get(lanes, 0, half);
#endif
}

INLINE void put_some(void *at, int64_t i, int num, vec v, const int half) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    __mmask16 mask = (1u << num) - 1;
    if (half) _mm256_mask_storeu_epi16((uint16_t *)at + i, mask, (__m256i)narrow(v));
    else _mm512_mask_storeu_ps((float *)at + i, mask, (__m512)v);
#else
    char lanes[4 * LANES];
    put(num == LANES ? at : lanes, num == LANES ? i : 0, v, half);
    if (num < LANES) memcpy((char *)at + i * (half ? 2 : 4), lanes, num * (half ? 2 : 4));
#endif
}

INLINE vec rounded(vec v, const int half) { return half ? widen(narrow(v)) : v; }

INLINE float widened(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint16_t narrowed(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

INLINE int64_t rounded_up(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }

/* The largest of `size` numbers from `at` on; what is no number is passed over. */
INLINE float largest(const void *x, int64_t at, int64_t size, const int half) {
    vec most = (vec){0} - INFINITY, v;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) v = get(x, at + i, half), most = choose(v > most, v, most);
#ifdef __AVX512F__
    if (i < size) {
        __mmask16 mask = (1u << (size - i)) - 1;
        v = get_some(x, at + i, size - i, half);
        most = (vec)_mm512_mask_max_ps((__m512)most, mask, (__m512)v, (__m512)most); /* the second, if one is none */
    }
    return _mm512_reduce_max_ps((__m512)most);
#else
    float found = most[0];
    for (int j = 1; j < LANES; j++) found = most[j] > found ? most[j] : found;
    for (; i < size; i++) {
        float one = half ? widened(((const uint16_t *)x)[at + i]) : ((const float *)x)[at + i];
        found = one > found ? one : found;
    }
    return found;
#endif
}
