/* What both C files share: the numbers that weights are stored as, and how threads share work. */

#ifndef FLATLORA_SHARED_H
#define FLATLORA_SHARED_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline)) /* so that the format is a constant */

enum { FLOAT32, BFLOAT16, FLOAT16 };

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline size_t width_of(int format) { return format == FLOAT32 ? 4 : 2; }

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

/* The number that a bit pattern stands for. */
static inline float value_of(int format, uint32_t bits) {
    if (format == FLOAT32) return as_float(bits);
    if (format == BFLOAT16) return as_float(bits << 16);
    uint32_t sign = (bits & 0x8000u) << 16, rest = (bits & 0x7FFFu) << 13;
    /* The exponent's bias is 15 there and 127 here: subnormals need no case of their own. */
    uint32_t special = rest >= 0x0F800000u ? 0x7F800000u : 0u;
    return as_float(as_bits(as_float(rest) * 0x1p112f) | special | sign);
}

static inline uint32_t bits_at(int format, const void *from, int64_t i) {
    return format == FLOAT32 ? ((const uint32_t *)from)[i] : ((const uint16_t *)from)[i];
}

/* The nearest of float16, ties to even, as a bit pattern. */
static inline uint32_t half_of(float x) {
    uint32_t bits = as_bits(x), sign = bits & 0x80000000u, rest = bits ^ sign;
    /* Below 2^-14 all results are multiples of 2^-24: adding 1/2 rounds there. */
    uint32_t subnormal = as_bits(as_float(rest) + 0.5f) - 0x3F000000u;
    uint32_t normal = (rest - 0x38000000u + 0x0FFFu + ((rest >> 13) & 1u)) >> 13;
    uint32_t h = rest < 0x38800000u ? subnormal : normal;
    h = rest >= 0x477FF000u ? 0x7C00u : h;
    h = rest > 0x7F800000u ? 0x7E00u : h;
    return h | sign >> 16;
}

/* The bit pattern of w + eps, rounded to the format. NaNs become one. */
static inline uint32_t rounded_sum(int format, float w, float eps) {
    float x = w + eps;
    uint32_t bits = as_bits(x);
    if (format == FLOAT32) return x == x ? bits : 0x7FC00000u;
    if (format == BFLOAT16) return x == x ? (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16 : 0x7FC0u;
    /* Noise alone never makes a finite weight infinite. */
    float finite = x > 65504.0f ? 65504.0f : (x < -65504.0f ? -65504.0f : x);
    return half_of(fabsf(w) <= 65504.0f ? finite : x);
}

INLINE void write_bits(int format, void *to, int i, uint32_t bits) {
    if (format == FLOAT32)
        ((uint32_t *)to)[i] = bits;
    else
        ((uint16_t *)to)[i] = (uint16_t)bits;
}

/* `call` with the format as a constant. */
#define FOR_FORMAT(format, call, ...)                     \
    ((format) == FLOAT32    ? call(FLOAT32, __VA_ARGS__)  \
     : (format) == BFLOAT16 ? call(BFLOAT16, __VA_ARGS__) \
                            : call(FLOAT16, __VA_ARGS__))

/* A thread's mode of arithmetic. Subnormal numbers count, as on every other thread: what one perturbs,
 * another may restore, and the user may have set one of them to flush. */
typedef uint64_t Mode;

static inline Mode set_mode(Mode mode) {
    Mode before = 0;
#if defined(__SSE2__)
    before = _mm_getcsr();
    _mm_setcsr((unsigned)mode);
#elif defined(__aarch64__)
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"(mode));
#else
    (void)mode;
#endif
    __asm__ volatile("" : : : "memory");
    return before;
}

#ifdef __SSE2__
#define STANDARD_MODE 0x1F80
#else
#define STANDARD_MODE 0
#endif

/* Items that several threads take one by one. */
typedef struct {
    void *const *items;
    char *rooms; /* memory for each thread */
    int64_t room_size;
    int64_t count;
    int64_t next;
    int64_t most; /* numbers that one call works on, so that Python can look for interrupts in between */
    int32_t threads; /* how many have asked for their room */
    int32_t failed;
} Task;

static inline void *room_of(Task *task) {
    return task->rooms + task->room_size * __atomic_fetch_add(&task->threads, 1, __ATOMIC_RELAXED);
}

/* The next item; NULL if there is none, or nothing left of what this call may do. */
static inline void *next_of(Task *task, int64_t left) {
    if (left <= 0) return NULL;
    int64_t i = __atomic_fetch_add(&task->next, 1, __ATOMIC_RELAXED);
    return i < task->count ? task->items[i] : NULL;
}

#endif
