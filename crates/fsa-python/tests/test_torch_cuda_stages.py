"""All functions on CUDA tensors: against f64, in any layout, in graphs, compiled. Needs a GPU."""

import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the tests of the PyTorch operators need torch")

import fsa_rs  # noqa: E402
import gpu  # noqa: E402
from fsa_rs import _native  # noqa: E402
from fsa_rs.check import definition  # noqa: E402
from fsa_rs.nn import FlashSparseAttention, RopeConfig  # noqa: E402
from gpu import BLOCK, FUNCTIONS, GEOMETRY, SIZES, THETA, WINDOW, Setting, case_of, equal, everything, late  # noqa: E402
from torch_reference import attend, check, compress, rotate  # noqa: E402

pytestmark = gpu.needs_gpu

DIMS = [(64, 64), (96, 96), (128, 128), (192, 192), (256, 256)]
OTHER_DIMS = [(16, 24), (40, 64), (72, 40), (136, 136), (256, 8)]


def on_gpu(function):
    """The function on the GPU, for inputs and results on the CPU."""
    return lambda *inputs: tuple(x.cpu() for x in function(*(x.to(gpu.DEVICE) for x in inputs)))


def hold_attention(setting, name):
    case, masks = setting.case, {"dense": "dense", "window": "window", "compressed": "compressed"}
    arguments = {"dense": (), "window": (WINDOW,), "compressed": GEOMETRY}[name]
    mask = getattr(case, masks[name])(*arguments)
    check(
        on_gpu(getattr(setting, name)),
        lambda at, q, k, v: attend(at, q, k, v, mask, setting.scale),
        setting.inputs(FUNCTIONS[name]),
        setting.dtype,
    )
    if name == "compressed":
        hold_choice(setting)


def hold_choice(setting):
    """The blocks that the last call of compressed attention chose."""
    case, (q, k_cmp) = setting.case, (x.numpy() for x in setting.inputs(("q", "k_cmp")))
    batch = definition.Batch(case.q_lens, case.k_lens)
    sizes = {**SIZES, "init_blocks": 1, "local_blocks": 2}
    scores = definition.block_scores(batch, q, k_cmp, sizes, setting.scale)
    assert definition.misplaced(batch, setting.ids.cpu().numpy(), scores, sizes) < 1e-4


def hold_compress(setting, *names):
    def got(*inputs):
        (out,) = setting.compress(*inputs)
        assert not out[setting.rows :].any()
        return (out[: setting.rows],)

    check(
        on_gpu(got),
        lambda at, k, weight=None, position=None: (compress(at, setting.case, k, GEOMETRY, weight, position),),
        setting.inputs(("k", *names)),
        setting.dtype,
    )


def hold_nsa(setting, gates="gates", values="weighted", **options):
    """The whole operation, with the blocks that the GPU chose."""
    case, scale = setting.case, setting.scale

    def exact(at, q, k, v, gates, linear, position, value_weight):
        k_cmp = compress(at, case, k, GEOMETRY, linear, position)
        v_cmp = compress(at, case, v, GEOMETRY, value_weight, None)
        starts = [range(0, n * GEOMETRY[1], GEOMETRY[1]) for n in case.windows(*GEOMETRY)]
        places = (case.positions(), [range(n) for n in case.k_lens], starts)
        q, k, k_cmp = (rotate(at, x, place, THETA) for x, place in zip((q, k, k_cmp), places, strict=True))
        branches = (
            attend(at, q, k_cmp, v_cmp, case.compressed(*GEOMETRY), scale)[0],
            attend(at, q, k, v, case.selected(setting.ids.cpu().numpy(), BLOCK), scale)[0],
            attend(at, q, k, v, case.window(WINDOW), scale)[0],
        )
        weights = at.load(gates if gates.ndim == 3 else gates[:, None])
        return (at.stored(sum(branch * weights[..., i, None] for i, branch in enumerate(branches))),)

    def got(q, k, v, gates, linear, position, value_weight):
        given = {"weighted": value_weight} if value_weight.ndim == 2 else {"value_linear": value_weight}
        return setting.nsa(q, k, v, gates, linear, position, **given, **options)

    inputs = setting.inputs(("q", "k", "v", gates, "linear", "position", values))
    on_gpu(got)(*(x.to(getattr(torch, setting.dtype)) for x in inputs))  # chooses the blocks
    check(on_gpu(got), exact, inputs, setting.dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("name", ["dense", "window", "compressed"])
def test_attention_in_the_dimensions_of_the_kernels(name, dims, dtype):
    hold_attention(Setting(case_of(dims=dims), dtype), name)


@pytest.mark.parametrize("dims", OTHER_DIMS)
@pytest.mark.parametrize("name", ["dense", "window", "compressed"])
def test_attention_in_padded_dimensions(name, dims):
    hold_attention(Setting(case_of(dims=dims)), name)


@pytest.mark.parametrize("group", [1, 2, 5, 7, 16])
@pytest.mark.parametrize("name", ["window", "compressed"])
def test_groups(name, group):
    hold_attention(Setting(case_of(heads=(2 * group, 2))), name)


@pytest.mark.parametrize("scale", [-0.25, 0.0, 3.0])
@pytest.mark.parametrize("name", ["window", "compressed"])
def test_scales(name, scale):
    hold_attention(Setting(scale=scale), name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("dim", [64, 128, 256, 40, 136])
@pytest.mark.parametrize("names", [(), ("weighted",), ("linear",), ("linear", "position")])
def test_compress(names, dim, dtype):
    hold_compress(Setting(case_of(dims=(dim, dim)), dtype), *names)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (40, 24), (192, 64)])
def test_nsa(dims, dtype):
    hold_nsa(Setting(case_of(dims=dims), dtype))


@pytest.mark.parametrize(("gates", "values"), [("shared_gates", "weighted"), ("gates", "value_linear")])
@pytest.mark.parametrize("deterministic", [False, True])
def test_nsa_with_other_parameters(gates, values, deterministic):
    hold_nsa(Setting(case_of(heads=(5, 1))), gates, values, deterministic=deterministic)


@pytest.mark.parametrize("scale", [-0.25, 0.5])
def test_nsa_with_other_scales(scale):
    hold_nsa(Setting(scale=scale))


def test_topk_blocks_are_those_of_compressed_attention():
    setting = Setting()
    q, k_cmp, v_cmp = setting.inputs(("q", "k_cmp", "v_cmp"), gpu.DEVICE)
    setting.compressed(q, k_cmp, v_cmp)
    options = {**SIZES, "softmax_scale": setting.scale}
    assert torch.equal(setting.ids, fsa_rs.topk_blocks(q, k_cmp, *setting.cu, **options))
    swapped = fsa_rs.topk_blocks(q, k_cmp, *setting.cu, **options, layout="ths")
    assert torch.equal(setting.ids, swapped.transpose(0, 1))
    first = fsa_rs.topk_blocks(q, k_cmp, *setting.cu, **options, score_heads="first_head")
    alone = q.detach()[:, ::3].contiguous()  # the first heads of two groups of three
    assert torch.equal(first, fsa_rs.topk_blocks(alone, k_cmp, *setting.cu, **options))


def test_prefix_sums_of_compressed_keys():
    setting = Setting()
    k, v = setting.inputs(("k", "v"), gpu.DEVICE)
    cu = fsa_rs.compress_kv(k, v, setting.cu[1], *GEOMETRY)[2]
    np.testing.assert_array_equal(np.diff(cu.cpu().numpy()), setting.case.windows(*GEOMETRY))


KINDS = [(), ("weighted",), ("linear",), ("linear", "position")]


@pytest.mark.parametrize("other", KINDS)
@pytest.mark.parametrize("one", KINDS)
def test_keys_and_values_are_compressed_alike(one, other):
    """Where one can do with the scratch memory of the other, that has no part in the result."""
    setting = Setting()
    inputs = setting.inputs(("k", *one, "v", *other), gpu.DEVICE)
    (k, *k_weights), (v, *v_weights) = inputs[: 1 + len(one)], inputs[1 + len(one) :]

    def both(a, a_weights, b, b_weights):
        weights = dict(zip(("k_weight", "k_position"), a_weights, strict=False))
        weights.update(zip(("v_weight", "v_position"), b_weights, strict=False))
        a_cmp, b_cmp, cu = fsa_rs.compress_kv(a, b, setting.cu[1], *GEOMETRY, **weights)
        return a_cmp, b_cmp, cu, torch.autograd.grad(a_cmp.square().sum() + b_cmp.square().sum(), inputs)

    k_cmp, v_cmp, cu, grads = both(k, k_weights, v, v_weights)
    v_again, k_again, cu_again, grads_again = both(v, v_weights, k, k_weights)
    equal((k_cmp, v_cmp, cu, *grads), (k_again, v_again, cu_again, *grads_again))


class Described(torch.Tensor):
    """Of a type that PyTorch's table of functions does not describe: its attributes are asked."""


@pytest.mark.parametrize("layout", ["plain", "spread", "turned"])
def test_attributes_say_what_the_table_of_functions_says(layout):
    setting = Setting()
    moved = {"plain": lambda x: x, "spread": spread, "turned": turned}[layout]
    inputs = [moved(x).detach() for x in setting.inputs(("q", "k", "v"), gpu.DEVICE)]
    described = tuple(x.as_subclass(Described) for x in (*inputs, *setting.cu))
    found = _native.cuda_attention((WINDOW,), (*inputs, *setting.cu), setting.scale)
    asked = _native.cuda_attention((WINDOW,), described, setting.scale)
    equal(found, [x.as_subclass(torch.Tensor) for x in asked])
    side = torch.cuda.Stream(gpu.DEVICE)
    side.wait_stream(torch.cuda.current_stream(gpu.DEVICE))
    with torch.cuda.stream(side):
        aside = [x.clone() for x in _native.cuda_attention((WINDOW,), (*inputs, *setting.cu), setting.scale)]
    side.synchronize()
    equal(found, aside)


def spread(x):
    """The same numbers in other memory, with NaN in the gaps."""
    memory = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype, device=x.device)
    return memory[..., : x.shape[-1]].copy_(x.detach()).requires_grad_()


def turned(x):
    """The same numbers with the first two axes the other way round in memory."""
    return x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()


@pytest.mark.parametrize("layout", [spread, turned])
@pytest.mark.parametrize("dim", [64, 40])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_layouts_change_no_bit(name, dim, layout):
    setting = Setting(case_of(dims=(dim, dim)))
    inputs = [layout(x) for x in setting.inputs(FUNCTIONS[name], gpu.DEVICE)]
    equal(everything(setting, name), everything(setting, name, inputs))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_repetitions_are_bitwise_equal(name):
    setting = Setting(case_of(q_lens=(700,), k_lens=(700,), heads=(8, 2)))
    first = everything(setting, name)
    for _ in range(10):
        equal(first, everything(setting, name))


@pytest.mark.parametrize("lens", [(0,), (5,), (0, 0), (15, 3)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_few_or_no_tokens(name, lens):
    setting = Setting(case_of(q_lens=lens, k_lens=lens))
    for x in everything(setting, name):
        assert not x.isnan().any()


def test_what_nobody_sees_reaches_nothing():
    setting = Setting(case_of(q_lens=(30, 20), k_lens=(200, 100)))
    inputs = setting.inputs(FUNCTIONS["window"], gpu.DEVICE)
    plain = everything(setting, "window", inputs)
    with torch.no_grad():
        for x in inputs[1:]:
            x[:100] = float("nan")  # earlier than every window
            x[200:230] = float("inf")
    equal(plain, everything(setting, "window", inputs))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dim", [64, 40])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compile_fullgraph(name, dim):
    setting = Setting(case_of(dims=(dim, dim)))

    def pure(*inputs):
        outputs = getattr(setting, name)(*inputs)
        setting.ids = None  # no tensor of a compiled call outlives it
        return outputs

    equal(everything(setting, name), everything(setting, name, function=torch.compile(pure, fullgraph=True)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dim", [64, 40])
def test_opcheck(dim):
    setting = Setting(case_of(q_lens=(40, 9), k_lens=(40, 30), dims=(dim, dim)))
    names = ("q", "k", "v", "k_cmp", "v_cmp", "gates", "linear", "position", "weighted")
    q, k, v, k_cmp, v_cmp, gates, linear, position, weighted = setting.inputs(names, gpu.DEVICE)
    setting.dense(q, k, v)  # registers the operators
    ops, cu, sizes = torch.ops.fsa_rs, setting.cu, [*SIZES.values(), 1, 2, WINDOW, 0]
    compressing = (k, v, cu[1], linear, position, weighted, None, list(GEOMETRY))
    whole = (q, k, v, *cu, gates, linear, position, weighted, None, sizes, [THETA], -0.3, True)
    calls = [
        (ops.attention, (q, k, v, *cu, None, None, None, False)),
        (ops.attention, (q, k, v, *cu, -0.3, None, [WINDOW], False)),
        (ops.attention, (q, k_cmp, v_cmp, *cu, None, None, list(GEOMETRY), False)),
        (ops.select, (q, k_cmp, v_cmp, *cu, None, sizes, True)),
        (ops.compress, compressing),
        (ops.nsa, (*whole, True, "none")),
    ]
    with torch.no_grad():
        states = {recompute: ops.nsa(*whole, True, recompute) for recompute in ("none", "rotated", "all")}
        grads = [torch.ones_like(x) for x in ops.compress(*compressing)[:2]]

    def detached(values):
        return tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in values)

    calls.append((ops.compress_backward, (*detached(compressing), *grads)))
    calls.append((ops.compress_backward, (*detached(compressing), None, grads[1])))
    for recompute, (out, ids, state) in states.items():
        calls.append((ops.nsa_backward, (*detached(whole), ids, state, torch.ones_like(out), recompute)))
    for operator, arguments in calls:
        torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("dim", [64, 40])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_recorded_call_computes_on_new_data(name, dim):
    setting = Setting(case_of(dims=(dim, dim)))
    leaves = setting.inputs(FUNCTIONS[name], gpu.DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        weights = [torch.randn_like(x) for x in getattr(setting, name)(*leaves)]

    def whole():
        outputs = getattr(setting, name)(*leaves)
        return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]

    with torch.cuda.stream(side):
        for _ in range(2):
            whole()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = [x.detach() for x in whole()]  # lets go of nodes that belong to the stream of the recording
    for seed in range(2):
        generator = torch.Generator(device=gpu.DEVICE).manual_seed(seed)
        with torch.no_grad():
            for leaf in leaves:
                leaf.copy_(torch.randn(leaf.shape, generator=generator, device=gpu.DEVICE) * leaf.std())
        graph.replay()
        torch.cuda.synchronize()
        equal(recorded, [x.detach() for x in whole()])


@pytest.mark.filterwarnings("ignore")  # PyTorch calls its detection of waits a prototype
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_call_waits_for_nothing(name):
    setting = Setting()
    leaves = setting.inputs(FUNCTIONS[name], gpu.DEVICE)
    weights = [torch.randn_like(x) for x in getattr(setting, name)(*leaves)]

    def whole():
        outputs = getattr(setting, name)(*leaves)
        return torch.autograd.grad(outputs, leaves, weights)

    whole()  # plans and compiles
    assert gpu.waits_for_nothing(whole), "the host waited for the device"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_current_stream_is_used(name):
    setting = Setting()
    equal(everything(setting, name), late(setting, name))


def test_memory_of_the_whole_operation_is_bounded():
    n, heads = 16384, (8, 2)
    q, k, v = (torch.randn(n, h, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (8, 2, 2))
    gates = torch.rand(n, 3, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    cu = torch.tensor([0, n], device="cuda", dtype=torch.int32)
    lists, budget = heads[1] * n * 16 * 4, 256 << 20
    fsa_rs.nsa_attn_varlen_func(q, k, v, gates, cu, cu, rope_theta=1e4).sum().backward()
    torch.cuda.synchronize()

    def peak(call):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        return result, torch.cuda.max_memory_allocated() - before

    # Without a state: the result and the lists, and scratch memory.
    with torch.no_grad():
        _, bytes_used = peak(lambda: fsa_rs.nsa_attn_varlen_func(q, k, v, gates, cu, cu, rope_theta=1e4))
    assert bytes_used <= q.numel() * 2 + lists + budget + lists + (4 << 20)
    out, _ = peak(lambda: fsa_rs.nsa_attn_varlen_func(q, k, v, gates, cu, cu, rope_theta=1e4))
    grad, leaves = torch.ones_like(out), (q, k, v, gates)
    _, bytes_used = peak(lambda: torch.autograd.grad(out, leaves, grad))
    assert bytes_used <= sum(x.numel() * 2 for x in leaves) + budget + lists + (4 << 20)


@pytest.mark.parametrize("dim", [64, 40])
@pytest.mark.parametrize("rope_theta", [None, THETA])
def test_what_is_computed_again_is_not_kept_and_gives_the_same_gradients(dim, rope_theta):
    setting = Setting(case_of(q_lens=(140, 9), k_lens=(140, 130), dims=(dim, dim)))
    leaves = setting.inputs(("q", "k", "v", "gates", "linear", "position", "weighted"), gpu.DEVICE)
    q, k, v, gates, linear, position, weighted = leaves
    parameters = {"k_weight": linear, "k_position": position, "v_weight": weighted, "rope_theta": rope_theta}
    expected, kept = None, {}
    for recompute in ("none", "rotated", "all"):
        options = {**SIZES, "window_size": WINDOW, "deterministic": True, "recompute": recompute, **parameters}
        out = fsa_rs.nsa_attn_varlen_func(q, k, v, gates, *setting.cu, softmax_scale=-0.2, **options)
        kept[recompute] = out.grad_fn.saved_tensors[-1].nbytes
        found = (out, *torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view_as(out).to(out)))
        expected = expected or found
        assert all(map(torch.equal, found, expected))
    assert (kept["none"] > kept["rotated"]) == (rope_theta is not None)
    assert kept["rotated"] > kept["all"] == 0


def test_the_layer_computes_what_it_does_on_the_cpu():
    sizes = {"kernel_size": 32, "kernel_stride": 16, "block_size": 64, "topk": 16, "init_blocks": 1, "local_blocks": 2}
    torch.manual_seed(0)
    rope = RopeConfig(head_dim=64)
    host = FlashSparseAttention(128, 6, 2, 64, **sizes, window_size=512, rope_config=rope).to(torch.bfloat16)
    torch.manual_seed(0)
    device = FlashSparseAttention(128, 6, 2, 64, **sizes, window_size=512, rope_config=rope)
    device = device.to(gpu.DEVICE).to(torch.bfloat16)
    cu = torch.tensor([0, 300, 310, 700], dtype=torch.int32)  # every row sees all of its blocks: no choice differs
    x = torch.randn(700, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    results = []
    for module, where in ((host, "cpu"), (device, gpu.DEVICE)):
        y = module(x.to(where), cu.to(where))
        y.float().square().sum().backward()
        grads = [parameter.grad for parameter in module.parameters()]
        results.append([z.detach().cpu().float() for z in (y, *grads)])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 0.03 * a.norm()


def test_the_check_of_an_installation_passes():
    done = subprocess.run([sys.executable, "-m", "fsa_rs.check", "--device", "cuda"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed, 0 skipped: " in done.stdout


def changed(function, **changes):
    setting = Setting()
    names = {"compress_kv": ("k", "v"), "nsa_attn_varlen_func": ("q", "k", "v", "gates")}.get(function, ("q", "k", "v"))
    given = dict(zip(names, setting.inputs(names, gpu.DEVICE), strict=True))
    if function in ("topk_blocks", "compressed_attn_varlen_func"):
        given["k_cmp"], given["v_cmp"] = given.pop("k"), given.pop("v")
    if function == "topk_blocks":
        del given["v_cmp"]
    given |= {"cu_seqlens_q": setting.cu[0], "cu_seqlens_k": setting.cu[1]}
    if function == "compress_kv":
        del given["cu_seqlens_q"]
    made = {name: change(given.get(name)) for name, change in changes.items()}
    return getattr(fsa_rs, function)(**{**given, **made})


ERRORS = [
    ("dense_attn_varlen_func", {"q": lambda x: x.float()}, NotImplementedError, "dtype of q on CUDA .* got float32"),
    ("window_attn_varlen_func", {"v": lambda x: x.cpu()}, ValueError, "v: expected a tensor on cuda:0, as q, got one"),
    ("topk_blocks", {"topk": lambda _: 80}, NotImplementedError, "topk on CUDA is not supported: got 80"),
    ("topk_blocks", {"topk": lambda _: 2}, ValueError, "topk: expected at least init_blocks"),
    ("compressed_attn_varlen_func", {"v_cmp": lambda x: x[:5]}, ValueError, "v_cmp: expected shape"),
    ("compressed_attn_varlen_func", {"kernel_size": lambda _: 17}, ValueError, "kernel_size: expected a positive mult"),
    (
        "compress_kv",
        {"k_weight": lambda _: torch.ones(2, 3)},
        ValueError,
        "k_weight: expected a tensor on cuda:0, as k",
    ),
    ("nsa_attn_varlen_func", {"gates": lambda x: x.half()}, ValueError, "gates: expected dtype bfloat16, got"),
    (
        "nsa_attn_varlen_func",
        {"gates": lambda x: x[:5]},
        ValueError,
        r"gates: expected shape \[225, 3\] or \[225, 6, 3",
    ),
]


@pytest.mark.parametrize(("function", "changes", "kind", "message"), ERRORS)
def test_errors_name_the_argument(function, changes, kind, message):
    with pytest.raises(kind, match=message):
        changed(function, **changes)
