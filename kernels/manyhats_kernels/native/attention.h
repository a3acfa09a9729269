/* Paged attention that reads the cache where it lies; included once for each storage type T.
 *
 * An item is one kv head of one sequence, up to ATTN_ROWS rows (query token x head of the group) and up to
 * ATTN_CHUNK positions, at fixed places: so a long context is split over the threads, a K or V row is
 * read once for the heads that share it, and the split depends on nobody else in the batch. A context of
 * several chunks leaves partial results (maximum, sum, weighted values), merged at the end.
 */

/* scores[j] = q . k[j] for the n <= 16 keys of one run, the rows `dim` apart. */
INLINE vf NAME(score_run)(const T *q, const T *k, int64_t dim, int64_t n) {
    vf acc[LANES];
    for (int j = 0; j < LANES; j++) acc[j] = zero();
    int64_t d = 0;
    for (; d + STEP <= dim; d += STEP) {
        PACK qv = NAME(pack)(q + d);
        for (int j = 0; j < n; j++) acc[j] = NAME(dot)(acc[j], qv, NAME(pack)(k + j * dim + d));
    }
    if (d < dim) {
        PACK qv = NAME(pack_part)(q + d, dim - d);
        for (int j = 0; j < n; j++) acc[j] = NAME(dot)(acc[j], qv, NAME(pack_part)(k + j * dim + d, dim - d));
    }
    return lanes_sum16(acc);
}

static vf NAME(score)(const T *q, const T *k, int64_t dim, int64_t n) {
    if (n < LANES) return NAME(score_run)(q, k, dim, n);
    if (dim == 64) return NAME(score_run)(q, k, 64, LANES);
    if (dim == 128) return NAME(score_run)(q, k, 128, LANES);
    return NAME(score_run)(q, k, dim, LANES);
}

/* acc[r][0:16 * nv] += sum over the run's keys of p[r][j] * v[j]. */
INLINE void NAME(weigh_run)(float *acc, const float *p, const T *v, int64_t dim, int64_t n, int nr, int nv,
                            int last) {
    vf sums[16];
    for (int r = 0; r < nr; r++)
        for (int i = 0; i < nv; i++) sums[r * nv + i] = load_fp32(acc + r * ATTN_DIM + i * LANES);
    for (int64_t j = 0; j < n; j++) {
        vf vv[4];
        for (int i = 0; i < nv; i++)
            vv[i] = last < LANES ? NAME(load_part)(v + j * dim + i * LANES, last) : LOAD(v + j * dim + i * LANES);
        for (int r = 0; r < nr; r++) {
            vf pv = splat(p[r * ATTN_CHUNK + j]);
            for (int i = 0; i < nv; i++) sums[r * nv + i] += pv * vv[i];
        }
    }
    for (int r = 0; r < nr; r++)
        for (int i = 0; i < nv; i++) store_fp32(acc + r * ATTN_DIM + i * LANES, sums[r * nv + i]);
}

static void NAME(weigh)(float *acc, const float *p, const T *v, int64_t dim, int64_t n, int rows) {
    for (int r = 0; r < rows;) {
        int nr = rows - r >= 4 ? 4 : rows - r >= 3 ? 3 : 1;
        int64_t d = 0;
#define WEIGH(NV, LAST)                                                                                   \
    do {                                                                                                  \
        float *to = acc + r * ATTN_DIM + d;                                                               \
        const float *from = p + r * ATTN_CHUNK;                                                           \
        if (nr == 4) NAME(weigh_run)(to, from, v + d, dim, n, 4, NV, LAST);                               \
        else if (nr == 3) NAME(weigh_run)(to, from, v + d, dim, n, 3, NV, LAST);                          \
        else NAME(weigh_run)(to, from, v + d, dim, n, 1, NV, LAST);                                       \
        d += (NV) * LANES;                                                                                \
    } while (0)
        while (d + 4 * LANES <= dim) WEIGH(4, LANES);
        while (d + LANES <= dim) WEIGH(1, LANES);
        if (d < dim) WEIGH(1, (int)(dim - d));
#undef WEIGH
        r += nr;
    }
}

/* Turn one row's raw scores over `padded` keys into weights, those outside [lo, hi) into 0. (A row that sees
 * nothing of this chunk gets weights of 1 and a maximum that makes them 0 when the chunks are merged.) */
INLINE void NAME(soften)(float *p, int64_t padded, int64_t lo, int64_t hi, const attn_args *g, float *max,
                         float *sum) {
    for (int64_t j = 0; j < padded; j += LANES) {
        vf s = load_fp32(p + j) * splat(g->scale);
        if (g->soft_cap > 0) s = splat(g->soft_cap) * vtanh(s * splat(1 / g->soft_cap));
        store_fp32(p + j, s);
    }
    for (int64_t j = 0; j < lo; j++) p[j] = -FLT_MAX;
    for (int64_t j = hi; j < padded; j++) p[j] = -FLT_MAX;
    vf top = splat(-FLT_MAX), total = zero();
    for (int64_t j = 0; j < padded; j += LANES) top = vmax(load_fp32(p + j), top);
    float m = -FLT_MAX;
    for (int i = 0; i < LANES; i++) m = top[i] > m ? top[i] : m;
    for (int64_t j = 0; j < padded; j += LANES) {
        vf e = exp_nonpositive(load_fp32(p + j) - splat(m));
        store_fp32(p + j, e);
    }
    for (int64_t j = 0; j < padded; j += LANES) total += load_fp32(p + j);
    *max = m;
    *sum = hi > lo ? lanes_sum(total) : 0;
}

INLINE void NAME(store_scaled)(T *out, const float *acc, float factor, int64_t dim) {
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) STORE(out + d, load_fp32(acc + d) * splat(factor));
    if (d < dim) NAME(store_part)(out + d, load_fp32(acc + d) * splat(factor), dim - d);
}

static void NAME(attend_item)(const attn_args *g, const attn_item *it) {
    float p[ATTN_ROWS * ATTN_CHUNK] __attribute__((aligned(64)));
    float acc[ATTN_ROWS * ATTN_DIM] __attribute__((aligned(64)));
    float max[ATTN_ROWS], sum[ATTN_ROWS];
    int64_t lo[ATTN_ROWS], hi[ATTN_ROWS], dim = g->dim, size = g->block_size, group = g->heads / g->kv_heads;
    int64_t first = g->query_start[it->seq], queries = g->query_start[it->seq + 1] - first;
    int64_t context = g->context_lens[it->seq], base = it->chunk * ATTN_CHUNK;
    int64_t begin = ATTN_CHUNK, end = 0;
    int rows = (int)(it->row1 - it->row0);
    const T *q[ATTN_ROWS];
    for (int r = 0; r < rows; r++) {
        int64_t token = (it->row0 + r) / group, head = it->kv_head * group + (it->row0 + r) % group;
        int64_t position = context - queries + token;
        lo[r] = g->window > 0 ? position - g->window + 1 - base : 0;
        hi[r] = least(position + 1 - base, ATTN_CHUNK);
        if (lo[r] < 0) lo[r] = 0;
        if (hi[r] < lo[r]) hi[r] = lo[r];
        if (hi[r] > lo[r]) {
            begin = least(begin, lo[r]);
            end = end > hi[r] ? end : hi[r];
        }
        q[r] = (const T *)g->q + (first + token) * g->q_token + head * g->q_head;
    }
    begin -= begin % LANES;
    const int32_t *table = g->block_tables + it->seq * g->table_width;
    for (int64_t j = begin; j < end;) {
        int64_t at = (base + j) % size, n = least(least(size - at, LANES - j % LANES), end - j);
        int64_t place = ((table[(base + j) / size] * g->kv_heads + it->kv_head) * size + at) * dim;
        const T *k = (const T *)g->k_cache + place;
        /* a block is too short a run for the processor to foresee the next one */
        fetch((const T *)g->v_cache + place, n * dim * sizeof(T));
        if (j + n < end)
            fetch((const T *)g->k_cache +
                      ((table[(base + j + n) / size] * g->kv_heads + it->kv_head) * size + (base + j + n) % size) * dim,
                  n * dim * sizeof(T));
        for (int r = 0; r < rows; r++) {
            vf s = NAME(score)(q[r], k, dim, n);
            if (n == LANES) store_fp32(p + r * ATTN_CHUNK + j, s);
            else memcpy(p + r * ATTN_CHUNK + j, &s, n * sizeof(float));
        }
        j += n;
    }
    int64_t padded = (end - begin + LANES - 1) / LANES * LANES;
    for (int r = 0; r < rows; r++) {
        float *row = p + r * ATTN_CHUNK;
        for (int64_t j = end; j < begin + padded; j++) row[j] = 0;
        if (hi[r] == lo[r]) lo[r] = hi[r] = begin;
        NAME(soften)(row + begin, padded, lo[r] - begin, hi[r] - begin, g, &max[r], &sum[r]);
    }
    memset(acc, 0, sizeof(float) * rows * ATTN_DIM);
    /* begin may have been rounded down below the window: those keys may be anyone's */
    int64_t least_lo = end;
    for (int r = 0; r < rows; r++) if (hi[r] > lo[r]) least_lo = least(least_lo, lo[r]);
    for (int64_t j = least_lo; j < end;) {
        int64_t at = (base + j) % size, n = least(size - at, end - j);
        const T *v = (const T *)g->v_cache + ((table[(base + j) / size] * g->kv_heads + it->kv_head) * size + at) * dim;
        NAME(weigh)(acc, p + j, v, dim, n, rows);
        j += n;
    }
    for (int r = 0; r < rows; r++) {
        int64_t token = (it->row0 + r) / group, head = it->kv_head * group + (it->row0 + r) % group;
        if (it->partial >= 0) {
            float *to = g->scratch + (it->partial + r) * (dim + 2);
            to[0] = max[r];
            to[1] = sum[r];
            memcpy(to + 2, acc + r * ATTN_DIM, dim * sizeof(float));
            continue;
        }
        T *out = (T *)g->out + ((first + token) * g->heads + head) * dim;
        NAME(store_scaled)(out, acc + r * ATTN_DIM, 1.0f / sum[r], dim);
    }
}

/* Merge the partial results of one item's chunks. */
static void NAME(attend_merge)(const attn_args *g, const attn_item *it, int64_t chunks) {
    int64_t dim = g->dim, group = g->heads / g->kv_heads, rows = it->row1 - it->row0;
    int64_t first = g->query_start[it->seq];
    for (int64_t r = 0; r < rows; r++) {
        const float *from = g->scratch + (it->partial + r) * (dim + 2);
        int64_t step = rows * (dim + 2), token = (it->row0 + r) / group;
        float max = -FLT_MAX, sum = 0, weight[LANES], acc[ATTN_DIM] __attribute__((aligned(64))) = {0};
        for (int64_t c = 0; c < chunks; c++) max = from[c * step] > max ? from[c * step] : max;
        for (int64_t c = 0; c < chunks; c++) {
            store_fp32(weight, exp_nonpositive(splat(from[c * step] - max)));
            sum += weight[0] * from[c * step + 1];
            for (int64_t d = 0; d < dim; d++) acc[d] += weight[0] * from[c * step + 2 + d];
        }
        T *out = (T *)g->out + ((first + token) * g->heads + it->kv_head * group + (it->row0 + r) % group) * dim;
        NAME(store_scaled)(out, acc, 1.0f / sum, dim);
    }
}

static void NAME(attend_run)(const attn_args *g) {
#pragma omp parallel num_threads(g->threads)
    {
#pragma omp for schedule(dynamic, g->grain)
        for (int64_t i = 0; i < g->item_count; i++) NAME(attend_item)(g, &g->items[i]);
        if (g->merge_count) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < g->merge_count; i++)
                NAME(attend_merge)(g, &g->items[g->merges[i].item], g->merges[i].chunks);
        }
    }
}
