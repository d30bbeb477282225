/* The low-rank path of a linear layer in bfloat16, for processors that multiply pairs of bfloat16 and
 * add the products up in float32 (AVX-512 BF16); others get nothing from this file.
 *
 *     low = (x ∘ m) Aᵀ,   y += s low Bᵀ                                                      forwards
 *     dlow = s dy B,   dB = s dyᵀ low,   dA = dlowᵀ (x ∘ m),   dx += (dlow A) ∘ m            backwards
 *
 * Each product is narrow (the rank), so that a library spends its time on calls and passes over memory.  Here x,
 * dy, y and dx are read once or twice, and the mask m is drawn from its seed on the way (see dropout.py).
 * Sums are float32, rounded where they are stored; s includes the 1 / (1 - p) of dropout.
 * Compiled by code.py; the Python side is lora.py.
 */
#include "draws.h"
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

typedef struct {
    const uint16_t *x, *grad; /* (rows, in) and, backwards, (rows, out) */
    const float *a, *b;       /* (rank, in) and (out, rank) */
    uint16_t *low;            /* (rows, rank rounded up to LANES) */
    uint16_t *y, *dx;         /* (rows, out) and (rows, in), or no dx; both are added to */
    float *da, *db;           /* as a and b */
    int64_t rows;
    int32_t in, out, rank;
    float scale;
    uint64_t seed;
    uint32_t threshold; /* of 65536 numbers of x are dropped */
} Lora;

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define TALL 8   /* rows at a time */
#define STRIP 32 /* columns at a time: a line of the cache */
#define BLOCK 64 /* rows that are read once and then lie near */
#define EACH_LANE _Pragma("GCC unroll 16") for (int r = 0; r < LANES; r++)

typedef __m512 floats;
typedef __m512bh pairs;

/* Pairs along one dimension lie in one 32-bit word, as the processor takes them. */
typedef struct {
    int rank;            /* rounded up */
    uint32_t *into;      /* of the matrix that makes rows narrow: (its columns / 2, rank) */
    uint32_t *from;      /* of the matrix that makes them wide again: (rank / 2, its columns) */
} Packed;

static int64_t rounded_up(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }

static uint32_t *words_of(size_t number) {
    uint32_t *found = aligned_alloc(64, rounded_up(4 * (number + 16), 64));
    if (!found) abort();
    return found;
}

static int most_threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

static int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

INLINE floats multiply_pairs(uint32_t left, pairs right, floats sum) {
    return _mm512_dpbf16_ps(sum, (pairs)_mm512_set1_epi32(left), right);
}

INLINE uint32_t pair_of(float first, float second) { return narrowed(first) | (uint32_t)narrowed(second) << 16; }

/* x[r][col], which lies at r * down + col * along, as pairs of columns. */
static void pack_into(const float *x, int down, int along, int rank, int height, int cols, uint32_t *to) {
#pragma omp for nowait
    for (int col = 0; col < cols; col += 2)
        for (int r = 0; r < height; r++) {
            const float *at = x + (int64_t)r * down + (int64_t)col * along;
            to[(int64_t)col / 2 * height + r] = r < rank ? pair_of(at[0], at[along]) : 0;
        }
}

/* The same as pairs of r. */
static void pack_from(const float *x, int down, int along, int rank, int height, int cols, uint32_t *to) {
#pragma omp for
    for (int r = 0; r < height; r += 2)
        for (int col = 0; col < cols; col++) {
            const float *at = x + (int64_t)r * down + (int64_t)col * along;
            to[(int64_t)r / 2 * cols + col] = r < rank ? pair_of(at[0], r + 1 < rank ? at[down] : 0.0f) : 0;
        }
}

/* Which of the STRIP numbers from i on are kept; i is a multiple of STRIP. */
INLINE uint32_t kept(const Lora *l, int64_t i) {
    if (!l->threshold) return ~0u;
    return kept_of_32(l->seed, i, l->threshold);
}

/* `num` rows with zeros where they are dropped, and rows of zeros after them, for TALL rows. */
INLINE void copy_kept(const Lora *l, int64_t row, int num, uint16_t *to) {
    for (int i = 0; i < TALL; i++)
        for (int k = 0; k < l->in; k += STRIP) {
            int64_t at = (row + i) * l->in + k;
            __m512i part = _mm512_setzero_si512();
            if (i < num) part = _mm512_maskz_loadu_epi16(kept(l, at), l->x + at);
            _mm512_storeu_si512(to + (int64_t)i * l->in + k, part);
        }
}

INLINE uint32_t pair_at(const uint16_t *x, int64_t pair) {
    uint32_t word;
    memcpy(&word, x + 2 * pair, 4);
    return word;
}

/* TALL rows by a matrix of pairs: (TALL, LANES) sums of columns col to col + LANES. */
INLINE void narrow_product(const uint16_t *rows, int64_t width, const uint32_t *matrix, int height, int col,
                           floats sums[TALL]) {
    UNROLL for (int i = 0; i < TALL; i++) sums[i] = _mm512_setzero_ps();
    for (int k = 0; k < width / 2; k++) {
        pairs right = (pairs)_mm512_loadu_si512(matrix + (int64_t)k * height + col);
        UNROLL for (int i = 0; i < TALL; i++)
            sums[i] = multiply_pairs(pair_at(rows + i * width, k), right, sums[i]);
    }
}

INLINE void store_halves(uint16_t *to, floats v) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(v)); }

INLINE floats load_halves(const uint16_t *from) {
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
}

/* to (+)= the product of TALL narrow rows and a matrix (rank / 2, cols) of pairs, in columns col to col + STRIP. */
INLINE void wide_product(const uint16_t *narrow, int rank, const uint32_t *matrix, int cols, int col,
                         floats sums[TALL][2]) {
    UNROLL for (int i = 0; i < TALL; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (int r = 0; r < rank / 2; r++) {
        pairs first = (pairs)_mm512_loadu_si512(matrix + (int64_t)r * cols + col);
        pairs second = (pairs)_mm512_loadu_si512(matrix + (int64_t)r * cols + col + LANES);
        UNROLL for (int i = 0; i < TALL; i++) {
            uint32_t left = pair_at(narrow + i * rank, r);
            sums[i][0] = multiply_pairs(left, first, sums[i][0]);
            sums[i][1] = multiply_pairs(left, second, sums[i][1]);
        }
    }
}

static void forward_rows(const Lora *l, const Packed *p, int64_t row, uint16_t *scratch) {
    int num = l->rows - row < TALL ? l->rows - row : TALL;
    uint16_t *low = scratch + (int64_t)TALL * l->in;
    floats sums[TALL], wide[TALL][2], scale = _mm512_set1_ps(l->scale);
    copy_kept(l, row, num, scratch);
    for (int col = 0; col < p->rank; col += LANES) {
        narrow_product(scratch, l->in, p->into, p->rank, col, sums);
        for (int i = 0; i < TALL; i++) store_halves(low + (int64_t)i * p->rank + col, sums[i]);
    }
    memcpy(l->low + row * p->rank, low, 2 * (size_t)num * p->rank);
    for (int col = 0; col < l->out; col += STRIP) {
        wide_product(low, p->rank, p->from, l->out, col, wide);
        for (int i = 0; i < num; i++)
            for (int side = 0; side < 2; side++) {
                uint16_t *to = l->y + (row + i) * l->out + col + side * LANES;
                store_halves(to, _mm512_fmadd_ps(scale, wide[i][side], load_halves(to)));
            }
    }
}

void lora_forward(const Lora *l) {
    Packed p = {.rank = rounded_up(l->rank, LANES)};
    uint32_t *memory = p.into = words_of((size_t)(l->in + l->out) * p.rank / 2);
    p.from = p.into + (size_t)l->in * p.rank / 2;
#pragma omp parallel
    {
        uint16_t *scratch = (uint16_t *)words_of((size_t)TALL * (l->in + p.rank) / 2);
        pack_into(l->a, l->in, 1, l->rank, p.rank, l->in, p.into);
        pack_from(l->b, 1, l->rank, l->rank, p.rank, l->out, p.from);
#pragma omp for
        for (int64_t row = 0; row < l->rows; row += TALL) forward_rows(l, &p, row, scratch);
        free(scratch);
    }
    free(memory);
}

/* What a thread has for BLOCK rows, and its sums over all of its blocks. */
typedef struct {
    uint16_t *grad, *dlow;          /* (TALL, out), only where rows are missing; (BLOCK, rank) */
    uint32_t *low_pairs, *dlow_pairs; /* pairs of rows: (BLOCK / 2, rank) */
    uint32_t masks[BLOCK];
    float *da, *db; /* (rank, in) and (rank, out) */
} Block;

static size_t words_of_sums(const Lora *l, int rank) { return (size_t)rank * (l->in + l->out); }

static Block block_in(uint32_t *memory, const Lora *l, int rank) {
    Block b = {.low_pairs = memory};
    b.dlow_pairs = b.low_pairs + BLOCK / 2 * rank;
    b.dlow = (uint16_t *)(b.dlow_pairs + BLOCK / 2 * rank);
    b.grad = b.dlow + BLOCK * rank;
    b.da = (float *)(b.grad + TALL * l->out);
    b.db = b.da + (size_t)rank * l->in;
    return b;
}

static size_t words_of_block(const Lora *l, int rank) {
    return (size_t)3 * BLOCK / 2 * rank + TALL * l->out / 2 + words_of_sums(l, rank);
}

/* dlow of TALL rows of a block, the first of which is row `row` of all. */
static void narrow_rows(const Lora *l, const Packed *p, Block *b, int64_t row, int in_block) {
    int64_t left = l->rows - row, num = left < TALL ? left < 0 ? 0 : left : TALL;
    floats sums[TALL], scale = _mm512_set1_ps(l->scale);
    const uint16_t *grad = l->grad + row * l->out;
    if (num < TALL) {
        memset(b->grad, 0, 2 * (size_t)TALL * l->out);
        if (num) memcpy(b->grad, grad, 2 * (size_t)num * l->out);
        grad = b->grad;
    }
    for (int col = 0; col < p->rank; col += LANES) {
        narrow_product(grad, l->out, p->into, p->rank, col, sums);
        for (int i = 0; i < TALL; i++)
            store_halves(b->dlow + (int64_t)(in_block + i) * p->rank + col, _mm512_mul_ps(scale, sums[i]));
    }
}

/* Rows of `rank` numbers as pairs of rows, zeros from `num` on. */
static void pair_rows(const uint16_t *x, int num, int rank, uint32_t *to) {
    for (int i = 0; i < BLOCK; i += 2)
        for (int r = 0; r < rank; r++)
            to[i / 2 * rank + r] = (i < num ? x[i * rank + r] : 0) |
                                   (uint32_t)(i + 1 < num ? x[(i + 1) * rank + r] : 0) << 16;
}

/* LANES numbers of a row and of the next one as pairs; the masks say which of them count. */
INLINE pairs pairs_of_rows(const uint16_t *x, int64_t width, __mmask16 first, __mmask16 second) {
    __m512i one = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, x));
    __m512i two = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, x + width));
    return (pairs)_mm512_or_si512(one, _mm512_slli_epi32(two, 16));
}

/* Add to sums (LANES, width) those over `num` rows of LANES columns of x by LANES columns of pairs of rows. */
INLINE void tall_product(const uint16_t *x, int64_t width, int num, const uint32_t *masks, int shift,
                         const uint32_t *narrow, int rank, float *to) {
    floats sums[LANES];
    EACH_LANE sums[r] = _mm512_loadu_ps(to + r * width);
    for (int row = 0; row < num; row += 2) {
        __mmask16 first = masks ? masks[row] >> shift : 0xffff;
        __mmask16 second = row + 1 == num ? 0 : masks ? masks[row + 1] >> shift : 0xffff;
        pairs right = pairs_of_rows(x + row * width, width, first, second);
        const uint32_t *left = narrow + row / 2 * rank;
        EACH_LANE sums[r] = multiply_pairs(left[r], right, sums[r]);
    }
    EACH_LANE _mm512_storeu_ps(to + r * width, sums[r]);
}

static void add_to_dx(const Lora *l, const Packed *p, const Block *b, int64_t row, int num, int col) {
    floats wide[TALL][2];
    for (int first = 0; first < num; first += TALL) {
        wide_product(b->dlow + first * p->rank, p->rank, p->from, l->in, col, wide);
        for (int i = first; i < first + TALL && i < num; i++)
            for (int side = 0; side < 2; side++) {
                uint16_t *to = l->dx + (row + i) * l->in + col + side * LANES;
                __mmask16 mask = b->masks[i] >> side * LANES;
                floats before = load_halves(to);
                store_halves(to, _mm512_mask_add_ps(before, mask, before, wide[i - first][side]));
            }
    }
}

static void strip_of_x(const Lora *l, const Packed *p, Block *b, int64_t row, int num, int col) {
    for (int i = 0; i < num; i++) b->masks[i] = kept(l, (row + i) * l->in + col);
    for (int first = 0; first < p->rank; first += LANES)
        for (int side = 0; side < STRIP; side += LANES)
            tall_product(l->x + row * l->in + col + side, l->in, num, b->masks, side, b->dlow_pairs + first, p->rank,
                         b->da + (int64_t)first * l->in + col + side);
    if (l->dx) add_to_dx(l, p, b, row, num, col);
}

static void block_back(const Lora *l, const Packed *p, Block *b, int64_t row) {
    int num = l->rows - row < BLOCK ? l->rows - row : BLOCK;
    for (int i = 0; i < num; i += TALL) narrow_rows(l, p, b, row + i, i);
    pair_rows(b->dlow, num, p->rank, b->dlow_pairs);
    pair_rows(l->low + row * p->rank, num, p->rank, b->low_pairs);
    for (int first = 0; first < p->rank; first += LANES)
        for (int col = 0; col < l->out; col += LANES)
            tall_product(l->grad + row * l->out + col, l->out, num, NULL, 0, b->low_pairs + first, p->rank,
                         b->db + (int64_t)first * l->out + col);
    for (int col = 0; col < l->in; col += STRIP) strip_of_x(l, p, b, row, num, col);
}

/* Sums over all threads, of which each has `words` of memory. */
INLINE float total(const float *first, int threads, size_t words, size_t at) {
    float sum = 0;
    for (int i = 0; i < threads; i++) sum += first[i * words + at];
    return sum;
}

static void add_up(const Lora *l, const Block *first, int threads, size_t words) {
#pragma omp for nowait
    for (int k = 0; k < l->in; k++)
        for (int r = 0; r < l->rank; r++) {
            size_t at = (size_t)r * l->in + k;
            l->da[at] = total(first->da, threads, words, at);
        }
#pragma omp for
    for (int o = 0; o < l->out; o++)
        for (int r = 0; r < l->rank; r++)
            l->db[(size_t)o * l->rank + r] =
                l->scale * total(first->db, threads, words, (size_t)r * l->out + o);
}

void lora_backward(const Lora *l) {
    Packed p = {.rank = rounded_up(l->rank, LANES)};
    int blocks = (l->rows + BLOCK - 1) / BLOCK, threads = most_threads() < blocks ? most_threads() : blocks;
    size_t shared = (size_t)(l->in + l->out) * p.rank / 2, words = rounded_up(words_of_block(l, p.rank), 16);
    p.into = words_of(shared + threads * words), p.from = p.into + (size_t)l->out * p.rank / 2;
    uint32_t *memory = p.into + shared;
#pragma omp parallel num_threads(threads)
    {
        Block b = block_in(memory + thread_number() * words, l, p.rank), first = block_in(memory, l, p.rank);
        memset(b.da, 0, 4 * words_of_sums(l, p.rank));
        pack_into(l->b, 1, l->rank, l->rank, p.rank, l->out, p.into);
        pack_from(l->a, l->in, 1, l->rank, p.rank, l->in, p.from);
#pragma omp for schedule(static)
        for (int i = 0; i < blocks; i++) block_back(l, &p, &b, (int64_t)i * BLOCK);
        add_up(l, &first, threads, words);
    }
    free(p.into);
}

int32_t multiplies_pairs(void) { return 1; }
#else
void lora_forward(const Lora *l) { (void)l; }
void lora_backward(const Lora *l) { (void)l; }
int32_t multiplies_pairs(void) { return 0; }
#endif
