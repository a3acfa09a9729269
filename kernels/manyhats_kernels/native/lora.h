/* The low-rank product of many adapters in one pass; included once for each storage type T.
 *
 * First every (segment, tokens, rank rows) item of the shrink, then every (segment, tokens, columns) item
 * of the expand, in one parallel region with a barrier between. A row of A and a row of B are read once
 * for up to LORA_TOKENS tokens. Each number is summed in an order that depends on the shapes of its own
 * token and adapter alone: who shares the batch changes no bit.
 */

#define TILE_TOKENS 4
#define TILE_ROWS 4

/* s[t][r] = x[t] . a[r] for nt <= 4 tokens and nr <= 4 rows. */
INLINE void NAME(shrink_tile)(const T *const *x, const T *const *a, int64_t ahead, int64_t in, float *s, int64_t count,
                              int nt, int nr) {
    vf acc[TILE_TOKENS * TILE_ROWS];
    for (int i = 0; i < TILE_TOKENS * TILE_ROWS; i++) acc[i] = zero();
    int64_t k = 0;
    for (; k + STEP <= in; k += STEP) {
        PACK av[TILE_ROWS];
        for (int r = 0; r < nr; r++) {
            av[r] = NAME(pack)(a[r] + k);
            __builtin_prefetch(a[r] + k + ahead);
        }
        for (int t = 0; t < nt; t++) {
            PACK xv = NAME(pack)(x[t] + k);
            for (int r = 0; r < nr; r++) acc[t * TILE_ROWS + r] = NAME(dot)(acc[t * TILE_ROWS + r], xv, av[r]);
        }
    }
    if (k < in)
        for (int t = 0; t < nt; t++) {
            PACK xv = NAME(pack_part)(x[t] + k, in - k);
            for (int r = 0; r < nr; r++)
                acc[t * TILE_ROWS + r] =
                    NAME(dot)(acc[t * TILE_ROWS + r], xv, NAME(pack_part)(a[r] + k, in - k));
        }
    if (nt == TILE_TOKENS && nr == TILE_ROWS) {
        vf sums = lanes_sum16(acc);
        for (int t = 0; t < nt; t++) memcpy(s + t * count, (const float *)&sums + t * TILE_ROWS, 16);
        return;
    }
    for (int t = 0; t < nt; t++)
        for (int r = 0; r < nr; r++) s[t * count + r] = lanes_sum(acc[t * TILE_ROWS + r]);
}

static void NAME(shrink)(const lora_args *g, const lora_segment *seg, int64_t t0, int64_t t1, int64_t r0,
                         int64_t r1) {
    const T *x[TILE_TOKENS], *a[TILE_ROWS];
    int nr = (int)(r1 - r0);
    const lora_site *site = seg->site;
    for (int r = 0; r < nr; r++) a[r] = (const T *)site->a + (seg->start + r0 + r) * site->a_stride;
    for (int64_t t = t0; t < t1; t += TILE_TOKENS) {
        int nt = (int)(t1 - t < TILE_TOKENS ? t1 - t : TILE_TOKENS);
        float *s = g->scratch + seg->scratch + t * seg->count + r0;
        for (int i = 0; i < nt; i++) x[i] = (const T *)g->x + g->order[seg->begin + t + i] * g->x_stride;
        if (nr == TILE_ROWS) {
            if (nt == 1) NAME(shrink_tile)(x, a, TILE_ROWS * site->a_stride, g->in, s, seg->count, 1, TILE_ROWS);
            else if (nt == TILE_TOKENS) NAME(shrink_tile)(x, a, TILE_ROWS * site->a_stride, g->in, s, seg->count, TILE_TOKENS, TILE_ROWS);
            else NAME(shrink_tile)(x, a, TILE_ROWS * site->a_stride, g->in, s, seg->count, nt, TILE_ROWS);
        } else
            NAME(shrink_tile)(x, a, TILE_ROWS * site->a_stride, g->in, s, seg->count, nt, nr);
    }
}

/* y[t][0:16 * nv] += s[t] . b[:, 0:16 * nv] for nt tokens; the last vector holds `last` <= 16 columns. */
INLINE void NAME(expand_tile)(T *const *y, const float *s, const T *b, int64_t b_stride, int64_t count,
                              int64_t ahead, int nt, int nv, int last) {
    vf acc[16];
    for (int i = 0; i < nt * nv; i++) acc[i] = zero();
    for (int64_t r = 0; r < count; r++) {
        const T *row = b + r * b_stride;
        if (ahead) for (int v = 0; v < nv; v += 64 / (int)sizeof(T) / LANES) __builtin_prefetch(row + ahead + v * LANES);
        vf bv[16];
        for (int v = 0; v < nv; v++)
            bv[v] = v == nv - 1 && last < LANES ? NAME(load_part)(row + v * LANES, last) : LOAD(row + v * LANES);
        for (int t = 0; t < nt; t++) {
            vf sv = splat(s[t * count + r]);
            for (int v = 0; v < nv; v++) acc[t * nv + v] += sv * bv[v];
        }
    }
    for (int t = 0; t < nt; t++)
        for (int v = 0; v < nv; v++) {
            T *at = y[t] + v * LANES;
            if (v == nv - 1 && last < LANES) NAME(store_part)(at, NAME(load_part)(at, last) + acc[t * nv + v], last);
            else STORE(at, LOAD(at) + acc[t * nv + v]);
        }
}

static void NAME(expand)(const lora_args *g, const lora_segment *seg, int64_t t0, int64_t t1, int64_t c0,
                         int64_t c1) {
    const lora_site *site = seg->site;
    const T *b = (const T *)site->b + seg->start * site->b_stride;
    T *y[TILE_TOKENS];
    for (int64_t t = t0; t < t1;) {
        int nt = t1 - t >= TILE_TOKENS ? TILE_TOKENS : 1;
        int64_t c = c0;
        const float *s = g->scratch + seg->scratch + t * seg->count;
        for (int i = 0; i < nt; i++) y[i] = (T *)site->y + g->order[seg->begin + t + i] * site->y_stride + c;
#define EXPAND(NT, NV, LAST)                                                                              \
    do {                                                                                                  \
        NAME(expand_tile)(y, s, b + c, site->b_stride, seg->count, (NT) == 1 ? LORA_COLUMNS : 0, NT, NV, LAST);                            \
        c += (NV) * LANES;                                                                                \
        for (int i = 0; i < NT; i++) y[i] += (NV) * LANES;                                                \
    } while (0)
        if (nt == 1) {
            while (c + 16 * LANES <= c1) EXPAND(1, 16, LANES);
            while (c + 4 * LANES <= c1) EXPAND(1, 4, LANES);
            while (c + LANES <= c1) EXPAND(1, 1, LANES);
            if (c < c1) EXPAND(1, 1, (int)(c1 - c));
        } else {
            while (c + 4 * LANES <= c1) EXPAND(TILE_TOKENS, 4, LANES);
            while (c + LANES <= c1) EXPAND(TILE_TOKENS, 1, LANES);
            if (c < c1) EXPAND(TILE_TOKENS, 1, (int)(c1 - c));
        }
#undef EXPAND
        t += nt;
    }
}

static void NAME(lora_run)(const lora_args *g) {
#pragma omp parallel num_threads(g->threads)
    {
#pragma omp for schedule(dynamic, g->shrink_grain)
        for (int64_t item = 0; item < g->shrink_items; item++) {
            const lora_segment *seg = find_segment(g, item, 0);
            int64_t i = item - seg->shrink_first, blocks = (seg->count + TILE_ROWS - 1) / TILE_ROWS;
            int64_t t0 = i / blocks * g->token_step, r0 = i % blocks * TILE_ROWS;
            NAME(shrink)(g, seg, t0, least(t0 + g->token_step, seg->tokens), r0, least(r0 + TILE_ROWS, seg->count));
        }
#pragma omp for schedule(dynamic, g->expand_grain)
        for (int64_t item = 0; item < g->expand_items; item++) {
            const lora_segment *seg = find_segment(g, item, 1);
            int64_t out = seg->site->out;
            int64_t i = item - seg->expand_first, blocks = blocks_of(out, g->column_step);
            int64_t t0 = i / blocks * LORA_TOKENS, c0 = i % blocks * g->column_step;
            NAME(expand)(g, seg, t0, least(t0 + LORA_TOKENS, seg->tokens), c0, least(c0 + g->column_step, out));
        }
    }
}

INLINE void NAME(bias_row)(T *row, const T *own, int64_t n) {
    int64_t c = 0;
    for (; c + LANES <= n; c += LANES) STORE(row + c, LOAD(row + c) + LOAD(own + c));
    if (c < n) NAME(store_part)(row + c, NAME(load_part)(row + c, n - c) + NAME(load_part)(own + c, n - c), n - c);
}

static void NAME(bias_run)(T *y, int64_t y_stride, const T *bias, int64_t bias_stride, int64_t out,
                           const int32_t *order, const int32_t *slots, int64_t tokens, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < tokens; i++)
        NAME(bias_row)(y + order[i] * y_stride, bias + slots[order[i]] * bias_stride, out);
}

#undef TILE_TOKENS
#undef TILE_ROWS
