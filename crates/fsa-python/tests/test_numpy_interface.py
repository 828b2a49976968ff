"""What NumPy users rely on besides numbers: memory layouts, errors, threads, processes, installation."""

import ast
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import fsa_rs
import numpy as np
import pytest
from fsa_rs import _native
from reference import Case

CASE = Case()
Q, K, V = (x.astype(np.float32) for x in CASE.qkv())
CU_Q, CU_K = CASE.cu_q, CASE.cu_k
IDS = CASE.topk_indices(16, 3)


def selected(q=Q, k=K, v=V, ids=IDS, block_size=16, cu_q=CU_Q, cu_k=CU_K, **options):
    return fsa_rs.selected_attn_varlen_func(q, k, v, ids, block_size, cu_q, cu_k, **options)


def strided(x):
    """The same numbers in memory of another order, with gaps."""
    memory = np.full((x.shape[1], x.shape[2] + 3, x.shape[0], 2), np.nan, x.dtype)
    view = memory[:, : x.shape[2], :, 0].transpose(2, 0, 1)
    view[...] = x
    return view


def unaligned(x):
    memory = np.zeros(x.nbytes + 1, np.uint8)[1:]
    memory[...] = np.frombuffer(x.tobytes(), np.uint8)
    return memory.view(x.dtype).reshape(x.shape)


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


LAYOUTS = {
    "strided": strided,
    "backwards": lambda x: x[::-1].copy()[::-1],
    "other byte order": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "unaligned": unaligned,
    "read-only": read_only,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts_change_no_bit(layout):
    change = LAYOUTS[layout]
    got = selected(change(Q), change(K), change(V))
    np.testing.assert_array_equal(got, selected())
    assert got.flags.c_contiguous
    got = fsa_rs.compress_kv(change(K), change(V), CU_K, 16, 8)
    for a, b in zip(got, fsa_rs.compress_kv(K, V, CU_K, 16, 8), strict=True):
        np.testing.assert_array_equal(a, b)


def test_inputs_are_not_written():
    before = [x.copy() for x in (Q, K, V, IDS, CU_Q, CU_K)]
    selected()
    for x, y in zip(before, (Q, K, V, IDS, CU_Q, CU_K), strict=True):
        np.testing.assert_array_equal(x, y)


def test_layout_of_ids():
    other = np.ascontiguousarray(IDS.swapaxes(0, 1))
    np.testing.assert_array_equal(selected(ids=other, layout="ths"), selected())


def test_nan_in_unseen_rows_stays_there():
    k, v = K.copy(), V.copy()
    k[69] = v[69] = np.nan  # the last key of the first sequence: seen by row 69 alone
    got, clean = selected(k=k, v=v), selected()
    np.testing.assert_array_equal(got[:69], clean[:69])
    np.testing.assert_array_equal(got[70:], clean[70:])


def test_rows_without_keys():
    out, lse = selected(ids=np.full_like(IDS, -1), return_lse=True)
    assert not out.any() and np.isneginf(lse).all()


def test_empty_batches():
    empty = np.zeros(1, np.int32)
    out, lse = selected(Q[:0], K[:0], V[:0], IDS[:, :0], cu_q=empty, cu_k=empty, return_lse=True)
    assert out.shape == (0, 6, 24) and lse.shape == (6, 0)
    k_cmp, v_cmp, cu = fsa_rs.compress_kv(K[:0], V[:0], empty)
    assert k_cmp.shape == (0, 2, 16) and v_cmp.shape == (0, 2, 24) and cu.tolist() == [0]


def test_max_seqlen_is_accepted_and_not_needed():
    options = {"max_seqlen_q": 70, "max_seqlen_k": 70}
    np.testing.assert_array_equal(selected(**options), selected())
    dense = fsa_rs.dense_attn_varlen_func
    np.testing.assert_array_equal(dense(Q, K, V, CU_Q, CU_K, 70, 70), dense(Q, K, V, CU_Q, CU_K))


def test_results_repeat():
    first = selected(deterministic=True)
    for _ in range(5):
        np.testing.assert_array_equal(selected(deterministic=True), first)


def nsa(**options):
    gates = np.full((Q.shape[0], 3), 0.5, np.float32)
    return fsa_rs.nsa_attn_varlen_func(Q, K, V, gates, CU_Q, CU_K, **options)


def compressed(k_cmp=K[:16], **options):
    return fsa_rs.compressed_attn_varlen_func(Q, k_cmp, V[:16], CU_Q, CU_K, kernel_size=16, kernel_stride=8, **options)


ERRORS = [
    (lambda: selected(block_size=48), ValueError, "block_size: expected one of 16, 32, 64, 128, 256, got 48"),
    (lambda: selected(block_size=-16), ValueError, "block_size: expected a non-negative integer, got -16"),
    (lambda: selected(q=Q[:-1]), ValueError, "q: expected 93 rows, the last element of cu_seqlens_q, got 92 rows"),
    (lambda: selected(k=K[:-1]), ValueError, "k: expected 131 rows, by cu_seqlens_k, got 130 rows"),
    (lambda: selected(v=V[:, :1]), ValueError, "v: expected shape"),
    (lambda: selected(q=Q[0]), ValueError, "q: expected"),
    (lambda: selected(q=Q[:, :5]), ValueError, "multiple of num_kv_heads 2"),
    (lambda: selected(cu_k=CU_K[:-1]), ValueError, "cu_seqlens_k: expected 4 elements, as cu_seqlens_q"),
    (lambda: selected(cu_q=CU_Q.astype(np.int64)), ValueError, "cu_seqlens_q: expected dtype int32, got dtype int64"),
    (lambda: selected(cu_q=CU_Q[None]), ValueError, r"cu_seqlens_q: expected shape \[batch \+ 1\]"),
    (lambda: selected(cu_k=CU_K[:0]), ValueError, "cu_seqlens_k: expected batch . 1 prefix sums, got no element"),
    (lambda: fsa_rs.compress_kv(K, V, CU_K[:0]), ValueError, "cu_seqlens_k: expected batch . 1 prefix sums"),
    (lambda: fsa_rs.compress_kv(K, V, CU_K[::-1]), ValueError, "cu_seqlens_k: expected first element 0, got 131"),
    (lambda: selected(cu_q=CU_Q + np.int32(1)), ValueError, "cu_seqlens_q: expected first element 0, got 1"),
    (lambda: selected(ids=IDS.astype(np.int64)), ValueError, "topk_indices: expected dtype int32, got dtype int64"),
    (lambda: selected(ids=IDS[0]), ValueError, "topk_indices: expected 3 axes"),
    (lambda: selected(ids=IDS[:1]), ValueError, r"topk_indices: expected shape \[2, 93, topk\]"),
    (lambda: selected(ids=IDS * 0 + 99, validate=True), ValueError, r"topk_indices: .* got 99 in row \[0, 0\]"),
    (lambda: selected(ids=IDS * 0, validate=True), ValueError, "unique"),
    (lambda: selected(layout="bhsk"), ValueError, "layout: expected 'hts' or 'ths', got 'bhsk'"),
    (lambda: selected(softmax_scale=float("nan")), ValueError, "softmax_scale"),
    (lambda: selected(q=list(Q)), TypeError, "q: expected numpy.ndarray"),
    (lambda: selected(k=list(K)), TypeError, "k: expected numpy.ndarray, as the first argument, got list"),
    (lambda: selected(v=None), TypeError, "v: expected numpy.ndarray, as the first argument, got NoneType"),
    (lambda: selected(block_size=16.0), TypeError, "block_size: expected an integer, got 16.0"),
    (lambda: selected(softmax_scale="a"), TypeError, "softmax_scale: expected a number, got 'a'"),
    (lambda: selected(q=Q.astype(np.float64)), NotImplementedError, "dtype of q is not supported: got float64"),
    (lambda: selected(k=K.astype(np.float16)), ValueError, "k: expected dtype float32, got dtype float16"),
    (lambda: selected(q=Q[..., :12], k=K[..., :12]), NotImplementedError, "head_dim is not supported: got 12"),
    (lambda: compressed(k_cmp=K), ValueError, "k_cmp: expected .13 to 16 compressed rows"),
    (lambda: compressed(k_cmp=K[:16, :, :8]), ValueError, "k_cmp: expected shape"),
    (lambda: compressed(topk=2), ValueError, "topk: expected at least init_blocks"),
    (lambda: compressed(score_heads="mean"), ValueError, "score_heads"),
    (lambda: compressed(layout="t"), ValueError, "layout"),
    (lambda: fsa_rs.compress_kv(K, V, CU_K, 20, 16), ValueError, "kernel_size: .* multiple of kernel_stride 16"),
    (lambda: fsa_rs.compress_kv(K, V, CU_K, 16, 0), ValueError, "kernel_stride: expected at least 1, got 0"),
    (lambda: fsa_rs.compress_kv(K[0], V, CU_K), ValueError, "k: expected 3 axes"),
    (lambda: fsa_rs.compress_kv(K[:-1], V, CU_K), ValueError, "k: expected 131 rows"),
    (lambda: fsa_rs.compress_kv(K, V, CU_K, v_weight=V[0]), ValueError, "v_weight: expected shape"),
    (lambda: fsa_rs.compress_kv(K, V, CU_K, k_position=K), ValueError, "k_position: expected None: compression mean"),
    (lambda: nsa(rope_theta=-1.0), ValueError, "rope_theta: expected a positive number"),
    (lambda: nsa(rope_scaling={}), ValueError, "rope_scaling: expected None without rope_theta"),
    (lambda: nsa(rope_theta=1e4, rope_scaling={"rope_type": "yarn"}), NotImplementedError, "yarn"),
    (lambda: nsa(rope_theta=1e4, rope_scaling={"rope_type": "llama3"}), ValueError, "low_freq_factor"),
    (lambda: nsa(rope_theta=1e4, rope_scaling="llama3"), TypeError, "rope_scaling: expected None or a mapping, got"),
    (lambda: nsa(rope_theta="a"), TypeError, "rope_theta: expected a number, got 'a'"),
    (lambda: nsa(layout="t"), ValueError, "layout: expected 'hts' or 'ths', got 't'"),
    (lambda: nsa(window_size=(5, 5)), NotImplementedError, r"window_size\[1\]"),
    (lambda: nsa(window_size=[5]), ValueError, r"window_size: expected an integer or a pair \(left, 0\), got \[5\]"),
    (lambda: nsa(window_size=None), TypeError, "window_size: expected an integer, got None"),
    (lambda: nsa(window_size=-1), ValueError, "window_size: expected a non-negative"),
    (lambda: nsa(k_weight=K[0]), ValueError, "k_weight: expected shape"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS)
def test_errors_name_the_argument(call, kind, message):
    with pytest.raises(kind, match=message) as raised:
        call()
    assert raised.type is kind


def test_llama3_scaling_is_that_of_hugging_face():
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    plain = nsa(rope_theta=100.0)
    np.testing.assert_array_equal(nsa(rope_theta=100.0, rope_scaling={"rope_type": "default"}), plain)
    assert np.abs(nsa(rope_theta=100.0, rope_scaling=scaling) - plain).max() > 1e-3


class Tensor:
    """What the extension reads of a tensor of PyTorch."""

    def __init__(self, array, device):
        self._array, self.device = array, device
        self.dtype, self.shape = f"torch.{array.dtype}", array.shape

    def data_ptr(self):
        return self._array.ctypes.data

    def stride(self):
        return tuple(stride // self._array.itemsize for stride in self._array.strides)


def test_other_devices_are_refused_by_name():
    def call(device):
        packed = [Tensor(x, device) for x in (Q, K, V, CU_Q, CU_K)]
        outputs = [Tensor(np.empty((93, 6, 24), np.float32), device), Tensor(np.empty((6, 93), np.float32), device)]
        _native.attention((), tuple(packed), None, tuple(outputs))
        return outputs[0]._array

    np.testing.assert_array_equal(call("cpu"), fsa_rs.dense_attn_varlen_func(Q, K, V, CU_Q, CU_K))
    with pytest.raises(NotImplementedError, match="device of q is not supported: got cuda:0, supported: cpu"):
        call("cuda:0")


def test_outputs_have_memory_of_their_own():
    out, lse = np.empty((93, 6, 24), np.float32), np.empty((6, 93), np.float32)
    packed = (Q, K, V, CU_Q, CU_K)
    with pytest.raises(ValueError, match="out: expected memory of its own"):
        _native.attention((), (Q, K, out[:, :2], CU_Q, CU_K), None, (out, lse))
    with pytest.raises(ValueError, match="lse: expected memory of its own"):
        _native.attention((), packed, None, (out, out.reshape(-1)[: 6 * 93].reshape(6, 93)))
    with pytest.raises(ValueError, match="out: expected a writable array"):
        _native.attention((), packed, None, (read_only(out), lse))
    with pytest.raises(ValueError, match="overlap"):
        overlapping = np.lib.stride_tricks.as_strided(out, (93, 6, 24), (0, 96, 4))
        _native.attention((), packed, None, (overlapping, lse))


def large(tokens=6000):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((tokens, heads, 64), dtype=np.float32) for heads in (8, 2, 2))
    cu = np.array([0, tokens], np.int32)
    return fsa_rs.dense_attn_varlen_func(q, k, v, cu, cu)


def test_the_interpreter_lock_is_released():
    thread, turns, start = threading.Thread(target=large), 0, time.monotonic()
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1
    elapsed = time.monotonic() - start
    assert turns > 20 and turns > 20 * elapsed, f"{turns} turns of the interpreter in {elapsed:.2f} s"


def test_threads_may_call_at_once():
    results, expected = [None] * 6, selected()

    def work(at):
        results[at] = selected()

    threads = [threading.Thread(target=work, args=(at,)) for at in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        np.testing.assert_array_equal(result, expected)


def child(queue):
    queue.put(float(selected().sum()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own():
    expected = float(selected().sum())  # the parent's threads are running
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    try:
        assert queue.get(timeout=60) == expected
    finally:
        process.join(timeout=10)
        process.kill()


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_without_torch():
    code = """
import sys
sys.modules["torch"] = None  # as if it were not installed
import numpy as np, fsa_rs
x, cu = np.zeros((4, 1, 8), np.float32), np.array([0, 4], np.int32)
assert fsa_rs.dense_attn_varlen_func(x, x, x, cu, cu).shape == (4, 1, 8)
try:
    fsa_rs.dense_attn_varlen_func([1.0], x, x, cu, cu)
except TypeError as error:
    print(error)
"""
    assert python(code) == "q: expected numpy.ndarray (torch.Tensor, once PyTorch is installed), got list"


def test_import_does_not_import_torch():
    assert python("import sys, fsa_rs; print('torch' in sys.modules)") == "False"


def test_a_wrong_environment_variable_is_a_clear_error():
    code = """
import numpy as np, fsa_rs
x, cu = np.zeros((4, 1, 8), np.float32), np.array([0, 4], np.int32)
try:
    fsa_rs.dense_attn_varlen_func(x, x, x, cu, cu)
except ValueError as error:
    print(error)
"""
    assert "FSA_NUM_THREADS" in python(code, FSA_NUM_THREADS="many")


def test_the_number_of_threads_changes_no_bit():
    code = """
import hashlib, numpy as np, fsa_rs
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((300, heads, 16), dtype=np.float32) for heads in (4, 2, 2))
cu, gates = np.array([0, 300], np.int32), rng.random((300, 3), dtype=np.float32)
out = fsa_rs.nsa_attn_varlen_func(q, k, v, gates, cu, cu, block_size=16, topk=4, window_size=50)
print(hashlib.sha256(out.tobytes()).hexdigest())
"""
    assert len({python(code, FSA_NUM_THREADS=n) for n in ("1", "2", "5")}) == 1


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("ldd") is None, reason="needs ldd")
def test_the_extension_links_to_neither_torch_nor_cuda_nor_python():
    linked = subprocess.run(["ldd", _native.__file__], capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("torch", "cuda", "cudart", "nvrtc", "python") if f"lib{name}" in linked], linked


def test_types_and_documentation_are_shipped():
    package = pathlib.Path(fsa_rs.__file__).parent
    assert (package / "py.typed").exists()
    stubs = ast.parse((package / "_native.pyi").read_text())
    declared = {node.name for node in stubs.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))} | {"HEAD_DIMS"}
    assert declared == {name for name in dir(_native) if not name.startswith("_")}
    assert all(getattr(fsa_rs, name).__doc__ for name in fsa_rs.__all__ if name != "__version__")
