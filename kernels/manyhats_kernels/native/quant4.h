/* Products of one bf16 x with several matrices, of 4-bit weights as bitsandbytes stores them or of bf16.
 *
 * packed is [N][K / 2] bytes, the weight of an even k in the high nibble; absmax is fp32 [N][K / block];
 * a weight is bf16(code[nibble] * absmax). Within every 64 weights the even k come first, then the odd, so
 * that no nibble is ever moved to another lane; x is packed in the same order.
 *
 * 4-bit weights are read once, at 4 bits. A panel of Q4_ROWS outputs is unpacked to the cache, then meets all tokens. On a machine with AMX the
 * panel's rows are the left tiles (16 outputs, 32 k) and x the right ones (16 pairs of k, 16 tokens).
 */
#define Q4_ROWS 32
#define Q4_RUN 64
#include "lora_join.h"
#ifndef MH_AMX
typedef void lora_join;
#endif

typedef struct { /* int64 fields in this order come from the launcher */
    bf16 *y;
    int64_t y_stride, n, block;
    const uint8_t *packed; /* or bf16 [n][k], when there is no absmax */
    const float *absmax, *code;
    const bf16 *bias;
} quant4_matrix;

typedef struct { /* how products meet what comes before and after them; each absent by default, and on AMX tiles alone */
    const lora_join *join; /* what adapters add, the sites in the order of the matrices */
    bf16 *gated;           /* takes silu(first product) * second, packed as the next x, in place of both */
    bf16 *x_packed;        /* x as it is packed */
    const uint8_t *apart;  /* by sixteen tokens: not in gated and x_packed but in y and x */
} quant4_ways;

typedef struct {
    const quant4_matrix *matrices;
    int64_t panel_count;
    const bf16 *x;
    int64_t x_stride, tokens, k;
    bf16 *x_packed, *panels;
    int threads;
    int64_t panel_size; /* elements of a thread's panel */
    quant4_ways ways;
} quant4_args;

/* The matrix of the panel, counted over all of them; *panel becomes its number within the matrix. */
INLINE const quant4_matrix *find_matrix(const quant4_args *g, int64_t *panel) {
    const quant4_matrix *m = g->matrices;
    while (*panel >= blocks_of(m->n, Q4_ROWS)) *panel -= blocks_of(m++->n, Q4_ROWS);
    return m;
}

#ifdef MH_AVX512_BF16
/* Sixty-four weights with one scale: 32 of even k in `even`, 32 of odd k in `odd`. */
INLINE void unpack_registers(__m512i *even, __m512i *odd, const uint8_t *packed, float absmax, vf code) {
    __m256i table = (__m256i)_mm512_cvtneps_pbh((__m512)(code * splat(absmax)));
    __m512i twice = _mm512_broadcast_i64x4(table); /* a lane's fifth bit is the other nibble's */
    __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)packed));
    *even = _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), twice);
    *odd = _mm512_permutexvar_epi16(bytes, twice);
}
#endif

/* The same to memory. */
INLINE void unpack_run(bf16 *even, bf16 *odd, const uint8_t *packed, float absmax, vf code) {
#ifdef MH_AVX512_BF16
    __m512i first, second;
    unpack_registers(&first, &second, packed, absmax, code);
    _mm512_storeu_si512(even, first);
    _mm512_storeu_si512(odd, second);
#else
    uint16_t table[16];
    for (int c = 0; c < 16; c++) table[c] = nearest_bf16(code[c] * absmax);
    for (int i = 0; i < 32; i++) {
        even[i].bits = table[packed[i] >> 4];
        odd[i].bits = table[packed[i] & 15];
    }
#endif
}

EXPORT void mh_unpack4(int threads, bf16 *out, const uint8_t *packed, const float *absmax, const float *code,
                       int64_t n, int64_t k, int64_t block) {
    vf codes = load_fp32(code);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < n; row++)
        for (int64_t c = 0; c < k; c += Q4_RUN) {
            bf16 even[32], odd[32], *to = out + row * k + c;
            unpack_run(even, odd, packed + (row * k + c) / 2, absmax[row * (k / block) + c / block], codes);
            for (int i = 0; i < 32; i++) {
                to[2 * i] = even[i];
                to[2 * i + 1] = odd[i];
            }
        }
}

/* One token's runs in the order of the weights. */
INLINE void pack_run(bf16 *even, bf16 *odd, const bf16 *x) {
    for (int i = 0; i < 32; i++) {
        even[i] = x[2 * i];
        odd[i] = x[2 * i + 1];
    }
}

/* Without AMX: dot products over packed rows of x [tokens][k] and of the panel [Q4_ROWS][k]. */
static void quant4_panel_dots(const quant4_args *g, const quant4_matrix *m, int64_t n0, bf16 *panel) {
    int64_t rows = least(Q4_ROWS, m->n - n0), per_row = g->k / m->block;
    vf codes = load_fp32(m->code);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < g->k; c += Q4_RUN)
            unpack_run(panel + r * g->k + c, panel + r * g->k + c + 32, m->packed + ((n0 + r) * g->k + c) / 2,
                       m->absmax[(n0 + r) * per_row + c / m->block], codes);
    for (int64_t t0 = 0; t0 < g->tokens; t0 += 4) {
        int nt = (int)least(4, g->tokens - t0);
        float sums[4][Q4_ROWS];
        const bf16 *x[4], *a[4];
        for (int t = 0; t < nt; t++) x[t] = g->x_packed + (t0 + t) * g->k;
        for (int64_t r0 = 0; r0 < rows; r0 += 4) {
            int nr = (int)least(4, rows - r0);
            for (int r = 0; r < nr; r++) a[r] = panel + (r0 + r) * g->k;
            if (nt == 4 && nr == 4) shrink_tile_bf16(x, a, 0, g->k, &sums[0][r0], Q4_ROWS, 4, 4);
            else if (nt == 1 && nr == 4) shrink_tile_bf16(x, a, 0, g->k, &sums[0][r0], Q4_ROWS, 1, 4);
            else shrink_tile_bf16(x, a, 0, g->k, &sums[0][r0], Q4_ROWS, nt, nr);
        }
        for (int t = 0; t < nt; t++)
            for (int64_t r = 0; r < rows; r++) {
                float bias = m->bias ? from_bf16(m->bias[n0 + r].bits) : 0.0f;
                m->y[(t0 + t) * m->y_stride + n0 + r].bits = nearest_bf16(sums[t][r] + bias);
            }
    }
}

static void quant4_dots(const quant4_args *g) {
#pragma omp parallel num_threads(g->threads)
    {
        bf16 *panel = g->panels + omp_get_thread_num() * g->panel_size;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < g->tokens; t++)
            for (int64_t c = 0; c < g->k; c += Q4_RUN)
                pack_run(g->x_packed + t * g->k + c, g->x_packed + t * g->k + c + 32, g->x + t * g->x_stride + c);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t p = 0; p < g->panel_count; p++) {
            int64_t own = p;
            const quant4_matrix *m = find_matrix(g, &own);
            quant4_panel_dots(g, m, own * Q4_ROWS, panel);
        }
    }
}

#include "quant4_amx.h"
#include "quant4_few.h"

/* As mh_matmul, in the given ways, which need AMX. */
static int64_t matmul(int threads, int amx, const quant4_matrix *matrices, int64_t matrix_count, const bf16 *x,
                      int64_t x_stride, int64_t tokens, int64_t k, quant4_ways ways) {
    static __thread kept memory;
    int64_t token_tiles = blocks_of(tokens, 16) * 16, panel_count = 0, panel_size = Q4_ROWS * k;
#ifdef MH_AMX
    if (ways.gated) panel_size *= 2;
    if (ways.join) panel_size += ways.join->left_size;
#endif
    for (int64_t i = 0; i < matrix_count; i++) panel_count += blocks_of(matrices[i].n, Q4_ROWS);
    bf16 *scratch = kept_memory(&memory, (token_tiles * k + threads * panel_size) * (int64_t)sizeof(bf16));
    if (!scratch) return MH_NO_MEMORY;
    quant4_args g = {matrices, panel_count, x, x_stride, tokens, k, scratch, scratch + token_tiles * k, threads,
                     .panel_size = panel_size};
#ifdef MH_AVX512_BF16
    if (!ways.join && !ways.gated && !ways.x_packed && are_few(matrices, matrix_count, tokens)) {
        quant4_few(&g);
        return 0;
    }
#endif
#ifdef MH_AMX
    if (amx) {
        g.ways = ways;
        if (ways.x_packed) g.x_packed = ways.x_packed;
        quant4_tiles(&g);
        return 0;
    }
#endif
    (void)amx;
    quant4_dots(&g);
    return 0;
}

/* y = x W^T + bias for each matrix; bf16 ones need AMX. Returns 0 or MH_NO_MEMORY. */
EXPORT int64_t mh_matmul(int threads, int amx, const quant4_matrix *matrices, int64_t matrix_count, const bf16 *x,
                         int64_t x_stride, int64_t tokens, int64_t k) {
    return matmul(threads, amx, matrices, matrix_count, x, x_stride, tokens, k, (quant4_ways){0});
}
