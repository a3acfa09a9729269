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
