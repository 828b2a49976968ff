"""Every function on NumPy arrays against the definitions in f64."""

import fsa_rs
import numpy as np
import pytest
from reference import Case, attend, close, compress, numpy_dtype, rotate, rounded

DTYPES = ["float32", "float16", "bfloat16"]
CASES = {
    "packed": Case(),
    "single": Case(q_lens=(150,), k_lens=(150,), heads=(4, 4), dims=(8, 8), seed=1),
    "five": Case(q_lens=(33, 64), k_lens=(33, 100), heads=(10, 2), dims=(40, 16), seed=2),
    "decode": Case(q_lens=(1, 1), k_lens=(90, 17), heads=(8, 1), dims=(64, 64), seed=3),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(params=DTYPES)
def dtype(request):
    if numpy_dtype(request.param) is None:
        pytest.skip("bfloat16 arrays need the package ml_dtypes")
    return request.param


def cast(dtype, *arrays):
    return tuple(array.astype(numpy_dtype(dtype)) for array in arrays)


def check_attention(result, qkv, mask, case, dtype):
    out, lse = result
    assert out.dtype == numpy_dtype(dtype) and lse.dtype == np.float32
    exact, naive = attend(*qkv, mask, case.scale), attend(*qkv, mask, case.scale, dtype)
    close(out, exact[0], naive[0], dtype)
    close(lse, exact[1], naive[1], "float32")


def test_dense(case, dtype):
    qkv = case.qkv(dtype)
    got = fsa_rs.dense_attn_varlen_func(
        *cast(dtype, *qkv), case.cu_q, case.cu_k, softmax_scale=case.scale, return_lse=True
    )
    check_attention(got, qkv, case.dense(), case, dtype)


@pytest.mark.parametrize("window_size", [0, 5, 1000])
def test_window(case, dtype, window_size):
    qkv = case.qkv(dtype)
    got = fsa_rs.window_attn_varlen_func(
        *cast(dtype, *qkv),
        case.cu_q,
        case.cu_k,
        window_size=(window_size, 0),
        softmax_scale=case.scale,
        return_lse=True,
    )
    check_attention(got, qkv, case.window(window_size), case, dtype)


@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize("block_size", [16, 64])
def test_selected(case, dtype, block_size, hostile):
    qkv = case.qkv(dtype)
    ids = case.topk_indices(block_size, 3, hostile)
    got = fsa_rs.selected_attn_varlen_func(
        *cast(dtype, *qkv),
        ids,
        block_size,
        case.cu_q,
        case.cu_k,
        softmax_scale=case.scale,
        return_lse=True,
        validate=not hostile,
    )
    check_attention(got, qkv, case.selected(ids, block_size), case, dtype)


def test_compressed(case, dtype):
    q, k, v = case.qkv(dtype)
    geometry = {"kernel_size": 16, "kernel_stride": 8}
    k_cmp, v_cmp, cu_cmp = fsa_rs.compress_kv(*cast(dtype, k, v), case.cu_k, **geometry)
    rows = cu_cmp[-1]
    assert k_cmp.shape[0] == case.cu_k[-1] // 8 and not k_cmp[rows:].any()
    out, lse, ids = fsa_rs.compressed_attn_varlen_func(
        *cast(dtype, q),
        k_cmp,
        v_cmp,
        case.cu_q,
        case.cu_k,
        **geometry,
        block_size=16,
        topk=4,
        softmax_scale=case.scale,
    )
    qkv = (q, k_cmp[:rows].astype(np.float64), v_cmp[:rows].astype(np.float64))
    check_attention((out, lse), qkv, case.compressed(16, 8), case, dtype)
    check_choice(case, qkv, ids, dtype)
    only = fsa_rs.topk_blocks(
        *cast(dtype, q), k_cmp, case.cu_q, case.cu_k, **geometry, block_size=16, topk=4, softmax_scale=case.scale
    )
    np.testing.assert_array_equal(only, ids)


def check_choice(case, qkv, ids, dtype):
    """Forced blocks, order, padding, and that no block was left out whose score is clearly higher."""
    mask = case.compressed(16, 8)[0]
    group = case.heads[0] // case.heads[1]
    counts, first = case.windows(16, 8), np.cumsum((0, *case.windows(16, 8)))
    for kv in range(case.heads[1]):
        weights = np.zeros(mask.shape)
        for head in range(kv * group, (kv + 1) * group):
            logits = np.where(mask, qkv[0][:, head] @ qkv[1][:, kv].T * case.scale, -np.inf)
            rows = mask.any(axis=1)
            exact = np.exp(logits[rows] - logits[rows].max(axis=1, keepdims=True))
            weights[rows] += exact / exact.sum(axis=1, keepdims=True)
        row = 0
        for sequence, positions in enumerate(case.positions()):
            scores = weights[:, first[sequence] : first[sequence] + counts[sequence]]
            for position in positions:
                check_row(ids[kv, row], position // 16, scores[row], counts[sequence])
                row += 1


def check_row(ids, own, weights, count):
    chosen = ids[ids >= 0]
    assert len(chosen) == min(4, own + 1) and (np.diff(chosen) > 0).all() and (ids[len(chosen) :] == -1).all()
    forced = {0, own, max(own - 1, 0)}
    assert forced <= set(chosen)
    # Block j: windows 2j + m - n for m, n in 0 .. 1.
    score = [
        sum(weights[2 * j + m - n] for m in (0, 1) for n in (0, 1) if 0 <= 2 * j + m - n < count)
        for j in range(own + 1)
    ]
    free = [score[j] for j in chosen if j not in forced]
    left = [score[j] for j in range(own + 1) if j not in chosen]
    assert not free or not left or min(free) >= max(left) - 1e-5


@pytest.mark.parametrize("kind", ["mean", "weighted", "linear", "linear with position"])
def test_compress(case, dtype, kind):
    _, k, v = case.qkv(dtype)
    heads, size = case.heads[1], 16
    weight = position = None
    if kind == "weighted":
        weight = case.normal(heads, size, dtype=dtype)
    if kind.startswith("linear"):
        weight = case.normal(heads, size * k.shape[2], k.shape[2], dtype=dtype)
    if kind.endswith("position"):
        position = case.normal(heads, size, k.shape[2], dtype=dtype)
    given = {"k_weight": weight, "k_position": position}
    given = {name: cast(dtype, array)[0] for name, array in given.items() if array is not None}
    k_cmp, v_cmp, cu = fsa_rs.compress_kv(*cast(dtype, k, v), case.cu_k, size, 8, **given)
    assert cu.dtype == np.int32
    np.testing.assert_array_equal(np.diff(cu), case.windows(size, 8))
    for got, x, parameters in ((k_cmp, k, (weight, position)), (v_cmp, v, (None, None))):
        exact = compress(case, x, size, 8, *parameters)
        # A naive program rounds window + position to the dtype, and sums in f32.
        close(got[: cu[-1]], exact, rounded(exact, dtype), dtype, ulps=16)


@pytest.mark.parametrize("theta", [None, 10_000.0])
@pytest.mark.parametrize("per_head", [False, True])
def test_nsa(case, dtype, per_head, theta):
    q, k, v = case.qkv(dtype)
    shape = (q.shape[0], q.shape[1], 3) if per_head else (q.shape[0], 3)
    gates = rounded(case.rng.random(shape), dtype)
    out, ids = fsa_rs.nsa_attn_varlen_func(
        *cast(dtype, q, k, v, gates),
        case.cu_q,
        case.cu_k,
        None,
        None,
        kernel_size=16,
        kernel_stride=8,
        block_size=16,
        topk=4,
        window_size=20,
        softmax_scale=case.scale,
        rope_theta=theta,
        return_topk_indices=True,
    )
    results = []
    for step in (None, dtype):
        as_stored = (lambda x: x) if step is None else (lambda x: rounded(x, dtype))
        k_cmp, v_cmp = (as_stored(compress(case, x, 16, 8)) for x in (k, v))
        rotated = (q, k, k_cmp)
        if theta is not None:
            places = (case.positions(), [np.arange(n) for n in case.k_lens])
            places = (*places, [np.arange(n) * 8 for n in case.windows(16, 8)])
            pairs = zip(rotated, places, strict=True)
            rotated = tuple(as_stored(rotate(x, np.concatenate(p), theta)) for x, p in pairs)
        branches = (
            attend(rotated[0], rotated[2], v_cmp, case.compressed(16, 8), case.scale, step)[0],
            attend(*rotated[:2], v, case.selected(ids, 16), case.scale, step)[0],
            attend(*rotated[:2], v, case.window(20), case.scale, step)[0],
        )
        weights = gates if per_head else gates[:, None]
        results.append(as_stored(sum(branch * weights[..., i, None] for i, branch in enumerate(branches))))
    close(out, *results, dtype)
