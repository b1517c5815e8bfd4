/* Linear combinations over flat arrays, several in a row, block by block: what they share is read from memory once.

   combine_T(combinations, terms, arrays, coefficients, n): the j-th combination has terms[j] terms; of `arrays` it takes its
   output and then its operands, of `coefficients` one for each operand. An output may be the first of its own operands.
   Each element is ((c0 x0 + c1 x1) + c2 x2) + ..., rounded after every operation (compile with -ffp-contract=off), so that
   its bits depend neither on its place, nor on the number of threads, nor on the width of the machine's vectors. */

#define BLOCK 4096 /* elements: those of all operands fit in the nearest caches of a core */
#define WIDEST 8   /* terms in one loop; more take another */

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define FOR_EVERY_MACHINE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_MACHINE
#endif

#define S1 c0 * x0[i]
#define S2 S1 + c1 * x1[i]
#define S3 S2 + c2 * x2[i]
#define S4 S3 + c3 * x3[i]
#define S5 S4 + c4 * x4[i]
#define S6 S5 + c5 * x5[i]
#define S7 S6 + c6 * x6[i]
#define S8 S7 + c7 * x7[i]

#define OPERAND(T, k)                        \
    const T *x##k = x[k < terms ? k : 0];    \
    const T c##k = (T)c[k < terms ? k : 0];
#define CASE(k, sum)                                                      \
    case k:                                                               \
        _Pragma("omp simd") for (long i = at; i < end; i++) out[i] = sum; \
        break;

#define DEFINE(NAME, T)                                                                                                   \
    FOR_EVERY_MACHINE static void NAME##_block(                                                                           \
        long terms, T *out, const T *const *x, const double *c, long at, long end) {                                      \
        OPERAND(T, 0) OPERAND(T, 1) OPERAND(T, 2) OPERAND(T, 3) OPERAND(T, 4) OPERAND(T, 5) OPERAND(T, 6) OPERAND(T, 7)   \
        switch (terms) { CASE(1, S1) CASE(2, S2) CASE(3, S3) CASE(4, S4) CASE(5, S5) CASE(6, S6) CASE(7, S7) CASE(8, S8) } \
    }                                                                                                                     \
    void NAME(long combinations, const long *terms, T *const *arrays, const double *coefficients, long n) {               \
        _Pragma("omp parallel for schedule(static) if (n > 32768)") for (long at = 0; at < n; at += BLOCK) {              \
            const long end = n - at < BLOCK ? n : at + BLOCK;                                                             \
            T *const *array = arrays;                                                                                     \
            const double *c = coefficients;                                                                               \
            for (long j = 0; j < combinations; j++) {                                                                     \
                T *out = *array++;                                                                                        \
                const T *x[WIDEST];                                                                                       \
                double factor[WIDEST];                                                                                    \
                for (long left = terms[j], width = 0; left; width = 1) {                                                  \
                    if (width) x[0] = out, factor[0] = 1.0;                                                               \
                    for (; left && width < WIDEST; left--) x[width] = *array++, factor[width++] = *c++;                   \
                    NAME##_block(width, out, x, factor, at, end);                                                         \
                }                                                                                                         \
            }                                                                                                             \
        }                                                                                                                 \
    }

DEFINE(combine_float, float)
DEFINE(combine_double, double)
