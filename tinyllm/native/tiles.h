/* Products of small float32 matrices whose rows are filled up to whole vectors. */
#pragma once
#include "numbers.h"

#define TALL 4 /* a tile of a product: rows, and vectors of a row; as many as registers hold */
#define WIDE (LANES == 16 ? 4 : 2)

/* A tile of c (+)= a b, where a[row][k] lies at row * down + k * along. */
INLINE void tile(float *c, int cols, const float *a, int down, int along, const float *b, int depth, const int tall,
                 const int vectors, const int add) {
    vec sums[2 * TALL][WIDE];
    UNROLL for (int i = 0; i < tall; i++)
        UNROLL for (int j = 0; j < vectors; j++) sums[i][j] = add ? load(c + i * cols + j * LANES) : (vec){0};
    for (int k = 0; k < depth; k++) {
        UNROLL for (int j = 0; j < vectors; j++) {
            vec right = load(b + (int64_t)k * cols + j * LANES);
            UNROLL for (int i = 0; i < tall; i++)
                sums[i][j] = multiply_add((vec){0} + a[i * down + k * along], right, sums[i][j]);
        }
    }
    UNROLL for (int i = 0; i < tall; i++)
        UNROLL for (int j = 0; j < vectors; j++) store(c + i * cols + j * LANES, sums[i][j]);
}

/* c (+)= a b: c (rows, cols used of width), b (depth, same); rows in fours, cols in lanes. */
INLINE void multiply(float *c, int rows, int used, int width, const float *a, int down, int along, const float *b,
                     int depth, const int add) {
    int i = 0, one = used == LANES; /* a lone vector: twice as many rows, or each sum waits for itself */
    for (; one && i + 2 * TALL <= rows; i += 2 * TALL)
        tile(c + (int64_t)i * width, width, a + (int64_t)i * down, down, along, b, depth, 2 * TALL, 1, add);
    for (; i < rows; i += TALL)
        for (int j = 0; j < used; j += WIDE * LANES) {
            float *to = c + (int64_t)i * width + j;
            const float *left = a + (int64_t)i * down;
            switch ((used - j) / LANES) {
            case 1: tile(to, width, left, down, along, b + j, depth, TALL, 1, add); break;
            case 2: tile(to, width, left, down, along, b + j, depth, TALL, 2, add); break;
            case 3: tile(to, width, left, down, along, b + j, depth, TALL, WIDE < 3 ? WIDE : 3, add); break;
            default: tile(to, width, left, down, along, b + j, depth, TALL, WIDE, add);
            }
        }
}

#ifdef __AVX512F__
/* Pairs of numbers, and fours, of two vectors. */
#define TWOS(a, b, which) (vec) _mm512_unpack##which##_pd((__m512d)(a), (__m512d)(b))
#define FOURS(a, b, which) (vec) _mm512_shuffle_f32x4((__m512)(a), (__m512)(b), which)

/* The transpose of LANES rows of as many numbers: of the squares of 4 that it is made of, and then of these. */
INLINE void turn_square(const float *x, int64_t cols, float *y, int64_t height) {
    vec a[LANES], b[LANES];
    UNROLL for (int i = 0; i < LANES; i += 2) {
        __m512 one = _mm512_loadu_ps(x + i * cols), two = _mm512_loadu_ps(x + (i + 1) * cols);
        a[i] = (vec)_mm512_unpacklo_ps(one, two), a[i + 1] = (vec)_mm512_unpackhi_ps(one, two);
    }
    UNROLL for (int i = 0; i < LANES; i += 4) {
        b[i] = TWOS(a[i], a[i + 2], lo), b[i + 1] = TWOS(a[i], a[i + 2], hi);
        b[i + 2] = TWOS(a[i + 1], a[i + 3], lo), b[i + 3] = TWOS(a[i + 1], a[i + 3], hi);
    }
    UNROLL for (int i = 0; i < 4; i++) { /* b[4 k + i] has columns i, i + 4, i + 8, i + 12 of rows 4 k to 4 k + 3 */
        vec low = FOURS(b[i], b[i + 4], 0x88), lower = FOURS(b[i], b[i + 4], 0xdd);
        vec high = FOURS(b[i + 8], b[i + 12], 0x88), higher = FOURS(b[i + 8], b[i + 12], 0xdd);
        store(y + i * height, FOURS(low, high, 0x88)), store(y + (i + 8) * height, FOURS(low, high, 0xdd));
        store(y + (i + 4) * height, FOURS(lower, higher, 0x88));
        store(y + (i + 12) * height, FOURS(lower, higher, 0xdd));
    }
}
#else
INLINE void turn_square(const float *x, int64_t cols, float *y, int64_t height) {
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) y[j * height + i] = x[i * cols + j];
}
#endif

/* y (cols, height) = the transpose of x (rows, cols); both multiples of LANES. */
INLINE void turn(const float *x, float *y, int rows, int cols, int height) {
    for (int i = 0; i < rows; i += LANES)
        for (int j = 0; j < cols; j += LANES)
            turn_square(x + (int64_t)i * cols + j, cols, y + (int64_t)j * height + i, height);
}
