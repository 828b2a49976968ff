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
        _native.selected_plan(inputs(**changes), 64, backward, False)


def test_block_sizes():
    with pytest.raises(ValueError, match="block_size: expected one of 16, 32, 64, 128, 256, got 17"):
        _native.selected_plan(inputs(), 17, False, False)


def test_a_machine_without_a_driver_says_so():
    # In a process of its own: the driver's library is loaded once. No folder of the loader's holds it.
    code = """
import test_cuda_checks as t
try:
    print(t._native.selected_plan(t.inputs(), 64, False, False)[1])
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
