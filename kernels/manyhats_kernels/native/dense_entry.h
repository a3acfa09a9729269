/* The entry points of dense.h. */
#define DENSE_SERIAL 8192 /* elements below which waking the other threads costs more than it saves */

EXPORT void mh_rms_norm(int dtype, int threads, void *y, const void *x, int64_t x_stride, const void *weight,
                        int64_t n, float eps, int64_t tokens) {
    if (tokens * n < DENSE_SERIAL) threads = 1;
    if (dtype == 0) rms_norm_run_bf16(y, x, x_stride, weight, n, eps, tokens, threads);
    else if (dtype == 1) rms_norm_run_fp16(y, x, x_stride, weight, n, eps, tokens, threads);
    else rms_norm_run_fp32(y, x, x_stride, weight, n, eps, tokens, threads);
}

EXPORT void mh_silu_mul(int dtype, int threads, void *y, const void *gate, int64_t gate_stride, const void *up,
                        int64_t up_stride, int64_t n, int64_t tokens) {
    if (tokens * n < DENSE_SERIAL) threads = 1;
    if (dtype == 0) silu_mul_run_bf16(y, gate, gate_stride, up, up_stride, n, tokens, threads);
    else if (dtype == 1) silu_mul_run_fp16(y, gate, gate_stride, up, up_stride, n, tokens, threads);
    else silu_mul_run_fp32(y, gate, gate_stride, up, up_stride, n, tokens, threads);
}
