/* The base's products of one x and the adapters' low-rank ones, in one call. */
#ifdef MH_AMX
static int64_t longest_segment(const int32_t *offsets, int64_t segment_count) {
    int64_t most = 0;
    for (int64_t i = 0; i < segment_count; i++)
        if (offsets[i + 1] - offsets[i] > most) most = offsets[i + 1] - offsets[i];
    return most;
}

/* The low-rank products of the long segments within the base's; those of the others behind it. */
static int64_t project_joined(int threads, const quant4_matrix *matrices, const lora_site *sites, int64_t count,
                              const bf16 *x, int64_t x_stride, int64_t tokens, int64_t k, const int32_t *order,
                              const int32_t *slots, const int32_t *offsets, int64_t segment_count,
                              quant4_ways ways) {
    lora_need need = {0};
    lora_args g = {.x = x, .x_stride = x_stride, .in = k, .order = order, .threads = threads, .amx = 1,
                   .join_tokens = JOIN_TOKENS};
    lora_join join = {.lora = &g, .sites = sites, .site_count = count, .token_tiles = blocks_of(tokens, 16)};
    int64_t failed = lora_begin(&g, &need, sites, count, slots, offsets, segment_count);
    if (!failed && g.segment_count) failed = join_begin(&join);
    if (failed) return failed;
    plan_items(&g, (lora_segment *)g.segments);
    if (join.tile_count) ways.join = &join;
    failed = matmul(threads, 1, matrices, count, x, x_stride, tokens, k, ways);
    if (!failed && g.shrink_items) lora_run_tiles(&g, NULL, NULL, NULL);
    return failed;
}
#endif

/* As mh_project, in the given ways. */
static int64_t project_ways(int threads, int amx, const quant4_matrix *matrices, const lora_site *sites, int64_t count,
                            const bf16 *x, int64_t x_stride, int64_t tokens, int64_t k, const int32_t *order,
                            const int32_t *slots, const int32_t *offsets, int64_t segment_count, quant4_ways ways) {
#ifdef MH_AMX
    if (amx && sites && longest_segment(offsets, segment_count) >= JOIN_TOKENS)
        return project_joined(threads, matrices, sites, count, x, x_stride, tokens, k, order, slots, offsets,
                              segment_count, ways);
#endif
    int64_t failed = matmul(threads, amx, matrices, count, x, x_stride, tokens, k, ways);
    if (failed || !sites || !segment_count) return failed;
    return mh_lora_add(0, amx, threads, sites, count, x, x_stride, k, order, slots, offsets, segment_count);
}

/* y = x W^T + bias + (x A^T) B for each of `count` matrices and, unless absent, sites. Without AMX, and for segments of
 * fewer than JOIN_TOKENS tokens, as mh_matmul and then mh_lora_add, to the bit; else rounded once. Returns what they do. */
EXPORT int64_t mh_project(int threads, int amx, const quant4_matrix *matrices, const lora_site *sites, int64_t count,
                          const bf16 *x, int64_t x_stride, int64_t tokens, int64_t k, const int32_t *order,
                          const int32_t *slots, const int32_t *offsets, int64_t segment_count) {
    return project_ways(threads, amx, matrices, sites, count, x, x_stride, tokens, k, order, slots, offsets,
                        segment_count, (quant4_ways){0});
}
