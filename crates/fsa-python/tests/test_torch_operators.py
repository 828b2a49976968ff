"""The PyTorch operators as PyTorch sees them: schema, fake kernels, autograd, compilation, memory, errors."""

import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="the tests of the PyTorch operators need torch")

import fsa_rs  # noqa: E402
from fsa_rs._torch_state import Layout  # noqa: E402
from reference import Case  # noqa: E402

CASE = Case(q_lens=(40, 0, 9), k_lens=(40, 0, 30), heads=(4, 2), dims=(16, 8))
QKV = CASE.qkv("bfloat16")
CU_Q, CU_K = torch.from_numpy(CASE.cu_q), torch.from_numpy(CASE.cu_k)
IDS = torch.from_numpy(CASE.topk_indices(16, 3))
GATES = torch.linspace(0, 1, 49 * 3).reshape(49, 3)
SIZES = {"kernel_size": 16, "kernel_stride": 8, "block_size": 16, "topk": 4}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def qkv(dtype=torch.float32, grad=True):
    return tuple(torch.from_numpy(x).to(dtype).requires_grad_(grad) for x in QKV)


def dense(q, k, v):
    return fsa_rs.dense_attn_varlen_func(q, k, v, CU_Q, CU_K, return_lse=True)


def window(q, k, v):
    return fsa_rs.window_attn_varlen_func(q, k, v, CU_Q, CU_K, window_size=(5, 0), return_lse=True)


def selected(q, k, v, **options):
    return fsa_rs.selected_attn_varlen_func(q, k, v, IDS, 16, CU_Q, CU_K, return_lse=True, **options)


def compressed(q, k, v):
    k_cmp, v_cmp, _ = fsa_rs.compress_kv(k, v, CU_K, 16, 8)
    return fsa_rs.compressed_attn_varlen_func(q, k_cmp, v_cmp, CU_Q, CU_K, **SIZES)


def chosen(q, k, v):
    k_cmp, _, cu = fsa_rs.compress_kv(k, v, CU_K, 16, 8)
    return fsa_rs.topk_blocks(q, k_cmp, CU_Q, CU_K, **SIZES, layout="ths"), cu


def nsa(q, k, v, **options):
    options = {"window_size": 8, "rope_theta": 1e4, "return_topk_indices": True, **SIZES, **options}
    gates = GATES.to(q.dtype) if isinstance(q, torch.Tensor) else GATES
    return fsa_rs.nsa_attn_varlen_func(q, k, v, gates, CU_Q, CU_K, **options)


FUNCTIONS = [dense, window, selected, compressed, chosen, nsa]
DIFFERENTIABLE = [dense, window, selected, compressed, nsa]


def arguments():
    """Arguments of every operator that has a gradient, and of every backward operator."""
    q, k, v = qkv()
    packed = (q, k, v, CU_Q, CU_K)
    k_cmp, v_cmp, _ = (x.detach() for x in fsa_rs.compress_kv(k, v, CU_K, 16, 8))
    k_cmp, v_cmp = k_cmp.requires_grad_(), v_cmp.requires_grad_()
    sizes = [16, 8, 16, 4, 1, 2, 8, 0]
    weight, position = torch.ones(2, 256, 16) / 99, torch.ones(2, 16, 16)
    parameters = (weight.requires_grad_(), position.requires_grad_())
    compress = (k, v, CU_K, *parameters, None, None, [16, 8])
    whole = (*packed, GATES.clone().requires_grad_(), *parameters, None, None, sizes, [1e4], None, False)
    ops = torch.ops.fsa_rs
    yield "dense", ops.attention, (*packed, None, None, None, False)
    yield "window", ops.attention, (*packed, 0.3, None, [5], False)
    yield "selected", ops.attention, (*packed, None, IDS, [16, 1], False)
    yield "compressed", ops.attention, (q, k_cmp, v_cmp, CU_Q, CU_K, None, None, [16, 8], True)
    yield "select", ops.select, (q, k_cmp, v_cmp, CU_Q, CU_K, None, sizes, True)
    yield "compress", ops.compress, compress
    yield "nsa", ops.nsa, (*whole, True, "none")
    with torch.no_grad():
        out, lse = ops.attention(*packed, None, IDS, [16, 0], False)
        grad_k, grad_v, _ = map(torch.ones_like, ops.compress(*compress))
        states = {recompute: ops.nsa(*whole, True, recompute) for recompute in ("none", "rotated", "all")}
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in (*packed, None, IDS, [16, 0], False)]
    yield "attention_backward", ops.attention_backward, (*detached, out, lse, torch.ones_like(out), lse.exp())
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in compress]
    yield "compress_backward", ops.compress_backward, (*detached, grad_k, grad_v)
    yield "compress_backward of values", ops.compress_backward, (*detached, None, grad_v)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in whole]
    for recompute, (result, ids, state) in states.items():
        backward = (*detached, ids, state, torch.ones_like(result), recompute)
        yield f"nsa_backward, recompute {recompute}", ops.nsa_backward, backward


fsa_rs.dense_attn_varlen_func(*qkv(), CU_Q, CU_K)  # registers the operators


@pytest.fixture
def filled():
    """Memory that is not written holds no zeros."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("rows", "gap"), [(48, 0), (49, 12)])
@pytest.mark.parametrize("recompute", ["none", "rotated"])
def test_what_nobody_writes_of_a_state_is_cleared(filled, recompute, rows, gap):
    # log-sum-exps of an odd number of rows end inside a vector of 16 bytes
    layout = Layout(((rows, 3, 16), (70, 1, 16), 8), torch.bfloat16, False, 8, True, recompute)
    room = layout.kept_room(torch.empty(0))
    written = torch.zeros(len(room), dtype=torch.bool)
    for part in layout.parts:
        written[part.offset : part.end] = True
    assert (~written).sum() == gap
    assert (room[~written] == 0).all()
    assert (room[written] != 0).all()
    if recompute == "none":
        room = layout.allocate(room)
        layout.cleared(room)
        assert (room[~written] == 0).all()


@pytest.mark.parametrize(("operator", "args"), [pytest.param(op, args, id=name) for name, op, args in arguments()])
@pytest.mark.filterwarnings("ignore")  # PyTorch's own machinery warns
def test_opcheck(operator, args):
    # Schema, fake kernel, autograd registration, and autograd through fake and symbolic shapes.
    torch.library.opcheck(operator.default, args)


def results(function, inputs):
    outputs = function(*inputs)
    real = [x for x in outputs if x.requires_grad]
    loss = sum((torch.where(x.isfinite(), x, 0).float() * (at + 1)).square().sum() for at, x in enumerate(real))
    return [x.detach() for x in outputs], list(torch.autograd.grad(loss, inputs))


def equal(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("function", DIFFERENTIABLE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore")
def test_compile_fullgraph(function, dtype):
    inputs = qkv(dtype)
    compiled = torch.compile(function, fullgraph=True)
    for eager, graph in zip(results(function, inputs), results(compiled, inputs), strict=True):
        equal(eager, graph)


@pytest.mark.filterwarnings("ignore")
def test_compile_without_gradients_and_with_other_lengths():
    compiled = torch.compile(chosen, fullgraph=True, dynamic=True)
    with torch.no_grad():
        equal(compiled(*qkv()), chosen(*qkv()))

    @torch.compile(fullgraph=True, dynamic=True)
    def of_length(q, k, v, cu):
        return fsa_rs.dense_attn_varlen_func(q, k, v, cu, cu)

    for n in (17, 30, 61):
        q, k, v = (torch.randn(n, heads, 16) for heads in (4, 2, 2))
        cu = torch.tensor([0, n], dtype=torch.int32)
        equal([of_length(q, k, v, cu)], [fsa_rs.dense_attn_varlen_func(q, k, v, cu, cu)])


def test_compile_may_be_the_first_use():
    code = """
import fsa_rs, torch
@torch.compile(fullgraph=True, backend="aot_eager")
def f(x, cu):
    return fsa_rs.dense_attn_varlen_func(x, x, x, cu, cu)
x = torch.ones(4, 1, 8, requires_grad=True)
f(x, torch.tensor([0, 4], dtype=torch.int32)).sum().backward()
print(x.grad.shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([4, 1, 8])" in done.stdout


def strided(x):
    """The same numbers in memory of another order, with gaps."""
    memory = torch.full((x.shape[1], x.shape[2] + 3, x.shape[0], 2), float("nan"), dtype=x.dtype)
    view = memory[:, : x.shape[2], :, 0].permute(2, 0, 1)
    return view.copy_(x).detach().requires_grad_()


@pytest.mark.parametrize("function", DIFFERENTIABLE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_change_no_bit(function, dtype):
    inputs = [x.detach() for x in qkv(dtype)]
    plain = results(function, [x.clone().requires_grad_() for x in inputs])
    other = [strided(x) for x in inputs]
    assert not any(x.is_contiguous() for x in other)
    for a, b in zip(plain, results(function, other), strict=True):
        equal(a, b)


def test_gradients_of_any_layout_are_taken():
    q, k, v = qkv()
    out, _ = selected(q, k, v)
    one = torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)
    expanded = torch.autograd.grad(out, (q, k, v), torch.ones(()).expand(out.shape), retain_graph=True)
    turned = torch.ones(out.shape[::-1]).permute(2, 1, 0)
    equal(one, expanded)
    equal(one, torch.autograd.grad(out, (q, k, v), turned))


@pytest.mark.parametrize("function", DIFFERENTIABLE)
def test_repetitions_are_bitwise_equal(function):
    first = results(function, qkv())
    for _ in range(5):
        for a, b in zip(first, results(function, qkv()), strict=True):
            equal(a, b)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_numpy_and_torch_agree_bit_for_bit(function, monkeypatch):
    tensors = function(*qkv(grad=False))
    for name in ("CU_Q", "CU_K", "IDS", "GATES"):
        monkeypatch.setitem(globals(), name, globals()[name].numpy())
    arrays = function(*(x.numpy() for x in qkv(grad=False)))
    for tensor, array in zip(tensors, arrays, strict=True):
        assert (tensor.numpy() == array).all() and tensor.numpy().dtype == array.dtype


@pytest.mark.parametrize("function", FUNCTIONS)
def test_shapes_follow_from_shapes_alone(function, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = function(*qkv())
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        for name in ("CU_Q", "CU_K", "IDS", "GATES"):
            monkeypatch.setitem(globals(), name, mode.from_tensor(globals()[name]))
        fake = function(*(mode.from_tensor(x.detach()).requires_grad_() for x in qkv()))  # would fail at .item()
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride(), a.requires_grad) == (b.shape, b.dtype, b.stride(), b.requires_grad)


def test_only_what_needs_a_gradient_keeps_state():
    q, k, v = qkv(grad=False)
    assert not selected(q, k, v)[0].requires_grad and not nsa(q, k, v, rope_theta=None)[1].requires_grad
    k.requires_grad_()
    nsa(q, k, v)[0].sum().backward()
    assert k.grad is not None and q.grad is None
    with torch.no_grad():
        assert not nsa(q, k, v)[0].requires_grad
    with pytest.raises(RuntimeError, match="kept no state"):
        torch.ops.fsa_rs.nsa(
            *qkv(), CU_Q, CU_K, GATES, *[None] * 4, [16, 8, 16, 4, 1, 2, 8, 0], None, None, False, False, "none"
        )[0].sum().backward()


@pytest.mark.parametrize("rope_theta", [None, 1e4])
def test_what_is_computed_again_is_not_kept_and_gives_the_same_gradients(rope_theta):
    results, kept = {}, {}
    for recompute in ("none", "rotated", "all"):
        leaves = qkv()
        gates = GATES.clone().requires_grad_()
        options = {"window_size": 8, "rope_theta": rope_theta, "recompute": recompute, **SIZES}
        out = fsa_rs.nsa_attn_varlen_func(*leaves, gates, CU_Q, CU_K, **options)
        kept[recompute] = out.grad_fn.saved_tensors[-1].nbytes
        results[recompute] = torch.autograd.grad(out.square().sum(), (*leaves, gates))
        assert all(map(torch.equal, results[recompute], results["none"]))
    q, k, _ = leaves
    assert kept["all"] == 0 and kept["none"] - kept["rotated"] == (q.nbytes + k.nbytes if rope_theta else 0)
    with pytest.raises(ValueError, match="recompute: expected 'none', 'rotated' or 'all', got 'q'"):
        fsa_rs.nsa_attn_varlen_func(*leaves, gates, CU_Q, CU_K, recompute="q")


def test_a_second_derivative_is_refused():
    q, k, v = qkv()
    (grad,) = torch.autograd.grad(selected(q, k, v)[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"autograd|differentiate|does not require grad"):
        torch.autograd.grad(grad.sum(), k)


def test_layout_of_ids():
    q, k, v = qkv(grad=False)
    swapped = IDS.transpose(0, 1).contiguous()
    other = fsa_rs.selected_attn_varlen_func(q, k, v, swapped, 16, CU_Q, CU_K, layout="ths", return_lse=True)
    equal(selected(q, k, v), other)
    hts = nsa(q, k, v, layout="hts")[1]
    assert hts.shape == (2, 49, 4)
    equal([hts], [nsa(q, k, v, layout="ths")[1].transpose(0, 1)])


def call(**changes):
    q, k, v = qkv()
    given = {"q": q, "k": k, "v": v, "topk_indices": IDS, "block_size": 16, "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
    return fsa_rs.selected_attn_varlen_func(**{**given, **changes})


ERRORS = [
    ({"q": qkv(torch.float64)[0]}, NotImplementedError, "dtype of q is not supported: got float64"),
    ({"k": qkv(torch.float16)[1]}, ValueError, "k: expected dtype float32, got dtype float16"),
    ({"block_size": 17}, ValueError, "block_size: expected one of"),
    ({"cu_seqlens_q": CU_Q.long()}, ValueError, "cu_seqlens_q: expected dtype int32, got dtype int64"),
    ({"topk_indices": IDS.long()}, ValueError, "topk_indices: expected dtype int32"),
    ({"topk_indices": IDS * 0 + 77, "validate": True}, ValueError, r"topk_indices: .* got 77 in row"),
    ({"v": qkv()[2][:5]}, ValueError, "v: expected shape"),
    ({"q": qkv()[0][0]}, ValueError, "q: expected"),
    (
        {"k": qkv(grad=False)[1].numpy()},
        TypeError,
        "k: expected torch.Tensor, as the first argument, got numpy.ndarray",
    ),
    ({"k": None}, TypeError, "k: expected torch.Tensor, as the first argument, got NoneType"),
    ({"cu_seqlens_k": None}, TypeError, "cu_seqlens_k: expected torch.Tensor, as the first argument, got NoneType"),
    ({"q": [1.0]}, TypeError, "q: expected numpy.ndarray or torch.Tensor, got list"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), ERRORS)
def test_errors_name_the_argument(changes, kind, message):
    with pytest.raises(kind, match=message):
        call(**changes)
