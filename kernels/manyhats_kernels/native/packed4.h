/* 4-bit weights as bitsandbytes packs them for CPUs, unpacked to bf16.
 *
 * packed is [N / 32][K / 2][32] bytes: byte i of a row of 32 holds, for k = 2 * row + i % 2, output i / 2 in its
 * low and output 16 + i / 2 in its high nibble. absmax is [K / block][N] bf16, code 16 fp32 values.
 */
INLINE uint16_t nearest_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float from_bf16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

EXPORT void mh_unpack4(int threads, uint16_t *out, const uint8_t *packed, const uint16_t *absmax,
                       const float *code, int64_t n, int64_t k, int64_t block) {
    int64_t groups = n / 32, blocks = k / block;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t g = 0; g < groups; g++) {
        for (int64_t b = 0; b < blocks; b++) {
            uint16_t table[32][16];
            for (int row = 0; row < 32; row++) {
                float scale = from_bf16(absmax[b * n + g * 32 + row]);
                for (int c = 0; c < 16; c++) table[row][c] = nearest_bf16(code[c] * scale);
            }
            const uint8_t *in = packed + (g * (k / 2) + b * block / 2) * 32;
            uint16_t *to = out + g * 32 * k + b * block;
            for (int row = 0; row < 16; row++) {
                const uint16_t *low = table[row], *high = table[row + 16];
                uint16_t *to_low = to + row * k, *to_high = to + (row + 16) * k;
                for (int64_t j = 0; j < block / 2; j++) {
                    uint8_t first = in[j * 32 + 2 * row], second = in[j * 32 + 2 * row + 1];
                    to_low[2 * j] = low[first & 15];
                    to_low[2 * j + 1] = low[second & 15];
                    to_high[2 * j] = high[first >> 4];
                    to_high[2 * j + 1] = high[second >> 4];
                }
            }
        }
    }
}
