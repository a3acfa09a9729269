/* What adapters do in a layer of stack.h beside the low-rank products, as parts.h does it in single calls: scales and
 * biases of linear layers, gains and biases of norms, bottlenecks of the residual stream. A few tokens of a decode step
 * wear each, so all but the bottlenecks run on the calling thread. */
typedef struct { /* one vector a slot, [slots][n]; int64 fields in this order come from the launcher */
    const bf16 *values; /* absent where no slot has one */
    const int32_t *has;
} slot_vectors;

typedef struct { slot_vectors input, output, bias; } linear_parts;
typedef struct { slot_vectors gain, bias; } norm_parts;

#define ROUND_PARALLEL 1  /* reads the stream before the block */
#define ROUND_OF_OUTPUT 2 /* reads the block's output */
#define ROUND_ALONE 4     /* stands in for the stream */

typedef struct { /* the n-th bottleneck of every slot; likewise from the launcher */
    const bf16 *down, *up;
    const float *bias;
    int64_t pool_rows;
    const int32_t *start, *count, *kinds, *flags; /* by slot */
} residual_round;

typedef struct {
    linear_parts q, k, v, o, gate, up, down;
    norm_parts input_norm, post_norm;
    const residual_round *attention, *mlp;
    int64_t attention_rounds, mlp_rounds;
} stack_parts;

/* For each row that wears a slot with a vector in V: its number in `row`, the vector in `own`. */
#define EACH_ROW(V, N)                                                                       \
    for (int64_t at = 0; (V).values && at < s->segments; at++)                               \
        if ((V).has[s->slots[at]])                                                           \
            for (int64_t i = s->offsets[at]; i < s->offsets[at + 1]; i++)                    \
                for (const bf16 *own = (V).values + s->slots[at] * (N), *once = own; once; once = NULL)

static void scale_worn(bf16 *y, int64_t stride, slot_vectors v, int64_t n, const stack_step *s) {
    EACH_ROW(v, n) scale_row_bf16(y + s->order[i] * stride, own, n);
}

/* The output's scale, then its bias. */
static void finish_linear(bf16 *y, int64_t stride, const linear_parts *p, int64_t n, const stack_step *s) {
    scale_worn(y, stride, p->output, n, s);
    EACH_ROW(p->bias, n) bias_row_bf16(y + s->order[i] * stride, own, n);
}

/* out, which the base's norm made of x, with the worn gains and biases. */
static void finish_norm(bf16 *out, const bf16 *x, const norm_parts *p, int64_t n, float eps, const stack_step *s) {
    norm_args g = {.n = n, .eps = eps};
    EACH_ROW(p->gain, n) norm_row_bf16(&g, x + s->order[i] * n, out + s->order[i] * n, own);
    EACH_ROW(p->bias, n) bias_row_bf16(out + s->order[i] * n, own, n);
}

/* The bottlenecks of one block: y is what the block adds to the stream, x scratch of as much. */
static int64_t run_rounds(const residual_round *rounds, int64_t count, bf16 *y, const bf16 *stream, bf16 *x, int64_t n,
                          const stack_step *s, int amx, int threads) {
    int64_t failed = 0;
    for (const residual_round *r = rounds; r < rounds + count && !failed; r++) {
        int any = 0;
        for (int64_t at = 0; at < s->segments; at++) {
            int32_t slot = s->slots[at];
            if (!r->count[slot]) continue;
            any = 1;
            for (int64_t i = s->offsets[at]; i < s->offsets[at + 1]; i++) {
                const bf16 *in = stream + s->order[i] * n;
                bf16 *out = y + s->order[i] * n, *to = x + s->order[i] * n;
                if (r->flags[slot] & ROUND_OF_OUTPUT) memcpy(to, out, n * sizeof *to);
                else if (r->flags[slot] & ROUND_PARALLEL) memcpy(to, in, n * sizeof *to);
                else {
                    memcpy(to, in, n * sizeof *to);
                    bias_row_bf16(to, out, n);
                }
                if (r->flags[slot] & ROUND_ALONE)
                    for (int64_t c = 0; c < n; c++) out[c].bits = in[c].bits ^ 0x8000;
            }
        }
        if (any)
            failed = mh_bottleneck_add(0, amx, threads, y, n, x, n, r->down, n, r->up, n, r->bias, n, n, r->pool_rows,
                                       r->start, r->count, r->kinds, s->token_slots, s->order, s->slots, s->offsets,
                                       s->segments);
    }
    return failed;
}
