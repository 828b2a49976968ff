// Parameter structs of all stages. The host declares the same structs; the generated translation unit asserts
// their sizes, so that drift between the two languages does not compile.
#pragma once
#include "base/types.cuh"

// A [tokens, heads, head_dim] tensor; strides in elements, head_dim contiguous, rows 16-byte aligned.
struct Tensor {
    void* data;
    i64 row_stride;
    i64 head_stride;
};

// One piece of work of a KV-major kernel: `count` entries of one block of keys.
struct __align__(16) Unit {
    i32 kv_row;         // row of the block's first key in key and value
    i32 valid_keys;     // keys of the block that exist, <= BLOCK_SIZE
    i32 first_token;    // token whose position is the block's first key: key i is visible to token t iff t >= first_token + i
    i32 block;          // global number of the block
    i32 entry_begin;    // first entry, relative to the entries of this (kv head, chunk)
    i32 entry_count;
    i32 split;          // 1: other units of the same list share the block; 0: it is the only one
    i32 reserved;
};

// 64 query rows of one sequence (the last tile of a sequence has fewer).
struct __align__(16) Tile {
    i32 token;          // first row
    i32 rows;
    i32 position;       // absolute position of the first row in its sequence
    i32 block_base;     // global number of the sequence's block 0
    i32 kv_row;         // row of the sequence's key 0
    i32 kv_len;
    i32 reserved[2];
};

// Where the sequences, tiles, blocks and chunks lie. Filled on the device by index_prepare.
struct Layout {
    const i32* cu_seqlens_q;    // [batch + 1]
    const i32* cu_seqlens_kv;   // [batch + 1]
    i32* tile_base;             // [batch + 1] prefix sums of ceil(q_len / 64)
    i32* block_base;            // [batch + 1] prefix sums of ceil(kv_len / BLOCK_SIZE)
    i32* chunk_token;           // [num_chunks + 1] first token of each chunk of tiles
    Tile* tiles;                // [max_tiles]; rows = 0 where there is none
    i32 batch;
    i32 total_q;
    i32 num_chunks;
    i32 chunk_tiles;            // tiles per chunk
    i32 max_tiles;              // bound on the number of tiles, from shapes
};

// The inverse index: which rows chose a block, per kv head and chunk of query tiles.
struct Index {
    const i32* topk_indices;    // [num_kv_heads, total_q, topk]
    i32* plane;                 // [num_kv_heads, num_subs, max_blocks] counts, then start positions
    u32* entries;               // [num_kv_heads, total_q * slots]: token in chunk | slot << 24
    u32* row_info;              // [num_kv_heads, total_q] see block/sequence.cuh
    Unit* units;                // [num_kv_heads, num_chunks, full_units + max_blocks]
    i32* unit_counts;           // [num_kv_heads, num_chunks, 2] full units, remainders
    i32 topk;
    i32 slots;                  // partials per row that the scratch has room for
    i32 lanes_per_row;          // power of two >= min(topk, 32)
    i32 has_dense;              // 1: sink and local blocks are left to the reduce stage; 0: every id is an entry
    i32 num_subs;               // pieces of chunks that one cta of the index handles
    i32 sub_tiles;              // tiles per piece; divides chunk_tiles
    i32 max_blocks;             // bound on the number of blocks, from shapes
    i32 window_blocks;          // blocks that one cta counts: bounded by shared memory
    i32 unit_entries;           // entries of a full unit
    i32 full_units;             // bound on the number of full units of a chunk, from shapes
    i32 ordered;                // 1: the entries of a block are in token order; 0: in any
};

struct IndexParams {
    Layout layout;
    Index index;
    i32 first_kv_head;          // kv head of blockIdx.y = 0: the index of later heads is built while earlier ones are attended
};

struct AttendParams {
    Layout layout;
    Index index;
    Tensor query, key, value;   // key and value by kv head
    void* partial;              // [heads in launch, rows in chunk, slots, HEAD_DIM]
    f32* partial_lse;           // [heads in launch, rows in chunk, slots], log2
    f32 scale_log2;             // softmax_scale * log2(e), >= 0
    i32 group_size;             // query heads per kv head
    i32 chunk;
    i32 first_head;             // query head of blockIdx.y = 0
};

struct ReduceParams {
    Layout layout;
    Index index;
    Tensor query, key, value;
    Tensor out;
    const void* partial;
    const f32* partial_lse;
    f32* lse;                   // [num_q_heads, total_q], natural log
    f32 scale_log2;
    i32 group_size;
    i32 chunk;
    i32 first_head;
};

struct BackwardParams {
    Layout layout;
    Index index;                // has_dense = 0: every listed block is an entry
    Tensor query, key, value;
    Tensor out, grad_out;       // out only for backward_delta
    const f32* lse;             // [num_q_heads, total_q], natural log
    const f32* grad_lse;        // the same shape, or null
    f32* row_stats;             // [heads in launch, rows, 2] log2-sum-exp and delta
    f32* grad_query;            // [heads in launch, rows, HEAD_DIM] f32, fragment order, zero before the launch
    void* partial;              // [heads in launch, rows, slots, HEAD_DIM] instead, with FSA_QUERY_PARTIALS
    Tensor grad_query_out;      // target of backward_merge
    f32* grad_key;              // [kv heads in launch, sum_rows, HEAD_DIM] f32, fragment order, zero before their first launch; row 0 is where that of
                                // key row 0 would be
    f32* grad_value;            // the same
    i64 sum_rows;               // rows of the sums, the first being that of first_key
    f32 scale_log2;
    f32 scale;
    i32 group_size;
    i32 chunk;
    i32 first_head;             // query head of the launch's first
    i32 rows;                   // rows that one head has in row_stats, grad_query and partial
    i32 first_sums;             // 1: nothing was added to grad_key and grad_value yet, and no two heads of the launch share them
    i32 first_key;              // blocks that start at rows [first_key, end_key) of key and value are done, others left to another launch
    i32 end_key;
};

// f32 accumulators in fragment order to rows of one head in the storage type.
struct ConvertParams {
    const f32* source;          // [heads, source_stride], each head [rows, HEAD_DIM]
    i64 source_stride;
    Tensor target;
    const i32* first_row;       // null: first_key
    const i32* end_row;         // null: rows
    const i32* cu_seqlens_kv;   // not null: of keys, only rows whose block starts at rows [first_key, end_key)
    i32 batch;
    i32 first_key;
    i32 end_key;
    i32 rows;
    i32 first_head;
    i32 accumulate;             // 1: the target holds a sum of other blocks, which is added to
    f32 scale;
};
