/* The low-rank product of lora.h on AMX tiles, for bf16.
 *
 * Shrink: sixteen rank rows of A as they lie in the pool are the left tile, up to sixteen tokens the right one: a
 * lone token as it lies in x, several packed once for all sites. Expand: the tokens' shrunk rows, split into a high
 * and a low bf16 half so that the product keeps fp32's precision, are the left tiles, pairs of B's rows the right
 * one. A token's column of a tile knows nothing of its neighbours, and what a lone token takes instead in the expand
 * (vectors, which keep the memory busy) sums in the tiles' own order, so who shares the batch changes no bit here.
 */
#ifdef MH_AMX
#define LORA_ALONE 2  /* tokens of a segment up to which vectors are quicker in the expand */

/* Rank rows that a tile of the expand takes of `count`: all, made even, or LORA_CHUNK. */
INLINE int64_t lora_chunk(int64_t count) { return count <= LORA_CHUNK ? (count + 1) / 2 * 2 : LORA_CHUNK; }

/* The width of the halves of a token's shrunk row. */
INLINE int64_t lora_width(int64_t count) { return blocks_of(count, LORA_CHUNK) * lora_chunk(count); }

/* C [rows][cols] += A [rows][2 pairs] B [2 pairs][cols]; tiles 0 to 3 are C, 4 and 5 A, 6 and 7 B. */
INLINE void shape_tiles(tile_shape *now, int64_t rows, int64_t cols, int64_t pairs) {
    if (now->palette && now->rows[0] == rows && now->bytes[0] == 4 * cols && now->rows[6] == pairs) return;
    now->palette = 1;
    for (int i = 0; i < 8; i++) {
        now->rows[i] = (uint8_t)(i < 6 ? rows : pairs);
        now->bytes[i] = (uint16_t)(i < 4 || i > 5 ? 4 * cols : 4 * pairs);
    }
    _tile_loadconfig(now);
}

/* Sixteen tokens (`have` of them real) of one segment, to right tiles of thirty-two k. */
static void lora_pack(const lora_args *g, const lora_segment *seg, int64_t t0, bf16 *to) {
    int64_t have = least(16, seg->tokens - t0);
    for (int64_t k = 0; k < g->in; k += 32, to += TILE) {
        __mmask32 mask = (__mmask32)(k + 32 <= g->in ? ~0u : (1u << (g->in - k)) - 1);
        __m512 rows[16];
        for (int t = 0; t < 16; t++)
            rows[t] = t >= have ? _mm512_setzero_ps()
                                : (__m512)_mm512_maskz_loadu_epi16(
                                      mask, (const bf16 *)g->x + g->order[seg->begin + t0 + t] * g->x_stride + k);
        transpose16(rows);
        memcpy(to, rows, sizeof rows);
    }
}

/* Sixteen numbers at r0 of the row of token t of the segment, `rows` of them real, as bf16 halves. */
INLINE void split_row(const lora_args *g, const lora_segment *seg, int64_t t, int64_t r0, __m512 v) {
    int64_t width = lora_width(seg->count), room = width - r0;
    bf16 *high = g->halves + seg->halves + t * width + r0, *low = high + seg->tokens * width;
    __mmask16 mask = (__mmask16)(room < 16 ? (1u << room) - 1 : 0xffff);
    __m256i h = (__m256i)_mm512_cvtneps_pbh(v);
    __m512 back = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
    _mm256_mask_storeu_epi16(high, mask, h);
    _mm256_mask_storeu_epi16(low, mask, (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(v, back)));
    if (room > 16 && r0 + 16 >= seg->count) {
        memset(high + 16, 0, (room - 16) * sizeof *high);
        memset(low + 16, 0, (room - 16) * sizeof *low);
    }
}

/* x[t] . a[r0 ...] for up to sixteen tokens from t0 and sixteen rows: to scratch as fp32 where a function comes
 * before the expand, else to the halves. */
static void shrink_tiles(const lora_args *g, const lora_segment *seg, int64_t t0, int64_t r0, int activated,
                         tile_shape *now) {
    int64_t n = least(16, seg->tokens - t0), rows = least(16, seg->count - r0), stride = seg->site->a_stride;
    const bf16 *a = (const bf16 *)seg->site->a + (seg->start + r0) * stride, *x;
    int64_t x_step, x_row, blocks = g->in / 32, k = 0;
    if (n == 1) {
        x = (const bf16 *)g->x + g->order[seg->begin + t0] * g->x_stride;
        x_step = 32;
        x_row = 4;
    } else {
        x = g->packed + seg->packed + t0 / 16 * 16 * g->packed_width;
        x_step = TILE;
        x_row = 64;
    }
    shape_tiles(now, rows, n, 16);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
#define SHRINK(C, A, B, AT)                                   \
    do {                                                      \
        _tile_loadd(A, a + (AT) * 32, stride * 2);            \
        _tile_loadd(B, x + (AT) * x_step, x_row);             \
        _tile_dpbf16ps(C, A, B);                              \
    } while (0)
    for (; k + 4 <= blocks; k += 4) {
        for (int64_t r = 0; r < rows; r++) fetch(a + r * stride + (k + 4) * 32, 256);
        SHRINK(0, 4, 6, k);
        SHRINK(1, 5, 7, k + 1);
        SHRINK(2, 4, 6, k + 2);
        SHRINK(3, 5, 7, k + 3);
    }
    if (k < blocks) SHRINK(0, 4, 6, k);
    if (k + 1 < blocks) SHRINK(1, 5, 7, k + 1);
    if (k + 2 < blocks) SHRINK(2, 4, 6, k + 2);
#undef SHRINK
    if (blocks * 32 < g->in) {
        bf16 last_a[TILE], last_x[32];
        int64_t rest = g->in - blocks * 32;
        memset(last_a, 0, sizeof last_a);
        for (int64_t r = 0; r < rows; r++) memcpy(last_a + r * 32, a + r * stride + blocks * 32, rest * sizeof *a);
        _tile_loadd(4, last_a, 64);
        if (n == 1) {
            memset(last_x, 0, sizeof last_x);
            memcpy(last_x, x + blocks * 32, rest * sizeof *x);
            _tile_loadd(6, last_x, 4);
        } else
            _tile_loadd(6, x + blocks * TILE, 64);
        _tile_dpbf16ps(3, 4, 6);
    }
    float sums[4][256] __attribute__((aligned(64)));
    int64_t row = n == 1 ? 4 : 64;
    _tile_stored(0, sums[0], row);
    _tile_stored(1, sums[1], row);
    _tile_stored(2, sums[2], row);
    _tile_stored(3, sums[3], row);
    __m512 all[16];
    for (int i = 0; i < (n == 1 ? 1 : rows); i++) {
        vf s = (load_fp32(sums[0] + 16 * i) + load_fp32(sums[1] + 16 * i)) +
               (load_fp32(sums[2] + 16 * i) + load_fp32(sums[3] + 16 * i));
        all[i] = (__m512)s;
    }
    for (int64_t i = rows; i < 16 && n > 1; i++) all[i] = _mm512_setzero_ps();
    if (n > 1) transpose16(all);
    __mmask16 mask = (__mmask16)((1u << rows) - 1);
    float *s = g->scratch + seg->scratch + t0 * seg->count + r0;
    for (int64_t t = 0; t < n; t++) {
        if (activated) _mm512_mask_storeu_ps(s + t * seg->count, mask, all[t]);
        else split_row(g, seg, t0 + t, r0, _mm512_maskz_mov_ps(mask, all[t]));
    }
}

/* The shrunk rows of a segment, activated, as halves. */
static void split_segment(const lora_args *g, const lora_segment *seg) {
    const float *s = g->scratch + seg->scratch;
    for (int64_t t = 0; t < seg->tokens; t++)
        for (int64_t r = 0; r < seg->count; r += 16) {
            int64_t have = least(16, seg->count - r);
            split_row(g, seg, t, r, _mm512_maskz_loadu_ps((__mmask16)((1u << have) - 1), s + t * seg->count + r));
        }
}

/* The rows of one chunk of B as tiles of pairs of rows, of the even and the odd ones of every 32 columns; a tile is
 * `step` elements behind the one before it. */
INLINE void interleave_rows(bf16 *panel, int64_t step, const bf16 *b, int64_t stride, int64_t rows, int64_t pairs,
                            int64_t columns) {
    const __mmask32 upper = 0xaaaaaaaa;
    for (int64_t p = 0; p < pairs; p++) {
        const bf16 *at = b + 2 * p * stride;
        bf16 *to = panel + p * 32;
        for (int64_t c = 0; c < columns; c += 32, to += 2 * step) {
            __m512i first, second;
            if (c + 32 <= columns && 2 * p + 1 < rows) {
                first = _mm512_loadu_si512(at + c);
                second = _mm512_loadu_si512(at + stride + c);
            } else {
                __mmask32 mask = (__mmask32)(columns - c >= 32 ? ~0u : (1u << (columns - c)) - 1);
                first = _mm512_maskz_loadu_epi16(2 * p < rows ? mask : 0, at + c);
                second = _mm512_maskz_loadu_epi16(2 * p + 1 < rows ? mask : 0, at + stride + c);
            }
            _mm512_storeu_si512(to, _mm512_mask_mov_epi16(first, upper, _mm512_slli_epi32(second, 16)));
            _mm512_storeu_si512(to + step, _mm512_mask_mov_epi16(_mm512_srli_epi32(first, 16), upper, second));
        }
    }
}

/* y += sums of 32 columns, of which `have` are there: the even and the odd ones. */
INLINE void add_columns(bf16 *y, __m512 even, __m512 odd, int64_t have) {
    __mmask32 mask = (__mmask32)(have >= 32 ? ~0u : (1u << have) - 1);
    __m512i old = _mm512_maskz_loadu_epi16(mask, y);
    even = _mm512_add_ps(even, (__m512)_mm512_slli_epi32(old, 16));
    odd = _mm512_add_ps(odd, (__m512)_mm512_and_si512(old, _mm512_set1_epi32((int)0xffff0000)));
    _mm512_mask_storeu_epi16(y, mask, weave(even, odd));
}

/* The expand of one token, sums in the order of the tiles: within a chunk of rank rows the even ones, the odd ones,
 * their sum; the high halves before the low. */
static void expand_alone(const bf16 *high, const bf16 *low, int64_t count, const bf16 *b, int64_t stride, bf16 *y,
                         int64_t columns) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
    for (int64_t c = 0; c < columns; c += 64) {
        __mmask32 mask[2];
        for (int i = 0; i < 2; i++) {
            int64_t have = columns - c - 32 * i;
            mask[i] = (__mmask32)(have >= 32 ? ~0u : have > 0 ? (1u << have) - 1 : 0);
        }
        __m512 sums[4];
        for (int i = 0; i < 4; i++) sums[i] = _mm512_setzero_ps();
        for (int64_t q = 0; q < count; q += LORA_CHUNK) {
            __m512 part[2][8]; /* [even and odd rows][high and low of four times sixteen columns] */
            for (int i = 0; i < 8; i++) part[0][i] = part[1][i] = _mm512_setzero_ps();
            int64_t rows = least(LORA_CHUNK, count - q);
#define ROW(R, ODD)                                                                               \
    do {                                                                                          \
        const bf16 *row = b + (q + (R)) * stride + c;                                             \
        __m512 h = _mm512_set1_ps(from_bf16(high[q + (R)].bits)), l = _mm512_set1_ps(from_bf16(low[q + (R)].bits)); \
        __builtin_prefetch(row + 64);                                                             \
        __builtin_prefetch(row + 96);                                                             \
        for (int i = 0; i < 2; i++) {                                                             \
            __m512i w = _mm512_maskz_loadu_epi16(mask[i], row + 32 * i);                          \
            __m512 even = (__m512)_mm512_slli_epi32(w, 16), odd = (__m512)_mm512_and_si512(w, upper); \
            part[ODD][4 * i] = _mm512_fmadd_ps(h, even, part[ODD][4 * i]);                        \
            part[ODD][4 * i + 1] = _mm512_fmadd_ps(h, odd, part[ODD][4 * i + 1]);                 \
            part[ODD][4 * i + 2] = _mm512_fmadd_ps(l, even, part[ODD][4 * i + 2]);                \
            part[ODD][4 * i + 3] = _mm512_fmadd_ps(l, odd, part[ODD][4 * i + 3]);                 \
        }                                                                                         \
    } while (0)
            int64_t r = 0;
            for (; r + 2 <= rows; r += 2) {
                ROW(r, 0);
                ROW(r + 1, 1);
            }
            if (r < rows) ROW(r, 0);
#undef ROW
            for (int i = 0; i < 2; i++)
                for (int half = 0; half < 2; half++) {
                    int at = 4 * i + half;
                    __m512 own = _mm512_add_ps(sums[2 * i + half], _mm512_add_ps(part[0][at], part[1][at]));
                    sums[2 * i + half] = _mm512_add_ps(own, _mm512_add_ps(part[0][at + 2], part[1][at + 2]));
                }
        }
        add_columns(y + c, sums[0], sums[1], columns - c);
        if (columns - c > 32) add_columns(y + c + 32, sums[2], sums[3], columns - c - 32);
    }
}

/* y[t][c0:c1] += scratch[t] . b[:, c0:c1] for up to LORA_TOKENS tokens and LORA_COLUMNS columns. */
static void expand_tiles(const lora_args *g, const lora_segment *seg, int64_t t0, int64_t t1, int64_t c0, int64_t c1,
                         tile_shape *now, bf16 *panel) {
    const lora_site *site = seg->site;
    int64_t count = seg->count, chunk = lora_chunk(count), chunks = blocks_of(count, LORA_CHUNK);
    int64_t width = chunk * chunks, stride = site->b_stride, tile = chunks * TILE;
    const bf16 *b = (const bf16 *)site->b + seg->start * stride + c0;
    const bf16 *high = g->halves + seg->halves + t0 * width, *low = high + seg->tokens * width;
    bf16 *y[LORA_TOKENS];
    for (int64_t t = t0; t < t1; t++) y[t - t0] = (bf16 *)site->y + g->order[seg->begin + t] * site->y_stride;
    if (t1 - t0 <= LORA_ALONE) {
        for (int64_t t = 0; t < t1 - t0; t++)
            expand_alone(high + t * width, low + t * width, count, b, stride, y[t] + c0, c1 - c0);
        return;
    }
    for (int64_t q = 0; q < chunks; q++)
        interleave_rows(panel + q * TILE, tile, b + q * LORA_CHUNK * stride, stride, count - q * LORA_CHUNK, chunk / 2,
                        c1 - c0);
    float sums[2][4][256] __attribute__((aligned(64)));
    int64_t done = 0, rows = 0, ready = 0, turn = 0; /* the sums of one block are added while the next is multiplied */
#define ADD_SUMS                                                                                    \
    for (int64_t i = 0; i < rows; i++) {                                                            \
        const float *s = sums[turn ^ 1][0] + i * 16;                                                \
        for (int64_t c = ready; c < least(ready + 64, c1); c += 32, s += 512)                       \
            add_columns(y[done + i] + c, _mm512_load_ps(s), _mm512_load_ps(s + 256), c1 - c);       \
    }
    for (int64_t t = 0; t < t1 - t0; t += 16) {
        int64_t n = least(16, t1 - t0 - t);
        shape_tiles(now, n, 16, chunk / 2);
        for (int64_t c = c0; c < c1; c += 64, turn ^= 1) {
            int wide = c1 - c > 32;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t q = 0; q < chunks; q++) {
                const bf16 *right = panel + (c - c0) / 16 * tile + q * TILE;
                _tile_loadd(4, high + t * width + q * LORA_CHUNK, width * 2);
                _tile_loadd(5, low + t * width + q * LORA_CHUNK, width * 2);
#define EXPAND(C, B)                             \
    do {                                         \
        _tile_loadd(B, right + (C) * tile, 64);  \
        _tile_dpbf16ps(C, 4, B);                 \
        _tile_dpbf16ps(C, 5, B);                 \
    } while (0)
                EXPAND(0, 6);
                EXPAND(1, 7);
                if (wide) {
                    EXPAND(2, 6);
                    EXPAND(3, 7);
                }
#undef EXPAND
            }
            _tile_stored(0, sums[turn][0], 64);
            _tile_stored(1, sums[turn][1], 64);
            if (wide) {
                _tile_stored(2, sums[turn][2], 64);
                _tile_stored(3, sums[turn][3], 64);
            }
            ADD_SUMS
            done = t;
            rows = n;
            ready = c;
        }
    }
    ADD_SUMS
#undef ADD_SUMS
}

/* The work of the shrink for a thread of the team; with kinds, the function between the two products too. */
static void shrink_phase(const lora_args *g, const float *bias, const int32_t *kinds, const int32_t *slots,
                         tile_shape *now) {
    if (g->pack_items) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < g->pack_items; i++) {
            const lora_pack_item *item = &g->packs[i];
            lora_pack(g, item->segment, item->token, g->packed + item->segment->packed + item->token * g->packed_width);
        }
    }
#pragma omp for schedule(dynamic, g->shrink_grain)
    for (int64_t item = 0; item < g->shrink_items; item++) {
        const lora_segment *seg = find_segment(g, item, 0);
        int64_t i = item - seg->shrink_first, blocks = blocks_of(seg->count, 16);
        shrink_tiles(g, seg, i / blocks * 16, i % blocks * 16, kinds != NULL, now);
    }
    if (kinds) {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < g->segment_count; i++) {
            activate_segment(g, &g->segments[i], bias, kinds, slots);
            split_segment(g, &g->segments[i]);
        }
    }
}

/* Likewise that of the expand. */
static void expand_phase(const lora_args *g, tile_shape *now) {
    bf16 *panel = g->panels + omp_get_thread_num() * g->panel_size;
#pragma omp for schedule(dynamic, g->expand_grain)
    for (int64_t item = 0; item < g->expand_items; item++) {
        const lora_segment *seg = find_segment(g, item, 1);
        int64_t i = item - seg->expand_first, out = seg->site->out, blocks = blocks_of(out, g->column_step);
        int64_t t0 = i / blocks * LORA_TOKENS, c0 = i % blocks * g->column_step;
        expand_tiles(g, seg, t0, least(t0 + LORA_TOKENS, seg->tokens), c0, least(c0 + g->column_step, out), now, panel);
    }
}

/* As lora_run and, where there are kinds, bottleneck_run. */
static void lora_run_tiles(const lora_args *g, const float *bias, const int32_t *kinds, const int32_t *slots) {
#pragma omp parallel num_threads(g->threads)
    {
        tile_shape now = {0};
        shrink_phase(g, bias, kinds, slots, &now);
        expand_phase(g, &now);
        if (now.palette) _tile_release();
    }
}
#endif
