/* A step through all layers of a Llama-shaped model in one call: norm, q k v, rotary embedding, cache,
 * attention, o, norm, gate and up, silu, down, with the adapters' low-rank products at each of them.
 *
 * Every operation is the one that the single entry points do, in the same order and rounded at the same places, so
 * the result has the same bits as the layers called one by one. All activations are bf16.
 */
typedef struct { /* int64 fields in this order come from the launcher */
    const bf16 *input_norm, *post_norm, *q_norm, *k_norm; /* the latter two may be absent */
    const quant4_matrix *qkv, *o, *gate_up, *down;        /* three, one, two, one */
    const lora_site *qkv_sites, *o_sites, *gate_up_sites, *down_sites; /* as many, or absent */
    bf16 *k_cache, *v_cache;
    int64_t window;
} stack_layer;

typedef struct { /* likewise */
    int64_t hidden, heads, kv_heads, dim, inner, block_size, layers;
} stack_shape;

typedef struct { /* likewise */
    int64_t tokens, sequences, table_width, segments;
    const int32_t *query_start, *context_lens, *block_tables;
    const int64_t *slot_mapping;
    const int32_t *order, *slots, *offsets;
    const bf16 *cos, *sin; /* [tokens][dim] */
    const int32_t *token_slots;
    int64_t in_place; /* new tokens up to which a sequence reads the cache where it lies */
} stack_step;

#include "stack_parts.h"

/* One head: x cos + rotate_half(x) sin, each product and the sum rounded. */
INLINE void rotate_head(bf16 *x, const bf16 *cos, const bf16 *sin, int64_t dim) {
    int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i += LANES) {
        vf a, b, ca, cb, sa, sb;
        int64_t n = least(LANES, half - i);
        if (n == LANES) {
            a = load_bf16(x + i), b = load_bf16(x + half + i);
            ca = load_bf16(cos + i), cb = load_bf16(cos + half + i);
            sa = load_bf16(sin + i), sb = load_bf16(sin + half + i);
        } else {
            a = load_part_bf16(x + i, n), b = load_part_bf16(x + half + i, n);
            ca = load_part_bf16(cos + i, n), cb = load_part_bf16(cos + half + i, n);
            sa = load_part_bf16(sin + i, n), sb = load_part_bf16(sin + half + i, n);
        }
        vf first = rounded_bf16(a * ca) + rounded_bf16(-b * sa);
        vf second = rounded_bf16(b * cb) + rounded_bf16(a * sb);
        if (n == LANES) {
            store_bf16(x + i, first);
            store_bf16(x + half + i, second);
        } else {
            store_part_bf16(x + i, first, n);
            store_part_bf16(x + half + i, second, n);
        }
    }
}

/* q and k of [tokens][width], normalized where there are norms, rotated in place; k and v go to the cache. */
static void place_heads(const stack_shape *m, const stack_layer *layer, const stack_step *s, bf16 *qkv, int64_t width,
                        float head_eps, int threads) {
    int64_t dim = m->dim, size = m->block_size;
#pragma omp parallel for num_threads(threads) if (s->tokens * width > DENSE_SERIAL)
    for (int64_t t = 0; t < s->tokens; t++) {
        const bf16 *cos = s->cos + t * dim, *sin = s->sin + t * dim;
        bf16 *row = qkv + t * width;
        for (int64_t h = 0; h < m->heads + m->kv_heads; h++, row += dim) {
            const bf16 *norm = h < m->heads ? layer->q_norm : layer->k_norm;
            if (norm) rms_norm_row_bf16(row, row, norm, dim, head_eps);
            rotate_head(row, cos, sin, dim);
        }
        for (int64_t h = 0; h < m->kv_heads; h++) {
            int64_t to = ((s->slot_mapping[t] / size * m->kv_heads + h) * size + s->slot_mapping[t] % size) * dim;
            memcpy(layer->k_cache + to, row + (h - m->kv_heads) * dim, dim * sizeof(bf16));
            memcpy(layer->v_cache + to, row + h * dim, dim * sizeof(bf16));
        }
    }
}

/* hidden += y, then out = norm(hidden); only the sum where there is no weight. */
static void add_norm(bf16 *out, bf16 *hidden, const bf16 *y, const bf16 *weight, int64_t n, float eps, int64_t tokens,
                     int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * n > DENSE_SERIAL)
    for (int64_t t = 0; t < tokens; t++) {
        bf16 *row = hidden + t * n;
        const bf16 *from = y + t * n;
        for (int64_t c = 0; c < n; c += LANES) {
            vf v = load_upto_bf16(row, c, n) + load_upto_bf16(from, c, n);
            if (c + LANES <= n) store_bf16(row + c, v);
            else store_part_bf16(row + c, v, n - c);
        }
        if (weight) rms_norm_row_bf16(out + t * n, row, weight, n, eps);
    }
}

/* The products of one x with `count` matrices side by side in y, and the adapters' on top. */
static int64_t project(const quant4_matrix *matrices, const lora_site *sites, int64_t count, bf16 *y, int64_t width,
                       const bf16 *x, int64_t k, const stack_step *s, int amx, int threads, quant4_ways ways) {
    quant4_matrix own[3];
    lora_site own_sites[3];
    int64_t at = 0;
    for (int64_t i = 0; i < count; i++) {
        own[i] = matrices[i];
        own[i].y = y + at;
        own[i].y_stride = width;
        if (sites) {
            own_sites[i] = sites[i];
            own_sites[i].y = y + at;
            own_sites[i].y_stride = width;
        }
        at += matrices[i].n;
    }
    return project_ways(threads, amx, own, sites ? own_sites : NULL, count, x, k, s->tokens, k, s->order, s->slots,
                        s->offsets, s->segments, ways);
}

#include "stack_mlp.h"

/* hidden [tokens][hidden] goes through all layers, in place; the last norm is not among them. parts: what adapters do
 * beside low-rank products, absent where none does. Returns 0, MH_NO_MEMORY, or 1 + the number of the layer where a
 * segment owns rows outside of its pool. */
EXPORT int64_t mh_stack(int threads, int amx, const stack_shape *m, const stack_layer *layers, const stack_parts *parts,
                        const stack_step *s, bf16 *hidden, float eps, float head_eps, float scale) {
    int64_t n = m->hidden, q_width = m->heads * m->dim, kv_width = m->kv_heads * m->dim, inner_width = m->inner;
    int64_t width = q_width + 2 * kv_width, failed = 0, at = 0;
    static __thread kept memory;
    int64_t packed = blocks_of(s->tokens, 16) * 16 * inner_width;
    int64_t room = (packed + s->tokens * (2 * n + width + q_width + 3 * inner_width)) * (int64_t)sizeof(bf16);
    bf16 *scratch = kept_memory(&memory, room + blocks_of(s->tokens, 16));
    if (!scratch) return MH_NO_MEMORY;
    gated_way gated = {scratch, (uint8_t *)scratch + room}, *way = find_apart(&gated, s, amx) ? &gated : NULL;
    bf16 *x = scratch + packed, *y = x + s->tokens * n, *qkv = y + s->tokens * n, *attended = qkv + s->tokens * width;
    bf16 *gate_up = attended + s->tokens * q_width, *inner = gate_up + s->tokens * 2 * inner_width;
    const stack_parts *p = s->segments ? parts : NULL;
    mh_rms_norm(0, threads, x, hidden, n, layers[0].input_norm, n, eps, s->tokens);
    for (; at < m->layers && !failed; at++) {
        const stack_layer *layer = &layers[at];
        if (p) finish_norm(x, hidden, &p->input_norm, n, eps, s);
        failed = project(layer->qkv, layer->qkv_sites, 3, qkv, width, x, n, s, amx, threads, (quant4_ways){0});
        if (failed) break;
        if (p) {
            finish_linear(qkv, width, &p->q, q_width, s);
            finish_linear(qkv + q_width, width, &p->k, kv_width, s);
            finish_linear(qkv + q_width + kv_width, width, &p->v, kv_width, s);
        }
        place_heads(m, layer, s, qkv, width, head_eps, threads);
        failed = mh_attention(0, amx, threads, attended, qkv, width, m->dim, layer->k_cache, layer->v_cache, m->heads,
                              m->kv_heads, m->dim, m->block_size, s->query_start, s->context_lens, s->block_tables,
                              s->table_width, s->sequences, s->in_place, scale, layer->window, 0);
        if (failed) break;
        if (p) scale_worn(attended, q_width, p->o.input, q_width, s);
        failed = project(layer->o, layer->o_sites, 1, y, n, attended, q_width, s, amx, threads, (quant4_ways){0});
        if (failed) break;
        if (p) {
            finish_linear(y, n, &p->o, n, s);
            failed = run_rounds(p->attention, p->attention_rounds, y, hidden, x, n, s, amx, threads);
            if (failed) break;
        }
        add_norm(x, hidden, y, layer->post_norm, n, eps, s->tokens, threads);
        if (p) finish_norm(x, hidden, &p->post_norm, n, eps, s);
        if (!p && way && can_gate(layer, m->inner)) failed = gated_mlp(layer, m, s, way, y, gate_up, inner, x, amx, threads);
        else failed = plain_mlp(layer, m, s, p, y, gate_up, inner, x, amx, threads);
        if (failed) break;
        if (p) {
            finish_linear(y, n, &p->down, n, s);
            failed = run_rounds(p->mlp, p->mlp_rounds, y, hidden, x, n, s, amx, threads);
            if (failed) break;
            p++;
        }
        add_norm(x, hidden, y, at + 1 < m->layers ? layers[at + 1].input_norm : NULL, n, eps, s->tokens, threads);
    }
    return failed > 0 ? at + 1 : failed;
}
