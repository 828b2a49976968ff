"""The parameter structs of the stages with an interval of keys; field for field as kernels/base/params.cuh."""
import ctypes
from ctypes import c_void_p as ptr, c_int32 as i32, c_int64 as i64, c_float as f32
from params import Branch, SumBounds, SumKeys, Tensor, TensorMap, padded


class BlockMask(ctypes.Structure):
    _fields_ = [(n, ptr) for n in ("rows", "steps", "step_counts", "nonfinite")] + [(n, i32) for n in ("words", "max_steps", "num_tiles", "value_groups")]


class Band(ctypes.Structure):
    _fields_ = [(n, ptr) for n in ("cu_seqlens_q", "cu_seqlens_kv", "cu_keys", "tile_base", "key_tile_base")] + [
        (n, i32) for n in ("batch", "total_q", "total_keys", "kernel_size", "kernel_stride", "window", "group_size", "tile_heads", "tile_tokens", "head_tiles", "split")] + [("mask", BlockMask)]


class BlockMaskParams(ctypes.Structure):
    _fields_ = [("band", Band), ("value", Tensor), ("topk_indices", ptr), ("topk", i32), ("step_keys", i32), ("window", i32)]


class BatchTables(ctypes.Structure):
    _fields_ = [(n, ptr) for n in ("cu_seqlens_q", "cu_seqlens_kv", "cu_compressed", "tile_base", "key_tile_base")] + [("cleared", ptr * 6)] + [
        (n, i32) for n in ("batch", "kernel_size", "kernel_stride", "tile_tokens", "tile_keys", "compressed")]


class BlockLists(ctypes.Structure):
    _fields_ = [(n, ptr) for n in ("cu_seqlens_q", "cu_seqlens_kv", "topk_indices")] + [(n, i32) for n in ("batch", "total_q", "num_kv_heads", "topk", "block_size", "first_cta")]


class PrepareParams(ctypes.Structure):
    _fields_ = [("tables", BatchTables * 2), ("lists", BlockLists)]


class BandParams(ctypes.Structure):
    _pack_ = 1
    _fields_ = padded([("band", Band)] + [(n, Tensor) for n in ("query", "key", "value", "out")] + [("lse", ptr), ("branch", Branch), ("scale_log2", f32), ("num_tiles", i32), ("num_kv_heads", i32)] + [
        (n, TensorMap) for n in ("query_map", "key_map", "value_map")])


class BandPairParams(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("attention", BandParams), ("out", Tensor), ("lse", ptr), ("branch", Branch), ("compressed", Tensor), ("window", i32)]
    _fields_.append(("_end", ctypes.c_char * (-sum(ctypes.sizeof(kind) for _, kind in _fields_) % 64)))


class BlockChoice(ctypes.Structure):
    _fields_ = [("scores", ptr), ("topk_indices", ptr)] + [(n, i32) for n in ("max_steps", "topk", "init_blocks", "local_blocks", "window")] + [("mask", BlockMask), ("value", Tensor)]


class BandSelectParams(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("attention", BandParams), ("choice", BlockChoice), ("_gap", ctypes.c_char * (-ctypes.sizeof(BlockChoice) % 64)), ("out_map", TensorMap), ("sum_map", TensorMap)]


class BandBackwardParams(ctypes.Structure):
    _pack_ = 1
    _fields_ = padded([("band", Band)] + [(n, Tensor) for n in ("query", "key", "value", "out", "grad_out")] + [(n, ptr) for n in ("lse", "grad_lse", "row_stats", "row_bounds", "key_bounds")] + [("sums", SumBounds * 3), ("other", SumKeys), ("clearing", ptr), ("window_stats", ptr)] + [
        (n, Tensor) for n in ("grad_query", "grad_key", "grad_value")] + [("partial_keys", ptr), ("scale_log2", f32), ("scale", f32)] + [
        (n, i32) for n in ("num_kv_heads", "num_tiles", "num_key_tiles", "splits", "resident", "accumulate", "accumulate_keys", "window_size")] + [
        (n, TensorMap) for n in ("query_map", "grad_out_map", "key_map", "value_map", "sums_map")])


class SelectParams(ctypes.Structure):
    _pack_ = 1
    _fields_ = padded([("band", Band), ("query", Tensor), ("key", Tensor), ("lse", ptr), ("topk_indices", ptr), ("scale_log2", f32)] + [
        (n, i32) for n in ("topk", "init_blocks", "local_blocks", "scored_heads", "num_tiles", "num_kv_heads", "segment_steps", "direct")] + [(n, TensorMap) for n in ("query_map", "key_map")])
