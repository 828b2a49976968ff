"""What the machine has: versions, and whether a device can be used."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import fsa_rs

#: The oldest GPUs whose instructions the kernels use: Ampere.
CAPABILITY = (8, 0)


@dataclass
class Machine:
    """Versions by name, the GPU if there is one, and why it cannot be used if it cannot."""

    versions: dict[str, str | None] = field(default_factory=dict)
    gpu: str | None = None
    without_cuda: str | None = None


def look() -> Machine:
    """Looks without computing anything."""
    versions: dict[str, str | None] = {
        "fsa_rs": fsa_rs.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "numpy": np.__version__,
        "torch": None,
        "cuda of torch": None,
    }
    try:
        import torch
    except ModuleNotFoundError:
        return Machine(versions, without_cuda="PyTorch is not installed, and arrays on a GPU are its tensors")
    versions["torch"], versions["cuda of torch"] = torch.__version__, torch.version.cuda
    return Machine(versions, *_gpu(torch))


def _gpu(torch: Any) -> tuple[str | None, str | None]:
    """Its name, and why it cannot be used."""
    if torch.version.cuda is None:
        return None, "this build of PyTorch is one without CUDA"
    if not torch.cuda.is_available():
        return None, "PyTorch finds no GPU: no driver of NVIDIA, no device, or CUDA_VISIBLE_DEVICES hides it"
    capability = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()}, compute capability {capability[0]}.{capability[1]}"
    if capability < CAPABILITY:
        return name, f"{name}: needed is {CAPABILITY[0]}.{CAPABILITY[1]} or later"
    return name, None


def has_ml_dtypes() -> bool:
    """Whether NumPy has bfloat16."""
    try:
        import ml_dtypes  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True
