"""A layer of native sparse attention for PyTorch, with the parameters of the original FSA project's layer.

Scripts written for that project import :class:`FlashSparseAttention` and :class:`RopeConfig` from here instead, and
its checkpoints load with ``load_state_dict(strict=True)``. Needs PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

try:
    import torch
    from torch import Tensor, nn
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("fsa_rs.nn needs PyTorch: pip install torch", name=error.name) from None

from . import _native
from ._api import Recompute, ScoreHeads, _name, _recompute, _rope, _size, _sizes, nsa_attn_varlen_func

__all__ = ["FlashSparseAttention", "RopeConfig"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _llama31() -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@dataclass
class RopeConfig:
    """Rotary embedding of a :class:`FlashSparseAttention`; the defaults are those of Llama 3.1.

    Attributes:
        max_position_embeddings: accepted for compatibility: angles are computed for any position.
        head_dim: that of the layer; all of a vector is rotated.
        rope_theta: base of the wavelengths.
        rope_scaling: ``None`` or a Hugging Face dictionary with ``rope_type`` ``"default"`` or ``"llama3"``.
        hidden_size, num_attention_heads: accepted for compatibility, not used.
    """

    max_position_embeddings: int = 131072
    head_dim: int = 128
    rope_theta: float = 500000
    rope_scaling: Mapping[str, Any] | None = field(default_factory=_llama31)
    hidden_size: int = 4096
    num_attention_heads: int = 32


class FlashSparseAttention(nn.Module):
    """Native sparse attention over packed sequences, with its projections, compressions, gate and rotary embedding.

    Parameters, in the order and under the names of ``state_dict``:

    ==================  ==============================================================================
    ``compress_key``    ``[num_kv_heads, kernel_size * head_dim, head_dim]``: a window of keys to one key
    ``compress_value``  the same, of values
    ``intra_block_pe``  ``[num_kv_heads, kernel_size, head_dim]``: added to the keys of a window, not to values
    ``proj_q.weight``   ``[num_q_heads * head_dim, hidden_size]``
    ``proj_k.weight``   ``[num_kv_heads * head_dim, hidden_size]``
    ``proj_v.weight``   ``[num_kv_heads * head_dim, hidden_size]``
    ``proj_o.weight``   ``[hidden_size, num_q_heads * head_dim]``
    ``gate.0.weight``   ``[3, hidden_size]``: a row's weights of the compressed, selected and window branch
    ==================  ==============================================================================

    Keys are compressed before their rotary embedding; a compressed key is rotated to the first position of its window.
    Without a host synchronisation anywhere, the layer can be compiled with ``fullgraph=True``. Under ``torch.autocast``
    it computes in the dtype of its projections.

    Names, shapes and initial values are those of the original FSA layer: with the same seed both begin with the same
    weights. What it computes differs from it on purpose, in:

    - *the choice of blocks*: scores are f32 sums over all query heads that share a kv head, as Native Sparse Attention
      defines them, and ties go to the earlier block. The original takes the scores of the first head of each group, and
      rounds them to bfloat16 before it compares them; ``score_heads="first_head"`` takes the same head, in f32.
    - *the rotary embedding*: angles are f64, sine and cosine f32, for a layer of any dtype. The original keeps the
      frequencies in a buffer that ``.to(torch.bfloat16)`` rounds with the weights (at position 1000 angles of Llama 3.1
      are then off by up to 1.8 radians), and rounds sine and cosine to the dtype of the input. A checkpoint that was
      trained that way has seen other rotations than this layer computes.
    - *rounding*: the position embedding is added inside the f32 sums of the compression, and the gates weigh f32 sums;
      the original rounds both summands of the former and each product of the latter to the dtype.
    - *limits*: sequences shorter than ``kernel_size``, empty ones, float32, and any ratio of query to kv heads are
      taken. Of the scalings of rotary embeddings only ``llama3`` is known, and the whole head is rotated.

    Args:
        hidden_size: elements of a token's vector.
        num_q_heads, num_kv_heads: the former is any multiple of the latter.
        head_dim: elements of a query, key and value vector: a multiple of 8 up to 256.
        kernel_size, kernel_stride: tokens in a compressed window, and between the starts of two.
        block_size, topk: keys in a selectable block, and blocks that a row selects.
        init_blocks, local_blocks: first blocks, and last blocks up to its own, that every row selects.
        window_size: earlier keys that the window branch sees.
        rope_config: the rotary embedding; ``None`` is none.
        score_heads: ``"group_sum"`` or, as the original, ``"first_head"``.
        deterministic: ask for gradients that repeat bit for bit, as
            ``torch.use_deterministic_algorithms`` does. On the CPU they always do.
        recompute: what the backward computes again instead of keeping it, as :func:`fsa_rs.nsa_attn_varlen_func`.
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument breaks its contract; the message names it.
        NotImplementedError: a ``head_dim`` or ``rope_type`` that is not supported.
    """

    def __init__(
        self,
        hidden_size: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        kernel_size: int,
        kernel_stride: int,
        block_size: int,
        topk: int,
        init_blocks: int,
        local_blocks: int,
        window_size: int,
        rope_config: RopeConfig | None,
        *,
        score_heads: ScoreHeads = "group_sum",
        deterministic: bool = False,
        recompute: Recompute = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_size, head_dim = _size("hidden_size", hidden_size), _size("head_dim", head_dim)
        num_q_heads, num_kv_heads = _size("num_q_heads", num_q_heads), _size("num_kv_heads", num_kv_heads)
        if rope_config is not None and not hasattr(rope_config, "rope_theta"):
            raise TypeError(f"rope_config: expected RopeConfig or None, got {_name(type(rope_config))}")
        theta, scaling = (None, None) if rope_config is None else (rope_config.rope_theta, rope_config.rope_scaling)
        if rope_config is not None and rope_config.head_dim != head_dim:
            raise ValueError(f"rope_config.head_dim: expected {head_dim}, as head_dim, got {rope_config.head_dim}")
        sizes = _sizes(
            kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks, window_size, score_heads
        )
        _native.check_options((sizes, _rope(theta, scaling), None), (num_q_heads, num_kv_heads), head_dim)
        self.hidden_size = hidden_size
        self.num_q_heads = num_q_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.kernel_size = kernel_size
        self.kernel_stride = kernel_stride
        self.block_size = block_size
        self.topk = topk
        self.init_blocks = init_blocks
        self.local_blocks = local_blocks
        self.window_size = window_size
        self.rope_config = rope_config
        self.score_heads: ScoreHeads = score_heads
        self.deterministic = deterministic
        self.recompute = _recompute(recompute)

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        # In this order, because it is that of the random numbers that the original draws.
        self.proj_q = linear(hidden_size, num_q_heads * head_dim)
        self.proj_k = linear(hidden_size, num_kv_heads * head_dim)
        self.proj_v = linear(hidden_size, num_kv_heads * head_dim)
        self.proj_o = linear(num_q_heads * head_dim, hidden_size)
        self.compress_key = parameter(num_kv_heads, kernel_size * head_dim, head_dim)
        self.compress_value = parameter(num_kv_heads, kernel_size * head_dim, head_dim)
        self.intra_block_pe = parameter(num_kv_heads, kernel_size, head_dim)
        self.gate = nn.Sequential(linear(hidden_size, 3), nn.Sigmoid())
        self.init_params()

    def init_params(self) -> None:
        """Draws all parameters anew: Xavier's uniform distribution, as the original."""
        for parameter in self.parameters():
            nn.init.xavier_uniform_(parameter)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """``x`` ``[total, hidden_size]`` in the dtype of the weights, and ``cu_seqlens`` ``[batch + 1]``, integers.

        Returns:
            ``[total, hidden_size]``.

        Raises:
            ValueError, NotImplementedError: as :func:`fsa_rs.nsa_attn_varlen_func`.
        """
        self._check(x, cu_seqlens)
        q = self.proj_q(x).unflatten(1, (self.num_q_heads, self.head_dim))
        k = self.proj_k(x).unflatten(1, (self.num_kv_heads, self.head_dim))
        v = self.proj_v(x).unflatten(1, (self.num_kv_heads, self.head_dim))
        cu_seqlens = cu_seqlens.to(torch.int32)
        rope = self.rope_config
        # Autocast leaves parameters as they are, and these are used outside of what it knows.
        out = nsa_attn_varlen_func(
            q,
            k,
            v,
            self.gate(x).to(q.dtype),
            cu_seqlens,
            cu_seqlens,
            kernel_size=self.kernel_size,
            kernel_stride=self.kernel_stride,
            block_size=self.block_size,
            topk=self.topk,
            init_blocks=self.init_blocks,
            local_blocks=self.local_blocks,
            window_size=self.window_size,
            score_heads=self.score_heads,
            deterministic=self.deterministic,
            k_weight=self.compress_key.to(q.dtype),
            k_position=self.intra_block_pe.to(q.dtype),
            v_weight=self.compress_value.to(q.dtype),
            rope_theta=None if rope is None else rope.rope_theta,
            rope_scaling=None if rope is None else rope.rope_scaling,
            recompute=self.recompute,
        )
        return self.proj_o(out.flatten(1))  # type: ignore[no-any-return]

    def _check(self, x: Tensor, cu_seqlens: Tensor) -> None:
        """What the projections would refuse in words of their own."""
        weight = self.proj_q.weight
        for name, given in (("x", x), ("cu_seqlens", cu_seqlens)):
            if not isinstance(given, Tensor):
                raise TypeError(f"{name}: expected torch.Tensor, got {_name(type(given))}")
        if x.ndim != 2 or x.shape[1] != self.hidden_size:
            raise ValueError(f"x: expected shape [total, {self.hidden_size}], got shape {list(x.shape)}")
        for name, tensor in (("x", x), ("the weights", weight)):
            if tensor.dtype not in _DTYPES:
                got, supported = _dtype(tensor), "float32, bfloat16, float16"
                raise NotImplementedError(f"dtype of {name} is not supported: got {got}, supported: {supported}")
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"x: expected dtype {_dtype(weight)}, as the weights, got dtype {_dtype(x)}")
        if x.device != weight.device:
            raise ValueError(f"x: expected a tensor on {weight.device}, as the weights, got one on {x.device}")
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            expected = "int32 or int64 [batch + 1]"
            raise ValueError(f"cu_seqlens: expected {expected}, got {_dtype(cu_seqlens)} {list(cu_seqlens.shape)}")
        if cu_seqlens.device != x.device:
            raise ValueError(f"cu_seqlens: expected a tensor on {x.device}, as x, got one on {cu_seqlens.device}")

    def extra_repr(self) -> str:
        """The arguments, for ``print``."""
        names = "num_q_heads num_kv_heads head_dim kernel_size kernel_stride block_size topk init_blocks local_blocks"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in f"{names} window_size score_heads".split())


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
