/* The inner loops of a merge: stored = round(stored + up @ down) in one pass over a block, with no product in memory;
   and the conversions between what is stored and float32.

   A merged element is base + s, where s is a chain of fused multiply-adds over the rank, from zero, in ascending order,
   in float32; the sum is rounded once, to nearest even. The order is a contract: the bits are the same on every
   machine, for any blocks and any number of threads.

   Plain C with the vector types of GCC and Clang, and nothing of Python in it: native.py calls it, hatch_build.py
   compiles it. Where it cannot be compiled, or does not run, numpy does the same work. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#define FAST __attribute__((target("avx2,fma")))
#elif defined(__aarch64__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define FAST
#else
#error "no vectors with fused multiply-add are known here"
#endif
#define INLINE static inline __attribute__((always_inline)) FAST

enum kind { F32, BF16, F16 }; /* native.py has the same order */
enum { LANES = 8, PAIR = 2 * LANES, ROWS = 6 };

typedef float floats __attribute__((vector_size(4 * LANES), aligned(1)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(1)));
typedef int32_t masks __attribute__((vector_size(4 * LANES), aligned(1)));
typedef uint16_t halves __attribute__((vector_size(4 * LANES), aligned(1)));
typedef int16_t flags __attribute__((vector_size(4 * LANES), aligned(1)));

/* Sixteen columns of a row, as they are computed with. Two 16-bit values share a word, so theirs are the even columns
   and the odd ones: nothing has to be shuffled. Those of float32 are the left eight and the right eight. */
typedef struct {
    floats one, other;
} pair;

/* What a pass finds: how many values keep their bits, how many products are zero, and where a value is not finite. */
typedef struct {
    flags kept, zeros;
    masks wild;
} found;

typedef struct {
    const float *at;
    ptrdiff_t row, column; /* strides, in elements */
} matrix;

INLINE size_t size_of(enum kind kind)
{
    return kind == F32 ? 4 : 2;
}

INLINE words where(masks mask, words one, words other)
{
    return ((words)mask & one) | (~(words)mask & other);
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (words){__VA_ARGS__})
#endif

/* Sixteen floats in order -> a pair of this kind, and back. */
INLINE pair parted(pair p, enum kind kind)
{
    if (kind == F32)
        return p;
    return (pair){SHUFFLE(p.one, p.other, 0, 2, 4, 6, 8, 10, 12, 14), SHUFFLE(p.one, p.other, 1, 3, 5, 7, 9, 11, 13, 15)};
}

INLINE pair joined(pair p, enum kind kind)
{
    if (kind == F32)
        return p;
    return (pair){SHUFFLE(p.one, p.other, 0, 8, 1, 9, 2, 10, 3, 11), SHUFFLE(p.one, p.other, 4, 12, 5, 13, 6, 14, 7, 15)};
}

/* float16 in the low half of each word -> float32, exact. */
INLINE floats from_f16(words bits)
{
    words size = (bits & 0x7fff) << 13, value = size + 0x38000000; /* the exponent's bias is larger by 112 */
    words small = (words)((floats)(value + 0x00800000) - 0x1p-14f); /* subnormal ones have no leading bit */
    value = where((masks)size < 0x00800000, small, value);
    value = where((masks)size < 0x0f800000, value, size | 0x7f800000); /* infinity and NaN */
    return (floats)(value | (bits & 0x8000) << 16);
}

/* float32 -> float16 in the low half of each word, where it stays finite. */
INLINE words to_f16(words bits)
{
    words size = bits & 0x7fffffff;
    words small = (words)((floats)size + 0.5f) - 0x3f000000; /* the sum is rounded to multiples of 2^-24 */
    words normal = (size - 0x38000000 + 0x0fff + (size >> 13 & 1)) >> 13;
    return where((masks)size < 0x38800000, small, normal) | (bits >> 16 & 0x8000);
}

/* float32 -> bfloat16 in the high half of each word, where it stays finite; the low half is left over. */
INLINE words to_bf16(words bits)
{
    return bits + 0x7fff + (bits >> 16 & 1);
}

INLINE pair load(const char *at, enum kind kind)
{
    if (kind == F32)
        return (pair){*(const floats *)at, *(const floats *)(at + sizeof(floats))};
    words bits = *(const words *)at;
    if (kind == BF16)
        return (pair){(floats)(bits << 16), (floats)(bits & 0xffff0000)};
    return (pair){from_f16(bits & 0xffff), from_f16(bits >> 16)};
}

/* The bits of the largest float32 that is still finite when it is rounded. */
INLINE int32_t largest(enum kind kind)
{
    return kind == F32 ? 0x7f7fffff : kind == BF16 ? 0x7f7f7fff : 0x477fefff;
}

INLINE void store(char *at, pair values, masks *wild, enum kind kind)
{
    words one = (words)values.one, other = (words)values.other;
    *wild |= (masks)(one & 0x7fffffff) > largest(kind);
    *wild |= (masks)(other & 0x7fffffff) > largest(kind);
    if (kind == F32) {
        *(words *)at = one;
        *(words *)(at + sizeof one) = other;
    } else if (kind == BF16)
        *(words *)at = to_bf16(one) >> 16 | (to_bf16(other) & 0xffff0000);
    else
        *(words *)at = to_f16(one) | to_f16(other) << 16;
}

INLINE flags both(masks one, masks other)
{
    return (flags)((one & 0xffff) | other << 16);
}

/* -1 for each value whose bits are the same. */
INLINE flags kept(const char *base, const char *out, enum kind kind)
{
    if (kind != F32)
        return (flags)(*(const halves *)base == *(const halves *)out);
    return both(*(const words *)base == *(const words *)out,
                *(const words *)(base + sizeof(words)) == *(const words *)(out + sizeof(words)));
}

INLINE void finish(const char *base, char *out, pair sum, found *found, enum kind kind, int counting)
{
    pair value = load(base, kind);
    store(out, (pair){value.one + sum.one, value.other + sum.other}, &found->wild, kind);
    found->kept -= kept(base, out, kind);
    if (counting)
        found->zeros -= both((masks)(sum.one == 0), (masks)(sum.other == 0));
}

/* The same for fewer than sixteen columns; the zeros beside them count as kept, and as products that are zero. */
INLINE void finish_some(const char *base, char *out, pair sum, size_t columns, found *found, enum kind kind, int counting)
{
    char before[sizeof(pair)] = {0}, after[sizeof(pair)];
    memcpy(before, base, columns * size_of(kind));
    finish(before, after, sum, found, kind, counting);
    memcpy(out, after, columns * size_of(kind));
}

/* Columns [left, right) of down in the order in which they are used: [columns/16, rank, 16], zeros beyond the last. */
INLINE void pack(float *to, matrix down, size_t left, size_t right, size_t rank, enum kind kind)
{
    for (size_t c = left; c < right; c += PAIR)
        for (size_t k = 0; k < rank; k++, to += PAIR) {
            const float *at = down.at + (ptrdiff_t)k * down.row + (ptrdiff_t)c * down.column;
            float some[PAIR] = {0};
            if (down.column != 1 || right - c < PAIR) {
                for (size_t n = 0; n < PAIR && c + n < right; n++)
                    some[n] = at[(ptrdiff_t)n * down.column];
                at = some;
            }
            *(pair *)to = parted((pair){*(const floats *)at, *(const floats *)(at + LANES)}, kind);
        }
}

/* Six rows times sixteen columns: sum [6,16] = up [6,rank] @ tile [rank,16]. */
INLINE void multiply(pair sum[ROWS], const float *const up[ROWS], ptrdiff_t step, const float *tile, size_t rank)
{
#pragma GCC unroll 8
    for (size_t r = 0; r < ROWS; r++)
        sum[r] = (pair){{0}, {0}};
    for (size_t k = 0; k < rank; k++, tile += PAIR) {
        floats one = *(const floats *)tile, other = *(const floats *)(tile + LANES);
#pragma GCC unroll 8
        for (size_t r = 0; r < ROWS; r++) {
            float factor = up[r][(ptrdiff_t)k * step];
            sum[r].one += factor * one;
            sum[r].other += factor * other;
        }
    }
}

/* Whether the compiler made one operation of a product and a sum: (1 + 2^-12)^2 - (1 + 2^-11) is 2^-24, or else 0. */
static FAST __attribute__((noinline)) int fuses(void)
{
    volatile float more = 1 + 0x1p-12f, less = -(1 + 0x1p-11f);
    const float up[2] = {less, more}, *const factors[ROWS] = {up, up, up, up, up, up};
    float tile[2 * PAIR];
    for (size_t n = 0; n < PAIR; n++)
        tile[n] = 1, tile[PAIR + n] = more;
    pair sum[ROWS];
    multiply(sum, factors, 1, tile, 2);
    return sum[0].one[0] == 0x1p-24f;
}

/* Whether this processor has what the loops need, and they do what they should. */
int supported(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && fuses();
#else
    return fuses();
#endif
}

INLINE int64_t total(flags counts)
{
    int64_t sum = 0;
    for (size_t n = 0; n < PAIR; n++)
        sum += counts[n];
    return sum;
}

INLINE int64_t merge_as(enum kind kind, int counting, const char *base, char *out, size_t rows, size_t columns,
                        const matrix *up, const matrix *down, size_t rank, float *packed, size_t panel, int64_t *zeros)
{
    const size_t line = columns * size_of(kind); /* bytes of a row */
    const int64_t beside = (int64_t)(rows * (-columns % PAIR)); /* values that finish_some adds */
    found found = {{0}, {0}, {0}};
    int64_t same = -beside, none = -beside;
    for (size_t left = 0; left < columns; left += panel) {
        size_t right = columns - left < panel ? columns : left + panel;
        pack(packed, *down, left, right, rank, kind);
        for (size_t i = 0; i < rows; i += ROWS) {
            const size_t high = rows - i < ROWS ? rows - i : ROWS;
            const float *factors[ROWS], *tile = packed;
            for (size_t r = 0; r < ROWS; r++) /* beyond the last row: a row again, whose sum is not used */
                factors[r] = up->at + (ptrdiff_t)(r < high ? i + r : i) * up->row;
            for (size_t c = left; c < right; c += PAIR, tile += rank * PAIR) {
                const char *from = base + i * line + c * size_of(kind);
                char *to = out + i * line + c * size_of(kind);
                pair sum[ROWS];
                multiply(sum, factors, up->column, tile, rank);
#pragma GCC unroll 8
                for (size_t r = 0; r < ROWS; r++)
                    if (r < high && right - c >= PAIR)
                        finish(from + r * line, to + r * line, sum[r], &found, kind, counting);
                if (right - c < PAIR)
                    for (size_t r = 0; r < high; r++)
                        finish_some(from + r * line, to + r * line, sum[r], right - c, &found, kind, counting);
            }
            same += total(found.kept);
            none += total(found.zeros);
            found.kept = found.zeros = (flags){0};
        }
    }
    if (counting)
        *zeros = none;
    for (size_t n = 0; n < LANES; n++)
        if (found.wild[n])
            return -1;
    return same;
}

#define MERGE_AS(KIND)                                                                                        \
    (zeros ? merge_as(KIND, 1, base, out, rows, columns, up, down, rank, packed, panel, zeros)                \
           : merge_as(KIND, 0, base, out, rows, columns, up, down, rank, packed, panel, zeros))

/* out [rows,columns] = round(base [rows,columns] + up [rows,rank] @ down [rank,columns]), base and out of one kind.

   ``packed`` is room for rank * panel floats; ``panel`` is a multiple of 16, at most 65,536. ``zeros`` gets how many
   elements of the product are zero, where it is given. Gives how many values kept their bits; -1 where one is not
   finite, and out is then undefined. */
FAST int64_t merge(int kind, const char *base, char *out, size_t rows, size_t columns, const matrix *up,
                   const matrix *down, size_t rank, float *packed, size_t panel, int64_t *zeros)
{
    switch (kind) {
    case BF16:
        return MERGE_AS(BF16);
    case F16:
        return MERGE_AS(F16);
    default:
        return MERGE_AS(F32);
    }
}

INLINE void widen_as(enum kind kind, const char *stored, float *out, size_t count)
{
    for (size_t i = 0; i < count; i += PAIR, stored += PAIR * size_of(kind)) {
        char some[sizeof(pair)] = {0};
        const size_t n = count - i < PAIR ? count - i : PAIR;
        if (n == PAIR) {
            *(pair *)(out + i) = joined(load(stored, kind), kind);
            continue;
        }
        memcpy(some, stored, n * size_of(kind));
        pair last = joined(load(some, kind), kind);
        memcpy(out + i, &last, n * sizeof(float));
    }
}

/* out [count] = stored [count] in float32. */
FAST void widen(int kind, const char *stored, float *out, size_t count)
{
    if (kind == BF16)
        widen_as(BF16, stored, out, count);
    else
        widen_as(F16, stored, out, count);
}

INLINE int narrow_as(enum kind kind, const float *values, char *out, size_t count)
{
    masks wild = {0};
    for (size_t i = 0; i < count; i += PAIR, out += PAIR * size_of(kind)) {
        const size_t n = count - i < PAIR ? count - i : PAIR;
        char stored[sizeof(pair)];
        pair some = {{0}, {0}};
        memcpy(&some, values + i, n * sizeof(float));
        store(n < PAIR ? stored : out, parted(some, kind), &wild, kind);
        if (n < PAIR)
            memcpy(out, stored, n * size_of(kind));
    }
    for (size_t n = 0; n < LANES; n++)
        if (wild[n])
            return 0;
    return 1;
}

/* out [count] = values [count] rounded. Gives 0 where one is not finite, and out is then undefined. */
FAST int narrow(int kind, const float *values, char *out, size_t count)
{
    return kind == BF16 ? narrow_as(BF16, values, out, count) : narrow_as(F16, values, out, count);
}
