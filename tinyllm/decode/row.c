/* The forward pass of a llama-like model for one conversation, float32 arithmetic throughout.
 *
 * At one row a small model is bound by reading its weights.  So weights that are bfloat16 numbers are
 * read as bfloat16 or in 12 bits (the same values, see compact.py), and a LoRA adapter stays beside its
 * matrix: y = W x + b + s B (A x).  All threads walk through the layers together; each computes a part of every
 * product, what it wrote last is still in its cache, and they meet five times a layer.
 * Compiled by kernel.py.
 */
#include "row_math.h"
#ifdef _OPENMP
#include <omp.h>
#endif
#include <sched.h>
#include <stdatomic.h>

#define PATIENCE 1000 /* looks at a barrier, some 10 microseconds, before the processor is given away */
#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE()
#endif
#define WORTH_SHARING 65536 /* weights of a matrix that more than one thread takes up */
#define MAX_RANK 1024
#define BLOCK 8 /* tokens that share one pass over the weights */

/* A weight that has no code in a PACKED matrix, where it is 0. */
typedef struct {
    int32_t row, column;
    float value;
} Stray;

typedef struct {
    Matrix w;
    const Stray *strays;       /* (num_strays), by row */
    const float *bias, *a, *b; /* (out), (rank, in), (out / LANES, rank, LANES); NULL where absent */
    int32_t num_strays, rank;
    float scale;
} Linear;

typedef struct {
    const float *attention_norm, *mlp_norm;
    Linear q, k, v, o, gate, up, down;
    float *keys, *values; /* (kv_heads, context, dim) */
} Layer;

typedef struct {
    const float *embedding, *norm, *cos, *sin; /* (V, H), (H), (context, dim / 2) twice */
    const Layer *layers;
    float *scratch;
    Linear head;
    int32_t num_layers, hidden, inner, heads, kv_heads, dim, context, threads;
    float eps;
} Model;

/* Where threads wait for each other: who comes last sends all on.  OpenMP's own takes three times as long. */
typedef struct {
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_int round;
} Barrier;

/* One thread's share of the work: part `part` of `parts`, and memory of its own. */
typedef struct {
    int part, parts;
    Barrier *barrier;
    float *normed, *scores; /* (BLOCK, hidden), (context) */
} Share;

typedef struct {
    float *x, *q, *k, *v, *mixed, *gate, *up; /* (BLOCK, ...) each, shared by all threads */
} Scratch;

int32_t lanes(void) { return LANES; }

/* Whether PACKED matrices can be read. */
int32_t packs(void) {
#ifdef SHUFFLE
    return 1;
#else
    return 0;
#endif
}

INLINE void meet(const Share *s) {
    int round = atomic_load(&s->barrier->round);
    if (atomic_fetch_add(&s->barrier->arrived, 1) == s->parts - 1) {
        atomic_store(&s->barrier->arrived, 0);
        atomic_store(&s->barrier->round, round + 1);
        return;
    }
    for (int looks = 0; atomic_load(&s->barrier->round) == round;)
        if (looks < PATIENCE) looks++, PAUSE();
        else sched_yield();
}

/* y += s B (A x) for the outputs `from` to `end` of one token. */
INLINE void adapt(const Linear *l, const float *x, float *y, int64_t from, int64_t end) {
    const Matrix a = {.weight = l->a, .in = l->w.in, .out = l->rank};
    float low[MAX_RANK];
    for (int r = 0; r < l->rank; r++) low[r] = l->scale * dot(&a, FLOATS, r, x, 1);
    for (int64_t o = from; o < end;) {
        const float *b = l->b + o / LANES * l->rank * LANES;
        if (o % LANES == 0 && o + LANES <= end) {
            vec even = load(y + o), odd = {0};
            int r = 0;
            for (; r + 2 <= l->rank; r += 2)
                even += low[r] * load(b + r * LANES), odd += low[r + 1] * load(b + (r + 1) * LANES);
            if (r < l->rank) even += low[r] * load(b + r * LANES);
            store(y + o, even + odd);
            o += LANES;
        } else {
            for (int r = 0; r < l->rank; r++) y[o] += low[r] * b[r * LANES + o % LANES];
            o++;
        }
    }
}

/* The outputs `from` to `end` of a linear layer, for n tokens. */
INLINE void linear(const Linear *l, const float *x, float *y, int n, int64_t from, int64_t end,
                   const int add) {
    if (from >= end) return;
    if (l->w.kind == PACKED) product(&l->w, PACKED, from, end, x, y, n, add, 1);
    else if (l->w.kind == HALVES) product(&l->w, HALVES, from, end, x, y, n, add, 1);
    else product(&l->w, FLOATS, from, end, x, y, n, add, 1);
    for (int t = 0; t < n; t++) {
        const float *in = x + (int64_t)t * l->w.in;
        float *row = y + (int64_t)t * l->w.out;
        for (const Stray *s = l->strays; s < l->strays + l->num_strays; s++)
            if (s->row >= from && s->row < end) row[s->row] += s->value * in[s->column];
        if (l->rank) adapt(l, in, row, from, end);
        if (l->bias) for (int64_t o = from; o < end; o++) row[o] += l->bias[o];
    }
}

/* Where the share of one thread begins, or that of the next one. */
INLINE int64_t cut(int64_t size, const Share *s, int next) { return size * (s->part + next) / s->parts; }

static void norm(const float *x, const float *weight, float *y, int size, float eps) {
    vec squares = {0};
    float rest = 0.0f;
    int i = 0;
    for (; i + LANES <= size; i += LANES) squares += load(x + i) * load(x + i);
    for (; i < size; i++) rest += x[i] * x[i];
    float factor = 1.0f / sqrtf((sum(squares) + rest) / size + eps);
    for (i = 0; i < size; i++) y[i] = x[i] * factor * weight[i];
}

/* Every thread norms all n tokens for itself: cheaper than waiting for each other. */
static const float *normed(const Model *m, const Scratch *c, const Share *s, const float *weight, int n) {
    for (int t = 0; t < n; t++)
        norm(c->x + (int64_t)t * m->hidden, weight, s->normed + (int64_t)t * m->hidden, m->hidden, m->eps);
    return s->normed;
}

/* Rotary position of one head: each value pairs with the one half a head further on. */
static void rotate(float *x, int dim, const float *cos, const float *sin) {
    for (int i = 0; i < dim / 2; i++) {
        float a = x[i], b = x[i + dim / 2];
        x[i] = a * cos[i] - b * sin[i];
        x[i + dim / 2] = b * cos[i] + a * sin[i];
    }
}

/* Heads `from` to `end` of queries (kind 0), keys (1) or values (2); keys and values go to the cache. */
static void heads(const Model *m, const Layer *l, const Linear *linear_of, float *y, const float *x, int n,
                  int start, int from, int end, int kind) {
    int dim = m->dim, half = dim / 2;
    if (from >= end) return;
    linear(linear_of, x, y, n, (int64_t)from * dim, (int64_t)end * dim, 0);
    for (int t = 0; t < n; t++)
        for (int h = from; h < end; h++) {
            int64_t p = start + t, at = ((int64_t)h * m->context + p) * dim;
            float *one = y + (int64_t)t * linear_of->w.out + h * dim;
            if (kind < 2) rotate(one, dim, m->cos + p * half, m->sin + p * half);
            if (kind > 0) memcpy((kind == 1 ? l->keys : l->values) + at, one, dim * sizeof(float));
        }
}

INLINE int within(int64_t place, int first, int size) {
    return place < first ? 0 : place > first + size ? size : (int)(place - first);
}

/* Queries, keys and values side by side are m->heads + 2 * m->kv_heads heads to share. */
static void project(const Model *m, const Layer *l, Scratch *c, const Share *s, int n, int start) {
    const float *x = normed(m, c, s, l->attention_norm, n);
    int num = m->heads + 2 * m->kv_heads, first = 0;
    const Linear *which[3] = {&l->q, &l->k, &l->v};
    float *to[3] = {c->q, c->k, c->v};
    for (int kind = 0; kind < 3; kind++) {
        int size = kind ? m->kv_heads : m->heads;
        heads(m, l, which[kind], to[kind], x, n, start, within(cut(num, s, 0), first, size),
              within(cut(num, s, 1), first, size), kind);
        first += size;
    }
}

/* Scores of positions 0 to `last` become shares; returns their sum. */
static float softmax(float *scores, int last, float scale) {
    float most = -INFINITY, total = 0.0f;
    int p = 0;
    for (; p <= last; p++) {
        scores[p] *= scale;
        if (scores[p] > most) most = scores[p];
    }
    vec totals = {0};
    for (p = 0; p + LANES <= last + 1; p += LANES) {
        vec share = exponential(load(scores + p) - most);
        store(scores + p, share);
        totals += share;
    }
    for (; p <= last; p++) total += scores[p] = expf(scores[p] - most);
    return total + sum(totals);
}

/* One head of one token: mix the values of positions 0 to `last`. */
static void attend(const float *q, const float *keys, const float *values, float *scores, float *mixed,
                   int last, int dim) {
    const Matrix past = {.weight = keys, .in = dim, .out = last + 1};
    product(&past, FLOATS, 0, last + 1, q, scores, 1, 0, 0);
    float total = softmax(scores, last, 1.0f / sqrtf((float)dim));
    int i = 0;
    for (; i + 2 * LANES <= dim; i += 2 * LANES) {
        vec low = {0}, high = {0};
        for (int p = 0; p <= last; p++) {
            const float *value = values + (int64_t)p * dim + i;
            low += scores[p] * load(value), high += scores[p] * load(value + LANES);
        }
        store(mixed + i, low / total), store(mixed + i + LANES, high / total);
    }
    for (; i < dim; i++) {
        float one = 0.0f;
        for (int p = 0; p <= last; p++) one += scores[p] * values[(int64_t)p * dim + i];
        mixed[i] = one / total;
    }
}

static void attention(const Model *m, const Layer *l, Scratch *c, const Share *s, int n, int start) {
    int group = m->heads / m->kv_heads, dim = m->dim;
    for (int64_t at = cut((int64_t)n * m->heads, s, 0); at < cut((int64_t)n * m->heads, s, 1); at++) {
        int t = at / m->heads, h = at % m->heads;
        int64_t cache = (int64_t)(h / group) * m->context * dim;
        attend(c->q + at * dim, l->keys + cache, l->values + cache, s->scores, c->mixed + at * dim,
               start + t, dim);
    }
}

static void silu(float *gate, const float *up, int64_t from, int64_t end) {
    int64_t i = from;
    for (; i + LANES <= end; i += LANES) {
        vec g = load(gate + i);
        store(gate + i, g / (1.0f + exponential(0.0f - g)) * load(up + i));
    }
    for (; i < end; i++) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

static void widen(const Model *m, const Layer *l, Scratch *c, const Share *s, int n) {
    const float *x = normed(m, c, s, l->mlp_norm, n);
    int64_t from = cut(m->inner, s, 0), end = cut(m->inner, s, 1);
    linear(&l->gate, x, c->gate, n, from, end, 0);
    linear(&l->up, x, c->up, n, from, end, 0);
    for (int t = 0; t < n; t++) {
        int64_t row = (int64_t)t * m->inner;
        silu(c->gate + row, c->up + row, from, end);
    }
}

/* All layers for n tokens at positions `start` and on. */
static void block(const Model *m, Scratch *c, const Share *s, const int64_t *ids, int n, int start) {
    int64_t from = cut(m->hidden, s, 0), end = cut(m->hidden, s, 1);
    for (int t = 0; t < n; t++)
        memcpy(c->x + (int64_t)t * m->hidden + from, m->embedding + ids[t] * m->hidden + from,
               (end - from) * sizeof(float));
    for (int i = 0; i < m->num_layers; i++) {
        const Layer *l = m->layers + i;
        meet(s), project(m, l, c, s, n, start);
        meet(s), attention(m, l, c, s, n, start);
        meet(s), linear(&l->o, c->mixed, c->x, n, from, end, 1);
        meet(s), widen(m, l, c, s, n);
        meet(s), linear(&l->down, c->gate, c->x, n, from, end, 1);
    }
    meet(s);
}

static int64_t shared_size(const Model *m) {
    return (int64_t)BLOCK * (m->hidden + 2 * m->heads * m->dim + 2 * m->kv_heads * m->dim + 2 * m->inner);
}

static int64_t own_size(const Model *m) { return (int64_t)BLOCK * m->hidden + m->context; }

/* How many floats of scratch space `forward` needs. */
int64_t scratch_size(const Model *m) { return shared_size(m) + m->threads * own_size(m); }

static Scratch lay_out(const Model *m) {
    int64_t wide = (int64_t)BLOCK * m->heads * m->dim, narrow = (int64_t)BLOCK * m->kv_heads * m->dim;
    Scratch c = {.x = m->scratch};
    c.q = c.x + (int64_t)BLOCK * m->hidden;
    c.mixed = c.q + wide;
    c.k = c.mixed + wide;
    c.v = c.k + narrow;
    c.gate = c.v + narrow;
    c.up = c.gate + (int64_t)BLOCK * m->inner;
    return c;
}

static void walk(const Model *m, Share *s, const int64_t *ids, int n, int start, float *logits) {
    Scratch c = lay_out(m);
    s->normed = m->scratch + shared_size(m) + s->part * own_size(m);
    s->scores = s->normed + (int64_t)BLOCK * m->hidden;
    int size = 0;
    for (int done = 0; done < n; done += size) {
        size = n - done < BLOCK ? n - done : BLOCK;
        block(m, &c, s, ids + done, size, start + done);
    }
    norm(c.x + (int64_t)(size - 1) * m->hidden, m->norm, s->normed, m->hidden, m->eps);
    linear(&m->head, s->normed, logits, 1, cut(m->head.w.out, s, 0), cut(m->head.w.out, s, 1), 0);
}

/* Take in n ids at positions `start` and on; logits (V) after the last of them. */
void forward(const Model *m, const int64_t *ids, int32_t n, int32_t start, float *logits) {
    int64_t inside = (int64_t)m->hidden * m->inner, head = (int64_t)m->head.w.in * m->head.w.out;
    int parts = inside < WORTH_SHARING && head < 4 * WORTH_SHARING ? 1 : m->threads;
    Barrier barrier = {0};
#pragma omp parallel num_threads(parts)
    {
        Share s = {.parts = 1, .barrier = &barrier};
#ifdef _OPENMP
        s.part = omp_get_thread_num(), s.parts = omp_get_num_threads();
#endif
        walk(m, &s, ids, n, start, logits);
    }
}
