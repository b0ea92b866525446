#!/usr/bin/env bash
# All steps once, on a CPU: corpus, tokenizer, data, training, resume, evaluation, text. About five minutes.
#
#   launch/demo.sh [FOLDER]        writes everything into FOLDER (default runs/demo), which must hold no run
set -euo pipefail
case ${1-} in
    --help | -h) sed -n '2,4s/^# \{0,1\}//p' "$0" && exit 0 ;;
    -*) echo "demo.sh: error: unknown option $1; see --help" >&2 && exit 2 ;;
esac
cd "$(dirname "$0")/.."
run=${1:-runs/demo}
python=${PYTHON:-.venv/bin/python}
if [ -e "$run/checkpoints" ]; then
    echo "demo.sh: error: $run holds an earlier run; remove it or name another folder" >&2
    exit 2
fi
mkdir -p "$run"
step() { printf '\n== %s\n' "$*"; }

step "1. Corpus: the source of Python's standard library"
"$python" tools/gather_text.py --python-stdlib --output "$run/corpus.jsonl"

step "2. Tokenizer: byte-level BPE, 4096 tokens"
"$python" tools/train_tokenizer.py --input "$run/corpus.jsonl" --vocab-size 4096 --output "$run/tokenizer"

step "3. Data: Megatron's .bin/.idx"
tokenizer=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$run/tokenizer")
"$python" tools/preprocess_data.py --input "$run/corpus.jsonl" "${tokenizer[@]}" --append-eod --overwrite \
    --output-prefix "$run/data"

# Two processes, data-parallel, as one would start eight GPUs.
pretrain() {
    OMP_NUM_THREADS=1 "$python" -m torch.distributed.run --standalone --nproc-per-node 2 pretrain_yoco.py \
        --config configs/model/yoco_tiny.yaml configs/recipe/demo.yaml \
        --data-path "$run/data_text_document" --split 98,2,0 "${tokenizer[@]}" \
        --save "$run/checkpoints" --load "$run/checkpoints" --tensorboard-dir "$run/tensorboard" "$@" 2>&1 \
        | tee -a "$run/train.log" | losses || { tail -n 40 "$run/train.log" >&2; exit 1; }
}
losses() { grep --line-buffered -E "^[0-9-]+ [0-9:]+  ( *[0-9]+/|validation loss)"; }

step "4. Pretraining, first half; saves a checkpoint and stops"
pretrain --exit-interval 200

step "5. Pretraining, second half, resumed from the checkpoint; evaluation at the end"
pretrain

step "6. Result"
entropy=$("$python" tools/inspect_dataset.py --data-path "$run/data_text_document" --split 98,2,0 --part valid --json \
    | "$python" -c 'import json, sys; print(f"{json.load(sys.stdin)["unigram_entropy_nats"]:.3f}")')
loss=$(grep "on validation set" "$run/train.log" | tail -n 1 | grep -oE "lm loss [0-9.]+" | grep -oE "[0-9.]+")
printf 'unigram entropy of the validation text: %s nats per token\nvalidation loss:                        %.3f nats per token\n' \
    "$entropy" "$loss"

step "7. Text from the model"
"$python" tools/generate.py --load "$run/checkpoints" --prompt 'def ' --max-new-tokens 120 2>/dev/null | tee "$run/sample.txt"

step "8. Its curves"
"$python" tools/compare_runs.py "$run" --output "$run/curves" --format png
echo "picture      $run/curves/losses.png"

step "Look further"
echo "checkpoints  $run/checkpoints"
echo "log          $run/train.log"
echo "TensorBoard  $python -m tensorboard.main --logdir $run/tensorboard"
