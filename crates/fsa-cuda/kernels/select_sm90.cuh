// WHAT   Stage select on Hopper: scores of blocks from compressed attention, with its log-sum-exp, and the best topk of them for every token and kv head. For
//        windows that reach over one neighbour or none (kernel_size is kernel_stride or twice that) and blocks of a multiple of four of them; the portable kernel
//        does the others.
// GRID   As many ctas as there are multiprocessors, at most one per tile; each takes every gridDim.x-th tile of tokens of all kv heads, those with the most
//        keys first. A tile holds all heads that vote.
// ROLES  Two warpgroups of 64 rows consume, a thread of a third produces. It brings every fourth key of a step at a time, so that the four keys of a group meet
//        in one thread. A warp pools the scores of a step in its registers to groups; while the next step's are computed it adds up the heads and leaves
//        ranks of blocks in shared memory. Whenever a segment of blocks is full, a warp takes it into the candidates of its tokens.
// SMEM   Query tile of 128 rows, two stages of keys, candidates [tokens, 32], ranks of a segment [tokens, blocks]; where heads are not
//        added up in registers two buffers of group sums [128 rows, groups].
// SYNC   An mbarrier pair per stage and for the queries. Where the heads of a token are rows of one warp, warps go their own ways; else a named barrier of the
//        consumers per step, when the sums of both are there.
// Every sum has an order that depends on shapes alone. A head whose log-sum-exp is not finite does not vote.
#include "block/band_pipeline.cuh"
#include "block/segment_topk.cuh"

constexpr int STAGES = 2;
constexpr int GROUPS = STEP_KEYS / 4;           // of four keys
constexpr int GROUP_WORDS = GROUPS + 8;         // between rows of sums: 4 rows times 8 groups fall into different banks
constexpr int SEGMENT_PAD = 8;                  // between tokens' ranks, for the same reason
constexpr int SUM_BUFFERS = 2, SUM_WORDS = CTA_ROWS * GROUP_WORDS, WARPS = CONSUMER_THREADS / 32;
constexpr int SMEM_BYTES = RowTile::BYTES + STAGES * KeyTile::BYTES + WARPS * CANDIDATE_WORDS * 8;  // and candidates and ranks of the tokens, and sums
// Key 4 q + e of a step is row GROUPS e + q of its tile: column 8 i + 2 t + c of the scores, in lane t of a quad, is key 4 (8 (i % OCTETS) + 2 t + c) + i / OCTETS.
constexpr int OCTETS = GROUPS / 8;
typedef f32 GroupSums[2 * OCTETS];              // of a row: groups 8 j + 2 t, 8 j + 2 t + 1
struct alignas(8) SumPair { f32 even, odd; };

// A tile of tokens, and the steps of keys that count in blocks which compete for a place, first to last.
struct SelectWork {
    BandTile tile;
    i32 kv_head;
    i32 first_step, steps;
    i32 end_common;             // keys that all tokens see

    FSA_DEVICE static SelectWork find(const SelectParams& p, int number) {
        const Band& band = p.band;
        const int per_block = BLOCK_SIZE / band.kernel_stride, reach = band.kernel_size / band.kernel_stride - 1;
        SelectWork w;
        w.kv_head = number % p.num_kv_heads;
        w.tile = find_band_tile(band, number / p.num_kv_heads * band.head_tiles, w.kv_head);
        w.tile.heads = w.tile.tile_heads;
        const RowBlocks last = row_blocks(w.tile.last_position(), p.topk, p.init_blocks, p.local_blocks);
        const bool lists_all = w.tile.tokens == 0 || last.lists_all();      // every token all of its blocks
        const int begin = max_i(0, p.init_blocks * per_block - reach), end = min_i(end_key(band, w.tile.last_position(), w.tile.keys), last.end_scored * per_block);
        w.first_step = begin / STEP_KEYS;
        w.steps = lists_all ? 0 : max_i(0, ceil_div(end, STEP_KEYS) - w.first_step);
        w.end_common = end_key(band, w.tile.position, w.tile.keys);
        return w;
    }
    FSA_DEVICE int key(int n) const { return (first_step + n) * STEP_KEYS; }
};
// Blocks of a step, a power of two.
FSA_DEVICE int step_blocks(const SelectParams& p) { return STEP_KEYS / (BLOCK_SIZE / p.band.kernel_stride); }
// Words from a token's ranks to the next one's. They are read 32 at a time.
FSA_DEVICE int segment_words(const SelectParams& p) { return ceil_div(p.segment_steps * step_blocks(p), 32) * 32 + SEGMENT_PAD; }

struct SelectMemory {
    u32 query, keys;
    u64* candidates;            // [warps and tokens, CANDIDATE_WORDS]
    u32* ranks;                 // [tokens, segment_words]
    f32* sums;                  // [2, 128, GROUP_WORDS]
    Ring<1> query_ring;
    Ring<STAGES> key_ring;

    FSA_DEVICE u32 key(u32 n) const { return keys + Ring<STAGES>::place(n) * KeyTile::BYTES; }
};

// The keys of a step, every fourth one at a time: the boxes of the map skip three rows after each.
FSA_DEVICE void load_keys(u32 tile, const TensorMap* map, u32 barrier, int head, int row) {
    FSA_UNROLL for (int e = 0; e < 4; ++e)
        FSA_UNROLL for (int half = 0; half < KeyTile::HALVES; ++half)
            load_box(tile + half * KeyTile::HALF_BYTES + e * GROUPS * 128, map, barrier, half * 64, head, row + e);
}

FSA_DEVICE void produce(const SelectParams& p, const SelectMemory& m, int total) {
    u32 step = 0, tile = 0;
    FSA_NO_UNROLL for (int number = blockIdx.x; number < total; number += gridDim.x) {
        const SelectWork w = SelectWork::find(p, number);
        if (w.steps == 0) continue;
        load_tile<CTA_ROWS>(m.query, &p.query_map, m.query_ring.start(tile++, row_tile_bytes(p.band)), w.tile.first_head, w.tile.token);
        FSA_NO_UNROLL for (int n = 0; n < w.steps; ++n, ++step)
            load_keys(m.key(step), &p.key_map, m.key_ring.start(step, KeyTile::BYTES), w.kv_head, w.tile.key_row + w.key(n));
    }
}

// One of the thread's two rows: what turns scores into probabilities. One that does not vote sees nothing.
struct Voter {
    f32 reference;              // log2-sum-exp
    i32 end;                    // keys that it sees

    FSA_DEVICE static Voter of(const SelectParams& p, const BandTile& t, int row) {
        Voter v = {0.0f, 0};
        if (!t.exists(row)) return v;
        const f32 reference = p.lse[t.plane_index(row, p.band.total_q)] * LOG2_E;
        if (fabsf(reference) < __int_as_float(0x7f800000)) v = {reference, end_key(p.band, t.position_of(row), t.keys)};
        return v;
    }
};

// Adds the sums of rows DISTANCE / 4 apart; while there are two pairs or more, each lane keeps half of them. `first` counts the pairs before those that it keeps.
template <int DISTANCE, int PAIRS>
FSA_DEVICE void add_rows(GroupSums& v, int& first) {
    const bool upper = (threadIdx.x & DISTANCE) != 0;
    if constexpr (PAIRS >= 2) {
        FSA_UNROLL for (int k = 0; k < PAIRS; ++k) {
            const f32 sent = upper ? v[k] : v[PAIRS + k], kept = upper ? v[PAIRS + k] : v[k];
            v[k] = kept + __shfl_xor_sync(0xffffffffu, sent, DISTANCE);
        }
        first += upper ? PAIRS / 2 : 0;
    } else {
        FSA_UNROLL for (int k = 0; k < 2; ++k) v[k] += __shfl_xor_sync(0xffffffffu, v[k], DISTANCE);
    }
    if constexpr (DISTANCE > 4) add_rows<DISTANCE / 2, (PAIRS + 1) / 2>(v, first);
}

struct SelectConsumer {
    const SelectParams& p;
    const SelectMemory& m;
    int row;                    // the thread's first; the other is 8 more
    u32 step, tile;             // numbers in the rings
    int blocks, segment;        // of a step; words from a token's ranks to the next one's
    // The warp's tokens of the tile: those of its rows, where a token's rows are in one warp, or every eighth.
    bool straddles;
    int first_token, token_step, end_token;
    int filled;                 // steps of the segment
    f32 carry_low, carry_high;  // last key of the step before, where it counts in the first group of the next

    // Group sums of one of the thread's rows: of four keys, those that reach into the next group with half their weight, and the last key of the group
    // before. HIGH: the second row.
    template <bool HIGH>
    FSA_DEVICE void pool(GroupSums& sums, const Scores& s, f32& carry, bool overlap) const {
        constexpr int E = HIGH ? 2 : 0;
        const int lane = threadIdx.x & 31, left = (lane & ~3) | ((lane + 3) & 3);
        const f32 inner = overlap ? 2.0f : 1.0f;
        FSA_UNROLL for (int j = 0; j < OCTETS; ++j) {
            FSA_UNROLL for (int c = 0; c < 2; ++c) {
                const f32 a = s[4 * j + E + c], b = s[4 * (OCTETS + j) + E + c], third = s[4 * (2 * OCTETS + j) + E + c];
                sums[2 * j + c] = fmaf(inner, a + b + third, s[4 * (3 * OCTETS + j) + E + c]);
            }
            if (overlap) {
                const f32* last = &s[4 * (3 * OCTETS + j) + E];
                const f32 before = __shfl_sync(0xffffffffu, last[1], left);     // lane 0 gets that of the next eight groups
                sums[2 * j + 1] += last[0];
                sums[2 * j] += (lane & 3) == 0 ? carry : before;
                carry = before;
            }
        }
    }

    FSA_DEVICE void probabilities(Scores& s, const Voter& low, const Voter& high, int key, bool masked) const {
        FSA_UNROLL for (int i = 0; i < STEP_KEYS / 8; ++i)
            FSA_UNROLL for (int c = 0; c < 2; ++c) {
                s[4 * i + c] = exp2_fast(fmaf(s[4 * i + c], p.scale_log2, -low.reference));
                s[4 * i + 2 + c] = exp2_fast(fmaf(s[4 * i + 2 + c], p.scale_log2, -high.reference));
            }
        if (!masked) return;
        FSA_UNROLL for (int i = 0; i < STEP_KEYS / 8; ++i)
            FSA_UNROLL for (int c = 0; c < 2; ++c) {
                const int at = key + 4 * (8 * (i % OCTETS) + 2 * (threadIdx.x & 3) + c) + i / OCTETS;
                if (at >= low.end) s[4 * i + c] = 0.0f;
                if (at >= high.end) s[4 * i + 2 + c] = 0.0f;
            }
    }

    // Adds up the HEADS rows of a token and leaves the ranks of its blocks, a group each.
    template <int HEADS>
    FSA_DEVICE void rank_rows(GroupSums& sums, int first_row) const {
        int first = 0;
        if constexpr (HEADS > 1) add_rows<2 * HEADS, OCTETS>(sums, first);
        constexpr int PAIRS = OCTETS > HEADS ? OCTETS / HEADS : 1;
        const int token = first_row / HEADS, lanes = threadIdx.x & 28;
        if (token >= p.band.tile_tokens || (HEADS > OCTETS && (lanes & (4 * HEADS / OCTETS - 1) & 28) != 0)) return;
        u32* target = m.ranks + token * segment + filled * GROUPS + 8 * first + 2 * (threadIdx.x & 3);
        FSA_UNROLL for (int pair = 0; pair < PAIRS; ++pair)
            *(u64*)(target + 8 * pair) = (u64)(u32)TopBlocks::rank_of(sums[2 * pair + 1]) << 32 | (u32)TopBlocks::rank_of(sums[2 * pair]);
    }
    // Through shared memory where heads or groups are many: ranks of the step's blocks, a lane each, of the warp's tokens.
    FSA_DEVICE void rank_blocks(const GroupSums& low, const GroupSums& high, int n) const {
        const int lane = threadIdx.x & 31, per_block = GROUPS / blocks, heads = p.band.tile_heads;
        f32 *sums = m.sums + n % SUM_BUFFERS * SUM_WORDS, *own = sums + row * GROUP_WORDS + 2 * (lane & 3);
        FSA_UNROLL for (int j = 0; j < OCTETS; ++j) {
            *(SumPair*)(own + 8 * j) = {low[2 * j], low[2 * j + 1]};
            *(SumPair*)(own + 8 * GROUP_WORDS + 8 * j) = {high[2 * j], high[2 * j + 1]};
        }
        if (straddles) named_sync(ALL_CONSUMERS, CONSUMER_THREADS);
        else __syncwarp();
        if (lane >= blocks) return;
        u32* target = m.ranks + filled * blocks + lane;
        FSA_NO_UNROLL for (int token = first_token; token < end_token; token += token_step) {
            f32 score = 0.0f;
            for (int group = 0; group < per_block; ++group) {
                const f32* from = sums + token * heads * GROUP_WORDS + lane * per_block + group;
                _Pragma("unroll 4") for (int head = 0; head < heads; ++head) score += from[head * GROUP_WORDS];
            }
            target[token * segment] = (u32)TopBlocks::rank_of(score);
        }
    }
    FSA_DEVICE u64* candidates(int token) const { return m.candidates + (WARPS + token) * CANDIDATE_WORDS; }
    // What lanes without a token have.
    FSA_DEVICE u64* idle() const { return m.candidates + threadIdx.x / 32 * CANDIDATE_WORDS; }
    // The lane's token of the four from `first` on, which may be behind the last.
    FSA_DEVICE int lane_token(int first) const { return first + (threadIdx.x & 31) / LIST_LANES * token_step; }
    FSA_DEVICE RowBlocks blocks_of(const SelectWork& w, int token) const { return row_blocks(w.tile.position + token, p.topk, p.init_blocks, p.local_blocks); }

    // Takes the ranks of the segment, which ends with step `last`, into the candidates.
    FSA_DEVICE void offer(const SelectWork& w, int last) {
        const int end = (w.first_step + last + 1) * blocks, begin = end - filled * blocks;
        __syncwarp();
        FSA_NO_UNROLL for (int first = first_token; first < end_token; first += LIST_TOKENS * token_step) {
            const int token = min_i(lane_token(first), end_token - 1);
            const RowBlocks row = blocks_of(w, token);
            const int first_block = max_i(begin, row.first_scored), end_block = min_i(end, row.end_scored);
            const bool takes = lane_token(first) < end_token && !row.lists_all() && first_block < end_block;
            const TokenSegment t = {m.ranks + token * segment, begin, first_block, end_block, takes ? row.places : 0, first_block == row.first_scored};
            offer_segments(candidates(token), idle(), t, ceil_div(end - begin, 32));
        }
        filled = 0;
        __syncwarp();
    }

    FSA_DEVICE void start(Scores& s) const {
        m.key_ring.wait(step);
        wgmma_fence();
        start_scores(s, m.query + row / 64 * 64 * 128, m.key(step));
        wgmma_commit();
    }
    FSA_DEVICE void wait(Scores& s) {
        wgmma_wait<0>();
        wgmma_pin(s);
        m.key_ring.release(step++);
    }
    FSA_DEVICE void pool_step(GroupSums& low_sums, GroupSums& high_sums, Scores& s, const Voter& low, const Voter& high, int key, bool masked, bool overlap) {
        probabilities(s, low, high, key, masked);
        pool<false>(low_sums, s, carry_low, overlap);
        pool<true>(high_sums, s, carry_high, overlap);
    }
    // Leaves the ranks of step n, and takes a segment that is full.
    FSA_DEVICE void rank_step(GroupSums& low_sums, GroupSums& high_sums, const SelectWork& w, int n) {
        const int rows = p.direct ? p.band.tile_heads : 0;
        if (rows == 4) rank_rows<4>(low_sums, row), rank_rows<4>(high_sums, row + 8);
        else if (rows == 1) rank_rows<1>(low_sums, row), rank_rows<1>(high_sums, row + 8);
        else if (rows == 2) rank_rows<2>(low_sums, row), rank_rows<2>(high_sums, row + 8);
        else if (rows == 8) rank_rows<8>(low_sums, row), rank_rows<8>(high_sums, row + 8);
        else rank_blocks(low_sums, high_sums, n);
        if (++filled == p.segment_steps || n + 1 == w.steps) offer(w, n);
    }

    // The product of the next step runs under the ranks of this one and under the other warpgroup's arithmetic: a second set of scores costs more in
    // copies than it hides.
    FSA_DEVICE void walk(const SelectWork& w, const Voter& low, const Voter& high) {
        const bool mask_all = __any_sync(0xffffffffu, low.end == 0 || high.end == 0), overlap = p.band.kernel_size != p.band.kernel_stride;
        Scores s;
        GroupSums low_sums, high_sums;
        carry_low = carry_high = 0.0f;
        m.query_ring.wait(tile);
        start(s);
        FSA_NO_UNROLL for (int n = 0; n + 1 < w.steps; ++n) {
            wait(s);
            pool_step(low_sums, high_sums, s, low, high, w.key(n), mask_all || w.key(n) + STEP_KEYS > w.end_common, overlap);
            start(s);
            rank_step(low_sums, high_sums, w, n);
        }
        wait(s);
        m.query_ring.release(tile++);
        pool_step(low_sums, high_sums, s, low, high, w.key(w.steps - 1), true, overlap);
        rank_step(low_sums, high_sums, w, w.steps - 1);
    }

    FSA_DEVICE void open() {
        const int warp = threadIdx.x / 32, heads = p.band.tile_heads;
        blocks = step_blocks(p);
        segment = segment_words(p);
        straddles = 16 % heads != 0;
        first_token = straddles ? warp : warp * (16 / heads);
        token_step = straddles ? WARPS : 1;
        filled = 0;
    }
    // Writes the lists of the warp's tokens.
    FSA_DEVICE void list(const SelectWork& w) const {
        const int met = w.steps == 0 ? 0 : (w.first_step + w.steps) * blocks;
        __syncwarp();
        FSA_NO_UNROLL for (int first = first_token; first < end_token; first += LIST_TOKENS * token_step) {
            const int token = min_i(lane_token(first), end_token - 1);
            const RowBlocks row = blocks_of(w, token);
            i32* target = p.topk_indices + ((i64)w.kv_head * p.band.total_q + w.tile.token + token) * p.topk;
            // Blocks behind the last step were not met: no key of theirs is seen, and they come last.
            const int unmet = max_i(row.first_scored, met), held = min_i(row.places, unmet - row.first_scored);
            list_tokens(target, candidates(token), idle(), row, p.topk, held, unmet, lane_token(first) < end_token);
        }
        __syncwarp();
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) select(const __grid_constant__ SelectParams p) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ __align__(8) u64 barriers[2 + 2 * STAGES];
    SelectMemory m;
    m.query = shared_address(shared);
    m.keys = m.query + RowTile::BYTES;
    m.candidates = (u64*)(shared + RowTile::BYTES + STAGES * KeyTile::BYTES);
    m.ranks = (u32*)(m.candidates + (WARPS + p.band.tile_tokens) * CANDIDATE_WORDS);
    m.sums = (f32*)(m.ranks + p.band.tile_tokens * segment_words(p));
    m.query_ring = Ring<1>::at(shared_address(barriers));
    m.key_ring = Ring<STAGES>::at(shared_address(barriers + 2));
    if (threadIdx.x == 0) {
        m.query_ring.open();
        m.key_ring.open();
        barriers_ready();
    }
    __syncthreads();
    const int total = p.num_tiles * p.num_kv_heads, group = __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0);
    if (group == CONSUMERS) {
        registers_shrink<PRODUCER_REGISTERS>();
        if (threadIdx.x == CONSUMER_THREADS) produce(p, m, total);
        return;
    }
    registers_grow<CONSUMER_REGISTERS>();
    SelectConsumer c = {p, m, first_row_of_thread(), 0, 0};
    c.open();
    SelectWork w = SelectWork::find(p, blockIdx.x);
    Voter low = Voter::of(p, w.tile, c.row), high = Voter::of(p, w.tile, c.row + 8);
    FSA_NO_UNROLL for (int number = blockIdx.x; number < total; number += gridDim.x) {
        c.end_token = c.straddles ? w.tile.tokens : min_i(w.tile.tokens, c.first_token + 16 / p.band.tile_heads);
        if (w.steps > 0) c.walk(w, low, high);
        c.list(w);
        w = SelectWork::find(p, number + gridDim.x);
        low = Voter::of(p, w.tile, c.row);
        high = Voter::of(p, w.tile, c.row + 8);
    }
}
