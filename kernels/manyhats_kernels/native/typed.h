/* The kernels for one storage type. Set before each inclusion: T, NAME(f), LOAD(p), STORE(p, v). Where the
 * machine multiplies pairs of the type itself, NATIVE_DOT is set and PACK, STEP come with it. */

INLINE vf NAME(load_part)(const T *p, int64_t n) {
    T whole[LANES];
    memset(whole, 0, sizeof whole);
    memcpy(whole, p, n * sizeof(T));
    return LOAD(whole);
}
INLINE void NAME(store_part)(T *p, vf v, int64_t n) {
    T whole[LANES];
    STORE(whole, v);
    memcpy(p, whole, n * sizeof(T));
}

/* A pack is what one dot-product step takes of a row: 16 floats, or 32 bf16 where the machine has them. */
#ifdef NATIVE_DOT
#define PACK __m512bh
#define STEP 32
typedef __m512bh unaligned_bh __attribute__((aligned(2), may_alias));
INLINE PACK NAME(pack)(const T *p) { return *(const unaligned_bh *)p; }
INLINE PACK NAME(pack_part)(const T *p, int64_t n) {
    return (__m512bh)_mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p);
}
INLINE vf NAME(dot)(vf acc, PACK a, PACK b) { return (vf)_mm512_dpbf16_ps((__m512)acc, a, b); }
#else
#define PACK vf
#define STEP LANES
INLINE PACK NAME(pack)(const T *p) { return LOAD(p); }
INLINE PACK NAME(pack_part)(const T *p, int64_t n) { return NAME(load_part)(p, n); }
INLINE vf NAME(dot)(vf acc, PACK a, PACK b) { return acc + a * b; }
#endif

#include "lora.h"

#include "attention.h"

#include "parts.h"

#include "dense.h"

#undef PACK
#undef STEP
#undef NATIVE_DOT
#undef T
#undef NAME
#undef LOAD
#undef STORE
