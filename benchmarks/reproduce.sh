#!/usr/bin/env bash
# The tables of docs/performance.md, context_parallel.md and masked_loss.md, part by part; rows go to benchmarks/results.jsonl.
#
#   benchmarks/reproduce.sh bf16 fp8 long            # on one GPU, about a minute and a half each
#   CUDA_VISIBLE_DEVICES=1 benchmarks/reproduce.sh small &    # parts for one GPU run beside each other on several
#   benchmarks/reproduce.sh mesh2 mesh2pp context million # on two GPUs
#   benchmarks/reproduce.sh mesh4 context4 suffix4   # on four
#
# OUTPUT: another file for the rows. MICRO, MICRO_FP8, CHUNK_FP8: micro-batches, and tokens in a chunk of the loss with
# FP8; by default those of an 80 GB card, 2, 2 and 2048; on 141 GB 8, 4 and 8192. BEST=1: the fastest flags of GPT and
# of retention are looked for first, GPT runs with Megatron's own trainer, too, and all take three turns.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export UB_SKIPMC=${UB_SKIPMC:-1} # --tp-comm-overlap by CUDA IPC, which hosts without NVLink multicast have, too
full="--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --rotary-base 1000000"
keep=--yoco-flags=--keep-cross-attention
lean=--yoco-flags=--recompute-elementwise
exact=--flags=--use-precision-aware-optimizer
mb=${MICRO:-2}

run() { # script flags...: a run that fails, for want of memory perhaps, does not end the rest
    python3 benchmarks/preloaded.py "benchmarks/$1.py" "${@:2}" --output "${OUTPUT:-benchmarks/results.jsonl}" ||
        echo "reproduce.sh: $* ended with $?" >&2
}
train() { run training --steps 10 ${BEST:+--tune GPT gated_retention --stock-gpt --rounds 3} "$@"; }
many() { train --steps 6 --batch-tokens 65536 --models GPT gated_retention --tp-comm-overlap "$exact" "$@"; }
mesh4() { many --micro-batches 4 "$@"; }
experts() { # meshes...
    for sizes in "4096 --micro-batches 4" "32768 --micro-batches 1 --chunk-gpt-loss"; do
        train --model 1.4b --layers 12 --with-config benchmarks/experts.yaml --models GPT gated_retention --rounds 3 \
            --lengths $sizes --meshes "$@"
    done
}
fp8() { train --micro-batches "${MICRO_FP8:-2}" --loss-chunk-size "${CHUNK_FP8:-2048}" "$@"; }

for part in "$@"; do
    echo "=== $part"
    case $part in
    bf16) train --micro-batches "$mb" "$exact" ;;
    lean) train --micro-batches "$mb" GPT=1 "$lean" ;;
    stock) train --micro-batches "$mb" "$exact" --stock-gpt; train --micro-batches 1 --models GPT --stock-gpt ;;
    llama) llama="--models GPT gated_retention --plain-llama --rounds 3"
        train $llama --micro-batches "$mb" "$exact"
        train $llama --steps 8 --lengths 32768 --chunk-gpt-loss "--flags=$full --use-precision-aware-optimizer" $keep ;;
    llama4) many --micro-batches "$mb" --meshes DP4 --plain-llama --rounds 3 ;;
    graph) train --micro-batches "$mb" "$exact" --cuda-graph ;;
    fp8) fp8 --precisions delayed "$exact" ;;
    fp8graph) fp8 --precisions delayed "$exact" --cuda-graph ;;
    recipes) fp8 --precisions tensorwise blockwise "$exact" --models gated_retention ;;
    gather) fp8 --precisions delayed-gather --models gated_retention ;;
    long) train --steps 8 --lengths 32768 --chunk-gpt-loss "--flags=$full --use-precision-aware-optimizer" $keep ;;
    longfp8) train --steps 8 --lengths 32768 --precisions delayed "--flags=$full --use-precision-aware-optimizer" $keep ;;
    longer) train --steps 5 --layers 8 --lengths 131072 --chunk-gpt-loss "--flags=$full" $keep ;;
    experts) experts 1 ;;
    experts2) experts EP2 ;;
    experts4) experts EP4 TP2xEP2 ;;
    1.4b) train --model 1.4b --micro-batches 4 --loss-chunk-size 16384 ;;
    1.4bgraph) train --model 1.4b --micro-batches 4 --loss-chunk-size 16384 --cuda-graph ;;
    small) for more in "" --cuda-graph; do train --model 160m --lengths 1024 --batch-tokens 8192 --micro-batches 8 $more; done ;;
    loss) python3 benchmarks/linear_cross_entropy.py --output "${OUTPUT:-benchmarks/results.jsonl}" ;;
    decoding) python3 benchmarks/decoding.py --output "${OUTPUT:-benchmarks/results.jsonl}" ;;
    elementwise) python3 benchmarks/elementwise.py --output "${OUTPUT:-benchmarks/results.jsonl}" ;;
    chunks) for more in "" "--window 1024"; do
        python3 benchmarks/chunk_attention.py $more --output "${OUTPUT:-benchmarks/results.jsonl}"; done ;;
    where) run breakdown --models gated_retention GPT --micro-batch "$mb" "$exact" ;;
    kept) python3 benchmarks/activations.py --config configs/model/yoco_3b.yaml configs/recipe/scaling.yaml ;;
    overlap) train --micro-batches 4 --meshes TP2 --models GPT gated_retention --tp-comm-overlap ;;
    mesh2) train --micro-batches 4 --meshes 1 TP2 DP2 --models gated_retention ;;
    mesh2pp) many --micro-batches "$mb" --meshes 1 "PP2 VP2" ;;
    mesh2fp8) fp8="--precisions delayed --loss-chunk-size ${CHUNK_FP8:-2048}"
        many $fp8 --micro-batches 4 --meshes TP2
        many $fp8 --micro-batches 2 --meshes 1 DP2 "PP2 VP2" ;;
    host) train --lengths 512 --micro-batches 1 --batch-tokens 2048 --models GPT gated_retention --meshes TP2 --tp-comm-overlap ;;
    context) run context_parallel --lengths 32768 65536 131072 --keep-cross-attention ;;
    contextwindow) run context_parallel --lengths 65536 --keep-cross-attention --self-decoder sliding_window ;;
    longest) run context_parallel --lengths 524288 --keep-cross-attention --micro-batches 1 --steps 3 --cases YOCO "GPT, Transformer Engine p2p" ;;
    million) run million_tokens --keep-cross-attention ;;
    mesh4) mesh4 --meshes 1 DP4 TP2xDP2 PP2xTP2 "PP2xTP2 VP2" ;;
    mesh4fp8) mesh4 --meshes 1 TP2xDP2 "PP2xTP2 VP2" --precisions delayed --loss-chunk-size "${CHUNK_FP8:-2048}" ;;
    mesh4_13b) mesh4 --model 13b --steps 5 --batch-tokens 16384 --micro-batches 1 --loss-chunk-size 4096 --meshes TP2xPP2 TP4 ;;
    context4) train --steps 4 --lengths 131072 --meshes CP4 --models GPT gated_retention "--flags=$full" $keep ;;
    million4) train --steps 3 --lengths 1048576 --layers 4 --meshes CP4 TP2xCP2 --models gated_retention --loss-chunk-size 4096 --timeout 500 "--flags=${full/1000000/80000000}" "$keep --mlp-chunks-for-training 16" ;;
    suffix) run loss_positions --layers 8 --steps 5 --keep
        run loss_positions --length 32768 --batch-tokens 65536 --steps 5 --keep --models GPT gated_retention "$exact"
        run loss_positions --layers 8 --steps 6 --rounds 1 --recompute selective --keep --models gated_retention sliding_window ;;
    answers) python3 benchmarks/packed_answers.py --output "${OUTPUT:-benchmarks/results.jsonl}" ;;
    planned4) run planned_meshes --gpus 4 ;;
    suffix4) run loss_positions --meshes CP4 --models gated_retention --keep --batch-tokens 131072 --steps 5 --rounds 1 --travels keys queries ;;
    suffixmillion4) run loss_positions --length 1048576 --meshes TP2xCP2 --models gated_retention --keep --positions loss --travels keys queries --steps 4 --rounds 1 --rotary-base 80000000 --loss-chunk-size 4096 --timeout 300 --yoco-flags=--mlp-chunks-for-training=16 ;;
    *) echo "reproduce.sh: error: no part '$part'; see the cases in it" >&2 && exit 2 ;;
    esac
done
