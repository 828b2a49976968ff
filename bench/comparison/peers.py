"""The public implementations that we compare with, from checkouts of their repositories.

Nothing is written to a checkout: a copy of FSA's two packages goes to a temporary folder, where one token of it is
changed, and packages that are imported but not needed here get stand-ins.
"""

from __future__ import annotations

import atexit
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import stand_ins
from .reference import Case

#: From Triton 3.6 on a tuple of one pointer is no pointer.
FSA_FILE = "fsa/ops/FSA_topk_sparse_attention.py"
FSA_BEFORE, FSA_AFTER = (
    "lse_ptrs = (lse_ptr + pid_q_j * stride_lse_n,)",
    "lse_ptrs = (lse_ptr + pid_q_j * stride_lse_n)",
)


def _commit(checkout: Path) -> str:
    """Its commit; of a checkout without git a number that its Python files give."""
    command = ["git", "-c", "safe.directory=*", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        if not (checkout / ".git").exists():  # git would answer for a repository around it
            raise FileNotFoundError(checkout / ".git")
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()[:12]
    except (OSError, subprocess.CalledProcessError):
        digest = hashlib.sha256()
        for path in sorted(checkout.rglob("*.py")):
            digest.update(path.relative_to(checkout).as_posix().encode() + path.read_bytes())
        return f"no git, SHA-256 of its Python files {digest.hexdigest()[:12]}"


class Fsa:
    """Relaxed-System-Lab/Flash-Sparse-Attention."""

    name = "FSA"

    def forward(self, case: Case, cu: Tensor) -> tuple[Any, ...]:
        from fsa.ops.FSA_topk_sparse_attention import _topk_sparse_attention_fwd_opt as forward

        n = case.q.shape[0]
        return forward(case.q, case.k, case.v, case.ids, case.block_size, cu, cu, n, n, case.scale)

    def backward(self, case: Case, cu: Tensor, state: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
        from fsa.ops.FSA_topk_sparse_attention import _topk_sparse_attention_bwd_opt as backward

        n, (out, lse, permuted) = case.q.shape[0], state
        inputs = (case.q, case.k, case.v, case.ids, case.block_size, cu, cu, n, n, case.scale, permuted)
        return backward(out, case.grad_out, lse, *inputs)


class Nsa:
    """The NSA that FSA compares with."""

    name = "NSA-ref"

    def forward(self, case: Case, cu: Tensor) -> tuple[Any, ...]:
        from nsa_ref.ops.topk_sparse_attention import _topk_sparse_attention_fwd as forward

        n = case.q.shape[0]
        return forward(case.q, case.k, case.v, case.ids, case.block_size, cu, cu, n, n, case.scale)

    def backward(self, case: Case, cu: Tensor, state: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
        from nsa_ref.ops.topk_sparse_attention import _topk_sparse_attention_bwd as backward

        n, (out, lse) = case.q.shape[0], state
        inputs = (case.q, case.k, case.v, case.ids, case.block_size, cu, cu, n, n, case.scale)
        return backward(out, case.grad_out, lse, *inputs)


class Sfnsa:
    """mdy666/Scalable-Flash-Native-Sparse-Attention. Absent ids are blocks after the last."""

    name = "SFNSA"

    def __init__(self) -> None:
        self.ids: tuple[Tensor, Tensor] | None = None

    def _ids(self, case: Case, cu: Tensor) -> Tensor:
        if self.ids is None or self.ids[0] is not case.ids:
            from flash_nsa import NSAHelper

            NSAHelper.is_context_parallel_enable = False
            NSAHelper.x_cu_seqlens = None
            NSAHelper.set_hyperparameters(32, 16, case.block_size, 512, case.ids.shape[2], 1, 2)
            NSAHelper.init_cu_seqlens(cu)
            blocks = -(-case.q.shape[0] // case.block_size)
            self.ids = case.ids, torch.where(case.ids < 0, blocks, case.ids).contiguous()
        return self.ids[1]

    def forward(self, case: Case, cu: Tensor) -> tuple[Any, ...]:
        from flash_nsa.ops.select_attn import slc_attn_fwd

        return slc_attn_fwd(case.q, case.k, case.v, self._ids(case, cu))

    def backward(self, case: Case, cu: Tensor, state: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
        from flash_nsa.ops.select_attn import slc_attn_bwd

        return slc_attn_bwd(case.q, case.k, case.v, self._ids(case, cu), *state[:2], case.grad_out)


Peer = Fsa | Nsa | Sfnsa


def load(fsa: Path | None, sfnsa: Path | None) -> tuple[list[Peer], dict[str, str]]:
    """The peers whose checkouts are given, and their commits."""
    stand_ins.install()
    peers: list[Peer] = []
    commits: dict[str, str] = {}
    if fsa is not None:
        folder = Path(tempfile.mkdtemp(prefix="compare-fsa-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for package in ("fsa", "nsa_ref"):
            shutil.copytree(fsa / package, folder / package)
        source = folder / FSA_FILE
        source.write_text(source.read_text().replace(FSA_BEFORE, FSA_AFTER))
        sys.path.insert(0, str(folder))
        peers += [Fsa(), Nsa()]
        commits["Flash-Sparse-Attention"] = _commit(fsa)
    if sfnsa is not None:
        sys.path.insert(0, str(sfnsa))
        peers.append(Sfnsa())
        commits["Scalable-Flash-Native-Sparse-Attention"] = _commit(sfnsa)
    return peers, commits
