/* The norms of the merged weight's rows, in one pass over the weight.
 *
 * The adapter's factors are rounded to bfloat16 first: some processors multiply and add pairs of such
 * numbers at once. The others do the same in two steps, for the same result (but that subnormal numbers count).
 */

#include "shared.h"

/* WITHOUT_PAIRS is for assemblers that don't know the instruction. */
#if defined(__AVX512F__) && !defined(WITHOUT_PAIRS)
#include <cpuid.h>
#define MAY_HAVE_PAIRS 1
#else
#define MAY_HAVE_PAIRS 0
#endif

#define LANES 16         /* sums of a row that are kept apart, on every processor: so the order is the same */
#define GROUP 4          /* rows that share each vector of `right` that is loaded */
#define CACHED (1 << 16) /* numbers of `right` that stay in the second-level cache */
#define MULTIPLE 32      /* of columns: what any processor takes at once */

/* WIDTH numbers are a vector, and SPAN vectors share each number of `left`, while registers last. */
#if defined(__AVX512F__)
#define WIDTH 16
#define SPAN 2
#elif defined(__AVX2__)
#define WIDTH 8
#define SPAN 2
#else
#define WIDTH 4
#define SPAN 4
#endif
#define COLUMNS (SPAN * WIDTH)

#define UNROLLED _Pragma("GCC unroll 4") /* so that sums stay in registers */

typedef float Vector __attribute__((vector_size(WIDTH * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(WIDTH * sizeof(uint32_t))));

/* Some rows of W, of shape (rows, columns), and of a product left @ right of shapes (rows, rank) and
 * (rank, columns). */
typedef struct {
    const void *weight;
    const float *left;
    const float *right;
    float *out;
    int64_t rows;
    int64_t columns;
    int64_t rank;
    int32_t format;
} Product;

static inline Vector vector_at(const void *from) {
    Vector v;
    memcpy(&v, from, sizeof v);
    return v;
}

/* The first n of WIDTH numbers, followed by zeros. */
static inline Vector first_of(const float *from, int64_t n) {
    if (n >= WIDTH) return vector_at(from);
    Vector v = {0};
    if (n > 0) memcpy(&v, from, sizeof(float) * (size_t)n);
    return v;
}

static inline float sum_of(const Vector lanes[LANES / WIDTH]) {
    float x[LANES];
    memcpy(x, lanes, sizeof x);
    for (int half = LANES / 2; half; half /= 2)
        for (int k = 0; k < half; k++) x[k] += x[k + half];
    return x[0];
}

/* `value_of` of a vector. */
INLINE Vector values_at(int format, const void *from) {
    uint32_t unpacked[WIDTH];
    Words bits;
    for (int i = 0; i < WIDTH; i++) unpacked[i] = bits_at(format, from, i);
    memcpy(&bits, unpacked, sizeof bits);
    if (format == FLOAT32) return (Vector)bits;
    if (format == BFLOAT16) return (Vector)(bits << 16);
    Words rest = (bits & 0x7FFFu) << 13, special = (Words)(rest >= 0x0F800000u) & 0x7F800000u;
    return (Vector)((Words)((Vector)rest * 0x1p112f) | special | (bits & 0x8000u) << 16);
}

/* The nearest of bfloat16, ties to even, as bit patterns. */
static inline Words rounded(Vector x) {
    Words bits = (Words)x, is_number = (Words)(x == x);
    Words nearest = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    return (nearest & is_number) | (0x7FC0u & ~is_number);
}

/* ------------------------------------------------------------------------ pairs of ranks */

/* Words for the numbers of two neighbouring ranks: one with both of them, or one for each. */
static inline int words_of(int paired) { return paired ? 1 : 2; }

/* sum + right * left over two ranks, of which the odd one comes first. */
INLINE Vector add_pair(int paired, Vector sum, const uint32_t *right, const uint32_t *left) {
    if (!paired) {
        Vector even = vector_at(right) * as_float(left[0]), odd = vector_at(right + WIDTH) * as_float(left[1]);
        return sum + odd + even;
    }
#if MAY_HAVE_PAIRS
    /* Spelled out: a compiler that may use the instruction by itself could do so elsewhere, too. */
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(vector_at(right)), "v"((Words){0} + left[0]));
#endif
    return sum;
}

/* WIDTH columns of the ranks r and r + 1, of which n are there. */
INLINE void pack_pair(int paired, const Product *p, int64_t r, int64_t column, int64_t n, uint32_t *to) {
    const float *row = p->right + r * p->columns + column;
    Words even = rounded(first_of(row, n)) << 16;
    Words odd = rounded(first_of(row + p->columns, r + 1 < p->rank ? n : 0)) << 16;
    if (paired)
        even = even >> 16 | odd;
    else
        memcpy(to + WIDTH, &odd, sizeof odd);
    memcpy(to, &even, sizeof even);
}

/* Columns [first, first + n) of `right`, in the order of their use, followed by zeros. */
INLINE void pack_right(int paired, const Product *p, int64_t first, int64_t n, uint32_t *to) {
    for (int64_t j = 0; j < n; j += COLUMNS)
        for (int64_t r = 0; r < p->rank; r += 2)
            for (int64_t k = j; k < j + COLUMNS; k += WIDTH, to += words_of(paired) * WIDTH)
                pack_pair(paired, p, r, first + k, n - k, to);
}

/* Rows [first, first + GROUP) of `left`, whose last one stands for those that are not there. */
INLINE void pack_left(int paired, const Product *p, int64_t first, float *room, uint32_t *to) {
    int64_t pairs = (p->rank + 1) / 2;
    for (int i = 0; i < GROUP; i++) {
        float *row = room + i * 2 * pairs;
        row[2 * pairs - 1] = 0.0f;
        memcpy(row, p->left + least(first + i, p->rows - 1) * p->rank, sizeof(float) * (size_t)p->rank);
    }
    for (int64_t k = 0; k < GROUP * pairs; k++) {
        uint32_t even = rounded_sum(BFLOAT16, room[2 * k], 0.0f);
        uint32_t odd = rounded_sum(BFLOAT16, room[2 * k + 1], 0.0f) << 16;
        if (paired) {
            to[k] = even | odd;
        } else {
            to[2 * k] = even << 16;
            to[2 * k + 1] = odd;
        }
    }
}

/* ------------------------------------------------------------------------ norms */

/* total[i] += (W + D)[i]^2 with D = left @ right, for COLUMNS columns. */
INLINE void add_columns(int format, int paired, const char *const w[GROUP], const uint32_t *left, int64_t pairs,
                        const uint32_t *right, size_t next, Vector total[GROUP][LANES / WIDTH]) {
    int words = words_of(paired);
    Vector delta[GROUP][SPAN] = {{{0}}};
    for (int64_t pair = 0; pair < pairs; pair++, left += words)
        UNROLLED for (int k = 0; k < SPAN; k++, right += words * WIDTH)
            UNROLLED for (int i = 0; i < GROUP; i++)
                delta[i][k] = add_pair(paired, delta[i][k], right, left + i * pairs * words);
    UNROLLED for (int k = 0; k < SPAN; k++)
        UNROLLED for (int i = 0; i < GROUP; i++) {
            const char *at = w[i] + (size_t)k * WIDTH * width_of(format);
            __builtin_prefetch(at + next, 0, 2);
            Vector merged = values_at(format, at) + delta[i][k];
            total[i][k % (LANES / WIDTH)] += merged * merged;
        }
}

/* out[i] += sum_j (W + D)[i, j]^2 over n columns. */
INLINE void add_squares(int format, int paired, const char *w[GROUP], int64_t n, const uint32_t *left,
                        int64_t pairs, const uint32_t *right, size_t next, float *out, int rows) {
    Vector total[GROUP][LANES / WIDTH] = {{{0}}};
    char last[GROUP][COLUMNS * sizeof(float)];
    for (; n > 0; n -= COLUMNS, right += pairs * words_of(paired) * COLUMNS) {
        for (int i = 0; i < GROUP && n < COLUMNS; i++) {
            memset(last[i], 0, sizeof last[i]);
            w[i] = memcpy(last[i], w[i], (size_t)n * width_of(format));
        }
        add_columns(format, paired, w, left, pairs, right, next, total);
        for (int i = 0; i < GROUP; i++) w[i] += COLUMNS * width_of(format);
    }
    for (int i = 0; i < rows; i++) out[i] += sum_of(total[i]);
}

/* out[i] = |(W + D)[i, :]|^2 with D = left @ right. */
INLINE void squared_norms(int paired, const Product *p, uint32_t *room) {
    int64_t pairs = (p->rank + 1) / 2, words = pairs * words_of(paired);
    int64_t chunk = CACHED / (2 * pairs) / MULTIPLE * MULTIPLE;
    if (chunk < MULTIPLE) chunk = MULTIPLE;
    float *rows_of_left = (float *)room;
    uint32_t *left = room + GROUP * 2 * pairs, *right = left + GROUP * words;
    memset(p->out, 0, sizeof(float) * (size_t)p->rows);
    for (int64_t first = 0; first < p->columns; first += chunk) {
        int64_t n = least(chunk, p->columns - first);
        pack_right(paired, p, first, n, right);
        for (int64_t i = 0; i < p->rows; i += GROUP) {
            pack_left(paired, p, i, rows_of_left, left);
            const char *w[GROUP];
            for (int k = 0; k < GROUP; k++) {
                int64_t row = least(i + k, p->rows - 1);
                w[k] = (const char *)p->weight + (size_t)(row * p->columns + first) * width_of(p->format);
            }
            int rows = (int)least(GROUP, p->rows - i);
            size_t next = (size_t)p->columns * GROUP * width_of(p->format);
            FOR_FORMAT(p->format, add_squares, paired, w, n, left, pairs, right, next, p->out + i, rows);
        }
    }
}

/* Whether the processor multiplies pairs. */
static int has_pairs(void) {
#if MAY_HAVE_PAIRS
    unsigned a = 0, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1u);
#else
    return 0;
#endif
}

/* Bytes of a thread's room for products of this rank. */
int64_t flatlora_norm_room(int64_t rank) {
    int64_t numbers = (rank + 1) / 2 * 2, most = numbers * MULTIPLE;
    return (int64_t)sizeof(uint32_t) * (GROUP * 2 * numbers + (most > CACHED ? most : CACHED));
}

/* The items are Products, and the rooms are for the largest rank. */
void flatlora_squared_norms(Task *task) {
    Mode before = set_mode(STANDARD_MODE);
    int paired = has_pairs();
    uint32_t *room = room_of(task);
    int64_t left = task->most;
    for (const Product *product; (product = next_of(task, left)); left -= product->rows * product->columns)
        if (paired)
            squared_norms(1, product, room);
        else
            squared_norms(0, product, room);
    set_mode(before);
}
