/* The gated MLP of stack.h. On AMX tiles silu(gate) * up may go from the sums of gate and up to the packed x of down
 * (gated.h), with the same bits. What that leaves out: adapters whose low-rank products are not joined to the base's,
 * whose tokens, by sixteens, take rows of gate, up and their product as ever; and whatever else adapters do, which takes
 * the plain way for the whole step. */
#define GATED_TOKENS 16 /* of a step, from which a tile of tokens is full */

typedef struct { bf16 *packed; uint8_t *apart; } gated_way; /* of quant4_ways */

/* Which sixteens of the step's tokens stay apart; whether most do not. */
static int find_apart(gated_way *way, const stack_step *s, int amx) {
#ifdef MH_AMX
    int64_t tiles = blocks_of(s->tokens, 16), apart = 0;
    if (!amx || s->tokens < GATED_TOKENS) return 0;
    memset(way->apart, 0, tiles);
    for (int64_t at = 0; at < s->segments; at++)
        if (s->offsets[at + 1] - s->offsets[at] < JOIN_TOKENS)
            for (int64_t i = s->offsets[at]; i < s->offsets[at + 1]; i++) way->apart[s->order[i] / 16] = 1;
    for (int64_t i = 0; i < tiles; i++) apart += way->apart[i];
    return 2 * apart < tiles;
#else
    (void)way, (void)s, (void)amx;
    return 0;
#endif
}

/* Whether the layer's weights are such as gated.h takes. */
INLINE int can_gate(const stack_layer *layer, int64_t inner) {
    return layer->gate_up[0].absmax && layer->gate_up[1].absmax && layer->down->absmax && inner % Q4_RUN == 0;
}

/* y = down(silu(gate(x)) * up(x)); gate_up and inner are scratch. */
static int64_t gated_mlp(const stack_layer *layer, const stack_shape *m, const stack_step *s, const gated_way *way,
                         bf16 *y, bf16 *gate_up, bf16 *inner, const bf16 *x, int amx, int threads) {
    int64_t n = m->inner, tiles = blocks_of(s->tokens, 16);
    quant4_ways ways = {.gated = way->packed, .apart = way->apart};
    int64_t failed = project(layer->gate_up, layer->gate_up_sites, 2, gate_up, 2 * n, x, m->hidden, s, amx, threads, ways);
    if (failed) return failed;
    for (int64_t i = 0, end; i < tiles; i = end) {
        for (end = i + 1; end < tiles && way->apart[end] == way->apart[i]; end++) {}
        const bf16 *rows = gate_up + i * 16 * 2 * n;
        if (way->apart[i])
            mh_silu_mul(0, threads, inner + i * 16 * n, rows, 2 * n, rows + n, 2 * n, n,
                        least(end * 16, s->tokens) - i * 16);
    }
    ways = (quant4_ways){.x_packed = way->packed, .apart = way->apart};
    return project(layer->down, layer->down_sites, 1, y, m->hidden, inner, n, s, amx, threads, ways);
}

/* The same with rows of everything, and what adapters do beside low-rank products, absent where none does. */
static int64_t plain_mlp(const stack_layer *layer, const stack_shape *m, const stack_step *s, const stack_parts *p,
                         bf16 *y, bf16 *gate_up, bf16 *inner, const bf16 *x, int amx, int threads) {
    int64_t n = m->inner;
    quant4_ways ways = {0};
    int64_t failed = project(layer->gate_up, layer->gate_up_sites, 2, gate_up, 2 * n, x, m->hidden, s, amx, threads, ways);
    if (failed) return failed;
    if (p) {
        finish_linear(gate_up, 2 * n, &p->gate, n, s);
        finish_linear(gate_up + n, 2 * n, &p->up, n, s);
    }
    mh_silu_mul(0, threads, inner, gate_up, 2 * n, gate_up + n, 2 * n, n, s->tokens);
    if (p) scale_worn(inner, n, p->down.input, n, s);
    return project(layer->down, layer->down_sites, 1, y, m->hidden, inner, n, s, amx, threads, ways);
}
