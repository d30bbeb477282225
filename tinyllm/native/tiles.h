/* Products of small float32 matrices whose rows are filled up to whole vectors. */
#pragma once
#include "numbers.h"

#define TALL 4 /* a tile of a product: rows, and vectors of a row; as many as registers hold */
#define WIDE (LANES == 16 ? 4 : 2)

/* A tile of c (+)= a b, where a[row][k] lies at row * down + k * along. */
INLINE void tile(float *c, int cols, const float *a, int down, int along, const float *b, int depth,
                 const int vectors, const int add) {
    vec sums[TALL][WIDE];
    UNROLL for (int i = 0; i < TALL; i++)
        UNROLL for (int j = 0; j < vectors; j++) sums[i][j] = add ? load(c + i * cols + j * LANES) : (vec){0};
    for (int k = 0; k < depth; k++) {
        UNROLL for (int j = 0; j < vectors; j++) {
            vec right = load(b + (int64_t)k * cols + j * LANES);
            UNROLL for (int i = 0; i < TALL; i++)
                sums[i][j] = multiply_add((vec){0} + a[i * down + k * along], right, sums[i][j]);
        }
    }
    UNROLL for (int i = 0; i < TALL; i++)
        UNROLL for (int j = 0; j < vectors; j++) store(c + i * cols + j * LANES, sums[i][j]);
}

/* c (+)= a b: c (rows, cols used of width), b (depth, same); rows in fours, cols in lanes. */
INLINE void multiply(float *c, int rows, int used, int width, const float *a, int down, int along, const float *b,
                     int depth, const int add) {
    for (int i = 0; i < rows; i += TALL)
        for (int j = 0; j < used; j += WIDE * LANES) {
            float *to = c + (int64_t)i * width + j;
            const float *left = a + (int64_t)i * down;
            switch ((used - j) / LANES) {
            case 1: tile(to, width, left, down, along, b + j, depth, 1, add); break;
            case 2: tile(to, width, left, down, along, b + j, depth, 2, add); break;
            case 3: tile(to, width, left, down, along, b + j, depth, WIDE < 3 ? WIDE : 3, add); break;
            default: tile(to, width, left, down, along, b + j, depth, WIDE, add);
            }
        }
}

/* y (cols, height) = the transpose of x (rows, cols). */
INLINE void turn(const float *x, float *y, int rows, int cols, int height) {
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < cols; j++) y[(int64_t)j * height + i] = x[(int64_t)i * cols + j];
}
