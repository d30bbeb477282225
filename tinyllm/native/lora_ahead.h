/* Forwards: y of some layers with one input, for lora.c. */
#pragma once
#include "lora_layer.h"

#ifdef MULTIPLIES_PAIRS
/* What a thread has forwards. */
typedef struct {
    uint16_t *kept, *low, *spare; /* (TALL, in filled up); (BLOCK, rank); (TALL, in) */
} Desk;

static size_t words_of_desk(const Packed *p) { return (size_t)TALL * p->in + (size_t)BLOCK * p->rank / 2; }

static Desk desk_in(uint32_t *memory, const Packed *p) {
    Desk d = {.kept = (uint16_t *)memory};
    d.spare = d.kept + (size_t)TALL * p->in, d.low = d.spare + (size_t)TALL * p->in;
    return d;
}

static void write_y(const Lora *l, int64_t row, int num, int col, floats sums[TALL][2]) {
    for (int i = 0; i < num; i++)
        for (int side = 0; side < 2; side++) {
            uint16_t *to = l->y + (row + i) * l->row_size + col + side * LANES;
            __mmask16 mask = there(col, l->out) >> side * LANES;
            floats y = sums[i][side];
            if (!l->ahead) y = _mm512_add_ps(y, load_halves(to, mask));
            if (l->bias) y = _mm512_add_ps(y, load_halves(l->bias + col + side * LANES, mask));
            /* as a layer and a sum behind it would: rounded in between */
            if (l->past) y = rounded_halves(y) + load_halves(l->past + (row + i) * l->out + col + side * LANES, mask);
            store_halves(to, y, mask);
        }
}

/* Of a block's rows. */
static void make_low(const Lora *l, const Packed *p, const Desk *d, int64_t row, int num) {
    floats sums[TALL];
    for (int first = 0; first < num; first += TALL) {
        copy_kept(l, p, row + first, num - first, d->kept);
        for (int col = 0; col < p->rank; col += LANES) {
            narrow_product(d->kept, p->in, l->in, p->into, p->rank, col, sums);
            for (int i = 0; i < TALL; i++)
                store_halves(d->low + (int64_t)(first + i) * p->rank + col, sums[i], 0xffff);
        }
    }
    memcpy(l->low + row * p->rank, d->low, 2 * (size_t)num * p->rank);
}

static void make_y(const Lora *l, const Packed *p, const Desk *d, int64_t row, int num, int col) {
    floats sums[TALL][2], scale = _mm512_set1_ps(l->scale);
    for (int first = 0; first < num; first += TALL) {
        int64_t stride = l->in;
        set_to_zero(sums);
        add_wide_product(d->low + (int64_t)first * p->rank, p->rank, p->rank, p->from + col, p->out, sums);
        UNROLL for (int i = 0; i < TALL; i++) sums[i][0] *= scale, sums[i][1] *= scale;
        if (l->ahead) {
            const uint16_t *x = whole_tile(l->x + (row + first) * l->in, &stride, num - first, l->in, d->spare);
            add_wide_product(x, stride, l->in, strip_at(l->ahead, col, l->in), STRIP, sums);
        }
        write_y(l, row + first, num - first < TALL ? num - first : TALL, col, sums);
    }
}

static void forward_block(const Lora *l, const Packed *p, const Desk *d, int64_t row, int num) {
    make_low(l, p, d, row, num);
    for (int col = 0; col < l->out; col += STRIP) make_y(l, p, d, row, num, col);
}

void lora_forward(const Lora *all, int32_t number) {
    Packed p[number];
    size_t most = 0;
    for (int i = 0; i < number; i++) {
        p[i] = packed_for(&all[i], 0);
        if (words_of_desk(&p[i]) > most) most = words_of_desk(&p[i]);
    }
#pragma omp parallel
    {
        uint32_t *memory = words_of(most);
        for (int i = 0; i < number; i++) {
            const Lora *l = &all[i];
            pack_into(l->a, l->in, 1, l->rank, p[i].rank, l->in, p[i].into);
            pack_from(l->b, 1, l->rank, l->rank, p[i].rank, l->out, p[i].out, p[i].from);
        }
#pragma omp barrier
        Range here = rows_here(all->rows);
        for (int64_t row = here.first; row < here.end; row += BLOCK)
            for (int i = 0; i < number; i++) {
                Desk d = desk_in(memory, &p[i]);
                forward_block(&all[i], &p[i], &d, row, here.end - row < BLOCK ? here.end - row : BLOCK);
            }
        free(memory);
    }
    for (int i = 0; i < number; i++) free(p[i].into);
}
#endif
