/* Sixteen floats at a time, and the three storage types.
 *
 * Written with the vector extensions that GCC and Clang share, so that it compiles for any machine (a
 * 64-byte vector becomes two of AVX2 or four of NEON); intrinsics stand in only where they win.
 * Nothing here relies on relaxed floating-point rules: NaN and infinity behave as IEEE says.
 */
#ifndef MANYHATS_VEC_H
#define MANYHATS_VEC_H

#include <float.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#define LANES 16
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define MH_AVX512_BF16
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(64)));
typedef uint32_t vu32 __attribute__((vector_size(64)));
typedef int32_t vi32 __attribute__((vector_size(64)));
typedef uint16_t vu16 __attribute__((vector_size(32)));
typedef struct { uint16_t bits; } bf16;
typedef struct { uint16_t bits; } fp16;

INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf zero(void) { return (vf){0}; }
INLINE vf pick(vi32 mask, vf a, vf b) { return (vf)(((vi32)a & mask) | ((vi32)b & ~mask)); }
INLINE vf vmax(vf a, vf b) { return pick((vi32)(a > b), a, b); }

INLINE void fetch(const void *p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)p + i);
}

INLINE void fetch_to_write(void *p) { __builtin_prefetch(p, 1); }

/* Lanes are added in the pairs (i, i + 8), (i, i + 4), (i, i + 2), (i, i + 1); sum16 does the same, so
 * that a sum has the same bits however many are reduced together. */
INLINE float lanes_sum(vf v) {
#if defined(__AVX512F__)
    __m512 a = (__m512)v;
    a = _mm512_add_ps(a, _mm512_shuffle_f32x4(a, a, 0x4E));
    a = _mm512_add_ps(a, _mm512_shuffle_f32x4(a, a, 0xB1));
    a = _mm512_add_ps(a, _mm512_permute_ps(a, 0x4E));
    a = _mm512_add_ps(a, _mm512_permute_ps(a, 0xB1));
    return _mm512_cvtss_f32(a);
#else
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
#endif
}

/* The sums of the lanes of sixteen vectors, in order. */
INLINE vf lanes_sum16(const vf *v) {
#if defined(__AVX512F__)
    __m512 p[8], q[4], r[2];
    for (int i = 0; i < 8; i++)
        p[i] = _mm512_add_ps(_mm512_shuffle_f32x4((__m512)v[2 * i], (__m512)v[2 * i + 1], 0x44),
                             _mm512_shuffle_f32x4((__m512)v[2 * i], (__m512)v[2 * i + 1], 0xEE));
    for (int i = 0; i < 4; i++)
        q[i] = _mm512_add_ps(_mm512_shuffle_f32x4(p[2 * i], p[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(p[2 * i], p[2 * i + 1], 0xDD));
    for (int i = 0; i < 2; i++)
        r[i] = _mm512_add_ps(_mm512_shuffle_ps(q[2 * i], q[2 * i + 1], 0x44),
                             _mm512_shuffle_ps(q[2 * i], q[2 * i + 1], 0xEE));
    __m512 s = _mm512_add_ps(_mm512_shuffle_ps(r[0], r[1], 0x88), _mm512_shuffle_ps(r[0], r[1], 0xDD));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return (vf)_mm512_permutexvar_ps(order, s);
#else
    vf s;
    for (int i = 0; i < LANES; i++) s[i] = lanes_sum(v[i]);
    return s;
#endif
}

/* exp of x <= 0 to about 2 ulp; below -87 it is 0. 2^n * p(r) with |r| <= ln(2) / 2, p of degree 6 (the
 * Taylor series, whose remainder there is below 2e-7). */
INLINE vf exp_nonpositive(vf x) {
    vi32 tiny = (vi32)(x < splat(-87.0f));
    x = pick(tiny, splat(-87.0f), x);
    vf shifted = x * splat(1.44269504f) + splat(12582912.0f); /* rounds to an integer in the low bits */
    vf n = shifted - splat(12582912.0f);
    vf r = x - n * splat(0.693359375f) + n * splat(2.12194440e-4f);
    vf p = splat(1.0f / 720);
    p = p * r + splat(1.0f / 120);
    p = p * r + splat(1.0f / 24);
    p = p * r + splat(1.0f / 6);
    p = p * r + splat(0.5f);
    p = p * r + splat(1.0f);
    p = p * r + splat(1.0f);
    vi32 power = ((vi32)shifted + 127) << 23;
    return pick(tiny, zero(), p * (vf)power);
}

/* tanh to about 1e-7 absolute: (1 - e) / (1 + e), e = exp(-2 |x|), with the sign of x. */
INLINE vf vtanh(vf x) {
    vf magnitude = (vf)((vu32)x & 0x7fffffffu);
    vf e = exp_nonpositive(magnitude * splat(-2.0f));
    return (vf)((vu32)((splat(1.0f) - e) / (splat(1.0f) + e)) | ((vu32)x & 0x80000000u));
}

/* ---- loads and stores; a store rounds to nearest even */

INLINE vf load_fp32(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE void store_fp32(float *p, vf v) { memcpy(p, &v, sizeof v); }

INLINE vf load_bf16(const bf16 *p) {
#if defined(__AVX512F__)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#endif
    vu16 h;
    memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu32) << 16);
}
INLINE void store_bf16(bf16 *p, vf v) {
    vu32 u = (vu32)v;
    vu32 nan = (vu32)((u & 0x7fffffffu) > 0x7f800000u);
    vu32 rounded = u + 0x7fffu + ((u >> 16) & 1u);
    rounded = (rounded & ~nan) | ((u | 0x00400000u) & nan);
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)(rounded >> 16)));
#else
    vu16 h = __builtin_convertvector(rounded >> 16, vu16);
    memcpy(p, &h, sizeof h);
#endif
}

INLINE uint16_t nearest_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float from_bf16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

INLINE vf load_fp16(const fp16 *p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#else
    vu16 h;
    memcpy(&h, p, sizeof h);
    vu32 u = __builtin_convertvector(h, vu32);
    vf magnitude = (vf)((u & 0x7fffu) << 13) * splat(0x1p112f); /* right for subnormals too */
    vu32 special = (vu32)((u & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    return (vf)((vu32)magnitude | special | ((u & 0x8000u) << 16));
#endif
}
INLINE void store_fp16(fp16 *p, vf v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#else
    vu32 u = (vu32)v, sign = (u >> 16) & 0x8000u, m = u & 0x7fffffffu;
    vu32 normal = (m + 0xfffu + ((m >> 13) & 1u) - (112u << 23)) >> 13;
    /* below 2^-14 the addition of 0.5 itself rounds to the spacing of subnormals */
    vu32 small = (vu32)((vf)m + splat(0.5f)) - 0x3f000000u;
    vu32 is_small = (vu32)(m < 0x38800000u), is_big = (vu32)(m >= 0x477ff000u);
    vu32 is_nan = (vu32)(m > 0x7f800000u);
    vu32 h = (small & is_small) | (normal & ~is_small);
    h = (h & ~is_big) | (0x7c00u & is_big);
    h = ((h | (0x200u & is_nan)) | sign);
    vu16 out = __builtin_convertvector(h, vu16);
    memcpy(p, &out, sizeof out);
#endif
}

#endif
