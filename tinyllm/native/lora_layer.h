/* A linear layer with a low-rank path (lora.c), and what both of its ways need. */
#pragma once
#include "draws.h"
#include "pairs.h"
#include "threads.h"

/* One layer; what belongs to all layers of a call is read from the first. */
typedef struct {
    const uint16_t *x;      /* (rows, in) */
    const float *a, *b;     /* (rank, in) and (out, rank); in a multiple of 4, out of 2 */
    uint16_t *low;          /* (rows, rank rounded up to LANES) */
    int64_t rows, row_size; /* of y and grad, which may be parts of wider rows */
    int32_t in, out, rank;
    float scale;
    uint64_t seed;
    uint32_t threshold; /* of 65536 numbers of x are dropped */
    /* forwards: */
    uint16_t *y;           /* (rows, out) */
    const uint16_t *past;  /* (rows, out), added to y as well, or none */
    const uint32_t *ahead; /* W in strips of its rows, or none */
    const uint16_t *bias;  /* (out), or none */
    /* backwards: */
    const uint16_t *grad; /* (rows, out) */
    uint16_t *dx;         /* (rows, in), or none */
    float *da, *db;       /* as a and b */
    const uint32_t *back; /* the W of all layers below each other in strips of columns, or none */
} Lora;

#ifdef MULTIPLIES_PAIRS
#define BLOCK 64 /* rows that are read once and then lie near */

/* The rows of a thread: as many as any other's, in whole tiles. */
typedef struct {
    int64_t first, end;
} Range;

static Range rows_here(int64_t rows) {
    int64_t tiles = (rows + TALL - 1) / TALL, threads = threads_here(), me = this_thread();
    int64_t end = (me + 1) * tiles / threads * TALL;
    return (Range){me * tiles / threads * TALL, end < rows ? end : rows};
}

/* TALL rows of which `num` are there: these themselves, or a copy in `spare` (TALL, cols) with zeros behind them. */
INLINE const uint16_t *whole_tile(const uint16_t *rows, int64_t *stride, int num, int cols, uint16_t *spare) {
    if (num >= TALL) return rows;
    memset(spare, 0, 2 * (size_t)TALL * cols);
    for (int i = 0; i < num; i++) memcpy(spare + (int64_t)i * cols, rows + i * *stride, 2 * (size_t)cols);
    *stride = cols;
    return spare;
}

INLINE void set_to_zero(floats sums[TALL][2]) {
    UNROLL for (int i = 0; i < TALL; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
}

/* The strip from column col on of a matrix in strips, of `num` rows. */
INLINE const uint32_t *strip_at(const uint32_t *strips, int col, int num) {
    return strips + (int64_t)col * (num / 2);
}

/* The adapter's matrices as pairs, and how wide they are when filled up. */
typedef struct {
    int rank, in, out;
    uint32_t *into, *from; /* what makes rows narrow, and what makes them wide again */
} Packed;

static Packed packed_for(const Lora *l, int backwards) {
    Packed p = {.rank = rounded_up(l->rank, LANES), .in = rounded_up(l->in, STRIP), .out = rounded_up(l->out, STRIP)};
    p.into = words_of((size_t)(p.in + p.out) * p.rank / 2);
    p.from = p.into + (size_t)(backwards ? p.out : p.in) * p.rank / 2;
    return p;
}

/* Which of the STRIP numbers from column col of a row are there, and kept. */
INLINE uint32_t kept(const Lora *l, int64_t row, int col) {
    if (!l->threshold) return there(col, l->in);
    return there(col, l->in) & kept_of_32(l->seed, row * l->in + col, l->threshold);
}

/* `num` rows with zeros where they are dropped, and rows of zeros after them, for TALL rows. */
INLINE void copy_kept(const Lora *l, const Packed *p, int64_t row, int num, uint16_t *to) {
    for (int i = 0; i < TALL; i++)
        for (int col = 0; col < l->in; col += STRIP) {
            __m512i part = _mm512_setzero_si512();
            if (i < num) part = _mm512_maskz_loadu_epi16(kept(l, row + i, col), l->x + (row + i) * l->in + col);
            _mm512_storeu_si512(to + (int64_t)i * p->in + col, part);
        }
}
#endif
