/* Products of bfloat16 matrices of which one is narrow, on processors that multiply pairs of bfloat16 and add the
 * products up in float32 (AVX-512 BF16).  Two neighbours along the dimension that is summed over lie in
 * one 32-bit word; the other matrix is read as it is.
 */
#pragma once
#include "numbers.h"
#include <stdlib.h>

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define MULTIPLIES_PAIRS 1
#define TALL 8   /* rows at a time */
#define STRIP 32 /* columns at a time: a line of the cache */
#define EACH_LANE _Pragma("GCC unroll 16") for (int r = 0; r < LANES; r++)

typedef __m512 floats;
typedef __m512bh pairs;

static inline uint32_t *words_of(size_t number) {
    uint32_t *found = aligned_alloc(64, rounded_up(4 * (number + 16), 64));
    if (!found) abort();
    return found;
}

/* Which of the STRIP columns from col on there are, of `cols`. */
INLINE uint32_t there(int col, int cols) { return cols - col >= STRIP ? ~0u : (1u << (cols - col)) - 1; }

INLINE floats load_halves(const uint16_t *from, __mmask16 mask) {
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16);
}

INLINE void store_halves(uint16_t *to, floats v, __mmask16 mask) {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(v));
}

/* Numbers as they are after they have been stored. */
INLINE floats rounded_halves(floats v) {
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v)), 16);
}

INLINE floats multiply_pairs(uint32_t left, pairs right, floats sum) {
    return _mm512_dpbf16_ps(sum, (pairs)_mm512_set1_epi32(left), right);
}

INLINE uint32_t pair_of(float first, float second) { return narrowed(first) | (uint32_t)narrowed(second) << 16; }

INLINE uint32_t pair_at(const uint16_t *x, int64_t pair) {
    uint32_t word;
    memcpy(&word, x + 2 * pair, 4);
    return word;
}

/* x[r][col], which lies at r * down + col * along, as pairs of columns: (cols / 2, height); zeros from r = rank on.
 * For all threads of a team, as the next function; who reads the pairs waits for all before. */
static inline void pack_into(const float *x, int down, int along, int rank, int height, int cols, uint32_t *to) {
#pragma omp for nowait
    for (int col = 0; col < cols; col += 2)
        for (int r = 0; r < height; r++) {
            const float *at = x + (int64_t)r * down + (int64_t)col * along;
            to[(int64_t)col / 2 * height + r] = r < rank ? pair_of(at[0], at[along]) : 0;
        }
}

/* The same as pairs of r: (height / 2, width); zeros from col = cols on. */
static inline void pack_from(const float *x, int down, int along, int rank, int height, int cols, int width,
                             uint32_t *to) {
#pragma omp for nowait
    for (int r = 0; r < height; r += 2)
        for (int col = 0; col < width; col++) {
            const float *at = x + (int64_t)r * down + (int64_t)col * along;
            to[(int64_t)r / 2 * width + col] =
                r < rank && col < cols ? pair_of(at[0], r + 1 < rank ? at[down] : 0.0f) : 0;
        }
}

/* TALL rows, `stride` numbers apart, of `num` numbers by a matrix (num / 2, height) of pairs, in columns col to
 * col + LANES. */
INLINE void narrow_product(const uint16_t *rows, int64_t stride, int num, const uint32_t *matrix, int height, int col,
                           floats sums[TALL]) {
    UNROLL for (int i = 0; i < TALL; i++) sums[i] = _mm512_setzero_ps();
    for (int k = 0; k < num / 2; k++) {
        pairs right = (pairs)_mm512_loadu_si512(matrix + (int64_t)k * height + col);
        UNROLL for (int i = 0; i < TALL; i++)
            sums[i] = multiply_pairs(pair_at(rows + i * stride, k), right, sums[i]);
    }
}

/* Add to sums (TALL, STRIP) TALL rows, `stride` numbers apart, of `num` numbers by a matrix (num / 2, STRIP) of
 * pairs, whose rows are `width` words apart. */
INLINE void add_wide_product(const uint16_t *rows, int64_t stride, int num, const uint32_t *matrix, int width,
                             floats sums[TALL][2]) {
    for (int k = 0; k < num / 2; k++) {
        pairs first = (pairs)_mm512_loadu_si512(matrix + (int64_t)k * width);
        pairs second = (pairs)_mm512_loadu_si512(matrix + (int64_t)k * width + LANES);
        UNROLL for (int i = 0; i < TALL; i++) {
            uint32_t left = pair_at(rows + i * stride, k);
            sums[i][0] = multiply_pairs(left, first, sums[i][0]);
            sums[i][1] = multiply_pairs(left, second, sums[i][1]);
        }
    }
}

/* Rows of `rank` numbers as pairs of rows, (all / 2, rank), zeros from row `num` on. */
static inline void pair_rows(const uint16_t *x, int num, int all, int rank, uint32_t *to) {
    for (int i = 0; i < all; i += 2)
        for (int r = 0; r < rank; r++)
            to[i / 2 * rank + r] = (i < num ? x[i * rank + r] : 0) |
                                   (uint32_t)(i + 1 < num ? x[(i + 1) * rank + r] : 0) << 16;
}

/* LANES numbers of a row and of the next one as pairs; the masks say which of them count. */
INLINE pairs pairs_of_rows(const uint16_t *x, int64_t stride, __mmask16 first, __mmask16 second) {
    __m512i one = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, x));
    __m512i two = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, x + stride));
    return (pairs)_mm512_or_si512(one, _mm512_slli_epi32(two, 16));
}

/* Add to sums (LANES, width) those over `num` rows of LANES narrow columns, given as pairs of rows, by LANES
 * columns of x; of row i those of which bit `shift` and the following of masks[i] are set. */
INLINE void tall_product(const uint16_t *x, int64_t stride, int num, const uint32_t *masks, int shift,
                         const uint32_t *narrow, int rank, float *to, int64_t width) {
    floats sums[LANES];
    EACH_LANE sums[r] = _mm512_loadu_ps(to + r * width);
    for (int row = 0; row < num; row += 2) {
        __mmask16 second = row + 1 == num ? 0 : masks[row + 1] >> shift;
        pairs right = pairs_of_rows(x + row * stride, stride, masks[row] >> shift, second);
        const uint32_t *left = narrow + row / 2 * rank;
        EACH_LANE sums[r] = multiply_pairs(left[r], right, sums[r]);
    }
    EACH_LANE _mm512_storeu_ps(to + r * width, sums[r]);
}
#endif
