/* The low-rank paths of linear layers with one input in bfloat16, for processors that have pairs.h; others get
 * nothing from this file.  Of one layer:
 *
 *     low = (x ∘ m) Aᵀ,   y += s low Bᵀ                                                      forwards
 *     dlow = s dy B,   dB = s dyᵀ low,   dA = dlowᵀ (x ∘ m),   dx += (dlow A) ∘ m            backwards
 *
 * Each product is narrow (the rank), so that a library spends its time on calls and passes over memory.  Here x,
 * dy, y and dx are read once, and the mask m is drawn from its seed on the way (see dropout.py).
 * Sums are float32, rounded where they are stored; s includes the 1 / (1 - p) of dropout.
 * Compiled by code.py; the Python side is lora.py.
 */
#include "draws.h"
#include "pairs.h"
#include "threads.h"

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
    uint16_t *y;          /* (rows, out), added to */
    const uint16_t *past; /* (rows, out), added to y as well, or none */
    /* backwards: */
    const uint16_t *grad; /* (rows, out) */
    uint16_t *dx;         /* (rows, in), added to, or none */
    float *da, *db;       /* as a and b */
} Lora;

#ifdef MULTIPLIES_PAIRS
#define BLOCK 64 /* rows that are read once and then lie near */

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

static void add_to_y(const Lora *l, const Packed *p, int64_t row, int num, const uint16_t *low) {
    floats wide[TALL][2], scale = _mm512_set1_ps(l->scale);
    for (int col = 0; col < l->out; col += STRIP) {
        wide_product(low, p->rank, p->from, p->out, col, wide);
        for (int i = 0; i < num; i++) {
            const uint16_t *past = l->past ? l->past + (row + i) * l->out + col : NULL;
            for (int side = 0; side < 2; side++) {
                uint16_t *to = l->y + (row + i) * l->row_size + col + side * LANES;
                __mmask16 mask = there(col, l->out) >> side * LANES;
                floats y = _mm512_fmadd_ps(scale, wide[i][side], load_halves(to, mask));
                if (past) y = _mm512_add_ps(rounded_halves(y), load_halves(past + side * LANES, mask));
                store_halves(to, y, mask);
            }
        }
    }
}

static void forward_rows(const Lora *l, const Packed *p, int64_t row, uint16_t *scratch) {
    int num = l->rows - row < TALL ? l->rows - row : TALL;
    uint16_t *low = scratch + (int64_t)TALL * p->in;
    floats sums[TALL];
    copy_kept(l, p, row, num, scratch);
    for (int col = 0; col < p->rank; col += LANES) {
        narrow_product(scratch, p->in, l->in, p->into, p->rank, col, sums);
        for (int i = 0; i < TALL; i++) store_halves(low + (int64_t)i * p->rank + col, sums[i], 0xffff);
    }
    memcpy(l->low + row * p->rank, low, 2 * (size_t)num * p->rank);
    add_to_y(l, p, row, num, low);
}

void lora_forward(const Lora *all, int32_t number) {
    Packed p[number];
    size_t most = 0;
    for (int i = 0; i < number; i++) {
        p[i] = packed_for(&all[i], 0);
        size_t words = (size_t)TALL * (p[i].in + p[i].rank) / 2;
        if (words > most) most = words;
    }
#pragma omp parallel
    {
        uint16_t *scratch = (uint16_t *)words_of(most);
        for (int i = 0; i < number; i++) {
            const Lora *l = &all[i];
            pack_into(l->a, l->in, 1, l->rank, p[i].rank, l->in, p[i].into);
            pack_from(l->b, 1, l->rank, l->rank, p[i].rank, l->out, p[i].out, p[i].from);
        }
#pragma omp barrier
#pragma omp for
        for (int64_t row = 0; row < all->rows; row += TALL)
            for (int i = 0; i < number; i++) forward_rows(&all[i], &p[i], row, scratch);
        free(scratch);
    }
    for (int i = 0; i < number; i++) free(p[i].into);
}

/* What a thread has for BLOCK rows, and its sums over all of its blocks. */
typedef struct {
    uint32_t *low_pairs, *dlow_pairs; /* pairs of rows: (BLOCK / 2, rank) */
    uint16_t *dlow, *grad;            /* (BLOCK, rank); (TALL, out), only where rows are missing */
    float *da, *db;                   /* (rank, in) and (rank, out) */
    uint32_t masks[BLOCK];
} Block;

static size_t words_of_sums(const Packed *p) { return (size_t)p->rank * (p->in + p->out); }

static size_t words_of_block(const Packed *p) {
    return rounded_up((size_t)3 * BLOCK / 2 * p->rank + TALL * p->out / 2 + words_of_sums(p), 16);
}

static Block block_in(uint32_t *memory, const Packed *p) {
    Block b = {.low_pairs = memory, .dlow_pairs = memory + BLOCK / 2 * p->rank};
    b.dlow = (uint16_t *)(b.dlow_pairs + BLOCK / 2 * p->rank), b.grad = b.dlow + BLOCK * p->rank;
    b.da = (float *)(b.grad + TALL * p->out), b.db = b.da + (size_t)p->rank * p->in;
    return b;
}

/* dlow of TALL rows, the first of which is row `row` of all and `in_block` of its block. */
static void narrow_rows(const Lora *l, const Packed *p, Block *b, int64_t row, int in_block) {
    int num = l->rows - row < TALL ? l->rows - row : TALL;
    floats sums[TALL], scale = _mm512_set1_ps(l->scale);
    const uint16_t *grad = l->grad + row * l->row_size;
    int64_t stride = l->row_size;
    if (num < TALL) {
        memset(b->grad, 0, 2 * (size_t)TALL * l->out);
        for (int i = 0; i < num; i++) memcpy(b->grad + i * l->out, grad + i * stride, 2 * (size_t)l->out);
        grad = b->grad, stride = l->out;
    }
    for (int col = 0; col < p->rank; col += LANES) {
        narrow_product(grad, stride, l->out, p->into, p->rank, col, sums);
        for (int i = 0; i < TALL; i++)
            store_halves(b->dlow + (int64_t)(in_block + i) * p->rank + col, _mm512_mul_ps(scale, sums[i]), 0xffff);
    }
}

/* Add to `to` (rank, width) the narrow rows of a block, given as pairs, by STRIP columns of its rows of x (rows,
 * cols), of which the block's masks say what counts. */
static void add_product(const uint16_t *x, int64_t cols, int num, int col, const Block *b, const uint32_t *narrow,
                        int rank, float *to, int width) {
    for (int first = 0; first < rank; first += LANES)
        for (int side = 0; side < STRIP; side += LANES)
            tall_product(x + col + side, cols, num, b->masks, side, narrow + first, rank,
                         to + (int64_t)first * width + col + side, width);
}

static void add_to_dx(const Lora *l, const Packed *p, const Block *b, int64_t row, int num, int col) {
    floats wide[TALL][2];
    for (int first = 0; first < num; first += TALL) {
        wide_product(b->dlow + first * p->rank, p->rank, p->from, p->in, col, wide);
        for (int i = first; i < first + TALL && i < num; i++)
            for (int side = 0; side < 2; side++) {
                uint16_t *to = l->dx + (row + i) * l->in + col + side * LANES;
                __mmask16 mask = b->masks[i] >> side * LANES;
                store_halves(to, _mm512_add_ps(load_halves(to, mask), wide[i - first][side]), mask);
            }
    }
}

static void block_back(const Lora *l, const Packed *p, Block *b, int64_t row) {
    int num = l->rows - row < BLOCK ? l->rows - row : BLOCK;
    for (int i = 0; i < num; i += TALL) narrow_rows(l, p, b, row + i, i);
    pair_rows(b->dlow, num, BLOCK, p->rank, b->dlow_pairs);
    pair_rows(l->low + row * p->rank, num, BLOCK, p->rank, b->low_pairs);
    for (int col = 0; col < l->out; col += STRIP) {
        for (int i = 0; i < num; i++) b->masks[i] = there(col, l->out);
        add_product(l->grad + row * l->row_size, l->row_size, num, col, b, b->low_pairs, p->rank, b->db, p->out);
    }
    for (int col = 0; col < l->in; col += STRIP) {
        for (int i = 0; i < num; i++) b->masks[i] = kept(l, row + i, col);
        add_product(l->x + row * l->in, l->in, num, col, b, b->dlow_pairs, p->rank, b->da, p->in);
        if (l->dx) add_to_dx(l, p, b, row, num, col);
    }
}

/* Sums over all threads, of which each has `words` of memory. */
INLINE float total(const float *first, int threads, size_t words, size_t at) {
    float sum = 0;
    for (int i = 0; i < threads; i++) sum += first[i * words + at];
    return sum;
}

static void add_up(const Lora *l, const Packed *p, const Block *first, int threads, size_t words) {
#pragma omp for nowait
    for (int r = 0; r < l->rank; r++)
        for (int k = 0; k < l->in; k++)
            l->da[(size_t)r * l->in + k] = total(first->da, threads, words, (size_t)r * p->in + k);
#pragma omp for nowait
    for (int o = 0; o < l->out; o++)
        for (int r = 0; r < l->rank; r++)
            l->db[(size_t)o * l->rank + r] = l->scale * total(first->db, threads, words, (size_t)r * p->out + o);
}

void lora_backward(const Lora *all, int32_t number) {
    Packed p[number];
    size_t words = 0, places[number]; /* of a thread: a block's for each layer */
    for (int i = 0; i < number; i++) {
        p[i] = packed_for(&all[i], 1), places[i] = words;
        words += words_of_block(&p[i]);
    }
    int blocks = (all->rows + BLOCK - 1) / BLOCK, threads = most_threads() < blocks ? most_threads() : blocks;
    if (threads < 1) threads = 1; /* without rows the gradients are 0 */
    uint32_t *memory = words_of(threads * words);
#pragma omp parallel num_threads(threads)
    {
        uint32_t *mine = memory + this_thread() * words;
        for (int i = 0; i < number; i++) {
            const Lora *l = &all[i];
            memset(block_in(mine + places[i], &p[i]).da, 0, 4 * words_of_sums(&p[i]));
            pack_into(l->b, 1, l->rank, l->rank, p[i].rank, l->out, p[i].into);
            pack_from(l->a, l->in, 1, l->rank, p[i].rank, l->in, p[i].in, p[i].from);
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int block = 0; block < blocks; block++)
            for (int i = 0; i < number; i++) {
                Block b = block_in(mine + places[i], &p[i]);
                block_back(&all[i], &p[i], &b, (int64_t)block * BLOCK);
            }
        for (int i = 0; i < number; i++) {
            Block first = block_in(memory + places[i], &p[i]);
            add_up(&all[i], &p[i], &first, threads_here(), words); /* may be fewer than were asked for */
        }
    }
    free(memory);
    for (int i = 0; i < number; i++) free(p[i].into);
}

int32_t multiplies_pairs(void) { return 1; }
#else
void lora_forward(const Lora *all, int32_t number) { (void)all, (void)number; }
void lora_backward(const Lora *all, int32_t number) { (void)all, (void)number; }
int32_t multiplies_pairs(void) { return 0; }
#endif
