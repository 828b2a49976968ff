"""Development harness of the CUDA kernels.  run.py COMMAND...

compile                   every kernel for every supported constant, without a GPU: registers, spills
check, check_backward     small full cases, hostile cases, sampled rows of large ones, against float64
bench, bench_wide         medians of graph replays, index building included
repeat                    bitwise repeatability
million                   1,048,576 tokens: time, memory, sampled rows
tune, tune_backward       one change at a time

FSA_DEV_SET=sm80          the portable kernels instead of those for Hopper; compile takes them for sm_80, sm_89 and sm_90a
"""
import faulthandler, statistics, sys, time
import nvrtc, sets


STAGES = {"index.cuh": [{}], sets.file("attend"): [{}], sets.file("reduce"): [{}], sets.file("backward"): [{}, {"FSA_QUERY_PARTIALS": 1}] + [{"FSA_SCALED_SUMS": 1}] * (sets.SET == "sm90")}


def compile_all():
    for arch in sets.ARCHS:
        print(f"== {sets.SET} kernels for {arch}")
        compile_for(arch)


def compile_for(arch):
    print(f"{'stage':18s} {'variant':20s} {'dtype':5s} {'head_dim':>8s} {'block':>5s} {'kernel':16s} {'registers':>9s} {'spilled bytes':>13s}  notes")
    for stage, variants in STAGES.items():
        for variant in variants:
            for is_bf16 in (1, 0):
                for head_dim in (64, 96, 128, 192, 256):
                    for block_size in (16, 32, 64, 128, 256):
                        if stage == "index.cuh" and head_dim != 128 or variant and block_size == 256:
                            continue
                        where = f"{stage:18s} {' '.join(variant):20s} {'bf16' if is_bf16 else 'f16':5s} {head_dim:8d} {block_size:5d}"
                        try:
                            _, log = nvrtc.compile_cubin(stage, dict(FSA_HEAD_DIM=head_dim, FSA_BLOCK_SIZE=block_size, FSA_IS_BF16=is_bf16, **variant), arch)
                        except RuntimeError as error:
                            print(where, "not compiled:", next((line for line in str(error).splitlines() if "error" in line and "static" in line), str(error)[:200]))
                            continue
                        note = "wgmma serialised" if "serialized" in log else ""
                        for kernel, (registers, spills, _) in sorted(nvrtc.resources(log).items()):
                            print(f"{where} {kernel:16s} {registers:9d} {spills:13d}  {note}".rstrip())


def make(cu_q, cu_kv, hq, hk, d, dtype, seed=0):
    import torch
    torch.manual_seed(seed)
    rand = lambda n, h: torch.randn(n, h, d, device="cuda", dtype=dtype)
    return rand(cu_q[-1], hq), rand(cu_kv[-1], hk), rand(cu_kv[-1], hk)


def check_case(name, cu_q, cu_kv, hq, hk, d=128, dtype=None, block_size=64, topk=16, kind="random", twist=None, rows=None, **options):
    import torch, cases
    from selected import Selected
    dtype = dtype or torch.bfloat16
    q, k, v = make(cu_q, cu_kv, hq, hk, d, dtype)
    ids = cases.select(cu_q, cu_kv, hk, topk, block_size, kind)
    if twist:
        q, k, v, ids = twist(q, k, v, ids)
    cu = lambda x: torch.tensor(x, dtype=torch.int32, device="cuda")
    op = Selected(q, k, v, ids, block_size, cu(cu_q), cu(cu_kv), **options)
    out, lse = torch.full_like(q, 7.0), torch.full((hq, cu_q[-1]), 7.0, device="cuda")
    op.forward(out, lse)
    torch.cuda.synchronize()
    rows = torch.arange(cu_q[-1]) if rows is None else torch.tensor(sorted({int(x) for x in torch.randint(0, cu_q[-1], (rows,))} | {0, 1, cu_q[-1] - 1}))
    want, want_lse = cases.reference_rows(q, k, v, ids, block_size, cu_q, cu_kv, rows, op.scale)
    tolerance = 6e-3 if dtype == torch.bfloat16 else 1e-3
    ok = cases.compare(f"{name} out", out[rows.cuda()], want, tolerance)
    return cases.compare(f"{name} lse", lse.T[rows.cuda()], want_lse, 1e-4) & ok


def check_backward(name, cu_q, cu_kv, hq, hk, d=128, dtype=None, block_size=64, topk=16, kind="random", twist=None, **options):
    import torch, cases
    from selected import Selected, SelectedBackward
    dtype = dtype or torch.bfloat16
    q, k, v = make(cu_q, cu_kv, hq, hk, d, dtype)
    ids = cases.select(cu_q, cu_kv, hk, topk, block_size, kind)
    if twist:
        q, k, v, ids = twist(q, k, v, ids)
    cu = lambda x: torch.tensor(x, dtype=torch.int32, device="cuda")
    out, lse = Selected(q, k, v, ids, block_size, cu(cu_q), cu(cu_kv)).forward()
    grad_out, grad_lse = torch.randn_like(q), torch.randn_like(lse)
    op = SelectedBackward(q, k, v, ids, block_size, cu(cu_q), cu(cu_kv), **options)
    got = op.backward(out, lse, grad_out, [torch.full_like(x, 7.0) for x in (q, k, v)], grad_lse)
    torch.cuda.synchronize()
    want = cases.reference_gradients(q, k, v, ids, block_size, cu_q, cu_kv, op.scale, grad_out, grad_lse)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-3
    return all([cases.compare(f"backward {name} {which}", g, w.cpu().numpy(), tolerance) for which, g, w in zip(("query", "key", "value"), got, want)])


def check_all_backward():
    import torch, cases
    hostile = lambda q, k, v, ids: (q, k, v, cases.hostile(ids))
    packed_q, packed_kv = [0, 1, 1, 130, 391, 456, 777], [0, 1, 1, 190, 451, 516, 1016]
    ok = check_backward("tiny", [0, 40], [0, 40], 2, 1, topk=2)
    ok &= check_backward("384 tokens", [0, 384], [0, 384], 2, 2, topk=5)
    ok &= check_backward("2048 g=3", [0, 2048], [0, 2048], 3, 1, topk=8)
    ok &= check_backward("block 128", [0, 2048], [0, 2048], 2, 1, block_size=128, topk=8)
    ok &= check_backward("f16", [0, 700], [0, 700], 2, 1, topk=6, dtype=torch.float16)
    ok &= check_backward("packed hostile", packed_q, packed_kv, 5, 1, topk=5, twist=hostile)
    ok &= check_backward("block 32 packed", packed_q, packed_kv, 2, 1, block_size=32, topk=9, twist=hostile)
    ok &= check_backward("block 16", [0, 900], [0, 900], 2, 1, block_size=16, topk=40)
    ok &= check_backward("block 256", [0, 1500], [0, 1500], 2, 1, block_size=256, topk=4)
    for d in (64, 96, 192, 256):
        ok &= check_backward(f"head_dim {d}", [0, 700], [0, 700], 2, 1, d=d, topk=6)
    ok &= check_backward("head_dim 256, block 128", [0, 900], [0, 900], 2, 1, d=256, block_size=128, topk=4)

    def unseen_nan(q, k, v, ids):       # keys of the own block that only later rows see, and a block nobody lists
        return q, k, v, torch.where(ids == 3, -1, ids).contiguous()
    ok &= check_backward("unlisted block", [0, 700], [0, 700], 2, 1, topk=6, twist=unseen_nan)
    ok &= check_backward("partials", [0, 2048], [0, 2048], 3, 1, topk=8, query_partials=1)
    ok &= check_backward("partials, block 128", [0, 2048], [0, 2048], 2, 1, block_size=128, topk=8, query_partials=1)
    ok &= check_backward("chunks", [0, 4000], [0, 4000], 4, 2, topk=8, chunk_tokens=1024, unit_entries=128)
    print("backward all ok" if ok else "BACKWARD SOME FAILED", flush=True)
    return ok


def check():
    import torch, cases
    ok = True
    ok &= check_case("tiny one block", [0, 40], [0, 40], 2, 1, topk=2)
    ok &= check_case("dense only", [0, 150], [0, 150], 2, 2, topk=4)
    ok &= check_case("384 tokens", [0, 384], [0, 384], 2, 1, topk=5)
    ok &= check_case("1000 tokens g=3", [0, 1000], [0, 1000], 3, 1, topk=8)
    ok &= check_case("2048 block 128", [0, 2048], [0, 2048], 4, 2, block_size=128, topk=8, rows=200)
    ok &= check_case("f16", [0, 700], [0, 700], 4, 2, topk=6, dtype=torch.float16)
    hostile = lambda q, k, v, ids: (q, k, v, cases.hostile(ids))
    ok &= check_case("hostile ids", [0, 900], [0, 900], 2, 2, topk=8, twist=hostile)
    packed_q, packed_kv = [0, 1, 1, 130, 391, 456, 777], [0, 1, 1, 190, 451, 516, 1016]
    ok &= check_case("packed, q_len <= kv_len, odd", packed_q, packed_kv, 5, 1, topk=5, twist=hostile)
    ok &= check_case("packed block 32", packed_q, packed_kv, 2, 1, topk=9, block_size=32, twist=hostile)
    ok &= check_case("block 16 topk 40", [0, 900], [0, 900], 2, 1, topk=40, block_size=16)
    ok &= check_case("block 256", [0, 2000], [0, 2000], 2, 1, topk=5, block_size=256, rows=200)
    for d in (64, 96, 192, 256):
        ok &= check_case(f"head_dim {d}", [0, 700], [0, 700], 2, 1, d=d, topk=6)

    def huge_logits(q, k, v, ids):
        return q * 12, k * 12, v, ids
    ok &= check_case("logits of hundreds", [0, 700], [0, 700], 2, 1, topk=6, twist=huge_logits)

    def unseen_nan(q, k, v, ids):
        ids = torch.where(ids == 3, -1, ids)            # nobody lists block 3
        k[192:256] = float("nan"); v[192:256] = float("nan")
        v[600, :, 5] = float("nan"); k[650] = float("nan"); v[610, :, 7] = float("inf")    # seen by later rows only
        return q, k, v, ids.contiguous()
    ok &= check_case("NaN in unseen rows", [0, 700], [0, 700], 2, 1, topk=6, twist=unseen_nan)

    def far_values(q, k, v, ids):                       # beyond and within what a packed partial takes without more ado, and none
        for block, power in ((1, 2.0**9), (2, 2.0**100), (4, 2.0**-100), (6, 0.0), (8, 2.0**-130)):
            v[block * 64:block * 64 + 64] *= power
        v[320:384, :, ::7] *= 2.0**20
        return q, k, v, ids
    ok &= check_case("values of all sizes", [0, 1500], [0, 1500], 2, 1, topk=8, twist=far_values)

    def seen_nan(q, k, v, ids):
        v[70, :, 5] = float("nan"); v[200, :, 7] = float("inf"); v[201, :, 9] = -float("inf"); v[400, :, ::2] = float("inf"); v[500:510] *= 2.0**120
        return q, k, v, ids
    ok &= check_case("NaN and infinity in values of listed blocks", [0, 1500], [0, 1500], 2, 1, topk=8, twist=seen_nan)

    def one_block(q, k, v, ids):
        ids = torch.where(ids == 2, -1, ids)
        ids[:, 256:, 0] = 2                             # everyone's block 2, no sink
        return q, k, v, ids
    ok &= check_case("one block for all, 3000 rows", [0, 3000], [0, 3000], 2, 1, topk=6, twist=one_block, rows=200)

    def no_dense(q, k, v, ids):                         # all slots cold: spilled ids
        n = ids.shape[1]
        own = torch.arange(n, device="cuda") // 64
        ids[:] = -1
        for s in range(4):
            ids[:, :, s] = torch.where(own >= 8, (own - 7 + s).int(), -1)
        return q, k, v, ids
    ok &= check_case("no dense block listed", [0, 1500], [0, 1500], 2, 1, topk=4, twist=no_dense, rows=300)
    ok &= check_case("chunked over tokens", [0, 4000], [0, 4000], 4, 2, topk=8, rows=200, budget=11 << 20)
    ok &= check_case("16K sampled", [0, 16384], [0, 16384], 32, 8, rows=16)
    print("all ok" if ok else "SOME FAILED", flush=True)
    return ok


def small():
    """A subset for compute-sanitizer, which is slow: both passes, packed and hostile, blocks of 64 and 128, several chunks, partials."""
    import cases
    hostile = lambda q, k, v, ids: (q, k, v, cases.hostile(ids))
    packed_q, packed_kv = [0, 1, 1, 130, 391, 456], [0, 1, 1, 190, 451, 516]
    ok = check_case("packed hostile", packed_q, packed_kv, 5, 1, topk=5, twist=hostile)
    ok &= check_case("block 128", [0, 700], [0, 700], 2, 1, block_size=128, topk=4)
    ok &= check_case("chunks", [0, 1500], [0, 1500], 2, 1, topk=8, budget=11 << 20)
    ok &= check_backward("packed hostile", packed_q, packed_kv, 5, 1, topk=5, twist=hostile)
    ok &= check_backward("block 128", [0, 700], [0, 700], 2, 1, block_size=128, topk=4)
    ok &= check_backward("partials", [0, 700], [0, 700], 3, 1, topk=5, query_partials=1)
    ok &= check_backward("chunks", [0, 1500], [0, 1500], 2, 1, topk=8, chunk_tokens=512, unit_entries=128)
    print("small all ok" if ok else "SMALL SOME FAILED", flush=True)


def time_graph(fn, repeats=12):
    import torch
    fn(); torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    for _ in range(2):
        graph.replay()
    times = []
    for _ in range(repeats):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record(); graph.replay(); b.record(); torch.cuda.synchronize()
        times.append(a.elapsed_time(b))
    return statistics.median(times)


def forward_times(op, out, lse, breakdown=True):
    line = f"total {time_graph(lambda: op.forward(out, lse)):7.3f} ms"
    if breakdown:
        stages = op.stage_launches(out, lse)
        line += f" | index {time_graph(op.build_index):6.3f} attend {time_graph(lambda: [s[2]() for s in stages]):6.3f} reduce {time_graph(lambda: [s[3]() for s in stages]):6.3f}"
    return line


def bench(configs, breakdown=True, phases=("forward", "backward"), **options):
    import torch, cases
    from selected import Selected, SelectedBackward
    for tokens, hq, hk, block_size, topk, kind in configs:
        cu = [0, tokens]
        q, k, v = make(cu, cu, hq, hk, 128, torch.bfloat16)
        ids = cases.select(cu, cu, hk, topk, block_size, "random" if kind == "one block" else kind)
        if kind == "one block":     # every row that can lists block 5 as well
            ids = torch.where(ids == 5, -1, ids)
            ids[:, 1024:, 3] = 5
        op = Selected(q, k, v, ids, block_size, **options)
        out, lse = torch.empty_like(q), torch.empty(hq, tokens, device="cuda")
        line = f"fwd N={tokens:7d} {hq}/{hk} ({block_size},{topk}) {kind:9s} {forward_times(op, out, lse, breakdown)}"
        if "backward" in phases:
            bop = SelectedBackward(q, k, v, ids, block_size, **options)
            grad_out, grads = torch.randn_like(q), [torch.empty_like(x) for x in (q, k, v)]
            line += f" || bwd total {time_graph(lambda: bop.backward(out, lse, grad_out, grads)):7.3f} index {time_graph(bop.build_index):6.3f} scratch {bop.backward_scratch_bytes / 2**20:.0f} MiB"
            del bop, grad_out, grads
        print(line + f" | scratch {op.plan.scratch_bytes / 2**20:.0f} MiB, {op.plan.num_chunks} x {-(-hq // op.plan.heads)} chunks", flush=True)
        del op, q, k, v, ids, out, lse
        torch.cuda.empty_cache()


BENCH = [(65536, 32, 32, 64, 16, "random"), (65536, 32, 8, 64, 16, "random"), (65536, 32, 2, 64, 16, "random"), (65536, 32, 8, 64, 16, "clustered"),
         (65536, 32, 32, 128, 8, "random"), (65536, 32, 8, 128, 8, "random"), (8192, 32, 32, 64, 16, "random"), (8192, 32, 8, 64, 16, "random")]



def tune():
    """One change at a time on two shapes."""
    two = [BENCH[1], BENCH[5]]
    for options in (dict(), dict(index_parts=1), dict(index_parts=8), dict(unit_entries=768)):
        print(options)
        bench(two, **options)


def tune_backward():
    import torch, cases
    from selected import Selected, SelectedBackward
    for tokens, hq, hk, block_size, topk, kind in (BENCH[1], BENCH[5], BENCH[6], BENCH[7]):
        cu = [0, tokens]
        q, k, v = make(cu, cu, hq, hk, 128, torch.bfloat16)
        ids = cases.select(cu, cu, hk, topk, block_size, kind)
        out, lse = Selected(q, k, v, ids, block_size).forward()
        grad_out, grads = torch.randn_like(q), [torch.empty_like(x) for x in (q, k, v)]
        for options in (dict(), dict(query_partials=1), dict(unit_entries=1024)):
            op = SelectedBackward(q, k, v, ids, block_size, **options)
            print(f"bwd {hq}/{hk} ({block_size},{topk}) {options} {time_graph(lambda: op.backward(out, lse, grad_out, grads), 5):.3f} ms scratch {op.backward_scratch_bytes / 2**20:.0f} MiB", flush=True)
            del op


WIDE = [(65536, 32, 16, 64, 16, "random"), (65536, 40, 8, 64, 16, "random"), (65536, 32, 4, 64, 16, "random"), (65536, 32, 32, 64, 16, "clustered"),
        (16384, 32, 8, 64, 16, "random"), (32768, 32, 8, 64, 16, "random"), (65536, 32, 8, 64, 16, "one block")]


def repeat():
    """Bitwise repeatability: forward, and backward with partials; how far the f32 sums of the default backward move."""
    import torch, cases
    from selected import Selected, SelectedBackward
    cu = [0, 8192]
    q, k, v = make(cu, cu, 32, 8, 128, torch.bfloat16)
    ids = cases.select(cu, cu, 8, 16, 64)
    runs = [[x.clone() for x in Selected(q, k, v, ids, 64).forward()] for _ in range(20)]
    print("forward, 20 runs bitwise equal:", all(torch.equal(a, b) for r in runs for a, b in zip(r, runs[0])))
    (out, lse), grad_out = runs[0], torch.randn_like(q)
    for partials in (0, 1):
        op = SelectedBackward(q, k, v, ids, 64, query_partials=partials)
        runs = [[x.clone() for x in op.backward(out, lse, grad_out, [torch.empty_like(x) for x in (q, k, v)])] for _ in range(5)]
        same = [all(torch.equal(r[i], runs[0][i]) for r in runs) for i in range(3)]
        print(f"backward, query_partials={partials}, 5 runs bitwise equal (query, key, value): {same}")


def million():
    """1,048,576 tokens, 32 / 8 heads: time and peak memory beyond inputs and outputs, sampled rows against float64."""
    import torch, cases
    from selected import Selected, SelectedBackward
    tokens, hq, hk = 1 << 20, 32, 8
    cu = [0, tokens]
    q, k, v = make(cu, cu, hq, hk, 128, torch.bfloat16)
    ids = cases.select_strata(tokens, hk, 16, 64)
    out, lse = torch.empty_like(q), torch.empty(hq, tokens, device="cuda")
    torch.cuda.synchronize(); base = torch.cuda.memory_allocated(); torch.cuda.reset_peak_memory_stats()
    op = Selected(q, k, v, ids, 64)
    print(f"1M forward {time_graph(lambda: op.forward(out, lse), 3):.1f} ms, peak {(torch.cuda.max_memory_allocated() - base) / 2**20:.0f} MiB, topk_indices {ids.numel() * 4 / 2**20:.0f} MiB", flush=True)
    rows = torch.randint(0, tokens, (12,))
    want, want_lse = cases.reference_rows(q, k, v, ids, 64, cu, cu, rows, op.scale)
    cases.compare("1M out", out[rows.cuda()], want, 6e-3), cases.compare("1M lse", lse.T[rows.cuda()], want_lse, 1e-4)
    del op; torch.cuda.empty_cache()
    grad_out, grads = torch.randn_like(q), [torch.empty_like(x) for x in (q, k, v)]
    base = torch.cuda.memory_allocated(); torch.cuda.reset_peak_memory_stats()
    op = SelectedBackward(q, k, v, ids, 64, buffers=1)
    print(f"1M backward {time_graph(lambda: op.backward(out, lse, grad_out, grads), 3):.1f} ms, peak {(torch.cuda.max_memory_allocated() - base) / 2**20:.0f} MiB", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] != ["compile"]:
        faulthandler.dump_traceback_later(150, exit=True)   # a hung kernel must not hold the machine
    for command in sys.argv[1:] or ["compile"]:
        started = time.time()
        {"compile": compile_all, "check": check, "small": small, "bench": lambda: bench(BENCH), "tune": tune, "check_backward": check_all_backward, "tune_backward": tune_backward, "bench_wide": lambda: bench(WIDE, breakdown=False), "repeat": repeat, "million": million}[command]()
        print(f"[{command}: {time.time() - started:.1f} s]", flush=True)
