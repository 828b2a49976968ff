"""What differs between the sets of kernels: file names, shared memory and grids, as the Rust host has them. FSA_DEV_SET=sm80 takes the
portable kernels."""
import os

SET = os.environ.get("FSA_DEV_SET", "sm90")
ARCHS = ["sm_90a"] if SET == "sm90" else ["sm_80", "sm_89", "sm_90a"]
TILE = 64
MAX_SM80_BYTES = 95 * 1024      # of a cta's tiles: see attend_sm80.cuh


def ceil_div(a, b):
    return -(-a // b)


def file(stage):
    return f"{stage}_{SET}.cuh"


def tile_bytes(rows, head_dim):
    return rows * 128 * ceil_div(head_dim, 64)


def attend_bytes(block_size, head_dim, query_stages=2):
    if SET == "sm90":
        return 2 * tile_bytes(block_size, head_dim) + query_stages * tile_bytes(TILE, head_dim) + (16 if head_dim == 128 and block_size <= 64 else 0)
    resident = 2 * tile_bytes(block_size, head_dim) + tile_bytes(TILE, head_dim)
    step_keys = 64 if head_dim <= 128 else 32
    return resident if resident <= MAX_SM80_BYTES else 2 * tile_bytes(step_keys, head_dim) + tile_bytes(TILE, head_dim)


def reduce_tiles_bytes(block_size, head_dim):
    step_keys = 32 if SET == "sm80" and head_dim > 128 else 64
    return tile_bytes(TILE, head_dim) + 2 * tile_bytes(min(block_size, step_keys), head_dim)


def partial_bytes(block_size, head_dim, is_bf16):
    """Bytes of a partial's elements, and of the numbers beside them: see block/partial_rows.cuh."""
    packs = SET == "sm90" and is_bf16 and head_dim == 128 and block_size <= 64
    return (head_dim * 12 // 8, 8) if packs else (head_dim * 2, 4)


def has_partials(block_size, head_dim):
    return SET == "sm80" or block_size <= 128 and head_dim < 256


def finishes_sums(head_dim, query_partials):
    """Whether units that have a block to themselves finish its sums of keys."""
    return SET == "sm90" and not (head_dim == 256 and not query_partials)


def has_scaled_sums(head_dim, is_bf16):
    """Whether the sums of grad_query can be scaled f16."""
    return SET == "sm90" and is_bf16 and head_dim < 256


def backward_main(block_size, head_dim, query_partials):
    """(threads, parts of a block, shared bytes) of the main kernel."""
    if SET == "sm80":
        cta_keys, rows = (64 if head_dim <= 128 else 32), (64 if head_dim <= 192 else 32)
        shared = 2 * tile_bytes(cta_keys, head_dim) + 2 * tile_bytes(rows, head_dim) + 2 * cta_keys * 128
        return 128, 1 if query_partials else ceil_div(block_size, cta_keys), shared
    narrow = head_dim == 256 and not query_partials     # which main kernel: see backward_sm90.cuh
    cta_keys = 64 if narrow or block_size <= 64 else 128
    groups = cta_keys // 64
    shared = 2 * tile_bytes(cta_keys, head_dim) + 4 * tile_bytes(TILE, head_dim) + (2 if narrow else groups) * 8192
    return 256 if narrow else 128 * groups, ceil_div(block_size, cta_keys), shared
