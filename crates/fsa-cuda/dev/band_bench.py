"""Times of the stages besides `selected`: medians of CUDA graph replays on random data, every result checked on sampled rows first."""
import statistics
import torch
import band
from band import Shape, backward, forward, forward_select, select


def time_graph(fn, repeats=10):
    fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    graph.replay()
    times = []
    for _ in range(repeats):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record(); graph.replay(); b.record(); torch.cuda.synchronize()
        times.append(a.elapsed_time(b))
    return statistics.median(times)


def sampled(s, q, k, v, out, scale, count=24):
    """Largest error of sampled rows against float64."""
    n, g, worst = s.cu_q[-1], s.hq // s.hk, 0.0
    for t in torch.randint(0, n, (count,)).tolist() + [n - 1]:
        first, end = max(0, t - s.window), min(s.cu_keys[-1], (t + 1 - s.kernel_size) // s.kernel_stride + 1)
        if end <= first:
            worst = max(worst, float(out[t].abs().max()))
            continue
        ks, vs = (x[first:end].double().repeat_interleave(g, 1) for x in (k, v))
        p = torch.softmax(torch.einsum("hd,khd->hk", q[t].double(), ks) * scale, -1)
        worst = max(worst, float((torch.einsum("hk,khd->hd", p, vs) - out[t].double()).abs().max()))
    return worst


def stage(n, hk, kind, hq=32, d=128, block_size=64, topk=16, phases=("forward", "select", "backward")):
    s = Shape([0, n], [0, n], hq, hk, **kind)
    q, k, v = band.make(s, d, torch.bfloat16)
    out, lse, scale = torch.empty_like(q), torch.empty(hq, n, device="cuda"), d ** -0.5
    fwd = lambda: forward(s, q, k, v, out, lse, scale)
    fwd()
    torch.cuda.synchronize()
    text, error = f"{n:7d} {hq}/{hk} {kind}", sampled(s, q, k, v, out, scale)
    row = [f"forward {time_graph(fwd):7.3f} (error {error:.1e})"]
    if "select" in phases and s.compressed:
        ids = torch.empty(hk, n, topk, dtype=torch.int32, device="cuda")
        row.append(f"select {time_graph(lambda: select(s, q, k, lse, ids, scale, block_size)):7.3f}")
        if band.HOPPER and hq // hk in (1, 2, 4, 8, 16):
            row.append(f"both in one {time_graph(lambda: forward_select(s, q, k, v, out, lse, ids, scale, block_size)):7.3f}")
    if "backward" in phases:
        grad_out, grads = torch.randn_like(q), [torch.empty_like(x) for x in (q, k, v)]
        for splits in (1, 2, 4, 8) if s.num_key_tiles * hk < 600 else (1,):
            for kernels in (("delta", "queries", "keys"), ("delta", "open", "sums", "finish"))[:1 + band.HOPPER]:
                run = lambda only: backward(s, q, k, v, out, lse, grad_out, grads, scale, splits=splits, only=only, one_pass="sums" in kernels)
                parts = {only: time_graph(lambda: run(only)) for only in kernels}
                row.append(f"splits {splits} backward {sum(parts.values()):7.3f} = " + " + ".join(f"{name} {ms:.3f}" for name, ms in parts.items()))
    print(text, "; ".join(row), flush=True)


def bench():
    for n in (65536, 8192):
        for hk in (8, 32):
            stage(n, hk, dict(compressed=(32, 16)))
            stage(n, hk, dict(window=512))
    stage(8192, 8, {})
    stage(32768, 8, {}, phases=("forward",))


def bench_short():
    for n, hk in ((65536, 8), (8192, 8), (65536, 32)):
        stage(n, hk, dict(compressed=(32, 16)))
        stage(n, hk, dict(window=512))
