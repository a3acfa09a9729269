/* The entry points of parts.h. */

EXPORT void mh_scale_rows(int dtype, int threads, void *y, int64_t y_stride, const void *scale,
                          int64_t scale_stride, int64_t out, const int32_t *order, const int32_t *slots,
                          int64_t tokens) {
    if (dtype == 0) scale_run_bf16(y, y_stride, scale, scale_stride, out, order, slots, tokens, threads);
    else if (dtype == 1) scale_run_fp16(y, y_stride, scale, scale_stride, out, order, slots, tokens, threads);
    else scale_run_fp32(y, y_stride, scale, scale_stride, out, order, slots, tokens, threads);
}

EXPORT void mh_norm_rows(int dtype, int threads, void *y, int64_t y_stride, const void *x, int64_t x_stride,
                         const void *gain, int64_t gain_stride, const int32_t *has, const void *shift, int64_t n,
                         float eps, int centered, const int32_t *order, const int32_t *slots, int64_t tokens) {
    norm_args g = {y, x, gain, shift, y_stride, x_stride, gain_stride, n, tokens, has, order, slots, eps,
                   centered, threads};
    if (dtype == 0) norm_run_bf16(&g);
    else if (dtype == 1) norm_run_fp16(&g);
    else norm_run_fp32(&g);
}

EXPORT int64_t mh_bottleneck_add(int dtype, int threads, void *y, int64_t y_stride, const void *x, int64_t x_stride,
                                 const void *down, int64_t down_stride, const void *up, int64_t up_stride,
                                 const float *down_bias, int64_t in, int64_t out, int64_t pool_rows,
                                 const int32_t *start, const int32_t *count, const int32_t *kinds,
                                 const int32_t *token_slots, const int32_t *order, const int32_t *slots,
                                 const int32_t *offsets, int64_t segment_count) {
    int64_t n = 0, shrunk = 0, failed = 0;
    for (int64_t i = 0; i < segment_count; i++) {
        int64_t first = start[slots[i]], rows = count[slots[i]];
        if (rows < 0 || (rows > 0 && (first < 0 || first + rows > pool_rows))) return i + 1;
        shrunk += rows * (offsets[i + 1] - offsets[i]);
    }
    if (shrunk == 0) return 0;
    lora_site site = {y, y_stride, down, up, down_stride, up_stride, out, pool_rows, start, count};
    lora_segment *segments = malloc(segment_count * sizeof *segments);
    float *scratch = malloc(shrunk * sizeof *scratch);
    if (!segments || !scratch) failed = MH_NO_MEMORY;
    shrunk = 0;
    for (int64_t i = 0; !failed && i < segment_count; i++) {
        int64_t first = start[slots[i]], rows = count[slots[i]], tokens = offsets[i + 1] - offsets[i];
        if (rows == 0) continue;
        segments[n++] = (lora_segment){&site, offsets[i], tokens, first, rows, shrunk, 0, 0};
        shrunk += tokens * rows;
    }
    if (!failed) {
        if (shrunk * (in + out) < LORA_SERIAL) threads = 1;
        lora_args g = {.x = x, .x_stride = x_stride, .in = in, .order = order, .segments = segments,
                       .scratch = scratch, .segment_count = n, .threads = threads};
        plan_items(&g, segments);
        if (dtype == 0) bottleneck_run_bf16(&g, down_bias, kinds, token_slots);
        else if (dtype == 1) bottleneck_run_fp16(&g, down_bias, kinds, token_slots);
        else bottleneck_run_fp32(&g, down_bias, kinds, token_slots);
    }
    free(segments);
    free(scratch);
    return failed;
}
