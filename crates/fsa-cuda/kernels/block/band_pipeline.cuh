// What the Hopper kernels of the stages with an interval of keys share: tiles of 64 rows for each of the consuming warpgroups (two, if the kernel says nothing
// else), steps of keys that a thread brings in through a ring of shared memory, warps that check them, and the order in which a cta takes its tiles.
#pragma once
#include "block/band_rows.cuh"
#include "block/listed_blocks.cuh"
#include "block/rows.cuh"
#include "ptx/barrier.cuh"
#include "ptx/thread.cuh"
#include "ptx/wgmma.cuh"
#include "tile/tile_boxes.cuh"

#ifndef FSA_CONSUMERS       // a kernel may have another number of consuming warpgroups
#define FSA_CONSUMERS 2
#endif
#ifndef FSA_BLOCK_SCORES    // an attention leaves the scores of blocks, and chooses by them: 1: one more warpgroup does; 2: the warps that attend do, for their rows
#define FSA_BLOCK_SCORES 0
#endif
constexpr bool BLOCK_SCORES = FSA_BLOCK_SCORES != 0, HAS_CHOOSERS = FSA_BLOCK_SCORES == 1;
constexpr int CONSUMERS = FSA_CONSUMERS, CTA_ROWS = CONSUMERS * TILE_ROWS, CONSUMER_THREADS = CONSUMERS * WARPGROUP;
constexpr int WARPGROUPS = CONSUMERS + 1 + HAS_CHOOSERS, THREADS = WARPGROUPS * WARPGROUP;
#ifndef FSA_STEP_KEYS       // a window of which 128 is no good part may have another
#define FSA_STEP_KEYS (HEAD_DIM <= 128 ? 128 : 64)
#endif
constexpr int STEP_KEYS = FSA_STEP_KEYS;
constexpr int CHECKERS = 3, CHECKER_THREADS = CHECKERS * 32;    // warps of the producing warpgroup besides the one that loads
// Together at most what the warpgroups start with, 168 per thread of three, 128 of four: registers beyond that belong to nobody, and who asks for them waits
// for ever.
constexpr int PRODUCER_REGISTERS = HAS_CHOOSERS || CONSUMERS != 2 ? 32 : 40, CHOOSER_REGISTERS = HAS_CHOOSERS ? 96 : 0;
constexpr int CONSUMER_REGISTERS = HAS_CHOOSERS ? 192 : CONSUMERS == 2 ? 232 : 160;
static_assert(PRODUCER_REGISTERS + CHOOSER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= WARPGROUPS * (65536 / THREADS / 8 * 8), "the registers of a cta");
typedef SwizzledTile<CTA_ROWS> RowTile;
typedef SwizzledTile<STEP_KEYS> KeyTile;
typedef f32 Columns[HEAD_DIM / 2];          // accumulators of 64 rows x HEAD_DIM
typedef f32 Scores[STEP_KEYS / 2];
typedef u32 Fragments[STEP_KEYS / 16][4];   // scores of 64 rows as A

// Names of barriers; 0 is __syncthreads.
constexpr int ALL_CONSUMERS = 1, ALL_CHECKERS = 2, TURN = 3, CHOSEN = TURN + 2;

// The tile that a cta takes after `number`; its first is that of its own number. Rounds of as many tiles as there are ctas go forwards and backwards in
// turns: those with the most keys come first, so always forwards the first cta would get more keys than the last in every round. All warps of a cta have to
// go through its tiles in this order, or they wait for each other for ever.
FSA_DEVICE int next_tile(int number) { return number + 2 * (int)(gridDim.x - number % gridDim.x) - 1; }

// One tile of rows, its heads being those of one kv head, and the steps of keys that it meets, last first, or first to last.
struct BandWork {
    BandTile tile;
    BandInterval keys;
    i32 kv_head;
    i32 steps;
    i32 walk;                   // number of the interval, where a tile has several (block/band_walks.cuh)
    i32 last_row, last_keys;    // of the last of these: the sequence's key 0, and its keys
    i32 number;                 // of the tile, in the order of launch
    const i32* listed;          // with a mask of blocks: the steps, of which there are gaps between

    // Number `number` of all heads' tiles, those with the most keys first; steps = 0 where there is no tile or it sees no key.
    FSA_DEVICE static BandWork find(const Band& band, int number, int num_kv_heads) {
        BandWork w;
        w.number = number;
        w.kv_head = number % num_kv_heads;
        w.tile = find_band_tile(band, number / num_kv_heads, w.kv_head);
        w.walk = 0;
        w.meet(band);
        if constexpr (BLOCK_MASK) {
            const i64 list = listed_steps(band, number / num_kv_heads, w.kv_head);
            w.listed = band.mask.steps + list * band.mask.max_steps;
            if (w.steps > 0) w.steps = band.mask.step_counts[list];
        }
        return w;
    }
    // Takes the keys of an interval.
    FSA_DEVICE void meet(const Band& band) {
        keys = band_interval(band, tile);
        steps = tile.tokens == 0 ? 0 : ceil_div(max_i(0, keys.end - keys.first), STEP_KEYS);
    }
    // First key of step n, counted from the last. Scores of blocks are pooled from the first on; they belong to rows that see all keys up to one.
    FSA_DEVICE int key(int n) const { return BLOCK_MASK ? listed[n] & ~1 : BLOCK_SCORES ? n * STEP_KEYS : keys.first + (steps - 1 - n) * STEP_KEYS; }
    // Whether some row does not see it as a whole: because of the position, because of its blocks.
    FSA_DEVICE bool has_end(int n) const { return BLOCK_SCORES ? key(n) + STEP_KEYS > keys.end_common : keys.needs_mask(key(n), STEP_KEYS); }
    FSA_DEVICE bool has_gaps(int n) const { return BLOCK_MASK && (listed[n] & 1); }
    FSA_DEVICE bool needs_mask(int n) const { return has_end(n) || has_gaps(n); }
};

// The tiles of a cta, each with the keys of one interval. A kernel whose tiles go on to others has its own of these.
struct OneWalk {
    const Band& band;
    int num_kv_heads;

    FSA_DEVICE BandWork find(int number) const { return BandWork::find(band, number, num_kv_heads); }
    FSA_DEVICE bool go_on(BandWork&) const { return false; }
};

// Barriers of a ring of STAGES places in shared memory: `full` counts bytes or arrivals, `empty` one arrival per warp that reads. Who waits for a ring
// waits for all its items in turn and releases them all: a barrier tells apart two phases, not three.
template <int STAGES>
struct Ring {
    u32 full, empty;

    static constexpr int BYTES = 16 * STAGES;
    FSA_DEVICE static Ring at(u32 address) { return {address, address + 8 * STAGES}; }
    FSA_DEVICE void open(int readers = CONSUMER_THREADS / 32, int writers = 1) const {
        FSA_UNROLL for (int i = 0; i < STAGES; ++i) {
            barrier_init(full + 8 * i, writers);
            if (readers > 0) barrier_init(empty + 8 * i, readers);
        }
    }
    // Place of the n-th item, n counting from 0 over the life of the cta.
    FSA_DEVICE static int place(u32 n) { return n % STAGES; }
    // Producer: waits until the n-th place is free, and expects `bytes` there; the barrier to load with.
    FSA_DEVICE void wait_free(u32 n) const { barrier_wait(empty + 8 * place(n), n / STAGES & 1 ^ 1); }
    FSA_DEVICE u32 expect(u32 n, int bytes) const {
        barrier_expect(full + 8 * place(n), bytes);
        return full + 8 * place(n);
    }
    // As expect(), but does not arrive: whoever calls it does, before the phase can be over.
    FSA_DEVICE void expect_more(u32 n, int bytes) const { barrier_expect_more(full + 8 * place(n), bytes); }
    FSA_DEVICE u32 start(u32 n, int bytes) const {
        wait_free(n);
        return expect(n, bytes);
    }
    FSA_DEVICE void wait(u32 n) const { barrier_wait(full + 8 * place(n), n / STAGES & 1); }
    // Reader: this warp will not read the n-th item again.
    FSA_DEVICE void release(u32 n) const {
        __syncwarp();
        if ((threadIdx.x & 31) == 0) barrier_arrive(empty + 8 * place(n));
    }
};

// Bytes that the boxes of a tile of rows bring: those of the tokens and heads that a tile can have.
FSA_DEVICE int row_tile_bytes(const Band& band) { return RowTile::HALVES * 128 * band.tile_tokens * band.tile_heads; }

// Steps that some row does not see as a whole are checked before a product takes them as its second factor: an exact zero times what a row does not see
// must stay zero, so NaN and infinity are cleared. Only steps that are checked are counted; the ring of the tiles, which has as many places, keeps checkers and
// consumers from being two of them apart.
constexpr int CHECKED_READERS = CONSUMER_THREADS / 32 + CHECKERS;   // of that ring
template <int STAGES, bool FLAGGED = false>
struct Checked {
    Ring<STAGES> ring;          // `full` alone: one arrival per checking warp
    volatile i32* dirty;        // [STAGES] whether something was cleared
    const u32* nonfinite;       // FLAGGED: bit i % 32 is set if something of kv head i is not finite; steps of other heads are not checked

    FSA_DEVICE bool flagged(const BandWork& w) const { return !FLAGGED || *nonfinite >> (w.kv_head & 31) & 1; }
    FSA_DEVICE bool checks(const BandWork& w, int n) const { return flagged(w) && w.needs_mask(n); }

    // Checker: goes through all steps of a cta in order. `tile(step)` is the place of a step.
    template <typename Walks, typename F>
    FSA_DEVICE void check(const Walks& walks, int total, const Ring<STAGES>& loaded, F tile) const {
        u32 step = 0, count = 0;
        FSA_NO_UNROLL for (int number = blockIdx.x; number < total; number = next_tile(number)) {
            BandWork w = walks.find(number);
            FSA_NO_UNROLL do {
                FSA_NO_UNROLL for (int n = 0; n < w.steps; ++n, ++step) {
                    loaded.wait(step);
                    if (checks(w, n)) {
                        const bool cleared = clean_checked(tile(step));
                        if (threadIdx.x % 32 == 0) {
                            dirty[ring.place(count)] = cleared;
                            barrier_arrive(ring.full + 8 * ring.place(count));
                        }
                        ++count;
                    }
                    loaded.release(step);
                }
            } while (walks.go_on(w));
        }
    }
    // Consumer: waits for the count-th of the steps that are checked.
    FSA_DEVICE bool wait(u32 count) const {
        ring.wait(count);
        return dirty[ring.place(count)] != 0;
    }

  private:
    // Thread i looks at the columns of one 16-byte piece, every CHECKER_THREADS / 8-th row of each half.
    static FSA_DEVICE bool clean_checked(u32 tile) {
        constexpr int ROWS = CHECKER_THREADS / 8, STEPS = KeyTile::HALVES * STEP_KEYS;
        const int thread = threadIdx.x - CONSUMER_THREADS - 32;
        const u32 first = tile + thread * 16, end = tile + STEPS * 128;     // the swizzle only changes the order of pieces in a row
        u32 sum = 0;
        FSA_NO_UNROLL for (u32 at = first; at < end; at += ROWS * 128) {
            const Vec4 v = load_shared(at);
            sum = taint(taint(taint(taint(sum, v.x), v.y), v.z), v.w);
        }
        __syncwarp();
        const bool cleared = named_sync_or(ALL_CHECKERS, CHECKER_THREADS, has_nonfinite(sum));
        if (!cleared) return false;
        FSA_NO_UNROLL for (u32 at = first; at < end; at += ROWS * 128) {
            const Vec4 v = load_shared(at);
            store_shared(at, Vec4{finite_or_zero(v.x), finite_or_zero(v.y), finite_or_zero(v.z), finite_or_zero(v.w)});
        }
        fence_async_proxy();
        __syncwarp();
        return true;
    }
};

// Keys of a step, counted from its first, that a thread's two rows see.
struct RowLimits {
    i32 first_low, end_low, first_high, end_high;

    FSA_DEVICE static RowLimits of(const Band& band, const BandTile& t, int low) {
        const int high = low + 8, p = t.position_of(low), q = t.position_of(high);
        RowLimits r = {0, 0, 0, 0};
        if (t.exists(low)) { r.first_low = first_key(band, p); r.end_low = end_key(band, p, t.keys); }
        if (t.exists(high)) { r.first_high = first_key(band, q); r.end_high = end_key(band, q, t.keys); }
        return r;
    }
    FSA_DEVICE RowLimits from(int key) const { return {first_low - key, end_low - key, first_high - key, end_high - key}; }
    FSA_DEVICE bool sees_low(int key) const { return first_low <= key && key < end_low; }
    FSA_DEVICE bool sees_high(int key) const { return first_high <= key && key < end_high; }
};
// Row of the tile that is the thread's first; its other row is 8 more.
FSA_DEVICE int first_row_of_thread() { return thread_number() / 32 * 16 + lane_number() / 4; }

// Value `mask` for the scores of keys that a row does not see.
template <int COUNT>
FSA_DEVICE void mask_scores(f32 (&s)[COUNT], const RowLimits& limits, f32 mask) {
    FSA_UNROLL for (int i = 0; i < COUNT / 4; ++i)
        FSA_UNROLL for (int e = 0; e < 2; ++e) {
            const int key = 8 * i + 2 * (threadIdx.x & 3) + e;
            if (!limits.sees_low(key)) s[4 * i + e] = mask;
            if (!limits.sees_high(key)) s[4 * i + 2 + e] = mask;
        }
}

// One of the thread's two rows (HIGH: the second) of 64 x HEAD_DIM accumulators, scaled, in natural order. All lanes of the quad take part.
template <bool HIGH>
FSA_DEVICE void store_row(char* row, const Columns& acc, f32 scale, bool present) {
    FSA_UNROLL for (int group = 0; group < HEAD_DIM / 32; ++group) {
        u32 w[4];
        FSA_UNROLL for (int j = 0; j < 4; ++j) {
            const int e = (group * 4 + j) * 4 + (HIGH ? 2 : 0);
            w[j] = pack2(acc[e] * scale, acc[e + 1] * scale);
        }
        const Vec4 v = transpose_quad(Vec4{w[0], w[1], w[2], w[3]});
        if (present) store_global(row + group * 64 + (threadIdx.x & 3) * 16, v);
    }
}
FSA_DEVICE void clear(Columns& acc) { FSA_UNROLL for (int i = 0; i < HEAD_DIM / 2; ++i) acc[i] = 0.0f; }

// Starts 64 rows x STEP_KEYS: rows of a row tile times the keys of a step.
FSA_DEVICE void start_scores(Scores& s, u32 rows, u32 keys) {
    FSA_UNROLL for (int k = 0; k < HEAD_DIM / 16; ++k)
        Wgmma<STEP_KEYS>::shared_shared<0, 0>(s, over_columns<CTA_ROWS>(rows, k), over_columns<STEP_KEYS>(keys, k), k != 0);
}
// Starts the addition of scores, as fragments, times the rows of a step.
FSA_DEVICE void start_sum(Columns& acc, const Fragments& a, u32 keys) {
    FSA_UNROLL for (int k = 0; k < STEP_KEYS / 16; ++k) Wgmma<HEAD_DIM>::template registers_shared<1>(acc, a[k], over_rows<STEP_KEYS>(keys, k, 0), 1);
}
