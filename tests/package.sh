#!/usr/bin/env bash
# Builds sdist and wheel, installs the wheel in an environment of its own, and trains ten updates with it, far from the sources.
# Usage: tests/package.sh PYTHON   (an interpreter that has `build`)
set -euo pipefail
builder=$1
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$builder" -m build --outdir "$work/dist" "$root" >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
tar tzf "$work"/dist/*.tar.gz >"$work/sdist.txt"
"$builder" -m zipfile -l "$work"/dist/*.whl >"$work/wheel.txt"
for file in relora_ds/py.typed relora_ds/method/lora.py relora_ds/reports/page.css; do
    grep -q "/$file$" "$work/sdist.txt" || { echo "the sdist lacks $file"; exit 1; }
    grep -q "^$file " "$work/wheel.txt" || { echo "the wheel lacks $file"; exit 1; }
done

"$builder" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --constraint "$root/constraints.txt" "$work"/dist/*.whl
export PATH="$work/venv/bin:$PATH" WANDB_MODE=disabled PYTHONPATH=
cd "$work"
relora-ds --version
cp "$root/docs/design.md" text.txt
relora-ds prepare text.txt tokens --vocab-size 300 --holdout 0.1
cat >recipe.yaml <<'EOF'
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4}
data: {path: tokens, sequence_length: 32}
relora: {rank: 4, warm_start: 3, restart_every: 3, restart_warmup: 1}
train: {updates: 10, global_batch: 8, micro_batch: 4}
run: {dir: run}
deepspeed: {zero_optimization: {stage: 2}}
EOF
relora-ds train recipe.yaml --nproc 1
relora-ds export run model
test -f model/model.safetensors
relora-ds report run
grep -q -- '--paper' run/report.html
echo "the package installs and trains"
