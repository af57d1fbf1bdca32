#!/usr/bin/env bash
# One archive of what `benchmarks/gpu_check.py` needs on a machine without a network: the code, the mini weights, and wheels
# of packages that bare PyTorch images lack. Usage: benchmarks/gpu_carry.sh OUT.tar.gz
# There: tar xzf OUT.tar.gz && cd clipgen && pip install --no-index --no-deps wheels/*.whl && python benchmarks/gpu_check.py --out out
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:?usage: benchmarks/gpu_carry.sh OUT.tar.gz}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/clipgen"
git -C "$root" archive HEAD | tar x -C "$work/clipgen"
rm -rf "$work/clipgen/docs" "$work/clipgen/tests/golden"/*vqgan_tiny.safetensors # no stage needs them
python=${PYTHON:-$root/.venv/bin/python}
pinned=$(sed -nE 's/^((clip-anytorch|omegaconf|ftfy|webdataset|lpips)==[^ ]+).*/\1/p' "$root"/requirements*.txt)
# shellcheck disable=SC2086 # one argument per package
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work/clipgen/wheels" $pinned braceexpand wcwidth
tar czf "$out.tmp" -C "$work" clipgen
mv "$out.tmp" "$out"
size=$(($(stat -c %s "$out") / 1048576))
echo "$out: $size MiB"
[ "$size" -lt 64 ] || { echo "larger than 64 MiB" >&2; exit 1; }
