#!/usr/bin/env bash
# Compiles every kernel and compares the committed resource table with what the compiler says. Needs no GPU: NVRTC
# comes from PyPI. The version is fixed, because registers and spills depend on it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'nvidia-cuda-nvrtc==13.0.88'
library=$(find "$work/venv" -name 'libnvrtc.so.*' ! -name '*alt*' -print -quit)
FSA_NVRTC_PATH="$library" FSA_CACHE_DIR="$work/cache" cargo test -p fsa-cuda --locked --test compile -- --ignored
