// Rows and keys of the stages whose rows see an interval of keys (struct Band): which sequence a tile belongs to, where its rows lie, and
// which keys a position sees. Shared by the kernels of all architectures.
#pragma once
#include "block/sequence.cuh"
#include "tile/swizzled_tile.cuh"

// Keys that a row at `position` sees: [first_key, end_key). Both ends do not decrease with the position. A window of 2^31 - 1 does not
// overflow, because a position is not negative; a row before the end of the first window of compression sees none.
FSA_DEVICE int first_key(const Band& band, int position) { return max_i(0, position - band.window); }
FSA_DEVICE int end_key(const Band& band, int position, int keys) {
    const int reach = position - (band.kernel_size - 1);
    if (reach < 0) return 0;
    return min_i(keys, (band.kernel_stride == 1 ? reach : (int)((u32)reach / (u32)band.kernel_stride)) + 1);
}
// Positions that see a key: [first_position, end_position), to be cut to the rows of the sequence.
FSA_DEVICE int first_position(const Band& band, int key) { return key * band.kernel_stride + band.kernel_size - 1; }
FSA_DEVICE int end_position(const Band& band, int key) { return key >= 0x7fffffff - band.window ? 0x7fffffff : key + band.window + 1; }

struct BandSequence {
    i32 token;          // first row of query
    i32 tokens;         // rows of query
    i32 position;       // of the first row
    i32 key_row;        // row of key 0 in key and value
    i32 keys;
    i32 number;
};
FSA_DEVICE BandSequence band_sequence(const Band& band, int number) {
    BandSequence s;
    s.token = band.cu_seqlens_q[number];
    s.tokens = band.cu_seqlens_q[number + 1] - s.token;
    s.position = band.cu_seqlens_kv[number + 1] - band.cu_seqlens_kv[number] - s.tokens;
    s.key_row = band.cu_keys[number];
    s.keys = band.cu_keys[number + 1] - s.key_row;
    s.number = number;
    return s;
}

// A tile of rows: row r is token r / tile_heads and head r % tile_heads of the tile. Rows behind the last token, and heads behind the last of
// the group, do not exist: nothing of theirs is read or written.
struct BandTile {
    i32 token;          // first token, as a row of query
    i32 tokens;         // that exist; 0: there is no such tile
    i32 position;       // of the first token
    i32 key_row;        // row of the sequence's key 0
    i32 keys;           // of the sequence
    i32 sequence;
    i32 first_head;     // query head of row 0
    i32 heads;          // that exist
    i32 tile_heads;
    u32 reciprocal;     // 2^16 / tile_heads, rounded up

    // Exact for row, tile_heads <= 128: the product is less than 2^14 / 2^16 of a token too large.
    FSA_DEVICE int token_of(int row) const { return (int)((u32)row * reciprocal >> 16); }
    FSA_DEVICE int head_of(int row) const { return row - token_of(row) * tile_heads; }
    FSA_DEVICE bool exists(int row) const { return token_of(row) < tokens && head_of(row) < heads; }
    FSA_DEVICE int position_of(int row) const { return position + token_of(row); }
    FSA_DEVICE int last_position() const { return position + tokens - 1; }
    // First byte of a row that exists.
    FSA_DEVICE const char* row_of(const Tensor& t, int row) const { return tensor_row(t, token + token_of(row), first_head + head_of(row)); }
    // Its place in [num_q_heads, total_q].
    FSA_DEVICE i64 plane_index(int row, int total_q) const { return (i64)(first_head + head_of(row)) * total_q + token + token_of(row); }
};
FSA_DEVICE BandTile band_tile(const Band& band, const BandSequence& s, int tile, int head_tile, int kv_head) {
    const int first = tile * band.tile_tokens, first_head = head_tile * band.tile_heads;
    BandTile t;
    t.token = s.token + first;
    t.tokens = min_i(band.tile_tokens, s.tokens - first);
    t.position = s.position + first;
    t.key_row = s.key_row;
    t.keys = s.keys;
    t.sequence = s.number;
    t.first_head = kv_head * band.group_size + first_head;
    t.heads = min_i(band.tile_heads, band.group_size - first_head);
    t.tile_heads = band.tile_heads;
    t.reciprocal = 65535u / (u32)band.tile_heads + 1;
    return t;
}
// Tiles of the one sequence whose rows are all at positions before a split, no more than fit before it. Tiles behind it have the numbers that they would have without.
FSA_DEVICE int early_tiles(const Band& band, const BandSequence& s) {
    const int end = max_i(band.split, -band.split);
    return min_i(ceil_div(s.tokens, band.tile_tokens), max_i(0, end - max_i(0, s.position)) / band.tile_tokens);
}

// Tile of rows `number` of one kv head, in the order of launch: head tiles of the same tokens side by side, because they share keys, and the
// last tokens first, because they see the most keys.
FSA_DEVICE BandTile find_band_tile(const Band& band, int number, int kv_head) {
    const int launched = number / band.head_tiles, head_tile = number - launched * band.head_tiles, tiles = band.tile_base[band.batch];
    int tile = tiles - 1 - launched;
    if (band.split != 0) {
        const int early = early_tiles(band, band_sequence(band, 0));
        if (band.split < 0) tile -= tiles - early;
        else if (tile < early) tile = -1;
    }
    if (tile < 0) {
        BandTile none = {};
        return none;
    }
    const int s = find_sequence(band.tile_base, band.batch, tile);
    return band_tile(band, band_sequence(band, s), tile - band.tile_base[s], head_tile, kv_head);
}

// Keys that a tile's rows see: [first, end) is what any row sees, [first_common, end_common) what every row sees; steps of keys that are not inside
// of that need masks.
struct BandInterval {
    i32 first, end, first_common, end_common;

    FSA_DEVICE bool needs_mask(int key, int step) const { return key < first_common || key + step > end_common; }
};
FSA_DEVICE BandInterval band_interval(const Band& band, const BandTile& t) {
    const int last = t.last_position();
    return {first_key(band, t.position), end_key(band, last, t.keys), first_key(band, last), end_key(band, t.position, t.keys)};
}

// Starts the copy of a tile's rows by THREADS threads; rows that do not exist become zero. Any strides.
template <int ROWS, int THREADS = WARPGROUP>
FSA_DEVICE void copy_band_rows(u32 target, const Tensor& source, const BandTile& t) {
    FSA_UNROLL for (int i = 0; i < (ROWS * PIECES_PER_ROW + THREADS - 1) / THREADS; ++i) {
        const int n = threadIdx.x + i * THREADS, row = n / PIECES_PER_ROW, piece = n % PIECES_PER_ROW;
        if (ROWS * PIECES_PER_ROW % THREADS != 0 && row >= ROWS) break;
        const bool exists = t.exists(row);
        const char* from = exists ? t.row_of(source, row) + piece * 16 : (const char*)source.data;
        copy_async(target + SwizzledTile<ROWS>::offset(row, piece), from, exists ? 16 : 0);
    }
}
