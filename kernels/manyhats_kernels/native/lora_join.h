/* The low-rank products of long segments within the base's. Shrunk from the tiles of x that the base's product packed;
 * then what the adapters add to sixteen outputs of sixteen tokens is one more product of tiles for every sixteen rank
 * rows, on the sums that the base's left in the registers. y is neither read again nor rounded in between.
 *
 * Left tiles hold sixteen outputs' columns of B twice, [16][2][16 rank rows]; right ones the shrunk rows' high halves,
 * then the low ones, of sixteen neighbours in the batch, [2 * 8 pairs of rank rows][16 tokens], zero where a neighbour
 * is of another segment.
 */
#ifdef MH_AMX
#define JOIN_TOKENS 32 /* of a segment, from which its products are joined to the base's */
#define JOIN_ROWS 16   /* rank rows in a tile */

typedef struct { /* the tokens of a segment among sixteen neighbours */
    const lora_segment *segment;
    int64_t begin, end; /* of the segment's tokens */
    int64_t next;       /* another of the same neighbours and site, or -1 */
    bf16 *right;        /* blocks_of(rank rows, JOIN_ROWS) tiles */
} join_tile;

typedef struct {
    const lora_args *lora;
    const lora_site *sites;
    int64_t site_count;
    join_tile *tiles;
    int64_t *heads; /* the first of each site and sixteen neighbours, or -1: [sites][token_tiles] */
    int64_t tile_count, token_tiles;
    int64_t left_size; /* elements of the left tiles of a panel */
} lora_join;

INLINE int64_t join_chunks(const lora_segment *seg) { return blocks_of(seg->count, JOIN_ROWS); }

/* Numbers the tiles of the long segments (or only counts them without memory); returns their right tiles' elements. */
static int64_t number_joins(lora_join *j, lora_segment *segments, bf16 *right) {
    const int32_t *order = j->lora->order;
    int64_t elements = 0;
    j->tile_count = j->left_size = 0;
    for (int64_t i = 0; i < j->lora->segment_count; i++) {
        lora_segment *seg = &segments[i];
        if (seg->tokens < JOIN_TOKENS) continue;
        int64_t before = j->tile_count, *heads = j->heads ? j->heads + (seg->site - j->sites) * j->token_tiles : NULL;
        for (int64_t t = 0, end; t < seg->tokens; t = end, j->tile_count++) {
            int64_t tile = order[seg->begin + t] / 16;
            for (end = t + 1; end < seg->tokens && order[seg->begin + end] / 16 == tile; end++) {}
            if (heads) {
                j->tiles[j->tile_count] = (join_tile){seg, t, end, heads[tile], right + elements};
                heads[tile] = j->tile_count;
            }
            elements += join_chunks(seg) * TILE;
        }
        seg->joins = j->tile_count - before;
        seg->left = j->left_size;
        j->left_size += 2 * join_chunks(seg) * TILE;
    }
    return elements;
}

/* Memory and numbers for the joins of j; 0 or MH_NO_MEMORY. */
static int64_t join_begin(lora_join *j) {
    static __thread kept memory;
    lora_segment *segments = (lora_segment *)j->lora->segments;
    j->heads = NULL;
    int64_t elements = number_joins(j, segments, NULL), heads = j->site_count * j->token_tiles;
    if (!j->tile_count) return 0;
    char *room = kept_memory(&memory, elements * (int64_t)sizeof(bf16) + heads * (int64_t)sizeof(int64_t) +
                                          j->tile_count * (int64_t)sizeof(join_tile));
    if (!room) return MH_NO_MEMORY;
    j->heads = (int64_t *)(room + elements * sizeof(bf16));
    j->tiles = (join_tile *)(j->heads + heads);
    for (int64_t i = 0; i < heads; i++) j->heads[i] = -1;
    number_joins(j, segments, (bf16 *)room);
    return 0;
}

/* Thirty-two columns of up to JOIN_ROWS rank rows of B, of which `rows` and `columns` are there, to two left tiles. */
INLINE void turn_rows(bf16 *left, const bf16 *b, int64_t stride, int64_t rows, int64_t columns) {
    const __mmask32 upper = 0xaaaaaaaa, mask = (__mmask32)(columns >= 32 ? ~0u : (1u << columns) - 1);
    const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    __m512 one[16], two[16];
    for (int p = 0; p < 8; p++) {
        __m512i a = _mm512_maskz_loadu_epi16(2 * p < rows ? mask : 0, b + 2 * p * stride);
        __m512i c = _mm512_maskz_loadu_epi16(2 * p + 1 < rows ? mask : 0, b + (2 * p + 1) * stride);
        __m512i even = _mm512_mask_mov_epi16(a, upper, _mm512_slli_epi32(c, 16));
        __m512i odd = _mm512_mask_mov_epi16(_mm512_srli_epi32(a, 16), upper, c);
        one[p] = one[p + 8] = (__m512)_mm512_permutex2var_epi32(even, first, odd);
        two[p] = two[p + 8] = (__m512)_mm512_permutex2var_epi32(even, second, odd);
    }
    transpose16(one);
    transpose16(two);
    memcpy(left, one, sizeof one);
    memcpy(left + TILE, two, sizeof two);
}

/* The left tiles of a panel of thirty-two outputs from n0 on, of every joined segment of the site. */
static void turn_panel(const lora_join *j, const lora_site *site, int64_t n0, bf16 *left) {
    for (int64_t i = 0; i < j->lora->segment_count; i++) {
        const lora_segment *seg = &j->lora->segments[i];
        if (!seg->joins || seg->site != site) continue;
        for (int64_t r = 0; r < seg->count; r += JOIN_ROWS)
            turn_rows(left + seg->left + 2 * r / JOIN_ROWS * TILE,
                      (const bf16 *)site->b + (seg->start + r) * site->b_stride + n0, site->b_stride,
                      least(JOIN_ROWS, seg->count - r), site->out - n0);
    }
}

/* Onto the sums of thirty-two outputs in tiles 0 and 1, or with `second` 2 and 3, of sixteen neighbours. */
INLINE void add_joins(const lora_join *j, const lora_site *site, const bf16 *left, int64_t token_tile, int second) {
    for (int64_t at = j->heads[(site - j->sites) * j->token_tiles + token_tile]; at >= 0; at = j->tiles[at].next) {
        const join_tile *join = &j->tiles[at];
        const bf16 *own = left + join->segment->left;
        for (int64_t c = 0; c < join_chunks(join->segment); c++) {
            _tile_loadd(4, own + 2 * c * TILE, 64);
            _tile_loadd(5, own + (2 * c + 1) * TILE, 64);
            _tile_loadd(6, join->right + c * TILE, 64);
            if (second) {
                _tile_dpbf16ps(2, 4, 6);
                _tile_dpbf16ps(3, 5, 6);
            } else {
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 5, 6);
            }
        }
    }
}
#endif
