// WHAT   Block scores and their top-k, for every device from sm_80 on: probabilities of the compressed keys from queries, keys and the
//        log-sum-exp of compressed attention, summed over the heads that vote, pooled to blocks, and the best blocks of each token listed.
//        No score leaves the cta.
// GRID   (tiles of tokens, kv heads), tiles with the most keys first. A cta takes all heads of its tokens, tile_heads of them at a time.
// ROLES  Four warps of 16 of the tile's 64 rows for the product; all threads pool: one (token, block) each, or a part of its windows; a
//        warp keeps the best blocks of every fourth token.
// SMEM   key tile [64 keys]; probabilities [64 keys, 64 rows] f32; scores [tokens, blocks] f32, a ring over the blocks; ranks and ids of the best
//        blocks [tokens, topk]. 44 KB at head_dim 128, group size 4 and topk 16.
// SYNC   cp.async; two barriers a step: keys have come and the probabilities may be overwritten; probabilities are there and the keys may be.
// Every sum has an order that depends on shapes alone. A head whose log-sum-exp is not finite does not vote: -inf where it sees no key, NaN
// where it saw one.
#include "block/band_rows.cuh"
#include "block/topk.cuh"
#include "tile/fragments.cuh"
#include "tile/warp_rows.cuh"

constexpr int STEP_KEYS = 64;
constexpr int KEY_WORDS = TILE_ROWS + 4;        // between the probabilities of neighbouring keys: no bank conflict where accumulators are stored
constexpr int SCORE_WORDS = 2048;               // about this many scores are in flight
constexpr int SELECT_CTAS = HEAD_DIM <= 128 ? 3 : 2;
typedef SwizzledTile<STEP_KEYS> KeyTile;
typedef f32 Scores[STEP_KEYS / 2];
typedef u32 Queries[HEAD_DIM / 16][4];

// How compressed keys make blocks: key i counts in block j with weight w(i - j * steps), a trapezoid over [-reach, steps).
struct Pooling {
    i32 steps, shift;       // compressed keys per block, a power of two, and its logarithm
    i32 reach;              // keys before a block that overlap it
    f32 top;                // largest weight

    FSA_DEVICE explicit Pooling(const Band& band)
        : steps(BLOCK_SIZE / band.kernel_stride), shift(__popc((u32)steps - 1)), reach(band.kernel_size / band.kernel_stride - 1),
          top((f32)min_i(steps, reach + 1)) {}
    FSA_DEVICE int first_block(int key) const { return key >> shift; }                  // that a key counts in
    FSA_DEVICE int end_block(int key) const { return ((key + reach) >> shift) + 1; }
    // Pairs (m, n), 0 <= m < steps, 0 <= n <= reach, with m - n = distance.
    FSA_DEVICE f32 weight(f32 distance) const { return fminf(fminf(distance + (f32)(reach + 1), (f32)steps - distance), top); }
};

// Scores of the blocks under way: block j of a token is at place j % width. Kept zero where nothing was added.
struct ScoreRing {
    f32* scores;
    i32 width;              // power of two; token rows are one word longer, so that tokens and blocks both fall into different banks

    FSA_DEVICE ScoreRing(f32* scores, const Pooling& pooling, int tokens) : scores(scores), width(1) {
        const int needed = ((STEP_KEYS - 1 + pooling.reach) >> pooling.shift) + 2;      // blocks of one step
        while (width < needed || 2 * width * tokens <= SCORE_WORDS) width *= 2;
    }
    FSA_DEVICE f32& at(int token, int block) const { return scores[token * (width + 1) + (block & (width - 1))]; }
    // Keys whose blocks fit, wherever the first one lies.
    FSA_DEVICE int keys(const Pooling& pooling) const {
        const int fit = ((width - 2) << pooling.shift) - pooling.reach + 1;
        return fit < 2 * STEP_KEYS ? STEP_KEYS : fit / STEP_KEYS * STEP_KEYS;
    }
};

// What a cta works on.
struct SelectCta {
    BandTile tile;          // its heads: those of the current head tile that vote
    Pooling pooling;
    f32* probabilities;
    ScoreRing ring;
    i32 *ranks, *ids;       // [tokens, topk]
    i32 begin, end;         // compressed keys that count in a block which competes for a place
    i32 end_common;         // keys that all tokens of the tile see
    i32 end_scored;         // of the last token, which has the most blocks

    FSA_DEVICE SelectCta(const SelectParams& p, const BandTile& tile, char* shared)
        : tile(tile), pooling(p.band), probabilities((f32*)(shared + KeyTile::BYTES)),
          ring(probabilities + STEP_KEYS * KEY_WORDS, pooling, p.band.tile_tokens) {
        ranks = (i32*)(ring.scores + p.band.tile_tokens * (ring.width + 1));
        ids = ranks + p.band.tile_tokens * p.topk;
        const RowBlocks last = row_blocks(tile.last_position(), p.topk, p.init_blocks, p.local_blocks);
        end_scored = last.end_scored;
        begin = max_i(0, p.init_blocks * pooling.steps - pooling.reach);
        end = max_i(begin, min_i(end_key(p.band, tile.last_position(), tile.keys), end_scored * pooling.steps));
        end_common = end_key(p.band, tile.position, tile.keys);
    }
};

// One of the thread's two rows: what it needs to turn scores into probabilities. One that does not vote has probability 0 everywhere.
struct Voter {
    f32 reference;          // log2-sum-exp
    i32 end;                // keys that it sees
    bool votes;
};
FSA_DEVICE Voter find_voter(const SelectParams& p, const BandTile& tile, int row) {
    Voter v = {0.0f, 0, false};
    if (tile.exists(row)) {
        v.reference = p.lse[tile.plane_index(row, p.band.total_q)] * LOG2_E;
        v.votes = fabsf(v.reference) < __int_as_float(0x7f800000);
    }
    if (v.votes) v.end = end_key(p.band, tile.position_of(row), tile.keys); else v.reference = 0.0f;
    return v;
}
// The A fragments of the thread's rows, straight from memory, because a cta does it once; zero where there is no vote.
FSA_DEVICE void load_queries(Queries& queries, const SelectParams& p, const BandTile& tile, int row, const Voter& low, const Voter& high) {
    const int offset = (threadIdx.x & 3) * 4;
    const char* from_low = low.votes ? tile.row_of(p.query, row) + offset : nullptr;
    const char* from_high = high.votes ? tile.row_of(p.query, row + 8) + offset : nullptr;
    FSA_UNROLL for (int k = 0; k < HEAD_DIM / 16; ++k)
        FSA_UNROLL for (int half = 0; half < 2; ++half) {
            queries[k][2 * half] = low.votes ? __ldg((const u32*)(from_low + k * 32 + half * 16)) : 0;
            queries[k][2 * half + 1] = high.votes ? __ldg((const u32*)(from_high + k * 32 + half * 16)) : 0;
        }
}

// Probabilities of a step's keys, from `key` on, in shared memory. MASKED: some row of the tile does not see all of them.
template <bool MASKED>
FSA_DEVICE void store_probabilities(const Scores& s, f32* probabilities, int row, int key, f32 scale_log2, const Voter& low, const Voter& high) {
    const int column = 2 * (threadIdx.x & 3);
    FSA_UNROLL for (int i = 0; i < STEP_KEYS / 8; ++i)
        FSA_UNROLL for (int e = 0; e < 2; ++e) {
            f32 x = exp2_fast(fmaf(s[4 * i + e], scale_log2, -low.reference)), y = exp2_fast(fmaf(s[4 * i + 2 + e], scale_log2, -high.reference));
            if (MASKED) {
                if (key + 8 * i + column + e >= low.end) x = 0.0f;
                if (key + 8 * i + column + e >= high.end) y = 0.0f;
            }
            f32* target = probabilities + (8 * i + column + e) * KEY_WORDS + row;
            target[0] = x;
            target[8] = y;
        }
}

// Sum over the heads of a token, of one key.
FSA_DEVICE f32 sum_heads(const f32* probability, int heads) {
    f32 sum = 0.0f;
    if ((heads & 3) == 0) {
        FSA_NO_UNROLL for (int h = 0; h < heads; h += 4) {
            const Vec4 v = *(const Vec4*)(probability + h);
            sum += (__uint_as_float(v.x) + __uint_as_float(v.y)) + (__uint_as_float(v.z) + __uint_as_float(v.w));
        }
    } else {
        FSA_NO_UNROLL for (int h = 0; h < heads; ++h) sum += probability[h];
    }
    return sum;
}

// Adds the probabilities of keys [key, end) to the blocks they count in.
FSA_DEVICE void pool_step(const SelectCta& c, int key, int end) {
    const Pooling& pooling = c.pooling;
    const int tokens = c.tile.tokens, first = pooling.first_block(key), blocks = min_i(pooling.end_block(end - 1), c.end_scored) - first;
    const int items = tokens * blocks;
    int parts = 1;          // lanes that share the keys of a block, where there are few blocks
    while (2 * parts * items <= WARPGROUP && 2 * parts <= pooling.steps + pooling.reach && parts < 32) parts *= 2;
    const int part = threadIdx.x & (parts - 1), stride = WARPGROUP / parts, block_step = stride / tokens, token_step = stride - block_step * tokens;
    int item = threadIdx.x / parts, block = item / tokens, token = item - block * tokens;
    block += first;
    FSA_NO_UNROLL for (; __any_sync(0xffffffffu, item < items); item += stride) {
        const int origin = block << pooling.shift, last = item < items ? min_i(end, origin + pooling.steps) : 0;
        int i = max_i(key, origin - pooling.reach) + part;
        const f32* probability = c.probabilities + (i - key) * KEY_WORDS + token * c.tile.tile_heads;
        f32 distance = (f32)(i - origin), sum = 0.0f;
        FSA_NO_UNROLL for (; i < last; i += parts) {
            sum = fmaf(pooling.weight(distance), sum_heads(probability, c.tile.tile_heads), sum);
            probability += parts * KEY_WORDS;
            distance += (f32)parts;
        }
        FSA_NO_UNROLL for (int delta = 1; delta < parts; delta *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, delta);
        if (item < items && part == 0) c.ring.at(token, block) += sum;
        block += block_step;
        token += token_step;
        if (token >= tokens) { token -= tokens; ++block; }
    }
}

// Offers blocks [first, end) to all tokens; their scores are complete, and those from `touched` on are 0. Frees their places.
FSA_DEVICE void offer_blocks(const SelectParams& p, const SelectCta& c, int first, int end, int touched) {
    const int lane = threadIdx.x & 31;
    for (int token = threadIdx.x / 32; token < c.tile.tokens; token += WARPGROUP / 32) {
        const RowBlocks blocks = row_blocks(c.tile.position + token, p.topk, p.init_blocks, p.local_blocks);
        const int from = max_i(first, blocks.first_scored), to = min_i(end, blocks.end_scored);
        if (!blocks.lists_all() && from < to) {
            TopBlocks best;
            best.load(c.ranks + token * p.topk, c.ids + token * p.topk, blocks.places);
            FSA_NO_UNROLL for (int block = from; block < to; block += 32) {
                const int mine = block + lane;
                best.offer(mine < min_i(touched, to) ? c.ring.at(token, mine) : 0.0f, mine, mine < to);
            }
            best.store(c.ranks + token * p.topk, c.ids + token * p.topk, blocks.places);
        }
        __syncwarp();
        for (int block = first + lane; block < min_i(end, touched); block += 32) c.ring.at(token, block) = 0.0f;
    }
}
// Empties the ring and the places; the barriers of the first step are between this and their use.
FSA_DEVICE void open_tokens(const SelectParams& p, const SelectCta& c) {
    for (int i = threadIdx.x; i < p.band.tile_tokens * (c.ring.width + 1); i += WARPGROUP) c.ring.scores[i] = 0.0f;
    for (int i = threadIdx.x; i < p.band.tile_tokens * p.topk; i += WARPGROUP) {
        c.ranks[i] = TopBlocks::WORST_RANK;
        c.ids[i] = TopBlocks::EMPTY + i % p.topk;
    }
}
FSA_DEVICE void list_blocks(const SelectParams& p, const SelectCta& c, int kv_head) {
    for (int token = threadIdx.x / 32; token < c.tile.tokens; token += WARPGROUP / 32) {
        const RowBlocks blocks = row_blocks(c.tile.position + token, p.topk, p.init_blocks, p.local_blocks);
        i32* row = p.topk_indices + ((i64)kv_head * p.band.total_q + c.tile.token + token) * p.topk;
        if (blocks.lists_all()) {
            list_all_blocks(row, blocks, p.topk);
        } else {
            TopBlocks best;
            best.load(c.ranks + token * p.topk, c.ids + token * p.topk, blocks.places);
            best.list(row, blocks, p.topk);
        }
    }
}

// Scores of all blocks that compete. Keys come in chunks whose blocks fit in the ring; in a chunk the head tiles take turns.
FSA_DEVICE void score_blocks(const SelectParams& p, SelectCta& c, u32 key_tile, int kv_head) {
    const int head_tiles = ceil_div(p.scored_heads, p.band.tile_heads), chunk_keys = c.ring.keys(c.pooling);
    const int group_head = c.tile.first_head, thread = threadIdx.x, row = thread / 32 * 16 + (thread & 31) / 4;
    auto copy_step = [&](int key) {
        if (key < c.end) copy_tile<STEP_KEYS>(key_tile, p.key, kv_head, (i64)c.tile.key_row + key, c.end - key);
        copy_commit();
    };
    Queries queries;
    Voter low, high;
    bool mask_all = false;
    int first_block = c.pooling.first_block(c.begin);
    copy_step(c.begin);
    FSA_NO_UNROLL for (int chunk = c.begin;;) {
        const int chunk_end = min_i(c.end, chunk + chunk_keys);
        FSA_NO_UNROLL for (int head_tile = 0; head_tile < head_tiles; ++head_tile) {
            if (head_tiles > 1 || chunk == c.begin) {
                c.tile.first_head = group_head + head_tile * p.band.tile_heads;
                c.tile.heads = min_i(p.band.tile_heads, p.scored_heads - head_tile * p.band.tile_heads);
                low = find_voter(p, c.tile, row);
                high = find_voter(p, c.tile, row + 8);
                load_queries(queries, p, c.tile, row, low, high);
                // Rows of tokens that do not exist may hold anything.
                auto spoils = [&](const Voter& v, int at) { return !v.votes && c.tile.token_of(at) < c.tile.tokens; };
                mask_all = __syncthreads_or(spoils(low, row) || spoils(high, row + 8));
            }
            FSA_NO_UNROLL for (int key = chunk; key < chunk_end; key += STEP_KEYS) {
                copy_wait<0>();
                __syncthreads();
                Scores s;
                clear(s);
                const u32 keys = wide_address(key_tile, 0);
                FSA_UNROLL for (int k = 0; k < HEAD_DIM / 16; ++k) multiply_rows<STEP_KEYS>(s, queries[k], unit_address<STEP_KEYS>(keys, k));
                if (mask_all || key + STEP_KEYS > c.end_common) store_probabilities<true>(s, c.probabilities, row, key, p.scale_log2, low, high);
                else store_probabilities<false>(s, c.probabilities, row, key, p.scale_log2, low, high);
                __syncthreads();
                copy_step(key + STEP_KEYS < chunk_end ? key + STEP_KEYS : head_tile + 1 < head_tiles ? chunk : chunk_end);
                pool_step(c, key, min_i(chunk_end, key + STEP_KEYS));
            }
        }
        __syncthreads();
        const bool last = chunk_end >= c.end;
        const int touched = chunk_end > chunk ? c.pooling.end_block(chunk_end - 1) : first_block;
        const int end_block = last ? c.end_scored : c.pooling.first_block(chunk_end);
        offer_blocks(p, c, first_block, end_block, touched);
        if (last) break;
        first_block = end_block;
        chunk = chunk_end;
    }
    copy_wait<0>();
}

extern "C" __global__ void __launch_bounds__(WARPGROUP, SELECT_CTAS) select(const __grid_constant__ SelectParams p) {
    extern __shared__ __align__(1024) char shared[];
    const int kv_head = blockIdx.y;
    const BandTile tile = find_band_tile(p.band, blockIdx.x * p.band.head_tiles, kv_head);
    if (tile.tokens == 0) return;
    SelectCta c(p, tile, shared);
    if (!row_blocks(tile.last_position(), p.topk, p.init_blocks, p.local_blocks).lists_all()) {
        open_tokens(p, c);
        score_blocks(p, c, shared_address(shared), kv_head);
        __syncthreads();
    }
    list_blocks(p, c, kv_head);
}
