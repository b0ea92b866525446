#!/usr/bin/env bash
# From raw text to a run on a blend, on a CPU, in about three minutes: Python's standard library and the sources of
# installed packages, 0.7 to 0.3, documents kept apart.
#
#   launch/blend.sh [FOLDER]        writes everything into FOLDER (default runs/blend)
set -euo pipefail
case ${1-} in
    --help | -h) sed -n '2,5s/^# \{0,1\}//p' "$0" && exit 0 ;;
    -*) echo "blend.sh: error: unknown option $1; see --help" >&2 && exit 2 ;;
esac
cd "$(dirname "$0")/.."
run=${1:-runs/blend}
if [[ $run == *[!A-Za-z0-9_./\ -]* ]]; then # it becomes text of a YAML file
    echo "blend.sh: error: $run: name a folder of letters, digits and _ . / - alone" >&2
    exit 2
fi
python=${PYTHON:-.venv/bin/python}
mkdir -p "$run"
step() { printf '\n== %s\n' "$*"; }

step "1. Two corpora"
installed=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
"$python" tools/gather_text.py --python-stdlib --output "$run/stdlib.jsonl"
"$python" tools/gather_text.py --input "$installed/transformers" --glob '*.py' --output "$run/packages.jsonl"
gzip -kf "$run/packages.jsonl"

step "2. One tokenizer for both"
"$python" tools/train_tokenizer.py --input "$run/stdlib.jsonl" --vocab-size 4096 --output "$run/tokenizer"
tokenizer=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$run/tokenizer")

step "3. Token ids; each with its report and checksums"
for name in stdlib.jsonl packages.jsonl.gz; do
    "$python" tools/preprocess_data.py --input "$run/$name" "${tokenizer[@]}" --append-eod --overwrite \
        --output-prefix "$run/${name%%.*}"
done
"$python" tools/inspect_dataset.py --data-path "$run/packages_text_document" --verify --samples 1 --sample-tokens 60 \
    --histogram "$run/packages_lengths.png"

step "4. The blend, and the plan of what the run will read"
cat >"$run/blend.yaml" <<EOF
data-path:
  $run/stdlib_text_document: 0.7
  $run/packages_text_document: 0.3
split: 98,2,0
data-cache-path: $run/cache
dataloader-inter-document-masking: true
eod-mask-loss: true
EOF
flags=(--config configs/model/yoco_tiny.yaml configs/recipe/demo.yaml "$run/blend.yaml" --train-iters 100 "${tokenizer[@]}")
"$python" tools/plan_data.py "${flags[@]}" 2>/dev/null
"$python" tools/prepare_cache.py "${flags[@]}" 2>/dev/null

step "5. Training on it"
OMP_NUM_THREADS=1 "$python" -m torch.distributed.run --standalone --nproc-per-node 2 pretrain_yoco.py "${flags[@]}" \
    --save "$run/checkpoints" --load "$run/checkpoints" >"$run/train.log" 2>&1 || { tail -n 40 "$run/train.log" >&2; exit 1; }
grep -E "^[0-9-]+ [0-9:]+  ( *[0-9]+/|validation loss)" "$run/train.log" | tail -n 5
echo "log $run/train.log, lengths $run/packages_lengths.png"
