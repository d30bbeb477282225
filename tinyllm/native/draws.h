/* Random decisions that are a function of a seed: see dropout.py. */
#pragma once
#include "numbers.h"

/* The i-th number of a stream: SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
 * number generators", figure 14), whose state after i steps is a product. */
#define GOLDEN 0x9e3779b97f4a7c15u
#define MIX(z) (z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u, z = (z ^ (z >> 27)) * 0x94d049bb133111ebu, z ^ (z >> 31))

INLINE uint64_t draw(uint64_t seed, uint64_t i) {
    uint64_t z = seed + (i + 1) * GOLDEN;
    return MIX(z);
}

#if defined(__AVX512BW__) && defined(__AVX512DQ__)
/* Which of the 32 numbers from i on, a multiple of 4, are kept, one bit each. */
INLINE uint32_t kept_of_32(uint64_t seed, int64_t i, uint32_t threshold) {
    typedef uint64_t eight __attribute__((vector_size(64)));
    const eight lanes = {0, 1, 2, 3, 4, 5, 6, 7};
    eight z = seed + (lanes + (uint64_t)i / 4 + 1) * GOLDEN;
    return _mm512_cmpge_epu16_mask((__m512i)MIX(z), _mm512_set1_epi16(threshold));
}
#endif
