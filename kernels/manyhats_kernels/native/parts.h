/* Parts other than the low-rank product: scales, gains of norms, bottlenecks; included once for each
 * storage type T, after lora.h. As there, who shares the batch changes no bit of a token's result.
 */

INLINE void NAME(scale_row)(T *row, const T *own, int64_t n) {
    int64_t c = 0;
    for (; c + LANES <= n; c += LANES) STORE(row + c, LOAD(row + c) * LOAD(own + c));
    if (c < n) NAME(store_part)(row + c, NAME(load_part)(row + c, n - c) * NAME(load_part)(own + c, n - c), n - c);
}

static void NAME(scale_run)(T *y, int64_t y_stride, const T *scale, int64_t scale_stride, int64_t out,
                            const int32_t *order, const int32_t *slots, int64_t tokens, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < tokens; i++)
        NAME(scale_row)(y + order[i] * y_stride, scale + slots[order[i]] * scale_stride, out);
}

/* The last vector of a row, with zeros behind its end. */
INLINE vf NAME(load_upto)(const T *p, int64_t c, int64_t n) {
    return c + LANES <= n ? LOAD(p + c) : NAME(load_part)(p + c, n - c);
}

static void NAME(norm_row)(const norm_args *g, const T *x, T *y, const T *gain) {
    float mean = 0.0f;
    if (g->centered) {
        vf sum = zero();
        for (int64_t c = 0; c < g->n; c += LANES) sum += NAME(load_upto)(x, c, g->n);
        mean = lanes_sum(sum) / (float)g->n;
    }
    vf squares = zero();
    int64_t c = 0;
    for (; c + LANES <= g->n; c += LANES) {
        vf d = LOAD(x + c) - splat(mean);
        squares += d * d;
    }
    float rest = 0.0f;
    if (c < g->n) {
        vf last = NAME(load_part)(x + c, g->n - c);
        for (int64_t i = 0; i < g->n - c; i++) rest += (last[i] - mean) * (last[i] - mean);
    }
    vf factor = splat(1.0f / sqrtf((lanes_sum(squares) + rest) / (float)g->n + g->eps));
    const T *shift = g->shift;
    for (c = 0; c < g->n; c += LANES) {
        vf v = (NAME(load_upto)(x, c, g->n) - splat(mean)) * factor * NAME(load_upto)(gain, c, g->n);
        if (shift) v += NAME(load_upto)(shift, c, g->n);
        if (c + LANES <= g->n) STORE(y + c, v);
        else NAME(store_part)(y + c, v, g->n - c);
    }
}

static void NAME(norm_run)(const norm_args *g) {
#pragma omp parallel for num_threads(g->threads)
    for (int64_t i = 0; i < g->tokens; i++) {
        int64_t t = g->order[i], slot = g->slots[t];
        if (g->has[slot])
            NAME(norm_row)(g, (const T *)g->x + t * g->x_stride, (T *)g->y + t * g->y_stride,
                           (const T *)g->gain + slot * g->gain_stride);
    }
}

/* As lora_run, with the function between the two products (see activate). */
static void NAME(bottleneck_run)(const lora_args *g, const float *bias, const int32_t *kinds, const int32_t *slots) {
#pragma omp parallel num_threads(g->threads)
    {
#pragma omp for schedule(dynamic, g->shrink_grain)
        for (int64_t item = 0; item < g->shrink_items; item++) {
            const lora_segment *seg = find_segment(g, item, 0);
            int64_t i = item - seg->shrink_first, blocks = blocks_of(seg->count, 4);
            int64_t t0 = i / blocks * g->token_step, r0 = i % blocks * 4;
            NAME(shrink)(g, seg, t0, least(t0 + g->token_step, seg->tokens), r0, least(r0 + 4, seg->count));
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < g->segment_count; i++) activate_segment(g, &g->segments[i], bias, kinds, slots);
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
