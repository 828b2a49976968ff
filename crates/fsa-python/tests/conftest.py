"""Keeps what PyTorch compiles for the tests away from other runs: its cache does not know the operators' versions.

On a GPU short calls would all take one route of selected attention: here they take one or the other by their sizes.
"""

import os
import tempfile

_folder = tempfile.TemporaryDirectory(prefix="fsa-inductor-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _folder.name
os.environ.setdefault("FSA_ROUTE", "both")
