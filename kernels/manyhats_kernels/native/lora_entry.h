/* The plan of work items of lora.h, lora_amx.h and the bottlenecks of parts.h, and their entry points. */

/* Numbers the work items of the segments, whose other fields are set. */
static void plan_items(lora_args *g, lora_segment *segments) {
    int64_t few = 0, row_step = g->amx ? 16 : 4;
    for (int64_t i = 0; i < g->segment_count; i++)
        few += blocks_of(segments[i].tokens, LORA_TOKENS) * blocks_of(segments[i].site->out, LORA_COLUMNS);
    int small = few < g->threads * LORA_MANY;
    g->token_step = g->amx ? 16 : small ? LORA_TOKENS / 4 : LORA_TOKENS;
    g->column_step = !small ? LORA_COLUMNS : g->amx ? LORA_COLUMNS / 2 : LORA_COLUMNS / 4;
    g->shrink_items = g->expand_items = 0;
    for (int64_t i = 0; i < g->segment_count; i++) {
        int64_t tokens = blocks_of(segments[i].tokens, g->token_step);
        segments[i].shrink_first = g->shrink_items;
        segments[i].expand_first = g->expand_items;
        if (segments[i].joins) continue; /* part of the base's product */
        g->shrink_items += tokens * blocks_of(segments[i].count, row_step);
        g->expand_items += blocks_of(segments[i].tokens, LORA_TOKENS) * blocks_of(segments[i].site->out, g->column_step);
    }
    g->shrink_grain = 1 + g->shrink_items / (g->threads * 16);
    g->expand_grain = 1 + g->expand_items / (g->threads * 16);
}

typedef struct { int64_t shrunk, packed, halves, chunks, cost; } lora_need; /* of memory, in elements, and time */

/* The segments that own rows, into `segments`, and the tiles of tokens to pack, into `packs`, for each of `sites`.
 * Returns 0 or 1 + the number of the one whose rows lie outside. */
static int64_t find_segments(lora_args *g, lora_segment *segments, lora_pack_item *packs, const lora_site *sites,
                             int64_t site_count, const int32_t *slots, const int32_t *offsets, int64_t segment_count,
                             lora_need *need) {
    for (int64_t at = 0; at < segment_count; at++) { /* the sites of a segment share its packed tokens */
        int64_t tokens = offsets[at + 1] - offsets[at], packed = -1;
        for (int64_t i = 0; i < site_count; i++) {
            const lora_site *site = &sites[i];
            int64_t first = site->start[slots[at]], rows = site->count[slots[at]];
            if (rows == 0) continue;
            if (rows < 0 || first < 0 || first + rows > site->pool_rows) return i * segment_count + at + 1;
            lora_segment *own = &segments[g->segment_count++];
            *own = (lora_segment){site, offsets[at], tokens, first, rows, need->shrunk, packed, need->halves, 0, 0, 0, 0};
            if (g->join_tokens && tokens >= g->join_tokens) continue;
            need->shrunk += tokens * rows;
            if (!g->amx) {
                need->cost += tokens * rows * (g->in + site->out);
                continue;
            }
            if (packed < 0) {
                own->packed = packed = need->packed;
                for (int64_t t = 0; t + 1 < tokens; t += 16, need->packed += 16 * g->packed_width)
                    packs[g->pack_items++] = (lora_pack_item){own, t};
            }
#ifdef MH_AMX
            need->halves += 2 * tokens * lora_width(rows);
#endif
            int64_t chunks = blocks_of(rows, LORA_CHUNK);
            if (chunks > need->chunks) need->chunks = chunks;
            need->cost += 2 * rows * (g->in + site->out) + tokens * site->out;
        }
    }
    return 0;
}

/* Finds the segments of g, whose x is set, and their memory, which the calling thread keeps. 0, MH_NO_MEMORY, or what
 * find_segments says. */
static int64_t lora_begin(lora_args *g, lora_need *need, const lora_site *sites, int64_t site_count,
                          const int32_t *slots, const int32_t *offsets, int64_t segment_count) {
    static __thread kept tables, numbers;
    int64_t most = site_count * segment_count, tokens = segment_count ? offsets[segment_count] : 0;
    char *table = kept_memory(&tables, most * (int64_t)sizeof(lora_segment) +
                                           (tokens / 16 + segment_count) * (int64_t)sizeof(lora_pack_item));
    if (most && !table) return MH_NO_MEMORY;
    lora_segment *segments = (lora_segment *)table;
    lora_pack_item *packs = (lora_pack_item *)(segments + most);
    g->segments = segments;
    g->packs = packs;
    g->packed_width = blocks_of(g->in, 32) * 32;
    int64_t failed = find_segments(g, segments, packs, sites, site_count, slots, offsets, segment_count, need);
    if (failed || !g->segment_count) return failed;
    g->panel_size = need->chunks * LORA_CHUNK * LORA_COLUMNS;
    int64_t halves = g->amx ? need->packed + need->halves + g->threads * g->panel_size : 0;
    int64_t bytes = halves * (int64_t)sizeof(bf16) + need->shrunk * (int64_t)sizeof(float);
    char *memory = kept_memory(&numbers, bytes + 1); /* none where all are joined */
    if (!memory) return MH_NO_MEMORY;
    g->packed = (bf16 *)memory;
    g->panels = g->packed + need->packed;
    g->halves = g->panels + g->threads * g->panel_size;
    g->scratch = (float *)(g->packed + halves);
    return 0;
}

/* y += (x A^T) B at every site; with `kinds`, y += act(x A^T + bias) B at the only one. */
static int64_t lora_do(int dtype, int amx, int threads, const lora_site *sites, int64_t site_count, const void *x,
                       int64_t x_stride, int64_t in, const int32_t *order, const int32_t *slots,
                       const int32_t *offsets, int64_t segment_count, const float *bias, const int32_t *kinds,
                       const int32_t *token_slots) {
    lora_need need = {0};
    lora_args g = {.x = x, .x_stride = x_stride, .in = in, .order = order, .threads = threads, .amx = amx && dtype == 0};
    int64_t failed = lora_begin(&g, &need, sites, site_count, slots, offsets, segment_count);
    if (failed || !g.segment_count) return failed;
    if (need.cost < (g.amx ? LORA_TILES_SERIAL : LORA_SERIAL)) g.threads = 1;
    plan_items(&g, (lora_segment *)g.segments);
#ifdef MH_AMX
    if (g.amx) {
        lora_run_tiles(&g, bias, kinds, token_slots);
        return 0;
    }
#endif
    if (kinds) {
        if (dtype == 0) bottleneck_run_bf16(&g, bias, kinds, token_slots);
        else if (dtype == 1) bottleneck_run_fp16(&g, bias, kinds, token_slots);
        else bottleneck_run_fp32(&g, bias, kinds, token_slots);
    } else if (dtype == 0) lora_run_bf16(&g);
    else if (dtype == 1) lora_run_fp16(&g);
    else lora_run_fp32(&g);
    return 0;
}

EXPORT int64_t mh_lora_add(int dtype, int amx, int threads, const lora_site *sites, int64_t site_count, const void *x,
                           int64_t x_stride, int64_t in, const int32_t *order, const int32_t *slots,
                           const int32_t *offsets, int64_t segment_count) {
    return lora_do(dtype, amx, threads, sites, site_count, x, x_stride, in, order, slots, offsets, segment_count, NULL,
                   NULL, NULL);
}

EXPORT int64_t mh_bottleneck_add(int dtype, int amx, int threads, void *y, int64_t y_stride, const void *x,
                                 int64_t x_stride, const void *down, int64_t down_stride, const void *up,
                                 int64_t up_stride, const float *down_bias, int64_t in, int64_t out,
                                 int64_t pool_rows, const int32_t *start, const int32_t *count, const int32_t *kinds,
                                 const int32_t *token_slots, const int32_t *order, const int32_t *slots,
                                 const int32_t *offsets, int64_t segment_count) {
    lora_site site = {y, y_stride, down, up, down_stride, up_stride, out, pool_rows, start, count};
    return lora_do(dtype, amx, threads, &site, 1, x, x_stride, in, order, slots, offsets, segment_count, down_bias,
                   kinds, token_slots);
}

EXPORT void mh_bias_add(int dtype, int threads, void *y, int64_t y_stride, const void *bias, int64_t bias_stride,
                        int64_t out, const int32_t *order, const int32_t *slots, int64_t tokens) {
    if (dtype == 0) bias_run_bf16(y, y_stride, bias, bias_stride, out, order, slots, tokens, threads);
    else if (dtype == 1) bias_run_fp16(y, y_stride, bias, bias_stride, out, order, slots, tokens, threads);
    else bias_run_fp32(y, y_stride, bias, bias_stride, out, order, slots, tokens, threads);
}
