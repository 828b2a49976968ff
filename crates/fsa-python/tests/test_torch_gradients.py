"""Results and gradients of every function on PyTorch tensors against the definitions in f64."""

import pytest

torch = pytest.importorskip("torch", reason="the tests of the PyTorch operators need torch")

import fsa_rs  # noqa: E402
from reference import Case  # noqa: E402
from torch_reference import attend, check, compress, rotate  # noqa: E402

GEOMETRY = (16, 8)
SIZES = {"kernel_size": 16, "kernel_stride": 8, "block_size": 16, "topk": 4}
CASES = {
    "packed": Case(),
    "single": Case(q_lens=(90,), k_lens=(90,), heads=(2, 2), dims=(8, 8), seed=1),
    "five": Case(q_lens=(33, 20), k_lens=(33, 64), heads=(10, 2), dims=(16, 8), seed=2),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request):
    return request.param


def qkv(case, dtype):
    return [torch.from_numpy(x) for x in case.qkv(dtype)]


def prefix_sums(case):
    return torch.from_numpy(case.cu_q), torch.from_numpy(case.cu_k)


def test_dense(case, dtype):
    options = {"softmax_scale": case.scale, "return_lse": True}
    check(
        lambda q, k, v: fsa_rs.dense_attn_varlen_func(q, k, v, *prefix_sums(case), **options),
        lambda at, q, k, v: attend(at, q, k, v, case.dense(), case.scale),
        qkv(case, dtype),
        dtype,
    )


def test_window(case, dtype):
    options = {"window_size": 20, "softmax_scale": case.scale, "return_lse": True}
    check(
        lambda q, k, v: fsa_rs.window_attn_varlen_func(q, k, v, *prefix_sums(case), **options),
        lambda at, q, k, v: attend(at, q, k, v, case.window(20), case.scale),
        qkv(case, dtype),
        dtype,
    )


@pytest.mark.parametrize("hostile", [False, True])
def test_selected(case, dtype, hostile):
    ids = case.topk_indices(16, 3, hostile)
    options = {"softmax_scale": case.scale, "return_lse": True}
    check(
        lambda q, k, v: fsa_rs.selected_attn_varlen_func(
            q, k, v, torch.from_numpy(ids), 16, *prefix_sums(case), **options
        ),
        lambda at, q, k, v: attend(at, q, k, v, case.selected(ids, 16), case.scale),
        qkv(case, dtype),
        dtype,
    )


def test_compressed(case, dtype):
    rows = sum(case.windows(*GEOMETRY))
    total = int(case.cu_k[-1]) // GEOMETRY[1]
    q, k, v = qkv(case, dtype)
    inputs = [q, k[:rows], v[:rows]]

    def got(q, k, v):
        # compress_kv pads to a number of rows that depends on shapes alone.
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, total - rows), value=7.0) for x in (k, v))
        return fsa_rs.compressed_attn_varlen_func(q, k, v, *prefix_sums(case), **SIZES, softmax_scale=case.scale)[:2]

    check(got, lambda at, q, k, v: attend(at, q, k, v, case.compressed(*GEOMETRY), case.scale), inputs, dtype)


@pytest.mark.parametrize("kind", ["mean", "weighted", "linear", "linear with position"])
def test_compress(case, dtype, kind):
    _, k, v = qkv(case, dtype)
    rows = sum(case.windows(*GEOMETRY))
    inputs, names = [k], []
    if kind == "weighted":
        inputs, names = [k, torch.from_numpy(case.normal(2, 16, dtype=dtype))], ["k_weight"]
    if kind.startswith("linear"):
        inputs.append(torch.from_numpy(case.normal(2, 16 * k.shape[2], k.shape[2], dtype=dtype) / 16))
        names.append("k_weight")
    if kind.endswith("position"):
        inputs.append(torch.from_numpy(case.normal(2, 16, k.shape[2], dtype=dtype)))
        names.append("k_position")

    def got(k, *parameters):
        given = dict(zip(names, parameters, strict=True))
        values = v.to(k.dtype)
        return (fsa_rs.compress_kv(k, values, prefix_sums(case)[1], *GEOMETRY, **given)[0][:rows],)

    def definition(at, k, *parameters):
        weight, position = (*parameters, None, None)[:2]
        return (compress(at, case, k, GEOMETRY, weight, position),)

    check(got, definition, inputs, dtype)


@pytest.mark.parametrize("theta", [None, 10_000.0])
@pytest.mark.parametrize("per_head", [False, True])
def test_nsa(case, dtype, per_head, theta):
    q, k, v = qkv(case, dtype)
    gates = torch.from_numpy(case.normal(*q.shape[: 2 if per_head else 1], 3, dtype=dtype))
    weight = torch.from_numpy(case.normal(2, 16 * k.shape[2], k.shape[2], dtype=dtype) / 16)
    position = torch.from_numpy(case.normal(2, 16, k.shape[2], dtype=dtype))
    v_weight = torch.from_numpy(case.normal(2, 16, dtype=dtype))
    # Without a rotary embedding the position embedding moves all logits of a row alike: its gradient is 0.
    inputs = [q, k, v, gates, weight, v_weight, *([] if theta is None else [position])]
    chosen = []

    def got(q, k, v, gates, weight, v_weight, position=None):
        given = {"k_weight": weight, "k_position": position, "v_weight": v_weight, "rope_theta": theta}
        out, ids = fsa_rs.nsa_attn_varlen_func(
            q,
            k,
            v,
            gates,
            *prefix_sums(case),
            **SIZES,
            **given,
            window_size=20,
            softmax_scale=case.scale,
            return_topk_indices=True,
        )
        assert not ids.requires_grad and ids.dtype == torch.int32
        chosen[:] = [ids.numpy()]
        return (out,)

    def definition(at, q, k, v, gates, weight, v_weight, position=None):
        k_cmp = compress(at, case, k, GEOMETRY, weight, position)
        v_cmp = compress(at, case, v, GEOMETRY, v_weight, None)
        if theta is not None:
            q = rotate(at, q, case.positions(), theta)
            k = rotate(at, k, [range(n) for n in case.k_lens], theta)
            k_cmp = rotate(at, k_cmp, [range(0, n * 8, 8) for n in case.windows(*GEOMETRY)], theta)
        branches = (
            attend(at, q, k_cmp, v_cmp, case.compressed(*GEOMETRY), case.scale)[0],
            attend(at, q, k, v, case.selected(chosen[0], 16), case.scale)[0],
            attend(at, q, k, v, case.window(20), case.scale)[0],
        )
        weights = at.load(gates if per_head else gates[:, None])
        return (at.stored(sum(branch * weights[..., i, None] for i, branch in enumerate(branches))),)

    got(*(x.to(getattr(torch, dtype)) for x in inputs))  # fills `chosen` for the definition
    check(got, definition, inputs, dtype)
