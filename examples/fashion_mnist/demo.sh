#!/bin/sh
# What a user would type, from a trained network to a pruned one that ONNX Runtime runs.
# `make demo` calls it. `sh demo.sh 0.1` trains for a tenth of an epoch only, to try the commands.
set -eu
cd "$(dirname "$0")"
epochs=${1:-5}
out=${2:-out}

run() {
    printf '\n\033[1m$ %s\033[0m\n' "$*"
    "$@"
}

run secateur inspect network.py:build --weights weights.safetensors

run secateur prune network.py:build --weights weights.safetensors --data data.py:loaders \
    --sparsity 90% --allocation global --epochs "$epochs" --lr 0.02 --distill 0.5 \
    -o "$out/pruned" --onnx "$out/pruned.onnx" --overwrite

run python run_onnx.py "$out/pruned.onnx"

# An ordinary ONNX file: its zeros are multiplied. Now without them, and measured side by side.
if python -c 'import sys, secateur.runtime; sys.exit(not secateur.runtime.available())'; then
    # So small a network is fastest on one thread.
    run secateur compile "$out/pruned.onnx" -o "$out/pruned.sparse.onnx" --threads 1 --overwrite
    run secateur bench "$out/pruned.sparse.onnx" --threads 1
else
    printf '\nThe native library was not built (see docs/howto/install-native.md): no speed-up here.\n'
fi
