/* The panels of quant4.h on AMX tiles. */
#ifdef MH_AMX
#include "join_shrink.h"

/* Sixteen tokens (`have` of them real) and sixty-four k of x, to the right tiles of even and odd k. */
INLINE void pack_tiles(bf16 *even, bf16 *odd, const bf16 *x, int64_t stride, int64_t have) {
    const __m512i first = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30,
                                           28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(1));
    __m512 e[16], o[16];
    for (int t = 0; t < 16; t++) {
        __m512i low = _mm512_setzero_si512(), high = low;
        if (t < have) {
            low = _mm512_loadu_si512(x + t * stride);
            high = _mm512_loadu_si512(x + t * stride + 32);
        }
        e[t] = (__m512)_mm512_permutex2var_epi16(low, first, high);
        o[t] = (__m512)_mm512_permutex2var_epi16(low, second, high);
    }
    transpose16(e);
    transpose16(o);
    memcpy(even, e, sizeof e);
    memcpy(odd, o, sizeof o);
}

/* The same for bf16 weights, whose k keep their order: two tiles of thirty-two k. */
INLINE void pack_plain(bf16 *first, bf16 *second, const bf16 *x, int64_t stride, int64_t have) {
    __m512 low[16], high[16];
    for (int t = 0; t < 16; t++) {
        low[t] = t < have ? _mm512_loadu_ps(x + t * stride) : _mm512_setzero_ps();
        high[t] = t < have ? _mm512_loadu_ps(x + t * stride + 32) : _mm512_setzero_ps();
    }
    transpose16(low);
    transpose16(high);
    memcpy(first, low, sizeof low);
    memcpy(second, high, sizeof high);
}

/* Sums of thirty-two outputs [2][16][16 tokens] to sixteen tokens' rows of y, as many of them as there are. */
INLINE void store_tiles(const quant4_matrix *m, int64_t all_tokens, const float *sums, int64_t n0, int64_t t0) {
    int64_t outputs = least(32, m->n - n0), tokens = least(16, all_tokens - t0);
    __mmask32 mask = (__mmask32)(outputs >= 32 ? ~0u : (1u << outputs) - 1);
    __m512 rows[16]; /* of pairs of outputs */
    if (m->bias) {
        float bias[32];
        __m512i own = _mm512_maskz_loadu_epi16(mask, m->bias + n0);
        _mm512_storeu_si512(bias, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(own)), 16));
        _mm512_storeu_si512(bias + 16, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(own, 1)), 16));
        for (int i = 0; i < 16; i++) {
            __m512 even = _mm512_add_ps(_mm512_load_ps(sums + 32 * i), _mm512_set1_ps(bias[2 * i]));
            __m512 odd = _mm512_add_ps(_mm512_load_ps(sums + 32 * i + 16), _mm512_set1_ps(bias[2 * i + 1]));
            rows[i] = (__m512)weave(even, odd);
        }
    } else
        for (int i = 0; i < 16; i++)
            rows[i] = (__m512)weave(_mm512_load_ps(sums + 32 * i), _mm512_load_ps(sums + 32 * i + 16));
    transpose16(rows);
    bf16 *y = m->y + t0 * m->y_stride + n0;
    if (outputs == 32 && tokens == 16)
        for (int t = 0; t < 16; t++) _mm512_storeu_si512(y + t * m->y_stride, (__m512i)rows[t]);
    else
        for (int64_t t = 0; t < tokens; t++) _mm512_mask_storeu_epi16(y + t * m->y_stride, mask, (__m512i)rows[t]);
}

#include "gated.h"

/* Sums that wait to be stored: those of one block are, while the next is multiplied. Sixteen tokens at a time or, gated,
 * a half of their sums, for the work of vectors to spread. */
typedef struct { const float *sums; int64_t t0; int left; } quant4_waiting;

INLINE void store_next(const quant4_args *g, const quant4_matrix *m, int64_t n0, quant4_waiting *w, int gated) {
    if (!w->left) return;
    if (gated) store_gated(g, w->sums, n0, w->t0, w->left % 2 ? 8 : 0);
    else store_tiles(m, g->tokens, w->sums, n0, w->t0);
    w->left--;
    if (gated && w->left % 2) return;
    w->sums += 512;
    w->t0 += 16;
}

/* Thirty-two outputs, or gated sixteen of both matrices, by 16 or 32 tokens. a0, a1: sixteen outputs each, a_step
 * elements from one tile to the next and a_row from one output to the next; b: one or two tiles of tokens. A panel and
 * its tokens are more than the first cache holds, so that loads which leave it alone are quicker. */
#define MULTIPLY(FROM, TO)                                  \
    for (int64_t k = FROM; k < TO; k++) {                   \
        _tile_stream_loadd(4, a0 + k * a_step, a_row * 2);  \
        _tile_stream_loadd(6, b0 + k * TILE, 64);           \
        _tile_stream_loadd(5, a1 + k * a_step, a_row * 2);  \
        if (wide) _tile_stream_loadd(7, b1 + k * TILE, 64); \
        _tile_dpbf16ps(0, 4, 6);                            \
        _tile_dpbf16ps(1, 5, 6);                            \
        if (wide) {                                         \
            _tile_dpbf16ps(2, 4, 7);                        \
            _tile_dpbf16ps(3, 5, 7);                        \
        }                                                   \
    }
INLINE void multiply_tiles(const bf16 *a0, const bf16 *a1, int64_t a_step, int64_t a_row, const bf16 *b0,
                           int64_t tiles, int wide, float (*sums)[256], const quant4_matrix *m, const quant4_args *g,
                           int64_t n0, int64_t t0, const bf16 *left, quant4_waiting *w, int gated) {
    const bf16 *b1 = b0 + tiles * TILE;
    if (gated) fetch_gated(g, n0, t0);
    else
        for (int64_t t = t0; t < least(t0 + 32, g->tokens); t++) fetch_to_write(m->y + t * m->y_stride + n0);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    int64_t parts = gated ? 5 : 3;
    MULTIPLY(0, tiles / parts)
    store_next(g, m, n0, w, gated);
    MULTIPLY(tiles / parts, tiles * 2 / parts)
    store_next(g, m, n0, w, gated);
    if (gated) {
        MULTIPLY(tiles * 2 / 5, tiles * 3 / 5)
        store_next(g, m, n0, w, gated);
        MULTIPLY(tiles * 3 / 5, tiles * 4 / 5)
        store_next(g, m, n0, w, gated);
    }
    MULTIPLY(tiles * (parts - 1) / parts, tiles)
    const lora_join *j = g->ways.join;
    if (left && gated) {
        add_gated(j, left, n0 % 32 / 16, t0 / 16, 0);
        if (wide) add_gated(j, left, n0 % 32 / 16, t0 / 16 + 1, 1);
    } else if (left) {
        const lora_site *site = j->sites + (m - g->matrices);
        add_joins(j, site, left, t0 / 16, 0);
        if (wide) add_joins(j, site, left, t0 / 16 + 1, 1);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    if (wide) {
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
    }
}

static void unpack_panel(const quant4_matrix *m, int64_t k, int64_t n0, bf16 *panel) {
    int64_t tiles = k / 32, per_row = k / m->block, rows = least(Q4_ROWS, m->n - n0);
    vf codes = load_fp32(m->code);
    for (int64_t r = 0; r < rows; r++) {
        bf16 *to = panel + (r / 16) * tiles * TILE + (r % 16) * 32;
        const uint8_t *from = m->packed + (n0 + r) * k / 2;
        const float *scale = m->absmax + (n0 + r) * per_row;
        for (int64_t b = 0; b < per_row; b++)
            for (int64_t i = 0; i < m->block / Q4_RUN; i++, from += Q4_RUN / 2, to += 2 * TILE)
                unpack_run(to, to + TILE, from, scale[b], codes);
    }
    for (int64_t r = rows; r < Q4_ROWS; r++)
        for (int64_t i = 0; i < tiles; i++) memset(panel + ((r / 16) * tiles + i) * TILE + (r % 16) * 32, 0, 64);
}

/* A panel in a0 and a1 with all tokens. */
INLINE void all_tokens(const quant4_args *g, const quant4_matrix *m, int64_t n0, const bf16 *a0, const bf16 *a1,
                       int64_t a_step, int64_t a_row, const bf16 *left, int gated) {
    float sums[2][5][256] __attribute__((aligned(64))); /* four, and what store_tiles reads beyond sixteen outputs */
    quant4_waiting waiting = {0};
    int64_t tiles = g->k / 32;
    int turn = 0;
    for (int64_t t0 = 0; t0 < g->tokens; t0 += 32, turn ^= 1) {
        int wide = g->tokens - t0 > 16;
        const bf16 *x = g->x_packed + t0 * g->k;
        if (wide) multiply_tiles(a0, a1, a_step, a_row, x, tiles, 1, sums[turn], m, g, n0, t0, left, &waiting, gated);
        else multiply_tiles(a0, a1, a_step, a_row, x, tiles, 0, sums[turn], m, g, n0, t0, left, &waiting, gated);
        waiting = (quant4_waiting){sums[turn][0], t0, (wide ? 2 : 1) * (gated ? 2 : 1)};
    }
    while (waiting.left) store_next(g, m, n0, &waiting, gated);
}

static void quant4_panel_tiles(const quant4_args *g, const quant4_matrix *m, int64_t n0, bf16 *panel) {
    int64_t tiles = g->k / 32, a_step = TILE, a_row = 32;
    const bf16 *a0 = panel, *a1 = panel + tiles * TILE;
    if (m->absmax) unpack_panel(m, g->k, n0, panel);
    else if (n0 + Q4_ROWS <= m->n) {
        a0 = (const bf16 *)m->packed + n0 * g->k;
        a1 = a0 + 16 * g->k;
        a_step = 32;
        a_row = g->k;
    } else {
        memset(panel, 0, Q4_ROWS * g->k * sizeof *panel);
        memcpy(panel, (const bf16 *)m->packed + n0 * g->k, (m->n - n0) * g->k * sizeof *panel);
        a1 = panel + 16 * g->k;
        a_step = 32;
        a_row = g->k;
    }
    const lora_join *join = g->ways.join;
    bf16 *left = join ? panel + Q4_ROWS * g->k : NULL;
    if (left) turn_panel(join, join->sites + (m - g->matrices), n0, left);
    all_tokens(g, m, n0, a0, a1, a_step, a_row, left, 0);
}

/* silu(gate) * up of thirty-two outputs: gate's panel, then up's, half of each at a time. */
static void gated_panel_tiles(const quant4_args *g, int64_t n0, bf16 *panel) {
    const quant4_matrix *gate = g->matrices, *up = gate + 1;
    const lora_join *join = g->ways.join;
    bf16 *second = panel + Q4_ROWS * g->k, *left = join ? second + Q4_ROWS * g->k : NULL;
    unpack_panel(gate, g->k, n0, panel);
    unpack_panel(up, g->k, n0, second);
    if (left) {
        turn_panel(join, join->sites, n0, left);
        turn_panel(join, join->sites + 1, n0, left);
    }
    for (int64_t half = 0; half < 2; half++)
        all_tokens(g, gate, n0 + 16 * half, panel + 16 * half * g->k, second + 16 * half * g->k, TILE, 32, left, 1);
}

static void quant4_tiles(const quant4_args *g) {
    int64_t token_tiles = blocks_of(g->tokens, 16), runs = g->k / Q4_RUN;
    int plain = !g->matrices->absmax;
    tile_shape shape = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shape.bytes[i] = 64;
        shape.rows[i] = 16;
    }
#pragma omp parallel num_threads(g->threads)
    {
        bf16 *panel = g->panels + omp_get_thread_num() * g->panel_size;
        _tile_loadconfig(&shape);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < token_tiles * runs; i++) {
            int64_t tile = i / runs, run = i % runs;
            if (g->ways.x_packed && !g->ways.apart[tile]) continue;
            bf16 *to = g->x_packed + tile * 16 * g->k + run * 2 * TILE;
            const bf16 *from = g->x + tile * 16 * g->x_stride + run * Q4_RUN;
            if (plain) pack_plain(to, to + TILE, from, g->x_stride, g->tokens - tile * 16);
            else pack_tiles(to, to + TILE, from, g->x_stride, g->tokens - tile * 16);
        }
        if (g->ways.join) {
            shrink_joins(g->ways.join, g->x_packed, panel, plain);
#pragma omp barrier
        }
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t p = 0; p < (g->ways.gated ? g->panel_count / 2 : g->panel_count); p++) {
            if (g->ways.gated) {
                gated_panel_tiles(g, p * Q4_ROWS, panel);
                continue;
            }
            int64_t own = p;
            const quant4_matrix *m = find_matrix(g, &own);
            quant4_panel_tiles(g, m, own * Q4_ROWS, panel);
        }
        _tile_release(); /* others on this thread configure their own */
    }
}
#endif
