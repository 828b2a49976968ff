"""Plain calls leave operators out: the same bits, and only where nothing looks at operators."""

import pytest

torch = pytest.importorskip("torch", reason="the tests of the PyTorch operators need torch")

import fsa_rs  # noqa: E402
from fsa_rs import _torch, _torch_nsa, _torch_operator  # noqa: E402
from test_torch_operators import CU_K, DIFFERENTIABLE, chosen, compressed, equal, qkv, results, selected  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

OPERATORS = {
    name: operator
    for module in (_torch, _torch_nsa)
    for name, operator in vars(module).items()
    if isinstance(operator, _torch_operator.Operator)
}


@pytest.fixture
def called(monkeypatch):
    """Names of the operators that were called."""
    names = []

    def noting(name, operator):
        def call(*arguments):
            names.append(name)
            return operator(*arguments)

        return call

    for name, operator in OPERATORS.items():
        monkeypatch.setattr(operator, "operator", noting(name, operator.operator))
    return names


def test_all_operators_are_known():
    assert len(OPERATORS) == 7


@pytest.mark.parametrize("function", DIFFERENTIABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_give_the_same_bits(function, dtype, called, monkeypatch):
    plain = results(function, qkv(dtype))
    assert not called
    monkeypatch.setattr(_torch_operator, "_observed", lambda: True)
    for a, b in zip(plain, results(function, qkv(dtype)), strict=True):
        equal(a, b)
    assert any(name.endswith("BACKWARD") for name in called) and not all(name.endswith("BACKWARD") for name in called)


def test_compression_of_one_side_computes_no_more(called):
    _, k, v = qkv()
    weight = torch.ones(2, 16).requires_grad_()
    for needed in ((k,), (v,), (weight,), (k, weight)):
        given = [x if any(x is y for y in needed) else x.detach() for x in (k, v, weight)]
        k_cmp, v_cmp, cu = fsa_rs.compress_kv(*given[:2], CU_K, 16, 8, k_weight=given[2])
        assert not cu.requires_grad
        grads = torch.autograd.grad(sum(x.sum() for x in (k_cmp, v_cmp) if x.requires_grad), needed)
        assert all(grad.shape == x.shape for grad, x in zip(grads, needed, strict=True))
    assert not called


def test_modes_see_operators(called):
    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            return operator(*args, **(kwargs or {}))

    plain = [x.detach() for x in selected(*qkv())]
    for mode in (Functions(), Operators()):
        with mode:
            equal(plain, [x.detach() for x in selected(*qkv())])
        assert called.pop() == "_ATTENTION" and not called
    q, k, v = qkv()
    out = selected(q, k, v)[0]
    with Operators():
        torch.autograd.grad(out.sum(), (q, k, v))
    assert called == ["_ATTENTION_BACKWARD"]


def test_fake_tensors_and_other_devices_take_operators(called):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x.detach()) for x in qkv()]
        selected(*fake)
    assert called.pop() == "_ATTENTION"
    selected(*fake)  # the mode has ended
    assert called.pop() == "_ATTENTION" and not called


class Subclass(torch.Tensor):
    pass


def test_subclasses_take_operators(called):
    q, k, v = qkv(grad=False)
    out, lse = selected(q.as_subclass(Subclass), k, v)
    assert called.pop() == "_ATTENTION" and not called
    equal([out.as_subclass(torch.Tensor), lse.as_subclass(torch.Tensor)], selected(q, k, v))
    selected(*(torch.nn.Parameter(x) for x in (q, k, v)))[0].sum().backward()
    assert not called


def test_a_negated_view_is_read_as_what_it_stands_for(called):
    q, k, v = qkv(grad=False)
    negated = torch._neg_view(q)
    equal(selected(negated, k, v), selected(q.neg(), k, v))
    assert called == ["_ATTENTION"]


@pytest.mark.filterwarnings("ignore")  # that it is a loop
def test_a_map_over_batches_takes_the_operator(called):
    q, k, v = qkv(grad=False)
    batches = torch.stack([q, 2 * q])
    out, lse = torch.func.vmap(lambda q: selected(q, k, v))(batches)
    assert called == ["_ATTENTION"]
    for at, batch in enumerate(batches):
        equal([out[at], lse[at]], selected(batch, k, v))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, lambda f: lambda q: torch.func.vjp(f, q)])
@pytest.mark.parametrize("batches", [False, True])
def test_gradients_of_transforms_are_refused(transform, batches):
    q, k, v = qkv(grad=False)
    differentiated = transform(lambda q: selected(q, k, v)[0].square().sum())
    with pytest.raises(NotImplementedError, match=r"attention: .* of torch.func are not supported: use torch.autograd"):
        torch.func.vmap(differentiated)(torch.stack([q, q])) if batches else differentiated(q)


@pytest.mark.filterwarnings("ignore")  # of PyTorch's own decompositions
def test_tangents_are_refused(called):
    q, k, v = qkv(grad=False)
    with forward_ad.dual_level():
        plain = selected(q, k, v)
        with pytest.raises(NotImplementedError, match="attention: expected tensors without tangents"):
            selected(forward_ad.make_dual(q, torch.ones_like(q)), k, v)
    assert called == ["_ATTENTION"]
    equal(plain, selected(q, k, v))


@pytest.mark.filterwarnings("ignore")
def test_compiled_calls_hold_operators():
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    for function, operator in ((selected, "attention"), (compressed, "compress"), (chosen, "select")):
        torch.compile(function, fullgraph=True, backend=backend)(*qkv())
        assert f"fsa_rs.{operator}.default" in graphs.pop()


def test_a_gradient_that_is_to_be_differentiated_takes_the_operator(called):
    q, k, v = qkv()
    torch.autograd.grad(selected(q, k, v)[0].square().sum(), q, create_graph=True)
    assert called == ["_ATTENTION_BACKWARD"]


def test_inputs_that_change_before_the_backward_are_refused():
    q, k, v = qkv()
    leaf = q.clone()
    out = selected(leaf, k, v)[0]
    leaf.data.zero_()  # unseen
    with torch.no_grad():
        leaf.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
