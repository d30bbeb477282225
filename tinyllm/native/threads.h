/* How many threads there are; one where the compiler knows no OpenMP. */
#pragma once
#ifdef _OPENMP
#include <omp.h>
static inline int most_threads(void) { return omp_get_max_threads(); }
static inline int threads_here(void) { return omp_get_num_threads(); }
static inline int this_thread(void) { return omp_get_thread_num(); }
#else
static inline int most_threads(void) { return 1; }
static inline int threads_here(void) { return 1; }
static inline int this_thread(void) { return 0; }
#endif
