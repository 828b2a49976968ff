// WHAT   Stage select on Hopper: scores of blocks from compressed attention, with its log-sum-exp, and the best topk of them for every token and kv head. For
//        windows that reach over one neighbour or none (kernel_size is kernel_stride or twice that) and blocks of a multiple of four of them; the portable kernel
//        does the others.
// GRID   As many ctas as there are multiprocessors, at most one per tile; each takes every gridDim.x-th tile of tokens of all kv heads, those with the most
//        keys first. A tile holds all heads that vote.
// ROLES  Three warpgroups of 64 rows consume, a thread of a fourth produces. It brings every fourth key of a step at a time, so that the four keys of a group
//        meet in one thread. A warp pools the scores of a step in its registers to groups; while the next step's are computed it adds up the heads and
//        offers the blocks to the candidates of its tokens: one head's from registers, those of 2, 4 or 8 a segment of steps at a time, others step by step.
// SMEM   Query tile of 192 rows, two stages of keys, candidates [tokens + 1]; scores of a segment [tokens, blocks], or, where heads or groups are many, two
//        buffers of group sums [192 rows, groups].
// SYNC   An mbarrier pair per stage and for the queries. Where the heads of a token are rows of one warp, warps go their own ways; else a named barrier of the
//        consumers per step, when the sums of all are there.
// Every sum has an order that depends on shapes alone. A head whose log-sum-exp is not finite does not vote.
#define FSA_CONSUMERS 3
#include "block/group_scores.cuh"
#include "block/segments.cuh"

constexpr int STAGES = 2;
constexpr int GROUP_WORDS = GROUPS + 8;         // between rows of sums: 4 rows times 8 groups fall into different banks
constexpr int SETTLE_SHARE = 3;                 // after a third of the steps before, all warps settle again
constexpr int SUM_BUFFERS = 2, SUM_WORDS = CTA_ROWS * GROUP_WORDS, WARPS = CONSUMER_THREADS / 32;
constexpr int SMEM_BYTES = RowTile::BYTES + STAGES * KeyTile::BYTES + sizeof(Candidates);     // and candidates of the tokens, and segments or sums
struct alignas(8) SumPair { f32 even, odd; };

// A tile of tokens, and the steps of keys that count in blocks which compete for a place, first to last.
struct SelectWork {
    BandTile tile;
    i32 number;                 // of all heads' tiles
    i32 first_step, steps;
    i32 end_common;             // keys that all tokens see

    FSA_DEVICE static SelectWork find(const SelectParams& p, int number) {
        const Band& band = p.band;
        const int per_block = BLOCK_SIZE / band.kernel_stride, reach = band.kernel_size / band.kernel_stride - 1;
        SelectWork w;
        w.number = number;
        w.tile = find_band_tile(band, number / p.num_kv_heads * band.head_tiles, w.kv_head(p));
        w.tile.heads = w.tile.tile_heads;
        const RowBlocks last = row_blocks(w.tile.last_position(), p.topk, p.init_blocks, p.local_blocks);
        const bool lists_all = w.tile.tokens == 0 || last.lists_all();      // every token all of its blocks
        const int begin = max_i(0, p.init_blocks * per_block - reach), end = min_i(end_key(band, w.tile.last_position(), w.tile.keys), last.end_scored * per_block);
        w.first_step = begin / STEP_KEYS;
        w.steps = lists_all ? 0 : max_i(0, ceil_div(end, STEP_KEYS) - w.first_step);
        w.end_common = end_key(band, w.tile.position, w.tile.keys);
        return w;
    }
    FSA_DEVICE int kv_head(const SelectParams& p) const { return number % p.num_kv_heads; }
    FSA_DEVICE int key(int n) const { return (first_step + n) * STEP_KEYS; }
};
// Blocks of a step, a power of two.
FSA_DEVICE int step_blocks(const SelectParams& p) { return STEP_KEYS / (BLOCK_SIZE / p.band.kernel_stride); }
// Words from a token's scores of a segment to the next one's. They are read 32 at a time.
FSA_DEVICE int segment_words(const SelectParams& p) { return p.segment_steps == 0 ? 0 : ceil_div(p.segment_steps * GROUPS, 32) * 32 + SEGMENT_PAD; }

struct SelectMemory {
    u32 query, keys;
    Candidates* candidates;     // [tokens + 1], the last those of a row without work
    f32* segments;              // [tokens, segment_words], or
    f32* sums;                  // [2, CTA_ROWS, GROUP_WORDS]
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
            load_groups(m.key(step), &p.key_map, m.key_ring.start(step, KeyTile::BYTES), w.kv_head(p), w.tile.key_row + w.key(n));
    }
}

// One of the thread's two rows: what turns scores into probabilities. One that does not vote sees nothing.
struct Voter {
    f32 reference;              // log2-sum-exp
    i32 end;                    // keys that it sees

    // The natural log-sum-exp of a row, or what keeps it from voting.
    FSA_DEVICE static f32 load(const SelectParams& p, const BandTile& t, int row) {
        return t.exists(row) ? p.lse[t.plane_index(row, p.band.total_q)] : neg_inf();
    }
    FSA_DEVICE static Voter of(const SelectParams& p, const BandTile& t, int row, f32 lse) {
        const f32 reference = lse * LOG2_E;
        if (!(fabsf(reference) < -neg_inf())) return {0.0f, 0};
        return {reference, end_key(p.band, t.position_of(row), t.keys)};
    }
};

// Adds the sums of rows DISTANCE / 4 apart; while there are two pairs or more, each lane keeps half of them. `first` counts the pairs before those that it keeps.
template <int DISTANCE, int PAIRS>
FSA_DEVICE void add_rows(GroupSums& v, int& first) {
    const bool upper = (threadIdx.x & DISTANCE) != 0;
    if constexpr (PAIRS >= 2) {
        FSA_UNROLL for (int k = 0; k < PAIRS; ++k) {
            const f32 sent = upper ? v[k] : v[PAIRS + k], kept = upper ? v[PAIRS + k] : v[k];
            v[k] = kept + __shfl_xor_sync(ALL_LANES, sent, DISTANCE);
        }
        first += upper ? PAIRS / 2 : 0;
    } else {
        FSA_UNROLL for (int k = 0; k < 2; ++k) v[k] += __shfl_xor_sync(ALL_LANES, v[k], DISTANCE);
    }
    if constexpr (DISTANCE > 4) add_rows<DISTANCE / 2, (PAIRS + 1) / 2>(v, first);
}

struct SelectConsumer {
    const SelectParams& p;
    const SelectMemory& m;
    u32 query;                  // tile of the warpgroup's rows
    u32 step, tile;             // numbers in the rings
    SelectWork w;
    int filled;                 // steps of the segment, or since all warps settled
    f32 carry_low, carry_high;  // last key of the step before, where it counts in the first group of the next

    // Group sums of one of the thread's rows: of four keys, those that reach into the next group with half their weight, and the last key of the group
    // before. HIGH: the second row.
    template <bool HIGH>
    FSA_DEVICE void pool(GroupSums& sums, const Scores& s, f32& carry, bool overlap) const {
        constexpr int E = HIGH ? 2 : 0;
        const f32 inner = overlap ? 2.0f : 1.0f;
        FSA_UNROLL for (int j = 0; j < OCTETS; ++j)
            FSA_UNROLL for (int c = 0; c < 2; ++c) {
                const f32 a = s[4 * j + E + c], b = s[4 * (OCTETS + j) + E + c], third = s[4 * (2 * OCTETS + j) + E + c];
                sums[2 * j + c] = fmaf(inner, a + b + third, s[4 * (3 * OCTETS + j) + E + c]);
            }
        if (overlap) add_overlap<HIGH>(sums, s, carry, 1.0f);
    }

    FSA_DEVICE void probabilities(Scores& s, const Voter& low, const Voter& high, int key, bool masked) const {
        FSA_UNROLL for (int i = 0; i < STEP_KEYS / 8; ++i)
            FSA_UNROLL for (int c = 0; c < 2; ++c) {
                s[4 * i + c] = exp2_fast(fmaf(s[4 * i + c], p.scale_log2, -low.reference));
                s[4 * i + 2 + c] = exp2_fast(fmaf(s[4 * i + 2 + c], p.scale_log2, -high.reference));
            }
        if (!masked) return;
        mask_groups(s, low.end - key, high.end - key, 0.0f);
    }

    // The thread's first row; the other is 8 more.
    FSA_DEVICE static int row() { return thread_number() / 32 * 16 + lane_number() / 4; }
    // The warp's tokens of the tile: those of its rows, where a token's rows are in one warp, or every WARPS-th.
    FSA_DEVICE bool straddles() const { return p.band.tile_heads > 16 || (p.band.tile_heads & (p.band.tile_heads - 1)) != 0; }
    FSA_DEVICE int warp_tokens() const { return 16 >> (31 - __clz(p.band.tile_heads)); }
    FSA_DEVICE int first_token() const { return thread_number() / 32 * (straddles() ? 1 : warp_tokens()); }
    FSA_DEVICE int token_step() const { return straddles() ? WARPS : 1; }
    FSA_DEVICE int end_token(int tokens) const { return straddles() ? tokens : min_i(tokens, first_token() + warp_tokens()); }
    FSA_DEVICE int end_token() const { return end_token(w.tile.tokens); }
    FSA_DEVICE Candidates& candidates(int token) const { return m.candidates[min_i(token, p.band.tile_tokens)]; }
    // The token of the lane's LANES, in the order of the warp's from `first` on; those behind the last have no work.
    template <int LANES>
    FSA_DEVICE int lane_token(int first) const {
        const int token = first + lane_number() / LANES * token_step();
        return token < end_token() ? token : p.band.tile_tokens;
    }
    FSA_DEVICE RowBlocks blocks_of(int token) const { return row_blocks(w.tile.position + token, p.topk, p.init_blocks, p.local_blocks); }
    template <int LANES>
    FSA_DEVICE void settle_all(int most) const {
        const int step = 32 / LANES * token_step(), end = end_token();
        __syncwarp();
        FSA_NO_UNROLL for (int first = first_token(); first < end; first += step) settle<LANES>(candidates(lane_token<LANES>(first)), most);
    }

    // Offers units of blocks, UNIT of them at most for a token: `append` takes those of a mask, or none if there is no room. One at a time where even the
    // best of the candidates leave too little.
    template <typename Append>
    FSA_DEVICE void offer(u32 units, Append append) const {
        u32 together = ~0u;
        bool settled = false;
        while (units != 0) {
            const u32 offered = units & (together | (0u - units));
            if (append(offered)) {
                units ^= offered;
                settled = false;
            } else if (settled) {
                together = 0;
            } else {
                settle_all<QUAD>(MAX_PLACES);
                settled = true;
            }
        }
    }

    // Appends what beats the bounds of the thread's two rows, a token each: of the pairs of blocks from `block` on, eight apart, those that are units of the
    // mask. False, and nothing is appended, if a token of the warp has no room.
    FSA_DEVICE static bool append_rows(const GroupSums& low_sums, const GroupSums& high_sums, Candidates& low, Candidates& high, int block, u32 units) {
        const int lane = lane_number() & (QUAD - 1);
        const f32 low_bound = low.bound, high_bound = high.bound;
        const i32 low_count = low.count, high_count = high.count;
        u32 found = 0;          // of both, 16 bits each
        FSA_UNROLL for (int i = 0; i < 2 * OCTETS; ++i) {
            const bool offered = (units & 1u << i / 2) != 0;
            if (offered & !(low_sums[i] <= low_bound)) found += 1;
            if (offered & !(high_sums[i] <= high_bound)) found += 1 << 16;
        }
        if (!__any_sync(ALL_LANES, found != 0)) return true;
        const u32 beside = __shfl_xor_sync(ALL_LANES, found, 1), across = __shfl_xor_sync(ALL_LANES, found + beside, 2), all = found + beside + across;
        const i32 low_end = low_count + (i32)(all & 0xffff), high_end = high_count + (i32)(all >> 16);
        if (__any_sync(ALL_LANES, max_i(low_end, high_end) > CANDIDATES)) return false;
        const u32 before = ((lane & 1) != 0 ? beside : 0) + ((lane & 2) != 0 ? across : 0);
        u32 low_place = shared_address(low.keys) + 8 * (low_count + (before & 0xffff));
        u32 high_place = shared_address(high.keys) + 8 * (high_count + (before >> 16));
        FSA_UNROLL for (int i = 0; i < 2 * OCTETS; ++i) {
            const bool offered = (units & 1u << i / 2) != 0;
            append_above(low_place, low_bound, low_sums[i], block + 8 * (i / 2) + i % 2, offered);
            append_above(high_place, high_bound, high_sums[i], block + 8 * (i / 2) + i % 2, offered);
        }
        if (lane == 0) {
            low.count = low_end;
            high.count = high_end;
        }
        __syncwarp();
        return true;
    }
    // From registers, where one head votes: blocks of one group from `begin` on. All warps settle at the same steps, before one of them must: a product waits
    // for the last of four warps.
    FSA_DEVICE void offer_rows(GroupSums& low_sums, GroupSums& high_sums, int begin, int n) {
        const int block = begin + 2 * (lane_number() & 3);
        if (begin < p.init_blocks || begin + GROUPS > blocks_of(0).end_scored) {
            const int low_end = blocks_of(row()).end_scored, high_end = blocks_of(row() + 8).end_scored;
            FSA_UNROLL for (int i = 0; i < 2 * OCTETS; ++i) {
                const int b = block + 8 * (i / 2) + i % 2;
                if (b < p.init_blocks || b >= low_end) low_sums[i] = -2.0f;
                if (b < p.init_blocks || b >= high_end) high_sums[i] = -2.0f;
            }
        }
        Candidates &low = candidates(row()), &high = candidates(row() + 8);
        offer((1u << OCTETS) - 1, [&](u32 units) { return append_rows(low_sums, high_sums, low, high, block, units); });
        if (SETTLE_SHARE * ++filled <= n || n + 1 == w.steps) return;
        settle_all<QUAD>(0);
        filled = 0;
    }

    // Through segments: adds up the HEADS rows of a token and leaves the scores of its blocks, a group each.
    template <int HEADS>
    FSA_DEVICE void leave_rows(GroupSums& sums, int first_row) const {
        constexpr int PAIRS = OCTETS > HEADS ? OCTETS / HEADS : 1;
        int first = 0;
        add_rows<2 * HEADS, OCTETS>(sums, first);
        const int lane = lane_number(), token = first_row / HEADS;
        if (token >= p.band.tile_tokens || (HEADS > OCTETS && (lane & (4 * HEADS / OCTETS - 1) & 28) != 0)) return;     // another lane has the same sums
        f32* target = m.segments + token * segment_words(p) + filled * GROUPS + 8 * first + 2 * (lane & 3);
        FSA_UNROLL for (int pair = 0; pair < PAIRS; ++pair) *(SumPair*)(target + 8 * pair) = {sums[2 * pair], sums[2 * pair + 1]};
    }
    // Takes the scores of the segment, which ends before block `end`, into the candidates.
    FSA_DEVICE void offer_segment(int end) const {
        const int begin = end - filled * GROUPS, step = SEGMENT_TOKENS * token_step(), last = end_token();
        __syncwarp();
        FSA_NO_UNROLL for (int first = first_token(); first < last; first += step) {
            const int token = lane_token<SEGMENT_LANES>(first);
            const RowBlocks row = blocks_of(token);
            const f32* scores = m.segments + min_i(token, p.band.tile_tokens - 1) * segment_words(p);
            const TokenSegment t = {scores, begin, max_i(begin, row.first_scored), min_i(end, row.end_scored)};
            offer_segments(candidates(token), t, ceil_div(end - begin, 32));
        }
    }
    // Through shared memory where heads or groups are many: the step's blocks, a lane each, of the warp's tokens.
    FSA_DEVICE void offer_sums(const GroupSums& low, const GroupSums& high, int number) const {
        const int lane = lane_number(), blocks = step_blocks(p), per_block = GROUPS / blocks, heads = p.band.tile_heads;
        f32 *sums = m.sums + number % SUM_BUFFERS * SUM_WORDS, *own = sums + row() * GROUP_WORDS + 2 * (lane & 3);
        FSA_UNROLL for (int j = 0; j < OCTETS; ++j) {
            *(SumPair*)(own + 8 * j) = {low[2 * j], low[2 * j + 1]};
            *(SumPair*)(own + 8 * GROUP_WORDS + 8 * j) = {high[2 * j], high[2 * j + 1]};
        }
        if (straddles()) named_sync(ALL_CONSUMERS, CONSUMER_THREADS);
        else __syncwarp();
        const int step = token_step(), last = end_token();
        FSA_NO_UNROLL for (int token = first_token(); token < last; token += step) {
            Candidates& c = candidates(token);
            const int block = number * blocks + lane;
            f32 score = -2.0f;
            if (lane < blocks && block >= p.init_blocks && block < blocks_of(token).end_scored) {
                score = 0.0f;
                for (int group = 0; group < per_block; ++group) {
                    const f32* from = sums + token * heads * GROUP_WORDS + lane * per_block + group;
                    _Pragma("unroll 4") for (int head = 0; head < heads; ++head) score += from[head * GROUP_WORDS];
                }
            }
            offer((1u << 32 / UNIT) - 1, [&](u32 units) {
                const bool takes = (units >> lane / UNIT & 1) != 0 && !(score <= c.bound);
                const u32 votes = __ballot_sync(ALL_LANES, takes);
                const i32 count = c.count, end = count + __popc(votes);
                if (end > CANDIDATES) return false;
                __syncwarp();
                if (takes) c.keys[count + __popc(votes & ((1u << lane) - 1))] = block_key(score, block);
                if (lane == 0) c.count = end;
                __syncwarp();
                return true;
            });
        }
    }

    FSA_DEVICE void start(Scores& s) const {
        m.key_ring.wait(step);
        wgmma_fence();
        start_scores(s, query, m.key(step));
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
    // Offers the blocks of step n, or of the segment that it fills.
    FSA_DEVICE void offer_step(GroupSums& low_sums, GroupSums& high_sums, int n) {
        const int number = w.first_step + n;
        if (p.segment_steps > 0) {
            if (p.band.tile_heads == 2) leave_rows<2>(low_sums, row()), leave_rows<2>(high_sums, row() + 8);
            else if (p.band.tile_heads == 4) leave_rows<4>(low_sums, row()), leave_rows<4>(high_sums, row() + 8);
            else leave_rows<8>(low_sums, row()), leave_rows<8>(high_sums, row() + 8);
            if (++filled < p.segment_steps && n + 1 < w.steps) return;
            offer_segment((number + 1) * GROUPS);
            filled = 0;
        } else if (p.direct) {
            offer_rows(low_sums, high_sums, number * GROUPS, n);
        } else {
            offer_sums(low_sums, high_sums, number);
        }
    }

    // The product of the next step runs under the blocks of this one and under the other warpgroups' arithmetic: a second set of scores costs more in
    // copies than it hides.
    FSA_DEVICE void walk(const Voter& low, const Voter& high) {
        const bool mask_all = __any_sync(ALL_LANES, low.end == 0 || high.end == 0), overlap = p.band.kernel_size != p.band.kernel_stride;
        Scores s;
        GroupSums low_sums, high_sums;
        carry_low = carry_high = 0.0f;
        m.query_ring.wait(tile);
        start(s);
        FSA_NO_UNROLL for (int n = 0; n + 1 < w.steps; ++n) {
            wait(s);
            pool_step(low_sums, high_sums, s, low, high, w.key(n), mask_all || w.key(n) + STEP_KEYS > w.end_common, overlap);
            start(s);
            offer_step(low_sums, high_sums, n);
        }
        wait(s);
        m.query_ring.release(tile++);
        pool_step(low_sums, high_sums, s, low, high, w.key(w.steps - 1), true, overlap);
        offer_step(low_sums, high_sums, w.steps - 1);
    }

    FSA_DEVICE void open_tile() {
        const int step = token_step(), last = end_token(p.band.tile_tokens);
        FSA_NO_UNROLL for (int token = first_token() + lane_number() * step; token < last; token += 32 * step)
            candidates(token).open(blocks_of(token), token < w.tile.tokens);
        filled = 0;
        __syncwarp();
    }
    // Writes the lists of the warp's tokens.
    template <int LANES>
    FSA_DEVICE void list() const {
        const int met = w.steps == 0 ? 0 : (w.first_step + w.steps) * step_blocks(p), step = 32 / LANES * token_step(), last = end_token();
        settle_all<LANES>(0);
        FSA_NO_UNROLL for (int first = first_token(); first < last; first += step) {
            const int token = lane_token<LANES>(first);
            const RowBlocks row = blocks_of(token);
            i32* target = p.topk_indices + ((i64)w.kv_head(p) * p.band.total_q + w.tile.token + token) * p.topk;
            // Blocks behind the last step were not met: no key of theirs is seen, and they come last.
            list_blocks<LANES>(target, candidates(token), row, p.topk, max_i(row.first_scored, met), token < last);
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
    m.candidates = (Candidates*)(shared + RowTile::BYTES + STAGES * KeyTile::BYTES);
    m.segments = m.sums = (f32*)(m.candidates + p.band.tile_tokens + 1);
    m.query_ring = Ring<1>::at(shared_address(barriers));
    m.key_ring = Ring<STAGES>::at(shared_address(barriers + 2));
    if (threadIdx.x == 0) {
        m.query_ring.open();
        m.key_ring.open();
        barriers_ready();
        m.candidates[p.band.tile_tokens].open(RowBlocks(), false);
    }
    __syncthreads();
    const int total = p.num_tiles * p.num_kv_heads, group = __shfl_sync(ALL_LANES, threadIdx.x / WARPGROUP, 0);
    if (group == CONSUMERS) {
        registers_shrink<PRODUCER_REGISTERS>();
        if (threadIdx.x == CONSUMER_THREADS) produce(p, m, total);
        return;
    }
    registers_grow<CONSUMER_REGISTERS>();
    SelectConsumer c = {p, m, m.query + group * TILE_ROWS * 128};
    c.w = SelectWork::find(p, blockIdx.x);
    f32 low = Voter::load(p, c.w.tile, c.row()), high = Voter::load(p, c.w.tile, c.row() + 8);
    FSA_NO_UNROLL while (c.w.number < total) {
        c.open_tile();
        if (c.w.steps > 0) c.walk(Voter::of(p, c.w.tile, c.row(), low), Voter::of(p, c.w.tile, c.row() + 8, high));
        const SelectWork next = SelectWork::find(p, c.w.number + gridDim.x);
        low = Voter::load(p, next.tile, c.row());         // under way while the lists are written
        high = Voter::load(p, next.tile, c.row() + 8);
        if (p.segment_steps > 0) c.list<SEGMENT_LANES>();
        else c.list<QUAD>();
        c.w = next;
    }
}
