/* What parts.h needs once for all storage types. */
#include <math.h>

typedef struct {
    void *y;
    const void *x, *gain, *shift;
    int64_t y_stride, x_stride, gain_stride, n, tokens;
    const int32_t *has, *order, *slots;
    float eps;
    int centered, threads;
} norm_args;

#define MH_GATED 256

static float activation(float v, int32_t which) {
    switch (which) {
    case 0: return v > 0.0f || v != v ? v : 0.0f;
    case 1: return 0.5f * v * (1.0f + erff(v * 0.70710678f));
    case 2: return 0.5f * v * (1.0f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
    case 3: return v / (1.0f + expf(-v));
    case 4: return tanhf(v);
    case 5: return v >= 0.0f || v != v ? v : 0.01f * v;
    default: return v;
    }
}

/* s[r] = g act(s[r] + bias[r]) but for the last row, which becomes g: sigmoid(s + bias) where gated, else 1. */
static void activate(float *s, const float *bias, int64_t count, int32_t kind) {
    float gate = 1.0f;
    if (kind & MH_GATED) gate = 1.0f / (1.0f + expf(-(s[count - 1] + bias[count - 1])));
    for (int64_t r = 0; r < count - 1; r++) s[r] = gate * activation(s[r] + bias[r], kind & 255);
    s[count - 1] = gate;
}

/* The same for the shrunk rows of a segment. */
static void activate_segment(const lora_args *g, const lora_segment *seg, const float *bias, const int32_t *kinds,
                             const int32_t *slots) {
    int32_t kind = kinds[slots[g->order[seg->begin]]];
    for (int64_t t = 0; t < seg->tokens; t++)
        activate(g->scratch + seg->scratch + t * seg->count, bias + seg->start, seg->count, kind);
}
