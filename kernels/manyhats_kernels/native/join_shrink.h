/* The shrink of the joined segments, from the tiles of x that the base's product packed: sixteen rank rows of A, their k
 * in the order of the packed ones, are the left tile. A sum takes k in order, so who shares a tile changes no bit. */
#define JOIN_WIDE 4 /* sixteens of tokens that meet a tile of A at once */

/* Sixteen rank rows, zero where `rows` are fewer, to left tiles of thirty-two k. */
static void turn_a(bf16 *to, const bf16 *a, int64_t stride, int64_t rows, int64_t k, int plain) {
    for (int64_t c = 0; c < k; c += Q4_RUN, to += 2 * TILE)
        for (int64_t r = 0; r < JOIN_ROWS; r++) {
            if (r >= rows) {
                memset(to + r * 32, 0, 64);
                memset(to + TILE + r * 32, 0, 64);
            } else if (plain) {
                memcpy(to + r * 32, a + r * stride + c, 64);
                memcpy(to + TILE + r * 32, a + r * stride + c + 32, 64);
            } else
                pack_run(to + r * 32, to + TILE + r * 32, a + r * stride + c);
        }
}

/* Sums [16 rank rows][16 tokens], `rows` of them real, to a right tile: both halves of the segment's tokens. */
static void split_sums(const lora_args *g, const join_tile *join, const float *sums, int64_t rows, bf16 *to) {
    const int32_t *order = g->order + join->segment->begin;
    __mmask16 own = 0;
    for (int64_t t = join->begin; t < join->end; t++) own |= (__mmask16)(1u << order[t] % 16);
    for (int64_t p = 0; p < 8; p++, to += 32, sums += 32) {
        __m512 even = _mm512_maskz_loadu_ps(2 * p < rows ? own : 0, sums);
        __m512 odd = _mm512_maskz_loadu_ps(2 * p + 1 < rows ? own : 0, sums + 16);
        __m512i high = weave(even, odd);
        __m512 low_even = _mm512_sub_ps(even, (__m512)_mm512_slli_epi32(high, 16));
        __m512 low_odd = _mm512_sub_ps(odd, (__m512)_mm512_and_si512(high, _mm512_set1_epi32((int)0xffff0000)));
        _mm512_storeu_si512(to, high);
        _mm512_storeu_si512(to + 8 * 32, weave(low_even, low_odd));
    }
}

/* Sixteen rank rows in `a` with up to JOIN_WIDE joins of one segment, to their right tiles of those rows from r0 on. */
static void shrink_wide(const lora_join *j, const join_tile *joins, int64_t count, const bf16 *x_packed, const bf16 *a,
                        int64_t r0) {
    const lora_args *g = j->lora;
    const bf16 *x[JOIN_WIDE];
    float sums[JOIN_WIDE][256] __attribute__((aligned(64)));
    for (int64_t i = 0; i < JOIN_WIDE; i++) {
        const join_tile *own = &joins[least(i, count - 1)];
        x[i] = x_packed + g->order[own->segment->begin + own->begin] / 16 * 16 * g->in;
    }
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t at = 0; at < 16 * g->in; at += TILE) {
        _tile_loadd(4, a + at, 64);
        _tile_stream_loadd(5, x[0] + at, 64);
        _tile_dpbf16ps(0, 4, 5);
        if (count == 1) continue;
        _tile_stream_loadd(6, x[1] + at, 64);
        _tile_dpbf16ps(1, 4, 6);
        if (count == 2) continue;
        _tile_stream_loadd(7, x[2] + at, 64);
        _tile_stream_loadd(5, x[3] + at, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    for (int64_t i = 0; i < count; i++)
        split_sums(g, &joins[i], sums[i], joins->segment->count - r0, joins[i].right + r0 / JOIN_ROWS * TILE);
}

/* A thread's part of the joins, on tiles of sixteen rows; room: 16 * k elements. */
static void shrink_joins(const lora_join *j, const bf16 *x_packed, bf16 *room, int plain) {
    int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    int64_t at = j->tile_count * me / team, end = j->tile_count * (me + 1) / team;
    while (at < end) {
        const lora_segment *seg = j->tiles[at].segment;
        int64_t next = at + 1;
        while (next < end && j->tiles[next].segment == seg) next++;
        for (int64_t r = 0; r < seg->count; r += JOIN_ROWS) {
            const bf16 *a = (const bf16 *)seg->site->a + (seg->start + r) * seg->site->a_stride;
            turn_a(room, a, seg->site->a_stride, least(JOIN_ROWS, seg->count - r), j->lora->in, plain);
            for (int64_t i = at; i < next; i += JOIN_WIDE)
                shrink_wide(j, &j->tiles[i], least(JOIN_WIDE, next - i), x_packed, room, r);
        }
        at = next;
    }
}
