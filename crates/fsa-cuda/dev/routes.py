"""The routes of stage `selected` side by side: routes.py COMMAND...

check     attention to all blocks with a mask, against float64 and with the hostile lists of run.py
bench     both routes at the shapes of bench/records/h200/*-routes.json, medians of graph replays, one JSON object a line
check_mask: the mask of blocks by those who choose
check_pair, bench_pair: the forward of selected blocks and window in one walk, and one after the other
check_both, bench_whole: the backward of selected blocks and window in one pass, and beside KV-outer and window apart
FSA_DEV_SET=sm80: the portable kernels
"""
import json, math, random, statistics, sys
import torch
import band, cases
from band import Shape, HOPPER
from band_bench import time_graph
from band_params import BandPairParams, BlockMask, BlockMaskParams
from driver import Module
from params import Branch, Gates, Tensor, aligned
from selected import Selected, SelectedBackward

DEVICE = "cuda"


class Masked(Shape):
    """All earlier keys, of which a row sees those of the blocks that it lists."""

    def __init__(self, cu_q, cu_kv, hq, hk, d, topk_indices, block_size, **options):
        self.mask, self.ids, self.block_size = BlockMask(), topk_indices, block_size
        super().__init__(cu_q, cu_kv, hq, hk, **options)
        step = (128 if HOPPER else 64) if d <= 128 else (64 if HOPPER else 32)
        words, self.step = -(-cu_kv[-1] // (32 * block_size)), step
        max_steps = -(-cu_kv[-1] // step)
        i32 = lambda *shape: torch.full(shape, -1, dtype=torch.int32, device=DEVICE)
        groups = -(-cu_kv[-1] // 64)
        self.scratch = i32(hk, cu_q[-1], words), i32(hk, self.num_tiles, max_steps), i32(hk, self.num_tiles), i32(hk, groups)
        self.mask = BlockMask(*(x.data_ptr() for x in self.scratch), words, max_steps, self.num_tiles, groups)

    def band(self):
        b = super().band()
        b.mask = self.mask
        return b

    def defines(self, d, dtype):
        return dict(band.defines(d, dtype, self.block_size), FSA_BLOCK_MASK=1)

    def build(self, v, window=-1):
        p = BlockMaskParams(self.band(), band.tensor(v) if HOPPER else Tensor(), self.ids.data_ptr(), self.ids.shape[2], self.step, window)
        Module.get("block_mask.cuh", band.defines(v.shape[2], v.dtype, self.block_size)).launch("block_mask", (self.num_tiles, self.hk, 1), 128, 0, p)

    def forward(self, q, k, v, out, lse, scale):
        self.prepare()
        self.build(v)
        band.forward(self, q, k, v, out, lse, scale)

    def backward(self, q, k, v, out, lse, grad_out, grads, scale, grad_lse=None, splits=1, **options):
        self.prepare()
        self.build(v)
        band.backward(self, q, k, v, out, lse, grad_out, grads, scale, grad_lse, splits, **options)

    def of_rows(self, rows):
        return self


def check_case(name, cu_q, cu_kv, hq, hk, d=128, dtype=torch.bfloat16, block_size=64, topk=16, kind="random", twist=None, rows=None, splits=1, backward=True):
    q, k, v = band.make(Shape(cu_q, cu_kv, hq, hk), d, dtype)
    ids = cases.select(cu_q, cu_kv, hk, topk, block_size, kind)
    if twist:
        q, k, v, ids = twist(q, k, v, ids)
    s = Masked(cu_q, cu_kv, hq, hk, d, ids, block_size)
    out, lse, scale = torch.full_like(q, 7.0), torch.full((hq, cu_q[-1]), 7.0, device=DEVICE), d ** -0.5
    s.forward(q, k, v, out, lse, scale)
    torch.cuda.synchronize()
    rows = torch.arange(cu_q[-1]) if rows is None else torch.tensor(sorted({int(x) for x in torch.randint(0, cu_q[-1], (rows,))} | {0, 1, cu_q[-1] - 1}))
    want, want_lse = cases.reference_rows(q, k, v, ids, block_size, cu_q, cu_kv, rows, scale)
    ok = cases.compare(f"{name} out", out[rows.cuda()], want, 6e-3 if dtype == torch.bfloat16 else 1e-3)
    ok &= cases.compare(f"{name} lse", lse.T[rows.cuda()], want_lse, 1e-4)
    if not backward or HOPPER and d > 128:
        return ok
    grad_out, grad_lse = torch.randn(q.shape).to(dtype).to(DEVICE), torch.randn(lse.shape).to(DEVICE)
    grads = [torch.full_like(x, 7.0) for x in (q, k, v)]
    s.backward(q, k, v, out, lse, grad_out, grads, scale, grad_lse, splits)
    torch.cuda.synchronize()
    want = cases.reference_gradients(q, k, v, ids, block_size, cu_q, cu_kv, scale, grad_out, grad_lse)
    return all([cases.compare(f"{name} grad_{which}", got, w.cpu().numpy(), 1e-2 if dtype == torch.bfloat16 else 2e-3) for which, got, w in zip("qkv", grads, want)]) & ok


def check():
    hostile = lambda q, k, v, ids: (q, k, v, cases.hostile(ids))
    packed_q, packed_kv = [0, 1, 1, 130, 391, 456, 777], [0, 1, 1, 190, 451, 516, 1016]

    def unseen_nan(q, k, v, ids):
        ids = torch.where(ids == 3, -1, ids)            # nobody lists block 3
        k[192:256] = float("nan"); v[192:256] = float("nan")
        v[600, :, 5] = float("nan"); k[650] = float("nan"); v[610, :, 7] = float("inf")    # seen by later rows only
        return q, k, v, ids.contiguous()

    def some_nan(q, k, v, ids):                         # a block that half of the rows list
        ids[:, ::2] = torch.where(ids[:, ::2] == 2, -1, ids[:, ::2])
        v[130:140] = float("nan"); v[150, :, 3] = float("inf"); k[160] = float("nan")
        return q, k, v, ids.contiguous()

    def nothing(q, k, v, ids):                          # rows without keys, whole tiles of them
        ids[:, 200:600] = -1
        ids[:, 700] = 2**31 - 1
        return q, k, v, ids

    def twice(q, k, v, ids):
        ids[:, :, 1] = ids[:, :, 0]
        return q, k, v, ids
    ok = check_case("tiny", [0, 40], [0, 40], 2, 1, topk=2)
    ok &= check_case("700 g 2", [0, 700], [0, 700], 2, 1, topk=6)
    ok &= check_case("unlisted block", [0, 700], [0, 700], 2, 1, topk=6, twist=lambda q, k, v, ids: (q, k, v, torch.where(ids == 3, -1, ids).contiguous()))
    ok &= check_case("1000 g 3", [0, 1000], [0, 1000], 3, 1, topk=8, splits=2)
    ok &= check_case("hostile", [0, 900], [0, 900], 2, 2, topk=8, twist=hostile)
    ok &= check_case("packed hostile", packed_q, packed_kv, 5, 1, topk=5, twist=hostile)
    ok &= check_case("packed block 32", packed_q, packed_kv, 2, 1, topk=9, block_size=32, twist=hostile)
    ok &= check_case("block 16 topk 40", [0, 900], [0, 900], 2, 1, topk=40, block_size=16)
    ok &= check_case("block 128 f16", [0, 1500], [0, 1500], 4, 2, topk=4, block_size=128, dtype=torch.float16)
    ok &= check_case("block 256", [0, 2000], [0, 2000], 2, 1, topk=4, block_size=256, rows=200)
    ok &= check_case("unseen NaN", [0, 700], [0, 700], 2, 1, topk=6, twist=unseen_nan, backward=False)
    ok &= check_case("NaN seen by some", [0, 700], [0, 700], 2, 1, topk=16, twist=some_nan, backward=False)
    ok &= check_case("rows without keys", [0, 900], [0, 900], 2, 1, topk=6, twist=nothing)
    ok &= check_case("ids twice", [0, 900], [0, 900], 2, 1, topk=6, twist=twice)
    for d in (64, 96, 192, 256):
        ok &= check_case(f"head_dim {d}", [0, 700], [0, 700], 2, 1, d=d, topk=6)
    ok &= check_case("group of 160", [0, 300], [0, 300], 160, 1, topk=3)
    print("routes all ok" if ok else "ROUTES SOME FAILED", flush=True)


def times(n, g, hq=32, d=128, block_size=64, topk=16, kind="random"):
    """Milliseconds of both routes at one shape, one sequence of n tokens: {(pass, route): ms}."""
    hk, cu, scale = hq // g, [0, n], d ** -0.5
    q, k, v = band.make(Shape(cu, cu, hq, hk), d, torch.bfloat16)
    ids = cases.select(cu, cu, hk, topk, block_size, kind)
    out, lse = torch.empty_like(q), torch.empty(hq, n, device=DEVICE)
    grad_out, grads = torch.randn_like(q), [torch.empty_like(x) for x in (q, k, v)]
    masked, op, back = Masked(cu, cu, hq, hk, d, ids, block_size), Selected(q, k, v, ids, block_size), SelectedBackward(q, k, v, ids, block_size)
    enough = 2 * band.MULTIPROCESSORS / (masked.num_key_tiles * hk)      # as plan/band.rs has it
    splits = min(32, 1 << max(0, math.ceil(math.log2(max(enough, 1)))))
    ways = {("forward", "kv_outer"): lambda: op.forward(out, lse), ("forward", "dense_masked"): lambda: masked.forward(q, k, v, out, lse, scale),
            ("backward", "kv_outer"): lambda: back.backward(out, lse, grad_out, grads), ("backward", "dense_masked"): lambda: masked.backward(q, k, v, out, lse, grad_out, grads, scale, splits=splits)}
    first = {key: time_graph(way) for key, way in ways.items()}
    return {key: min(first[key], time_graph(way)) for key, way in ways.items()}      # the second round after all of the first


def both_case(name, cu_q, cu_kv, hq, hk, topk, window, block_size=64, kind="random", twist=None, splits=1, gates=None, complete=False):
    """Selected blocks and window in one pass, against float64."""
    d, scale = 128, 128 ** -0.5
    q, k, v = band.make(Shape(cu_q, cu_kv, hq, hk), d, torch.bfloat16)
    ids = cases.select(cu_q, cu_kv, hk, topk, block_size, kind)
    if twist:
        q, k, v, ids = twist(q, k, v, ids)
    torch.manual_seed(1)
    grad_out, gates = torch.randn_like(q), torch.rand(*q.shape[:2], 2, device=DEVICE) if gates is None else gates(q.shape[0], q.shape[1])
    attention, near = (Shape(cu_q, cu_kv, hq, hk) if complete else Masked(cu_q, cu_kv, hq, hk, d, ids, block_size)), Shape(cu_q, cu_kv, hq, hk, window=window)
    branches = []
    for s, gate in zip((attention, near), gates.unbind(2)):
        out, lse = torch.full_like(q, 7.0), torch.full((hq, cu_q[-1]), 7.0, device=DEVICE)
        s.forward(q, k, v, out, lse, scale) if isinstance(s, Masked) else band.forward(s, q, k, v, out, lse, scale)
        branches.append(band.given_stats(out, lse, grad_out, gate))
    grads = [torch.full_like(x, 7.0) for x in (q, k, v)]
    fused = Shape(cu_q, cu_kv, hq, hk) if complete else Masked(cu_q, cu_kv, hq, hk, d, ids, block_size, rows=band.sum_rows(hq // hk, False))
    run = fused.backward if not complete else lambda *a, **o: band.backward(fused, *a, **o)
    run(q, k, v, out, lse, grad_out, grads, scale, splits=splits, one_pass=True, given=branches[0], window=(window, *branches[1]))
    torch.cuda.synchronize()
    tables = every_block(cu_q, cu_kv, hk, block_size) if complete else ids, None
    want = [0.0, 0.0, 0.0]
    for lists, gate, near_window in zip(tables, gates.unbind(2), (None, window)):
        if near_window is None:
            w = cases.reference_gradients(q, k, v, lists, block_size, cu_q, cu_kv, scale, grad_out.float() * gate[:, :, None], torch.zeros(hq, cu_q[-1], device=DEVICE))
        else:
            w = band.reference(near, q, k, v, scale, grad_out.float() * gate[:, :, None])
        want = [a + b.cpu() for a, b in zip(want, w)]
    return all([cases.compare(f"both {name} grad_{which}", got, w.numpy(), 1e-2) for which, got, w in zip("qkv", grads, want)])


def branch_of(total, gates, number, discards):
    """What becomes of a branch of the whole: `total` is added to."""
    return Branch(band.tensor(total), Gates(gates.data_ptr(), gates.stride(0), gates.stride(1)), number, 1, discards)


def forward_pair(s, window, tensors, rows, compressed, total, gates, scale, discards=0):
    """Selected blocks and window in one walk; `s` is Masked with the steps of the window; `rows` are out and lse of both branches, `compressed` those of the third, which may be `total`."""
    p, (out, lse, near_out, near_lse) = aligned(BandPairParams), rows
    band.fill_forward(p.attention, s, *tensors, out, lse, scale, 128, branch=branch_of(total, gates, 1, discards))
    p.out, p.lse, p.branch, p.compressed, p.window = band.tensor(near_out), near_lse.data_ptr(), branch_of(total, gates, 2, discards), band.tensor(compressed), window
    d = out.shape[2]
    Module.get("band_pair_sm90.cuh", band.defines(d, out.dtype, s.block_size)).launch("band_pair", s.persistent(s.hk), 384, -(-d // 64) * 128 * 5 * 128, p)


def pair_case(name, cu_q, cu_kv, hq, hk, topk, window, d=128, dtype=torch.bfloat16, block_size=64, kind="random", twist=None, rows=40):
    """Both branches and the sum of all three against float64; a call that discards its rows, with those of the third in the sum, gives the same sum."""
    q, k, v = band.make(Shape(cu_q, cu_kv, hq, hk), d, dtype)
    ids, scale = cases.select(cu_q, cu_kv, hk, topk, block_size, kind), d ** -0.5
    if twist:
        q, k, v, ids = twist(q, k, v, ids)
    s, n = Masked(cu_q, cu_kv, hq, hk, d, ids, block_size), cu_q[-1]
    gates, before = torch.randn(n, hq, 3, device=DEVICE).to(dtype), torch.randn_like(q)
    results = []
    for discards in (0, 1):
        outs, lses, total = [torch.full_like(q, 7.0) for _ in range(2)], [torch.full((hq, n), 7.0, device=DEVICE) for _ in range(2)], before.clone() if discards else torch.full_like(q, 7.0)
        s.prepare()
        s.build(v, window)
        forward_pair(s, window, (q, k, v), (outs[0], lses[0], outs[1], lses[1]), total if discards else before, total, gates, scale, discards)
        torch.cuda.synchronize()
        results.append((outs, lses, total))
    same = torch.equal(results[0][2].view(torch.int16), results[1][2].view(torch.int16)) and all(bool((x == 7.0).all()) for x in results[1][0])
    picked = torch.tensor(sorted({int(x) for x in torch.randint(0, n, (rows,))} | {0, 1, n - 1}))
    position = cases.positions(cu_q, cu_kv)[1].to(DEVICE)
    reach = min(window, int(position.max()))
    seen = (position[:, None] - torch.arange(reach + 1, device=DEVICE)[None]).clamp(min=-1).int().expand(hk, n, reach + 1).contiguous()
    ok, want_sum = same, (gates[picked.to(DEVICE), :, 0, None].double() * before[picked.to(DEVICE)].double()).cpu().numpy()
    if not same:
        print(f"FAIL {name}: sums of calls that save and discard differ")
    for number, (lists, size) in enumerate(((ids, block_size), (seen, 1))):
        want, want_lse = cases.reference_rows(q, k, v, lists, size, cu_q, cu_kv, picked, scale)
        label, tolerance = f"pair {name} {('selected', 'window')[number]}", 6e-3 if dtype == torch.bfloat16 else 1e-3
        ok &= cases.compare(f"{label} out", results[0][0][number][picked.to(DEVICE)], want, tolerance)
        ok &= cases.compare(f"{label} lse", results[0][1][number].T[picked.to(DEVICE)], want_lse, 1e-4)
        want_sum = want_sum + gates[picked.to(DEVICE), :, 1 + number].double().cpu().numpy()[:, :, None] * want
    return cases.compare(f"pair {name} sum", results[0][2][picked.to(DEVICE)], want_sum, tolerance) & ok


def mask_case(name, cu_q, cu_kv, hq, hk, topk, window, init=1, local=2, d=128, dtype=torch.bfloat16, twist=None):
    """The mask by those who choose is that of their lists."""
    q, k, v = band.make(Shape(cu_q, cu_kv, hq, hk), d, dtype)
    if twist:
        twist(v)
    near = Shape(cu_q, cu_kv, hq, hk, compressed=(32, 16))
    _, ck, cv = band.make(near, d, dtype, seed=1)
    ids = torch.full((hk, cu_q[-1], topk), 77, dtype=torch.int32, device=DEVICE)
    masks = [Masked(cu_q, cu_kv, hq, hk, d, ids, 64) for _ in range(2)]
    out, lse = torch.empty_like(q), torch.empty(hq, cu_q[-1], device=DEVICE)
    band.forward_select(near, q, ck, cv, out, lse, ids, d ** -0.5, init=init, local=local, mask=(masks[0].mask, v, window))
    masks[1].build(v, window)
    torch.cuda.synchronize()
    (rows, steps, counts, nonfinite), want = masks[0].scratch, masks[1].scratch
    listed = torch.arange(steps.shape[2], device=DEVICE) < want[2][:, :, None]
    same = [torch.equal(rows, want[0]), torch.equal(torch.where(listed, steps, 0), torch.where(listed, want[1], 0)), torch.equal(counts, want[2]), torch.equal(nonfinite, want[3])]
    print(f"{'ok  ' if all(same) else 'FAIL'} mask {name}: {same}", flush=True)
    return all(same)


def check_mask():
    def nonfinite(v):
        v[130] = float("nan"); v[700, 0, 5] = float("inf")
    ok = mask_case("2K", [0, 2048], [0, 2048], 8, 2, 16, 512)
    ok &= mask_case("4,095 g 2", [0, 4095], [0, 4095], 4, 2, 16, 512)
    ok &= mask_case("8K g 16 no window", [0, 8192], [0, 8192], 16, 1, 16, -1)
    ok &= mask_case("packed g 8", [0, 5, 5, 700, 1500], [0, 90, 90, 1700, 3500], 8, 1, 16, 2**31 - 1)
    ok &= mask_case("packed, values not finite", [0, 1, 1, 130, 391, 1456], [0, 1, 1, 130, 391, 1456], 4, 1, 16, 100, twist=nonfinite)
    ok &= mask_case("forced blocks alone", [0, 1800], [0, 1800], 4, 1, 3, 64)
    ok &= mask_case("three first blocks, f16, head_dim 64", [0, 1800], [0, 1800], 4, 1, 5, 64, init=3, local=1, d=64, dtype=torch.float16)
    print("mask all ok" if ok else "MASK SOME FAILED", flush=True)


def check_pair():
    hostile = lambda q, k, v, ids: (q, k, v, cases.hostile(ids))
    packed_q, packed_kv = [0, 1, 1, 130, 391, 456, 777], [0, 1, 1, 190, 451, 516, 1016]

    def nothing(q, k, v, ids):                          # rows without blocks, whole tiles of them
        ids[:, 200:600] = -1
        ids[:, 700] = 2**31 - 1
        return q, k, v, ids

    def unseen(value):                                  # of keys that neither branch of most rows sees, that one does, that later rows do
        def twist(q, k, v, ids):
            ids = torch.where((ids == 3) | (ids == 9), -1, ids)
            k[192:256] = value; v[192:256] = value
            v[600, :, 5] = value; k[650] = value; v[610, :, 7] = float("inf")
            return q, k, v, ids.contiguous()
        return twist

    def some(q, k, v, ids):                             # a block that half of the rows list
        ids[:, ::2] = torch.where(ids[:, ::2] == 5, -1, ids[:, ::2])
        v[330:340] = float("nan"); v[350, :, 3] = float("inf"); k[360] = float("nan")
        return q, k, v, ids.contiguous()

    def one_head(q, k, v, ids):                         # values of one head of many
        v[600:610, 4] = float("nan")
        return q, k, v, ids

    def loud(first, end, factor, unlisted):             # logits of some keys far above the others; blocks that nobody lists
        def twist(q, k, v, ids):
            k[first:end] *= factor
            for block in unlisted:
                ids = torch.where(ids == block, -1, ids)
            return q, k, v, ids.contiguous()
        return twist
    ok = pair_case("tiny", [0, 40], [0, 40], 2, 1, 2, 10)
    ok &= pair_case("700 g 2", [0, 700], [0, 700], 4, 2, 6, 200)
    ok &= pair_case("g 1 window 130", [0, 900], [0, 900], 2, 2, 5, 130)
    ok &= pair_case("g 1 window 0", [0, 600], [0, 600], 2, 2, 5, 0)
    ok &= pair_case("g 16 window 512", [0, 1300], [0, 1300], 16, 1, 8, 512)
    ok &= pair_case("g 4 window 512", [0, 2000], [0, 2000], 4, 1, 8, 512)
    ok &= pair_case("long window", [0, 500], [0, 500], 4, 1, 3, 2**31 - 1)
    ok &= pair_case("packed hostile", packed_q, packed_kv, 5, 1, 5, 100, twist=hostile)
    ok &= pair_case("packed, block 32", packed_q, packed_kv, 2, 1, 9, 77, block_size=32, twist=hostile)
    ok &= pair_case("block 16, topk 40", [0, 900], [0, 900], 2, 1, 40, 77, block_size=16)
    ok &= pair_case("block 128 f16", [0, 1500], [0, 1500], 4, 2, 4, 300, block_size=128, dtype=torch.float16)
    ok &= pair_case("block 256", [0, 2000], [0, 2000], 2, 1, 4, 300, block_size=256)
    ok &= pair_case("rows without blocks", [0, 900], [0, 900], 2, 1, 6, 64, twist=nothing)
    ok &= pair_case("unseen NaN", [0, 700], [0, 700], 2, 1, 6, 100, twist=unseen(float("nan")))
    ok &= pair_case("unseen infinity", [0, 700], [0, 700], 4, 2, 6, 100, twist=unseen(float("inf")))
    ok &= pair_case("NaN seen by some", [0, 700], [0, 700], 2, 1, 16, 100, twist=some)
    ok &= pair_case("NaN in one head", [0, 4200], [0, 4200], 8, 8, 4, 100, twist=one_head, rows=12)
    for dtype in (torch.bfloat16, torch.float16):
        ok &= pair_case(f"window far above {dtype}", [0, 700], [0, 700], 4, 1, 4, 150, dtype=dtype, twist=loud(448, 560, 40, (7, 8)))
        ok &= pair_case(f"window above {dtype}", [0, 700], [0, 700], 4, 1, 4, 150, dtype=dtype, twist=loud(448, 560, 4, (7, 8)))
        ok &= pair_case(f"blocks far above {dtype}", [0, 700], [0, 700], 4, 1, 4, 100, dtype=dtype, twist=loud(0, 64, 60, ()))
    for d in (64, 96):
        ok &= pair_case(f"head_dim {d}", [0, 700], [0, 700], 2, 1, 6, 100, d=d)
    ok &= pair_case("group of 160", [0, 300], [0, 300], 160, 1, 3, 30, rows=8)
    print("pair all ok" if ok else "PAIR SOME FAILED", flush=True)


def bench_pair(shapes=[(n, g) for n in (1536, 2048, 4096) for g in (4, 1, 16)], window=512, hq=32, d=128, block_size=64, topk=16, kind="random", saves=True):
    """Microseconds of the forward of selected blocks and window as branches of the whole, without the mask: medians of shuffled rounds."""
    for n, g in shapes:
        hk, cu, scale = hq // g, [0, n], d ** -0.5
        q, k, v = band.make(Shape(cu, cu, hq, hk), d, torch.bfloat16)
        ids, near = cases.select(cu, cu, hk, topk, block_size, kind), Shape(cu, cu, hq, hk, window=window)
        s, both = (Masked(cu, cu, hq, hk, d, ids, block_size) for _ in range(2))
        s.build(v)
        both.build(v, window)
        rows = [torch.empty_like(q), torch.empty(hq, n, device=DEVICE), torch.empty_like(q), torch.empty(hq, n, device=DEVICE)]
        gates, totals, before = torch.rand(n, hq, 3, device=DEVICE).to(q.dtype), [torch.zeros_like(q) for _ in range(2)], torch.zeros_like(q)
        selected = lambda: band.forward(s, q, k, v, *rows[:2], scale, branch_of(totals[0], gates, 1, not saves))
        local = lambda: band.forward(near, q, k, v, *rows[2:], scale, branch_of(totals[0], gates, 2, not saves))
        pair = lambda: forward_pair(both, window, (q, k, v), rows, before if saves else totals[1], totals[1], gates, scale, not saves)
        selected(), local()
        apart = [x.clone() for x in rows]
        pair()
        worst = max(float((a - b).abs().max()) for a, b in zip(apart + totals[:1], rows + totals[1:])) if saves else 0.0
        ways = {"selected": selected, "window": local, "apart": lambda: (selected(), local()), "pair": pair}
        us = time_rounds(ways)
        print(f"{n} g {g} {kind}: " + ", ".join(f"{name} {us[name]:.1f}" for name in ways) + f"; pair / apart {us['pair'] / us['apart']:.3f}; differ by {worst:.1e}", flush=True)


def time_rounds(ways, rounds=9):
    """Microseconds of a replay: medians of shuffled rounds."""
    graphs, times = {}, {name: [] for name in ways}
    for name, way in ways.items():
        way()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            way()
    for _ in range(rounds):
        for name in random.sample(list(ways), len(ways)):
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graphs[name].replay()
            a.record(); graphs[name].replay(); b.record(); torch.cuda.synchronize()
            times[name].append(1e3 * a.elapsed_time(b))
    return {name: statistics.median(x) for name, x in times.items()}


def every_block(cu_q, cu_kv, hk, block_size):
    blocks = -(-max(b - a for a, b in zip(cu_kv, cu_kv[1:])) // block_size)
    return torch.arange(blocks, dtype=torch.int32, device=DEVICE).expand(hk, cu_q[-1], blocks).contiguous()


def check_both():
    hostile = lambda q, k, v, ids: (q, k, v, cases.hostile(ids))
    packed_q, packed_kv = [0, 1, 1, 130, 391, 456, 777], [0, 1, 1, 190, 451, 516, 1016]

    def nothing(q, k, v, ids):
        ids[:, 200:600] = -1
        return q, k, v, ids

    def apart(q, k, v, ids):                            # log-sum-exps far apart
        k[100:140] *= 40
        return q, k, v, ids
    signs = lambda n, h: torch.randn(n, h, 2, device=DEVICE) * (torch.rand(n, h, 2, device=DEVICE) < 0.8) * 3
    ok = both_case("tiny", [0, 40], [0, 40], 2, 1, 2, 10)
    ok &= both_case("last key", [0, 257], [0, 257], 2, 1, 2, 10)
    ok &= both_case("complete", [0, 500], [0, 500], 4, 1, 8, 200, complete=True, splits=2)
    ok &= both_case("700", [0, 700], [0, 700], 4, 2, 6, 200)
    ok &= both_case("g 1 window 0", [0, 600], [0, 600], 2, 2, 5, 0)
    ok &= both_case("g 16 long window", [0, 400], [0, 400], 16, 1, 3, 5000, gates=signs)
    ok &= both_case("packed hostile", packed_q, packed_kv, 5, 1, 5, 100, twist=hostile, gates=signs, splits=2)
    ok &= both_case("block 16", packed_q, packed_kv, 2, 1, 20, 77, block_size=16, gates=signs)
    ok &= both_case("block 32", packed_q, packed_kv, 2, 1, 9, 300, block_size=32)
    ok &= both_case("block 256", [0, 900], [0, 900], 2, 1, 2, 128, block_size=256)
    ok &= both_case("rows without blocks", [0, 900], [0, 900], 2, 1, 6, 64, twist=nothing)
    ok &= both_case("far apart", [0, 500], [0, 500], 2, 1, 3, 64, twist=apart)
    ok &= both_case("group of 160", [0, 200], [0, 200], 160, 1, 2, 30)
    print("both all ok" if ok else "BOTH SOME FAILED", flush=True)


def splits_of(s):
    """As plan/band.rs has it."""
    enough = 1.5 * band.MULTIPROCESSORS / (s.num_key_tiles * s.hk)
    rows = min(s.cu_q[-1] // (len(s.cu_q) - 1), s.window + 128) * (s.hq // s.hk)
    return min(32, 1 << max(0, math.ceil(math.log2(max(enough, 1)))), 1 << max(0, math.floor(math.log2(max(rows / 512, 1)))))


def times_of_whole(n, g, hq=32, d=128, block_size=64, topk=16, window=512, kind="random"):
    """Milliseconds of the backward of selected blocks and window inside the whole, apart and in one pass: {way: ms}."""
    hk, cu, scale = hq // g, [0, n], d ** -0.5
    q, k, v = band.make(Shape(cu, cu, hq, hk), d, torch.bfloat16)
    ids, complete = cases.select(cu, cu, hk, topk, block_size, kind), n <= topk * block_size
    attention = lambda rows: Shape(cu, cu, hq, hk, rows=rows) if complete else Masked(cu, cu, hq, hk, d, ids, block_size, rows=rows)
    near, two, one = Shape(cu, cu, hq, hk, window=window), attention(128), attention(band.sum_rows(g, False))
    op, grad_out, grads = SelectedBackward(q, k, v, ids, block_size), torch.randn_like(q), [torch.empty_like(x) for x in (q, k, v)]
    branches = []
    for s in (two, near):
        out, lse = torch.empty_like(q), torch.empty(hq, n, device=DEVICE)
        s.forward(q, k, v, out, lse, scale) if isinstance(s, Masked) else band.forward(s, q, k, v, out, lse, scale)
        branches.append(band.given_stats(out, lse, grad_out, torch.ones(n, hq, device=DEVICE)))

    def run(s, given, **options):
        s.prepare()
        if isinstance(s, Masked):
            s.build(v)
        band.backward(s, q, k, v, out, lse, grad_out, grads, scale, splits=splits_of(s), given=given, **options)
    ways = {"one_pass": lambda: run(one, branches[0], one_pass=True, window=(window, *branches[1])), "window": lambda: run(near, branches[1], accumulate=True),
            "dense_masked": lambda: run(two, branches[0], accumulate=True), "kv_outer": lambda: op.backward(out, lse, grad_out, grads)}
    first = {key: time_graph(way) for key, way in ways.items()}
    return {key: min(first[key], time_graph(way)) for key, way in ways.items()}


def bench_whole(shapes=[(n, g) for n in (512, 1024, 1536, 2048, 3072, 4096, 5120, 6144, 8192) for g in (1, 4, 16)], window=512):
    """KV-outer with the window after it, and one pass for both, as the routes of a backward with a window."""
    for n, g in shapes:
        ms = times_of_whole(n, g, window=window)
        for route, sum_ms in (("kv_outer", ms["kv_outer"] + ms["window"]), ("dense_masked", ms["one_pass"])):
            print(json.dumps({"n": n, "g": g, "hq": 32, "d": 128, "bk": 64, "T": 16, "window": window, "pass": "backward", "route": route, "ms": round(sum_ms, 4)}), flush=True)


SHAPES = [(n, g, 32, 128, 64, 16) for n in (512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384) for g in (1, 4, 16)] + [(n, 4, 32, 128, 128, 8) for n in (1024, 2048, 4096, 8192)] + [
    (n, 4, 32, 64, 64, 16) for n in (1024, 4096, 8192)] + [(n, 4, 8, 128, 64, 16) for n in (2048, 8192)]


def bench():
    for shape in SHAPES:
        n, g, hq, d, block_size, topk = shape
        for (which, route), ms in times(*shape).items():
            print(json.dumps({"n": n, "g": g, "hq": hq, "d": d, "bk": block_size, "T": topk, "pass": which, "route": route, "ms": round(ms, 4)}), flush=True)


if __name__ == "__main__":
    for command in sys.argv[1:] or ["check"]:
        globals()[command]()
