/* silu(gate) * up from the sums of both, to the tiles that the product with down reads: neither gate nor up nor what comes
 * of them is written as rows, read again or packed. Every number is rounded where mh_silu_mul rounds it.
 *
 * Sums are [16 outputs of gate][16 tokens], then up's. The even of 64 neighbouring outputs are one tile, the odd another,
 * in pairs [16][16 tokens][2], as pack_tiles makes them.
 */

/* Where the even outputs of sixteen from n0 on lie, of sixteen tokens. */
INLINE bf16 *gated_place(const quant4_args *g, int64_t n0, int64_t t0) {
    return g->ways.gated + t0 * g->matrices->n + n0 / Q4_RUN * 2 * TILE + n0 % Q4_RUN / 4 * 32;
}

INLINE void fetch_gated(const quant4_args *g, int64_t n0, int64_t t0) {
    for (int64_t t = t0; t < least(t0 + 32, g->tokens); t += 16) {
        bf16 *to = gated_place(g, n0, t);
        for (int64_t i = 0; i < 4; i++) {
            fetch_to_write(to + i * 32);
            fetch_to_write(to + TILE + i * 32);
        }
    }
}

/* One output's product, biased. */
INLINE __m512 biased_sum(const quant4_matrix *m, const float *sums, int64_t n) {
    __m512 v = _mm512_load_ps(sums);
    return m->bias ? _mm512_add_ps(v, _mm512_set1_ps(from_bf16(m->bias[n].bits))) : v;
}

/* The two bf16 of each lane that weave made. */
INLINE vf first_of(__m512i woven) { return (vf)_mm512_slli_epi32(woven, 16); }
INLINE vf second_of(__m512i woven) { return (vf)_mm512_and_si512(woven, _mm512_set1_epi32((int)0xffff0000)); }

/* Eight, from r0 on, of the sixteen outputs from n0 on of sixteen tokens; those of adapters apart go, all sixteen at the
 * first eight's turn, to y as rows of gate and of up. */
INLINE void store_gated(const quant4_args *g, const float *sums, int64_t n0, int64_t t0, int64_t r0) {
    const quant4_matrix *gate = g->matrices, *up = gate + 1;
    if (g->ways.apart[t0 / 16]) {
        if (r0) return;
        quant4_matrix part = *gate;
        part.n = n0 + 16;
        store_tiles(&part, g->tokens, sums, n0, t0);
        part = *up;
        part.n = n0 + 16;
        store_tiles(&part, g->tokens, sums + 256, n0, t0);
        return;
    }
    bf16 *to = gated_place(g, n0 + r0, t0);
    for (int64_t r = r0; r < r0 + 8; r += 4, to += 32) {
        __m512i both[4];
        vf v[4];
        for (int64_t i = 0; i < 4; i++)
            both[i] = weave(biased_sum(gate, sums + (r + i) * 16, n0 + r + i),
                            biased_sum(up, sums + 256 + (r + i) * 16, n0 + r + i));
        for (int64_t i = 0; i < 4; i += 2) {
            __m512i s = weave((__m512)silu_bf16(first_of(both[i])), (__m512)silu_bf16(first_of(both[i + 1])));
            v[i] = first_of(s) * second_of(both[i]);
            v[i + 1] = second_of(s) * second_of(both[i + 1]);
        }
        _mm512_storeu_si512(to, weave((__m512)v[0], (__m512)v[2]));
        _mm512_storeu_si512(to + TILE, weave((__m512)v[1], (__m512)v[3]));
    }
}

/* As add_joins: gate's adapters onto tiles 0 and 2, up's onto 1 and 3, of one half of thirty-two outputs. */
INLINE void add_gated(const lora_join *j, const bf16 *left, int64_t half, int64_t token_tile, int second) {
    for (int site = 0; site < 2; site++)
        for (int64_t at = j->heads[site * j->token_tiles + token_tile]; at >= 0; at = j->tiles[at].next) {
            const join_tile *join = &j->tiles[at];
            for (int64_t c = 0; c < join_chunks(join->segment); c++) {
                _tile_loadd(4, left + join->segment->left + (2 * c + half) * TILE, 64);
                _tile_loadd(6, join->right + c * TILE, 64);
                if (site && second) _tile_dpbf16ps(3, 4, 6);
                else if (site) _tile_dpbf16ps(1, 4, 6);
                else if (second) _tile_dpbf16ps(2, 4, 6);
                else _tile_dpbf16ps(0, 4, 6);
            }
        }
}
