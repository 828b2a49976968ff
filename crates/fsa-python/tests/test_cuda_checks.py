"""What a CUDA call checks before it looks for a device: runs on every machine, without PyTorch."""

import os
import subprocess
import sys

import pytest
from fsa_rs import _native

NAMES = ("q", "k", "v", "topk_indices", "cu_seqlens_q", "cu_seqlens_k")
ADDRESS = 1 << 20


def described(shape, dtype="bfloat16", device=0):
    """A description of a tensor without gaps; the memory does not exist and is not looked at."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    return ADDRESS, device, dtype, tuple(shape), tuple(strides)


def inputs(**changes):
    given = {
        "q": described((100, 6, 64)),
        "k": described((120, 2, 64)),
        "v": described((120, 2, 64)),
        "topk_indices": described((2, 100, 4), "int32"),
        "cu_seqlens_q": described((3,), "int32"),
        "cu_seqlens_k": described((3,), "int32"),
    }
    return tuple({**given, **changes}[name] for name in NAMES)


def call(given, block_size, backward=False):
    q, k, v, topk_indices, *cu_seqlens = given
    stage, packed = (topk_indices, block_size, False), (q, k, v, *cu_seqlens)
    if not backward:
        return _native.cuda_attention(stage, packed, None)
    forward = (described((100, 6, 64)), described((6, 100), "float32"), described((100, 6, 64)), None)
    return _native.cuda_attention_backward(stage, packed, None, False, forward)


ERRORS = [
    ({"q": described((100, 6, 64), "float32")}, NotImplementedError, "dtype of q on CUDA .* got float32, supported: b"),
    ({"q": described((100, 6, 64), "float64")}, NotImplementedError, "dtype of q on CUDA .* got float64"),
    ({"k": described((120, 2, 64), "float16")}, ValueError, "k: expected dtype bfloat16, got dtype float16"),
    (
        {"topk_indices": described((2, 100, 4), "int64")},
        ValueError,
        "topk_indices: expected dtype int32, got dtype int64",
    ),
    ({"cu_seqlens_q": described((3,), "int64")}, ValueError, "cu_seqlens_q: expected dtype int32, got dtype int64"),
    (
        {"cu_seqlens_k": described((3,), "int32", -1)},
        ValueError,
        "cu_seqlens_k: expected a tensor on cuda:0, .* on cpu",
    ),
    ({"q": described((100, 6, 64), device=-1)}, ValueError, "q: expected a CUDA tensor, .* got cpu"),
    ({"v": described((120, 2, 64), device=1)}, ValueError, "v: expected a tensor on cuda:0, as q, got one on cuda:1"),
    (
        {"q": described((100, 384))},
        ValueError,
        r"q: expected shape \[total_q, num_q_heads, head_dim\], got shape \[100, 384\]",
    ),
    (
        {"q": described((100, 5, 64))},
        ValueError,
        "q: expected a positive number of heads .* num_kv_heads 2, got 5 heads",
    ),
    ({"q": described((100, 6, 72))}, ValueError, r"k: expected shape \[120, 2, 72\], got shape \[120, 2, 64\]"),
    ({"v": described((119, 2, 64))}, ValueError, r"v: expected shape \[120, 2, 64\], got shape \[119, 2, 64\]"),
    (
        {"v": described((120, 2, 60))},
        NotImplementedError,
        "value_dim is not supported: got 60, supported: multiples of 8",
    ),
    ({"v": described((120, 2, 264))}, NotImplementedError, "value_dim is not supported: got 264, .* up to 256"),
    ({"topk_indices": described((2, 99, 4), "int32")}, ValueError, r"topk_indices: expected shape \[2, 100, 4\]"),
    ({"cu_seqlens_q": described((), "int32")}, ValueError, r"cu_seqlens_q: expected shape \[batch \+ 1\]"),
    (
        {"cu_seqlens_k": described((4,), "int32")},
        ValueError,
        "cu_seqlens_k: expected 3 elements, as cu_seqlens_q, got 4",
    ),
]


@pytest.mark.parametrize(("changes", "kind", "message"), ERRORS)
@pytest.mark.parametrize("backward", [False, True])
def test_errors_name_the_argument(changes, kind, message, backward):
    with pytest.raises(kind, match=message):
        call(inputs(**changes), 64, backward)


def test_block_sizes():
    with pytest.raises(ValueError, match="block_size: expected one of 16, 32, 64, 128, 256, got 17"):
        call(inputs(), 17)


def test_a_machine_without_a_driver_says_so():
    # In a process of its own: the driver's library is loaded once. No folder of the loader's holds it.
    code = """
import test_cuda_checks as t
try:
    print(t.call(t.inputs(), 64))
except RuntimeError as error:
    print(error)
"""
    folder = os.path.dirname(__file__)
    path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "CUDA" in done.stdout, done.stdout


def test_validation_of_what_was_copied_from_a_device():
    import numpy as np

    cu = np.array([0, 4, 10], np.int32)
    ids = np.full((1, 10, 2), -1, np.int32)
    _native.validate([10, 10], 16, ids, (cu, cu))
    with pytest.raises(ValueError, match="cu_seqlens_q: expected prefix sums that end at 11"):
        _native.validate([11, 10], 16, ids, (cu, cu))
    with pytest.raises(ValueError, match="cu_seqlens_k: expected prefix sums that do not decrease"):
        _native.validate([10, 10], 16, ids, (cu, cu[::-1].copy() - 10 + cu))
    ids[0, 5] = (0, 0)
    with pytest.raises(ValueError, match=r"topk_indices: .* block 0 in row \[0, 5\] twice"):
        _native.validate([10, 10], 16, ids, (cu, cu))


def packed(**changes):
    given = {
        "q": described((100, 6, 64)),
        "k": described((120, 2, 64)),
        "v": described((120, 2, 64)),
        "cu_seqlens_q": described((3,), "int32"),
        "cu_seqlens_k": described((3,), "int32"),
    }
    return tuple({**given, **changes}.values())


SIZES = [32, 16, 64, 4, 1, 2, 512, 0]


def band(stage, **changes):
    return _native.cuda_attention(stage, packed(**changes), None)


def select(sizes=SIZES, **changes):
    return _native.cuda_select(sizes, packed(**changes), None)


def compress(weight=None, position=None, geometry=(32, 16), name="k", **changes):
    """Of keys, or of values beside keys that are right."""
    given = {"input": described((120, 2, 64)), "cu_seqlens_k": described((3,), "int32"), **changes}
    inputs = (given["input"], given["input"], given["cu_seqlens_k"])
    # A gradient for that side alone: the other one is not looked at.
    sides = [((weight, position), described((7, 2, 64))), ((None, None), None)]
    (keys, grad_k), (values, grad_v) = sides if name == "k" else reversed(sides)
    return _native.cuda_compress_backward(geometry, inputs, (keys, values), (grad_k, grad_v))


def nsa(gates=None, parameters=(None,) * 4, sizes=SIZES, rope=(), **changes):
    gates = described((100, 3)) if gates is None else gates
    inputs = (packed(**changes), gates, parameters[:2], parameters[2:])
    return _native.cuda_nsa((sizes, list(rope), None), inputs, None)


OTHER_ERRORS = [
    (lambda: band(()), RuntimeError, "CUDA"),  # dense: nothing is wrong but the machine
    (lambda: band((16,), q=described((100, 6, 64), "float32")), NotImplementedError, "dtype of q on CUDA .* float32"),
    (
        lambda: band((16,), v=described((120, 2, 64), "float16")),
        ValueError,
        "v: expected dtype bfloat16, got dtype flo",
    ),
    (lambda: band((32, 12)), ValueError, "kernel_size: expected a positive multiple of kernel_stride 12, got 32"),
    (lambda: band((32, 0)), ValueError, "kernel_stride: expected at least 1, got 0"),
    (lambda: band((32, 16), k=described((8, 2, 32))), ValueError, r"k_cmp: expected shape \[8, 2, 64\], got shape"),
    (lambda: band((32, 16), v=described((9, 2, 64))), ValueError, r"v_cmp: expected shape \[120, 2, 64\]"),
    (lambda: select([32, 16, 64, 2, 1, 2, 0, 0]), ValueError, "topk: expected at least init_blocks"),
    (lambda: select([32, 16, 24, 4, 1, 2, 0, 0]), ValueError, "block_size: expected one of 16"),
    (lambda: select(k=described((120, 64))), ValueError, r"k_cmp: expected shape \[total_k, num_kv_heads, head_dim\]"),
    (lambda: compress(cu_seqlens_k=described((3,), "int64")), ValueError, "cu_seqlens_k: expected dtype int32"),
    (lambda: compress(cu_seqlens_k=described((0,), "int32")), ValueError, r"cu_seqlens_k: expected shape \[batch \+ 1"),
    (lambda: compress(input=described((120, 128))), ValueError, r"k: expected shape \[total_k, num_kv_heads, dim\]"),
    (lambda: compress(input=described((120, 2, 12))), NotImplementedError, "dim is not supported: got 12"),
    (lambda: compress(geometry=(32, 0)), ValueError, "kernel_stride: expected at least 1, got 0"),
    (lambda: compress(described((2,))), ValueError, r"k_weight: expected shape \[num_kv_heads, kernel_size\] or"),
    (lambda: compress(described((2, 31))), ValueError, r"k_weight: expected shape \[2, 32\], got shape \[2, 31\]"),
    (lambda: compress(described((2, 64, 64))), ValueError, r"k_weight: expected shape \[2, 2048, 64\]"),
    (
        lambda: compress(described((2, 32), "float16")),
        ValueError,
        "k_weight: expected dtype bfloat16, got dtype float16",
    ),
    (
        lambda: compress(described((2, 32), device=1)),
        ValueError,
        "k_weight: expected a tensor on cuda:0, as k, got one",
    ),
    (
        lambda: compress(None, described((2, 32, 64)), name="v"),
        ValueError,
        "v_position: expected None: compression mean has no position embedding, got one",
    ),
    (
        lambda: compress(described((2, 2048, 64)), described((2, 32, 32))),
        ValueError,
        r"k_position: expected shape \[2, 32, 64\], got shape \[2, 32, 32\]",
    ),
    (lambda: nsa(described((100, 2))), ValueError, r"gates: expected shape \[100, 3\] or \[100, 6, 3\], got shape"),
    (lambda: nsa(described((100, 3), "float32")), ValueError, "gates: expected dtype bfloat16, got dtype float32"),
    (
        lambda: nsa(described((100, 3), device=-1)),
        ValueError,
        "gates: expected a tensor on cuda:0, as q, got one on cpu",
    ),
    (lambda: nsa(sizes=[32, 16, 64, 2, 1, 2, 512, 0]), ValueError, "topk: expected at least init_blocks"),
    (lambda: nsa(parameters=(None, None, described((2, 9)), None)), ValueError, r"v_weight: expected shape \[2, 32\]"),
    (
        lambda: nsa(parameters=(described((2, 2048, 64)), described((2, 32, 64)), None, described((2, 32, 64)))),
        ValueError,
        "v_position: expected None",
    ),
    (lambda: nsa(v=described((120, 2, 300))), NotImplementedError, "value_dim is not supported: got 300"),
    (
        lambda: nsa(cu_seqlens_k=described((4,), "int32")),
        ValueError,
        "cu_seqlens_k: expected 3 elements, as cu_seqlens",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), OTHER_ERRORS)
def test_errors_of_the_other_stages_name_the_argument(call, kind, message):
    if kind is RuntimeError and _has_driver():
        pytest.skip("there is a driver")
    with pytest.raises(kind, match=message):
        call()


def _has_driver():
    import ctypes

    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
