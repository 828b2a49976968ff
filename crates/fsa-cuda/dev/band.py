"""Development harness of the stages besides `selected`: band.py COMMAND...

check     window, compressed and dense attention, forward and backward, and the selection, small and packed, against float64
bench     medians of graph replays at the shapes of the record
FSA_DEV_SET=sm80: the portable kernels; FSA_DEV_STEP_KEYS: keys of a step of windows in the forward; FSA_DEV_SUM_ROWS: rows of a tile of the one pass
"""
import ctypes, math, os, sys
import torch
import sets
from driver import Module, tensor_map
from band_params import Band, BandBackwardParams, BandParams, BandSelectParams, BatchTables, PrepareParams, SelectParams
from params import Branch, SumBounds, Tensor, aligned

DEVICE = "cuda"
HOPPER = sets.SET == "sm90"
ROWS = 128 if HOPPER else 64
MULTIPROCESSORS = torch.cuda.get_device_properties(0).multi_processor_count


def tensor(x):
    return Tensor(x.data_ptr(), x.stride(0), x.stride(1))


class Shape:
    """Which rows see which keys: window (earlier keys), or windows of compression, or all earlier keys."""

    def __init__(self, cu_q, cu_kv, hq, hk, window=None, compressed=None, rows=ROWS, heads=None):
        self.cu_q, self.cu_kv, self.hq, self.hk, self.window = cu_q, cu_kv, hq, hk, 2**31 - 1 if window is None else window
        self.kernel_size, self.kernel_stride = compressed or (1, 1)
        self.compressed = compressed is not None
        keys = [max(0, (b - a - self.kernel_size) // self.kernel_stride + 1) for a, b in zip(cu_kv, cu_kv[1:])]
        self.cu_keys = [0]
        for n in keys:
            self.cu_keys.append(self.cu_keys[-1] + n)
        g = heads or hq // hk
        self.head_tiles = -(-g // rows)
        self.tile_heads = -(-g // self.head_tiles)
        self.tile_tokens = rows // self.tile_heads
        self.num_tiles = cu_q[-1] // self.tile_tokens + len(cu_q) - 1
        self.tile_keys = 128 if HOPPER else 64
        self.num_key_tiles = self.cu_keys[-1] // self.tile_keys + len(cu_q) - 1
        i32 = lambda v: torch.tensor(v, dtype=torch.int32, device=DEVICE)
        self.q, self.kv, self.keys_sum, self.tile_base, self.key_tile_base = i32(cu_q), i32(cu_kv), i32(cu_kv), i32(cu_q), i32(cu_q)
        if self.compressed:
            self.keys_sum = i32([-1] * len(cu_q))
        self.prepare()

    def prepare(self):
        p = BatchTables(self.q.data_ptr(), self.kv.data_ptr(), self.keys_sum.data_ptr() if self.compressed else None, self.tile_base.data_ptr(), self.key_tile_base.data_ptr(), (ctypes.c_void_p * 6)(),
                          len(self.cu_q) - 1, self.kernel_size, self.kernel_stride, self.tile_tokens, self.tile_keys, self.compressed)
        Module.get("prepare.cuh", defines(64)).launch("prepare", (1, 1, 1), 1024, 0, PrepareParams((p, p)))

    def band(self):
        return Band(*(x.data_ptr() for x in (self.q, self.kv, self.keys_sum, self.tile_base, self.key_tile_base)), len(self.cu_q) - 1, self.cu_q[-1], self.cu_keys[-1], self.kernel_size,
                    self.kernel_stride, self.window, self.hq // self.hk, self.tile_heads, self.tile_tokens, self.head_tiles)

    def defines(self, d, dtype):
        return defines(d, dtype)

    def of_rows(self, rows):
        """The same in tiles of so many rows."""
        name = f"of_{rows}_rows"
        if name not in self.__dict__:
            self.__dict__[name] = Shape(self.cu_q, self.cu_kv, self.hq, self.hk, self.window, (self.kernel_size, self.kernel_stride) if self.compressed else None, rows=rows)
        return self.__dict__[name]

    def persistent(self, heads):
        return (max(1, min(self.num_tiles * self.head_tiles * heads, MULTIPROCESSORS)), 1, 1) if HOPPER else (self.num_tiles * self.head_tiles, heads, 1)


def defines(d, dtype=torch.bfloat16, block_size=64):
    return dict(FSA_HEAD_DIM=d, FSA_BLOCK_SIZE=block_size, FSA_IS_BF16=int(dtype == torch.bfloat16))


LOG2_E = 1.4426950408889634


def fill_forward(p, s, q, k, v, out, lse, scale, step, every=1, branch=None):
    p.band, p.query, p.key, p.value, p.out, p.lse = s.band(), tensor(q), tensor(k), tensor(v), tensor(out), lse.data_ptr()
    p.branch = branch or Branch()
    p.scale_log2, p.num_tiles, p.num_kv_heads = scale * LOG2_E, s.num_tiles, s.hk
    p.query_map, p.key_map, p.value_map = tensor_map(q, s.tile_tokens, s.tile_heads), tensor_map(k, step, 1, every), tensor_map(v, step, 1, every)


CHOICE_BYTES = {1: 4 * 16384, 2: 8 * 4160}      # of the warps that choose: beside those that attend, or these, for their rows


def forward_select(s, q, k, v, out, lse, ids, scale, block_size=64, init=1, local=2, mask=None):
    """Compressed attention and the choice of blocks in one pass: 1, 2, 4, 8 or 16 heads a group, blocks of four compressed keys. `mask`: BlockMask of what is chosen,
    which becomes written, the tokens' values and the window."""
    p, grid, way = aligned(BandSelectParams), s.persistent(s.hk), 2 if s.hq == s.hk else 1
    fill_forward(p.attention, s, q, k, v, out, lse, scale, 128, 4)
    c = p.choice
    c.max_steps = -(-max(b - a for a, b in zip(s.cu_kv, s.cu_kv[1:])) // (32 * block_size * 4)) * 4
    words = grid[0] * (3 - way) * 128 * 33 * c.max_steps
    if "slots" not in s.__dict__:
        s.slots = torch.full((words,), math.nan, device=DEVICE)
    c.scores, c.topk_indices, c.topk, c.init_blocks, c.local_blocks = s.slots.data_ptr(), ids.data_ptr(), ids.shape[2], init, local
    if mask:
        c.mask, c.value, c.window = mask[0], tensor(mask[1]), mask[2]
    p.out_map = tensor_map(out, s.tile_tokens, s.tile_heads)
    shared = -(-q.shape[2] // 64) * 128 * (128 + 4 * 128) + CHOICE_BYTES[way]
    Module.get(("band_select_sm90.cuh", "band_select_rows_sm90.cuh")[way - 1], defines(q.shape[2], q.dtype, block_size)).launch("band", grid, 640 - 128 * way, shared, p)


def step_keys(s, d):
    """Keys of a step, as BandProblem::kernel chooses them; FSA_DEV_STEP_KEYS of windows to compare."""
    seen = s.window + s.tile_tokens
    if not HOPPER or d > 128 or seen >= s.cu_kv[-1]:
        return 128 if d <= 128 else 64
    return int(os.environ.get("FSA_DEV_STEP_KEYS", min((128, 112, 144), key=lambda keys: -(-seen // keys) * (keys + 4))))


def forward(s, q, k, v, out, lse, scale, branch=None):
    d = q.shape[2]
    step = step_keys(s, d)
    p = aligned(BandParams)
    fill_forward(p, s, q, k, v, out, lse, scale, step, branch=branch)
    halves = -(-d // 64)
    shared = halves * 128 * (128 + 4 * step) if HOPPER else (64 + 2 * (64 if d <= 128 else 32)) * halves * 128
    chosen = dict(FSA_STEP_KEYS=step) if HOPPER else {}
    Module.get(sets.file("band"), dict(s.defines(d, q.dtype), **chosen)).launch("band", s.persistent(s.hk), 384 if HOPPER else 128, shared, p)


def given_stats(out, lse, grad_out, gate):
    """Statistics of the rows of a branch of the whole and their bounds, as combine_statistics makes them; gate is [rows, heads]."""
    delta, size, gate = (out.double() * grad_out.double()).sum(2).T.float(), grad_out.float().abs().sum(2).T, gate.float().T
    sees = torch.isfinite(lse)
    bits = delta.contiguous().view(torch.int32) & ~1 | (gate < 0).int()
    stats = torch.stack([torch.where(sees, lse * LOG2_E - torch.log2(gate.abs()), math.inf), torch.where(sees, bits.view(torch.float32), 0.0)], 2).contiguous()
    bound = lambda x: torch.where(sees & torch.isfinite(x), x.abs(), 0.0).max()
    return stats, torch.stack([bound(gate * size), bound(gate * delta)]).view(torch.int32)


def sum_rows(heads, is_short):
    """Rows of a tile of the one pass, as BandBackwardPlan chooses them; FSA_DEV_SUM_ROWS to compare."""
    def used(rows):
        tile_heads = -(-heads // -(-heads // rows))
        return rows // tile_heads * tile_heads
    return 64 if is_short else int(os.environ.get("FSA_DEV_SUM_ROWS", 80 if 5 * used(80) >= 6 * used(64) else 64))


def backward(s, q, k, v, out, lse, grad_out, grads, scale, grad_lse=None, splits=1, only=None, one_pass=False, given=None, window=None, accumulate=False):
    """In two passes, or in one; `only` is one of the kernels by its last word. `given` are statistics of rows with bounds; `window` is its size and the same of
    the rows' attention to it, which the one pass does too."""
    d = q.shape[2]
    rows = sum_rows(s.hq // s.hk, window is not None and "FSA_BLOCK_MASK" not in s.defines(d, q.dtype)) if one_pass else ROWS
    s = s.of_rows(rows) if one_pass else s
    gq, gk, gv = grads
    p = aligned(BandBackwardParams)
    p.band = s.band()
    p.query, p.key, p.value, p.out, p.grad_out, p.grad_query, p.grad_key, p.grad_value = (tensor(x) for x in (q, k, v, out, grad_out, gq, gk, gv))
    stats = given[0] if given else s.__dict__.setdefault("stats", torch.empty(s.hq, s.cu_q[-1], 2, device=DEVICE))
    partial = s.__dict__.setdefault(f"partial{splits}", torch.empty((splits, 2) + tuple(k.shape), device=DEVICE) if splits > 1 else stats)
    p.lse, p.grad_lse, p.row_stats, p.partial_keys = lse.data_ptr(), None if grad_lse is None else grad_lse.data_ptr(), stats.data_ptr(), partial.data_ptr()
    p.scale_log2, p.scale, p.num_kv_heads, p.num_tiles, p.num_key_tiles, p.splits, p.resident = scale * LOG2_E, scale, s.hk, s.num_tiles, s.num_key_tiles, splits, MULTIPROCESSORS
    p.query_map, p.grad_out_map = tensor_map(q, s.tile_tokens, s.tile_heads), tensor_map(grad_out, s.tile_tokens, s.tile_heads)
    p.key_map, p.value_map = tensor_map(k, 128, 1), tensor_map(v, 128, 1)
    p.accumulate = p.accumulate_keys = accumulate
    m = Module.get("band_sums_sm90.cuh" if one_pass else sets.file("band_backward"), dict(s.defines(d, q.dtype), **(dict(FSA_WINDOW_TOO=1) if window else {}), **(dict(FSA_SUM_ROWS=rows) if one_pass else {})))
    halves = -(-d // 64)
    shared = halves * 128 * 128 * 6 if HOPPER else halves * 128 * (2 * 64 + 3 * 64)
    threads = 384 if HOPPER else 128
    if one_pass:
        bounds = s.__dict__.setdefault("bounds", torch.zeros(4, dtype=torch.int32, device=DEVICE))
        p.key_bounds, p.row_bounds = bounds.data_ptr(), (given[1] if given else bounds[2:]).data_ptr()
        p.sums[0] = SumBounds(p.row_bounds, p.key_bounds)
        if window:
            p.window_size, p.window_stats, p.sums[1] = window[0], window[1].data_ptr(), SumBounds(window[2].data_ptr(), p.key_bounds)
        p.sums_map = tensor_map(gq.view(torch.float16), s.tile_tokens, s.tile_heads)
        targets, of_bounds = -(-gq.numel() * 2 // 16384), -(-s.cu_keys[-1] // 64) * s.hk
        if only is None:
            bounds.zero_()
    if only in (None, "delta") and not given:
        m.launch("band_delta", (-(-s.cu_q[-1] // 8) * -(-s.hq // 8), 1, 1), 256, 0, p)
    if one_pass:
        if only in (None, "open"):
            m.launch("band_sums_open", (max(targets, of_bounds), 1, 1), 256, 0, p)
        if only in (None, "sums"):
            # keys and values; stages of rows and their gradients; two of score gradients, and sums
            m.launch("band_sums", (s.num_key_tiles, s.hk, splits), threads, (256 + rows * (2 * (3 if rows == 64 else 2) + 3)) * 256, p)
        if only in (None, "finish"):
            m.launch("band_sums_finish", (targets, 1, 1), 256, 0, p)
    else:
        if only in (None, "queries"):
            m.launch("band_backward_queries", s.persistent(s.hk), threads, shared, p)
        if only in (None, "keys"):
            m.launch("band_backward_keys", (s.num_key_tiles, s.hk, splits), threads, shared, p)
    if only in (None, "keys", "sums") and splits > 1:
        m.launch("band_backward_merge", (-(-k.numel() // 1024), 1, 1), 256, 0, p)


SELECT_CONSUMERS = 3    # warpgroups of 64 rows


def select(s, q, k, lse, ids, scale, block_size=64, init=1, local=2, heads=None):
    d, topk = q.shape[2], ids.shape[2]
    if HOPPER and "scores" not in s.__dict__:
        s.scores = Shape(s.cu_q, s.cu_kv, s.hq, s.hk, compressed=(s.kernel_size, s.kernel_stride), rows=64 * SELECT_CONSUMERS, heads=heads)
    s = s.scores if HOPPER else s
    p = aligned(SelectParams)
    p.band, p.query, p.key, p.lse, p.topk_indices = s.band(), tensor(q), tensor(k), lse.data_ptr(), ids.data_ptr()
    p.scale_log2, p.topk, p.init_blocks, p.local_blocks, p.scored_heads = scale * LOG2_E, topk, init, local, heads or s.hq // s.hk
    p.num_tiles, p.num_kv_heads = s.num_tiles, s.hk
    p.query_map, p.key_map = tensor_map(q, s.tile_tokens, s.tile_heads), tensor_map(k, 128 if d <= 128 else 64, 1, 4 if HOPPER else 1)
    row, t = -(-d // 64) * 128, s.tile_tokens
    if HOPPER:
        step, rows = 128 if d <= 128 else 64, 64 * SELECT_CONSUMERS
        p.direct = int(block_size // s.kernel_stride == 4 and s.tile_heads in (1, 2, 4, 8))
        shared = row * (rows + 2 * step) + (t + 1) * 272 + (0 if p.direct else 2 * rows * (step // 4 + 8) * 4)
        if p.direct and s.tile_heads > 1:
            p.segment_steps = min((227 * 1024 - 4096 - shared) // (t * 128) * 32 - 32, 512) // (step // 4)
            shared += t * (-(-p.segment_steps * (step // 4) // 32) * 32 + 8) * 4
        grid, threads = (max(1, min(s.num_tiles * s.hk, MULTIPROCESSORS)), 1, 1), rows * 2 + 128
    else:
        steps, reach, floor2 = block_size // s.kernel_stride, s.kernel_size // s.kernel_stride - 1, lambda n: 1 << (n.bit_length() - 1)
        width = max(floor2(2048 // t), 1 << ((63 + reach) // steps + 1).bit_length())
        shared, grid, threads = 64 * row + 64 * 68 * 4 + t * (width + 1) * 4 + t * topk * 8, (s.num_tiles, s.hk, 1), 128
    Module.get(sets.file("select"), defines(d, q.dtype, block_size)).launch("select", grid, threads, shared, p)


def visible(s, number):
    """[rows, keys] of one sequence."""
    q_len, kv_len, keys = (c[number + 1] - c[number] for c in (s.cu_q, s.cu_kv, s.cu_keys))
    position = torch.arange(q_len)[:, None] + kv_len - q_len
    key = torch.arange(keys)[None]
    return (key * s.kernel_stride + s.kernel_size - 1 <= position) & (key >= position - s.window)


def reference(s, q, k, v, scale, grad_out=None, grad_lse=None):
    q, k, v = (x.detach().cpu().double().requires_grad_() for x in (q, k, v))
    outs, lses = [], []
    for n in range(len(s.cu_q) - 1):
        mask = visible(s, n)
        qs, ks, vs = q[s.cu_q[n]:s.cu_q[n + 1]], k[s.cu_keys[n]:s.cu_keys[n + 1]], v[s.cu_keys[n]:s.cu_keys[n + 1]]
        g = s.hq // s.hk
        ks, vs = ks.repeat_interleave(g, 1), vs.repeat_interleave(g, 1)
        logits = torch.where(mask[None], torch.einsum("qhd,khd->hqk", qs, ks) * scale, -math.inf)
        some = mask.any(1)
        p = torch.where(some[None, :, None], torch.softmax(torch.where(some[None, :, None], logits, 0.0), -1), 0.0) if mask.shape[1] else logits
        outs.append(torch.einsum("hqk,khd->qhd", p, vs))
        lses.append(torch.where(some[None], torch.logsumexp(torch.where(some[None, :, None], logits, 0.0), -1), -math.inf) if mask.shape[1] else torch.full(logits.shape[:2], -math.inf, dtype=torch.float64))
    out, lse = torch.cat(outs), torch.cat(lses, 1)
    if grad_out is None:
        return out.detach(), lse.detach()
    loss = (out * grad_out.cpu().double()).sum()
    if grad_lse is not None:
        loss = loss + torch.where(torch.isfinite(lse), lse, 0.0).mul(grad_lse.cpu().double()).sum()
    return torch.autograd.grad(loss, (q, k, v))


def compare(name, got, want, tolerance):
    got = got.detach().cpu().double()
    if (torch.isfinite(got) != torch.isfinite(want)).any():
        print(f"FAIL {name}: {int((torch.isfinite(got) != torch.isfinite(want)).sum())} of {got.numel()} not finite where they should be")
        return False
    ok = torch.isfinite(want)
    rms = float(want[ok].pow(2).mean().sqrt()) if ok.any() else 1.0
    error = float(((got - want)[ok].abs() / (rms + want[ok].abs())).max()) if ok.any() and rms > 0 else 0.0
    print(f"{'ok  ' if error <= tolerance else 'FAIL'} {name}: {error:.2e}", flush=True)
    return error <= tolerance


def make(s, d, dtype, seed=0):
    torch.manual_seed(seed)
    rand = lambda n, h: torch.randn(n, h, d, dtype=dtype, device=DEVICE)
    return rand(s.cu_q[-1], s.hq), rand(s.cu_keys[-1], s.hk), rand(s.cu_keys[-1], s.hk)


def check_case(name, cu_q, cu_kv, hq, hk, d=128, dtype=torch.bfloat16, splits=1, twist=None, phases=("forward", "backward"), **kind):
    s = Shape(cu_q, cu_kv, hq, hk, **kind)
    q, k, v = make(s, d, dtype)
    if twist:
        twist(q, k, v)
    scale = d ** -0.5
    out, lse = torch.full_like(q, 7.0), torch.full((hq, cu_q[-1]), 7.0, device=DEVICE)
    forward(s, q, k, v, out, lse, scale)
    sync()
    want, want_lse = reference(s, q, k, v, scale)
    tolerance = 1.5e-2 if dtype == torch.bfloat16 else 2e-3
    ok = compare(f"{name} out", out, want, tolerance) & compare(f"{name} lse", lse, want_lse, 1e-4)
    if "backward" not in phases or HOPPER and d > 128:
        return ok
    grad_out, grad_lse = torch.randn(q.shape).to(dtype).to(DEVICE), torch.randn(lse.shape).to(DEVICE)
    wanted = reference(s, q, k, v, scale, grad_out, grad_lse)
    for one_pass in (False, True) if HOPPER and d == 128 and dtype == torch.bfloat16 else (False,):
        grads = [torch.full_like(x, 7.0) for x in (q, k, v)]
        backward(s, q, k, v, out, lse, grad_out, grads, scale, grad_lse, splits, one_pass=one_pass)
        sync()
        for which, got, want in zip("qkv", grads, wanted):
            ok &= compare(f"{name}{' one pass' if one_pass else ''} grad_{which}", got, want, 3 * tolerance)
    return ok


def reference_scores(s, q, k, lse, scale, block_size, n):
    g, steps, reach = s.hq // s.hk, block_size // s.kernel_stride, s.kernel_size // s.kernel_stride
    qs, ks = (x.cpu().double() for x in (q[s.cu_q[n]:s.cu_q[n + 1]], k[s.cu_keys[n]:s.cu_keys[n + 1]]))
    l = lse[:, s.cu_q[n]:s.cu_q[n + 1]].cpu().double()
    p = torch.exp(torch.einsum("qhd,khd->hqk", qs, ks.repeat_interleave(g, 1)) * scale - l[:, :, None])
    p = torch.where(visible(s, n)[None] & torch.isfinite(l)[:, :, None], p, 0.0).reshape(s.hk, g, *p.shape[1:]).sum(1)
    blocks = -(-(s.cu_kv[n + 1] - s.cu_kv[n]) // block_size)
    scores = torch.zeros(s.hk, qs.shape[0], blocks, dtype=torch.float64)
    for j in range(blocks):
        for m in range(steps):
            for r in range(reach):
                i = j * steps + m - r
                if 0 <= i < p.shape[2]:
                    scores[:, :, j] += p[:, :, i]
    return scores


def check_select(name, cu_q, cu_kv, hq, hk, compressed=(32, 16), block_size=64, topk=16, init=1, local=2, d=128, one_pass=False):
    s = Shape(cu_q, cu_kv, hq, hk, compressed=compressed)
    q, k, v = make(s, d, torch.bfloat16)
    scale = d ** -0.5
    out, lse = torch.empty_like(q), torch.empty(hq, cu_q[-1], device=DEVICE)
    forward(s, q, k, v, out, lse, scale)
    ids = torch.full((hk, cu_q[-1], topk), 77, dtype=torch.int32, device=DEVICE)
    same = True
    if one_pass:
        apart, apart_lse, out, lse = out, lse, torch.full_like(out, 7.0), torch.full_like(lse, 7.0)
        forward_select(s, q, k, v, out, lse, ids, scale, block_size, init, local)
        same = compare(f"{name} out", out, apart.cpu().double(), 1.5e-2) & compare(f"{name} lse", lse, apart_lse.cpu().double(), 1e-4)
    else:
        select(s, q, k, lse, ids, scale, block_size, init, local)
    sync()
    wrong = close = 0
    for n in range(len(cu_q) - 1):
        q_len, kv_len = cu_q[n + 1] - cu_q[n], cu_kv[n + 1] - cu_kv[n]
        if q_len == 0:
            continue
        scores = reference_scores(s, q, k, lse, scale, block_size, n)
        for h in range(hk):
            for t in range(q_len):
                own = (t + kv_len - q_len) // block_size
                forced = {j for j in range(own + 1) if j < init or j > own - local}
                rest = sorted((j for j in range(own + 1) if j not in forced), key=lambda j: (-float(scores[h, t, j]), j))
                count = min(topk, own + 1)
                want = sorted(forced | set(rest[:count - len(forced)])) + [-1] * (topk - count)
                got = ids[h, cu_q[n] + t].tolist()
                if got != want:
                    differ = set(got) ^ set(want)
                    near = [float(scores[h, t, j]) for j in differ if 0 <= j <= own]
                    if len(differ) % 2 == 0 and near and max(near) - min(near) <= 1e-5 * max(near) + 1e-12 and got == sorted(x for x in got if x >= 0) + [-1] * (topk - count):
                        close += 1
                    else:
                        wrong += 1
                        if wrong < 3:
                            print("   row", n, h, t, got, want)
    print(f"{'ok  ' if wrong == 0 else 'FAIL'} select {name}{' in one pass' if one_pass else ''}: {wrong} wrong, {close} within rounding", flush=True)
    return same and wrong == 0


def sync():
    torch.cuda.synchronize()


def check():
    packed_q, packed_kv = [0, 1, 1, 130, 391, 456], [0, 1, 1, 190, 451, 516]
    ok = check_case("window 64", [0, 300], [0, 300], 4, 1, window=64)
    ok &= check_case("window 0, g 1", [0, 200], [0, 200], 2, 2, window=0)
    ok &= check_case("window 100 g 5 packed", packed_q, packed_kv, 5, 1, window=100, splits=3)
    ok &= check_case("dense packed f16", packed_q, packed_kv, 4, 2, dtype=torch.float16)
    ok &= check_case("dense 500", [0, 500], [0, 500], 2, 1)
    ok &= check_case("compressed 32/16", [0, 1100], [0, 1100], 4, 2, compressed=(32, 16), splits=2)
    # Whole tiles of rows see all keys of a tile that is not full, behind which are those of the next sequence.
    ok &= check_case("all of the last tile", [0, 303, 500], [0, 303, 500], 4, 1, compressed=(32, 16))
    ok &= check_case("all of the last tile, g 64", [0, 210, 300], [0, 210, 300], 64, 1)
    ok &= check_case("compressed 8/8 packed", packed_q, packed_kv, 3, 1, compressed=(8, 8))
    for d in (64, 96):
        ok &= check_case(f"head_dim {d}", [0, 300], [0, 300], 4, 2, d=d, window=150)
    for d in (192, 256):
        ok &= check_case(f"head_dim {d}", [0, 300], [0, 300], 4, 2, d=d, window=150, phases=("forward",))
    ok &= check_case("group of 160", [0, 50], [0, 50], 160, 1, window=30)

    ok &= check_select("default", [0, 1500], [0, 1500], 4, 2)
    ok &= check_select("g 1", [0, 1300], [0, 1300], 2, 2, topk=8)
    ok &= check_select("block 128 g 5", [0, 2500], [0, 2500], 5, 1, block_size=128, topk=8)
    ok &= check_select("16/16 packed", [0, 5, 5, 700, 1500], [0, 90, 90, 1000, 2000], 2, 1, compressed=(16, 16), topk=6)
    if HOPPER:
        ok &= check_select("default", [0, 1500], [0, 1500], 4, 2, one_pass=True)
        ok &= check_select("16/16 packed", [0, 5, 5, 700, 1500], [0, 90, 90, 1000, 2000], 4, 1, compressed=(16, 16), topk=6, one_pass=True)
        ok &= check_select("g 16, last tokens", [0, 100], [0, 20000], 16, 1, one_pass=True)
        ok &= check_select("g 1", [0, 1300], [0, 1300], 2, 2, topk=8, one_pass=True)
        ok &= check_select("g 1, more steps", [0, 100], [0, 40000], 1, 1, one_pass=True)
        ok &= check_select("g 1, longer than registers", [0, 100], [0, 80000], 1, 1, one_pass=True)
    print("band all ok" if ok else "BAND SOME FAILED", flush=True)


if __name__ == "__main__":
    import band_bench
    for command in sys.argv[1:] or ["check"]:
        (check if command == "check" else getattr(band_bench, command))()
