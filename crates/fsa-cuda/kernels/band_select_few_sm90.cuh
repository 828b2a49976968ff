// WHAT   Compressed attention and the blocks of every row in one pass on Hopper, of one sequence whose compressed keys are a single step: 128 keys, 32 blocks at most.
//        Results as of band_select_sm90.cuh.
// GRID   As many ctas for a kv head as its tiles of rows need, TILES each at most; a cta has every so many of them, so that all have as many of the last tokens, whose blocks have to be chosen.
// ROLES  Four warpgroups of 64 rows, two to a tile, each for itself: scores, softmax, sums of values, rows out, choice of blocks. So four chains hide each other's latencies.
// SMEM   All that the cta needs, from the start: the kv head's keys and values, and the queries of all tiles, whose place a warp's rows take; scores of blocks.
// SYNC   An mbarrier for everything that is loaded, once; one of each tile for its warps whose tokens are chosen for, behind which a warp makes the list of its steps.
//        May start before compressed keys are there: only the copies of these wait for them.
#define FSA_BLOCK_SCORES 1
#include "block/candidates.cuh"
#include "block/chosen_mask.cuh"
#include "block/gates.cuh"
#include "block/group_scores.cuh"
#include "block/nonfinite_values.cuh"
#include "block/score_slots.cuh"
#include "ptx/bulk.cuh"
#include "tile/fragments.cuh"

constexpr int PAIRS = THREADS / WARPGROUP / 2, ROUNDS = 2, TILES = PAIRS * ROUNDS;   // tiles at a time; one after the other; of a cta
constexpr int WARP_ROWS = 16, TILE_WARPS = CTA_ROWS / WARP_ROWS, SCORE_BYTES = WARP_ROWS * GROUPS * 4;             // of a warp
constexpr int SMEM_BYTES = 2 * KeyTile::BYTES + TILES * RowTile::BYTES + THREADS / 32 * SCORE_BYTES;
constexpr u32 ALL = 0xffffffffu;
constexpr i32 ABSENT = -1;      // scores are not negative
static_assert(CTA_ROWS == 2 * TILE_ROWS && WARPGROUPS == 2 * PAIRS, "two warpgroups to a tile");

// A tile of a cta, in shared memory.
struct FewTile {
    BandTile rows;
    i32 number;                         // in the order of launch
    u32 any[TILE_WARPS], all[TILE_WARPS];   // bits of what some token of a warp lists, and every one
};

struct FewMemory {
    u32 keys, values, queries, scores;
    u32 barriers;                   // of keys, of values; of every tile, of its queries and of warps that have chosen

    FSA_DEVICE u32 query(int tile) const { return queries + tile * RowTile::BYTES; }
    FSA_DEVICE u32 loaded_keys() const { return barriers; }
    FSA_DEVICE u32 loaded_values() const { return barriers + 8; }
    FSA_DEVICE u32 loaded_query(int tile) const { return barriers + 16 + 8 * tile; }
    FSA_DEVICE u32 chosen(int tile) const { return barriers + 16 + 8 * (TILES + tile); }
};

// The tile that a pair of warpgroups takes in a round: one pair begins with late tokens, whose blocks have to be chosen, the other one with early ones, so that products of one
// run beside the arithmetic of the other.
FSA_DEVICE int tile_of(int pair, int round) { return pair == 0 ? PAIRS * round : PAIRS * (ROUNDS - 1 - round) + 1; }
// Its first that is one of `tiles`, bits.
FSA_DEVICE int first_tile(int pair, u32 tiles) { return tiles >> tile_of(pair, 0) & 1 ? tile_of(pair, 0) : tile_of(pair, 1); }

// Finds a cta's tiles, every so many of its kv head in the order of launch, and starts all copies, by a warp.
FSA_DEVICE void load_all(const BandParams& p, const FewMemory& m, FewTile* tiles) {
    const int lane = lane_number(), kv_head = blockIdx.x % p.num_kv_heads;
    const BandSequence sequence = band_sequence(p.band, 0);
    const int number = blockIdx.x / p.num_kv_heads + lane * (gridDim.x / p.num_kv_heads), count = ceil_div(sequence.tokens, p.band.tile_tokens);
    const bool exists = lane < TILES && number < count - (p.band.split > 0 ? early_tiles(p.band, sequence) : 0);
    FewTile t = {};
    if (exists) t = {band_tile(p.band, sequence, count - 1 - number, 0, kv_head), number};
    if (lane < TILES) tiles[lane] = t;      // without tokens where there is none
    auto load = [&] {
        barrier_expect(m.loaded_query(lane), row_tile_bytes(p.band));
        load_tile<CTA_ROWS>(m.query(lane), &p.query_map, m.loaded_query(lane), t.rows.first_head, t.rows.token);
    };
    const u32 all = __ballot_sync(ALL, exists), early = 1u << first_tile(0, all) | 1u << first_tile(1, all);
    if (exists && early >> lane & 1) load();
    __syncwarp();
    if (lane == 0) {
        wait_for_previous();        // which makes compressed keys
        barrier_expect(m.loaded_values(), KeyTile::BYTES);     // which are looked at first
        load_groups(m.values, &p.value_map, m.loaded_values(), kv_head, sequence.key_row);
        barrier_expect(m.loaded_keys(), KeyTile::BYTES);
        load_groups(m.keys, &p.key_map, m.loaded_keys(), kv_head, sequence.key_row);
    }
    __syncwarp();
    if (exists && !(early >> lane & 1)) load();
}

// Clears the values of what is not finite, by all threads: an exact zero times what a row does not see must stay zero. Whether there was some.
FSA_DEVICE bool clean_values(const FewMemory& m) {
    const u32 first = m.values + threadIdx.x * 16;
    barrier_wait(m.loaded_values(), 0);
    u32 sum = 0;
    FSA_UNROLL for (int i = 0; i < KeyTile::BYTES / 16 / THREADS; ++i) {
        const Vec4 v = load_shared(first + i * THREADS * 16);
        sum = taint(taint(taint(taint(sum, v.x), v.y), v.z), v.w);
    }
    if (!__syncthreads_or(has_nonfinite(sum))) return false;
    FSA_NO_UNROLL for (int i = 0; i < KeyTile::BYTES / 16 / THREADS; ++i) {
        const Vec4 v = load_shared(first + i * THREADS * 16);
        store_shared(first + i * THREADS * 16, Vec4{finite_or_zero(v.x), finite_or_zero(v.y), finite_or_zero(v.z), finite_or_zero(v.w)});
    }
    fence_async_proxy();
    __syncthreads();
    return true;
}

// Of groups of VALUE_ROWS values of a head, whether some are not finite, by the last two warpgroups of all ctas, of which this is number `group`.
FSA_DEVICE void find_nonfinite(const BlockMask& mask, const Tensor& value, int rows, int heads, int group) {
    constexpr int LOADS = VALUE_ROWS * PIECES_PER_ROW / WARPGROUP;
    FSA_NO_UNROLL for (int unit = group * gridDim.x + blockIdx.x; unit < mask.value_groups * heads; unit += gridDim.x * PAIRS) {
        const int head = unit % heads, first = unit / heads * VALUE_ROWS;
        u32 sum = 0;
        Vec4 v[LOADS];
        FSA_UNROLL for (int i = 0; i < LOADS; ++i) {
            const int n = threadIdx.x % WARPGROUP + i * WARPGROUP, row = first + n / PIECES_PER_ROW;
            v[i] = row < rows ? load_global(tensor_row(value, row, head) + n % PIECES_PER_ROW * 16) : Vec4{0, 0, 0, 0};
        }
        FSA_UNROLL for (int i = 0; i < LOADS; ++i) sum = taint(taint(taint(taint(sum, v[i].x), v[i].y), v[i].z), v[i].w);
        const bool found = named_sync_or(1 + PAIRS + group, WARPGROUP, has_nonfinite(sum));
        if (threadIdx.x % WARPGROUP == 0) mask.nonfinite[(i64)head * mask.value_groups + unit / heads] = found;
    }
}

// Keys that a thread's two rows see, those that all rows of its warp see, and the last row of its warpgroup.
struct FewLimits {
    i32 low, high, least, most;

    FSA_DEVICE static FewLimits of(const Band& band, const BandTile& t, int first) {
        // As end_key; the quotient is exact: a position is less than 2^20, and what is lost less than half of a stride's share of one.
        const f32 by = reciprocal_fast((f32)band.kernel_stride);
        auto end = [&](int row) {
            const int reach = t.position_of(row) - (band.kernel_size - 1);
            return t.exists(row) && reach >= 0 ? min_i(t.keys, (int)(((f32)reach + 0.5f) * by) + 1) : 0;
        };
        FewLimits r = {end(first + lane_number() / 4), end(first + lane_number() / 4 + 8), 0, 0};
        r.least = (int)__reduce_min_sync(ALL, min_i(r.low, r.high));
        r.most = end(min_i(first / TILE_ROWS * TILE_ROWS + TILE_ROWS, t.tokens * t.tile_heads) - 1);
        return r;
    }
};

// A warp's 16 rows of a tile.
struct FewRows {
    const BandSelectParams& all;
    const BandParams& p;
    FewTile& tile;
    int first;              // row of the tile
    u32 place, scores;      // tile of the queries, which the rows replace; the warp's scores

    // Makes the scores of the thread's two rows probabilities, and leaves those of groups, ready to be added up over heads, and log-sum-exps. One over the rows' sums.
    // Of the first 32 SEEN keys: no row of the warp sees others.
    template <int SEEN>
    FSA_DEVICE void softmax(Scores& s, const FewLimits& limits, f32& of_low, f32& of_high) const {
        const int before = 8 * (lane_number() & 3), low_end = limits.low - before, high_end = limits.high - before;
        f32 low_top[2] = {neg_inf(), neg_inf()}, high_top[2] = {neg_inf(), neg_inf()};
        FSA_UNROLL for (int j = 0; j < SEEN; ++j) {
            if (32 * j + 32 > limits.least)
                FSA_UNROLL for (int e = 0; e < 4; ++e)
                    FSA_UNROLL for (int c = 0; c < 2; ++c) {
                        f32* x = &s[4 * (e * OCTETS + j) + c];
                        const int key = 32 * j + 4 * c + e;     // less `before`
                        if (key >= low_end) x[0] = neg_inf();
                        if (key >= high_end) x[2] = neg_inf();
                    }
            FSA_UNROLL for (int e = 0; e < 4; ++e)
                FSA_UNROLL for (int c = 0; c < 2; ++c) {
                    low_top[c] = fmaxf(low_top[c], s[4 * (e * OCTETS + j) + c]);
                    high_top[c] = fmaxf(high_top[c], s[4 * (e * OCTETS + j) + 2 + c]);
                }
        }
        RowState low = {quad_max(fmaxf(low_top[0], low_top[1])), 0.0f}, high = {quad_max(fmaxf(high_top[0], high_top[1])), 0.0f};
        if (low.max != neg_inf()) low.max *= p.scale_log2;      // scale 0 times -inf would be NaN
        if (high.max != neg_inf()) high.max *= p.scale_log2;
        const f32 low_reference = reference_of(low), high_reference = reference_of(high);
        FSA_UNROLL for (int j = 0; j < OCTETS; ++j)
            FSA_UNROLL for (int e = 0; e < 4; ++e)
                FSA_UNROLL for (int c = 0; c < 4; ++c) {
                    f32& x = s[4 * (e * OCTETS + j) + c];
                    x = j < SEEN ? exp2_fast(fmaf(x, p.scale_log2, c < 2 ? -low_reference : -high_reference)) : 0.0f;
                }
        of_low = close<false>(s, low);
        of_high = close<true>(s, high);
    }
    template <bool HIGH>
    FSA_DEVICE f32 close(const Scores& s, const RowState& state) const {
        constexpr int E = HIGH ? 2 : 0;
        const bool overlap = p.band.kernel_size != p.band.kernel_stride;
        const f32 inner = overlap ? 2.0f : 1.0f;
        GroupSums sums;
        FSA_UNROLL for (int j = 0; j < OCTETS; ++j)
            FSA_UNROLL for (int c = 0; c < 2; ++c) {
                const f32* x = &s[4 * j + E + c];
                sums[2 * j + c] = fmaf(inner, x[0] + x[4 * OCTETS] + x[8 * OCTETS], x[12 * OCTETS]);
            }
        f32 carry = 0.0f, own = add_overlap<HIGH>(sums, s, carry, inner - 1.0f);
        if (overlap) own = 0.5f * own + ((lane_number() & 3) == 0 ? 0.5f : 0.0f) * carry;      // each key counts twice in the sums of groups but the last, which counts once
        const f32 sum = quad_sum(own), log2_sum = reference_of(state) + log2_fast(sum), by = sum == 0.0f ? 0.0f : reciprocal_fast(sum);
        const int row = lane_number() / 4 + (HIGH ? 8 : 0);
        if (p.lse != nullptr && (lane_number() & 3) == 0 && tile.rows.exists(first + row)) p.lse[tile.rows.plane_index(first + row, p.band.total_q)] = log2_sum * LN_2;
        // A head whose log-sum-exp is not finite does not vote: its sum is 0 or NaN, and the larger one of NaN and 0 is 0.
        const u32 at = score(row, 2 * (lane_number() & 3));
        FSA_UNROLL for (int j = 0; j < OCTETS; ++j) store_shared8(at ^ 32 * j, __float_as_uint(fmaxf(sums[2 * j] * by, 0.0f)), __float_as_uint(fmaxf(sums[2 * j + 1] * by, 0.0f)));
        return by;
    }
    // Where the score of a block is, of the warp's row `row`; rows side by side begin in different banks.
    FSA_DEVICE u32 score(int row, int block) const { return scores + row * (GROUPS * 4) + (4 * block ^ (row & 3) << 5); }

    // The rows, each still to be multiplied by one over its sum. All warps of a warpgroup have the same SEEN.
    template <int SEEN>
    FSA_DEVICE void attend(const FewMemory& m, const FewLimits& limits, Columns& out, f32& of_low, f32& of_high) const {
        Fragments a;
        {
            Scores s;
            wgmma_fence();
            start_scores(s, place + first / TILE_ROWS * TILE_ROWS * 128, m.keys);
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_pin(s);
            softmax<SEEN>(s, limits, of_low, of_high);
            FSA_UNROLL for (int k = 0; k < STEP_KEYS / 16; ++k) to_fragment<STEP_KEYS>(a[k], s, k);
        }
        wgmma_fence();
        FSA_UNROLL for (int k = 0; k < STEP_KEYS / 16; k += 4 / SEEN) Wgmma<HEAD_DIM>::template registers_shared<1>(out, a[k], over_rows<STEP_KEYS>(m.values, k, 0), k != 0);
        wgmma_commit();
        named_sync(1 + thread_number() / WARPGROUP, WARPGROUP);     // all scores of the warpgroup are there: nobody reads its queries any more
        wgmma_wait<0>();
        wgmma_pin(out);
    }

    // The rows times factors, in the place of the warp's queries.
    FSA_DEVICE void stage(const Columns& out, f32 of_low, f32 of_high) const {
        const u32 at = tall_address(place, first);
        FSA_UNROLL for (int i = 0; i < HEAD_DIM / 16; ++i) {
            u32 v[4];
            FSA_UNROLL for (int j = 0; j < 4; ++j) {
                const int e = 8 * i + 2 * j;    // low, high of eight columns, then of the next
                const f32 by = j & 1 ? of_high : of_low;
                v[j] = pack2(out[e] * by, out[e + 1] * by);
            }
            store_matrices(unit_address<CTA_ROWS>(at, i), v);
        }
    }
    // Copies those of them that exist.
    FSA_DEVICE void copy(const Tensor& to) const {
        __syncwarp();
        FSA_NO_UNROLL for (int n = lane_number(); n < WARP_ROWS * PIECES_PER_ROW; n += 32) {
            const int row = first + n / PIECES_PER_ROW, piece = n % PIECES_PER_ROW;
            if (tile.rows.exists(row)) store_global((void*)(tile.rows.row_of(to, row) + piece * 16), load_shared(place + RowTile::offset(row, piece)));
        }
        __syncwarp();
    }
    FSA_DEVICE f32 gate(int row) const {
        if (!tile.rows.exists(row)) return 0.0f;
        return gate_of(p.branch.gates, tile.rows.token + tile.rows.token_of(row), tile.rows.first_head + tile.rows.head_of(row), p.branch.number);
    }
    // Leaves the rows, as boxes where they have no gates and there are all that a box has: nobody waits for the memory that they go to. No branch comes before this one.
    FSA_DEVICE void leave(const Columns& out, f32 of_low, f32 of_high) const {
        const bool is_full = first + WARP_ROWS <= tile.rows.tokens * tile.rows.tile_heads, has_gates = p.branch.sum.data != nullptr;
        stage(out, of_low, of_high);
        if (is_full && !has_gates) {
            fence_async_proxy();
            __syncwarp();
            if (lane_number() > 0) return;
            FSA_UNROLL for (int half = 0; half < RowTile::HALVES; ++half)
                store_box(&all.out_map, place + half * RowTile::HALF_BYTES + first * 128, half * 64, tile.rows.first_head, tile.rows.token + tile.rows.token_of(first));
            bulk_commit();
            return;
        }
        if (!p.branch.discards) copy(p.out);
        if (!has_gates) return;
        __syncwarp();
        stage(out, of_low * gate(first + lane_number() / 4), of_high * gate(first + lane_number() / 4 + 8));
        copy(p.branch.sum);
    }

    // The bits of the best `places` blocks of a token, which reach a score that enough of them do; the lane's has the score `own`.
    static FSA_DEVICE u32 best_of(i32 own, i32 bound, int places) {
        u32 word = __ballot_sync(ALL, own >= bound && own != ABSENT);
        int surplus = __popc(word) - places;
        if (surplus > 0) {      // equal scores compete for the last places: the lower ids stay
            u32 equal = __ballot_sync(ALL, own == bound);
            FSA_NO_UNROLL for (; surplus > 0; --surplus) {
                const u32 highest = 0x80000000u >> __clz(equal);
                equal ^= highest;
                word ^= highest;
            }
        }
        return word;
    }
    // The bits of the best blocks of four tokens of the warp from `base` on; a lane has the blocks that compete, and the places for them, of the token of its number.
    FSA_DEVICE u32 best_of_four(int base, int tokens, int heads, u32 scored, int places) const {
        const int lane = lane_number();
        i32 own[4];
        {
            f32 sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            FSA_NO_UNROLL for (int h = 0; h < heads; ++h)
                FSA_UNROLL for (int i = 0; i < 4; ++i) sum[i] += __uint_as_float(load_shared_word(score(min_i(base + i, tokens - 1) * heads + h, lane)));
            FSA_UNROLL for (int i = 0; i < 4; ++i) own[i] = __shfl_sync(ALL, scored, base + i) >> lane & 1 ? __float_as_int(sum[i]) : ABSENT;
        }
        __syncwarp();
        FSA_UNROLL for (int i = 0; i < 4; ++i)
            if (base + i < tokens) store_shared(scores + (base + i) * heads * (GROUPS * 4) + 4 * lane, (u32)own[i]);
        __syncwarp();
        const int token = min_i(base + lane / 8, tokens - 1);
        const Vec4 v = load_shared(scores + token * heads * (GROUPS * 4) + lane % 8 * 16);
        i32 best[4] = {(i32)v.x, (i32)v.y, (i32)v.z, (i32)v.w};
        order_lanes<8>(best, lane & 7);
        const i32 bound = key_at<8>(best, max_i(__shfl_sync(ALL, places, token) - 1, 0));
        u32 listed = 0;
        FSA_UNROLL for (int i = 0; i < 4; ++i) {
            const int count = __shfl_sync(ALL, places, base + i);
            const u32 word = count > 0 ? best_of(own[i], __shfl_sync(ALL, bound, 8 * i), count) : 0;
            if (lane == base + i) listed = word;
        }
        return listed;
    }
    // Chooses for the warp's tokens. What follows from a token's position is found for all of them side by side, a lane each.
    FSA_DEVICE void choose(int kv_head, u32 chosen) const {
        const BlockChoice& choice = all.choice;
        const int heads = p.band.tile_heads, lane = lane_number(), begin = tile.rows.token_of(first), tokens = min_i(tile.rows.tokens - begin, tile.rows.token_of(WARP_ROWS));
        const RowBlocks blocks = row_blocks(tile.rows.position + begin + lane, choice.topk, choice.init_blocks, choice.local_blocks);
        const int places = lane >= tokens || blocks.lists_all() ? 0 : blocks.places;
        u32 listed = forced_bits(blocks, places, choice.topk, 0);
        const u32 scored = places > 0 ? low_bits(blocks.end_scored) & ~low_bits(blocks.first_scored) : 0;
        const u32 choosing = __ballot_sync(ALL, scored != 0);
        FSA_NO_UNROLL for (int base = 0; choosing >> base != 0; base += 4)
            if (choosing >> base & 15) listed |= best_of_four(base, tokens, heads, scored, places);
        if (tokens > 0) {
            const i64 row = (i64)kv_head * p.band.total_q + tile.rows.token + begin;
            i32* ids = choice.topk_indices + row * choice.topk;
            FSA_NO_UNROLL for (int base = 0; base < tokens; base += 4)
                FSA_UNROLL for (int i = 0; i < 4; ++i, ids += choice.topk) {
                    const u32 word = __shfl_sync(ALL, listed, base + i), exists = base + i < tokens ? 1 : 0;
                    const int behind = __popc(word) + lane;
                    store_global_if(word >> lane & exists, ids + __popc(word & low_bits(lane)), lane);
                    store_global_if(behind < choice.topk && exists, ids + behind, -1);
                    if (choice.topk > 32 && exists && behind + 32 < choice.topk) ids[behind + 32] = -1;     // there are no more than 64 places
                }
            if (choice.mask.rows != nullptr && lane < tokens) choice.mask.rows[(row + lane) * choice.mask.words] = listed;
        }
        if (choice.mask.rows == nullptr) return;
        const u32 some = __reduce_or_sync(ALL, lane < tokens ? listed : 0), every = __reduce_and_sync(ALL, lane < tokens ? listed : ~0u);
        if (lane == 0) {
            tile.any[first / WARP_ROWS] = some;
            tile.all[first / WARP_ROWS] = every;
            barrier_arrive(chosen);
        }
    }
};

// The steps of a tile's mask, by a warp, when the tile's warps have chosen.
FSA_DEVICE void list_tile(const BandSelectParams& all, FewTile& tile, u32 chosen, int kv_head) {
    const BlockMask& mask = all.choice.mask;
    const int lane = lane_number() % TILE_WARPS, last = tile.rows.last_position();
    barrier_wait(chosen, 0);
    const u32 any = __reduce_or_sync(ALL, tile.any[lane]), by_all = __reduce_and_sync(ALL, tile.all[lane]);
    __syncwarp();
    if (lane_number() == 0) {
        tile.any[0] = any;
        tile.all[0] = by_all;
    }
    __syncwarp();
    list_steps(mask, {tile.rows.position, last, last + 1, all.choice.window, STEP_KEYS}, (i64)kv_head * mask.num_tiles + tile.number, tile.any, tile.all);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) band(const __grid_constant__ BandSelectParams all) {
    let_next_start();
    const BandParams& p = all.attention;
    const BlockChoice& choice = all.choice;
    extern __shared__ __align__(1024) char shared[];
    __shared__ __align__(8) u64 barriers[2 + 2 * TILES];
    __shared__ FewTile tiles[TILES];
    FewMemory m = {shared_address(shared)};
    m.values = m.keys + KeyTile::BYTES;
    m.queries = m.values + KeyTile::BYTES;
    m.scores = m.queries + TILES * RowTile::BYTES;
    m.barriers = shared_address(barriers);
    const int group = __shfl_sync(ALL, threadIdx.x / WARPGROUP, 0), kv_head = blockIdx.x % p.num_kv_heads;
    if (threadIdx.x < 32) {
        if (threadIdx.x == 0) {
            prefetch_map(&p.query_map);
            prefetch_map(&p.key_map);
            prefetch_map(&p.value_map);
            prefetch_map(&all.out_map);
            FSA_UNROLL for (int i = 0; i < 2 + 2 * TILES; ++i) barrier_init(m.barriers + 8 * i, i < 2 + TILES ? 1 : TILE_WARPS);
            barriers_ready();
        }
        __syncwarp();
        load_all(p, m, tiles);
    }
    __syncthreads();
    const int first = (group & 1) * TILE_ROWS + thread_number() / 32 % 4 * WARP_ROWS;
    FewLimits limits = FewLimits::of(p.band, tiles[tile_of(group / 2, 0)].rows, first);
    const bool dirty = clean_values(m);
    barrier_wait(m.loaded_keys(), 0);
    FSA_NO_UNROLL for (int round = 0; round < ROUNDS; ++round) {
        const int i = tile_of(group / 2, round);
        if (tiles[i].rows.tokens == 0) {
            limits = FewLimits::of(p.band, tiles[tile_of(group / 2, ROUNDS - 1)].rows, first);
            continue;
        }
        const FewRows rows = {all, p, tiles[i], first, m.query(i), m.scores + thread_number() / 32 * SCORE_BYTES};
        barrier_wait(m.loaded_query(i), 0);
        Columns out;
        f32 of_low, of_high;
        if (limits.most > 64) rows.template attend<4>(m, limits, out, of_low, of_high);
        else rows.template attend<2>(m, limits, out, of_low, of_high);
        if (dirty) {
            BandWork w = {tiles[i].rows};
            w.kv_head = kv_head;
            add_nonfinite(out, p.value, w, 0, RowLimits{0, limits.low, 0, limits.high}, {});
        }
        rows.leave(out, of_low, of_high);
        limits = FewLimits::of(p.band, tiles[tile_of(group / 2, ROUNDS - 1)].rows, first);
        if (choice.topk_indices != nullptr) rows.choose(kv_head, m.chosen(i));
    }
    if (choice.topk_indices != nullptr && choice.mask.rows != nullptr) {
        // The pair that ends with fewer keys looks at values meanwhile.
        if (group >= PAIRS) find_nonfinite(choice.mask, choice.value, p.band.cu_seqlens_kv[p.band.batch], p.num_kv_heads, group - PAIRS);
        if (thread_number() % WARPGROUP < 32 && tiles[group].rows.tokens > 0) list_tile(all, tiles[group], m.chosen(group), kv_head);
    }
    if (lane_number() == 0) bulk_wait_read();
}
