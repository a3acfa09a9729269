/* Attention of sequences with many new tokens on AMX tiles, bf16.
 *
 * The keys and values that a sequence sees are packed once a kv head: thirty-two positions are two left tiles of
 * keys for every 32 of dim, and a left tile of transposed values for every 16. An item is PROMPT_ROWS query rows (token
 * x head of the group), packed as right tiles. So scores come as [positions][rows]: maxima and sums over positions are
 * lane by lane, and exponentials in pairs of positions are the right tile that meets the values. Positions are taken
 * PROMPT_CHUNK at a time, at fixed places, with a running maximum and sum (online softmax: Milakov and Gimelshein,
 * 2018), and a row knows nothing of its neighbours, so its bits depend on nobody else. Probabilities are rounded to
 * bf16 before they meet the values, as PyTorch's own attention does.
 */
#ifdef MH_AMX
#define PROMPT_ROWS 32
#define PROMPT_CHUNK 128
#define PROMPT_BLOCK 32 /* positions of a left tile of values */

typedef struct {
    int64_t seq, queries, offset;      /* new tokens, and the position of the first */
    int64_t first, blocks;             /* the first position that is packed, and how many blocks */
    int64_t row_blocks, place;         /* items a kv head; where its packed blocks begin */
    int64_t pack_first, attend_first;  /* number of its first work items */
} prompt_plan;

typedef struct {
    const attn_args *g;
    const prompt_plan *plans;
    int64_t count, pack_items, attend_items, key_width, value_width; /* dim in whole tiles */
    bf16 *packed;
} prompt_args;

typedef struct {
    bf16 q[2 * ATTN_DIM * 16], weights[2 * PROMPT_CHUNK * 16]; /* right tiles: dim, positions */
    float scores[2][PROMPT_CHUNK * 16], out[2][ATTN_DIM * 16];   /* [position][row], [dim][row] */
} __attribute__((aligned(64))) prompt_room;

/* The plan of the work item; *item becomes its number within it. */
INLINE const prompt_plan *find_prompt(const prompt_args *a, int64_t *item, int attend) {
    int64_t low = 0, high = a->count - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if ((attend ? a->plans[middle].attend_first : a->plans[middle].pack_first) <= *item) low = middle;
        else high = middle - 1;
    }
    *item -= attend ? a->plans[low].attend_first : a->plans[low].pack_first;
    return &a->plans[low];
}

/* The packed keys and values of one kv head; a block's keys come before its values. */
INLINE bf16 *prompt_blocks(const prompt_args *a, const prompt_plan *p, int64_t kv_head) {
    return a->packed + p->place + kv_head * p->blocks * PROMPT_BLOCK * (a->key_width + a->value_width);
}

/* Thirty-two positions. Those outside of what the sequence sees become zeros: what lies there may be anyone's. */
static void prompt_pack(const prompt_args *a, const prompt_plan *p, int64_t kv_head, int64_t block) {
    const attn_args *g = a->g;
    int64_t dim = g->dim, size = g->block_size, base = p->first + block * PROMPT_BLOCK, end = p->offset + p->queries;
    int64_t seen = g->window > 0 ? p->offset - g->window + 1 : 0;
    bf16 *keys = prompt_blocks(a, p, kv_head) + block * PROMPT_BLOCK * (a->key_width + a->value_width);
    bf16 *values = keys + PROMPT_BLOCK * a->key_width;
    const bf16 *v[PROMPT_BLOCK];
    const int32_t *table = g->block_tables + p->seq * g->table_width;
    for (int64_t j = 0; j < PROMPT_BLOCK; j++) {
        int64_t at = base + j, there = at >= seen && at < end;
        int64_t place = there ? ((table[at / size] * g->kv_heads + kv_head) * size + at % size) * dim : 0;
        const bf16 *k = (const bf16 *)g->k_cache + place;
        bf16 *to = keys + j / 16 * 16 * a->key_width + j % 16 * 32;
        v[j] = there ? (const bf16 *)g->v_cache + place : NULL;
        for (int64_t d = 0; d < a->key_width; d += 32, to += TILE) {
            __mmask32 mask = (__mmask32)(!there ? 0 : dim - d >= 32 ? ~0u : (1u << (dim - d)) - 1);
            _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(mask, k + d));
        }
    }
    for (int64_t d = 0; d < a->value_width; d += 16, values += TILE) {
        __mmask16 mask = (__mmask16)(dim - d >= 16 ? 0xffff : (1u << (dim - d)) - 1);
        __m512 pairs[16];
        for (int i = 0; i < 16; i++) {
            __m256i low = _mm256_setzero_si256(), high = low;
            if (v[2 * i]) low = _mm256_maskz_loadu_epi16(mask, v[2 * i] + d);
            if (v[2 * i + 1]) high = _mm256_maskz_loadu_epi16(mask, v[2 * i + 1] + d);
            pairs[i] = (__m512)_mm512_or_si512(_mm512_cvtepu16_epi32(low),
                                               _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
        }
        transpose16(pairs);
        memcpy(values, pairs, sizeof pairs);
    }
}

/* Query rows from r0 on, `rows` of them there, as right tiles: for each 32 of dim, those of the two sixteens. */
static void prompt_queries(const prompt_args *a, const prompt_plan *p, int64_t kv_head, int64_t r0, int64_t rows,
                           bf16 *to) {
    const attn_args *g = a->g;
    int64_t dim = g->dim, group = g->heads / g->kv_heads, first = g->query_start[p->seq];
    for (int64_t d = 0; d < a->key_width; d += 32)
        for (int64_t half = 0; half < PROMPT_ROWS; half += 16, to += TILE) {
            __mmask32 mask = (__mmask32)(dim - d >= 32 ? ~0u : (1u << (dim - d)) - 1);
            __m512 tile[16];
            for (int64_t i = 0; i < 16; i++) {
                int64_t r = r0 + half + i, head = kv_head * group + r % group;
                const bf16 *q = (const bf16 *)g->q + (first + r / group) * g->q_token + head * g->q_head + d;
                tile[i] = half + i < rows ? (__m512)_mm512_maskz_loadu_epi16(mask, q) : _mm512_setzero_ps();
            }
            transpose16(tile);
            memcpy(to, tile, sizeof tile);
        }
}

/* Scores of `blocks` packed blocks: [positions][rows] of both sixteens of rows. */
static void prompt_scores(const prompt_args *a, const bf16 *block, int64_t blocks, prompt_room *room) {
    int64_t tiles = a->key_width / 32;
    for (int64_t b = 0; b < blocks; b++, block += PROMPT_BLOCK * (a->key_width + a->value_width)) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t d = 0; d < tiles; d++) {
            _tile_loadd(4, block + d * TILE, 64);
            _tile_loadd(5, block + (tiles + d) * TILE, 64);
            _tile_loadd(6, room->q + 2 * d * TILE, 64);
            _tile_loadd(7, room->q + (2 * d + 1) * TILE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, room->scores[0] + b * 512, 64);
        _tile_stored(1, room->scores[0] + b * 512 + 256, 64);
        _tile_stored(2, room->scores[1] + b * 512, 64);
        _tile_stored(3, room->scores[1] + b * 512 + 256, 64);
    }
}

/* One sixteen of rows: scores of positions base ... to weights, against the running maximum; scales what was summed. */
INLINE void prompt_soften(const attn_args *g, float *scores, bf16 *weights, int64_t positions, int64_t base, vi32 at,
                          vf *max, vf *sum, float *out, int64_t width) {
    int all_seen = g->window <= 0 && base + positions - 1 <= at[0]; /* the first row is the earliest */
    vf top = *max, total = zero();
    for (int64_t j = 0; j < positions; j++) {
        vf s = load_fp32(scores + j * 16) * splat(g->scale);
        if (g->soft_cap > 0) s = splat(g->soft_cap) * vtanh(s * splat(1 / g->soft_cap));
        if (!all_seen) {
            vi32 behind = at - (int32_t)(base + j), seen = (vi32)(behind >= 0);
            if (g->window > 0) seen &= (vi32)(behind < (int32_t)least(g->window, INT32_MAX));
            s = pick(seen, s, splat(-FLT_MAX));
        }
        store_fp32(scores + j * 16, s);
        top = vmax(s, top);
    }
    for (int64_t j = 0; j < positions; j += 2) {
        vf first = exp_nonpositive(load_fp32(scores + j * 16) - top);
        vf second = exp_nonpositive(load_fp32(scores + j * 16 + 16) - top);
        total += first + second;
        _mm512_storeu_si512(weights + j * 16, weave((__m512)first, (__m512)second));
    }
    vf factor = exp_nonpositive(*max - top);
    *sum = *sum * factor + total;
    *max = top;
    for (int64_t d = 0; d < width; d++) store_fp32(out + d * 16, load_fp32(out + d * 16) * factor);
}

/* out += values of the blocks, by their weights: [dim][rows] of both sixteens of rows. */
static void prompt_weigh(const prompt_args *a, const bf16 *block, int64_t blocks, prompt_room *room) {
    int64_t step = PROMPT_BLOCK * (a->key_width + a->value_width), tiles = a->value_width / 16;
    for (int64_t d = 0; d < tiles; d += 2) {
        int wide = d + 1 < tiles;
        const bf16 *values = block + PROMPT_BLOCK * a->key_width + d * TILE;
        _tile_loadd(0, room->out[0] + d * 256, 64);
        _tile_loadd(2, room->out[1] + d * 256, 64);
        if (wide) {
            _tile_loadd(1, room->out[0] + d * 256 + 256, 64);
            _tile_loadd(3, room->out[1] + d * 256 + 256, 64);
        }
        for (int64_t b = 0; b < blocks; b++, values += step) {
            _tile_loadd(4, values, 64);
            _tile_loadd(6, room->weights + b * TILE, 64);
            _tile_loadd(7, room->weights + PROMPT_CHUNK * 16 + b * TILE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(2, 4, 7);
            if (!wide) continue;
            _tile_loadd(5, values + TILE, 64);
            _tile_dpbf16ps(1, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, room->out[0] + d * 256, 64);
        _tile_stored(2, room->out[1] + d * 256, 64);
        if (wide) {
            _tile_stored(1, room->out[0] + d * 256 + 256, 64);
            _tile_stored(3, room->out[1] + d * 256 + 256, 64);
        }
    }
}

/* One sixteen of rows from r0 on, `rows` of them there, to the output. */
static void prompt_store(const prompt_args *a, const prompt_plan *p, int64_t kv_head, int64_t r0, int64_t rows,
                         const float *out, vf sum) {
    const attn_args *g = a->g;
    int64_t dim = g->dim, group = g->heads / g->kv_heads, first = g->query_start[p->seq];
    vf factor = splat(1.0f) / sum;
    for (int64_t d = 0; d < dim; d += 16) {
        __mmask16 mask = (__mmask16)(dim - d >= 16 ? 0xffff : (1u << (dim - d)) - 1);
        __m512 tile[16];
        for (int64_t i = 0; i < 16; i++) tile[i] = (__m512)(load_fp32(out + (d + i) * 16) * factor);
        transpose16(tile);
        for (int64_t i = 0; i < rows; i++) {
            int64_t r = r0 + i, head = kv_head * group + r % group;
            bf16 *to = (bf16 *)g->out + ((first + r / group) * g->heads + head) * dim + d;
            _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(tile[i]));
        }
    }
}

static void prompt_attend(const prompt_args *a, const prompt_plan *p, int64_t kv_head, int64_t r0, prompt_room *room) {
    const attn_args *g = a->g;
    int64_t group = g->heads / g->kv_heads, rows = least(PROMPT_ROWS, p->queries * group - r0);
    int64_t low = p->offset + r0 / group, last = p->offset + (r0 + rows - 1) / group;
    int64_t step = PROMPT_BLOCK * (a->key_width + a->value_width), begin = p->first;
    const bf16 *packed = prompt_blocks(a, p, kv_head);
    vi32 at[2];
    vf max[2] = {splat(-1e30f), splat(-1e30f)}, sum[2] = {zero(), zero()}; /* above what stands for an unseen score */
    for (int64_t i = 0; i < PROMPT_ROWS; i++) at[i / 16][i % 16] = (int32_t)least(p->offset + (r0 + i) / group, last);
    prompt_queries(a, p, kv_head, r0, rows, room->q);
    memset(room->out, 0, sizeof room->out);
    if (g->window > 0 && low - g->window + 1 > begin) begin = (low - g->window + 1) / PROMPT_CHUNK * PROMPT_CHUNK;
    for (int64_t base = begin; base <= last; base += PROMPT_CHUNK) {
        int64_t blocks = least(PROMPT_CHUNK / PROMPT_BLOCK, (last - base) / PROMPT_BLOCK + 1);
        const bf16 *block = packed + (base - p->first) / PROMPT_BLOCK * step;
        prompt_scores(a, block, blocks, room);
        for (int64_t half = 0; half < 2; half++)
            prompt_soften(g, room->scores[half], room->weights + half * PROMPT_CHUNK * 16, blocks * PROMPT_BLOCK, base,
                          at[half], &max[half], &sum[half], room->out[half], base > begin ? a->value_width : 0);
        prompt_weigh(a, block, blocks, room);
    }
    for (int64_t half = 0; half < 2; half++)
        if (rows > 16 * half)
            prompt_store(a, p, kv_head, r0 + 16 * half, least(16, rows - 16 * half), room->out[half], sum[half]);
}

/* Plans of the sequences of more than `queries` new tokens, into `plans` where there is room. Returns the elements that
 * their packed keys and values take. */
static int64_t plan_prompts(prompt_args *a, prompt_plan *plans, int64_t sequences, int64_t queries) {
    const attn_args *g = a->g;
    int64_t group = g->heads / g->kv_heads, place = 0;
    a->count = a->pack_items = a->attend_items = 0;
    for (int64_t s = 0; s < sequences; s++) {
        int64_t own = g->query_start[s + 1] - g->query_start[s], offset = g->context_lens[s] - own;
        if (own <= queries) continue;
        int64_t low = g->window > 0 ? offset - g->window + 1 : 0;
        int64_t first = low > 0 ? low / PROMPT_CHUNK * PROMPT_CHUNK : 0;
        int64_t blocks = blocks_of(offset + own - first, PROMPT_BLOCK), rows = blocks_of(own * group, PROMPT_ROWS);
        if (plans)
            plans[a->count] = (prompt_plan){s, own, offset, first, blocks, rows, place, a->pack_items, a->attend_items};
        a->count++;
        a->pack_items += g->kv_heads * blocks;
        a->attend_items += g->kv_heads * rows;
        place += g->kv_heads * blocks * PROMPT_BLOCK * (a->key_width + a->value_width);
    }
    return place;
}

/* The sequences of more than `queries` new tokens. Returns 0 or MH_NO_MEMORY. */
static int64_t attend_prompts(const attn_args *g, int64_t sequences, int64_t queries) {
    static __thread kept tables, numbers;
    prompt_args a = {.g = g, .key_width = blocks_of(g->dim, 32) * 32, .value_width = blocks_of(g->dim, 16) * 16};
    int64_t elements = plan_prompts(&a, NULL, sequences, queries);
    if (!a.count) return 0;
    prompt_plan *plans = kept_memory(&tables, a.count * (int64_t)sizeof *plans);
    a.packed = kept_memory(&numbers, elements * (int64_t)sizeof *a.packed);
    if (!plans || !a.packed) return MH_NO_MEMORY;
    plan_prompts(&a, plans, sequences, queries);
    a.plans = plans;
    tile_shape shape = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shape.bytes[i] = 64;
        shape.rows[i] = 16;
    }
#pragma omp parallel num_threads(g->threads)
    {
        prompt_room room;
        _tile_loadconfig(&shape);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < a.pack_items; i++) {
            int64_t own = i;
            const prompt_plan *p = find_prompt(&a, &own, 0);
            prompt_pack(&a, p, own / p->blocks, own % p->blocks);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < a.attend_items; i++) {
            int64_t own = i;
            const prompt_plan *p = find_prompt(&a, &own, 1);
            prompt_attend(&a, p, own / p->row_blocks, own % p->row_blocks * PROMPT_ROWS, &room);
        }
        _tile_release();
    }
    return 0;
}
#endif
