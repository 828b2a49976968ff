// Parameter structs of all stages. The host declares the same structs; the generated translation unit asserts
// their sizes, so that drift between the two languages does not compile.
#pragma once
#include "base/types.cuh"

struct RowStats;        // block/row_stats.cuh
struct RowBounds;       // block/query_sums.cuh
struct KeyBounds;

// A [tokens, heads, head_dim] tensor; strides in elements, head_dim contiguous, rows 16-byte aligned.
struct Tensor {
    void* data;
    i64 row_stride;
    i64 head_stride;
};

// Weights of the branches compressed, selected, window: three elements side by side for a row, or for a row and head.
struct Gates {
    const void* data;
    i64 row_stride;     // elements
    i64 head_stride;    // 0: one for all heads
};

// What becomes of an attention's rows where it is a branch of the whole.
struct Branch {
    Tensor sum;         // of the branches' rows times their gates, shape of out; null: it is none
    Gates gates;
    i32 number;         // which of the three
    i32 accumulate;     // 1: sum holds what is added to
    i32 discards;       // 1: the rows themselves are not written
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
    i32 sums_row;       // row of the sums of the block's first key, among those of its kv head
};

// In place of the row of sums of a block that has at most one unit.
constexpr i32 LISTED_BY_NONE = -2, LISTED_BY_ONE_UNIT = -1;

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
    i32* plane;                 // [num_kv_heads, num_subs, max_blocks] counts, then start positions; index_build: [num_kv_heads, num_chunks, 1 + max_blocks], see there
    u32* entries;               // [num_kv_heads, total_q * slots]: token in chunk | slot << 24
    u32* row_info;              // [num_kv_heads, total_q] see block/sequence.cuh
    Unit* units;                // [num_kv_heads, num_chunks, full_units + max_blocks]
    i32* unit_counts;           // [num_kv_heads, num_chunks, 2] full units, remainders
    i32* block_sums;            // [num_kv_heads, max_blocks] where there is one chunk: the sums_row of blocks of several units, LISTED_BY_.. of others; or null
    i32* split_blocks;          // [num_kv_heads, max_split_blocks] with packs_sums: the blocks of several units in the order of their sums, then -1
    i32 topk;
    i32 slots;                  // partials per row that the scratch has room for
    i32 has_dense;              // 1: sink and local blocks are left to the reduce stage; 0: every id is an entry
    i32 num_subs;               // pieces of chunks that one cta of the index handles
    i32 sub_tiles;              // tiles per piece; divides chunk_tiles
    i32 max_blocks;             // bound on the number of blocks, from shapes
    i32 window_blocks;          // blocks that one cta counts: bounded by shared memory
    i32 unit_entries;           // entries of a full unit, at least
    i32 spare_units;            // units beyond one a block that a launch has ctas for: where there are more, full units are larger
    i32 full_units;             // bound on the number of full units of a chunk, from shapes
    i32 ordered;                // 1: the order of a block's entries follows from the input; 0: it is any
    i32 packs_sums;             // 1: only blocks of several units have sums, side by side; 0: sums_row is kv_row
    i32 max_split_blocks;       // bound on blocks of several units, from shapes
};

struct IndexParams {
    Layout layout;
    Index index;
    i32 first_kv_head;          // kv head of blockIdx.y = 0: the index of later heads is built while earlier ones are attended
    i32 staged;                 // 1: a piece's entries fit in shared memory
};

struct AttendParams {
    Layout layout;
    Index index;
    Tensor query, key, value;   // key and value by kv head
    void* partial;              // [heads in launch, rows in chunk, slots, HEAD_DIM], as block/partial_rows.cuh has them
    f32* partial_lse;           // [heads in launch, rows in chunk, slots], log2; beside each a factor if partials are packed
    f32 scale_log2;             // softmax_scale * log2(e), >= 0
    i32 group_size;             // query heads per kv head
    i32 chunk;
    i32 first_head;             // query head of blockIdx.y = 0
};

// How the bulk copy engine sees a [tokens, heads, HEAD_DIM] tensor: boxes of 64 columns, some heads and some tokens, 128-byte swizzle. Made by the driver;
// all zero where the kernels are portable.
struct __align__(64) TensorMap {
    u64 words[16];
};

struct ReduceParams {
    Layout layout;
    Index index;
    Tensor query, key, value;
    Tensor out;
    const void* partial;
    const f32* partial_lse;
    f32* lse;                   // [num_q_heads, total_q], natural log; null: not wanted
    f32 scale_log2;
    i32 group_size;
    i32 chunk;
    i32 first_head;
    Branch branch;
    TensorMap key_map;          // boxes of 64 keys of one head, or of a block if that is less
    TensorMap value_map;        // the same
};

// What bounds an attention's part of scaled sums of grad_query.
struct SumBounds {
    const RowBounds* rows;
    const KeyBounds* keys;
};
// Keys whose bounds are raised; null where there are none.
struct SumKeys {
    Tensor key, value;
    const i32* cu_keys;         // [batch + 1] rows of key and value
    KeyBounds* bounds;
};

struct BackwardParams {
    Layout layout;
    Index index;                // has_dense = 0: every listed block is an entry
    Tensor query, key, value;
    Tensor out, grad_out;       // out only where the statistics are not given
    const f32* lse;             // [num_q_heads, total_q], natural log
    const f32* grad_lse;        // the same shape, or null
    f32* row_stats;             // [heads in launch, rows], or the other way round, statistics of rows (block/row_stats.cuh), or [num_q_heads, total_q] given by the caller
    void* grad_query;           // [heads in launch, rows, HEAD_DIM] f32 or scaled f16, fragment order, the latter also [rows, heads in launch, HEAD_DIM]; in_place: grad_query_out from the launch's first head on
    void* partial;              // [heads in launch, rows, slots, HEAD_DIM] instead, with FSA_QUERY_PARTIALS
    Tensor grad_query_out;      // targets
    Tensor grad_key_out, grad_value_out;
    f32* grad_key;              // [kv heads in launch, sum_rows, HEAD_DIM] f32, fragment order; Unit::sums_row says which row is a block's first. Without
                                // packs_sums row 0 is where that of key row 0 would be
    f32* grad_value;            // the same
    RowBounds* row_bounds;      // [num_q_heads], or one given by the caller for all; zero before the first launch. With FSA_SCALED_SUMS
    KeyBounds* key_bounds;      // [num_kv_heads], the same
    KeyBounds* block_bounds;    // [num_kv_heads, max_blocks] of the keys of a block
    SumBounds sums[3];          // where grad_query_out holds sums of other attentions, those of BandBackwardParams: it becomes the gradient of all
    i64 sum_rows;               // rows of the sums of a kv head; without packs_sums the first is that of first_key
    i64 query_row_bytes;        // with FSA_SCALED_SUMS: from row to row and from head to head of grad_query
    i64 query_head_bytes;
    f32 scale_log2;
    f32 scale;
    i32 group_size;
    i32 chunk;
    i32 first_head;             // query head of the launch's first
    i32 stats_row;              // statistics from row to row and from head to head of row_stats
    i32 stats_head;
    i32 rows;                   // rows that one head has in row_stats, grad_query and partial
    i32 first_sums;             // 1: nothing was added to grad_key and grad_value yet, and no two heads of the launch share them
    i32 finish_sums;            // 1: nothing will be, and no two heads do: a block's only unit writes rows of grad_key_out and grad_value_out
    i32 first_key;              // blocks that start at rows [first_key, end_key) of key and value are done, others left to another launch
    i32 end_key;
    i32 given_stats;            // 1: row_stats are the caller's, and may say that gates are negative
    i32 accumulate;             // 1: grad_query_out is added to
    i32 accumulate_keys;        // 1: grad_key_out and grad_value_out are
    i32 in_place;               // 1: grad_query_out holds its rows' scaled sums until backward_finish makes gradients of them
};

// Which blocks of keys a row lists, and the steps of keys that the rows of a tile list. Made by block_mask from lists of blocks.
struct BlockMask {
    u32* rows;                  // [num_kv_heads, total_q, words]: bit i of a row is set iff it lists block i of its sequence
    i32* steps;                 // [num_kv_heads, num_tiles, max_steps] steps of which some row of the tile lists a block, the last keys first: first key, odd
                                // where not every row lists all of the step's blocks; where there is a window, too, its steps behind the others
    i32* step_counts;           // [num_kv_heads, num_tiles]
    u32* nonfinite;             // [num_kv_heads, value_groups] not 0 where some value of VALUE_ROWS rows is not finite; for Hopper's kernels
    i32 words;                  // bound on the blocks of a sequence / 32
    i32 max_steps;              // bound on the steps of a tile
    i32 num_tiles;              // bound on the tiles of rows; they are numbered in the order of launch
    i32 value_groups;           // total_keys / VALUE_ROWS, rounded up
};

constexpr int VALUE_ROWS = 64;      // that share a word of BlockMask::nonfinite

// Which keys a row sees in the stages window, compressed and dense, and where the rows and keys of a sequence lie. A row at position p sees
// key i of its sequence iff i * kernel_stride + kernel_size - 1 <= p and i >= p - window: an interval, whose ends do not decrease with p.
// For tokens as keys, kernel_size = kernel_stride = 1; where no key is too far, window = 2^31 - 1.
// A tile of rows is tile_tokens consecutive tokens of one sequence times tile_heads query heads of one kv head: row r is token r / tile_heads,
// head r % tile_heads. So rows that share keys share a tile at any group size.
struct Band {
    const i32* cu_seqlens_q;    // [batch + 1]
    const i32* cu_seqlens_kv;   // [batch + 1] tokens, of which positions are counted
    const i32* cu_keys;         // [batch + 1] rows of key and value: cu_seqlens_kv, or the prefix sums of the compressed keys
    const i32* tile_base;       // [batch + 1] prefix sums of ceil(q_len / tile_tokens)
    const i32* key_tile_base;   // [batch + 1] prefix sums of ceil(keys / keys of a cta); backward only
    i32 batch;
    i32 total_q;
    i32 total_keys;
    i32 kernel_size;
    i32 kernel_stride;
    i32 window;
    i32 group_size;             // query heads per kv head
    i32 tile_heads;             // query heads of a tile
    i32 tile_tokens;            // tokens of a tile
    i32 head_tiles;             // ceil(group_size / tile_heads)
    i32 split;                  // not 0: of one sequence, only the tiles with a row at this position or behind; negative: only the others, of its negative
    BlockMask mask;             // with FSA_BLOCK_MASK: of these keys, those of the blocks that the row lists
};

// Prefix sums of a batch, those of them that are not null, and bounds to clear that the kernels behind raise. One cta fills them.
struct BatchTables {
    const i32* cu_seqlens_q;
    const i32* cu_seqlens_kv;
    i32* cu_compressed;         // [batch + 1] of max(0, (kv_len - kernel_size) / kernel_stride + 1)
    i32* tile_base;             // [batch + 1] of ceil(q_len / tile_tokens)
    i32* key_tile_base;         // [batch + 1] of ceil(keys / tile_keys), keys being compressed ones or tokens
    u32* cleared[6];            // pairs of words that become zero
    i32 batch;
    i32 kernel_size;
    i32 kernel_stride;
    i32 tile_tokens;
    i32 tile_keys;
    i32 compressed;             // 1: key_tile_base counts compressed keys
};
// Lists of rows that list all blocks that they see: of calls that have no more blocks than a list has places.
struct BlockLists {
    const i32* cu_seqlens_q;
    const i32* cu_seqlens_kv;
    i32* topk_indices;          // [num_kv_heads, total_q, topk]; null: not wanted
    i32 batch;
    i32 total_q;
    i32 num_kv_heads;
    i32 topk;
    i32 block_size;
    i32 first_cta;              // those before have tables
};
struct PrepareParams {
    BatchTables tables[2];      // one for each cta
    BlockLists lists;           // for the other ctas
};

struct BlockMaskParams {
    Band band;
    Tensor value;               // null: nobody asks where it is not finite
    const i32* topk_indices;    // [num_kv_heads, total_q, topk]
    i32 topk;
    i32 step_keys;              // keys of a step of the kernel that reads the mask
    i32 window;                 // earlier keys that the same kernel attends to, too; -1: it does not
};

struct BandParams {
    Band band;
    Tensor query, key, value, out;
    f32* lse;                   // [num_q_heads, total_q], natural log; null: not wanted
    Branch branch;
    f32 scale_log2;             // softmax_scale * log2(e), >= 0
    i32 num_tiles;              // bound on the tiles of rows, from shapes
    i32 num_kv_heads;
    TensorMap query_map;        // boxes of tile_tokens x tile_heads
    TensorMap key_map;          // boxes of 128 keys of one head, of 64 above head_dim 128
    TensorMap value_map;        // the same
};

// Attention to the window that goes on to all keys before it, and to compressed keys: three branches of the whole, whose sums, gates and `discards` are those of
// the first.
struct BandBothParams {
    BandParams attention;       // to the window
    BandParams compressed;
    Tensor out;                 // of all keys
    f32* lse;
    Branch branch;
};

// Attention to the blocks that a row lists and to its window: two attentions from one walk of all steps that either needs.
struct BandPairParams {
    BandParams attention;       // to the blocks; the mask has the steps of the window, too
    Tensor out;                 // of the window
    f32* lse;
    Branch branch;              // the same gates, and the same sum, which is not added to
    Tensor compressed;          // rows of compressed attention without their gates, which are number 0 of these; may be the sum's place
    i32 window;                 // earlier keys that it shows
};

// Compressed attention that also chooses blocks: its probabilities, pooled to scores, and what is chosen by them.
struct BlockChoice {
    f32* scores;                // [ctas, SLOTS] slots of a tile: sums of groups of four keys and maxima of rows (ScoreSlots::number)
    i32* topk_indices;          // [num_kv_heads, total_q, topk]
    i32 max_steps;              // bound on the blocks of a sequence / 32, a multiple of 4
    i32 topk;
    i32 init_blocks;
    i32 local_blocks;
    i32 window;                 // of who reads the mask: BlockMaskParams::window
    BlockMask mask;             // of what is chosen, for tiles of as many rows and steps of as many keys as these; rows null: nobody asks. Of several heads and up to 128 blocks
    Tensor value;               // of the tokens: which are not finite, is found for the mask
};
struct BandSelectParams {
    BandParams attention;       // key_map, value_map: boxes of every fourth of 128 keys
    BlockChoice choice;
    TensorMap out_map;          // boxes as query_map's; of several heads
    TensorMap sum_map;          // the same of attention.branch.sum
};

struct BandBackwardParams {
    Band band;
    Tensor query, key, value, out, grad_out;
    const f32* lse;             // [num_q_heads, total_q], natural log
    const f32* grad_lse;        // the same shape, or null
    RowStats* row_stats;        // [num_q_heads, total_q]
    RowBounds* row_bounds;      // of all rows, raised where row_stats are written; null where grad_query is not added up in memory
    KeyBounds* key_bounds;      // of all keys; both zero before the first launch
    SumBounds sums[3];          // of all attentions that add to grad_query in memory, null behind the last; their kernels take them in the same order
    SumKeys other;              // keys of another of them
    u32* clearing;              // shares of grad_query that somebody clears, and those that are clear, of all launches that add to it; null: it is zero
    const RowStats* window_stats;       // with FSA_WINDOW_TOO: of the same rows and keys in a softmax of its own, that of the last window_size earlier keys
    Tensor grad_query, grad_key, grad_value;
    f32* partial_keys;          // [splits, 2, total_keys, num_kv_heads, HEAD_DIM] f32 in natural order, or HalfSplits; null where splits = 1
    f32 scale_log2;
    f32 scale;
    i32 num_kv_heads;
    i32 num_tiles;              // bound on the tiles of rows
    i32 num_key_tiles;          // bound on the tiles of keys
    i32 splits;                 // ctas that share the rows of a tile of keys, each with partial sums of its own
    i32 resident;               // ctas that the device runs at one time
    i32 accumulate;             // grad_query is added to
    i32 accumulate_keys;        // grad_key and grad_value are
    i32 window_size;
    TensorMap query_map;        // boxes of tile_tokens x tile_heads
    TensorMap grad_out_map;     // the same
    TensorMap key_map;          // boxes of 128 keys of one head, of 64 above head_dim 128
    TensorMap value_map;        // the same
    TensorMap sums_map;         // grad_query as f16, boxes of tile_tokens x tile_heads; where it is added up in memory
};

// Scores of blocks and their top-k, from the compressed keys and the log-sum-exp of compressed attention.
struct SelectParams {
    Band band;                  // of the compressed keys
    Tensor query, key;
    const f32* lse;             // [num_q_heads, total_q], natural log
    i32* topk_indices;          // [num_kv_heads, total_q, topk]
    f32 scale_log2;
    i32 topk;
    i32 init_blocks;
    i32 local_blocks;
    i32 scored_heads;           // query heads of a group that vote: all, or the first
    i32 num_tiles;
    i32 num_kv_heads;
    i32 segment_steps;          // Hopper: steps of keys whose blocks' scores have room; 0: blocks are offered step by step
    i32 direct;                 // Hopper: 1, 2, 4 or 8 heads and blocks of four keys are added up in registers
    TensorMap query_map;        // boxes of tile_tokens x tile_heads
    TensorMap key_map;          // boxes of every fourth of 128 keys of one head, of 64 above head_dim 128
};

// Windows of kernel_size tokens, kernel_stride apart, to one vector each, and back.
struct CompressParams {
    const i32* cu_seqlens_kv;   // [batch + 1] rows of input
    const i32* cu_compressed;   // [batch + 1] rows of out
    Tensor input, out;
    const void* weight;         // null: mean; [num_kv_heads, kernel_size]: weighted; [num_kv_heads, kernel_size * HEAD_DIM, HEAD_DIM]: linear
    const void* position;       // [num_kv_heads, kernel_size, HEAD_DIM], or null; linear only
    f32* partial;               // [pieces, total_compressed, num_kv_heads, HEAD_DIM], where there are several pieces
    i32 batch;
    i32 total_compressed;       // bound from shapes
    i32 num_kv_heads;
    i32 kernel_size;
    i32 kernel_stride;
    i32 pieces;                 // linear: parts of the contraction that are taken side by side, then added in order
};

// Of compress_sum: blockIdx.y says which. Keys and values of one call.
struct CompressSumParams {
    CompressParams inputs[2];
};

struct CompressBackwardParams {
    CompressParams forward;     // out, partial and pieces unused
    Tensor grad_out;            // [total_compressed, num_kv_heads, HEAD_DIM]
    Tensor grad_input;
    void* grad_weight;          // shape of weight, or null
    void* grad_position;        // shape of position, or null
    f32* partial;               // weighted: [num_kv_heads, pieces, kernel_size]; linear: [num_kv_heads, pieces, HEAD_DIM] sums of grad_out
    i32 pieces;                 // parts of the compressed rows whose sums are taken side by side, then in order
    i32 accumulate;             // 1: grad_input holds a gradient that is added to
};

// Rotation of pairs (x[k], x[k + head_dim / 2]).
struct RopeParams {
    Tensor input, out;          // may be the same
    const double* frequencies;  // [head_dim / 2]
    const i32* cu_rows;         // [batch + 1] rows of input per sequence
    const i32* cu_seqlens_kv;   // not null: rows are the last of these; the first is at position kv_len - rows
    const i32* positions;       // not null: [rows] instead
    i32 batch;
    i32 rows;                   // bound from shapes
    i32 heads;
    i32 head_dim;               // even, at most HEAD_DIM
    i32 multiplier;             // positions between rows
    i32 inverse;
    i32 row_threads;            // threads of a row: a power of two from 8 to 64
};

struct CombineParams {
    Tensor branches[3];         // compressed, selected, window
    Tensor out;
    Gates gates;
    i32 rows;
    i32 heads;
};

struct CombineBackwardParams {
    CombineParams forward;      // out unused
    Tensor grad_out;
    Tensor grad_branches[3];
    void* grad_gates;           // contiguous, shape of gates
};

// What comes besides statistics of rows before attentions that add to one grad_query in memory.
struct SumsOpening {
    Tensor grad_query;          // becomes zeros, if not null
    SumKeys keys[2];            // of tokens, then of compressed keys, of which there are no more
    BlockMask mask;             // its rows, and nonfinite of the tokens' values, are filled; rows null: nobody asks
    const i32* topk_indices;    // [num_kv_heads, total_q, topk]
    const i32* cu_seqlens_q;    // [batch + 1]
    i32 batch;
    i32 num_kv_heads;
    i32 topk;
    i32 block_size;
    i32 total_q;
    i32 ctas;                   // for VALUE_ROWS tokens of a kv head each; before or behind those of rows
    i32 row_cta;                // the first of those of rows: ctas or 0
};

struct CombineStatisticsParams {
    CombineParams forward;      // out unused
    Tensor grad_out;
    const f32* lse[3];          // [heads, rows]
    RowStats* row_stats[3];     // the same shape; null: not wanted
    RowBounds* row_bounds[3];   // of all of them, raised; null where row_stats are
    void* grad_gates;           // contiguous, shape of gates; null: not wanted
    SumsOpening opening;
};
