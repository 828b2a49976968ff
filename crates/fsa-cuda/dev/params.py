"""The parameter structs of kernels/base/params.cuh, field for field."""
import ctypes
from ctypes import c_void_p as ptr, c_int32 as i32, c_int64 as i64, c_float as f32, c_uint64 as u64


class TensorMap(ctypes.Structure):
    _fields_ = [("words", u64 * 16)]
    _align_ = 64


def padded(fields):
    """Maps start at multiples of 64 bytes; Python before 3.13 does not align members by itself."""
    class Packed(ctypes.Structure):
        _fields_ = fields
    size, out, number = 0, [], 0
    for name, kind in fields:
        align = 64 if kind is TensorMap else ctypes.alignment(kind)
        gap = -size % align
        if gap:
            out.append((f"_pad{number}", ctypes.c_char * gap))
            number += 1
        out.append((name, kind))
        size += gap + ctypes.sizeof(kind)
    if size % 64 and any(kind is TensorMap for _, kind in fields):
        out.append(("_end", ctypes.c_char * (-size % 64)))
    return out


def aligned(kind):
    """A zeroed struct whose address is a multiple of 64."""
    memory = ctypes.create_string_buffer(ctypes.sizeof(kind) + 64)
    value = kind.from_buffer(memory, -ctypes.addressof(memory) % 64)
    return value


class Tensor(ctypes.Structure):
    _fields_ = [("data", ptr), ("row_stride", i64), ("head_stride", i64)]


class Gates(ctypes.Structure):
    _fields_ = [("data", ptr), ("row_stride", i64), ("head_stride", i64)]


class Branch(ctypes.Structure):
    _fields_ = [("sum", Tensor), ("gates", Gates), ("number", i32), ("accumulate", i32), ("discards", i32)]


class Layout(ctypes.Structure):
    _fields_ = [(n, ptr) for n in ("cu_seqlens_q", "cu_seqlens_kv", "tile_base", "block_base", "chunk_token", "tiles")] + [
        (n, i32) for n in ("batch", "total_q", "num_chunks", "chunk_tiles", "max_tiles")]


class Index(ctypes.Structure):
    _fields_ = [(n, ptr) for n in ("topk_indices", "plane", "entries", "row_info", "units", "unit_counts", "block_sums", "split_blocks")] + [
        (n, i32) for n in ("topk", "slots", "has_dense", "num_subs", "sub_tiles", "max_blocks", "window_blocks", "unit_entries", "spare_units", "full_units", "ordered", "packs_sums", "max_split_blocks")]


class IndexParams(ctypes.Structure):
    _fields_ = [("layout", Layout), ("index", Index), ("first_kv_head", i32), ("staged", i32)]


class AttendParams(ctypes.Structure):
    _fields_ = [("layout", Layout), ("index", Index), ("query", Tensor), ("key", Tensor), ("value", Tensor), ("partial", ptr), ("partial_lse", ptr),
                ("scale_log2", f32), ("group_size", i32), ("chunk", i32), ("first_head", i32)]


class ReduceParams(ctypes.Structure):
    _pack_ = 1
    _fields_ = padded([("layout", Layout), ("index", Index), ("query", Tensor), ("key", Tensor), ("value", Tensor), ("out", Tensor), ("partial", ptr),
                       ("partial_lse", ptr), ("lse", ptr), ("scale_log2", f32), ("group_size", i32), ("chunk", i32), ("first_head", i32), ("branch", Branch),
                       ("key_map", TensorMap), ("value_map", TensorMap)])


class SumBounds(ctypes.Structure):
    _fields_ = [("rows", ptr), ("keys", ptr)]


class SumKeys(ctypes.Structure):
    _fields_ = [("key", Tensor), ("value", Tensor), ("cu_keys", ptr), ("bounds", ptr)]


class BackwardParams(ctypes.Structure):
    _fields_ = [("layout", Layout), ("index", Index)] + [(n, Tensor) for n in ("query", "key", "value", "out", "grad_out")] + [
        (n, ptr) for n in ("lse", "grad_lse", "row_stats", "grad_query", "partial")] + [
        ("grad_query_out", Tensor), ("grad_key_out", Tensor), ("grad_value_out", Tensor), ("grad_key", ptr), ("grad_value", ptr), ("row_bounds", ptr), ("key_bounds", ptr), ("block_bounds", ptr), ("sums", SumBounds * 3), ("sum_rows", i64), ("query_row_bytes", i64), ("query_head_bytes", i64), ("scale_log2", f32), ("scale", f32)] + [
        (n, i32) for n in ("group_size", "chunk", "first_head", "stats_row", "stats_head", "rows", "first_sums", "finish_sums", "first_key", "end_key", "given_stats", "accumulate", "accumulate_keys", "in_place")]
