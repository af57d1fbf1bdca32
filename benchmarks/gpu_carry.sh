#!/usr/bin/env bash
# One archive of what a machine with a GPU but without a network needs: the code, and wheels of packages that bare PyTorch
# images lack. Usage: benchmarks/gpu_carry.sh OUT.tar.xz [training]
# Without `training` it is for the checks, with the mini weights:
#   python3 -m tarfile -e OUT.tar.xz && cd clipgen && pip install --no-index --no-deps wheels/*.whl
#   python benchmarks/gpu_check.py --out out
# With it for training the mini model, with the renders (`make renders`), WordNet and the mini weights:
#   ... && python -m train.mini.recipe --only text --minutes 2 --start weights/mini --work work --wordnet wordnet
# and then the same with `--only gpt --minutes 6`, which needs both towers.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:?usage: benchmarks/gpu_carry.sh OUT.tar.xz [training]}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tree=$work/clipgen
mkdir "$tree"
git -C "$root" archive HEAD | tar x -C "$tree"
rm -rf "$tree/docs" "$tree/tests/golden"/*vqgan_tiny.safetensors "$tree/weights/mini"/*.jpg # no stage needs them
if [ "${2:-}" = training ]; then
    rm -rf "$tree/tests" "$tree/weights/mini/coverage.safetensors"
    mkdir -p "$tree/data/emoji" "$tree/wordnet"
    cp -r "$root/data/emoji/renders" "$tree/data/emoji/"
    cp /usr/share/wordnet/{data,index}.noun "$tree/wordnet/"
else
    rm -rf "$tree/tests/integration" "$tree/tests/golden"/{renders,receipts*,hfailab_gpt*}
fi
python=${PYTHON:-$root/.venv/bin/python}
pinned=$(sed -nE 's/^((clip-anytorch|omegaconf|ftfy|webdataset|lpips)==[^ ]+).*/\1/p' "$root"/requirements*.txt)
# shellcheck disable=SC2086 # one argument per package
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$tree/wheels" $pinned braceexpand wcwidth
tar cJf "$out.tmp" -C "$work" clipgen
mv "$out.tmp" "$out"
size=$(($(stat -c %s "$out") / 1048576))
echo "$out: $size MiB"
