#!/usr/bin/env bash
# One archive of what `benchmarks/gpu_check.py` needs on a machine without a network: the code, the mini weights, and wheels
# of pure-Python packages that bare PyTorch images lack. Usage: benchmarks/gpu_carry.sh OUT.tar.gz
# There: tar xzf OUT.tar.gz && cd clipgen && pip install --no-index --no-deps wheels/*.whl && python benchmarks/gpu_check.py --out out
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:?usage: benchmarks/gpu_carry.sh OUT.tar.gz}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/clipgen"
git -C "$root" archive HEAD | tar x -C "$work/clipgen"
rm -rf "$work/clipgen/docs" "$work/clipgen/tests/golden"/hfailab_{vqgan,clip}_tiny.safetensors
python=${PYTHON:-$root/.venv/bin/python}
names=$(grep -E '^(clip-anytorch|omegaconf|ftfy|webdataset|lpips|braceexpand|antlr4-python3-runtime|wcwidth)==' "$root"/requirements*.txt -h || true)
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work/clipgen/wheels" $names antlr4-python3-runtime==4.9.3 braceexpand wcwidth
tar czf "$out.tmp" -C "$work" clipgen
mv "$out.tmp" "$out"
size=$(($(stat -c %s "$out") / 1048576))
echo "$out: $size MiB"
[ "$size" -lt 64 ] || { echo "larger than 64 MiB" >&2; exit 1; }
