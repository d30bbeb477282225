/* Causal attention within packed examples, forwards and backwards, with the rotary embedding of queries and
 * keys.  Arrays are float32 or bfloat16 (half set) as the projections leave them, (positions, heads, size); those
 * of queries, keys and values may be parts of wider rows.  In between everything is float32.  One task is one
 * example and one key-value head with its queries' heads, so that no two threads add to one number.  Queries go
 * ROWS at a time, across the lanes of vectors, so that no sum over keys runs through a vector; the weights are
 * never stored, but computed again from their largest product and the sum of their exponentials (Dao et al. 2022,
 * arXiv:2205.14135, section 3.1).
 * Compiled by code.py; the Python side is attention.py.
 */
#include "tiles.h"
#include <stdlib.h>

#define ROWS 16 /* queries at a time, a multiple of LANES and of the rows of a tile */
#define GROUPS (ROWS / LANES)

typedef struct {
    const void *q, *k, *v;
    const float *cos, *sin; /* (positions, size), or none */
    void *out;              /* as q */
    float *most, *share;    /* (heads, positions): largest product, and 1 / the sum of the exponentials less it */
    const void *grad;       /* of out; and of q, k and v: */
    void *dq, *dk, *dv;
    const int32_t *starts; /* of each example, and the end */
    float scale;
    int32_t examples, heads, kv_heads, size, half;
    int32_t q_row, kv_row; /* numbers from one row of q or dq, of k, v, dk or dv to the next */
} Attention;

/* What one thread works in; rows of `wide` (size filled up with zeros) numbers, `most` of them, and ROWS of them
 * and across; and of ROWS numbers, one for each key. */
typedef struct {
    int wide, most;
    float *memory, *keys, *values, *dkeys, *dvalues, *queries, *grads, *outs, *queries_across, *grads_across, *weights,
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
    float **parts[] = {&s.keys, &s.values, &s.dkeys, &s.dvalues}, **tables[] = {&s.weights, &s.dweights};
    float **blocks[] = {&s.queries, &s.grads, &s.outs, &s.queries_across, &s.grads_across};
    float *next = s.memory = aligned_alloc(64, 4 * (4 * square + 5 * rows + 2 * lines));
    if (!next) abort();
    for (int i = 0; i < 4; i++) *parts[i] = next, next += square;
    for (int i = 0; i < 5; i++) *blocks[i] = next, next += rows;
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
                      const Scratch *s, float *to, int rows, int rotates, const int half) {
    for (int i = 0; i < num; i++) {
        int64_t from = (first + i) * row_size + head * a->size, at = (int64_t)i * s->wide;
        int64_t angle = (first + i) * a->size;
        if (rotates) read_rotated(x, from, to + at, a->cos + angle, a->sin + angle, a->size, s->wide, half);
        else read_row(x, from, to + at, a->size, s->wide, half);
    }
    memset(to + (int64_t)num * s->wide, 0, 4 * (size_t)(rows - num) * s->wide);
}

INLINE void write_head(void *x, int64_t first, int num, int64_t row_size, int head, const Attention *a,
                       const Scratch *s, const float *from, int rotates, const int half) {
    for (int i = 0; i < num; i++) {
        int64_t to = (first + i) * row_size + head * a->size, at = (int64_t)i * s->wide;
        int64_t angle = (first + i) * a->size;
        if (rotates) write_rotated_back(x, to, from + at, a->cos + angle, a->sin + angle, a->size, half);
        else write_row(x, to, from + at, a->size, half);
    }
}

/* Which of LANES queries from `from` on see key `key`. */
INLINE whole sees(int from, int key) {
    vec lanes;
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    return lanes >= (vec){0} + (float)(key - from);
}

/* Of products (seen keys, ROWS queries): the exponentials less the largest of each query's, times `share`. */
INLINE void exponentiate(float *table, int from, int seen, float scale, vec most, vec share) {
    for (int j = 0; j < seen; j++) {
        vec weight = share * exponential((load(table + j * ROWS) - most) * scale);
        store(table + j * ROWS, j <= from ? weight : choose(sees(from, j), weight, (vec){0}));
    }
}

/* The same, with the largest and the share yet to be found. */
INLINE void soften(float *table, int from, int seen, float scale, vec *most, vec *share) {
    vec largest = (vec){0} - INFINITY, total = {0};
    for (int j = 0; j < seen; j++) {
        vec one = load(table + j * ROWS);
        whole known = one > largest;
        largest = choose(j <= from ? known : known & sees(from, j), one, largest);
    }
    exponentiate(table, from, seen, scale, largest, (vec){0} + 1.0f);
    for (int j = 0; j < seen; j++) total += load(table + j * ROWS);
    *most = largest, *share = 1.0f / total;
    for (int j = 0; j < seen; j++) store(table + j * ROWS, load(table + j * ROWS) * *share);
}

/* Queries from `from` on, of one head: products of each with the keys that one of them may see, across. */
INLINE void multiply_keys(const Attention *a, Scratch *s, int64_t first, int from, int rows, int head, const int half) {
    read_head(a->q, first + from, rows, a->q_row, head, a, s, s->queries, ROWS, a->cos != NULL, half);
    turn(s->queries, s->queries_across, ROWS, s->wide, ROWS);
    multiply(s->weights, from + ROWS, ROWS, ROWS, s->keys, s->wide, 1, s->queries_across, a->size, 0);
}

/* Where a number of each of these queries lies. */
INLINE int64_t place(const Attention *a, int64_t first, int from, int head) {
    return (int64_t)head * a->starts[a->examples] + first + from;
}

INLINE int lanes_of(int rows, int group) {
    int left = rows - group * LANES;
    return left < 0 ? 0 : left < LANES ? left : LANES;
}

/* Their outputs. */
INLINE void attend_rows(const Attention *a, Scratch *s, int64_t first, int from, int rows, int head, const int half) {
    multiply_keys(a, s, first, from, rows, head, half);
    for (int group = 0; group < GROUPS; group++) {
        int64_t at = place(a, first, from, head) + group * LANES;
        vec most, share;
        soften(s->weights + group * LANES, from + group * LANES, from + ROWS, a->scale, &most, &share);
        put_some(a->most, at, lanes_of(rows, group), most, 0);
        put_some(a->share, at, lanes_of(rows, group), share, 0);
    }
    multiply(s->outs, ROWS, s->wide, s->wide, s->weights, 1, ROWS, s->values, from + rows, 0);
    write_head(a->out, first + from, rows, a->heads * a->size, head, a, s, s->outs, 0, half);
}

INLINE void attend(const Attention *a, Scratch s, int example, int kv_head, const int half) {
    int64_t first = a->starts[example];
    int num = a->starts[example + 1] - first, group = a->heads / a->kv_heads, filled = rounded_up(num, ROWS);
    read_head(a->k, first, num, a->kv_row, kv_head, a, &s, s.keys, filled, a->cos != NULL, half);
    read_head(a->v, first, num, a->kv_row, kv_head, a, &s, s.values, num, 0, half);
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++)
        for (int from = 0; from < num; from += ROWS)
            attend_rows(a, &s, first, from, num - from < ROWS ? num - from : ROWS, head, half);
}

/* dS = s P (dP - sum(P dP)), of LANES queries, in place of dP.  The sum is that of dout and out, too, but out was
 * rounded. */
INLINE void soften_back(const float *weights, float *changes, int seen, float scale) {
    vec mean = {0};
    for (int j = 0; j < seen; j++) mean += load(weights + j * ROWS) * load(changes + j * ROWS);
    for (int j = 0; j < seen; j++)
        store(changes + j * ROWS, scale * load(weights + j * ROWS) * (load(changes + j * ROWS) - mean));
}

/* Their gradients, and what they add to those of keys and values.  Rows that are none have a share of 0. */
INLINE void attend_rows_back(const Attention *a, Scratch *s, int64_t first, int from, int rows, int head,
                             const int half) {
    int seen = from + ROWS, known = rounded_up(from + rows, TALL);
    multiply_keys(a, s, first, from, rows, head, half);
    read_head(a->grad, first + from, rows, a->heads * a->size, head, a, s, s->grads, ROWS, 0, half);
    turn(s->grads, s->grads_across, ROWS, s->wide, ROWS);
    multiply(s->dweights, seen, ROWS, ROWS, s->values, s->wide, 1, s->grads_across, a->size, 0);
    for (int group = 0; group < GROUPS; group++) {
        int64_t at = place(a, first, from, head) + group * LANES;
        int num = lanes_of(rows, group), after = group * LANES;
        vec most = get_some(a->most, at, num, 0), share = get_some(a->share, at, num, 0);
        exponentiate(s->weights + after, from + after, seen, a->scale, most, share);
        soften_back(s->weights + after, s->dweights + after, seen, a->scale);
    }
    multiply(s->dvalues, known, s->wide, s->wide, s->weights, ROWS, 1, s->grads, ROWS, 1);
    multiply(s->dkeys, known, s->wide, s->wide, s->dweights, ROWS, 1, s->queries, ROWS, 1);
    multiply(s->outs, ROWS, s->wide, s->wide, s->dweights, 1, ROWS, s->keys, from + rows, 0);
    write_head(a->dq, first + from, rows, a->q_row, head, a, s, s->outs, a->cos != NULL, half);
}

INLINE void attend_back(const Attention *a, Scratch s, int example, int kv_head, const int half) {
    int64_t first = a->starts[example];
    int num = a->starts[example + 1] - first, group = a->heads / a->kv_heads, filled = rounded_up(num, ROWS);
    size_t square = 4 * (size_t)filled * s.wide;
    read_head(a->k, first, num, a->kv_row, kv_head, a, &s, s.keys, filled, a->cos != NULL, half);
    read_head(a->v, first, num, a->kv_row, kv_head, a, &s, s.values, filled, 0, half);
    memset(s.dkeys, 0, square), memset(s.dvalues, 0, square);
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++)
        for (int from = 0; from < num; from += ROWS)
            attend_rows_back(a, &s, first, from, num - from < ROWS ? num - from : ROWS, head, half);
    write_head(a->dk, first, num, a->kv_row, kv_head, a, &s, s.dkeys, a->cos != NULL, half);
    write_head(a->dv, first, num, a->kv_row, kv_head, a, &s, s.dvalues, 0, half);
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
