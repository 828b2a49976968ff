"""Keeps what PyTorch compiles for the tests away from other runs: its cache does not know the operators' versions."""

import os
import tempfile

_folder = tempfile.TemporaryDirectory(prefix="fsa-inductor-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _folder.name
