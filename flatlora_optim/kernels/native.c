/* The noise of a block, made, added and journaled in one pass over the weight.
 *
 * Plain C whose loops the compiler vectorizes. It must be compiled without contraction
 * (-ffp-contract=off): then every operation is rounded by itself and the numbers are the same on
 * every processor, whatever its vectors look like.
 *
 * Gaussians come from Philox-4x32-10 (Salmon et al. 2011), keyed by the block's seed and counted
 * by the place in the block, through the Box-Muller transform.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define TILE 1024           /* numbers made at once: they stay in the first-level cache */
#define LANES (TILE / 4)    /* Philox calls in a tile, four words each */
#define SEGMENT (1 << 16)   /* elements for which a journal's position fits 16 bits */

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the journal is written for little-endian processors"
#endif

enum { FLOAT32, BFLOAT16, FLOAT16 };

static inline float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline uint32_t as_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

/* ------------------------------------------------------------------------ Gaussians */

static void philox(uint32_t seed, uint32_t first, uint32_t words[4][LANES]) {
    for (int i = 0; i < LANES; i++) {
        uint32_t c0 = first + (uint32_t)i, c1 = 0, c2 = 0, c3 = 0, k0 = seed, k1 = 0;
        for (int round = 0; round < 10; round++) {
            uint64_t p = (uint64_t)c0 * 0xD2511F53u, q = (uint64_t)c2 * 0xCD9E8D57u;
            c0 = (uint32_t)(q >> 32) ^ c1 ^ k0;
            c2 = (uint32_t)(p >> 32) ^ c3 ^ k1;
            c1 = (uint32_t)q;
            c3 = (uint32_t)p;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        words[0][i] = c0;
        words[1][i] = c1;
        words[2][i] = c2;
        words[3][i] = c3;
    }
}

/* -2 ln((i + 1/2) / 2^31) of the upper 31 bits i: at most 44.4, for a Gaussian of up to 6.66. */
static inline float minus_two_ln(uint32_t word) {
    float u = ((float)(int32_t)(word >> 1) + 0.5f) * 0x1p-31f;
    /* u = 2^e * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)) */
    uint32_t shifted = as_bits(u) - 0x3F3504F3u;
    int32_t e = (int32_t)shifted >> 23;
    float f = as_float((shifted & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
    float p = -0.07638592f;
    p = p * f + 0.1291417f;
    p = p * f - 0.13240843f;
    p = p * f + 0.14180079f;
    p = p * f - 0.16609126f;
    p = p * f + 0.20002072f;
    p = p * f - 0.25001585f;
    p = p * f + 0.33333325f;
    p = p * f - 0.49999988f;
    p = p * f + 1.0f;
    float minus_ln = -(p * f) - (float)e * 0.69314718f;
    return 2.0f * (minus_ln > 0.0f ? minus_ln : 0.0f);
}

static void box_muller(const uint32_t *radius, const uint32_t *angle, float *z0, float *z1) {
    for (int i = 0; i < LANES; i++) {
        float r = sqrtf(minus_two_ln(radius[i]));
        /* The angle is quadrant * pi/2 + x with x in [-pi/4, pi/4). */
        uint32_t quadrant = (angle[i] + 0x20000000u) >> 30;
        float x = (float)(int32_t)(angle[i] - (quadrant << 30)) * 1.46291808e-9f;
        float y = x * x;
        float s = -1.9503963e-4f;
        s = s * y + 8.3320364e-3f;
        s = s * y - 1.6666651e-1f;
        s = s * y + 1.0f;
        s = s * x * r;
        float c = 2.4379880e-5f;
        c = c * y - 1.3886619e-3f;
        c = c * y + 4.1666616e-2f;
        c = c * y - 0.5f;
        c = c * y + 1.0f;
        c = c * r;
        uint32_t odd = 0u - (quadrant & 1u);
        uint32_t sin_bits = (as_bits(s) & ~odd) | (as_bits(c) & odd);
        uint32_t cos_bits = (as_bits(c) & ~odd) | (as_bits(s) & odd);
        z0[i] = as_float(cos_bits ^ (((quadrant + 1u) & 2u) << 30));
        z1[i] = as_float(sin_bits ^ ((quadrant & 2u) << 30));
    }
}

static void gaussian_tile(uint32_t seed, int64_t tile, float *z) {
    uint32_t words[4][LANES];
    philox(seed, (uint32_t)(tile * LANES), words);
    box_muller(words[0], words[1], z, z + LANES);
    box_muller(words[2], words[3], z + 2 * LANES, z + 3 * LANES);
}

/* ------------------------------------------------------------------------ storage formats */

static void load_half(const uint16_t *from, float *w, int n) {
    for (int i = 0; i < n; i++) {
        uint32_t sign = (uint32_t)(from[i] & 0x8000u) << 16, rest = (uint32_t)(from[i] & 0x7FFFu) << 13;
        /* The exponent's bias is 15 there and 127 here: subnormals need no case of their own. */
        float x = as_float(rest) * 0x1p112f;
        uint32_t special = rest >= 0x0F800000u ? 0x7F800000u : 0u;
        w[i] = as_float(as_bits(x) | special | sign);
    }
}

static void store_half(const float *x, uint16_t *to, int n) {
    for (int i = 0; i < n; i++) {
        uint32_t bits = as_bits(x[i]), sign = bits & 0x80000000u, rest = bits ^ sign;
        /* Below 2^-14 all results are multiples of 2^-24: adding 1/2 rounds there. */
        uint32_t subnormal = as_bits(as_float(rest) + 0.5f) - 0x3F000000u;
        uint32_t normal = (rest - 0x38000000u + 0x0FFFu + ((rest >> 13) & 1u)) >> 13;
        uint32_t h = rest < 0x38800000u ? subnormal : normal;
        h = rest >= 0x477FF000u ? 0x7C00u : h;
        h = rest > 0x7F800000u ? 0x7E00u : h;
        to[i] = (uint16_t)(h | (sign >> 16));
    }
}

static void load(int format, const void *from, int64_t at, float *w, int n) {
    if (format == FLOAT32) {
        memcpy(w, (const float *)from + at, sizeof(float) * (size_t)n);
    } else if (format == BFLOAT16) {
        const uint16_t *bits = (const uint16_t *)from + at;
        for (int i = 0; i < n; i++) w[i] = as_float((uint32_t)bits[i] << 16);
    } else {
        load_half((const uint16_t *)from + at, w, n);
    }
}

/* x rounded to the format's precision, as its bit patterns. NaNs become one. */
static void round_to(int format, const float *x, const float *w, void *to, int64_t at, int n) {
    if (format == FLOAT32) {
        uint32_t *bits = (uint32_t *)to + at;
        for (int i = 0; i < n; i++) bits[i] = x[i] == x[i] ? as_bits(x[i]) : 0x7FC00000u;
    } else if (format == BFLOAT16) {
        uint16_t *bits = (uint16_t *)to + at;
        for (int i = 0; i < n; i++) {
            uint32_t b = as_bits(x[i]);
            uint32_t nearest = (b + 0x7FFFu + ((b >> 16) & 1u)) >> 16;
            bits[i] = (uint16_t)(x[i] == x[i] ? nearest : 0x7FC0u);
        }
    } else {
        /* Noise alone never makes a finite weight infinite. */
        float clamped[TILE];
        for (int i = 0; i < n; i++) {
            float finite = x[i] > 65504.0f ? 65504.0f : (x[i] < -65504.0f ? -65504.0f : x[i]);
            clamped[i] = fabsf(w[i]) <= 65504.0f ? finite : x[i];
        }
        store_half(clamped, (uint16_t *)to + at, n);
    }
}

/* ------------------------------------------------------------------------ noise of a weight */

typedef struct {
    const float *const *tables; /* standard-normal numbers of each block, or NULL to make them */
    const uint32_t *seeds;      /* one for each block */
    int64_t block_size;
    int64_t offset;             /* where the first element lies in the first block */
    const float *scales;
    int64_t row_size;
    int32_t transposed; /* whether the scales run along a row instead of over rows */
} Noise;

/* eps of the elements [at, at + n), all in one tile of one block. */
static void make_noise(const Noise *noise, int64_t at, int n, float *eps) {
    float made[TILE];
    int64_t block = (noise->offset + at) / noise->block_size, place = (noise->offset + at) % noise->block_size;
    const float *z = made + place % TILE;
    if (noise->tables)
        z = noise->tables[block] + place;
    else
        gaussian_tile(noise->seeds[block], place / TILE, made);
    int64_t row = at / noise->row_size, column = at % noise->row_size;
    for (int i = 0; i < n;) {
        int64_t rest = noise->row_size - column;
        int run = rest < n - i ? (int)rest : n - i;
        if (noise->transposed) {
            const float *scale = noise->scales + column;
            for (int j = 0; j < run; j++) eps[i + j] = z[i + j] * scale[j];
        } else {
            float scale = noise->scales[row];
            for (int j = 0; j < run; j++) eps[i + j] = z[i + j] * scale;
        }
        i += run;
        row++;
        column = 0;
    }
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* How many elements from `at` on lie in one tile of one block and in one segment of the journal. */
static int piece(const Noise *noise, int64_t at, int64_t numel) {
    int64_t place = (noise->offset + at) % noise->block_size;
    int64_t in_block = least(TILE - place % TILE, noise->block_size - place);
    return (int)least(least(in_block, SEGMENT - at % SEGMENT), numel - at);
}

void flatlora_fill(float *out, int64_t numel, uint32_t seed) {
    float made[TILE];
    for (int64_t at = 0; at < numel; at += TILE) {
        if (numel - at >= TILE) {
            gaussian_tile(seed, at / TILE, out + at);
        } else {
            gaussian_tile(seed, at / TILE, made);
            memcpy(out + at, made, sizeof(float) * (size_t)(numel - at));
        }
    }
}

/* W + sign * eps, rounded; the sign is 1 or -1. */
static void rounded_sum(int format, const float *w, const float *eps, float sign, void *to, int64_t at,
                        int n) {
    float total[TILE];
    for (int i = 0; i < n; i++) total[i] = w[i] + sign * eps[i];
    round_to(format, total, w, to, at, n);
}

/* What the subtraction misses: positions modulo SEGMENT, ascending, differences of the bit
 * patterns, and the number of entries before each segment (NULL if there is one segment only). */
typedef struct {
    uint16_t *low;
    void *corrections; /* int16_t or int32_t, as width says; int16_t is enough for 16-bit weights */
    int64_t *starts;
    int64_t entries;
    int32_t width;
} Journal;

static int64_t record(int format, const uint32_t *right, const uint32_t *back, int64_t at, int n,
                      int64_t entries, Journal *journal) {
    int32_t missed[TILE];
    uint8_t is_missed[TILE];
    if (format == FLOAT32) {
        for (int i = 0; i < n; i++) missed[i] = (int32_t)(right[i] - back[i]);
    } else {
        const uint16_t *right16 = (const uint16_t *)right, *back16 = (const uint16_t *)back;
        for (int i = 0; i < n; i++) missed[i] = (int16_t)(right16[i] - back16[i]);
    }
    for (int i = 0; i < n; i++) is_missed[i] = missed[i] != 0;
    for (int i = n; i % 64; i++) is_missed[i] = 0;
    for (int first = 0; first < n; first += 64) {
        /* One bit per element. The product puts the lowest bits of eight bytes side by side. */
        uint64_t mask = 0;
        for (int i = 0; i < 8; i++) {
            uint64_t bytes;
            memcpy(&bytes, is_missed + first + 8 * i, 8);
            mask |= (bytes * 0x0102040810204080u >> 56) << (8 * i);
        }
        for (; mask; mask &= mask - 1) {
            int i = first + __builtin_ctzll(mask);
            journal->low[entries] = (uint16_t)(at + i);
            if (journal->width == 2)
                ((int16_t *)journal->corrections)[entries++] = (int16_t)missed[i];
            else
                ((int32_t *)journal->corrections)[entries++] = missed[i];
        }
    }
    return entries;
}

static void correct(void *weight, int64_t numel, int format, const Journal *journal) {
    int64_t segments = (numel + SEGMENT - 1) / SEGMENT;
    for (int64_t segment = 0; segment < segments; segment++) {
        int64_t entry = journal->starts ? journal->starts[segment] : 0;
        int64_t end = journal->starts ? journal->starts[segment + 1] : journal->entries;
        for (; entry < end; entry++) {
            int64_t at = segment * SEGMENT + journal->low[entry];
            uint32_t missed = journal->width == 2 ? (uint32_t)((int16_t *)journal->corrections)[entry]
                                                  : (uint32_t)((int32_t *)journal->corrections)[entry];
            if (format == FLOAT32)
                ((uint32_t *)weight)[at] += missed;
            else
                ((uint16_t *)weight)[at] += (uint16_t)missed;
        }
    }
}

/* W += eps. Sets the journal, if there is one, and `done` when all of it is written. */
void flatlora_perturb(void *weight, int64_t numel, int32_t format, const Noise *noise, Journal *journal,
                      int32_t *done) {
    int64_t entries = 0;
    size_t width = format == FLOAT32 ? 4 : 2;
    for (int64_t at = 0; at < numel;) {
        float w[TILE], eps[TILE];
        uint32_t right[TILE], back[TILE];
        int n = piece(noise, at, numel);
        make_noise(noise, at, n, eps);
        load(format, weight, at, w, n);
        if (journal) memcpy(right, (char *)weight + (size_t)at * width, (size_t)n * width);
        rounded_sum(format, w, eps, 1.0f, weight, at, n);
        if (journal) {
            load(format, weight, at, w, n);
            rounded_sum(format, w, eps, -1.0f, back, 0, n);
            if (at % SEGMENT == 0) journal->starts[at / SEGMENT] = entries;
            entries = record(format, right, back, at, n, entries, journal);
        }
        at += n;
    }
    if (journal) {
        journal->starts[(numel + SEGMENT - 1) / SEGMENT] = entries;
        journal->entries = entries;
    }
    *done = 1;
}

/* W -= eps, corrected by the journal if there is one. */
void flatlora_restore(void *weight, int64_t numel, int32_t format, const Noise *noise,
                      const Journal *journal, int32_t *done) {
    for (int64_t at = 0; at < numel;) {
        float w[TILE], eps[TILE];
        int n = piece(noise, at, numel);
        make_noise(noise, at, n, eps);
        load(format, weight, at, w, n);
        rounded_sum(format, w, eps, -1.0f, weight, at, n);
        at += n;
    }
    if (journal) correct(weight, numel, format, journal);
    *done = 1;
}

/* ------------------------------------------------------------------------ row norms */

#if defined(__AVX512F__)
#define WIDTH 16 /* numbers in a vector */
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define GROUP 4    /* rows that share each vector of `right` that is loaded */
#define CHUNK 512  /* columns whose part of `right` stays in the first-level cache up to rank 16 */

typedef float Vector __attribute__((vector_size(WIDTH * sizeof(float))));

static inline Vector vector_at(const float *from) {
    Vector v;
    memcpy(&v, from, sizeof v);
    return v;
}

/* out[i] += sum_j (2 W + D)[i, j] * D[i, j] with D = left @ right, for `rows` rows and n columns, a
 * multiple of WIDTH after padding with zeros. */
static void norm_chunk(const float w[GROUP][CHUNK], int n, const float *left, int64_t rank,
                       const float *right, float *out, int rows) {
    Vector total[GROUP] = {{0}};
    for (int j = 0; j < n; j += WIDTH) {
        Vector delta[GROUP] = {{0}};
        for (int64_t r = 0; r < rank; r++) {
            Vector a = vector_at(right + r * CHUNK + j);
            for (int i = 0; i < GROUP; i++) delta[i] += a * left[i * rank + r];
        }
        for (int i = 0; i < GROUP; i++) total[i] += (2.0f * vector_at(w[i] + j) + delta[i]) * delta[i];
    }
    for (int i = 0; i < rows; i++)
        for (int k = 0; k < WIDTH; k++) out[i] += total[i][k];
}

/* out[i] = |(W + D)[i, :]|^2 - |W[i, :]|^2 with D = left @ right, for W of shape (rows, columns), left
 * (rows, rank) and right (rank, columns). `padded` has room for (rank + GROUP) * CHUNK + GROUP * rank numbers. */
void flatlora_norm_increase(const void *weight, int64_t rows, int64_t columns, int32_t format,
                            const float *left, const float *right, int64_t rank, float *padded, float *out) {
    float *last = padded + rank * CHUNK;
    float w[GROUP][CHUNK];
    memset(out, 0, sizeof(float) * (size_t)rows);
    for (int64_t first = 0; first < columns; first += CHUNK) {
        int n = columns - first < CHUNK ? (int)(columns - first) : CHUNK;
        int whole = (n + WIDTH - 1) / WIDTH * WIDTH;
        for (int64_t r = 0; r < rank; r++) {
            memcpy(padded + r * CHUNK, right + r * columns + first, sizeof(float) * (size_t)n);
            for (int j = n; j < whole; j++) padded[r * CHUNK + j] = 0.0f;
        }
        memset(w, 0, sizeof w);
        for (int64_t i = 0; i < rows; i += GROUP) {
            int some = rows - i < GROUP ? (int)(rows - i) : GROUP;
            for (int k = 0; k < some; k++) load(format, weight, (i + k) * columns + first, w[k], n);
            const float *factors = left + i * rank;
            if (some < GROUP) factors = memcpy(last, factors, sizeof(float) * (size_t)(some * rank));
            norm_chunk((const float(*)[CHUNK])w, whole, factors, rank, padded, out + i, some);
        }
    }
}
