// WHAT   Compressed attention and the blocks of every row in one pass on Hopper: as band_sm90.cuh, whose consumers also leave the probabilities of every step, pooled
//        to blocks, and as select_sm90.cuh the lists of best blocks, without a second product of queries and keys.
// GRID   As band_sm90.cuh.
// ROLES  As there, and the warps of a fourth warpgroup, which choose the blocks of a tile's tokens while the consumers attend to the next tile.
// SMEM   As there, and what is chosen from by each of these warps.
// SYNC   As there, and an mbarrier pair for each of a cta's two slots of scores in global memory.
#define FSA_BLOCK_SCORES 1
#include "band_sm90.cuh"
