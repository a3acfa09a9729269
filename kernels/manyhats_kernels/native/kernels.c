/* The entry points, the plans of work items, and the kernels instantiated for each storage type.
 *
 * dtype: 0 bf16, 1 fp16, 2 fp32. Strides are in elements. Entry points return 0, MH_NO_MEMORY, or a positive
 * number that says which segment owns rows outside the pool (its index + 1); then nothing was written.
 */
#include <omp.h>
#include <stdlib.h>

#include "vec.h"

#define EXPORT __attribute__((visibility("default")))
#define MH_NO_MEMORY (-1)
#define LORA_TOKENS 32   /* tokens of a segment that one item takes, where there are many items */
#define LORA_COLUMNS 256 /* columns of B that one item takes, likewise */
#define LORA_CHUNK 32    /* rank rows that one tile of the expand takes */
#define LORA_MANY 32     /* this many items a thread: fewer are cut smaller, so that none waits long */
#define LORA_SERIAL 49152 /* multiplications below which waking the other threads costs more than it saves */
#define LORA_TILES_SERIAL 262144 /* likewise on AMX tiles: bytes of weights, and elements of y */
#define ATTN_ROWS 16     /* query rows (token x head of the group) that one item takes */
#define ATTN_CHUNK 256   /* positions that one item takes */
#define ATTN_DIM 256     /* the largest head size */

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

typedef struct { /* one site of a group: int64 fields in this order come from the launcher */
    void *y;
    int64_t y_stride;
    const void *a, *b;
    int64_t a_stride, b_stride, out, pool_rows;
    const int32_t *start, *count; /* by slot */
} lora_site;

typedef struct {
    const lora_site *site;
    int64_t begin, tokens;  /* place in order */
    int64_t start, count;   /* rank rows */
    int64_t scratch;        /* where its shrunk rows [tokens, count] begin */
    int64_t packed, halves; /* where its packed tokens and the halves of its shrunk rows begin */
    int64_t shrink_first, expand_first; /* number of its first work items */
    int64_t joins, left; /* tiles in lora_join, 0 where its expand is a pass of its own; where its left ones begin */
} lora_segment;

typedef struct { const lora_segment *segment; int64_t token; } lora_pack_item; /* sixteen tokens from `token` on */

typedef struct {
    const void *x;
    int64_t x_stride, in;
    const int32_t *order;
    const lora_segment *segments;
    float *scratch;
    int64_t segment_count, shrink_items, expand_items, shrink_grain, expand_grain;
    int64_t token_step, column_step; /* tokens and columns of an item */
    const lora_pack_item *packs;     /* this and the rest: on AMX tiles alone */
    bf16 *packed, *halves, *panels;
    int64_t pack_items, packed_width, panel_size;
    int threads, amx;
    int64_t join_tokens; /* of a segment from which it is not packed: the base's product does it; 0 for none */
} lora_args;

typedef struct {
    int64_t seq, kv_head, row0, row1, chunk;
    int64_t partial; /* first row of its partial results, -1 when it writes the output itself */
} attn_item;

typedef struct { int64_t item, chunks; } attn_merge;

typedef struct {
    void *out;
    const void *q, *k_cache, *v_cache;
    int64_t q_token, q_head, heads, kv_heads, dim, block_size, table_width, window;
    const int32_t *query_start, *context_lens, *block_tables;
    float scale, soft_cap;
    float *scratch;
    const attn_item *items;
    const attn_merge *merges;
    int64_t item_count, merge_count, grain;
    int threads;
} attn_args;

/* The last segment whose first item is not after `item`. */
INLINE const lora_segment *find_segment(const lora_args *g, int64_t item, int expand) {
    int64_t low = 0, high = g->segment_count - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        const lora_segment *seg = &g->segments[middle];
        if ((expand ? seg->expand_first : seg->shrink_first) <= item) low = middle;
        else high = middle - 1;
    }
    return &g->segments[low];
}

#include "amx.h"
#include "memory.h"
#include "parts_plan.h"

#define T bf16
#define NAME(f) f##_bf16
#define LOAD load_bf16
#define STORE store_bf16
#ifdef MH_AVX512_BF16
#define NATIVE_DOT
#endif
#include "typed.h"

#define T fp16
#define NAME(f) f##_fp16
#define LOAD load_fp16
#define STORE store_fp16
#include "typed.h"

#define T float
#define NAME(f) f##_fp32
#define LOAD load_fp32
#define STORE store_fp32
#include "typed.h"

#include "lora_amx.h"
#include "lora_entry.h"
#include "attention_amx.h"

/* Copy [tokens, heads, dim] to the places `where` of a cache [blocks, heads, size, dim]. */
EXPORT void mh_store_kv(int64_t element, int threads, char *k_cache, char *v_cache, const char *k, const char *v,
                        int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head,
                        const int64_t *where, int64_t tokens, int64_t heads, int64_t dim, int64_t size) {
    int64_t bytes = dim * element;
#pragma omp parallel for num_threads(threads) if (tokens * heads * bytes > 65536)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++) {
            int64_t to = ((where[t] / size * heads + h) * size + where[t] % size) * bytes;
            memcpy(k_cache + to, k + (t * k_token + h * k_head) * element, bytes);
            memcpy(v_cache + to, v + (t * v_token + h * v_head) * element, bytes);
        }
}

/* Fill items and merges (or only count them when items is NULL); sets *partials to the rows of partial results. */
static void plan_attention(const attn_args *g, int64_t sequences, int64_t max_queries, attn_item *items,
                           attn_merge *merges, int64_t *item_count, int64_t *merge_count, int64_t *partials) {
    int64_t group = g->heads / g->kv_heads, n = 0, m = 0, p = 0;
    for (int64_t s = 0; s < sequences; s++) {
        int64_t queries = g->query_start[s + 1] - g->query_start[s], offset = g->context_lens[s] - queries;
        if (queries > max_queries) continue;
        for (int64_t h = 0; h < g->kv_heads; h++)
            for (int64_t r0 = 0; r0 < queries * group; r0 += ATTN_ROWS) {
                int64_t r1 = least(r0 + ATTN_ROWS, queries * group);
                int64_t low = g->window > 0 ? offset + r0 / group - g->window + 1 : 0;
                int64_t c0 = low > 0 ? low / ATTN_CHUNK : 0, c1 = (offset + (r1 - 1) / group) / ATTN_CHUNK + 1;
                if (c1 - c0 > 1) {
                    if (items) merges[m] = (attn_merge){n, c1 - c0};
                    m++;
                }
                for (int64_t c = c0; c < c1; c++, n++) {
                    if (items) items[n] = (attn_item){s, h, r0, r1, c, c1 - c0 > 1 ? p : -1};
                    if (c1 - c0 > 1) p += r1 - r0;
                }
            }
    }
    *item_count = n;
    *merge_count = m;
    *partials = p;
}

/* Sequences of up to max_queries new tokens; with `amx`, which takes bf16 and heads of up to ATTN_DIM, the others too. */
EXPORT int64_t mh_attention(int dtype, int amx, int threads, void *out, const void *q, int64_t q_token, int64_t q_head,
                            const void *k_cache, const void *v_cache, int64_t heads, int64_t kv_heads,
                            int64_t dim, int64_t block_size, const int32_t *query_start,
                            const int32_t *context_lens, const int32_t *block_tables, int64_t table_width,
                            int64_t sequences, int64_t max_queries, float scale, int64_t window, float soft_cap) {
    attn_args g = {.out = out, .q = q, .k_cache = k_cache, .v_cache = v_cache, .q_token = q_token,
                   .q_head = q_head, .heads = heads, .kv_heads = kv_heads, .dim = dim, .block_size = block_size,
                   .table_width = table_width, .window = window, .query_start = query_start,
                   .context_lens = context_lens, .block_tables = block_tables, .scale = scale,
                   .soft_cap = soft_cap, .threads = threads};
    int64_t partials;
#ifdef MH_AMX
    if (amx && attend_prompts(&g, sequences, max_queries)) return MH_NO_MEMORY;
#endif
    (void)amx;
    plan_attention(&g, sequences, max_queries, NULL, NULL, &g.item_count, &g.merge_count, &partials);
    if (g.item_count == 0) return 0;
    attn_item *items = malloc(g.item_count * sizeof *items);
    attn_merge *merges = malloc((g.merge_count + 1) * sizeof *merges);
    g.scratch = malloc((partials * (dim + 2) + 1) * sizeof *g.scratch);
    int64_t failed = items && merges && g.scratch ? 0 : MH_NO_MEMORY;
    if (!failed) {
        plan_attention(&g, sequences, max_queries, items, merges, &g.item_count, &g.merge_count, &partials);
        g.items = items;
        g.merges = merges;
        g.grain = 1 + g.item_count / (threads * 16);
        if (dtype == 0) attend_run_bf16(&g);
        else if (dtype == 1) attend_run_fp16(&g);
        else attend_run_fp32(&g);
    }
    free(items);
    free(merges);
    free(g.scratch);
    return failed;
}

#include "dense_entry.h"
#include "parts_entry.h"
#include "quant4.h"
#include "project.h"
#include "stack.h"
