"""What the tests on CUDA tensors share: the device, and inputs of all functions."""

import fsa_rs
import pytest
import torch
from reference import Case

DEVICE = "cuda"

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

#: The second sequence is empty, the third is shorter than a window, the fourth has fewer rows than keys.
LENGTHS = {"q_lens": (150, 0, 9, 65, 1), "k_lens": (150, 0, 9, 190, 77)}
GEOMETRY, BLOCK, TOPK, WINDOW, THETA = (16, 8), 32, 4, 40, 1000.0
SIZES = {"kernel_size": 16, "kernel_stride": 8, "block_size": BLOCK, "topk": TOPK}


def case_of(heads=(6, 2), dims=(64, 64), **options):
    return Case(**{**LENGTHS, **options}, heads=heads, dims=dims)


class Setting:
    """Inputs of all functions on the GPU, and the functions with them."""

    def __init__(self, case=None, dtype="bfloat16", scale=0.25):
        self.case, self.dtype, self.scale = case or case_of(), dtype, scale
        case, heads = self.case, self.case.heads[1]
        self.cu = tuple(torch.from_numpy(x).to(DEVICE, torch.int32) for x in (case.cu_q, case.cu_k))
        self.rows = sum(case.windows(*GEOMETRY))
        q, k, v = (torch.from_numpy(x) for x in case.qkv(dtype))
        size, (dim, value_dim) = GEOMETRY[0], case.dims
        self.numbers = {
            "q": q,
            "k": k,
            "v": v,
            "k_cmp": k[: self.rows],
            "v_cmp": v[: self.rows],
            "gates": torch.from_numpy(case.normal(*q.shape[:2], 3, dtype=dtype)),
            "shared_gates": torch.from_numpy(case.normal(q.shape[0], 3, dtype=dtype)),
            "weighted": torch.from_numpy(case.normal(heads, size, dtype=dtype)),
            "linear": torch.from_numpy(case.normal(heads, size * dim, dim, dtype=dtype)) / 32,
            "value_linear": torch.from_numpy(case.normal(heads, size * value_dim, value_dim, dtype=dtype)) / 32,
            "position": torch.from_numpy(case.normal(heads, size, dim, dtype=dtype)),
        }

    def inputs(self, names, at=None):
        """f64 on the CPU, or leaves on the GPU."""
        given = [self.numbers[name].detach() for name in names]
        return given if at is None else [x.to(at, getattr(torch, self.dtype)).requires_grad_() for x in given]

    def dense(self, q, k, v):
        options = {"softmax_scale": self.scale, "deterministic": True, "return_lse": True}
        return fsa_rs.dense_attn_varlen_func(q, k, v, *self.cu, **options)

    def window(self, q, k, v):
        options = {"window_size": WINDOW, "softmax_scale": self.scale, "deterministic": True, "return_lse": True}
        return fsa_rs.window_attn_varlen_func(q, k, v, *self.cu, **options)

    def compressed(self, q, k_cmp, v_cmp):
        """Rows behind the last compressed key hold what nobody may see."""
        room = int(self.case.cu_k[-1]) // GEOMETRY[1] - self.rows
        k_cmp, v_cmp = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, room), value=float("nan")) for x in (k_cmp, v_cmp))
        out, lse, self.ids = fsa_rs.compressed_attn_varlen_func(
            q, k_cmp, v_cmp, *self.cu, **SIZES, softmax_scale=self.scale, deterministic=True
        )
        assert not self.ids.requires_grad and self.ids.dtype == torch.int32
        return out, lse

    def compress(self, k, weight=None, position=None):
        values = torch.zeros_like(k)
        given = {"k_weight": weight, "k_position": position}
        return fsa_rs.compress_kv(k, values, self.cu[1], *GEOMETRY, **given)[:1]

    def nsa(self, q, k, v, gates, linear, position, weighted=None, value_linear=None, **options):
        options = {"window_size": WINDOW, "softmax_scale": self.scale, "rope_theta": THETA, **SIZES, **options}
        values = weighted if value_linear is None else value_linear
        weights = {"k_weight": linear, "k_position": position, "v_weight": values}
        options = {"deterministic": True, "return_topk_indices": True, **options}
        out, self.ids = fsa_rs.nsa_attn_varlen_func(q, k, v, gates, *self.cu, **weights, **options)
        return (out,)


FUNCTIONS = {
    "dense": ("q", "k", "v"),
    "window": ("q", "k", "v"),
    "compressed": ("q", "k_cmp", "v_cmp"),
    "compress": ("k", "linear", "position"),
    "nsa": ("q", "k", "v", "gates", "linear", "position", "weighted"),
}


def everything(setting, name, inputs=None, function=None):
    """Results and all gradients."""
    leaves = setting.inputs(FUNCTIONS[name], DEVICE) if inputs is None else inputs
    outputs = (function or getattr(setting, name))(*leaves)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in outputs]
    return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, leaves, weights))]


def late(setting, name):
    """`everything` on a side stream of the device, where the inputs are ready after a while."""
    device = torch.device(DEVICE)
    side, sources = torch.cuda.Stream(device), setting.inputs(FUNCTIONS[name], device)
    inputs = [torch.zeros_like(x) for x in sources]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for x, source in zip(inputs, sources, strict=True):
            x.copy_(source.detach())
        kept = [x.clone() for x in everything(setting, name, [x.requires_grad_() for x in inputs])]
    side.synchronize()
    return kept


def equal(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def waits_for_nothing(call):
    """The host is done with `call` before the device, which sleeps, wakes up; longer sleep for a host that is busy."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for cycles in (200_000_000, 4_000_000_000):
            begin = torch.cuda.Event()
            torch.cuda._sleep(cycles)
            begin.record()
            call()
            if not begin.query():
                return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False
