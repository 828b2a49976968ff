"""Plan and launches of selected attention, as the Rust host will do them: sizes from shapes alone, no sync."""
import math
from dataclasses import dataclass
import torch
import params as P
import sets
from driver import Module, tensor_map

TILE = 64
MIB = 1 << 20


def ceil_div(a, b):
    return -(-a // b)


@dataclass
class Plan:
    slots: int; has_dense: int; max_tiles: int; max_blocks: int; chunk_tiles: int; num_chunks: int; heads: int
    sub_tiles: int; num_subs: int; unit_entries: int; spare_units: int; full_units: int; window_blocks: int; buffers: int
    entries_bytes: int; plane_bytes: int; units_bytes: int; partial_bytes: int

    @property
    def scratch_bytes(self):
        return self.entries_bytes + self.plane_bytes + self.units_bytes + self.buffers * self.partial_bytes


def make_plan(total_q, total_kv, batch, num_q_heads, num_kv_heads, topk, block_size, partial, budget=256 * MIB, buffers=2, unit_entries=1024, has_dense=1,
              chunk_tokens=None, units_grow=True, ordered=0):
    bound = lambda total, size: ceil_div(total, size) if batch == 1 else total // size + batch
    max_tiles, max_blocks = bound(total_q, TILE), bound(total_kv, block_size)
    slots = max(topk - 1, 1) if has_dense else topk
    sub_tiles = 16 if not ordered and topk <= 16 and num_kv_heads * max_tiles >= 256 * 16 else 8
    while num_kv_heads * ceil_div(max_tiles, sub_tiles) * max_blocks * 4 > 12 * MIB and sub_tiles < max_tiles:
        sub_tiles *= 2
    if chunk_tokens is not None:        # backward: no partials, chunks sized by the caller
        heads, partial_bytes = 1, 0
        chunk_tiles = min(ceil_div(max_tiles, sub_tiles), max(1, chunk_tokens // TILE // sub_tiles)) * sub_tiles
    else:
        row_bytes = slots * sum(partial)
        limit = (budget - 10 * MIB) // buffers // (TILE * row_bytes)
        sub_tiles = min(sub_tiles, 1 << int(math.log2(max(limit, 1))))
        heads, chunk_tiles = num_q_heads, ceil_div(max_tiles, sub_tiles) * sub_tiles
        if chunk_tiles > limit:
            heads, chunk_tiles = 1, ceil_div(ceil_div(max_tiles, ceil_div(max_tiles, limit)), sub_tiles) * sub_tiles
        else:
            heads = min(num_q_heads, limit // chunk_tiles)
            heads = ceil_div(num_q_heads, ceil_div(num_q_heads, heads))
        partial_bytes = heads * chunk_tiles * TILE * row_bytes
    num_chunks, num_subs = ceil_div(max_tiles, chunk_tiles), ceil_div(max_tiles, sub_tiles)
    full_units = chunk_tiles * TILE * slots // unit_entries
    spare_units = chunk_tiles * TILE * slots // (2 * unit_entries) if units_grow and has_dense else full_units
    return Plan(slots, has_dense, max_tiles, max_blocks, chunk_tiles, num_chunks, heads, sub_tiles, num_subs, unit_entries, spare_units, full_units,
                min(max_blocks, 48 * 1024), buffers, num_kv_heads * total_q * (slots + 1) * 4, num_kv_heads * num_subs * max_blocks * 4,
                num_kv_heads * num_chunks * ((full_units + max_blocks) * 32 + 8), partial_bytes)


def tensor(x):
    return P.Tensor(x.data_ptr(), x.stride(0), x.stride(1))


class Selected:
    """One problem: owns its scratch; forward() only launches."""

    def __init__(self, query, key, value, topk_indices, block_size, cu_seqlens_q=None, cu_seqlens_kv=None, softmax_scale=None, defines=None, priority=False, index_parts=1, ordered=0, builds=None, **plan_options):
        dev, (total_q, self.hq, d), (total_kv, self.hk, _) = query.device, query.shape, key.shape
        cu = lambda x, n: torch.tensor([0, n], dtype=torch.int32, device=dev) if x is None else x
        self.cu_q, self.cu_kv = cu(cu_seqlens_q, total_q), cu(cu_seqlens_kv, total_kv)
        self.batch, topk = self.cu_q.numel() - 1, topk_indices.shape[2]
        self.q, self.k, self.v, self.topk = query, key, value, topk_indices
        self.d, self.block_size, self.total_q = d, block_size, total_q
        self.scale = d ** -0.5 if softmax_scale is None else softmax_scale
        self.partial_size = sets.partial_bytes(block_size, d, query.dtype == torch.bfloat16)
        self.plan = p = make_plan(total_q, total_kv, self.batch, self.hq, self.hk, topk, block_size, self.partial_size, ordered=ordered, **plan_options)
        self.defines = dict(FSA_HEAD_DIM=d, FSA_BLOCK_SIZE=block_size, FSA_IS_BF16=int(query.dtype == torch.bfloat16), **(defines or {}))
        i32 = lambda n: torch.empty(max(n, 1), dtype=torch.int32, device=dev)
        # One kernel builds the index: a piece's entries fit in shared memory and its ids in registers, and a chunk's pieces on the device.
        self.stage_bytes = 4 * (p.window_blocks + p.sub_tiles * TILE * p.slots)
        self.build_threads = p.sub_tiles * 32 * ceil_div(topk, 16)
        multiprocessors, pieces = torch.cuda.get_device_properties(dev).multi_processor_count, min(p.num_subs, p.chunk_tiles // p.sub_tiles)
        shared = 8 * p.window_blocks + 4 * p.sub_tiles * TILE * p.slots + 128
        places = min(1024 // self.build_threads, (228 << 10) // (ceil_div(shared, 128) * 128 + 2048))
        can_build = not ordered and topk <= 32 and self.build_threads <= 512 and p.window_blocks == p.max_blocks <= (1 << 14) - 32 and \
            4 * p.window_blocks + self.stage_bytes <= (223 << 10) // 2 and pieces <= multiprocessors and 3 * pieces <= places * multiprocessors
        self.builds = can_build and builds is not False
        if self.builds:
            p.plane_bytes = 4 * self.hk * p.num_chunks * (p.max_blocks + 1)
        self.scratch = s = dict(tile_base=i32(self.batch + 1), block_base=i32(self.batch + 1), chunk_token=i32(p.num_chunks + 1),
                                plane=i32(p.plane_bytes // 4), entries=i32(p.entries_bytes // 4), units=i32(self.hk * p.num_chunks * (p.full_units + p.max_blocks) * 8),
                                unit_counts=i32(self.hk * p.num_chunks * 2), tiles=i32(p.max_tiles * 8),
                                row_info=i32(self.hk * total_q))
        self.partials = [torch.empty(p.partial_bytes, dtype=torch.uint8, device=dev) for _ in range(p.buffers)]
        ptr = lambda name: s[name].data_ptr()
        self.layout = P.Layout(self.cu_q.data_ptr(), self.cu_kv.data_ptr(), ptr("tile_base"), ptr("block_base"), ptr("chunk_token"), ptr("tiles"),
                               self.batch, total_q, p.num_chunks, p.chunk_tiles, p.max_tiles)
        self.index = P.Index(topk_indices.data_ptr(), ptr("plane"), ptr("entries"), ptr("row_info"), ptr("units"), ptr("unit_counts"), None, None, topk, p.slots, p.has_dense,
                             p.num_subs, p.sub_tiles, p.max_blocks, p.window_blocks, p.unit_entries, p.spare_units, p.full_units, ordered, 0, 0)
        self.ordered = ordered
        self.index_parts, self.index_stream = index_parts, torch.cuda.Stream()
        self.side = [torch.cuda.Stream(priority=0) for _ in range(p.buffers)]
        self.fast = [torch.cuda.Stream(priority=-5 if priority else 0) for _ in range(p.buffers)]

    def build_index(self, first=0, heads=None, stream=None, beside=None):
        """The index of some kv heads; the first call also prepares the layout, after which `beside` launches what may run beside the rest."""
        p, module, heads = self.plan, Module.get("index.cuh", self.defines), heads or self.hk - first
        word = 4 * p.window_blocks
        warps = max(1, min(8, p.sub_tiles, 200 * 1024 // word)) if self.ordered else min(8, p.sub_tiles)
        counters = word * (warps if self.ordered else 1)
        staged = counters + self.stage_bytes <= (223 << 10) // 2
        params = P.IndexParams(self.layout, self.index, first, staged)
        grid = (p.num_subs, heads, ceil_div(p.max_blocks, p.window_blocks))
        if first == 0 or self.builds:
            module.launch("index_prepare", (1 + heads * p.num_chunks * self.builds, 1, 1), 1024, 0, params, stream)
        if beside:
            beside()
        ahead = dict(priority=-1 if beside else 0)
        if self.builds:
            module.launch("index_build", grid, self.build_threads, counters + 128 + self.stage_bytes, params, stream, pdl=not beside, **ahead)
            return
        module.launch("index_count", grid, 256, word, params, stream, **ahead)
        module.launch("index_scan", (p.num_chunks, heads, 1), 1024, 0, params, stream, **ahead)
        module.launch("index_scatter", grid, 32 * warps, counters + (self.stage_bytes if staged else 0), params, stream, **ahead)

    def index_ahead(self, main):
        """Builds the index on a stream of its own, a few kv heads at a time; returns a function that makes a stream wait for a kv head."""
        step = max(1, self.hk // self.index_parts)
        self.index_stream.wait_stream(main)
        events = []
        for first in range(0, self.hk, step):
            self.build_index(first, min(step, self.hk - first), self.index_stream)
            events.append(torch.cuda.Event())
            events[-1].record(self.index_stream)
        waited = set()

        def wait(stream, kv_head):      # once: a wait between two kernels would keep the second from starting early
            if (stream, kv_head // step) not in waited:
                waited.add((stream, kv_head // step))
                stream.wait_event(events[kv_head // step])
        return wait

    def stage_launches(self, out, lse):
        """[(buffer, last kv head, attend thunk, reduce thunk)] for every chunk of heads and tiles."""
        p, d = self.plan, self.defines
        attend, reduce = Module.get(sets.file("attend"), d), Module.get(sets.file("reduce"), d)
        scale_log2, group = self.scale * math.log2(math.e), self.hq // self.hk
        maps = [tensor_map(x, min(self.block_size, 64), 1) for x in (self.k, self.v)]
        launches = []
        attend_bytes = sets.attend_bytes(self.block_size, self.d, d.get("FSA_QUERY_STAGES", 2))
        reduce_bytes = sets.reduce_tiles_bytes(self.block_size, self.d) + TILE * p.slots * self.partial_size[1]
        for head in range(0, self.hq, p.heads):
            heads = min(p.heads, self.hq - head)
            for chunk in range(p.num_chunks):
                buffer = len(launches) % p.buffers
                partial = self.partials[buffer].data_ptr()
                partial_lse = partial + p.heads * p.chunk_tiles * TILE * p.slots * self.partial_size[0]
                a = P.AttendParams(self.layout, self.index, tensor(self.q), tensor(self.k), tensor(self.v), partial, partial_lse, scale_log2, group, chunk, head)
                r = P.aligned(P.ReduceParams)
                r.layout, r.index, r.query, r.key, r.value, r.out = self.layout, self.index, tensor(self.q), tensor(self.k), tensor(self.v), tensor(out)
                r.partial, r.partial_lse, r.lse, r.scale_log2, r.group_size, r.chunk, r.first_head = partial, partial_lse, lse.data_ptr(), scale_log2, group, chunk, head
                r.key_map, r.value_map = maps
                rows = min((chunk + 1) * p.chunk_tiles * TILE, self.total_q)      # of one sequence: its chunks list blocks of their past only
                blocks = p.max_blocks if self.batch > 1 else min(p.max_blocks, ceil_div(max(0, rows + self.k.shape[0] - self.total_q), self.block_size))
                launches.append((buffer, (head + heads - 1) // group,
                                 lambda s=None, a=a, h=heads, u=p.spare_units + blocks, later=len(launches) >= p.buffers: attend.launch("attend", (u, h, 1), 128, attend_bytes, a, s, later),
                                 lambda s=None, r=r, h=heads: reduce.launch("reduce", (p.chunk_tiles, h, 1), 128, reduce_bytes, r, s, True)))
        return launches

    def forward(self, out=None, lse=None):
        out = torch.empty_like(self.q) if out is None else out
        lse = torch.empty(self.hq, self.total_q, dtype=torch.float32, device=self.q.device) if lse is None else lse
        main = torch.cuda.current_stream()
        for stream in self.side + self.fast:
            stream.wait_stream(main)
        wait_index = self.index_ahead(main)
        for buffer, last_kv_head, attend, reduce in self.stage_launches(out, lse):
            wait_index(self.side[buffer], last_kv_head)
            attend(self.side[buffer])
            reduce(self.side[buffer])
        for stream in self.side + self.fast + [self.index_stream]:
            main.wait_stream(stream)
        return out, lse


class SelectedBackward(Selected):
    """Some heads at a time: what the main kernel needs, one KV-major pass, gradients in 16 bits."""

    def __init__(self, query, key, value, topk_indices, block_size, *args, chunk_tokens=None, unit_entries=None, buffers=None, query_partials=0, scaled_sums=1, heads=None, unit_heads=None, packs=1, lanes_in_place=0,
                 priority=None, defines=None, **options):
        (total_q, hq, d), hk, topk = query.shape, key.shape[1], topk_indices.shape[2]
        query_partials = query_partials if sets.has_partials(block_size, d) else 0
        self.scaled_sums = int(scaled_sums and not query_partials and sets.has_scaled_sums(d, query.dtype == torch.bfloat16))
        row_bytes = topk * d * 2 if query_partials else d * (2 if self.scaled_sums else 4)
        budget = (128 if query_partials else 32) * MIB
        chunk_tokens = chunk_tokens or budget // row_bytes
        group, rows = hq // hk, min(chunk_tokens, total_q)
        # Heads of a unit, side by side in its tiles, and those of one launch: their grad_query stays within the budget, and so do the sums of their kv heads.
        shared = [n for n in (4, 2) if self.scaled_sums and rows >= 8192 and group % n == 0 and n * rows * row_bytes <= 64 * MIB]
        self.unit_heads = unit_heads or (shared + [1])[0]
        if heads is None:
            is_full = rows >= (32768 if self.unit_heads > 1 else 65536) and not query_partials
            heads = self.unit_heads if is_full else max(budget // (rows * row_bytes) // self.unit_heads, 1) * self.unit_heads
        self.kv_heads = max(1, min(heads // group, 64 * MIB // (key.shape[0] * d * 8), hk))
        self.heads = min(heads, group) if heads < group else group * self.kv_heads
        full_unit = max(32 * block_size, 3072 if self.unit_heads < 4 else 2048)
        unit_entries = unit_entries or (full_unit if self.unit_heads == 1 else min(max(rows // 16, 1024), full_unit))
        buffers = buffers or (3 if 3 * self.heads * rows * row_bytes <= 64 * MIB else 2)
        self.priority = priority if priority is not None else -1 if rows >= 32768 else 0        # of the small kernels
        super().__init__(query, key, value, topk_indices, block_size, *args, has_dense=0, ordered=query_partials, chunk_tokens=chunk_tokens, unit_entries=unit_entries, buffers=buffers,
                         defines=dict(FSA_QUERY_PARTIALS=query_partials, FSA_SCALED_SUMS=self.scaled_sums, FSA_TILE_HEADS=self.unit_heads, **(defines or {})), **options)
        p, f32 = self.plan, dict(dtype=torch.float32, device=query.device)
        self.query_partials, self.rows = query_partials, min(p.chunk_tiles * TILE, total_q)
        self.owns_sums = self.unit_heads == min(self.heads, group)
        self.finishes_sums = self.owns_sums and p.num_chunks == 1 and sets.finishes_sums(d, query_partials)
        if self.finishes_sums:
            self.scratch["block_sums"] = torch.empty(self.hk * p.max_blocks, dtype=torch.int32, device=query.device)
            self.index.block_sums = self.scratch["block_sums"].data_ptr()
        self.sum_rows = key.shape[0]
        if self.finishes_sums and self.heads >= group and packs:    # one launch does all that a block's keys have part in
            self.index.packs_sums = 1
            self.index.max_split_blocks = min(p.max_blocks, p.chunk_tiles * TILE * p.slots // (unit_entries + 1))
            self.sum_rows = self.index.max_split_blocks * block_size
            self.scratch["split_blocks"] = torch.empty(self.hk * self.index.max_split_blocks + 1, dtype=torch.int32, device=query.device)
            self.index.split_blocks = self.scratch["split_blocks"].data_ptr()
        self.row_stats = [torch.empty(self.heads, self.rows, 2, **f32) for _ in range(buffers)]
        lanes_in_place = lanes_in_place if self.scaled_sums else 0
        self.in_place = [int(b >= buffers - lanes_in_place) for b in range(buffers)]
        self.acc_query = [torch.empty(0 if in_place else self.heads, self.rows, row_bytes // 4, **f32) for in_place in self.in_place]
        self.block_bounds = torch.empty(2 * self.hk * p.max_blocks if self.scaled_sums else 1, **f32)
        self.bounds = torch.empty(2 * (self.hk + self.hq), **f32)      # of keys, then of rows: see block/query_sums.cuh
        self.acc_kv = [torch.empty(2, self.kv_heads, self.sum_rows, d, **f32) for _ in range(buffers)]

    @property
    def backward_scratch_bytes(self):
        return self.plan.scratch_bytes + sum(t.numel() * 4 for t in self.row_stats + self.acc_query + self.acc_kv)

    def backward(self, out, lse, grad_out, grads, grad_lse=None):
        p, group = self.plan, self.hq // self.hk
        module, total_kv = Module.get(sets.file("backward"), self.defines), self.k.shape[0]
        threads, parts, shared = sets.backward_main(self.block_size, self.d, self.query_partials)
        per_row = self.d // 8 if self.query_partials or self.scaled_sums else self.d // 4       # lanes that finish a row
        finish_rows = 256 // per_row // self.unit_heads * self.unit_heads * (1 if self.query_partials else 4)
        main = torch.cuda.current_stream()
        self.bounds.zero_()

        def bounds_of_blocks():
            a = P.BackwardParams()
            a.layout, a.index, a.key, a.value, a.group_size, a.block_bounds = self.layout, self.index, tensor(self.k), tensor(self.v), group, self.block_bounds.data_ptr()
            self.side[0].wait_stream(main)
            module.launch("backward_bounds", (p.max_blocks, self.hk, 1), 256, 0, a, self.side[0])

        self.build_index(beside=bounds_of_blocks if self.scaled_sums else None)
        if self.scaled_sums:
            main.wait_stream(self.side[0])
        for stream in self.side:
            stream.wait_stream(main)
        for turn, kv_head in enumerate(range(0, self.hk, self.kv_heads)):
            b, kv_heads = turn % p.buffers, min(self.kv_heads, self.hk - kv_head)
            stream, acc, end = self.side[b], self.acc_query[b].data_ptr(), (kv_head + kv_heads) * group
            for head in range(kv_head * group, end, self.heads):
                heads = min(self.heads, end - head)
                row_step, head_step = (heads, 1) if self.unit_heads > 1 else (1, self.rows)     # of statistics and sums
                in_place = [2 * grads[0].stride(i) for i in (0, 1)] if self.in_place[b] else None
                for chunk in range(p.num_chunks):
                    if self.in_place[b]:
                        acc = grads[0].data_ptr() + head * in_place[1]
                    a = P.BackwardParams(self.layout, self.index, *(tensor(x) for x in (self.q, self.k, self.v, out, grad_out)), lse.data_ptr(),
                                         grad_lse.data_ptr() if grad_lse is not None else None, self.row_stats[b].data_ptr(), acc, acc, *(tensor(x) for x in grads),
                                         self.acc_kv[b][0].data_ptr(), self.acc_kv[b][1].data_ptr(),
                                         self.bounds.data_ptr() + 8 * self.hk, self.bounds.data_ptr(), self.block_bounds.data_ptr(), (P.SumBounds * 3)(), self.sum_rows, *(in_place or [2 * self.d * row_step, 2 * self.d * head_step]), self.scale * math.log2(math.e), self.scale, group,
                                         chunk, head, row_step, head_step, self.rows, int(self.owns_sums and chunk == 0 and head % group == 0),
                                         int(self.finishes_sums and (head + heads) % group == 0), 0, total_kv, 0, 0, 0, self.in_place[b])
                    first_blocks = ceil_div(p.max_blocks, 8) if head == kv_head * group and chunk == 0 else 0
                    last_blocks = (self.index.max_split_blocks if self.index.packs_sums else p.max_blocks) if head + heads == end and chunk == p.num_chunks - 1 else 0
                    module.launch("backward_prepare", (ceil_div(self.rows, 64 // self.unit_heads) + first_blocks, heads // self.unit_heads, 1), 256, 0, a, stream, priority=self.priority)
                    module.launch("backward", (p.full_units + p.max_blocks, parts, heads // self.unit_heads), threads, shared, a, stream)
                    module.launch("backward_finish", (ceil_div(self.rows, finish_rows // self.unit_heads) + 2 * last_blocks, heads // self.unit_heads, 1), 256, 0, a, stream, priority=self.priority)
        for stream in self.side:
            main.wait_stream(stream)
        return grads
