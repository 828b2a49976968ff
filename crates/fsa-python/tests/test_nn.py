"""The layer against a plain PyTorch program in f64, and as a module of PyTorch."""

import copy
import io
import os
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the tests of the layer need torch")

import fsa_rs.nn  # noqa: E402
from fsa_rs.nn import FlashSparseAttention, RopeConfig  # noqa: E402
from reference import Case  # noqa: E402
from torch_reference import DTYPES, Arithmetic, attend, check, compress, rotate  # noqa: E402

HIDDEN, DIM, GEOMETRY, BLOCK, TOPK, WINDOW = 24, 16, (16, 8), 16, 4, 20
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPE = RopeConfig(head_dim=DIM, rope_theta=100.0, rope_scaling=LLAMA3)
#: The third sequence is shorter than a compressed window, the second is empty.
LENGTHS = (70, 0, 9, 100)
CU = torch.tensor([0, 70, 70, 79, 179], dtype=torch.int32)

# As the original's layer has them; read from its source.
NAMES = [
    "compress_key",
    "compress_value",
    "intra_block_pe",
    "proj_q.weight",
    "proj_k.weight",
    "proj_v.weight",
    "proj_o.weight",
    "gate.0.weight",
]


def layer(heads=(6, 2), seed=0, **options):
    arguments = {
        "hidden_size": HIDDEN,
        "num_q_heads": heads[0],
        "num_kv_heads": heads[1],
        "head_dim": DIM,
        "kernel_size": GEOMETRY[0],
        "kernel_stride": GEOMETRY[1],
        "block_size": BLOCK,
        "topk": TOPK,
        "init_blocks": 1,
        "local_blocks": 2,
        "window_size": WINDOW,
        "rope_config": ROPE,
    }
    torch.manual_seed(seed)
    return FlashSparseAttention(**{**arguments, **options})


def tokens(dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(LENGTHS), HIDDEN, generator=generator).to(dtype)


def llama3(dim, theta):
    """Factors of the frequencies, written down from the description of Llama 3.1."""
    low, high = (LLAMA3["original_max_position_embeddings"] / LLAMA3[f"{name}_freq_factor"] for name in ("low", "high"))
    factors = []
    for k in range(dim // 2):
        wavelength = 2 * np.pi * theta ** (2 * k / dim)
        smooth = (LLAMA3["original_max_position_embeddings"] / wavelength - 1.0) / (4.0 - 1.0)
        middle = (1 - smooth) / LLAMA3["factor"] + smooth
        factors.append(1.0 if wavelength < high else 1 / LLAMA3["factor"] if wavelength > low else middle)
    assert len(set(factors)) > 3  # all three kinds
    return np.array(factors)


def choose(case, q, k_cmp, scale, first_head):
    """Chosen blocks, and the smallest distance between the score of one that is and one that is not."""
    group, steps = case.heads[0] // case.heads[1], (BLOCK // GEOMETRY[1], GEOMETRY[0] // GEOMETRY[1])
    mask = torch.from_numpy(case.compressed(*GEOMETRY)[0])
    counts = case.windows(*GEOMETRY)
    ids = np.full((case.heads[1], len(q), TOPK), -1, np.int32)
    margin = np.inf
    for kv in range(case.heads[1]):
        voters = range(kv * group, kv * group + (1 if first_head else group))
        weights = sum((q[:, head] @ k_cmp[:, kv].T * scale).masked_fill(~mask, -1e300).softmax(1) for head in voters)
        weights = (weights * mask).numpy()
        row = first = 0
        for positions, count in zip(case.positions(), counts, strict=True):
            for position in positions:
                own = position // BLOCK
                near = range(max(0, own - 1), own + 1)
                score = np.zeros(own + 1)
                for j in range(own + 1):
                    for at in (j * steps[0] + m - n for m in range(steps[0]) for n in range(steps[1])):
                        score[j] += weights[row, first + at] if 0 <= at < count else 0
                score[[0, *near]] = np.inf
                order = sorted(range(own + 1), key=lambda j: -score[j])  # stable: ties to the lower id
                kept, left = order[:TOPK], order[TOPK:]
                ids[kv, row, : len(kept)] = sorted(kept)
                if left and np.isfinite(score[kept[-1]]):
                    margin = min(margin, score[kept[-1]] - score[left[0]])
                row += 1
            first += count
    return ids, margin


class Definition:
    """The layer as a plain program. It chooses blocks itself, or takes ``chosen``."""

    def __init__(self, heads, rope=True, first_head=False, chosen=None):
        self.case = Case(q_lens=LENGTHS, k_lens=LENGTHS, heads=heads, dims=(DIM, DIM))
        self.rope, self.first_head, self.chosen, self.margin = rope, first_head, chosen, None

    def rotate(self, at, x, positions):
        if not self.rope:
            return x
        return rotate(at, x, positions, ROPE.rope_theta, llama3(DIM, ROPE.rope_theta))

    def __call__(self, at, x, compress_key, compress_value, pe, *matrices):
        case, scale = self.case, DIM**-0.5
        to_q, to_k, to_v, to_out, gate = (at.load(matrix).T for matrix in matrices)
        rows = at.load(x)
        q, k, v = (at.stored(rows @ matrix).unflatten(1, (-1, DIM)) for matrix in (to_q, to_k, to_v))
        k_cmp = compress(at, case, k, GEOMETRY, compress_key, pe)
        v_cmp = compress(at, case, v, GEOMETRY, compress_value, None)
        q = self.rotate(at, q, case.positions())
        k = self.rotate(at, k, case.positions())
        k_cmp = self.rotate(at, k_cmp, [range(0, n * GEOMETRY[1], GEOMETRY[1]) for n in case.windows(*GEOMETRY)])
        if self.chosen is None:
            with torch.no_grad():
                self.chosen, self.margin = choose(case, q.double(), k_cmp.double(), scale, self.first_head)
        branches = (
            attend(at, q, k_cmp, v_cmp, case.compressed(*GEOMETRY), scale)[0],
            attend(at, q, k, v, case.selected(self.chosen, BLOCK), scale)[0],
            attend(at, q, k, v, case.window(WINDOW), scale)[0],
        )
        weights = at.stored(torch.sigmoid(at.stored(rows @ gate)))
        out = at.stored(sum(branch * weights[:, None, i, None] for i, branch in enumerate(branches)))
        return (at.stored(out.flatten(1) @ to_out),)


@pytest.fixture
def chosen(monkeypatch):
    """Blocks that the layer chose in its last call."""
    kept, function = [], fsa_rs.nsa_attn_varlen_func

    def recorded(*arguments, **options):
        out, ids = function(*arguments, **options, return_topk_indices=True)
        kept[:] = [ids.numpy()]
        return out

    monkeypatch.setattr(fsa_rs.nn, "nsa_attn_varlen_func", recorded)
    return kept


def numbers(heads, dtype):
    """Token vectors and parameters that ``dtype`` holds, large enough for logits that differ."""
    module = layer(heads)
    generator = torch.Generator().manual_seed(7)
    sizes = {"compress_key": 0.1, "compress_value": 0.1, "intra_block_pe": 0.5}
    values = [
        torch.randn(value.shape, generator=generator) * sizes.get(name, 0.25)
        for name, value in module.state_dict().items()
    ]
    return [x.to(DTYPES[dtype]).double() for x in (tokens(), *values)]


def caller(module):
    """The layer as a function of its input and parameters."""
    return lambda x, *values: (torch.func.functional_call(module, dict(zip(NAMES, values, strict=True)), (x, CU)),)


def compare(module, definition, dtype, chosen):
    inputs = numbers(definition.case.heads, dtype)
    call = caller(module)
    if dtype == "float32":
        definition(Arithmetic(None), *inputs)
        assert definition.margin > 1e-5, "no test of the choice: too close to be decided in f32"
    else:
        call(*(x.to(DTYPES[dtype]) for x in inputs))
        definition.chosen = chosen[0]
    check(call, definition, inputs, dtype)
    np.testing.assert_array_equal(chosen[0], definition.chosen)
    assert (chosen[0] >= 0).all(axis=2).any(), "no row has more blocks than it may take"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(6, 2), (5, 1), (14, 2), (3, 3)])
def test_output_and_gradients_of_every_parameter(heads, dtype, chosen):
    compare(layer(heads, dtype=DTYPES[dtype]), Definition(heads), dtype, chosen)


def test_scores_of_the_first_head(chosen):
    compare(layer(score_heads="first_head"), Definition((6, 2), first_head=True), "float32", chosen)
    first = chosen[0]
    caller(layer())(*(x.float() for x in numbers((6, 2), "float32")))
    assert (first != chosen[0]).any()


def test_scaling_of_the_rotary_embedding():
    plain, named = (RopeConfig(8, DIM, 100.0, scaling) for scaling in (None, {"type": "default"}))
    inputs = [x.float() for x in numbers((6, 2), "float32")]
    default, same, other = (caller(layer(rope_config=config))(*inputs)[0] for config in (plain, named, ROPE))
    assert torch.equal(default, same)
    assert not torch.allclose(default, other, atol=1e-3)


def test_without_a_rotary_embedding(chosen):
    module, definition = layer(rope_config=None), Definition((6, 2), rope=False)
    inputs = numbers((6, 2), "float32")
    (exact,) = definition(Arithmetic(None), *inputs)
    (out,) = caller(module)(*(x.float() for x in inputs))
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)


def test_sequences_do_not_see_each_other():
    module, x = layer(dtype=torch.float32), tokens()
    packed = module(x, CU)
    for begin, end in zip(CU[:-1].tolist(), CU[1:].tolist(), strict=True):
        alone = module(x[begin:end], torch.tensor([0, end - begin]))
        torch.testing.assert_close(packed[begin:end], alone, rtol=1e-5, atol=1e-6)
    assert module(x[:0], torch.tensor([0], dtype=torch.int32)).shape == (0, HIDDEN)


def test_state_dict():
    expected = [(2, 256, 16), (2, 256, 16), (2, 16, 16), (96, 24), (32, 24), (32, 24), (24, 96), (3, 24)]
    state = layer().state_dict()
    assert list(state) == NAMES
    assert [tuple(value.shape) for value in state.values()] == expected
    assert [name for name, _ in layer().named_parameters()] == NAMES and not list(layer().buffers())


def test_a_checkpoint_of_another_layer_loads():
    state = {name: torch.randn(value.shape) for name, value in layer().state_dict().items()}
    module = layer(seed=5)
    assert not any(module.load_state_dict(state, strict=True))
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name])
    with pytest.raises(RuntimeError, match=r"rope\.inv_freq"):
        module.load_state_dict({**state, "rope.inv_freq": torch.ones(8)}, strict=True)


def test_initial_values_are_drawn_as_the_original_draws_them():
    torch.manual_seed(11)
    sizes = ((HIDDEN, 96), (HIDDEN, 32), (HIDDEN, 32), (96, HIDDEN), (HIDDEN, 3))
    matrices = [torch.nn.Linear(*size, bias=False).weight for size in sizes]
    values = [torch.zeros(2, 256, 16), torch.zeros(2, 256, 16), torch.zeros(2, 16, 16), *matrices]
    for value in values:
        torch.nn.init.xavier_uniform_(value)
    for parameter, value in zip(layer(seed=11).parameters(), values, strict=True):
        assert torch.equal(parameter, value)


def step(module, x=None, cu=CU):
    """Output and gradients."""
    x = tokens(module.proj_q.weight.dtype) if x is None else x
    x = x.detach().clone().requires_grad_()
    out = module(x, cu)
    out.float().square().sum().backward()
    grads = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    return [out.detach(), x.grad, *grads]


def equal(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y) and x.dtype == y.dtype


def test_bfloat16_as_the_original_example_makes_it():
    module = layer().to(torch.bfloat16)
    results = step(module)
    assert all(x.dtype == torch.bfloat16 and x.isfinite().all() and x.abs().max() > 0 for x in results)


def test_prefix_sums_of_either_integer_dtype():
    equal(step(layer()), step(layer(), cu=CU.long()))


def test_copies_and_files():
    module = layer(score_heads="first_head")
    expected = step(module)
    equal(expected, step(copy.deepcopy(module)))
    whole, state = io.BytesIO(), io.BytesIO()
    torch.save(module, whole)
    torch.save(module.state_dict(), state)
    whole.seek(0)
    state.seek(0)
    loaded = torch.load(whole, weights_only=False)
    equal(expected, step(loaded))
    assert loaded.rope_config == ROPE and loaded.score_heads == "first_head"
    other = layer(seed=9, score_heads="first_head")
    other.load_state_dict(torch.load(state, weights_only=True))
    equal(expected, step(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore")
def test_compile_fullgraph(dtype):
    module = layer(dtype=dtype)
    # `mode` keeps the projections as they are: what is compiled around the operator may round elsewhere.
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    equal(step(module), step(compiled))


@pytest.mark.filterwarnings("ignore")
def test_compile_with_the_default_backend_and_other_lengths():
    module = layer()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for n in (50, 120, 179):
        x, cu = tokens()[:n], torch.tensor([0, 40, n], dtype=torch.int32)
        torch.testing.assert_close(compiled(x, cu), module(x, cu))


def test_autocast():
    module, half = layer(), layer(dtype=torch.bfloat16)
    half.load_state_dict(module.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = step(module)
    assert results[0].dtype == torch.bfloat16 and all(x.dtype == torch.float32 for x in results[1:])
    torch.testing.assert_close(results[0], step(half)[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    module = layer()
    plain = step(module)

    class Checkpointed(torch.nn.Module):
        proj_q, parameters, zero_grad = module.proj_q, module.parameters, module.zero_grad

        def forward(self, x, cu):
            return torch.utils.checkpoint.checkpoint(module, x, cu, use_reentrant=reentrant)

    equal(plain, step(Checkpointed()))


@pytest.mark.filterwarnings("ignore")
def test_it_can_be_exported():
    module = layer()
    tokens_of_any_number = ({0: torch.export.Dim("total")}, None)
    program = torch.export.export(module, (tokens(), CU), dynamic_shapes=tokens_of_any_number)
    lengths = torch.tensor([0, 70, 70, 79, 100], dtype=torch.int32)
    for x, cu in ((tokens(), CU), (tokens()[:100], lengths)):
        equal([program.module()(x, cu)], [module(x, cu)])


def test_only_what_requires_a_gradient_gets_one():
    module = layer()
    module.requires_grad_(False)
    module.intra_block_pe.requires_grad_(True)
    module(tokens(), CU).sum().backward()
    assert module.intra_block_pe.grad is not None and module.compress_key.grad is None
    with torch.no_grad():
        assert not module(tokens(), CU).requires_grad


CALLS = [
    (tokens().double(), CU, NotImplementedError, "dtype of x is not supported: got float64, supported: float32, bfloa"),
    (tokens().half(), CU, ValueError, "x: expected dtype float32, as the weights, got dtype float16"),
    (tokens()[None], CU, ValueError, r"x: expected shape \[total, 24\], got shape \[1, 179, 24\]"),
    (tokens()[:, :20], CU, ValueError, r"x: expected shape \[total, 24\], got shape \[179, 20\]"),
    (tokens().to("meta"), CU, ValueError, "x: expected a tensor on cpu, as the weights, got one on meta"),
    (tokens(), CU.to("meta"), ValueError, "cu_seqlens: expected a tensor on cpu, as x, got one on meta"),
    (tokens(), CU.float(), ValueError, r"cu_seqlens: expected int32 or int64 \[batch \+ 1\], got float32 \[5\]"),
    (tokens().numpy(), CU, TypeError, "x: expected torch.Tensor, got numpy.ndarray"),
    (tokens(), CU.tolist(), TypeError, "cu_seqlens: expected torch.Tensor, got list"),
    (tokens(), CU[None], ValueError, r"cu_seqlens: expected int32 or int64 \[batch \+ 1\], got int32 \[1, 5\]"),
    (tokens()[:100], CU, ValueError, "q: expected 179 rows, the last element of cu_seqlens_q, got 100 rows"),
]


def test_weights_in_float64_are_refused():
    with pytest.raises(NotImplementedError, match="dtype of the weights is not supported: got float64, supported: flo"):
        layer().double()(tokens(), CU)


@pytest.mark.parametrize(("x", "cu_seqlens", "kind", "message"), CALLS)
def test_errors_of_a_call_name_the_argument(x, cu_seqlens, kind, message):
    with pytest.raises(kind, match=message):
        layer()(x, cu_seqlens)


ARGUMENTS = [
    ({"num_q_heads": 5}, ValueError, "num_q_heads: expected a positive number .* of num_kv_heads 2, got 5 heads"),
    ({"head_dim": 20, "rope_config": None}, NotImplementedError, "head_dim is not supported: got 20, supported: mul"),
    ({"num_q_heads": 6.0}, TypeError, "num_q_heads: expected an integer, got 6.0"),
    ({"hidden_size": -24}, ValueError, "hidden_size: expected a non-negative integer, got -24"),
    ({"rope_config": {"rope_theta": 1e4}}, TypeError, "rope_config: expected RopeConfig or None, got dict"),
    ({"head_dim": 32}, ValueError, "rope_config.head_dim: expected 32, as head_dim, got 16"),
    ({"kernel_size": 20}, ValueError, "kernel_size: expected a positive multiple of kernel_stride 8, got 20"),
    ({"block_size": 48}, ValueError, "block_size: expected one of 16, 32, 64, 128, 256, got 48"),
    ({"topk": 2}, ValueError, r"topk: expected at least init_blocks \+ local_blocks = 3, and at least 1, got 2"),
    ({"window_size": -1}, ValueError, "window_size: expected a non-negative integer, got -1"),
    ({"score_heads": "all"}, ValueError, "score_heads: expected 'group_sum' or 'first_head', got 'all'"),
    (
        {"rope_config": RopeConfig(head_dim=DIM, rope_scaling={"rope_type": "yarn"})},
        NotImplementedError,
        "rope_type is not supported: got 'yarn', supported: 'default', 'llama3'",
    ),
    ({"rope_config": RopeConfig(head_dim=DIM, rope_theta=0.0)}, ValueError, "rope_theta: expected a positive number"),
    (
        {"rope_config": RopeConfig(head_dim=DIM, rope_scaling={**LLAMA3, "original_max_position_embeddings": 0})},
        ValueError,
        r"rope_scaling\['original_max_position_embeddings'\]: expected at least 1, got 0",
    ),
]


@pytest.mark.parametrize(("changes", "kind", "message"), ARGUMENTS)
def test_errors_of_an_argument_come_before_any_tensor(changes, kind, message):
    with pytest.raises(kind, match=message):
        layer(**changes)


def test_defaults_of_the_rotary_embedding_are_those_of_llama_3_1():
    config = RopeConfig()
    assert (config.max_position_embeddings, config.head_dim, config.rope_theta) == (131072, 128, 500000)
    assert config.rope_scaling == {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    assert RopeConfig().rope_scaling is not config.rope_scaling


def test_the_layer_is_found_without_an_import_of_its_own():
    code = "import fsa_rs, sys; assert 'torch' not in sys.modules; print(fsa_rs.nn.FlashSparseAttention.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.stdout.strip() == "FlashSparseAttention", done.stderr
