"""Stand-ins for packages that the peers import: what they call, and no more. Installed packages have precedence, but for the
formulas of rotary embeddings.

FlashAttention's kernel is the one that PyTorch carries; its rotary embedding is one Triton kernel, too.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def install() -> None:
    _stand_in({"pkg_resources": {"parse_version": _parse_version}})
    _stand_in({"pandas": {}})
    _stand_in({"einops": {"einsum": _einsum, "rearrange": _rearrange}})
    _stand_in(
        {
            "flash_attn": {"flash_attn_varlen_func": flash_attn_varlen_func},
            "flash_attn.flash_attn_interface": {"_wrapped_flash_attn_varlen_backward": _varlen_backward},
            "flash_attn.layers": {},
            "flash_attn.layers.rotary": {"apply_rotary_emb": apply_rotary_emb},
            "flash_attn_2_cuda": {"varlen_fwd": _varlen_forward},
        }
    )
    formulas = {"default": _default, "llama3": _llama3}
    _stand_in({"transformers": {}, "transformers.modeling_rope_utils": {"ROPE_INIT_FUNCTIONS": formulas}})
    # The formulas of transformers 5 ask more of a configuration than the peers' has.
    importlib.import_module("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS = formulas


def _stand_in(modules: dict[str, dict[str, Any]]) -> None:
    """Modules with these members, unless there is a package of the first one's name."""
    first = next(iter(modules))
    if first in sys.modules or importlib.util.find_spec(first) is not None:
        return
    for name, members in modules.items():
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)  # others look for it
        module.__path__ = []
        for key, value in members.items():
            setattr(module, key, value)
        sys.modules[name] = module


def _parse_version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2])


def _einsum(*arguments: Any) -> Tensor:
    *tensors, pattern = arguments
    names = {name: chr(ord("a") + at) for at, name in enumerate(sorted(set(re.findall(r"\w+", pattern))))}
    return torch.einsum(re.sub(r"\w+", lambda name: names[name[0]], pattern).replace(" ", ""), *tensors)


def _rearrange(x: Tensor, pattern: str) -> Tensor:
    if pattern not in ("h k d -> h (k d)", "n h d -> n (h d)", "n k d D -> n (k d) D"):
        raise NotImplementedError(f"einops is not installed, and its stand-in does not know {pattern!r}")
    return x.flatten(1, 2)


def _window(causal: bool, left: int, right: int) -> dict[str, int | None]:
    right = 0 if causal else right
    return {"window_size_left": left if left >= 0 else None, "window_size_right": right if right >= 0 else None}


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    lengths, options = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), _window(causal, *window_size)
    forward = torch.ops.aten._flash_attention_forward
    out: Tensor = forward(q, k, v, *lengths, dropout_p, causal, False, scale=softmax_scale, **options)[0]
    return out


def _varlen_forward(*arguments: Any) -> tuple[Tensor, Tensor, None, Tensor]:
    """As SFNSA calls the extension of FlashAttention 2, with everything by position."""
    q, k, v, _, cu_q, cu_k, _, _, _, _, max_q, max_k, dropout, scale, _, causal, left, right, *_ = arguments
    forward, options = torch.ops.aten._flash_attention_forward, _window(causal, left, right)
    out, lse, rng, *_ = forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, False, scale=scale, **options)
    return out, lse, None, rng


def _varlen_backward(*arguments: Any, rng_state: Tensor | None = None) -> None:
    """The backward of `_varlen_forward`. Without dropout nobody reads the state of the random numbers."""
    grad_out, q, k, v, out, lse, grad_q, grad_k, grad_v, *lengths, dropout, scale, causal = arguments[:16]
    state = (torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty((), dtype=torch.uint64, device=q.device))
    options = _window(causal, *arguments[16:18])
    backward = torch.ops.aten._flash_attention_backward
    inputs = (grad_out, q, k, v, out, lse, *lengths, dropout, causal, *state)
    for grad, found in zip((grad_q, grad_k, grad_v), backward(*inputs, scale=scale, **options), strict=True):
        grad.copy_(found)


@triton.jit
def _rotate(x, out, cos, sin, positions, x_row, x_head, sign, heads, HEADS: tl.constexpr, HALF: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row)
    pair = tl.arange(0, HALF)
    c = tl.load(cos + position * HALF + pair).to(tl.float32)[None, :]
    s = tl.load(sin + position * HALF + pair).to(tl.float32)[None, :] * sign
    head = tl.arange(0, HEADS)[:, None]
    inside = (head < heads) & (pair < HALF)[None, :]
    source = x + row * x_row + head * x_head + pair[None, :]
    a = tl.load(source, mask=inside).to(tl.float32)
    b = tl.load(source + HALF, mask=inside).to(tl.float32)
    target = out + (row * heads + head) * (2 * HALF) + pair[None, :]
    tl.store(target, a * c - b * s, mask=inside)
    tl.store(target + HALF, b * c + a * s, mask=inside)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *tables: Tensor) -> Tensor:
        ctx.save_for_backward(*tables)
        return _rotated(x, *tables, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _rotated(grad, *ctx.saved_tensors, -1.0), None, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, sign: float) -> Tensor:
    x = x if x.stride(2) == 1 else x.contiguous()
    out, heads = x.new_empty(x.shape), x.shape[1]
    sizes = {"HEADS": triton.next_power_of_2(heads), "HALF": cos.shape[1]}
    _rotate[(len(x),)](x, out, cos, sin, positions, x.stride(0), x.stride(1), sign, heads, **sizes)
    return out


def apply_rotary_emb(
    x: Tensor, cos: Tensor, sin: Tensor, *, cu_seqlens: Tensor, max_seqlen: int | None = None
) -> Tensor:
    """Rotates all of a vector, pairs ``(x[i], x[i + dim / 2])``, of packed sequences."""
    if 2 * cos.shape[1] != x.shape[2]:
        raise NotImplementedError("flash_attn is not installed, and its stand-in rotates whole vectors")
    rows = torch.arange(len(x), device=x.device, dtype=cu_seqlens.dtype)
    starts = cu_seqlens[torch.searchsorted(cu_seqlens[1:-1].contiguous(), rows, right=True)]
    rotated: Tensor = _Rotary.apply(x, cos.contiguous(), sin.contiguous(), rows - starts)
    return rotated


def _default(config: Any, device: Any = None, **_: Any) -> tuple[Tensor, float]:
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    return config.rope_theta ** (-pairs / config.head_dim), 1.0


def _llama3(config: Any, device: Any = None, **_: Any) -> tuple[Tensor, float]:
    """Long waves are slowed down by `factor`, those between the two limits by a part of it."""
    frequencies, attention_factor = _default(config, device)
    scaling = config.rope_scaling
    factor, low, high = (scaling[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    waves = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    smooth = ((waves - low) / (high - low)).clamp(0, 1)
    return frequencies * ((1 - smooth) / factor + smooth), attention_factor
