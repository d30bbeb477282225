/* Backwards: gradients of some layers with one input, for lora.c. */
#pragma once
#include "lora_layer.h"

#ifdef MULTIPLIES_PAIRS
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

/* dlow of TALL rows, of which `num` are there; the first is row `row` of all and `in_block` of its block. */
static void narrow_rows(const Lora *l, const Packed *p, Block *b, int64_t row, int num, int in_block) {
    floats sums[TALL], scale = _mm512_set1_ps(l->scale);
    int64_t stride = l->row_size;
    const uint16_t *grad = whole_tile(l->grad + row * stride, &stride, num, l->out, b->grad);
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

/* The low-rank part of dx (TALL, STRIP), where it is not dropped. */
static void add_low(const Packed *p, const Block *b, int first, int col, floats sums[TALL][2]) {
    floats wide[TALL][2];
    set_to_zero(wide);
    add_wide_product(b->dlow + first * p->rank, p->rank, p->rank, p->from + col, p->in, wide);
    for (int i = 0; i < TALL; i++)
        for (int side = 0; side < 2; side++) {
            __mmask16 kept = b->masks[first + i] >> side * LANES;
            sums[i][side] = _mm512_mask_add_ps(sums[i][side], kept, sums[i][side], wide[i][side]);
        }
}

/* Of all layers, in STRIP columns of a block's rows; `joint` numbers is a row of their gradients. */
static void make_dx(const Lora *all, const Packed *p, const Block *b, int number, int joint, int64_t row, int num,
                    int col, uint16_t *spare) {
    floats sums[TALL][2];
    for (int first = 0; first < num; first += TALL) {
        int64_t stride = all->row_size;
        set_to_zero(sums);
        if (all->back) {
            const uint16_t *grad = whole_tile(all->grad + (row + first) * stride, &stride, num - first, joint, spare);
            add_wide_product(grad, stride, joint, strip_at(all->back, col, joint), STRIP, sums);
        }
        for (int i = 0; i < number; i++) add_low(&p[i], &b[i], first, col, sums);
        for (int i = 0; i < TALL && first + i < num; i++)
            for (int side = 0; side < 2; side++) {
                uint16_t *to = all->dx + (row + first + i) * all->in + col + side * LANES;
                __mmask16 mask = there(col, all->in) >> side * LANES;
                if (!all->back) sums[i][side] = _mm512_add_ps(load_halves(to, mask), sums[i][side]);
                store_halves(to, sums[i][side], mask);
            }
    }
}

/* What a layer's block needs of its gradient. */
static void begin_back(const Lora *l, const Packed *p, Block *b, int64_t row, int num) {
    for (int i = 0; i < num; i += TALL) narrow_rows(l, p, b, row + i, num - i, i);
    pair_rows(b->dlow, num, BLOCK, p->rank, b->dlow_pairs);
    pair_rows(l->low + row * p->rank, num, BLOCK, p->rank, b->low_pairs);
    for (int col = 0; col < l->out; col += STRIP) {
        for (int i = 0; i < num; i++) b->masks[i] = there(col, l->out);
        add_product(l->grad + row * l->row_size, l->row_size, num, col, b, b->low_pairs, p->rank, b->db, p->out);
    }
}

static void block_back(const Lora *all, const Packed *p, Block *b, int number, int joint, int64_t row, int num,
                       uint16_t *spare) {
    for (int i = 0; i < number; i++) begin_back(&all[i], &p[i], &b[i], row, num);
    for (int col = 0; col < all->in; col += STRIP) {
        for (int i = 0; i < number; i++) {
            const Lora *l = &all[i];
            for (int k = 0; k < BLOCK; k++) b[i].masks[k] = k < num ? kept(l, row + k, col) : 0;
            add_product(l->x + row * l->in, l->in, num, col, &b[i], b[i].dlow_pairs, p[i].rank, b[i].da, p[i].in);
        }
        if (all->dx) make_dx(all, p, b, number, joint, row, num, col, spare);
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
    size_t words = 0, places[number]; /* of a thread: a block's for each layer, and a tile of their gradients */
    int joint = 0;
    for (int i = 0; i < number; i++) {
        p[i] = packed_for(&all[i], 1), places[i] = words, joint += all[i].out;
        words += words_of_block(&p[i]);
    }
    size_t spare = words;
    words += rounded_up((size_t)TALL * joint / 2, 16);
    int64_t tiles = (all->rows + TALL - 1) / TALL, threads = most_threads() < tiles ? most_threads() : tiles;
    if (threads < 1) threads = 1; /* without rows the gradients are 0 */
    uint32_t *memory = words_of(threads * words);
#pragma omp parallel num_threads(threads)
    {
        uint32_t *mine = memory + this_thread() * words;
        Block b[number];
        for (int i = 0; i < number; i++) {
            const Lora *l = &all[i];
            b[i] = block_in(mine + places[i], &p[i]);
            memset(b[i].da, 0, 4 * words_of_sums(&p[i]));
            pack_into(l->b, 1, l->rank, l->rank, p[i].rank, l->out, p[i].into);
            pack_from(l->a, l->in, 1, l->rank, p[i].rank, l->in, p[i].in, p[i].from);
        }
#pragma omp barrier
        Range here = rows_here(all->rows);
        for (int64_t row = here.first; row < here.end; row += BLOCK) {
            int num = here.end - row < BLOCK ? here.end - row : BLOCK;
            block_back(all, p, b, number, joint, row, num, (uint16_t *)(mine + spare));
        }
#pragma omp barrier
        for (int i = 0; i < number; i++) {
            Block first = block_in(memory + places[i], &p[i]);
            add_up(&all[i], &p[i], &first, threads_here(), words); /* may be fewer than were asked for */
        }
    }
    free(memory);
    for (int i = 0; i < number; i++) free(p[i].into);
}
#endif
