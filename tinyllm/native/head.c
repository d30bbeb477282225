/* The loss under a frozen head in bfloat16, for processors that have pairs.h; others get nothing from this file.
 *
 *     S = h Wᵀ,   losses = log sum exp S - S[ids],   dh = softmax(S) W - W[ids]
 *
 * Logits are the largest numbers of a step.  Here they exist for WORDS words at a time, in the cache, with sums and
 * gradients for the largest logit so far, which are scaled where a larger one comes (Milakov and Gimelshein 2018,
 * arXiv:1805.02867, section 3; Dao et al. 2022, arXiv:2205.14135, section 3.1, for the product behind it).
 * Sums are float32; probabilities are rounded to bfloat16 for the second product, gradients where they are stored.
 * Compiled by code.py; the Python side is head.py.
 */
#include "pairs.h"
#include "threads.h"

typedef struct {
    const uint16_t *hidden, *weight; /* (rows, size) and (words, size); size is even */
    const int64_t *ids;              /* (rows) */
    float *losses;                   /* (rows) */
    uint16_t *gradient;              /* (rows, size), or none */
    int64_t rows, words;
    int32_t size;
} Head;

#ifdef MULTIPLIES_PAIRS
#define WORDS 128  /* at a time */
#define TOGETHER 3 /* vectors of rows that are multiplied together: a block */
#define BLOCKS 3   /* of a group, which reads the head once */
#define BLOCK (TOGETHER * LANES)
#define ROWS (BLOCKS * BLOCK)

/* What a thread has for a group of rows.  A block's numbers lie together, its rows along the lanes. */
typedef struct {
    uint32_t *states;     /* pairs of columns: (size / 2, rows) */
    float *scores;        /* (WORDS, rows of a block) */
    uint32_t *shares;     /* probabilities up to a factor, pairs of words: (WORDS / 2, rows of a block) */
    float *most, *totals; /* (rows) */
    float *sums;          /* (rows, wide), STRIP columns at a time in the order of unpacked pairs: see write_row */
    uint16_t *last;       /* the head's last words where they are fewer than WORDS */
    int wide;
} Group;

static size_t words_of_group(int size) {
    return ROWS * (size / 2 + 2 + rounded_up(size, STRIP)) + BLOCK * WORDS * 3 / 2 + WORDS * size / 2;
}

static Group group_for(const Head *h) {
    Group g = {.wide = rounded_up(h->size, STRIP)};
    g.states = words_of(words_of_group(h->size));
    g.sums = (float *)g.states + ROWS * h->size / 2, g.scores = g.sums + (size_t)ROWS * g.wide;
    g.shares = (uint32_t *)g.scores + BLOCK * WORDS, g.most = (float *)g.shares + BLOCK * WORDS / 2;
    g.totals = g.most + ROWS, g.last = (uint16_t *)(g.totals + ROWS);
    return g;
}

/* LANES rows as pairs of columns, beside each other; zeros where rows are missing. */
static void read_rows(const Head *h, int64_t row, uint32_t *to, int beside) {
    for (int i = 0; i < LANES; i++)
        for (int k = 0; k < h->size / 2; k++)
            to[(int64_t)k * beside + i] = row + i < h->rows ? pair_at(h->hidden + (row + i) * h->size, k) : 0;
}

/* scores (WORDS, beside) of a block: its rows by WORDS words. */
INLINE void score(const Head *h, const uint32_t *states, const uint16_t *weight, float *to, const int vectors) {
    for (int word = 0; word < WORDS; word += TALL) {
        floats sums[TALL][TOGETHER];
        UNROLL for (int i = 0; i < TALL; i++)
            UNROLL for (int n = 0; n < vectors; n++) sums[i][n] = _mm512_setzero_ps();
        for (int k = 0; k < h->size / 2; k++) {
            pairs right[TOGETHER];
            UNROLL for (int n = 0; n < vectors; n++)
                right[n] = (pairs)_mm512_loadu_si512(states + ((int64_t)k * vectors + n) * LANES);
            UNROLL for (int i = 0; i < TALL; i++) {
                uint32_t left = pair_at(weight + (int64_t)(word + i) * h->size, k);
                UNROLL for (int n = 0; n < vectors; n++) sums[i][n] = multiply_pairs(left, right[n], sums[i][n]);
            }
        }
        UNROLL for (int i = 0; i < TALL; i++)
            UNROLL for (int n = 0; n < vectors; n++)
                _mm512_storeu_ps(to + ((int64_t)(word + i) * vectors + n) * LANES, sums[i][n]);
    }
}

/* A larger logit came: what LANES rows have so far is scaled to it. */
static void scale_to(Group *g, int row, floats factors) {
    float each[LANES];
    _mm512_storeu_ps(each, factors);
    for (int i = 0; i < LANES; i++)
        for (int col = 0; each[i] != 1.0f && col < g->wide; col += LANES) {
            float *at = g->sums + (int64_t)(row + i) * g->wide + col;
            _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_set1_ps(each[i]), _mm512_loadu_ps(at)));
        }
}

/* 2^x to 3e-6, far below what is left of it as bfloat16: 2^(n + r), and of 2^r for |r| < 0.5 the polynomial of degree
 * 4 with the least relative error that is 1 at 0. */
INLINE floats power_of_two(floats x) {
    x = _mm512_max_ps(_mm512_set1_ps(-127.0f), x); /* what is no number is the second of two, which it then is */
    floats n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = x - n;
    const float rest[] = {0.0559064246f, 0.240240986f, 0.693124193f, 1.0f};
    floats series = _mm512_set1_ps(0.00958285307f);
    UNROLL for (int i = 0; i < 4; i++) series = _mm512_fmadd_ps(series, r, _mm512_set1_ps(rest[i]));
    return _mm512_scalef_ps(series, n);
}

/* Scores of LANES rows become shares; `beside` rows lie beside each other. */
INLINE void exponentiate(Group *g, int row, const float *scores, uint32_t *shares, int beside, int num, int with_sums) {
    floats before = _mm512_loadu_ps(g->most + row), most = before, total = _mm512_setzero_ps();
    for (int word = 0; word < num; word++) most = _mm512_max_ps(_mm512_loadu_ps(scores + word * beside), most);
    if (_mm512_cmp_ps_mask(before, most, _CMP_NEQ_UQ)) {
        floats factors = (floats)exponential((vec)before - (vec)most); /* rounded nowhere, so more exactly */
        if (with_sums) scale_to(g, row, factors);
        _mm512_storeu_ps(g->totals + row, factors * _mm512_loadu_ps(g->totals + row));
        _mm512_storeu_ps(g->most + row, most);
    }
    floats turns = _mm512_set1_ps(1.44269504f), least = most * turns;
    for (int word = 0; word < WORDS; word += 2) {
        floats one = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(scores + word * beside), turns, least));
        floats two = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(scores + (word + 1) * beside), turns, least));
        if (word >= num) one = _mm512_setzero_ps();
        if (word + 1 >= num) two = _mm512_setzero_ps();
        total += one + two;
        __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(one));
        __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(two));
        _mm512_storeu_si512(shares + word / 2 * beside, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    _mm512_storeu_ps(g->totals + row, total + _mm512_loadu_ps(g->totals + row));
}

/* Add to the sums of TALL rows what their shares of WORDS words give, in STRIP columns. */
INLINE void add_words(const Head *h, const uint32_t *shares, int beside, const uint16_t *weight, int col, float *to,
                      int wide) {
    __mmask32 mask = there(col, h->size);
    floats sums[TALL][2];
    UNROLL for (int i = 0; i < TALL; i++)
        for (int side = 0; side < 2; side++) sums[i][side] = _mm512_loadu_ps(to + i * wide + side * LANES);
    for (int pair = 0; pair < WORDS / 2; pair++) {
        __m512i one = _mm512_maskz_loadu_epi16(mask, weight + (int64_t)2 * pair * h->size + col);
        __m512i two = _mm512_maskz_loadu_epi16(mask, weight + (int64_t)(2 * pair + 1) * h->size + col);
        pairs low = (pairs)_mm512_unpacklo_epi16(one, two), high = (pairs)_mm512_unpackhi_epi16(one, two);
        UNROLL for (int i = 0; i < TALL; i++) {
            uint32_t share = shares[pair * beside + i];
            sums[i][0] = multiply_pairs(share, low, sums[i][0]);
            sums[i][1] = multiply_pairs(share, high, sums[i][1]);
        }
    }
    UNROLL for (int i = 0; i < TALL; i++)
        for (int side = 0; side < 2; side++) _mm512_storeu_ps(to + i * wide + side * LANES, sums[i][side]);
}

/* WORDS words, of which `num` are there, for a block that starts at `row` of its group. */
INLINE void read_words(const Head *h, Group *g, int row, const uint16_t *weight, int num, const int vectors) {
    int beside = vectors * LANES;
    score(h, g->states + (int64_t)row * h->size / 2, weight, g->scores, vectors);
    for (int n = 0; n < beside; n += LANES)
        exponentiate(g, row + n, g->scores + n, g->shares + n, beside, num, h->gradient != NULL);
    if (!h->gradient) return;
    for (int col = 0; col < h->size; col += STRIP)
        for (int i = 0; i < beside; i += TALL)
            add_words(h, g->shares + i, beside, weight, col, g->sums + (int64_t)(row + i) * g->wide + col, g->wide);
}

static void read_words_of(const Head *h, Group *g, int row, const uint16_t *weight, int num, int vectors) {
    if (vectors == 3) read_words(h, g, row, weight, num, 3);
    else if (vectors == 2) read_words(h, g, row, weight, num, 2);
    else read_words(h, g, row, weight, num, 1);
}

INLINE float dot(const Head *h, int64_t row) {
    const uint16_t *state = h->hidden + row * h->size, *word = h->weight + h->ids[row] * h->size;
    float found = 0;
    for (int k = 0; k < h->size; k++) found += widened(state[k]) * widened(word[k]);
    return found;
}

static void write_row(const Head *h, const Group *g, int64_t row, int in_group) {
    const float *sums = g->sums + (int64_t)in_group * g->wide, total = g->totals[in_group];
    h->losses[row] = g->most[in_group] + logf(total) - dot(h, row);
    if (!h->gradient) return;
    const __m512i half = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    for (int col = 0; col < h->size; col += LANES) { /* of each STRIP, one half has the low pairs, one the high */
        int strip = col / STRIP * STRIP, second = col % STRIP / 2;
        __mmask16 mask = there(col, h->size);
        floats low = _mm512_loadu_ps(sums + strip), high = _mm512_loadu_ps(sums + strip + LANES);
        floats mean = _mm512_permutex2var_ps(low, _mm512_add_epi32(half, _mm512_set1_epi32(second)), high);
        floats word = load_halves(h->weight + h->ids[row] * h->size + col, mask);
        store_halves(h->gradient + row * h->size + col, mean / _mm512_set1_ps(total) - word, mask);
    }
}

/* `vectors` times LANES rows from `row` on. */
static void do_group(const Head *h, Group *g, int64_t row, int vectors) {
    for (int n = 0; n < vectors; n++) {
        int first = n / TOGETHER * TOGETHER, in_block = vectors - first < TOGETHER ? vectors - first : TOGETHER;
        uint32_t *block = g->states + (int64_t)first * LANES * h->size / 2;
        read_rows(h, row + n * LANES, block + (n - first) * LANES, in_block * LANES);
    }
    memset(g->sums, 0, 4 * (size_t)vectors * LANES * g->wide), memset(g->totals, 0, 4 * (size_t)vectors * LANES);
    for (int i = 0; i < vectors * LANES; i++) g->most[i] = -INFINITY;
    for (int64_t word = 0; word < h->words; word += WORDS) {
        const uint16_t *weight = h->weight + word * h->size;
        int num = h->words - word < WORDS ? h->words - word : WORDS;
        if (num < WORDS) {
            memset(g->last, 0, 2 * (size_t)WORDS * h->size);
            weight = memcpy(g->last, weight, 2 * (size_t)num * h->size);
        }
        for (int n = 0; n < vectors; n += TOGETHER)
            read_words_of(h, g, n * LANES, weight, num, vectors - n < TOGETHER ? vectors - n : TOGETHER);
    }
    for (int i = 0; i < vectors * LANES && row + i < h->rows; i++) write_row(h, g, row + i, i);
}

void head_loss(const Head *h) {
    int64_t vectors = (h->rows + LANES - 1) / LANES, threads = most_threads();
    int64_t groups = rounded_up((vectors + BLOCKS * TOGETHER - 1) / (BLOCKS * TOGETHER), threads);
    if (groups > vectors) groups = vectors;
#pragma omp parallel
    {
        Group g = group_for(h);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < groups; i++) {
            int64_t first = i * vectors / groups;
            do_group(h, &g, first * LANES, (i + 1) * vectors / groups - first);
        }
        free(g.states);
    }
}

int64_t bytes_of_a_thread(int32_t size) { return 4 * (int64_t)words_of_group(size); }

int32_t multiplies_pairs(void) { return 1; }
#else
void head_loss(const Head *h) { (void)h; }
int32_t multiplies_pairs(void) { return 0; }
#endif
