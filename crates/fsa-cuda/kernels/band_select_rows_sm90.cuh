// WHAT   As band_select_sm90.cuh, where a token has one head.
// GRID   As band_sm90.cuh.
// ROLES  As there; a consumer's warp chooses the blocks of its rows at the end of a tile.
// SMEM   As there, and the candidates of 16 rows for each of these warps.
// SYNC   As there: what a warp leaves in a cta's slot of scores in global memory, it reads itself.
#define FSA_BLOCK_SCORES 2
#include "band_sm90.cuh"
