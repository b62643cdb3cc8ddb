/* The norms of the merged weight's rows, in one pass over the weight. */

#include "shared.h"

#define WIDTH 16          /* numbers in a vector, whatever the processor has: the order of sums is the same */
#define GROUP 4           /* rows that share each vector of `right` that is loaded */
#define CACHED (1 << 16)  /* numbers of `right` that stay in the second-level cache */

typedef float Vector __attribute__((vector_size(WIDTH * sizeof(float))));

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

static inline Vector vector_at(const float *from) {
    Vector v;
    memcpy(&v, from, sizeof v);
    return v;
}

static inline float sum_of(Vector v) {
    float x[WIDTH];
    memcpy(x, &v, sizeof x);
    for (int half = WIDTH / 2; half; half /= 2)
        for (int k = 0; k < half; k++) x[k] += x[k + half];
    return x[0];
}

/* n of WIDTH numbers, followed by zeros. */
INLINE Vector values_at(int format, const void *from, int64_t at, int n) {
    float values[WIDTH] = {0};
    for (int i = 0; i < n; i++) values[i] = value_of(format, bits_at(format, from, at + i));
    return vector_at(values);
}

/* total[i] += ((2 W + D) * D)[i] with D = left @ right, for n of WIDTH columns. `packed` has a vector of
 * `right` for each rank. */
INLINE void add_columns(int format, const char *const w[GROUP], int64_t at, int n, const float *left,
                        int64_t rank, const float *packed, size_t next, Vector total[GROUP]) {
    Vector delta[GROUP] = {{0}};
    for (int64_t r = 0; r < rank; r++) {
        Vector right = vector_at(packed + r * WIDTH);
        for (int i = 0; i < GROUP; i++) delta[i] += right * left[i * rank + r];
    }
    for (int i = 0; i < GROUP; i++) {
        __builtin_prefetch(w[i] + (size_t)at * width_of(format) + next, 0, 2);
        total[i] += (2.0f * values_at(format, w[i], at, n) + delta[i]) * delta[i];
    }
}

/* out[i] += sum_j ((2 W + D) * D)[i, j] over n columns. */
INLINE void add_increase(int format, const char *const w[GROUP], int64_t n, const float *left, int64_t rank,
                         const float *packed, size_t next, float *out, int rows) {
    Vector total[GROUP] = {{0}};
    int rest = (int)(n % WIDTH);
    for (int64_t at = 0; at < n - rest; at += WIDTH, packed += rank * WIDTH)
        add_columns(format, w, at, WIDTH, left, rank, packed, next, total);
    if (rest) add_columns(format, w, n - rest, rest, left, rank, packed, next, total);
    for (int i = 0; i < rows; i++) out[i] += sum_of(total[i]);
}

/* Columns [first, first + n) of `right`, padded with zeros. */
static void pack(const Product *p, int64_t first, int64_t n, float *packed) {
    for (int64_t j = 0; j < n; j += WIDTH)
        for (int64_t r = 0; r < p->rank; r++, packed += WIDTH) {
            const float *right = p->right + r * p->columns + first + j;
            Vector v = n - j < WIDTH ? values_at(FLOAT32, right, 0, (int)(n - j)) : vector_at(right);
            memcpy(packed, &v, sizeof v);
        }
}

/* out[i] = |(W + D)[i, :]|^2 - |W[i, :]|^2 with D = left @ right. */
static void norm_increase(const Product *p, float *room) {
    int64_t chunk = CACHED / p->rank / WIDTH * WIDTH;
    if (chunk < WIDTH) chunk = WIDTH;
    float *last = room + chunk * p->rank;
    memset(p->out, 0, sizeof(float) * (size_t)p->rows);
    for (int64_t first = 0; first < p->columns; first += chunk) {
        int64_t n = least(chunk, p->columns - first);
        pack(p, first, n, room);
        for (int64_t i = 0; i < p->rows; i += GROUP) {
            int rows = (int)least(GROUP, p->rows - i);
            const float *left = p->left + i * p->rank;
            if (rows < GROUP) left = memcpy(last, left, sizeof(float) * (size_t)(rows * p->rank));
            const char *w[GROUP];
            for (int k = 0; k < GROUP; k++) {
                int64_t row = i + (k < rows ? k : 0);
                w[k] = (const char *)p->weight + (size_t)(row * p->columns + first) * width_of(p->format);
            }
            size_t next = (size_t)p->columns * GROUP * width_of(p->format);
            FOR_FORMAT(p->format, add_increase, w, n, left, p->rank, room, next, p->out + i, rows);
        }
    }
}

/* Rooms are for max(CACHED, 16 * rank) + GROUP * rank numbers of the largest rank. */
void flatlora_norm_increases(Task *task) {
    Mode before = set_mode(STANDARD_MODE);
    float *room = room_of(task);
    int64_t left = task->most;
    for (const Product *product; (product = next_of(task, left)); left -= product->rows * product->columns)
        norm_increase(product, room);
    set_mode(before);
}
