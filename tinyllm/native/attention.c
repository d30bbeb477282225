/* Causal attention within packed examples, forwards and backwards, with the rotary embedding of queries and
 * keys.  Arrays are float32 or bfloat16 (half set) as the projections leave them, (positions, heads, size); those
 * of queries, keys and values may be parts of wider rows.  In between everything is float32.  One task is one
 * example and one key-value head with its queries' heads, so that no two threads add to one number.  Keys and
 * values of an example are laid out once, queries go ROWS at a time; the weights are never stored, but computed
 * again from the sums of their exponentials (Dao et al. 2022, arXiv:2205.14135, section 3.1).
 * Compiled by code.py; the Python side is attention.py.
 */
#include "tiles.h"
#include <stdlib.h>

#define ROWS 16 /* queries at a time, a multiple of TALL */

typedef struct {
    const void *q, *k, *v, *cos, *sin; /* cos and sin: (positions, size), or none */
    void *out;                         /* as q */
    float *sums;                       /* (positions, heads), log of the sum of exponentials */
    const void *grad;                  /* of out; and of q, k and v: */
    void *dq, *dk, *dv;
    const int32_t *starts; /* of each example, and the end */
    float scale;
    int32_t examples, heads, kv_heads, size, half;
    int32_t q_row, kv_row; /* numbers from one row of q or dq, of k, v, dk or dv to the next */
} Attention;

/* What one thread works in; rows of `wide` (size filled up with zeros) or `most` (positions) numbers. */
typedef struct {
    int wide, most;
    float *memory, *cos, *sin, *keys, *keys_across, *values, *dkeys, *dvalues, *queries, *grads, *outs, *weights,
        *dweights;
} Scratch;

static int longest(const Attention *a) {
    int most = 0;
    for (int e = 0; e < a->examples; e++)
        if (a->starts[e + 1] - a->starts[e] > most) most = a->starts[e + 1] - a->starts[e];
    return most;
}

static Scratch scratch_for(const Attention *a) {
    Scratch s = {.wide = rounded_up(a->size, LANES), .most = rounded_up(longest(a), ROWS)};
    size_t square = (size_t)s.wide * s.most, rows = (size_t)ROWS * s.wide, lines = (size_t)ROWS * s.most;
    float **parts[] = {&s.cos, &s.sin, &s.keys, &s.keys_across, &s.values, &s.dkeys, &s.dvalues};
    float **blocks[] = {&s.queries, &s.grads, &s.outs}, **tables[] = {&s.weights, &s.dweights};
    float *next = s.memory = aligned_alloc(64, 4 * (7 * square + 3 * rows + 2 * lines));
    if (!next) abort();
    for (int i = 0; i < 7; i++) *parts[i] = next, next += square;
    for (int i = 0; i < 3; i++) *blocks[i] = next, next += rows;
    for (int i = 0; i < 2; i++) *tables[i] = next, next += lines;
    return s;
}

INLINE void read_row(const void *x, int64_t at, float *to, int size, int wide, const int half) {
    int i = 0;
    for (; i + LANES <= size; i += LANES) store(to + i, get(x, at + i, half));
    if (i < wide) store(to + i, get_some(x, at + i, size - i, half));
}

INLINE void write_row(void *x, int64_t at, const float *from, int size, const int half) {
    int i = 0;
    for (; i + LANES <= size; i += LANES) put(x, at + i, load(from + i), half);
    if (i < size) put_some(x, at + i, size - i, load(from + i), half);
}

/* The same rows with the rotation of pairs (i, i + size / 2) (Su et al. 2021, arXiv:2104.09864, equation 34, in the
 * order of pairs of transformers), and with its transpose, which brings a gradient back. */
INLINE void read_rotated(const void *x, int64_t at, float *to, const float *cos, const float *sin, int size, int wide,
                         const int half) {
    int middle = size / 2;
    store(to + wide - LANES, (vec){0});
    for (int i = 0; i < middle; i += LANES) {
        int num = middle - i < LANES ? middle - i : LANES;
        vec left = get_some(x, at + i, num, half), right = get_some(x, at + i + middle, num, half);
        vec one = left * get_some(cos, i, num, 0), two = right * get_some(cos, i + middle, num, 0);
        one -= right * get_some(sin, i, num, 0), two += left * get_some(sin, i + middle, num, 0);
        put_some(to, i, num, one, 0), put_some(to, i + middle, num, two, 0);
    }
}

INLINE void write_rotated_back(void *x, int64_t at, const float *from, const float *cos, const float *sin, int size,
                               const int half) {
    int middle = size / 2;
    for (int i = 0; i < middle; i += LANES) {
        int num = middle - i < LANES ? middle - i : LANES;
        vec left = get_some(from, i, num, 0), right = get_some(from, i + middle, num, 0);
        vec one = left * get_some(cos, i, num, 0), two = right * get_some(cos, i + middle, num, 0);
        one += right * get_some(sin, i + middle, num, 0), two -= left * get_some(sin, i, num, 0);
        put_some(x, at + i, num, one, half), put_some(x, at + i + middle, num, two, half);
    }
}

/* A head of `num` positions, the rows after them 0. */
INLINE void read_head(const void *x, int64_t first, int num, int64_t row_size, int head, const Attention *a,
                      const Scratch *s, float *to, int rows, const float *cos, const float *sin, const int half) {
    for (int i = 0; i < num; i++) {
        int64_t from = (first + i) * row_size + head * a->size, at = (int64_t)i * s->wide;
        if (cos) read_rotated(x, from, to + at, cos + at, sin + at, a->size, s->wide, half);
        else read_row(x, from, to + at, a->size, s->wide, half);
    }
    memset(to + (int64_t)num * s->wide, 0, 4 * (size_t)(rows - num) * s->wide);
}

INLINE void write_head(void *x, int64_t first, int num, int64_t row_size, int head, const Attention *a,
                       const Scratch *s, const float *from, const float *cos, const float *sin, const int half) {
    for (int i = 0; i < num; i++) {
        int64_t to = (first + i) * row_size + head * a->size, at = (int64_t)i * s->wide;
        if (cos) write_rotated_back(x, to, from + at, cos + at, sin + at, a->size, half);
        else write_row(x, to, from + at, a->size, half);
    }
}

/* cos and sin of an example; none without rotation. */
INLINE void read_angles(const Attention *a, int64_t first, int num, Scratch *s, const int half) {
    if (!a->cos) {
        s->cos = s->sin = NULL;
        return;
    }
    for (int i = 0; i < num; i++) {
        read_row(a->cos, (first + i) * a->size, s->cos + (int64_t)i * s->wide, a->size, s->wide, half);
        read_row(a->sin, (first + i) * a->size, s->sin + (int64_t)i * s->wide, a->size, s->wide, half);
    }
}

INLINE const float *angle(const float *angles, const Scratch *s, int row) {
    return angles ? angles + (int64_t)row * s->wide : NULL;
}

/* Of a row of products, the exponentials of the first `known` less `log`, the others 0. */
INLINE vec exponentials(float *row, int known, int used, float scale, float log) {
    vec total = {0}, lanes, zero = {0};
    for (int j = 0; j < LANES; j++) lanes[j] = j;
    for (int j = 0; j < used; j += LANES) {
        vec weight = choose(lanes + (float)j < (float)known, exponential(load(row + j) * scale - log), zero);
        store(row + j, weight);
        total += weight;
    }
    return total;
}

/* Queries from `from` on, of one head: their outputs and the logs of their sums. */
INLINE void attend_rows(const Attention *a, Scratch *s, int64_t first, int from, int rows, int head,
                        const int half) {
    const float *cos = angle(s->cos, s, from), *sin = angle(s->sin, s, from);
    int used = rounded_up(from + rows, LANES);
    read_head(a->q, first + from, rows, a->q_row, head, a, s, s->queries, ROWS, cos, sin, half);
    multiply(s->weights, ROWS, used, s->most, s->queries, s->wide, 1, s->keys_across, a->size, 0);
    for (int i = 0; i < rows; i++) {
        float *row = s->weights + (int64_t)i * s->most, most = a->scale * largest(row, 0, from + i + 1, 0);
        float total = sum(exponentials(row, from + i + 1, used, a->scale, most));
        for (int j = 0; j < used; j++) row[j] *= 1.0f / total;
        a->sums[(first + from + i) * a->heads + head] = most + logf(total);
    }
    multiply(s->outs, ROWS, s->wide, s->wide, s->weights, s->most, 1, s->values, from + rows, 0);
    write_head(a->out, first + from, rows, a->heads * a->size, head, a, s, s->outs, NULL, NULL, half);
}

INLINE void attend(const Attention *a, Scratch s, int example, int kv_head, const int half) {
    int64_t first = a->starts[example];
    int num = a->starts[example + 1] - first, group = a->heads / a->kv_heads;
    read_angles(a, first, num, &s, half);
    read_head(a->k, first, num, a->kv_row, kv_head, a, &s, s.keys, rounded_up(num, ROWS), s.cos, s.sin, half);
    read_head(a->v, first, num, a->kv_row, kv_head, a, &s, s.values, num, NULL, NULL, half);
    turn(s.keys, s.keys_across, rounded_up(num, ROWS), s.wide, s.most);
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++)
        for (int from = 0; from < num; from += ROWS)
            attend_rows(a, &s, first, from, num - from < ROWS ? num - from : ROWS, head, half);
}

/* dS = s P (dP - sum(P dP)), into dweights; P into weights.  The sum is that of dout and out, too, but out was
 * rounded. */
INLINE void weights_back(const Attention *a, Scratch *s, int64_t first, int from, int rows, int used, int head) {
    for (int i = 0; i < ROWS; i++) {
        float *weights = s->weights + (int64_t)i * s->most, *changes = s->dweights + (int64_t)i * s->most;
        int known = i < rows ? from + i + 1 : 0;
        vec products = {0};
        exponentials(weights, known, used, a->scale, known ? a->sums[(first + from + i) * a->heads + head] : 0.0f);
        for (int j = 0; j < used; j += LANES) products += load(weights + j) * load(changes + j);
        float mean = sum(products);
        for (int j = 0; j < used; j += LANES)
            store(changes + j, a->scale * load(weights + j) * (load(changes + j) - mean));
    }
}

/* Queries from `from` on, of one head: their gradients, and what they add to those of keys and values. */
INLINE void attend_rows_back(const Attention *a, Scratch *s, const float *values_across, int64_t first, int from,
                             int rows, int head, const int half) {
    const float *cos = angle(s->cos, s, from), *sin = angle(s->sin, s, from);
    int used = rounded_up(from + rows, LANES), seen = rounded_up(from + rows, TALL);
    read_head(a->q, first + from, rows, a->q_row, head, a, s, s->queries, ROWS, cos, sin, half);
    read_head(a->grad, first + from, rows, a->heads * a->size, head, a, s, s->grads, ROWS, NULL, NULL, half);
    multiply(s->weights, ROWS, used, s->most, s->queries, s->wide, 1, s->keys_across, a->size, 0);
    multiply(s->dweights, ROWS, used, s->most, s->grads, s->wide, 1, values_across, a->size, 0);
    weights_back(a, s, first, from, rows, used, head);
    multiply(s->dvalues, seen, s->wide, s->wide, s->weights, 1, s->most, s->grads, ROWS, 1);
    multiply(s->dkeys, seen, s->wide, s->wide, s->dweights, 1, s->most, s->queries, ROWS, 1);
    multiply(s->outs, ROWS, s->wide, s->wide, s->dweights, s->most, 1, s->keys, from + rows, 0);
    write_head(a->dq, first + from, rows, a->q_row, head, a, s, s->outs, cos, sin, half);
}

INLINE void attend_back(const Attention *a, Scratch s, int example, int kv_head, const int half) {
    int64_t first = a->starts[example];
    int num = a->starts[example + 1] - first, group = a->heads / a->kv_heads, filled = rounded_up(num, ROWS);
    size_t square = 4 * (size_t)filled * s.wide;
    read_angles(a, first, num, &s, half);
    read_head(a->v, first, num, a->kv_row, kv_head, a, &s, s.keys, filled, NULL, NULL, half);
    turn(s.keys, s.values, filled, s.wide, s.most); /* the values are needed across alone */
    read_head(a->k, first, num, a->kv_row, kv_head, a, &s, s.keys, filled, s.cos, s.sin, half);
    turn(s.keys, s.keys_across, filled, s.wide, s.most);
    memset(s.dkeys, 0, square), memset(s.dvalues, 0, square);
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++)
        for (int from = 0; from < num; from += ROWS)
            attend_rows_back(a, &s, s.values, first, from, num - from < ROWS ? num - from : ROWS, head, half);
    write_head(a->dk, first, num, a->kv_row, kv_head, a, &s, s.dkeys, s.cos, s.sin, half);
    write_head(a->dv, first, num, a->kv_row, kv_head, a, &s, s.dvalues, NULL, NULL, half);
}

INLINE void do_task(const Attention *a, Scratch s, int task, const int back, const int half) {
    if (back) attend_back(a, s, task / a->kv_heads, task % a->kv_heads, half);
    else attend(a, s, task / a->kv_heads, task % a->kv_heads, half);
}

INLINE void do_all(const Attention *a, const int back) {
#pragma omp parallel
    {
        Scratch s = scratch_for(a);
#pragma omp for schedule(dynamic)
        for (int task = 0; task < a->examples * a->kv_heads; task++)
            if (a->half) do_task(a, s, task, back, 1);
            else do_task(a, s, task, back, 0);
        free(s.memory);
    }
}

void attention_forward(const Attention *a) { do_all(a, 0); }

void attention_backward(const Attention *a) { do_all(a, 1); }
