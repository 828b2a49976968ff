"""Selections, hostile inputs, and the float64 reference."""
import numpy as np
import torch


def positions(cu_q, cu_kv):
    """Per token: sequence, absolute position."""
    seq = torch.repeat_interleave(torch.arange(len(cu_q) - 1), torch.tensor(np.diff(cu_q)))
    cu_q, cu_kv = torch.tensor(cu_q), torch.tensor(cu_kv)
    t = torch.arange(int(cu_q[-1])) - cu_q[seq]
    return seq, t + (cu_kv[seq + 1] - cu_kv[seq]) - (cu_q[seq + 1] - cu_q[seq])


def select(cu_q, cu_kv, hk, topk, block_size, kind="random", seed=0, device="cuda", init=1, local=2):
    """[hk, total_q, topk] as the scorer would list it: sink and local blocks, then the best of random scores. "clustered":
    runs of 32 rows share about 90 % of their blocks, and 4 stripes are popular everywhere."""
    gen = torch.Generator(device=device).manual_seed(seed)
    seq, pos = (x.to(device) for x in positions(cu_q, cu_kv))
    total, blocks = len(pos), int(pos.max()) // block_size + 1
    out = torch.empty(hk, total, topk, dtype=torch.int32, device=device)
    ids = torch.arange(blocks, device=device)
    for h in range(hk):
        stripes = torch.rand(blocks, generator=gen, device=device) < 4 / blocks
        for first in range(0, total, 8192):
            own = (pos[first:first + 8192] // block_size)[:, None]
            n = own.shape[0]
            score = torch.rand(n, blocks, generator=gen, device=device)
            if kind == "clustered":
                base = torch.rand(-(-n // 32), blocks, generator=gen, device=device).repeat_interleave(32, 0)[:n]
                score = base + 0.0015 * score * blocks / 100 + stripes * 2.0
            score = torch.where((ids[None] < init) | (ids[None] > own - local), 10.0, score)
            score = torch.where(ids[None] <= own, score, -1.0)
            width = min(topk, blocks)
            value, index = score.topk(width, 1)
            index = torch.where(value >= 0, index, blocks).sort(1).values
            row = torch.full((n, topk), -1, dtype=torch.int32, device=device)
            row[:, :width] = torch.where(index < blocks, index, -1).int()
            out[h, first:first + 8192] = row
    return out


def select_strata(tokens, hk, topk, block_size, seed=0, device="cuda"):
    """Cheap selection for very long sequences: sink, own and previous block, and one random block in each of topk - 3 strata of the past."""
    gen = torch.Generator(device=device).manual_seed(seed)
    own = torch.arange(tokens, device=device) // block_size
    out = torch.empty(hk, tokens, topk, dtype=torch.int32, device=device)
    strata, past = topk - 3, (own - 2).clamp(min=0)         # blocks 1 .. own - 2
    low = past[:, None] * torch.arange(strata, device=device) // strata
    high = past[:, None] * torch.arange(1, strata + 1, device=device) // strata
    for h in range(hk):
        pick = low + 1 + (torch.rand(tokens, strata, generator=gen, device=device) * (high - low)).long()
        pick = torch.where(high > low, pick, -1)
        out[h] = torch.cat([torch.zeros_like(own)[:, None], pick, torch.where(own > 1, own - 1, -1)[:, None], torch.where(own > 0, own, -1)[:, None]], 1).int()
    return out


def hostile(topk_indices, seed=0):
    """Shuffles each row's ids and mixes in absent ones: -1, far negative, far future, absurd."""
    gen = torch.Generator(device=topk_indices.device).manual_seed(seed)
    order = torch.rand(topk_indices.shape, generator=gen, device=topk_indices.device).argsort(2)
    ids = topk_indices.gather(2, order)
    junk = torch.tensor([-1, -7, -2**31, 2**31 - 1, 1 << 24, 100000], dtype=torch.int32, device=ids.device)
    pick = torch.randint(0, 6, ids.shape, generator=gen, device=ids.device)
    mask = torch.rand(ids.shape, generator=gen, device=ids.device) < 0.2
    return torch.where(mask | (ids < 0), junk[pick], ids).contiguous()


def visible_keys(ids, own, position, block_size):
    keep = sorted({int(b) for b in ids if 0 <= b <= own})
    keys = np.concatenate([np.arange(b * block_size, (b + 1) * block_size) for b in keep]) if keep else np.zeros(0, np.int64)
    return keys[keys <= position]


def reference_rows(q, k, v, topk_indices, block_size, cu_q, cu_kv, rows, scale, grad_out=None, lse_grad=None):
    """float64 on the CPU: {(row, head): (out, lse)} for the given rows, all heads."""
    seq, pos = (x.numpy() for x in positions(cu_q, cu_kv))
    group = q.shape[1] // k.shape[1]
    q_rows, ids = q[rows].double().cpu().numpy(), topk_indices[:, rows].cpu().numpy()
    out = np.zeros((len(rows), q.shape[1], v.shape[2])); lse = np.full((len(rows), q.shape[1]), -np.inf)
    for i, row in enumerate(np.asarray(rows.cpu())):
        begin = cu_kv[seq[row]]
        for kvh in range(k.shape[1]):
            keys = visible_keys(ids[kvh, i], pos[row] // block_size, pos[row], block_size)
            if len(keys) == 0:
                continue
            where = torch.tensor(begin + keys, device=k.device)
            kk, vv = k[where, kvh].double().cpu().numpy(), v[where, kvh].double().cpu().numpy()
            for h in range(kvh * group, (kvh + 1) * group):
                s = kk @ q_rows[i, h] * scale
                m = s.max(); p = np.exp(s - m); l = p.sum()
                out[i, h], lse[i, h] = (p / l) @ vv, m + np.log(l)
    return out, lse


def compare(name, got, want, tolerance):
    """Relative error over finite elements; NaN and infinity masks must agree."""
    got, want = got.double().cpu().numpy() if torch.is_tensor(got) else got, np.asarray(want)
    finite = np.isfinite(want)
    same = np.array_equal(np.isnan(got), np.isnan(want)) and np.array_equal(got[np.isinf(want)], want[np.isinf(want)])
    error = np.linalg.norm(got[finite] - want[finite]) / max(np.linalg.norm(want[finite]), 1e-30) if finite.any() else 0.0
    worst = np.abs(got[finite] - want[finite]).max() if finite.any() else 0.0
    ok = same and error <= tolerance
    print(f"{'ok  ' if ok else 'FAIL'} {name:60s} rel {error:.2e} max {worst:.2e} masks {'equal' if same else 'DIFFER'}", flush=True)
    return ok


def reference_gradients(q, k, v, topk_indices, block_size, cu_q, cu_kv, scale, grad_out, grad_lse):
    """float64 on the GPU, dense with a mask: (grad_query, grad_key, grad_value). Small cases only."""
    group = q.shape[1] // k.shape[1]
    x = [t.double().detach().requires_grad_() for t in (q, k, v)]
    loss = 0.0
    for s in range(len(cu_q) - 1):
        n, m = cu_q[s + 1] - cu_q[s], cu_kv[s + 1] - cu_kv[s]
        if n == 0:
            continue
        rows, keys = slice(cu_q[s], cu_q[s + 1]), slice(cu_kv[s], cu_kv[s + 1])
        position = torch.arange(n, device=q.device) + m - n
        blocks = -(-m // block_size)
        ids = topk_indices[:, rows].long()
        listed = torch.zeros(k.shape[1], n, blocks + 1, dtype=torch.bool, device=q.device)
        valid = (ids >= 0) & (ids <= (position // block_size)[None, :, None])
        listed.scatter_(2, torch.where(valid, ids, blocks), True)
        mask = listed[:, :, :blocks].repeat_interleave(block_size, 2)[:, :, :m] & (torch.arange(m, device=q.device)[None] <= position[:, None])
        for h in range(q.shape[1]):
            logits = (x[0][rows, h] @ x[1][keys, h // group].T * scale).masked_fill(~mask[h // group], -float("inf"))
            some = mask[h // group].any(1)
            lse = logits[some].logsumexp(1)
            out = (logits[some] - lse[:, None]).exp() @ x[2][keys, h // group]
            loss = loss + (out * grad_out[rows, h].double()[some]).sum() + (lse * grad_lse[h, rows].double()[some]).sum()
    loss.backward()
    return [t.grad for t in x]
