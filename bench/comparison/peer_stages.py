"""The stages of the public implementations and their whole operations, as their own modules call them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import stages
from .inputs import INIT, KERNEL, LOCAL, STRIDE, WINDOW, Inputs
from .work import Shape, Work

Pair = tuple[Tensor, Tensor]


class Fsa:
    """The core of FSA's module, between its projections, and the stages of `nsa_ref` that it takes over."""

    name = "FSA"
    #: The scores of one kv head in float32, whose offsets are 32 bits.
    longest = 128 * 1024

    def wholes(self, inputs: Inputs) -> list[Work]:
        from flash_attn import flash_attn_varlen_func
        from fsa.ops import FSA_topk_sparse_attention
        from nsa_ref.module.rope import RotaryEmbedding
        from nsa_ref.ops import linear_compress

        rope = RotaryEmbedding(inputs.rope, inputs.q.device)
        cu, block_size = inputs.cu, inputs.shape.block_size

        def forward(
            q: Tensor, k: Tensor, v: Tensor, gates: Tensor, k_weight: Tensor, k_position: Tensor, v_weight: Tensor
        ) -> Tensor:
            longest = (cu[1:] - cu[:-1]).max().item()
            k_cmp, cu_cmp = linear_compress(k, k_weight, cu, KERNEL, STRIDE, k_position)
            v_cmp, _ = linear_compress(v, v_weight, cu, KERNEL, STRIDE, None)
            q, k_cmp = rope(q, cu), rope(k_cmp, cu_cmp, start=0, stride=STRIDE)
            compressed, ids = _compressed(inputs, q, k_cmp, v_cmp, cu_cmp)
            k = rope(k, cu)
            selected = FSA_topk_sparse_attention(q, k, v, ids, block_size, cu, None)
            window = (WINDOW, -1)
            near = flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True, window_size=window)
            return gates[:, 0:1, None] * compressed + gates[:, 1:2, None] * selected + gates[:, 2:3, None] * near

        return [Work(self.name, stages.whole_leaves(inputs, stages.LINEAR_ROPE), forward)]

    def stages(self, inputs: Inputs, k_cmp: Tensor, v_cmp: Tensor) -> dict[str, Work]:
        from flash_attn import flash_attn_varlen_func
        from nsa_ref.ops import avgpool_compress, linear_compress

        name, cu, n = "NSA-ref", inputs.cu, inputs.shape.n
        cu_cmp = torch.tensor([0, len(k_cmp)], device=cu.device, dtype=torch.int32)

        def mean(k: Tensor, v: Tensor) -> Pair:
            return tuple(avgpool_compress(x, None, cu, KERNEL, STRIDE)[0] for x in (k, v))

        def linear(k: Tensor, v: Tensor, k_weight: Tensor, k_position: Tensor, v_weight: Tensor) -> Pair:
            keys, _ = linear_compress(k, k_weight, cu, KERNEL, STRIDE, k_position)
            return keys, linear_compress(v, v_weight, cu, KERNEL, STRIDE, None)[0]

        def compressed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _compressed(inputs, q, k, v, cu_cmp)[0]

        def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flash_attn_varlen_func(q, k, v, cu, cu, n, n, causal=True, window_size=(WINDOW, -1))

        forms = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
        return {
            stages.COMPRESSED: Work(name, stages.compressed_leaves(inputs, k_cmp, v_cmp), compressed),
            stages.WINDOW: Work("FA2", forms, window),
            stages.LINEAR: Work(name, stages.compress_leaves(inputs, stages.LINEAR), linear),
            stages.MEAN: Work(name, stages.compress_leaves(inputs, stages.MEAN), mean),
        }


def _compressed(inputs: Inputs, q: Tensor, k: Tensor, v: Tensor, cu_cmp: Tensor) -> Pair:
    """Compressed attention and the selection, with the module's waits for the device."""
    from nsa_ref.ops import compressed_attention

    shape, cu = inputs.shape, inputs.cu
    longest = ((x[1:] - x[:-1]).max().item() for x in (cu, cu_cmp))
    sizes = (KERNEL, STRIDE, shape.block_size, shape.topk, cu, cu_cmp, *longest, None, INIT, LOCAL)
    return compressed_attention(q, k, v, *sizes, parallel_topk_compute=False)


class Sfnsa:
    """SFNSA's two cores: the fused one, and, should that one fail, the one for Hugging Face."""

    name = "SFNSA"
    longest = 128 * 1024

    def wholes(self, inputs: Inputs) -> list[Work]:
        from flash_nsa import HFNSACore, NSAConfig, flash_nsa_varlen_func

        shape = self._prepare(inputs)
        logits = inputs.logits[:, None].expand(-1, shape.heads, -1).contiguous()
        leaves = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "logits": logits}
        heads = {"head_dim": shape.dim, "num_heads": shape.heads, "num_kv_heads": shape.kv_heads}
        core = HFNSACore(NSAConfig(**heads, block_size=shape.block_size, top_n=shape.topk, window_size=WINDOW))

        def fused(q: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> Tensor:
            return flash_nsa_varlen_func(q, k, v, logits, None, None)

        def unfused(q: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> Tensor:
            return core(q, k, v, logits, inputs.cu)

        return [Work(self.name, leaves, fused), Work(self.name, leaves, unfused)]

    def stages(self, inputs: Inputs, k_cmp: Tensor, v_cmp: Tensor) -> dict[str, Work]:
        from flash_nsa import compress_attn, construct_block, mean_pooling, slc_topk_indices

        self._prepare(inputs)

        def mean(k: Tensor, v: Tensor) -> Pair:
            return mean_pooling(k), mean_pooling(v)

        def linear(k: Tensor, v: Tensor, k_weight: Tensor, v_weight: Tensor) -> Pair:
            pairs = ((k, k_weight), (v, v_weight))
            return tuple(construct_block(x).flatten(2) @ weight for x, weight in pairs)

        def compressed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, lse = compress_attn(q, k, v)
            slc_topk_indices(q, k, lse, maybe_efficient_version=True)
            return out

        with torch.no_grad():
            lse = compress_attn(inputs.q, k_cmp, v_cmp)[1]

        def topk(q: Tensor, k: Tensor) -> Tensor:
            return slc_topk_indices(q, k, lse, maybe_efficient_version=True)[0]

        # Its heads share a matrix.
        shared = {"k": inputs.k, "v": inputs.v, "shared_k": inputs.k_weight[0], "shared_v": inputs.v_weight[0]}
        return {
            stages.COMPRESSED: Work(self.name, stages.compressed_leaves(inputs, k_cmp, v_cmp), compressed),
            stages.TOPK: Work(self.name, {"q": inputs.q, "k": k_cmp}, topk),
            stages.LINEAR: Work(self.name, shared, linear),
            stages.MEAN: Work(self.name, stages.compress_leaves(inputs, stages.MEAN), mean),
        }

    def _prepare(self, inputs: Inputs) -> Shape:
        from flash_nsa import NSAHelper

        NSAHelper.is_context_parallel_enable = False
        NSAHelper.x_cu_seqlens = None
        NSAHelper.set_cmp_kv_method("mean", "mean")
        shape = inputs.shape
        NSAHelper.set_hyperparameters(KERNEL, STRIDE, shape.block_size, WINDOW, shape.topk, INIT, LOCAL)
        NSAHelper.init_cu_seqlens(inputs.cu)
        return shape


Peer = Fsa | Sfnsa
