#!/usr/bin/env bash
# Builds the wheel, installs it where there is nothing but NumPy, and runs the tests that need no PyTorch.
#
# Needs cargo and Python 3.10 or later with venv. Everything goes to a temporary folder and to cargo's target
# folder. The tests of the PyTorch operators are reported as skipped; to run them as well, name a Python that
# has torch, pytest and ml_dtypes:
#
#     TORCH_PYTHON=/path/to/python crates/fsa-python/ci.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

max_bytes=$((20 * 1024 * 1024))
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
pytest=(-m pytest -c "$PWD/pyproject.toml" --rootdir "$PWD" -p no:cacheprovider -q)

python3 -m venv "$work/build"
"$work/build/bin/pip" install --quiet 'maturin>=1.9.4,<2'
"$work/build/bin/maturin" build --release --locked --manifest-path Cargo.toml --out "$work/wheels"
wheel=$(ls "$work"/wheels/*.whl)
bytes=$(wc -c <"$wheel")
printf '%s: %d bytes\n' "$(basename "$wheel")" "$bytes"
if ((bytes > max_bytes)); then
    printf 'the wheel is larger than %d bytes\n' "$max_bytes"
    exit 1
fi

# With NumPy alone: no pytest yet, no ml_dtypes, no torch.
python3 -m venv "$work/plain"
"$work/plain/bin/pip" install --quiet "$wheel"
(cd "$work" && plain/bin/python - <<'PYTHON'
import numpy as np, fsa_rs

q = np.ones((64, 2, 16), np.float32)
cu_seqlens = np.array([0, 64], np.int32)
gates = np.ones((64, 3), np.float32)
out = fsa_rs.nsa_attn_varlen_func(q, q, q, gates, cu_seqlens, cu_seqlens)
# Every branch averages ones; the first 31 rows see no compressed key.
assert np.allclose(out[:31], 2) and np.allclose(out[31:], 3)
print(f"fsa_rs {fsa_rs.__version__} works with NumPy {np.__version__} alone")
PYTHON
)

(cd "$work" && plain/bin/python -m fsa_rs.check --device cpu | tail -n 1)

"$work/plain/bin/pip" install --quiet 'pytest>=8' ml_dtypes
(cd "$work" && plain/bin/python "${pytest[@]}" "$OLDPWD/tests")

if [[ -n "${TORCH_PYTHON:-}" ]]; then
    "$work/plain/bin/pip" install --quiet --no-deps --target "$work/site" "$wheel"
    (cd "$work" && PYTHONPATH="$work/site" "$TORCH_PYTHON" "${pytest[@]}" "$OLDPWD/tests")
fi
