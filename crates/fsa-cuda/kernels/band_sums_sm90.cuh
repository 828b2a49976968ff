// WHAT   Backward of attention of rows to an interval of keys on Hopper in one pass: five products where the two passes of `band_backward` take seven. A tile
//        of keys meets its rows once, for grad_key and grad_value and for its part of grad_query, which is added to the target itself, as f16 in the place of
//        bf16 and scaled so that nothing overflows (block/query_sums.cuh). The order of these additions is that of time.
//        The factor of the sums is that of the keys in shared memory, so that no sum is multiplied by it; scores give it back in the factor of their exponents.
//        band_sums_open clears the target and takes the bounds of keys, band_delta those of rows where the caller has no statistics, combine_statistics
//        both in the whole; band_sums_finish makes bf16 of f16 in place and adds up splits, band_backward_merge these alone. Several attentions may add to one
//        target, side by side: it is opened for all before, and finished behind them. With FSA_BLOCK_MASK rows see the blocks that they list. With FSA_WINDOW_TOO the
//        rows also attend to their last keys in a softmax of its own: scores and dP are common, and for keys that a row sees in both what the two add up to is
//        that of a third softmax, so five products and one exponential do both.
// GRID   (tiles of 128 keys, kv heads, splits) as the pass of keys: block/key_walk.cuh.
// ROLES  Two warpgroups of 64 keys consume tiles of 64 or 80 rows, and multiply half the columns each of K^T dS^T. Of a third two or three warps bring the
//        rows, and two threads of the last send a warpgroup's half of grad_query each on its way, the first of which may have to clear some of it before.
// SMEM   128 keys and values, three stages of 64 or two of 80 rows of query and gradient, two of dS, sums of 64 columns of each warpgroup; of every stage's
//        rows the statistics, and for each key the rows that see it, as bits.
// SYNC   mbarriers: keys, values loaded; rows loaded, checked, free; dS full, free; sums full, free. dS of a tile is multiplied beside the products of the
//        next. It may overlap the kernel ahead up to the barrier behind one thread's wait for that; tables and keys, read before, are older than that kernel.
#define FSA_HALF_SPLITS 1       // block/band_gradients.cuh
#include "block/key_walk.cuh"
#include "block/sums_targets.cuh"
#include "ptx/bulk.cuh"
#include "ptx/thread.cuh"

static_assert(HEAD_DIM == 128 && IS_BF16, "a warpgroup's half of the columns is one box; f16 has no room to spare for sums");
#ifndef FSA_WINDOW_TOO      // 1: the rows attend to the window in a softmax of its own, too, and the gradients are those of both
#define FSA_WINDOW_TOO 0
#endif
#ifndef FSA_SUM_ROWS        // 80: a quarter more rows for the keys that a product reads
#define FSA_SUM_ROWS 64
#endif
constexpr bool WINDOW_TOO = FSA_WINDOW_TOO;
constexpr int SUM_ROWS = FSA_SUM_ROWS, ROW_WORDS = (SUM_ROWS + 31) / 32;        // bits of rows
constexpr bool IN_TURN = SUM_ROWS > 64;     // There are no registers for scores and dP of more than 64 rows: dP comes when probabilities are bf16.
constexpr int ROW_STAGES = IN_TURN ? 2 : 3, DS_STAGES = 2;
typedef f32 RowScores[SUM_ROWS / 2];        // of 64 keys, or columns, and the rows of a tile
typedef u32 RowFragments[SUM_ROWS / 16][4];
constexpr u32 ALL_LANES = 0xffffffffu;
// Keys of a block in a tile of keys, and blocks there.
constexpr int LISTED_KEYS = BLOCK_MASK && BLOCK_SIZE < CTA_KEYS ? BLOCK_SIZE : CTA_KEYS, KEY_BLOCKS = CTA_KEYS / LISTED_KEYS;

// What consumers have to mind of a tile of rows: some row sees a part of a block, or has a gate below zero.
constexpr i32 MASKED = 1, NEGATIVE = 2;

// A number of each row of a tile, by itself: those of two neighbouring rows are 8 bytes, for which there are registers.
struct RowNumbers {
    struct __align__(8) Pair {
        f32 first, second;
        FSA_DEVICE f32 of(int e) const { return e & 1 ? second : first; }
    };
    f32 of_rows[SUM_ROWS];

    // Of the two rows that the thread has in columns 8 i and on of 64.
    FSA_DEVICE Pair pair(int i) const { return *(const Pair*)(of_rows + 8 * i + 2 * (threadIdx.x & 3)); }
    // x = f(x, number of its row) for 64 keys.
    template <typename F>
    FSA_DEVICE void apply(RowScores& s, F f) const {
        FSA_UNROLL for (int i = 0; i < SUM_ROWS / 8; ++i) {
            const Pair numbers = pair(i);
            FSA_UNROLL for (int e = 0; e < 4; ++e) s[4 * i + e] = f(s[4 * i + e], numbers.of(e), 4 * i + e);
        }
    }
};

// The rows of a tile that see a key, a bit each, for every key of a tile: an interval of rows, of which some list the key's block.
struct SeenKeys {
    u32 rows[CTA_KEYS][ROW_WORDS];

    // A lane of the warp that brings rows 32 word and on, of which those `wanted` count if they are at most `window` keys behind this key; the first
    // that is not before it is in the tile's token `from`.
    FSA_DEVICE void put(const Band& band, int word, int key, int from, int window, u32 wanted) {
        rows[key][word] = rows_before(band, from + min_i(window, 1 << 30) + 1, word) & ~rows_before(band, from, word) & wanted;
    }

  private:
    // Rows of the first tokens of the tile.
    static FSA_DEVICE u32 rows_before(const Band& band, int tokens, int word) {
        return low_bits(min_i(max_i(tokens, 0), band.tile_tokens) * band.tile_heads - 32 * word);
    }
};

// A row's statistics for keys that it sees in both attentions, whose probabilities and score gradients, added up, are those of one softmax:
//     P1 + P2 = 2^(s - lse),    P1 (dP - delta1) + P2 (dP - delta2) = (P1 + P2) (dP - delta),
// where 2^-lse = 2^-lse1 + 2^-lse2, both with the signs of their gates, and delta is the mean of both with these weights.
FSA_DEVICE RowStats joined(const RowStats& one, const RowStats& other) {
    const f32 least = fminf(one.lse, other.lse);
    if (least == -neg_inf()) return no_row_stats();
    const f32 first = with_sign_of(exp2_fast(least - one.lse), one.delta), second = with_sign_of(exp2_fast(least - other.lse), other.delta);
    f32 sum = first + second;
    if (fabsf(sum) < 0x1p-24f) sum = 0x1p-24f;      // of gates of both signs only rounding is left, but delta has to be finite
    // Equal deltas stay what they are: rounding would be all that is left of a row that sees one key.
    const f32 apart = other.delta - one.delta, mean = fabsf(apart) < -neg_inf() ? fmaf(second * reciprocal_fast(sum), apart, one.delta) : one.delta + other.delta;
    return {least - log2_fast(fabsf(sum)), with_sign(mean, sum < 0.0f)};
}

struct __align__(16) SumRecords {
    static constexpr int ROWS = SUM_ROWS;
    // For each block of the tile's keys the numbers of its rows, if they see it as a whole: in the attention, in the window, in both, or not at all, which is
    // a log-sum-exp of infinity, of which all probabilities are zero. Behind them those for a key that a row sees in the attention alone, in the window
    // alone, and in both. There is no room for deltas of more than four blocks.
    static constexpr int KINDS = WINDOW_TOO ? 3 : 0, DELTA_BLOCKS = WINDOW_TOO && KEY_BLOCKS <= 4 ? KEY_BLOCKS : 1;
    RowNumbers lse[KEY_BLOCKS + KINDS], delta[DELTA_BLOCKS + KINDS];
    SeenKeys seen[1 + WINDOW_TOO];
    i32 special[ROW_WORDS];

    FSA_DEVICE i32 put(const BandBackwardParams& p, const KeyWork& w, const RowOfTile& r) {
        const u32 blocks = r.blocks(p.band, w);
        const RowStats of_row = r.stats(p.row_stats, p.band), of_window = WINDOW_TOO ? r.stats(p.window_stats, p.band) : no_row_stats();
        // Whether the row sees every block as a whole, if it lists all, and if it does not: the probabilities of zero may not meet what is not finite.
        bool is_whole = sees_all(p, w, r), may_lack = !w.has_nonfinite_values && fabsf(of_row.lse) < -neg_inf() && fabsf(of_row.delta) < -neg_inf();
        i32 found = is_negative(of_row) || is_negative(of_window) ? NEGATIVE : 0;
        if constexpr (WINDOW_TOO) {
            put_numbers(r.row, KEY_BLOCKS, DELTA_BLOCKS, of_row);
            put_numbers(r.row, KEY_BLOCKS + 1, DELTA_BLOCKS + 1, of_window);
            put_numbers(r.row, KEY_BLOCKS + 2, DELTA_BLOCKS + 2, joined(of_row, of_window));
            const int behind = r.position - w.rows.first_key;       // the tile's first key
            const bool near = behind <= p.window_size;
            is_whole &= near || behind - CTA_KEYS >= p.window_size;
            if (near) may_lack = DELTA_BLOCKS == KEY_BLOCKS;
            asm volatile("" ::: "memory");      // they are read again: there are no registers for all of them
            FSA_UNROLL for (int block = 0; block < KEY_BLOCKS; ++block) {
                const bool listed = lists(blocks, block);
                const int kind = near ? listed ? 2 : 1 : 0, row = min_i(r.row, ROWS - 1);
                RowStats stats = {lse[KEY_BLOCKS + kind].of_rows[row], delta[DELTA_BLOCKS + kind].of_rows[row]};
                if (!near && !listed) stats.lse = -neg_inf();
                put_numbers(r.row, block, DELTA_BLOCKS == KEY_BLOCKS ? block : 0, stats);
            }
        } else {
            FSA_UNROLL for (int block = 0; block < KEY_BLOCKS; ++block) put_numbers(r.row, block, 0, {lists(blocks, block) ? of_row.lse : -neg_inf(), of_row.delta});
        }
        // A row of the tile that does not exist is masked, too: its zeros times a value that is not finite are NaN.
        found |= r.row >= ROWS || r.exists && is_whole && (may_lack || lists_all(blocks)) ? 0 : MASKED;
        found = __reduce_or_sync(ALL_LANES, found);
        if (found & MASKED) put_seen(p, r.row, first_position(p.band, w.rows.first_key) - r.tile_position, blocks, __ballot_sync(ALL_LANES, r.exists));
        return found;
    }
    // What of 32 rows, of which some are masked, sees one of the thread's two keys, key_low or + 8, the first row being the thread's first in 32 columns of the
    // accumulators.
    FSA_DEVICE u32 seen_by(int attention, int key, int word) const { return seen[attention].rows[key][word] >> 2 * (threadIdx.x & 3); }
    FSA_DEVICE i32 all_special() const {
        i32 all = 0;
        FSA_UNROLL for (int word = 0; word < ROW_WORDS; ++word) all |= special[word];
        return all;
    }

  private:
    static FSA_DEVICE bool lists(u32 blocks, int block) { return !BLOCK_MASK || blocks >> block & 1; }
    static FSA_DEVICE bool lists_all(u32 blocks) { return !BLOCK_MASK || !(~blocks & ((1u << KEY_BLOCKS) - 1)); }
    FSA_DEVICE void put_numbers(int row, int of_lse, int of_delta, const RowStats& stats) {
        if (row >= ROWS) return;
        lse[of_lse].of_rows[row] = stats.lse;
        delta[of_delta].of_rows[row] = stats.delta;
    }
    FSA_DEVICE void put_seen(const BandBackwardParams& p, int row, int begin, u32 blocks, u32 exist) {
        const int lane = row % 32, word = row / 32;
        FSA_NO_UNROLL for (int key = lane; key < CTA_KEYS; key += 32) {
            const int from = begin + key * (WINDOW_TOO ? 1 : p.band.kernel_stride);
            if (WINDOW_TOO) seen[WINDOW_TOO].put(p.band, word, key, from, p.window_size, exist);
            u32 wanted = exist;
            if constexpr (BLOCK_MASK) {     // every 16 keys lie in one block
                const u32 one = __ballot_sync(ALL_LANES, lists(blocks, (key - lane) / LISTED_KEYS)), other = __ballot_sync(ALL_LANES, lists(blocks, (key - lane + 16) / LISTED_KEYS));
                wanted &= lane < 16 ? one : other;
            }
            seen[0].put(p.band, word, key, from, p.band.window, wanted);
        }
    }
    // Of keys that lists do not leave out. No row sees all of a tile that is not full: behind the last key are those of another sequence.
    static FSA_DEVICE bool sees_all(const BandBackwardParams& p, const KeyWork& w, const RowOfTile& r) {
        if (WINDOW_TOO) return r.position - w.rows.first_key >= CTA_KEYS - 1 && w.rows.keys == CTA_KEYS;     // all earlier tokens
        return first_key(p.band, r.position) <= w.rows.first_key && end_key(p.band, r.position, w.tokens.keys) >= w.rows.first_key + CTA_KEYS;
    }
};
typedef RowRing<SumRecords, ROW_STAGES> SumRowRing;
constexpr int DS_HALF_BYTES = SUM_ROWS * 128, DS_BYTES = CONSUMERS * DS_HALF_BYTES, SUM_COLUMNS = HEAD_DIM / CONSUMERS, SUM_BYTES = SUM_ROWS * SUM_COLUMNS * 2;
constexpr int SUMS_SMEM_BYTES = 2 * KeyTile::BYTES + SumRowRing::BYTES + DS_STAGES * DS_BYTES + CONSUMERS * SUM_BYTES;

// What keys are multiplied by in shared memory, a power of two, and what their scores are multiplied by in exponents.
struct KeyScale { f32 of_keys, of_scores; };

struct SumMemory {
    u32 key, value, ds, sums;
    u32 loaded_keys, loaded_values;     // barriers
    const KeyScale* scale;
    SumRowRing rows;
    Ring<DS_STAGES> ds_ring;
    Ring<CONSUMERS> sum_rings;          // one place for each warpgroup

    FSA_DEVICE u32 ds_tile(u32 n) const { return ds + Ring<DS_STAGES>::place(n) * DS_BYTES; }
    FSA_DEVICE u32 sum_tile(int group) const { return sums + group * SUM_BYTES; }
};

// The consumers. An exact zero of dS must not meet NaN or infinity; keys that are not finite have made so the statistics of the rows that see them.
FSA_DEVICE void scale_keys(const SumMemory& m) {
    const f32 scale = m.scale->of_keys;
    const auto scaled = [&](u32 word) { return finite_or_zero(pack2(unpack_lo(word) * scale, unpack_hi(word) * scale)); };
    constexpr int COPIES = KeyTile::BYTES / 16 / CONSUMER_THREADS;
    const u32 own = m.key + threadIdx.x * 16;
    Vec4 v[COPIES];
    barrier_wait(m.loaded_keys, 0);
    FSA_UNROLL for (int i = 0; i < COPIES; ++i) v[i] = load_shared(own + i * CONSUMER_THREADS * 16);
    FSA_UNROLL for (int i = 0; i < COPIES; ++i) store_shared(own + i * CONSUMER_THREADS * 16, Vec4{scaled(v[i].x), scaled(v[i].y), scaled(v[i].z), scaled(v[i].w)});
    fence_async_proxy();
    named_sync(ALL_CONSUMERS, CONSUMER_THREADS);
}

// Zeros in grad_query before the first sum: whoever of the ctas is there takes shares of it, so that nobody waits for one that is not, and adds nothing until
// all are done.
constexpr int CLEARED_TOKENS = 80, CLEARING_CTAS = 128;
struct Clearing {
    int shares, batch;      // shares that are taken together
    FSA_DEVICE static Clearing find(const BandBackwardParams& p) {
        const int shares = ceil_div(p.band.total_q, CLEARED_TOKENS) * p.num_kv_heads;
        return {shares, max_i(ceil_div(shares, CLEARING_CTAS), 1)};
    }
    FSA_DEVICE int batches() const { return ceil_div(shares, batch); }
};
// A warp, of which the first thread goes on with it. `zeros` is the first warpgroup's memory for sums, which waits for that thread.
FSA_DEVICE void clear_sums(const BandBackwardParams& p, u32 zeros) {
    FSA_NO_UNROLL for (int at = lane_number() * 16; at < SUM_BYTES; at += 32 * 16) store_shared(zeros + at, Vec4{0, 0, 0, 0});
    fence_async_proxy();
    __syncwarp();
    if (lane_number() != 0) return;
    const Clearing clearing = Clearing::find(p);
    for (int taken; (taken = (int)atomicAdd(p.clearing, 1u)) < clearing.batches();) {
        const int end = min_i((taken + 1) * clearing.batch, clearing.shares);
        FSA_NO_UNROLL for (int share = taken * clearing.batch; share < end; ++share) {
            const int head = share % p.num_kv_heads * p.band.group_size, token = share / p.num_kv_heads * CLEARED_TOKENS;
            // The last boxes may reach into what others clear.
            FSA_NO_UNROLL for (int t = 0; t < CLEARED_TOKENS; t += p.band.tile_tokens)
                FSA_NO_UNROLL for (int h = 0; h < p.band.group_size; h += p.band.tile_heads)
                    FSA_UNROLL for (int half = 0; half < CONSUMERS; ++half) store_box(&p.sums_map, zeros, half * SUM_COLUMNS, head + h, token + t);
        }
        bulk_commit();
        bulk_wait();
        fence_proxies();
        add_release(p.clearing + 1, 1);
    }
}

// One thread for each consuming warpgroup: adds its sums of every tile to grad_query.
FSA_DEVICE void send_sums(const BandBackwardParams& p, const SumMemory& m, const KeyWork& w, int group) {
    barrier_arrive(m.sum_rings.empty + 8 * group);
    if (p.clearing != nullptr) {
        const int all = Clearing::find(p).batches();
        while ((int)load_acquire(p.clearing + 1) < all) {}
        fence_proxies();
    }
    FSA_NO_UNROLL for (int n = 0; n < w.steps; ++n) {
        const RowPlace place = RowPlace::find(p.band, w, n);
        barrier_wait(m.sum_rings.full + 8 * group, n & 1);
        add_box(&p.sums_map, m.sum_tile(group), group * SUM_COLUMNS, w.rows.first_head + place.head, w.tokens.token + place.token);
        bulk_commit();
        bulk_wait_read();
        barrier_arrive(m.sum_rings.empty + 8 * group);
    }
}

// Stores a warpgroup's fragments of 64 x SUM_ROWS values transposed, as rows of 128 bytes.
FSA_DEVICE void store_transposed(u32 tile, const RowFragments& a) {
    const int lane = lane_number(), warp = thread_number() % WARPGROUP / 32;
    const u32 at = tile + SwizzledTile<SUM_ROWS>::offset((lane & 7) + lane / 16 * 8, 2 * warp + lane / 8 % 2);
    FSA_UNROLL for (int k = 0; k < SUM_ROWS / 16; ++k) store_transposed_matrices(at + k * 16 * 128, a[k]);
    fence_async_proxy();
    __syncwarp();
}

struct SumConsumer {
    const BandBackwardParams& p;
    const SumMemory& m;
    int held_group;
    f32 scale_log2;         // KeyScale::of_scores
    Columns grad_key, grad_value;

    // Number of the warpgroup. With a window there is no register for it and what follows from it.
    FSA_DEVICE int group() const { return WINDOW_TOO ? __shfl_sync(ALL_LANES, thread_number() / WARPGROUP, 0) : held_group; }
    // The thread's first key of the tile.
    static FSA_DEVICE int key_low() { return thread_number() / 32 * 16 + lane_number() / 4; }

    // Of the blocks' numbers those of the block of this thread's keys; those of a warp lie in one.
    template <int BLOCKS>
    static FSA_DEVICE const RowNumbers& own(const RowNumbers* numbers) { return numbers[BLOCKS == 1 ? 0 : thread_number() / 32 * 16 / LISTED_KEYS]; }

    // Passes dS of this warpgroup's keys on to both, as the n-th item: zeros, then those of the tiles. A branch around the product of the one before the
    // first would make ptxas wait for every product.
    FSA_DEVICE void pass_on(const RowFragments& a, int n) const {
        m.ds_ring.wait_free(n);
        store_transposed(m.ds_tile(n) + group() * DS_HALF_BYTES, a);
        if (lane_number() == 0) barrier_arrive(m.ds_ring.full + 8 * Ring<DS_STAGES>::place(n));
    }
    // Starts this warpgroup's columns of K^T dS^T, dS being the n-th item. Keys are the factor that a warpgroup reads by itself, so that it serves all rows.
    FSA_DEVICE void start_queries(RowScores& acc, int n) const {
        const u32 ds = m.ds_tile(n), columns = m.key + group() * KeyTile::HALF_BYTES;
        m.ds_ring.wait(n);
        wgmma_fence();
        FSA_UNROLL for (int k = 0; k < CTA_KEYS / 16; ++k)
            Wgmma<SUM_ROWS>::template shared_shared<1, 0>(acc, over_rows<CTA_KEYS>(columns, k, 0), over_columns<SUM_ROWS>(ds, k), k != 0);
        wgmma_commit();
    }
    // That product is done: its sums, those of the tile before the n-th, leave.
    FSA_DEVICE void finish_queries(RowScores& acc, int n) const {
        wgmma_pin(acc);
        m.ds_ring.release(n);
        if (n == 0) return;
        const int own = group();
        barrier_wait(m.sum_rings.empty + 8 * own, (n + 1) & 1);
        RowFragments a;
        FSA_UNROLL for (int k = 0; k < SUM_ROWS / 16; ++k)
            FSA_UNROLL for (int i = 0; i < 4; ++i) a[k][i] = pack_sums(acc[8 * k + 2 * i], acc[8 * k + 2 * i + 1]);
        store_transposed(m.sum_tile(own), a);
        if (lane_number() == 0) barrier_arrive(m.sum_rings.full + 8 * own);
    }

    // Zero for keys that a row does not see.
    FSA_DEVICE void mask(RowScores& s, const SumRecords& records) const {
        FSA_UNROLL for (int word = 0; word < ROW_WORDS; ++word) {
            if (!(records.special[word] & MASKED)) continue;
            const u32 low = records.seen_by(0, key_low(), word), high = records.seen_by(0, key_low() + 8, word);
            FSA_UNROLL for (int n = 0; n < min_i(16, SUM_ROWS / 2 - 16 * word); ++n)
                if (!sees(low, high, n)) s[16 * word + n] = 0.0f;
        }
    }
    // Element n of 32 columns: two rows each of the thread's two keys, 8 columns apart.
    static FSA_DEVICE bool sees(u32 low, u32 high, int n) { return (n & 2 ? high : low) >> (n / 4 * 8 + (n & 1)) & 1; }

    // x = f(x, number of its row); `numbers` are those of BLOCKS blocks and what is behind them. With a window also the mask.
    template <int BLOCKS, typename F>
    FSA_DEVICE void apply(RowScores& s, const SumRecords& records, const RowNumbers* numbers, i32 special, F f) const {
        const RowNumbers& of_block = own<BLOCKS>(numbers);
        if (!WINDOW_TOO || !(special & MASKED)) return of_block.apply(s, f);
        const RowNumbers *of_one = numbers + BLOCKS, *of_window = of_one + 1, *of_both = of_one + 2;
        FSA_UNROLL for (int word = 0; word < ROW_WORDS; ++word) {
            if (!(records.special[word] & MASKED)) {
                FSA_UNROLL for (int i = 4 * word; i < min_i(4 * word + 4, SUM_ROWS / 8); ++i) {
                    const RowNumbers::Pair pair = of_block.pair(i);
                    FSA_UNROLL for (int e = 0; e < 4; ++e) s[4 * i + e] = f(s[4 * i + e], pair.of(e), 4 * i + e);
                }
                continue;
            }
            const u32 low = records.seen_by(0, key_low(), word), high = records.seen_by(0, key_low() + 8, word);
            const u32 low_near = records.seen_by(WINDOW_TOO, key_low(), word), high_near = records.seen_by(WINDOW_TOO, key_low() + 8, word);
            FSA_UNROLL for (int i = 4 * word; i < min_i(4 * word + 4, SUM_ROWS / 8); ++i) {
                const RowNumbers::Pair one = of_one->pair(i), window = of_window->pair(i), both = of_both->pair(i);
                FSA_UNROLL for (int e = 0; e < 4; ++e) {
                    const int n = 4 * i + e;
                    const bool seen = sees(low, high, n % 16), near = sees(low_near, high_near, n % 16);
                    const f32 number = near ? seen ? both.of(e) : window.of(e) : one.of(e);
                    s[n] = seen || near ? f(s[n], number, n) : 0.0f;
                }
            }
        }
    }

    // Keeps ptxas from packing them later, when more is in registers.
    static FSA_DEVICE void pin(RowFragments& a) {
        FSA_UNROLL for (int k = 0; k < SUM_ROWS / 16; ++k)
            FSA_UNROLL for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[k][i])::"memory");
    }
    // Value e of a thread's scores, of fragments.
    static FSA_DEVICE f32 packed(const RowFragments& a, int e) {
        const u32 word = a[e / 8][e % 8 / 2];
        return e & 1 ? unpack_hi(word) : unpack_lo(word);
    }

    FSA_DEVICE void walk(int steps) {
        pass_on({}, 0);
        FSA_NO_UNROLL for (int n = 0; n < steps; ++n) {
            const u32 own = group() * PIECE_BYTES, keys = m.key + own, values = m.value + own;
            const u32 query = m.rows.query(n), grad = m.rows.grad(n);
            RowScores s, dp;
            RowFragments a, b;
            m.rows.loaded.wait(n);
            wgmma_fence();
            start_piece<SUM_ROWS>(s, keys, query);
            wgmma_commit();
            if (!IN_TURN) {
                start_piece<SUM_ROWS>(dp, values, grad);
                wgmma_commit();
            }
            m.rows.checked.wait(n);
            const SumRecords& records = m.rows.record(n);
            const i32 special = records.all_special();
            wgmma_wait<IN_TURN ? 0 : 1>();
            wgmma_pin(s);
            apply<KEY_BLOCKS>(s, records, records.lse, special, [&](f32 x, f32 lse, int) { return exp2_fast(fmaf(x, scale_log2, -lse)); });
            if (!WINDOW_TOO && special & MASKED) mask(s, records);
            if (special & NEGATIVE) apply<SumRecords::DELTA_BLOCKS>(s, records, records.delta, special, [](f32 x, f32 delta, int) { return with_sign_of(x, delta); });
            if (IN_TURN) {
                FSA_UNROLL for (int k = 0; k < SUM_ROWS / 16; ++k) to_fragment<SUM_ROWS>(a[k], s, k);
                pin(a);
                wgmma_fence();
                start_piece<SUM_ROWS>(dp, values, grad);
                wgmma_commit();
                start_piece_sum<SUM_ROWS>(grad_value, a, grad);     // under the gradients of the scores
                wgmma_commit();
                wgmma_wait<1>();
            } else {
                wgmma_wait<0>();
            }
            wgmma_pin(dp);
            apply<SumRecords::DELTA_BLOCKS>(dp, records, records.delta, special, [&](f32 x, f32 delta, int e) { return (IN_TURN ? packed(a, e) : s[e]) * (x - delta); });
            if (!WINDOW_TOO && special & MASKED) mask(dp, records);
            FSA_UNROLL for (int k = 0; k < SUM_ROWS / 16; ++k) {
                if (!IN_TURN) to_fragment<SUM_ROWS>(a[k], s, k);
                to_fragment<SUM_ROWS>(b[k], dp, k);
            }
            if (IN_TURN) {
                pin(b);
                wgmma_wait<0>();        // the sums below take the registers of `a`
                wgmma_pin(grad_value);
            }
            RowScores acc;
            start_queries(acc, n);
            wgmma_fence();
            if (!IN_TURN) start_piece_sum<SUM_ROWS>(grad_value, a, grad);
            start_piece_sum<SUM_ROWS>(grad_key, b, query);
            wgmma_commit();
            pass_on(b, n + 1);
            wgmma_wait<1>();
            finish_queries(acc, n);
            wgmma_wait<0>();
            wgmma_pin(grad_key);
            wgmma_pin(grad_value);
            m.rows.loaded.release(n);
        }
        RowScores acc;
        start_queries(acc, steps);
        wgmma_wait<0>();
        finish_queries(acc, steps);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) band_sums(const __grid_constant__ BandBackwardParams p) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ __align__(16) SumRecords records[ROW_STAGES];
    __shared__ __align__(8) u64 barriers[2 + SumRowRing::BARRIERS + 2 * DS_STAGES + 2 * CONSUMERS];
    __shared__ KeyWork w;       // no role has registers for it
    __shared__ KeyScale scale;
    SumMemory m;
    m.key = shared_address(shared);
    m.value = m.key + KeyTile::BYTES;
    m.ds = m.value + KeyTile::BYTES;
    m.sums = m.ds + DS_STAGES * DS_BYTES;
    m.loaded_keys = shared_address(barriers);
    m.loaded_values = m.loaded_keys + 8;
    m.scale = &scale;
    m.rows = SumRowRing::at(m.sums + CONSUMERS * SUM_BYTES, records, m.loaded_values + 8);
    m.ds_ring = Ring<DS_STAGES>::at(m.loaded_values + 8 + 8 * SumRowRing::BARRIERS);
    m.sum_rings = Ring<CONSUMERS>::at(m.ds_ring.full + Ring<DS_STAGES>::BYTES);
    // What waits for memory, a warp each: a short call is mostly starts and ends of ctas.
    if (threadIdx.x == 0) {
        barrier_init(m.loaded_keys, 1);
        barrier_init(m.loaded_values, 1);
        barriers_ready();
        w = KeyWork::find(p.band, p.num_kv_heads, p.resident);
        if (w.rows.keys > 0) {
            load_keys(p.key_map, m.key, m.loaded_keys, w);
            load_keys(p.value_map, m.value, m.loaded_values, w);
        }
    } else if (threadIdx.x == 32) {
        wait_for_previous(), let_next_start();      // for all threads, which the barrier below holds until then
        const SumScale of_sums = sum_scale(p.sums);
        scale = {of_sums.scale, p.scale_log2 * of_sums.inverse};
    } else if (threadIdx.x == 64) {
        m.rows.open();
        m.ds_ring.open(CONSUMER_THREADS / 32, CONSUMER_THREADS / 32);
        m.sum_rings.open(1, WARPGROUP / 32);
        barriers_ready();
    } else if (threadIdx.x == 96) {
        prefetch_map(&p.key_map), prefetch_map(&p.value_map), prefetch_map(&p.query_map), prefetch_map(&p.grad_out_map), prefetch_map(&p.sums_map);
    }
    m.rows.clear_uncovered(p.band);
    __syncthreads();
    if (w.rows.keys <= 0) {
        if (threadIdx.x >= THREADS - 32 && p.clearing != nullptr) clear_sums(p, m.sums);
        return;
    }
    const int group = __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0);
    if (group == CONSUMERS) {
        registers_shrink<24>();
        const int thread = threadIdx.x - CONSUMER_THREADS;
        if (thread < 32 * SumRowRing::WARPS) {
            if (BLOCK_MASK) {       // nobody else asks
                if (thread == 0) w.has_nonfinite_values = has_nonfinite_values(p.band, w.kv_head, w.tokens.key_row + w.rows.first_key, w.rows.keys);
                named_sync(ALL_CHECKERS, 32 * SumRowRing::WARPS);
            }
            m.rows.bring(p, w);
        } else if (thread >= WARPGROUP - 32) {
            if (p.clearing != nullptr) clear_sums(p, m.sums);
            if (thread % 16 == 0) send_sums(p, m, w, thread / 16 % 2);
        }
        return;
    }
    registers_grow<240>();
    SumConsumer c = {p, m, group, __shfl_sync(ALL_LANES, scale.of_scores, 0)};     // a plain load makes ptxas spill
    clear(c.grad_key);
    clear(c.grad_value);
    scale_keys(m);
    barrier_wait(m.loaded_values, 0);
    if (w.steps > 0) c.walk(w.steps);
    store_key_sums(p, c.grad_key, p.grad_key, p.scale, 0, w, c.key_low());
    store_key_sums(p, c.grad_value, p.grad_value, 1.0f, 1, w, c.key_low());
}
