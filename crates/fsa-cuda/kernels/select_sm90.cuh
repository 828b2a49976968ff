// WHAT   Block scores and their top-k on Hopper: probabilities of the compressed keys from queries, keys and the log-sum-exp of compressed attention,
//        pooled to blocks, summed over the heads that vote, and the best blocks of each token listed. No score leaves the cta. For compressed keys that
//        overlap one neighbour or none (kernel_size is kernel_stride or twice that) and blocks of a multiple of four of them; the portable kernel
//        does the others.
// GRID   As many ctas as there are multiprocessors, at most one per tile; each takes every gridDim.x-th tile of tokens of all kv heads, those with the most
//        keys first. A tile holds all heads that vote.
// ROLES  Two warpgroups of 64 rows consume, a thread of a third produces. The scores of the next step are computed while a consumer pools those of
//        the current one in its registers to groups of four keys; then each of the eight warps offers the blocks of its tokens.
// SMEM   Query tile of 128 rows, two stages of keys, two buffers of group sums [128 rows, groups], ranks and ids of the best blocks [tokens, topk].
// SYNC   An mbarrier pair per stage and for the queries; a named barrier of the consumers per step, when the sums of both are there.
// Every sum has an order that depends on shapes alone. A head whose log-sum-exp is not finite does not vote.
#include "block/band_pipeline.cuh"
#include "block/topk.cuh"

constexpr int STAGES = 2;
constexpr int GROUPS = STEP_KEYS / 4;           // of four keys
constexpr int GROUP_WORDS = GROUPS + 2;         // between rows: 8 rows times 2 groups fall into different banks
constexpr int SUM_BYTES = CTA_ROWS * GROUP_WORDS * 4;
constexpr int SMEM_BYTES = RowTile::BYTES + STAGES * KeyTile::BYTES + 2 * SUM_BYTES;    // and [tokens, 2 topk + 2] words

// A tile of tokens, and the steps of keys that count in blocks which compete for a place, first to last.
struct SelectWork {
    BandTile tile;
    i32 kv_head;
    i32 first_step, steps;
    i32 end_common;             // keys that all tokens see
    i32 end_scored;             // blocks of the last token that compete end here
    bool lists_all;             // every token lists all of its blocks

    FSA_DEVICE static SelectWork find(const SelectParams& p, int number) {
        const Band& band = p.band;
        const int per_block = BLOCK_SIZE / band.kernel_stride, reach = band.kernel_size / band.kernel_stride - 1;
        SelectWork w;
        w.kv_head = number % p.num_kv_heads;
        w.tile = find_band_tile(band, number / p.num_kv_heads * band.head_tiles, w.kv_head);
        w.tile.heads = w.tile.tile_heads;
        const RowBlocks last = row_blocks(w.tile.last_position(), p.topk, p.init_blocks, p.local_blocks);
        w.lists_all = w.tile.tokens == 0 || last.lists_all();
        w.end_scored = last.end_scored;
        const int begin = max_i(0, p.init_blocks * per_block - reach), end = min_i(end_key(band, w.tile.last_position(), w.tile.keys), last.end_scored * per_block);
        w.first_step = begin / STEP_KEYS;
        w.steps = w.lists_all ? 0 : max_i(0, ceil_div(end, STEP_KEYS) - w.first_step);
        w.end_common = end_key(band, w.tile.position, w.tile.keys);
        return w;
    }
    FSA_DEVICE int key(int n) const { return (first_step + n) * STEP_KEYS; }
};

struct SelectMemory {
    u32 query, keys;
    f32* sums;                  // [2, 128, GROUP_WORDS]
    i32 *ranks, *ids;           // [tokens, topk]
    i32* worst;                 // [tokens, 2] rank and id
    Ring<1> query_ring;
    Ring<STAGES> key_ring;

    FSA_DEVICE u32 key(u32 n) const { return keys + Ring<STAGES>::place(n) * KeyTile::BYTES; }
};

FSA_DEVICE void produce(const SelectParams& p, const SelectMemory& m, int total) {
    u32 step = 0, tile = 0;
    FSA_NO_UNROLL for (int number = blockIdx.x; number < total; number += gridDim.x) {
        const SelectWork w = SelectWork::find(p, number);
        if (w.steps == 0) continue;
        load_tile<CTA_ROWS>(m.query, &p.query_map, m.query_ring.start(tile++, row_tile_bytes(p.band)), w.tile.first_head, w.tile.token);
        FSA_NO_UNROLL for (int n = 0; n < w.steps; ++n, ++step)
            load_tile<STEP_KEYS>(m.key(step), &p.key_map, m.key_ring.start(step, KeyTile::BYTES), w.kv_head, w.tile.key_row + w.key(n));
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

struct SelectConsumer {
    const SelectParams& p;
    const SelectMemory& m;
    int row;                    // the thread's first; the other is 8 more
    u32 step, tile;             // numbers in the rings
    f32 carry_low, carry_high;  // last key of the step before, where it counts in the first group of the next

    // Group sums of one of the thread's rows: of four keys, those that reach into the next group with half their weight, and the last key of the group
    // before. HIGH: the second row.
    template <bool HIGH>
    FSA_DEVICE void pool(const Scores& s, f32* sums, f32& carry, bool overlap) const {
        constexpr int E = HIGH ? 2 : 0;
        const int lane = threadIdx.x & 31, quad = lane & 3;
        const f32 inner = overlap ? 2.0f : 1.0f, last = overlap && !(quad & 1) ? 2.0f : 1.0f;
        FSA_UNROLL for (int i = 0; i < STEP_KEYS / 8; ++i) {
            f32 sum = fmaf(inner, s[4 * i + E], last * s[4 * i + E + 1]);
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            const f32 before = __shfl_sync(0xffffffffu, s[4 * i + E + 1], (lane & ~3) | ((quad + 3) & 3));     // lane 2: of lane 1; lane 0: of lane 3, for the next i
            if (overlap) sum += quad == 0 ? carry : before;
            carry = before;
            if (!(quad & 1)) sums[(row + (HIGH ? 8 : 0)) * GROUP_WORDS + 2 * i + quad / 2] = sum;
        }
    }

    FSA_DEVICE void probabilities(Scores& s, const Voter& low, const Voter& high, int key, bool masked) const {
        FSA_UNROLL for (int i = 0; i < STEP_KEYS / 8; ++i)
            FSA_UNROLL for (int e = 0; e < 2; ++e) {
                s[4 * i + e] = exp2_fast(fmaf(s[4 * i + e], p.scale_log2, -low.reference));
                s[4 * i + 2 + e] = exp2_fast(fmaf(s[4 * i + 2 + e], p.scale_log2, -high.reference));
            }
        if (masked) mask_scores(s, RowLimits{0, low.end - key, 0, high.end - key}, 0.0f);
    }

    // Offers the blocks of a step to the warp's tokens.
    FSA_DEVICE void offer(const SelectWork& w, const f32* sums, int n) const {
        const int per_block = BLOCK_SIZE / p.band.kernel_stride / 4, lane = threadIdx.x & 31;   // groups of a block
        const int blocks = GROUPS / per_block, block = w.key(n) / 4 / per_block + lane, heads = w.tile.tile_heads;
        FSA_NO_UNROLL for (int token = threadIdx.x / 32; token < w.tile.tokens; token += CONSUMER_THREADS / 32) {
            const RowBlocks row = row_blocks(w.tile.position + token, p.topk, p.init_blocks, p.local_blocks);
            const bool present = lane < blocks && block >= row.first_scored && block < row.end_scored && row.places > 0;
            f32 score = 0.0f;
            if (present) {
                const f32* from = sums + token * heads * GROUP_WORDS + lane * per_block;
                FSA_NO_UNROLL for (int head = 0; head < heads; ++head)
                    FSA_NO_UNROLL for (int group = 0; group < per_block; ++group) score += from[head * GROUP_WORDS + group];
            }
            const int rank = TopBlocks::rank_of(score), worst_rank = m.worst[2 * token], worst_id = m.worst[2 * token + 1];
            if (!__any_sync(0xffffffffu, present && (rank < worst_rank || (rank == worst_rank && block < worst_id)))) continue;
            offer_blocks(token, row, score, block, present);
        }
    }
    FSA_DEVICE void offer_blocks(int token, const RowBlocks& row, f32 score, int block, bool present) const {
        TopBlocks best;
        best.load(m.ranks + token * p.topk, m.ids + token * p.topk, row.places);
        best.offer(score, block, present);
        best.store(m.ranks + token * p.topk, m.ids + token * p.topk, row.places);
        if ((threadIdx.x & 31) == 0) {
            m.worst[2 * token] = best.worst_rank;
            m.worst[2 * token + 1] = best.worst_id;
        }
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
    // Pools the scores of step n and offers its blocks.
    FSA_DEVICE void take(Scores& s, const SelectWork& w, const Voter& low, const Voter& high, int n, bool mask_all, bool overlap) {
        probabilities(s, low, high, w.key(n), mask_all || w.key(n) + STEP_KEYS > w.end_common);
        f32* sums = m.sums + (n & 1) * CTA_ROWS * GROUP_WORDS;
        pool<false>(s, sums, carry_low, overlap);
        pool<true>(s, sums, carry_high, overlap);
        named_sync(ALL_CONSUMERS, CONSUMER_THREADS);
        offer(w, sums, n);
    }

    FSA_DEVICE void walk(const SelectWork& w) {
        const Voter low = Voter::of(p, w.tile, row), high = Voter::of(p, w.tile, row + 8);
        const bool mask_all = named_sync_or(ALL_CONSUMERS, CONSUMER_THREADS, low.end == 0 || high.end == 0), overlap = p.band.kernel_size != p.band.kernel_stride;
        Scores s;
        carry_low = carry_high = 0.0f;
        m.query_ring.wait(tile);
        start(s);
        wait(s);
        FSA_NO_UNROLL for (int n = 0; n + 1 < w.steps; ++n) {
            Scores next;        // under way while these are pooled
            start(next);
            take(s, w, low, high, n, mask_all, overlap);
            wait(next);
            FSA_UNROLL for (int i = 0; i < STEP_KEYS / 2; ++i) s[i] = next[i];
        }
        take(s, w, low, high, w.steps - 1, mask_all, overlap);
        m.query_ring.release(tile++);
    }

    // Empty places for the warp's tokens; the barrier of the first step comes before they are used by no other warp.
    FSA_DEVICE void open_tokens(const SelectWork& w) const {
        for (int token = threadIdx.x / 32; token < w.tile.tokens; token += CONSUMER_THREADS / 32) {
            const RowBlocks row = row_blocks(w.tile.position + token, p.topk, p.init_blocks, p.local_blocks);
            TopBlocks best;
            best.open(row.places);
            best.store(m.ranks + token * p.topk, m.ids + token * p.topk, row.places);
            if ((threadIdx.x & 31) == 0) {
                m.worst[2 * token] = best.worst_rank;
                m.worst[2 * token + 1] = best.worst_id;
            }
        }
        __syncwarp();
    }
    FSA_DEVICE void list(const SelectWork& w) const {
        const int lane = threadIdx.x & 31, per_block = BLOCK_SIZE / p.band.kernel_stride / 4;
        const int offered = w.steps == 0 ? 0 : (w.first_step + w.steps) * GROUPS / per_block;   // blocks behind were not met: no key of theirs is seen
        for (int token = threadIdx.x / 32; token < w.tile.tokens; token += CONSUMER_THREADS / 32) {
            const RowBlocks row = row_blocks(w.tile.position + token, p.topk, p.init_blocks, p.local_blocks);
            i32* target = p.topk_indices + ((i64)w.kv_head * p.band.total_q + w.tile.token + token) * p.topk;
            if (row.lists_all()) {
                list_all_blocks(target, row, p.topk);
                continue;
            }
            const int first = max_i(row.first_scored, offered);
            for (int block = first; block < row.end_scored && block < first + row.places; block += 32)
                offer_blocks(token, row, 0.0f, block + lane, block + lane < row.end_scored);
            TopBlocks best;
            best.load(m.ranks + token * p.topk, m.ids + token * p.topk, row.places);
            best.list(target, row, p.topk);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) select(const __grid_constant__ SelectParams p) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ __align__(8) u64 barriers[2 + 2 * STAGES];
    SelectMemory m;
    m.query = shared_address(shared);
    m.keys = m.query + RowTile::BYTES;
    m.sums = (f32*)(shared + RowTile::BYTES + STAGES * KeyTile::BYTES);
    m.ranks = (i32*)(m.sums + 2 * CTA_ROWS * GROUP_WORDS);
    m.ids = m.ranks + p.band.tile_tokens * p.topk;
    m.worst = m.ids + p.band.tile_tokens * p.topk;
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
    SelectConsumer c = {p, m, first_row_of_thread(), 0, 0, 0.0f, 0.0f};
    FSA_NO_UNROLL for (int number = blockIdx.x; number < total; number += gridDim.x) {
        const SelectWork w = SelectWork::find(p, number);
        if (w.tile.tokens == 0) continue;
        if (!w.lists_all) c.open_tokens(w);
        if (w.steps > 0) c.walk(w);
        c.list(w);
    }
}
