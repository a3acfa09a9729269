/* Memory that a thread keeps from call to call: a decode step comes for it some hundred times. */
typedef struct { void *at; int64_t size; } kept;

/* At least `bytes` of it, NULL where there is none. */
static void *kept_memory(kept *memory, int64_t bytes) {
    if (bytes > memory->size) {
        free(memory->at);
        memory->size = 0;
        memory->at = aligned_alloc(64, blocks_of(bytes, 64) * 64);
        if (memory->at) memory->size = bytes;
    }
    return memory->at;
}
