/* Operations of the base model itself that PyTorch takes several passes for; included once for each storage
 * type T. Values are rounded to T wherever transformers rounds them. */

INLINE vf NAME(rounded)(vf v) {
    T whole[LANES];
    STORE(whole, v);
    return LOAD(whole);
}

INLINE void NAME(rms_norm_row)(T *to, const T *row, const T *weight, int64_t n, float eps) {
    vf squares = zero();
    for (int64_t c = 0; c < n; c += LANES) {
        vf v = NAME(load_upto)(row, c, n);
        squares += v * v;
    }
    vf factor = splat(1.0f / sqrtf(lanes_sum(squares) / (float)n + eps));
    for (int64_t c = 0; c < n; c += LANES) {
        vf v = NAME(rounded)(NAME(load_upto)(row, c, n) * factor) * NAME(load_upto)(weight, c, n);
        if (c + LANES <= n) STORE(to + c, v);
        else NAME(store_part)(to + c, v, n - c);
    }
}

static void NAME(rms_norm_run)(T *y, const T *x, int64_t x_stride, const T *weight, int64_t n, float eps,
                               int64_t tokens, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < tokens; t++) NAME(rms_norm_row)(y + t * n, x + t * x_stride, weight, n, eps);
}

/* silu(g) = g / (1 + exp(-g)), without an exponential of anything positive. */
INLINE vf NAME(silu)(vf g) {
    vf e = exp_nonpositive((vf)((vu32)g | 0x80000000u));
    return g * pick((vi32)(g < zero()), e, splat(1.0f)) / (splat(1.0f) + e);
}

static void NAME(silu_mul_run)(T *y, const T *gate, int64_t gate_stride, const T *up, int64_t up_stride, int64_t n,
                               int64_t tokens, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < tokens; t++) {
        const T *g = gate + t * gate_stride, *u = up + t * up_stride;
        T *to = y + t * n;
        for (int64_t c = 0; c < n; c += LANES) {
            vf v = NAME(rounded)(NAME(silu)(NAME(load_upto)(g, c, n))) * NAME(load_upto)(u, c, n);
            if (c + LANES <= n) STORE(to + c, v);
            else NAME(store_part)(to + c, v, n - c);
        }
    }
}
