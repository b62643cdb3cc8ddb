/* Noise, made, added and journaled in one pass over the weight.
 *
 * Plain C, whose loops the compiler vectorizes. It must be compiled without contraction
 * (-ffp-contract=off): then each operation is rounded by itself and the numbers are the same on
 * every processor.
 *
 * Gaussians come from Philox-4x32-10 (Salmon et al. 2011) through the Box-Muller transform. The key is
 * the run's; the counter holds the place in the block, the block, the step and the replica, so that no two
 * blocks of a run share numbers.
 */

#include <stdlib.h>

#include "shared.h"

#define TILE 1024           /* numbers made at once: they stay in the first-level cache */
#define LANES (TILE / 4)    /* Philox calls in a tile, four words each */
#define SEGMENT (1 << 16)   /* elements for which a journal's position fits 16 bits */

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the journal is written for little-endian processors"
#endif

/* ------------------------------------------------------------------------ Gaussians */

/* Two words that the seed gives, then step and replica. */
typedef uint32_t Key[4];

static void philox(const Key key, uint32_t block, uint32_t first, uint32_t words[4][LANES]) {
    for (int i = 0; i < LANES; i++) {
        uint32_t c0 = first + (uint32_t)i, c1 = block, c2 = key[2], c3 = key[3], k0 = key[0], k1 = key[1];
        for (int round = 0; round < 10; round++) {
            uint64_t p = (uint64_t)c0 * 0xD2511F53u, q = (uint64_t)c2 * 0xCD9E8D57u;
            c0 = (uint32_t)(q >> 32) ^ (c1 ^ k0);
            c2 = (uint32_t)(p >> 32) ^ (c3 ^ k1);
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
    float u = (float)(int32_t)(word >> 1) + 0.5f;
    /* u = 2^(31 + e) * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)) */
    uint32_t shifted = as_bits(u) - 0x4EB504F3u;
    int32_t e = (int32_t)shifted >> 23;
    float f = as_float((shifted & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
    float p = -0.15277184f;
    p = p * f + 0.2582834f;
    p = p * f - 0.26481686f;
    p = p * f + 0.28360158f;
    p = p * f - 0.33218252f;
    p = p * f + 0.40004144f;
    p = p * f - 0.5000317f;
    p = p * f + 0.6666665f;
    p = p * f - 0.99999976f;
    p = p * f + 2.0f;
    return -(p * f) - (float)e * 1.38629436f;
}

static void box_muller(const uint32_t *radius, const uint32_t *angle, float *z0, float *z1) {
    for (int i = 0; i < LANES; i++) {
        float r = sqrtf(minus_two_ln(radius[i]));
        /* The angle is quadrant * pi/2 + x with x in [-pi/4, pi/4); the quadrant is the upper two bits of t. */
        uint32_t t = angle[i] + 0x20000000u;
        float x = (float)(int32_t)(angle[i] << 2) * 3.6572952e-10f;
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
        uint32_t odd = 0u - (t >> 30 & 1u);
        uint32_t sin_bits = (as_bits(s) & ~odd) | (as_bits(c) & odd);
        uint32_t cos_bits = (as_bits(c) & ~odd) | (as_bits(s) & odd);
        z0[i] = as_float(cos_bits ^ ((t + 0x40000000u) & 0x80000000u));
        z1[i] = as_float(sin_bits ^ (t & 0x80000000u));
    }
}

static void gaussian_tile(const Key key, uint32_t block, int64_t tile, float *z) {
    uint32_t words[4][LANES];
    philox(key, block, (uint32_t)(tile * LANES), words);
    box_muller(words[0], words[1], z, z + LANES);
    box_muller(words[2], words[3], z + 2 * LANES, z + 3 * LANES);
}

/* ------------------------------------------------------------------------ rounded sums */

/* w[i] += eps[i]; missed[i] is by how much a subtraction of eps would miss w[i]. */
INLINE void add_journaled(int format, void *w, const float *eps, int n, int32_t *missed) {
    for (int i = 0; i < n; i++) {
        uint32_t right = bits_at(format, w, i), sum = rounded_sum(format, value_of(format, right), eps[i]);
        uint32_t back = rounded_sum(format, value_of(format, sum), -eps[i]);
        write_bits(format, w, i, sum);
        /* Integers wrap around: any two bit patterns have a difference. */
        missed[i] = format == FLOAT32 ? (int32_t)(right - back) : (int16_t)(right - back);
    }
}

/* w[i] += sign * eps[i]; the sign is 1 or -1. */
INLINE void add(int format, void *w, const float *eps, float sign, int n) {
    for (int i = 0; i < n; i++)
        write_bits(format, w, i, rounded_sum(format, value_of(format, bits_at(format, w, i)), sign * eps[i]));
}

/* ------------------------------------------------------------------------ noise of a weight */

typedef struct {
    const float *const *tables; /* standard-normal numbers of each block, or NULL to make them */
    Key key;
    int64_t first_block;
    int64_t block_size;
    int64_t offset;             /* where the first element lies in the first block */
    const float *scales;
    int64_t row_size;
    int32_t transposed; /* whether the scales run along a row instead of over rows */
} Noise;

/* memcpy past the caches, for memory that is not needed soon. */
static void stream(void *to, const void *from, size_t bytes) {
#ifdef __SSE2__
    size_t head = (0u - (size_t)to) % 16 < bytes ? (0u - (size_t)to) % 16 : bytes;
    memcpy(to, from, head);
    char *end = (char *)to + bytes, *place = (char *)to + head;
    const char *source = (const char *)from + head;
    for (; end - place >= 16; place += 16, source += 16)
        _mm_stream_si128((__m128i *)place, _mm_loadu_si128((const __m128i *)source));
    memcpy(place, source, (size_t)(end - place));
#else
    memcpy(to, from, bytes);
#endif
}

/* Ends a call: other threads see what was streamed before they see anything later. */
static void settle(Mode before) {
#ifdef __SSE2__
    _mm_sfence();
#endif
    set_mode(before);
}

/* eps of the elements [at, at + n), all in one tile of one block. */
static void make_noise(const Noise *noise, int64_t at, int n, float *eps) {
    float made[TILE];
    int64_t block = (noise->offset + at) / noise->block_size, place = (noise->offset + at) % noise->block_size;
    const float *z = made + place % TILE;
    if (noise->tables)
        z = noise->tables[block] + place;
    else
        gaussian_tile(noise->key, (uint32_t)(noise->first_block + block), place / TILE, made);
    int64_t row = at / noise->row_size, column = at % noise->row_size;
    for (int i = 0; i < n;) {
        int run = (int)least(noise->row_size - column, n - i);
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

/* How many elements of [at, end) lie in one tile of one block. */
static int piece(const Noise *noise, int64_t at, int64_t end) {
    int64_t place = (noise->offset + at) % noise->block_size;
    return (int)least(least(TILE - place % TILE, noise->block_size - place), end - at);
}

void flatlora_fill(float *out, int64_t numel, const Key key, uint32_t block) {
    Mode before = set_mode(STANDARD_MODE);
    float made[TILE];
    for (int64_t at = 0; at < numel; at += TILE) {
        if (numel - at >= TILE) {
            gaussian_tile(key, block, at / TILE, out + at);
        } else {
            gaussian_tile(key, block, at / TILE, made);
            memcpy(out + at, made, sizeof(float) * (size_t)(numel - at));
        }
    }
    set_mode(before);
}

/* ------------------------------------------------------------------------ parts of weights */

/* What the subtraction misses in a segment: positions in it, ascending, and differences of the bit
 * patterns, of 2 bytes where all of them fit and else of 4. */
typedef struct {
    void *differences;
    uint16_t *positions;
    int32_t entries;
    int32_t width;
} Journal;

typedef struct {
    void *weight;
    void *copy;        /* where the clean rows are kept, or NULL */
    Journal *journals; /* one for each segment, or NULL */
    int64_t numel;
    int64_t journal_bytes;
    int32_t format;
    int32_t keeps_journal;
    int32_t is_perturbed;
    Noise noise;
} Part;

/* Memory for one segment, given by the caller. */
typedef struct {
    uint16_t positions[SEGMENT];
    int32_t missed[SEGMENT];
} Room;

/* Adds what is missed of n elements, from `at` on, to the room's entries. Returns their new number. */
static int32_t record(const int32_t *missed, int at, int n, int32_t entries, Room *room) {
    uint8_t is_missed[TILE];
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
            room->positions[entries] = (uint16_t)(at + i);
            room->missed[entries++] = missed[i];
        }
    }
    return entries;
}

/* Moves the room's entries into memory of their own. Returns whether there was any. */
static int keep(const Room *room, int32_t entries, Journal *journal) {
    int is_wide = 0;
    for (int i = 0; i < entries; i++) is_wide |= room->missed[i] != (int16_t)room->missed[i];
    int32_t width = is_wide ? 4 : 2;
    void *memory = malloc((size_t)entries * (size_t)(width + 2) + 1);
    if (!memory) return 0;
    *journal = (Journal){memory, (uint16_t *)((char *)memory + (size_t)entries * (size_t)width), entries, width};
    memcpy(journal->positions, room->positions, 2 * (size_t)entries);
    if (is_wide)
        memcpy(memory, room->missed, 4 * (size_t)entries);
    else
        for (int i = 0; i < entries; i++) ((int16_t *)memory)[i] = (int16_t)room->missed[i];
    return 1;
}

static int64_t segments_of(const Part *part) { return (part->numel + SEGMENT - 1) / SEGMENT; }

/* Adds the noise. Returns how many entries for the journal are in the room. */
static int32_t perturb_segment(const Part *part, int64_t segment, Room *room) {
    int32_t entries = 0;
    int format = part->format;
    size_t width = width_of(format);
    int64_t first = segment * SEGMENT, end = least(first + SEGMENT, part->numel);
    for (int64_t at = first; at < end;) {
        float eps[TILE];
        int32_t missed[TILE];
        int n = piece(&part->noise, at, end);
        char *w = (char *)part->weight + (size_t)at * width;
        make_noise(&part->noise, at, n, eps);
        if (part->copy) stream((char *)part->copy + (size_t)at * width, w, (size_t)n * width);
        if (part->keeps_journal) {
            FOR_FORMAT(format, add_journaled, w, eps, n, missed);
            entries = record(missed, (int)(at - first), n, entries, room);
        } else {
            FOR_FORMAT(format, add, w, eps, 1.0f, n);
        }
        at += n;
    }
    return entries;
}

/* Restores a segment of `into`: of the weight, or of a copy of it. */
static void restore_segment(const Part *part, int64_t segment, void *into) {
    int format = part->format;
    size_t width = width_of(format);
    int64_t first = segment * SEGMENT, end = least(first + SEGMENT, part->numel);
    char *start = (char *)into + (size_t)first * width;
    if (part->copy) {
        stream(start, (char *)part->copy + (size_t)first * width, (size_t)(end - first) * width);
        return;
    }
    for (int64_t at = first; at < end;) {
        float eps[TILE];
        int n = piece(&part->noise, at, end);
        make_noise(&part->noise, at, n, eps);
        FOR_FORMAT(format, add, (char *)into + (size_t)at * width, eps, -1.0f, n);
        at += n;
    }
    if (!part->journals) return;
    const Journal *journal = part->journals + segment;
    for (int i = 0; i < journal->entries; i++) {
        int at = journal->positions[i];
        int32_t difference =
            journal->width == 4 ? ((int32_t *)journal->differences)[i] : ((int16_t *)journal->differences)[i];
        if (format == FLOAT32)
            ((uint32_t *)start)[at] += (uint32_t)difference;
        else
            ((uint16_t *)start)[at] += (uint16_t)difference;
    }
}

/* Frees the journals and gives up the rows without writing them. */
void flatlora_forget(Part *part) {
    for (int64_t segment = 0; part->journals && segment < segments_of(part); segment++)
        free(part->journals[segment].differences);
    free(part->journals);
    part->journals = NULL;
    part->journal_bytes = part->is_perturbed = 0;
}

/* Returns whether there was memory for the journals. If not, the part is as it was. */
static int perturb_part(Part *part, Room *room) {
    int64_t segments = segments_of(part), segment;
    if (part->is_perturbed) return 1;
    if (part->keeps_journal) {
        part->journals = calloc((size_t)segments + 1, sizeof(Journal));
        if (!part->journals) return 0;
        part->journal_bytes = segments * (int64_t)sizeof(Journal);
    }
    for (segment = 0; segment < segments; segment++) {
        int32_t entries = perturb_segment(part, segment, room);
        if (!part->keeps_journal) continue;
        Journal *journal = part->journals + segment;
        if (!keep(room, entries, journal)) {
            *journal = (Journal){room->missed, room->positions, entries, 4};
            for (int64_t back = 0; back <= segment; back++) restore_segment(part, back, part->weight);
            journal->differences = NULL;
            flatlora_forget(part);
            return 0;
        }
        part->journal_bytes += entries * (2 + journal->width);
    }
    part->is_perturbed = 1;
    return 1;
}

/* W += eps in parts. A part for whose journal there is no memory stays as it is, and `failed` is set. */
void flatlora_perturb(Task *task) {
    Mode before = set_mode(STANDARD_MODE);
    Room *room = room_of(task);
    int64_t left = task->most;
    for (Part *part; (part = next_of(task, left)); left -= part->numel)
        if (!perturb_part(part, room)) __atomic_store_n(&task->failed, 1, __ATOMIC_RELAXED);
    settle(before);
}

/* Brings W back in those parts that are perturbed. */
void flatlora_restore(Task *task) {
    Mode before = set_mode(STANDARD_MODE);
    int64_t left = task->most;
    for (Part *part; (part = next_of(task, left)); left -= part->numel) {
        if (!part->is_perturbed) continue;
        for (int64_t segment = 0; segment < segments_of(part); segment++)
            restore_segment(part, segment, part->weight);
        flatlora_forget(part);
    }
    settle(before);
}

/* Brings a copy of a perturbed part back, and leaves the part as it is. */
void flatlora_clean(const Part *part, void *copy) {
    Mode before = set_mode(STANDARD_MODE);
    for (int64_t segment = 0; segment < segments_of(part); segment++) restore_segment(part, segment, copy);
    settle(before);
}

/* A hash of `count` elements (FNV-1a). */
uint64_t flatlora_checksum(const void *weight, int64_t count, int64_t stride, int64_t width) {
    uint64_t checksum = 0xCBF29CE484222325u;
    for (int64_t i = 0; i < count; i++)
        for (int64_t byte = 0; byte < width; byte++)
            checksum = (checksum ^ ((const uint8_t *)weight)[i * stride * width + byte]) * 0x100000001B3u;
    return checksum;
}
