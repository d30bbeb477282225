/* What a training step does between its matrix products, in one pass over memory each: dropout, RMS norm and
 * the gate of the MLP, forwards and backwards, and the exponentials of the loss.  Numbers are float32 or
 * bfloat16 (half set); arithmetic is float32, rounded to bfloat16 where transformers' own layers round.
 * Compiled by code.py; the Python side is pointwise.py.
 */
#include "draws.h"

#define SHARE 16384 /* numbers that are worth another thread */
#define DRAWS 8    /* 64-bit random numbers at a time, four decisions each */

/* Of numbers i to i + num, put those that are kept (else 0) into y, or add them to it. */
INLINE void keep_block(const void *x, void *y, int64_t i, int num, uint64_t seed, uint32_t threshold,
                       const int add, const int half) {
    uint64_t draws[DRAWS];
    uint16_t decisions[4 * DRAWS];
    for (int j = 0; j < DRAWS; j++) draws[j] = draw(seed, i / 4 + j);
    memcpy(decisions, draws, sizeof draws);
    const uint16_t *halves = (const uint16_t *)x + i;
    const float *floats = (const float *)x + i;
    for (int j = 0; j < num; j++) {
        if (half) {
            uint16_t kept = decisions[j] >= threshold ? halves[j] : 0, *to = (uint16_t *)y + i + j;
            *to = add ? narrowed(widened(*to) + widened(kept)) : kept;
        } else {
            float kept = decisions[j] >= threshold ? floats[j] : 0.0f, *to = (float *)y + i + j;
            *to = add ? *to + kept : kept;
        }
    }
}

INLINE void keep_all(const void *x, void *y, int64_t n, uint64_t seed, uint32_t threshold, const int add,
                     const int half) {
    const int size = 4 * DRAWS; /* known to the compiler, so that whole blocks become vectors */
#pragma omp parallel for schedule(static) if (n > SHARE)
    for (int64_t block = 0; block < n / size; block++)
        keep_block(x, y, block * size, size, seed, threshold, add, half);
    if (n % size) keep_block(x, y, n - n % size, n % size, seed, threshold, add, half);
}

/* y = x where number i of the stream decides so, else 0.  `threshold` of 65536 are dropped. */
void keep(const void *x, void *y, int64_t n, uint64_t seed, uint32_t threshold, int32_t half) {
    if (half) keep_all(x, y, n, seed, threshold, 0, 1);
    else keep_all(x, y, n, seed, threshold, 0, 0);
}

/* y += what `keep` keeps of x. */
void add_kept(const void *x, void *y, int64_t n, uint64_t seed, uint32_t threshold, int32_t half) {
    if (half) keep_all(x, y, n, seed, threshold, 1, 1);
    else keep_all(x, y, n, seed, threshold, 1, 0);
}

/* One row of a norm.  Returns 1 / sqrt(mean(x^2) + eps). */
INLINE float norm_row(const void *x, const void *w, void *y, int64_t at, int size, float eps, const int half) {
    vec squares = {0}, v;
    int i = 0, rest = size % LANES;
    for (; i + LANES <= size; i += LANES) v = get(x, at + i, half), squares = multiply_add(v, v, squares);
    if (rest) v = get_some(x, at + i, rest, half), squares = multiply_add(v, v, squares);
    float factor = 1.0f / sqrtf(sum(squares) / size + eps);
    for (i = 0; i + LANES <= size; i += LANES)
        put(y, at + i, get(w, i, half) * rounded(get(x, at + i, half) * factor, half), half);
    if (rest) put_some(y, at + i, rest, get_some(w, i, rest, half) * rounded(v * factor, half), half);
    return factor;
}

INLINE void norm_all(const void *x, const void *w, void *y, float *factors, int64_t rows, int size, float eps,
                     const int half) {
#pragma omp parallel for schedule(static) if (rows * size > SHARE)
    for (int64_t row = 0; row < rows; row++) factors[row] = norm_row(x, w, y, row * size, size, eps, half);
}

/* y = w x f, row by row, and the factors f. */
void norm_forward(const void *x, const void *w, void *y, float *factors, int64_t rows, int32_t size, float eps,
                  int32_t half) {
    if (half) norm_all(x, w, y, factors, rows, size, eps, 1);
    else norm_all(x, w, y, factors, rows, size, eps, 0);
}

/* dx = f (w g - n mean(w g n)) with n = f x, plus what came past the norm. */
INLINE void norm_row_back(const void *g, const void *x, const void *w, const void *past, void *dx, int64_t at, int size,
                          float factor, const int half) {
    vec products = {0}, scaled, v;
    int i = 0, rest = size % LANES;
    for (; i + LANES <= size; i += LANES) {
        scaled = rounded(get(w, i, half) * get(g, at + i, half), half);
        products = multiply_add(scaled, get(x, at + i, half), products);
    }
    if (rest) {
        scaled = rounded(get_some(w, i, rest, half) * get_some(g, at + i, rest, half), half);
        v = get_some(x, at + i, rest, half), products = multiply_add(scaled, v, products);
    }
    float mean = factor * factor * sum(products) / size;
    if (rest) {
        v = factor * (scaled - mean * v);
        if (past) v = rounded(v, half) + get_some(past, at + i, rest, half);
        put_some(dx, at + i, rest, v, half);
    }
    for (i = 0; i + LANES <= size; i += LANES) {
        scaled = rounded(get(w, i, half) * get(g, at + i, half), half);
        v = factor * (scaled - mean * get(x, at + i, half));
        if (past) v = rounded(v, half) + get(past, at + i, half);
        put(dx, at + i, v, half);
    }
}

INLINE void norm_all_back(const void *g, const void *x, const void *w, const float *factors, const void *past,
                          void *dx, int64_t rows, int size, const int half) {
#pragma omp parallel for schedule(static) if (rows * size > SHARE)
    for (int64_t row = 0; row < rows; row++)
        norm_row_back(g, x, w, past, dx, row * size, size, factors[row], half);
}

/* `past` (as dx) is added, unless it is none. */
void norm_backward(const void *g, const void *x, const void *w, const float *factors, const void *past, void *dx,
                   int64_t rows, int32_t size, int32_t half) {
    if (half) norm_all_back(g, x, w, factors, past, dx, rows, size, 1);
    else norm_all_back(g, x, w, factors, past, dx, rows, size, 0);
}

INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(0.0f - x)); }

/* Rows of y have `size` numbers, a multiple of `lanes`; those of gate and up may be parts of rows of `row_size`. */
INLINE void gate_all(const void *gate, const void *up, void *y, int64_t rows, int size, int64_t row_size,
                     const int half) {
#pragma omp parallel for schedule(static) if (rows * size > SHARE)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < size; i += LANES) {
            vec x = get(gate, row * row_size + i, half);
            put(y, row * size + i, rounded(x * sigmoid(x), half) * get(up, row * row_size + i, half), half);
        }
}

/* y = silu(gate) up. */
void gate_forward(const void *gate, const void *up, void *y, int64_t rows, int32_t size, int64_t row_size,
                  int32_t half) {
    if (half) gate_all(gate, up, y, rows, size, row_size, 1);
    else gate_all(gate, up, y, rows, size, row_size, 0);
}

INLINE void gate_all_back(const void *g, const void *gate, const void *up, void *d_gate, void *d_up, int64_t rows,
                          int size, int64_t row_size, const int half) {
#pragma omp parallel for schedule(static) if (rows * size > SHARE)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = row * row_size, j = row * size; j < (row + 1) * size; i += LANES, j += LANES) {
            vec x = get(gate, i, half), given = get(g, j, half), share = sigmoid(x);
            vec inside = rounded(given * get(up, i, half), half);
            put(d_up, i, given * rounded(x * share, half), half);
            put(d_gate, i, inside * share * (1.0f + x * (1.0f - share)), half);
        }
}

/* d_gate and d_up lie as gate and up do. */
void gate_backward(const void *g, const void *gate, const void *up, void *d_gate, void *d_up, int64_t rows,
                   int32_t size, int64_t row_size, int32_t half) {
    if (half) gate_all_back(g, gate, up, d_gate, d_up, rows, size, row_size, 1);
    else gate_all_back(g, gate, up, d_gate, d_up, rows, size, row_size, 0);
}

/* A row of logits becomes its exponentials up to a factor, and their sum is returned. */
INLINE float exponentials(void *x, int64_t at, int64_t size, float most, const int half) {
    vec total = {0}, v;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        v = exponential(get(x, at + i, half) - most), total += v;
        put(x, at + i, v, half);
    }
    float found = sum(total);
    if (i < size) {
        v = exponential(get_some(x, at + i, size - i, half) - most);
        put_some(x, at + i, size - i, v, half);
        for (int j = 0; j < size - i; j++) found += v[j];
    }
    return found;
}

INLINE void exponentiate_all(void *logits, const int64_t *ids, float *losses, float *totals, int64_t rows,
                             int64_t size, const int half) {
#pragma omp parallel for schedule(static) if (rows * size > SHARE)
    for (int64_t row = 0; row < rows; row++) {
        int64_t at = row * size, wanted = at + ids[row];
        float most = largest(logits, at, size, half);
        float chosen = half ? widened(((uint16_t *)logits)[wanted]) : ((float *)logits)[wanted];
        totals[row] = exponentials(logits, at, size, most, half);
        losses[row] = logf(totals[row]) - (chosen - most);
    }
}

/* Logits become their exponentials, each row up to a factor; and the cross-entropy of each row's id, and the sum by
 * which its exponentials are to be divided. */
void exponentiate(void *logits, const int64_t *ids, float *losses, float *totals, int64_t rows, int64_t size,
                  int32_t half) {
    if (half) exponentiate_all(logits, ids, losses, totals, rows, size, 1);
    else exponentiate_all(logits, ids, losses, totals, rows, size, 0);
}

int32_t lanes(void) { return LANES; }
