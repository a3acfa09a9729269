/* What every kernel on AMX tiles needs. */
#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(MH_AVX512_BF16) && defined(__linux__)
#define MH_AMX
#include <sys/syscall.h>
#include <unistd.h>

#define TILE 512 /* elements of a tile: 16 rows of 32 */

/* Whether the kernel lets this process use tiles; asks it to. */
EXPORT int mh_amx(void) {
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
}

/* Sixteen floats of each of sixteen rows, rows and columns exchanged. */
INLINE void transpose16(__m512 *r) {
    __m512 s[16];
    for (int i = 0; i < 16; i += 2) {
        s[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        s[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            __m512d a = (__m512d)s[i + j], b = (__m512d)s[i + j + 2];
            r[i + 2 * j] = (__m512)_mm512_unpacklo_pd(a, b);
            r[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(a, b);
        }
    for (int j = 0; j < 4; j++) {
        __m512 a = r[j], b = r[4 + j], c = r[8 + j], d = r[12 + j];
        __m512 ab0 = _mm512_shuffle_f32x4(a, b, 0x88), ab1 = _mm512_shuffle_f32x4(a, b, 0xdd);
        __m512 cd0 = _mm512_shuffle_f32x4(c, d, 0x88), cd1 = _mm512_shuffle_f32x4(c, d, 0xdd);
        s[j] = _mm512_shuffle_f32x4(ab0, cd0, 0x88);
        s[8 + j] = _mm512_shuffle_f32x4(ab0, cd0, 0xdd);
        s[4 + j] = _mm512_shuffle_f32x4(ab1, cd1, 0x88);
        s[12 + j] = _mm512_shuffle_f32x4(ab1, cd1, 0xdd);
    }
    memcpy(r, s, sizeof s);
}

/* Thirty-two bf16: the even ones and the odd ones rounded. */
INLINE __m512i weave(__m512 even, __m512 odd) {
    const __m512i woven = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(woven, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

typedef struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } tile_shape;
#else
EXPORT int mh_amx(void) { return 0; }
#endif
