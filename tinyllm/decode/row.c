/* The forward pass of a llama-like model for one conversation, float32 arithmetic throughout.
 *
 * At one row a small model is bound by reading its weights.  So weights that are bfloat16 numbers are
 * read as bfloat16 (half the bytes, the same values), and a LoRA adapter stays beside its matrix:
 * y = W x + b + s B (A x).  Compiled by kernel.py, which also checks the shapes this file relies on:
 * every inner size is a multiple of 8, of 16 where the weights are bfloat16.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define WORTH_SHARING 65536 /* weights of a matrix that more than one thread takes up */
#define MAX_RANK 1024
#define BLOCK 8 /* tokens that share one pass over the weights */

typedef float f32x8 __attribute__((vector_size(32), aligned(4)));
typedef uint32_t u32x8 __attribute__((vector_size(32), aligned(4)));

typedef struct {
    const void *weight;             /* (out, in) float or, where half is set, bfloat16 */
    const float *bias, *a, *b;      /* (out), (rank, in), (rank, out); NULL where absent */
    int32_t in, out, rank, half;
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

INLINE f32x8 load(const float *at) { return *(const f32x8 *)at; }

INLINE float sum(f32x8 v) {
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

/* Of 16 bfloat16 numbers the first eight lie in the lower halves of eight words (see halves.py). */
INLINE void open_pair(const void *w, int64_t at, f32x8 *low, f32x8 *high) {
    u32x8 pair = *(const u32x8 *)((const uint16_t *)w + at);
    *low = (f32x8)(pair << 16), *high = (f32x8)(pair & 0xffff0000u);
}

/* One row of W . x, read from front to back: memory is fetched ahead only for a steady reader. */
INLINE float dot(const void *w, const int half, int64_t at, int64_t in, const float *x) {
    f32x8 acc[4] = {{0}, {0}, {0}, {0}}, low, high;
    int64_t i = 0;
    for (; i + 32 <= in; i += 32)
        UNROLL for (int j = 0; j < 4; j += 2) {
            if (half) open_pair(w, at + i + 8 * j, &low, &high);
            else {
                low = load((const float *)w + at + i + 8 * j);
                high = load((const float *)w + at + i + 8 * j + 8);
            }
            acc[j] += low * load(x + i + 8 * j);
            acc[j + 1] += high * load(x + i + 8 * j + 8);
        }
    for (; half && i < in; i += 16) {
        open_pair(w, at + i, &low, &high);
        acc[0] += low * load(x + i), acc[1] += high * load(x + i + 8);
    }
    for (; i < in; i += 8) acc[2] += load((const float *)w + at + i) * load(x + i);
    return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

/* y[t][o] = W[o] . x[t] for `rows` outputs from o on and four tokens. */
INLINE void tile(const void *w, const int half, int64_t in, int64_t out, const float *x, float *y,
                 int64_t o, const int rows) {
    f32x8 acc[2][4], low, high;
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int t = 0; t < 4; t++) acc[r][t] = (f32x8){0};
    for (int64_t i = 0; i < in; i += half ? 16 : 8) {
        UNROLL for (int r = 0; r < rows; r++) {
            int64_t at = (o + r) * in + i;
            if (half) {
                open_pair(w, at, &low, &high);
                UNROLL for (int t = 0; t < 4; t++)
                    acc[r][t] += low * load(x + t * in + i) + high * load(x + t * in + i + 8);
            } else {
                low = load((const float *)w + at);
                UNROLL for (int t = 0; t < 4; t++) acc[r][t] += low * load(x + t * in + i);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int t = 0; t < 4; t++) y[t * out + o + r] = sum(acc[r][t]);
}

/* The outputs `from` to `end` of n tokens. */
INLINE void product(const void *w, const int half, int64_t in, int64_t from, int64_t end, int64_t out,
                    const float *x, float *y, int n) {
    int t = 0;
    for (; t + 4 <= n; t += 4, x += 4 * in, y += 4 * out) {
        int64_t o = from;
        for (; o + 2 <= end; o += 2) tile(w, half, in, out, x, y, o, 2);
        for (; o < end; o++) tile(w, half, in, out, x, y, o, 1);
    }
    for (; t < n; t++, x += in, y += out)
        for (int64_t o = from; o < end; o++) y[o] = dot(w, half, o * in, in, x);
}

static void linear(const Linear *l, const float *x, float *y, int n, int threads) {
    float low[MAX_RANK];
    int parts = (int64_t)l->in * l->out < WORTH_SHARING ? 1 : threads;
#pragma omp parallel for num_threads(parts) if (parts > 1)
    for (int part = 0; part < parts; part++) {
        int64_t from = (int64_t)l->out * part / parts, end = (int64_t)l->out * (part + 1) / parts;
        if (l->half) product(l->weight, 1, l->in, from, end, l->out, x, y, n);
        else product(l->weight, 0, l->in, from, end, l->out, x, y, n);
    }
    for (int t = 0; t < n; t++) {
        float *row = y + (int64_t)t * l->out;
        if (l->rank) product(l->a, 0, l->in, 0, l->rank, l->rank, x + (int64_t)t * l->in, low, 1);
        for (int r = 0; r < l->rank; r++) {
            const float *b = l->b + (int64_t)r * l->out;
            float share = low[r] * l->scale;
            for (int o = 0; o < l->out; o++) row[o] += share * b[o];
        }
        if (l->bias) for (int o = 0; o < l->out; o++) row[o] += l->bias[o];
    }
}

static void norm(const float *x, const float *weight, float *y, int size, float eps) {
    f32x8 squares = {0};
    for (int i = 0; i < size; i += 8) squares += load(x + i) * load(x + i);
    float factor = 1.0f / sqrtf(sum(squares) / size + eps);
    for (int i = 0; i < size; i++) y[i] = x[i] * factor * weight[i];
}

/* Rotary positions: each value pairs with the one half a head further on. */
static void rotate(float *x, int heads, int dim, const float *cos, const float *sin) {
    for (int h = 0; h < heads; h++, x += dim)
        for (int i = 0; i < dim / 2; i++) {
            float a = x[i], b = x[i + dim / 2];
            x[i] = a * cos[i] - b * sin[i];
            x[i + dim / 2] = b * cos[i] + a * sin[i];
        }
}

/* One head of one token: mix the values of positions 0 to `last`. */
static void attend(const float *q, const float *keys, const float *values, float *scores, float *mixed,
                   int last, int dim) {
    float scale = 1.0f / sqrtf((float)dim), most = -INFINITY, total = 0.0f;
    product(keys, 0, dim, 0, last + 1, last + 1, q, scores, 1);
    for (int p = 0; p <= last; p++) {
        scores[p] *= scale;
        if (scores[p] > most) most = scores[p];
    }
    memset(mixed, 0, dim * sizeof(float));
    for (int p = 0; p <= last; p++) {
        float share = expf(scores[p] - most);
        total += share;
        for (int i = 0; i < dim; i++) mixed[i] += share * values[(int64_t)p * dim + i];
    }
    for (int i = 0; i < dim; i++) mixed[i] /= total;
}

typedef struct {
    float *x, *y, *q, *k, *v, *mixed, *gate, *up, *scores;
} Scratch;

static void attention(const Model *m, const Layer *l, Scratch *s, int n, int start) {
    int threads = m->threads, dim = m->dim, half = dim / 2, group = m->heads / m->kv_heads;
    linear(&l->q, s->y, s->q, n, threads);
    linear(&l->k, s->y, s->k, n, threads);
    linear(&l->v, s->y, s->v, n, threads);
    for (int t = 0; t < n; t++) {
        int64_t p = start + t;
        float *q = s->q + (int64_t)t * m->heads * dim, *k = s->k + (int64_t)t * m->kv_heads * dim;
        rotate(q, m->heads, dim, m->cos + p * half, m->sin + p * half);
        rotate(k, m->kv_heads, dim, m->cos + p * half, m->sin + p * half);
        for (int h = 0; h < m->kv_heads; h++) {
            int64_t at = ((int64_t)h * m->context + p) * dim;
            memcpy(l->keys + at, k + h * dim, dim * sizeof(float));
            memcpy(l->values + at, s->v + ((int64_t)t * m->kv_heads + h) * dim, dim * sizeof(float));
        }
    }
    for (int t = 0; t < n; t++)
        for (int h = 0; h < m->heads; h++) {
            int64_t row = ((int64_t)t * m->heads + h) * dim;
            int64_t at = (int64_t)(h / group) * m->context * dim;
            attend(s->q + row, l->keys + at, l->values + at, s->scores, s->mixed + row, start + t, dim);
        }
    linear(&l->o, s->mixed, s->y, n, threads);
}

static void mlp(const Layer *l, Scratch *s, int n, int threads) {
    linear(&l->gate, s->y, s->gate, n, threads);
    linear(&l->up, s->y, s->up, n, threads);
    for (int64_t i = 0; i < (int64_t)n * l->gate.out; i++)
        s->gate[i] = s->gate[i] / (1.0f + expf(-s->gate[i])) * s->up[i];
    linear(&l->down, s->gate, s->y, n, threads);
}

static void block(const Model *m, Scratch *s, const int64_t *ids, int n, int start) {
    int hidden = m->hidden;
    for (int t = 0; t < n; t++)
        memcpy(s->x + (int64_t)t * hidden, m->embedding + ids[t] * hidden, hidden * sizeof(float));
    for (int i = 0; i < m->num_layers; i++) {
        const Layer *l = m->layers + i;
        for (int t = 0; t < n; t++)
            norm(s->x + (int64_t)t * hidden, l->attention_norm, s->y + (int64_t)t * hidden, hidden, m->eps);
        attention(m, l, s, n, start);
        for (int j = 0; j < n * hidden; j++) s->x[j] += s->y[j];
        for (int t = 0; t < n; t++)
            norm(s->x + (int64_t)t * hidden, l->mlp_norm, s->y + (int64_t)t * hidden, hidden, m->eps);
        mlp(l, s, n, m->threads);
        for (int j = 0; j < n * hidden; j++) s->x[j] += s->y[j];
    }
}

/* How many floats of scratch space `forward` needs. */
int64_t scratch_size(const Model *m) {
    int64_t per_token = 2 * m->hidden + 2 * m->heads * m->dim + 2 * m->kv_heads * m->dim + 2 * m->inner;
    return BLOCK * per_token + m->context;
}

/* Take in n ids at positions `start` and on; logits (V) after the last of them. */
void forward(const Model *m, const int64_t *ids, int32_t n, int32_t start, float *logits) {
    Scratch s;
    float *next = m->scratch;
    int64_t wide = (int64_t)BLOCK * m->heads * m->dim, narrow = (int64_t)BLOCK * m->kv_heads * m->dim;
    s.x = next, next += BLOCK * m->hidden;
    s.y = next, next += BLOCK * m->hidden;
    s.q = next, next += wide;
    s.mixed = next, next += wide;
    s.k = next, next += narrow;
    s.v = next, next += narrow;
    s.gate = next, next += BLOCK * m->inner;
    s.up = next, next += BLOCK * m->inner;
    s.scores = next;
    int size = 0;
    for (int done = 0; done < n; done += size) {
        size = n - done < BLOCK ? n - done : BLOCK;
        block(m, &s, ids + done, size, start + done);
    }
    norm(s.x + (int64_t)(size - 1) * m->hidden, m->norm, s.y, m->hidden, m->eps);
    linear(&m->head, s.y, logits, 1, m->threads);
}
