"""The names of the original project: the functional entry, and what happens without PyTorch."""

import inspect
import os
import subprocess
import sys

import fsa_rs
import numpy as np
import pytest
from fsa_rs.compat import FSA_topk_sparse_attention, topk_sparse_attention
from reference import Case

CASE = Case(q_lens=(70, 0, 40), k_lens=(70, 0, 40), heads=(6, 2), dims=(16, 16))
QKV = tuple(x.astype(np.float32) for x in CASE.qkv())
IDS = CASE.topk_indices(16, 3)


def test_arguments_are_those_of_the_original():
    parameters = inspect.signature(FSA_topk_sparse_attention).parameters.values()
    positional = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional == ["q", "k", "v", "topk_idx", "block_size", "cu_seqlens", "softmax_scale"]
    assert topk_sparse_attention is FSA_topk_sparse_attention


@pytest.mark.parametrize("scale", [None, 0.3])
def test_it_is_selected_attention(scale):
    expected = fsa_rs.selected_attn_varlen_func(*QKV, IDS, 16, CASE.cu_q, CASE.cu_k, scale)
    np.testing.assert_array_equal(FSA_topk_sparse_attention(*QKV, IDS, 16, CASE.cu_q, scale), expected)


def test_layouts():
    plain = FSA_topk_sparse_attention(*QKV, IDS, 16, CASE.cu_q)
    swapped = np.ascontiguousarray(IDS.swapaxes(0, 1))
    np.testing.assert_array_equal(FSA_topk_sparse_attention(*QKV, swapped, 16, CASE.cu_q, layout="ths"), plain)
    with pytest.raises(ValueError, match=r"topk_indices: expected shape \[2, 110, topk\]"):
        FSA_topk_sparse_attention(*QKV, swapped, 16, CASE.cu_q)
    with pytest.raises(ValueError, match="layout: expected 'hts' or 'ths', got 'tsh'"):
        FSA_topk_sparse_attention(*QKV, IDS, 16, CASE.cu_q, layout="tsh")


def test_validation_on_request():
    ids = IDS.copy()
    ids[1, 7] = (0, 0, -1)
    FSA_topk_sparse_attention(*QKV, IDS, 16, CASE.cu_q, validate=True)
    with pytest.raises(ValueError, match=r"topk_indices: expected ids that are unique in a row, got block 0 in row"):
        FSA_topk_sparse_attention(*QKV, ids, 16, CASE.cu_q, validate=True)
    ids[1, 7] = (0, 99, -1)
    with pytest.raises(ValueError, match=r"topk_indices: expected -1 or a block id in 0..=0"):
        FSA_topk_sparse_attention(*QKV, ids, 16, CASE.cu_q, validate=True)
    FSA_topk_sparse_attention(*QKV, ids, 16, CASE.cu_q)


def test_gradients():
    torch = pytest.importorskip("torch", reason="gradients need torch")
    ids, cu = torch.from_numpy(IDS), torch.from_numpy(CASE.cu_q)
    results = []
    for call in (
        lambda *qkv: FSA_topk_sparse_attention(*qkv, ids, 16, cu),
        lambda *qkv: fsa_rs.selected_attn_varlen_func(*qkv, ids, 16, cu, cu),
    ):
        qkv = [torch.from_numpy(x).requires_grad_() for x in QKV]
        results.append(torch.autograd.grad(call(*qkv).square().sum(), qkv))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("statement", ["import fsa_rs.nn", "from fsa_rs import nn", "import fsa_rs; fsa_rs.nn"])
def test_the_layer_without_pytorch_says_what_it_needs(statement):
    code = f"import sys; sys.modules['torch'] = None\n{statement}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("ModuleNotFoundError: fsa_rs.nn needs PyTorch: pip install torch"), done.stderr


def test_everything_can_be_imported_without_pytorch():
    code = "import sys; sys.modules['torch'] = None\nfrom fsa_rs import *\nimport fsa_rs.compat, fsa_rs.check.__main__"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=os.environ)


def test_an_unknown_attribute_is_one():
    with pytest.raises(AttributeError, match="module 'fsa_rs' has no attribute 'nothing'"):
        _ = fsa_rs.nothing
