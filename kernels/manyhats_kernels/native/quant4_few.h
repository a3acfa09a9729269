/* Products of 4-bit weights with a handful of tokens: dot products straight from the unpacked registers. Tiles would
 * be nearly empty then, and a panel's way through the cache costs more than all of the arithmetic.
 */
#define Q4_FEW 3 /* tokens at most: at four the tiles are as quick */

#ifdef MH_AVX512_BF16
/* Four outputs' sums with `tokens` tokens, over all of k. x: packed rows [tokens][k]. */
INLINE void few_outputs(const quant4_args *g, const quant4_matrix *m, int64_t n0, int tokens, float (*sums)[Q4_FEW]) {
    int64_t per_row = g->k / m->block;
    vf codes = load_fp32(m->code);
    __m512 sum[4][Q4_FEW];
    for (int r = 0; r < 4; r++)
        for (int t = 0; t < tokens; t++) sum[r][t] = _mm512_setzero_ps();
    const uint8_t *packed = m->packed + n0 * g->k / 2;
    const float *absmax = m->absmax + n0 * per_row;
    for (int64_t c = 0; c < g->k; c += Q4_RUN) {
        __m512bh even[Q4_FEW], odd[Q4_FEW];
        for (int t = 0; t < tokens; t++) {
            even[t] = (__m512bh)_mm512_loadu_si512(g->x_packed + t * g->k + c);
            odd[t] = (__m512bh)_mm512_loadu_si512(g->x_packed + t * g->k + c + 32);
        }
        for (int r = 0; r < 4; r++) {
            __m512i high, low;
            if (c % 128 == 0) __builtin_prefetch(packed + ((r + 4) * g->k + c) / 2); /* the next four outputs */
            unpack_registers(&high, &low, packed + (r * g->k + c) / 2, absmax[r * per_row + c / m->block], codes);
            for (int t = 0; t < tokens; t++) {
                sum[r][t] = _mm512_dpbf16_ps(sum[r][t], even[t], (__m512bh)high);
                sum[r][t] = _mm512_dpbf16_ps(sum[r][t], odd[t], (__m512bh)low);
            }
        }
    }
    for (int r = 0; r < 4; r++)
        for (int t = 0; t < tokens; t++) sums[r][t] = _mm512_reduce_add_ps(sum[r][t]);
}

INLINE void few_panel(const quant4_args *g, const quant4_matrix *m, int64_t n0, int tokens) {
    int64_t end = least(n0 + Q4_ROWS, m->n);
    for (; n0 < end; n0 += 4) {
        float sums[4][Q4_FEW];
        int64_t first = least(n0, m->n - 4); /* the last ones may come twice */
        few_outputs(g, m, first, tokens, sums);
        for (int r = 0; r < 4; r++) {
            float bias = m->bias ? from_bf16(m->bias[first + r].bits) : 0.0f;
            for (int t = 0; t < tokens; t++)
                m->y[t * m->y_stride + first + r].bits = nearest_bf16(sums[r][t] + bias);
        }
    }
}

/* Whether quant4_few does these products. */
INLINE int are_few(const quant4_matrix *matrices, int64_t count, int64_t tokens) {
    for (int64_t i = 0; i < count; i++)
        if (!matrices[i].absmax || matrices[i].n < 4) return 0;
    return tokens <= Q4_FEW;
}

static void quant4_few(const quant4_args *g) {
    for (int64_t t = 0; t < g->tokens; t++)
        for (int64_t c = 0; c < g->k; c += Q4_RUN)
            pack_run(g->x_packed + t * g->k + c, g->x_packed + t * g->k + c + 32, g->x + t * g->x_stride + c);
#pragma omp parallel for num_threads(g->threads) schedule(dynamic, 1)
    for (int64_t p = 0; p < g->panel_count; p++) {
        int64_t own = p;
        const quant4_matrix *m = find_matrix(g, &own);
        if (g->tokens == 1) few_panel(g, m, own * Q4_ROWS, 1);
        else if (g->tokens == 2) few_panel(g, m, own * Q4_ROWS, 2);
        else few_panel(g, m, own * Q4_ROWS, 3);
    }
}
#endif
