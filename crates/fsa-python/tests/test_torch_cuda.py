"""Stage `selected` on CUDA tensors: against f64, in any layout, on any stream, in graphs. Needs a GPU."""

import threading

import pytest

torch = pytest.importorskip("torch", reason="the tests of the PyTorch operators need torch")

import fsa_rs  # noqa: E402
import gpu  # noqa: E402
from reference import Case  # noqa: E402
from torch_reference import attend, check  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PACKED = {"q_lens": (200, 0, 65, 1), "k_lens": (200, 0, 190, 77)}
DTYPES = ["bfloat16", "float16"]


def on_gpu(*arrays):
    return tuple(torch.from_numpy(x).cuda() for x in arrays)


def prefix_sums(case):
    return on_gpu(case.cu_q, case.cu_k)


def hold(case, dtype, block_size=64, topk=4, hostile=False, **options):
    """Results and gradients, through `lse` too, against the definition."""
    ids = case.topk_indices(block_size, topk, hostile)
    options = {"softmax_scale": case.scale, "return_lse": True, **options}

    def got(q, k, v):
        inputs = (x.cuda() for x in (q, k, v))
        outputs = fsa_rs.selected_attn_varlen_func(*inputs, *on_gpu(ids), block_size, *prefix_sums(case), **options)
        return tuple(x.cpu() for x in outputs)

    inputs = [torch.from_numpy(x) for x in case.qkv(dtype)]
    scale = case.scale if options["softmax_scale"] is None else options["softmax_scale"]
    mask = case.selected(ids, block_size)
    check(got, lambda at, q, k, v: attend(at, q, k, v, mask, scale), inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (192, 192), (256, 256)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_dimensions_of_the_kernels(dtype, dims, deterministic):
    hold(Case(**PACKED, heads=(4, 2), dims=dims), dtype, deterministic=deterministic)


@pytest.mark.parametrize("dims", [(8, 8), (16, 24), (40, 64), (72, 40), (128, 64), (136, 136), (200, 256), (256, 8)])
def test_other_dimensions_are_padded(dims):
    hold(Case(**PACKED, heads=(4, 2), dims=dims), "bfloat16")


@pytest.mark.parametrize("group", [1, 2, 4, 5, 7, 8, 16])
@pytest.mark.parametrize("deterministic", [False, True])
def test_groups(group, deterministic):
    hold(Case(**PACKED, heads=(2 * group, 2), dims=(64, 64)), "bfloat16", deterministic=deterministic)


@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize(("block_size", "topk"), [(16, 1), (16, 64), (32, 7), (64, 16), (128, 8), (256, 3)])
def test_blocks_and_hostile_ids(block_size, topk, hostile):
    case = Case(q_lens=(700, 30), k_lens=(700, 333), heads=(4, 2), dims=(64, 64))
    hold(case, "bfloat16", block_size, topk, hostile)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [-0.25, 0.0, 3.0])
def test_scales(dtype, scale):
    hold(Case(**PACKED, heads=(4, 2), dims=(64, 64)), dtype, softmax_scale=scale)


def test_the_default_scale():
    hold(Case(**PACKED, heads=(4, 2), dims=(72, 72), scale=72**-0.5), "bfloat16", softmax_scale=None)


CASE = Case(q_lens=(300, 0, 41), k_lens=(300, 0, 170), heads=(6, 2), dims=(64, 64))


class Setting:
    """A call on the GPU whose backward repeats."""

    def __init__(self, case=CASE, dtype=torch.bfloat16, topk=4, device="cuda"):
        self.q, self.k, self.v = (torch.from_numpy(x).to(device, dtype) for x in case.qkv("bfloat16"))
        self.ids = torch.from_numpy(case.topk_indices(64, topk)).to(device)
        self.cu_q, self.cu_k = (torch.from_numpy(x).to(device) for x in (case.cu_q, case.cu_k))
        generator = torch.Generator().manual_seed(5)
        self.grad_out = torch.randn(self.q.shape, generator=generator).to(device, dtype)
        self.grad_lse = torch.randn(self.q.shape[1::-1], generator=generator).to(device)

    def call(self, q, k, v, **options):
        options = {"deterministic": True, "return_lse": True, **options}
        return fsa_rs.selected_attn_varlen_func(q, k, v, self.ids, 64, self.cu_q, self.cu_k, **options)

    def everything(self, q=None, k=None, v=None, function=None, **options):
        """``out``, ``lse`` and the three gradients."""
        given = [mine if x is None else x for x, mine in ((q, self.q), (k, self.k), (v, self.v))]
        leaves = [x.detach().requires_grad_() for x in given]
        outputs = (function or self.call)(*leaves, **options)
        grads = torch.autograd.grad(outputs, leaves, (self.grad_out, self.grad_lse))
        return [x.detach() for x in (*outputs, *grads)]


def equal(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def laid_out(x, kind):
    """The same numbers in other memory; NaN in the gaps."""
    n, heads, dim = x.shape
    if kind == "heads first":
        memory = torch.full((heads, n, dim), float("nan"), dtype=x.dtype, device=x.device)
        view = memory.transpose(0, 1)
    elif kind == "part of a wider row":
        memory = torch.full((n, heads + 3, dim + 16), float("nan"), dtype=x.dtype, device=x.device)
        view = memory[:, 1 : heads + 1, 8 : dim + 8]
    elif kind == "odd strides":
        memory = torch.full((n, heads, dim + 3), float("nan"), dtype=x.dtype, device=x.device)
        view = memory[..., :dim]
    elif kind == "odd address":
        memory = torch.full((n * heads * dim + 1,), float("nan"), dtype=x.dtype, device=x.device)
        view = memory[1:].view(x.shape)
    else:
        memory = torch.full((n, heads, dim, 2), float("nan"), dtype=x.dtype, device=x.device)
        view = memory[..., 0]
    return view.copy_(x)


@pytest.mark.parametrize(
    "kind", ["heads first", "part of a wider row", "odd strides", "odd address", "gaps between elements"]
)
@pytest.mark.parametrize("dim", [64, 40])
def test_layouts_change_no_bit(kind, dim):
    setting = Setting(Case(q_lens=(300, 41), k_lens=(300, 170), heads=(6, 2), dims=(dim, dim)))
    plain = setting.everything()
    equal(plain, setting.everything(*(laid_out(x, kind) for x in (setting.q, setting.k, setting.v))))
    setting.grad_out = laid_out(setting.grad_out, kind)
    setting.grad_lse = setting.grad_lse.t().contiguous().t()
    equal(plain, setting.everything())


def test_layouts_of_ids_and_prefix_sums():
    setting = Setting()
    plain = setting.everything()
    spread = torch.full((*setting.ids.shape, 3), -7, dtype=torch.int32, device="cuda")
    spread[..., 1] = setting.ids
    setting.ids = spread[..., 1]
    for name in ("cu_q", "cu_k"):
        longer = torch.cat([torch.full((1,), 99, dtype=torch.int32, device="cuda"), getattr(setting, name)])
        setattr(setting, name, longer[1:])
    equal(plain, setting.everything())
    swapped = setting.ids.transpose(0, 1).contiguous()
    setting.ids = swapped
    equal(plain, setting.everything(layout="ths"))


BLOCKS_AND_DIMS = [(block_size, dim) for dim in (64, 128, 72) for block_size in (16, 64, 128)] + [(256, 64), (64, 256)]


@pytest.mark.parametrize(("block_size", "dim"), BLOCKS_AND_DIMS)
def test_twenty_repetitions_are_bitwise_equal(block_size, dim):
    case = Case(q_lens=(1500,), k_lens=(1500,), heads=(8, 2), dims=(dim, dim))
    setting = Setting(case)
    ids = torch.from_numpy(case.topk_indices(block_size, 8)).cuda()

    def call(q, k, v):
        cu = (setting.cu_q, setting.cu_k)
        return fsa_rs.selected_attn_varlen_func(q, k, v, ids, block_size, *cu, deterministic=True, return_lse=True)

    first = setting.everything(function=call)
    for _ in range(20):
        equal(first, setting.everything(function=call))


def test_deterministic_algorithms_of_pytorch_are_respected():
    setting = Setting()
    asked = setting.everything(deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        equal(asked, setting.everything(deterministic=False))
    finally:
        torch.use_deterministic_algorithms(False)


def test_only_some_gradients():
    setting = Setting()
    out, lse, _, grad_k, _ = setting.everything()
    k = setting.k.detach().requires_grad_()
    outputs = setting.call(setting.q, k, setting.v)
    torch.autograd.backward(outputs, (setting.grad_out, setting.grad_lse))
    equal([out, lse, grad_k], [outputs[0].detach(), outputs[1].detach(), k.grad])
    assert not setting.call(setting.q, setting.k, setting.v)[0].requires_grad


def test_gradients_of_one_result_and_of_any_layout():
    setting = Setting()
    leaves = [x.requires_grad_() for x in (setting.q, setting.k, setting.v)]
    out, lse = setting.call(*leaves)
    of_lse = torch.autograd.grad(lse.sum(), leaves, retain_graph=True)
    of_both = torch.autograd.grad((out, lse), leaves, (torch.zeros_like(out), torch.ones_like(lse)), retain_graph=True)
    equal(of_lse, of_both)
    expanded = torch.autograd.grad(out, leaves, torch.ones((), device="cuda", dtype=out.dtype).expand(out.shape), True)
    equal(expanded, torch.autograd.grad(out, leaves, torch.ones_like(out)))


def test_rows_without_keys_and_numbers_that_nobody_sees():
    setting = Setting()
    rows = torch.tensor([0, 100, 320], device="cuda")
    setting.ids[:, rows] = -1
    out, lse, grad_q, *_ = setting.everything()
    assert (out[rows] == 0).all() and (lse[:, rows] == float("-inf")).all() and (grad_q[rows] == 0).all()
    # Nobody lists block 2 of the first sequence any more: whatever is there reaches nothing.
    setting.ids[setting.ids == 2] = -1
    plain = setting.everything()
    setting.k[128:192], setting.v[128:192] = float("nan"), float("inf")
    for x, y in zip(plain[:3], setting.everything()[:3], strict=True):
        equal([x], [y])
    grad_k, grad_v = setting.everything()[3:]
    assert grad_k.isfinite().all() and grad_v.isfinite().all()


@pytest.mark.parametrize(("q_lens", "k_lens"), [((0,), (0,)), ((0, 0), (70, 0)), ((), ()), ((1,), (1,))])
def test_few_or_no_tokens(q_lens, k_lens):
    case = Case(q_lens=q_lens, k_lens=k_lens, heads=(4, 2), dims=(64, 64))
    q, k, v = (
        torch.randn(sum(lens), heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for lens, heads in ((q_lens, 4), (k_lens, 2), (k_lens, 2))
    )
    ids = torch.zeros(2, sum(q_lens), 1, device="cuda", dtype=torch.int32)
    cu_q, cu_k = (x.int() for x in prefix_sums(case))
    out, lse = fsa_rs.selected_attn_varlen_func(q, k, v, ids, 64, cu_q, cu_k, return_lse=True)
    assert out.shape == q.shape and lse.shape == (4, sum(q_lens))
    for x in torch.autograd.grad(out.float().sum() + lse.sum(), (q, k, v)):
        assert x.isfinite().all()


def graphed(setting):
    """Everything of a call, recorded; gradients too."""
    leaves = [x.detach().clone().requires_grad_() for x in (setting.q, setting.k, setting.v)]

    def whole():
        outputs = setting.call(*leaves)
        return [*outputs, *torch.autograd.grad(outputs, leaves, (setting.grad_out, setting.grad_lse))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            whole()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = whole()
    return graph, leaves, results


@pytest.mark.parametrize("dim", [64, 40])
def test_a_recorded_call_computes_on_new_data(dim):
    setting = Setting(Case(q_lens=(300, 41), k_lens=(300, 170), heads=(6, 2), dims=(dim, dim)))
    graph, leaves, results = graphed(setting)
    for seed in range(3):
        generator = torch.Generator(device="cuda").manual_seed(seed)
        fresh = [torch.randn(x.shape, generator=generator, device="cuda").to(x.dtype) for x in leaves]
        with torch.no_grad():
            for leaf, x in zip(leaves, fresh, strict=True):
                leaf.copy_(x)
            setting.ids.copy_(setting.ids.roll(seed, dims=2).clamp(max=seed + 1))
            duplicates = setting.ids[..., 1:] == setting.ids[..., :1]
            setting.ids[..., 1:][duplicates] = -1
            setting.ids[..., 2:] = -1
        graph.replay()
        torch.cuda.synchronize()
        equal([x.detach() for x in results], setting.everything(*fresh))


def test_two_recordings_and_a_call_between_them():
    one, two = Setting(), Setting(Case(q_lens=(90,), k_lens=(90,), heads=(4, 1), dims=(64, 64)))
    (first, _, results), (second, _, others) = graphed(one), graphed(two)
    first.replay()
    between = one.everything()
    second.replay()
    torch.cuda.synchronize()
    equal([x.detach() for x in results], between)
    equal([x.detach() for x in others], two.everything())


@pytest.mark.filterwarnings("ignore")  # PyTorch calls its detection of waits a prototype
def test_a_call_waits_for_nothing():
    setting = Setting()
    setting.everything()  # plans and compiles
    assert gpu.waits_for_nothing(setting.everything), "the host waited for the device"


def test_the_current_stream_is_used():
    setting = Setting()
    plain = setting.everything()
    side = torch.cuda.Stream()
    late = [torch.zeros_like(x) for x in (setting.q, setting.k, setting.v)]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # inputs are ready after a while, on this stream
        for x, source in zip(late, (setting.q, setting.k, setting.v), strict=True):
            x.copy_(source)
        results = setting.everything(*late)
        kept = [x.clone() for x in results]
    side.synchronize()
    equal(plain, kept)


def test_threads_with_streams_of_their_own():
    settings = [Setting(Case(q_lens=(n,), k_lens=(n,), heads=(4, 2), dims=(64, 64), seed=n)) for n in (200, 333)]
    expected = [setting.everything() for setting in settings]
    torch.cuda.synchronize()
    failures = []

    def work(setting, plain):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    equal(plain, setting.everything())
        except BaseException as error:
            failures.append(error)

    pairs = list(zip(settings, expected, strict=True)) * 2
    threads = [threading.Thread(target=work, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


@pytest.mark.filterwarnings("ignore")
def test_compile_fullgraph():
    setting = Setting()
    compiled = torch.compile(setting.call, fullgraph=True)
    equal(setting.everything(), setting.everything(function=compiled))


@pytest.mark.filterwarnings("ignore")
def test_compile_for_other_lengths():
    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(q, k, v, ids, cu):
        return fsa_rs.selected_attn_varlen_func(q, k, v, ids, 64, cu, cu, deterministic=True) * 2

    for n in (65, 130, 300):
        setting = Setting(Case(q_lens=(n,), k_lens=(n,), heads=(4, 2), dims=(64, 64)))
        inputs = (setting.q, setting.k, setting.v)
        equal([compiled(*inputs, setting.ids, setting.cu_q)], [setting.call(*inputs)[0] * 2])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dim", [64, 40])
def test_opcheck(dim):
    setting = Setting(Case(q_lens=(40, 9), k_lens=(40, 30), heads=(4, 2), dims=(dim, dim)))
    packed = [x.requires_grad_() for x in (setting.q, setting.k, setting.v)] + [setting.cu_q, setting.cu_k]
    options = (None, setting.ids, [64, 0], True)
    operators = torch.ops.fsa_rs
    setting.call(*packed[:3])  # registers the operators
    torch.library.opcheck(operators.attention.default, (*packed, *options))
    packed = [x.detach() for x in packed]
    out, lse = operators.attention(*packed, *options)
    grads = (torch.ones_like(out), torch.ones_like(lse))
    torch.library.opcheck(operators.attention_backward.default, (*packed, *options, out, lse, *grads))


def test_memory_is_bounded():
    n = 16384
    case = Case(q_lens=(n,), k_lens=(n,), heads=(8, 2), dims=(128, 128))
    q, k, v = (torch.randn(n, h, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (8, 2, 2))
    own = torch.arange(n, device="cuda") // 64
    ids = (own[None, :, None] - torch.arange(16, device="cuda")).clamp(min=-1).int().expand(2, -1, -1).contiguous()
    cu = prefix_sums(case)[0]
    fsa_rs.selected_attn_varlen_func(q, k, v, ids, 64, cu, cu).sum().backward()
    torch.cuda.synchronize()
    scratch = (256 << 20) + ids.numel() * 4
    torch.cuda.empty_cache()
    for results, call in (
        (q.numel() * 2 + n * 8 * 4, lambda: fsa_rs.selected_attn_varlen_func(q, k, v, ids, 64, cu, cu)),
        ((q.numel() + 2 * k.numel()) * 2 + q.numel() * 2, None),
    ):
        if call is None:
            out = fsa_rs.selected_attn_varlen_func(q, k, v, ids, 64, cu, cu)
            call = lambda out=out: torch.autograd.grad(out, (q, k, v), torch.ones_like(out))  # noqa: E731
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        assert torch.cuda.max_memory_allocated() - before <= results + scratch + (4 << 20)


def test_tensors_of_more_than_two_to_the_31_elements():
    heads, n = 64, (1 << 31) // (64 * 128) + 128
    if torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("needs 60 GB of device memory")
    q = torch.randn(n, heads, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(n, 1, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    own = torch.arange(n, device="cuda", dtype=torch.int32) // 64
    ids = own[None, :, None].contiguous()
    cu = torch.tensor([0, n], device="cuda", dtype=torch.int32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = fsa_rs.selected_attn_varlen_func(*leaves, ids, 64, cu, cu)
    grads = torch.autograd.grad(out, leaves, torch.ones((), device="cuda", dtype=q.dtype).expand(out.shape))
    tail = slice(n - 64, n)  # the last block sees nothing but itself
    small = [x.detach()[tail].contiguous().requires_grad_() for x in (q, k, v)]
    few, zero = torch.tensor([0, 64], device="cuda", dtype=torch.int32), torch.zeros_like(ids[:, :64])
    alone = fsa_rs.selected_attn_varlen_func(*small, zero, 64, few, few)
    expected = torch.autograd.grad(alone, small, torch.ones_like(alone))
    for x, y in zip((out, *grads), (alone, *expected), strict=True):
        torch.testing.assert_close(x[tail], y, rtol=2e-2, atol=2e-2)


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    here, there = Setting(device="cuda:0").everything(), Setting(device="cuda:1").everything()
    equal([x.cpu() for x in here], [x.cpu() for x in there])
    assert all(x.device.index == 1 for x in there)


def test_validation_waits_and_refuses():
    setting = Setting()
    equal(setting.everything(), setting.everything(validate=True))
    setting.ids[1, 7, 2] = 1000
    with pytest.raises(ValueError, match=r"topk_indices: .* got 1000 in row \[1, 7\]"):
        setting.everything(validate=True)
    setting = Setting()
    setting.cu_q[-1] += 1
    with pytest.raises(ValueError, match="cu_seqlens_q: "):
        setting.everything(validate=True)


def changed(**changes):
    setting = Setting()
    given = {"q": setting.q, "k": setting.k, "v": setting.v, "topk_indices": setting.ids, "block_size": 64}
    given |= {"cu_seqlens_q": setting.cu_q, "cu_seqlens_k": setting.cu_k}
    made = {name: change(given.get(name)) for name, change in changes.items()}
    return fsa_rs.selected_attn_varlen_func(**{**given, **made})


ERRORS = [
    ({"q": lambda x: x.float()}, NotImplementedError, "dtype of q on CUDA is not supported: got float32"),
    ({"k": lambda x: x.half()}, ValueError, "k: expected dtype bfloat16, got dtype float16"),
    ({"q": lambda x: x.cpu()}, ValueError, "q: expected a CUDA tensor, as other arguments of the call, got cpu"),
    ({"v": lambda x: x.cpu()}, ValueError, "v: expected a tensor on cuda:0, as q, got one on cpu"),
    ({"cu_seqlens_q": lambda x: x.cpu()}, ValueError, "cu_seqlens_q: expected a tensor on cuda:0"),
    ({"cu_seqlens_k": lambda x: x.long()}, ValueError, "cu_seqlens_k: expected dtype int32, got dtype int64"),
    ({"topk_indices": lambda x: x.long()}, ValueError, "topk_indices: expected dtype int32"),
    ({"topk_indices": lambda x: x[:, :7]}, ValueError, "topk_indices: expected shape"),
    ({"topk_indices": lambda x: x.repeat(1, 1, 20)}, NotImplementedError, "topk on CUDA is not supported: got 80"),
    ({"v": lambda x: x[:5]}, ValueError, "v: expected shape"),
    ({"block_size": lambda _: 17}, ValueError, "block_size: expected one of 16"),
    ({"softmax_scale": lambda _: float("inf")}, ValueError, "softmax_scale: expected a finite number"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), ERRORS)
def test_errors_name_the_argument(changes, kind, message):
    with pytest.raises(kind, match=message):
        changed(**changes)
