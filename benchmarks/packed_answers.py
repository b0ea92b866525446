"""Packed prompts and answers: the cross-decoder where the answers are, beside all positions with a masked loss.

    python benchmarks/packed_answers.py                                                # one GPU, about two minutes
    python benchmarks/packed_answers.py --self-decoder sliding_window --self-decoder-window 1024
    python benchmarks/packed_answers.py --config configs/model/yoco_tiny.yaml --num-layers 4 --seq-length 512 \\
        --document-lengths 60 120                                                      # on a CPU, that it runs

8 layers of the 3B and 32,768 tokens unless flags of pretrain_yoco.py say otherwise; documents of 1,000 to 2,000
tokens, a third of them answers: one at the document's end, or as many as --answers says, evenly apart. Forward and
backward of a micro-batch, no optimizer. The two ways take turns over several packs of other documents, so that each
micro-batch plans its calls anew; the median of the rounds counts. FLOPs are those of yoco_megatron/costs, with the keys
that each query of a document attends to; what they save is what could be won.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from yoco_megatron import runtime
from yoco_megatron.startup.prepare import prepare

prepare()

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from megatron.training import get_args
from megatron.training.initialize import initialize_megatron
from record import record
from runs import ROOT

from yoco_megatron.costs.flops import Queries, train_flops
from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.model.builder import model_config_from_args
from yoco_megatron.parallel.context.query_runs import num_visible_keys
from yoco_megatron.parallel.context.query_shard import Runs, count, positions_of
from yoco_megatron.startup import arguments
from yoco_megatron.startup.load_run import set_environment_of_one_process

# Without Megatron's wrapper there is no buffer for gradients that Transformer Engine could add to.
FLAGS = (
    "--config configs/model/yoco_3b.yaml --num-layers 8 --seq-length 32768 --max-position-embeddings 1048576 --bf16 "
)
FLAGS += "--rotary-base 1000000 --vocab-size 100350 --loss-chunk-size 8192 --no-gradient-accumulation-fusion "
FLAGS += "--mock-data --tokenizer-type NullTokenizer --micro-batch-size 1 --lr 1e-4"


@dataclasses.dataclass(frozen=True)
class Pack:
    """Documents of one sequence, [start, stop) of each and of their answers, and random tokens."""

    documents: Runs
    answers: Runs
    tokens: torch.Tensor

    @staticmethod
    def random(length: int, lengths: tuple[int, int], answers: int) -> "Pack":
        documents: list[tuple[int, int]] = []
        while (start := documents[-1][1] if documents else 0) < length:
            documents.append((start, min(length, start + int(torch.randint(lengths[0], lengths[1] + 1, ())))))
        # Each of the equal parts of a document ends with an answer, but for the last token, whose label is another's.
        parts = [
            (start + (stop - start) * part // answers, start + (stop - start) * (part + 1) // answers - 1)
            for start, stop in documents
            for part in range(answers)
        ]
        runs = [(stop - (stop - start) // 3, stop) for start, stop in parts if stop - start >= 3]
        return Pack(documents, tuple(runs), torch.randint(1000, (1, length + 1), device=runtime.device()))

    @property
    def document_ids(self) -> torch.Tensor:
        """int32 [1, length], on the host as the trainer has it."""
        lengths = torch.tensor([stop - start for start, stop in self.documents])
        return torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)[None]

    def flops(self, shape: ModelShape, runs: Runs) -> float:
        """Of forward and backward with the cross-decoder at `runs`."""
        keys = num_visible_keys(runs, np.array([start for start, _ in self.documents]))
        return train_flops(shape, 1, Queries(count(runs) / shape.seq_length, keys / shape.seq_length))


def all_positions(model: torch.nn.Module, pack: Pack) -> torch.Tensor:
    """The loss is masked where it is summed."""
    inputs, labels = pack.tokens[:, :-1].contiguous(), pack.tokens[:, 1:].contiguous()
    mask = torch.zeros(labels.shape, device=labels.device)
    mask[:, positions_of(pack.answers)] = 1
    return (model(inputs, labels=labels, document_ids=pack.document_ids) * mask).sum()


def answers_alone(model: torch.nn.Module, pack: Pack) -> torch.Tensor:
    """The cross-decoder, head and loss at the answers."""
    inputs, labels = pack.tokens[:, :-1].contiguous(), pack.tokens[:, 1:][:, positions_of(pack.answers)]
    return model(inputs, labels=labels, document_ids=pack.document_ids, query_runs=pack.answers).sum()


WAYS: dict[str, Callable[[torch.nn.Module, Pack], torch.Tensor]] = {
    "all positions": all_positions,
    "answers alone": answers_alone,
}


def seconds(model: torch.nn.Module, packs: list[Pack], way: str) -> tuple[float, float]:
    """(of a pack in the mean, the sum of the losses)."""
    if runtime.has_gpu():
        torch.cuda.synchronize()
    start, total = time.perf_counter(), torch.zeros((), device=runtime.device())
    for pack in packs:
        loss = WAYS[way](model, pack)
        loss.backward()
        model.zero_grad(set_to_none=True)
        total += loss.detach()
    losses = total.item()
    return (time.perf_counter() - start) / len(packs), losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, nargs="+", default=[1, 2], help="in each document")
    parser.add_argument("--document-lengths", type=int, nargs=2, default=[1000, 2000], metavar=("FROM", "TO"))
    parser.add_argument("--packs", type=int, default=4, help="other documents in each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results.jsonl")
    options, flags = parser.parse_known_args()
    set_environment_of_one_process()
    args = arguments.parse([*FLAGS.split(), *flags])
    arguments.finalize(args)
    initialize_megatron()
    args = get_args()
    shape = ModelShape.from_args(args)
    config = model_config_from_args(args)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = config.get_builder_cls()(config).build_distributed_models(pg_collection=groups, wrap_with_ddp=False)
    model = unwrap_model(model)[0].train()
    device = torch.cuda.get_device_name() if runtime.has_gpu() else "CPU"
    for answers in options.answers:
        torch.manual_seed(answers)
        lengths = tuple(options.document_lengths)
        packs = [Pack.random(args.seq_length, lengths, answers) for _ in range(options.packs)]
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        losses = {}
        for round_number in range(options.rounds + 1):
            for way in WAYS:
                taken, losses[way] = seconds(model, packs, way)
                if round_number:  # kernels compile and are chosen in the first
                    times[way].append(taken)
        every = ((0, args.seq_length),)
        flop = {
            way: sum(pack.flops(shape, runs or pack.answers) for pack in packs) / len(packs)
            for way, runs in zip(WAYS, (every, None))
        }
        report(f"{answers} a document", args, shape, packs, times, losses, flop, device, options)


def report(
    answers: str, args: argparse.Namespace, shape: ModelShape, packs: list[Pack], times: dict[str, list[float]],
    losses: dict[str, float], flop: dict[str, float], device: str, options: argparse.Namespace,
) -> None:  # fmt: skip
    """Print both ways and what the FLOPs promise, and record them."""
    whole, alone = (median(times[way]) for way in WAYS)
    share = sum(count(pack.answers) for pack in packs) / len(packs) / args.seq_length
    of_flops = flop["all positions"] / flop["answers alone"]
    shortest, longest = options.document_lengths
    case = f"hidden {shape.hidden_size} {shape.num_layers} layers {shape.self_decoder} {args.seq_length} "
    case += f"{'bf16' if args.bf16 else 'fp32'}, documents of {shortest} to {longest} tokens, answers {answers}"
    print(f"{case}, {share:.1%} of the positions; losses {', '.join(f'{losses[way]:.6g}' for way in WAYS)}")
    for way in WAYS:
        rounds = " ".join(f"{value * 1e3:.1f}" for value in times[way])
        rate = flop[way] / median(times[way]) / 1e12
        print(f"   {way}: {median(times[way]) * 1e3:,.1f} ms a micro-batch ({rounds}), {rate:,.1f} TFLOP/s")
    print(
        f"   {whole / alone:.3f} times as fast; FLOPs: {of_flops:.3f}; {whole / alone / of_flops:.1%} of that",
        flush=True,
    )
    record(
        options.output, benchmark="packed_answers", case=case, metric="forward and backward", unit="ms", device=device,
        value=round(alone * 1e3, 2), peer="all positions", peer_value=round(whole * 1e3, 2), higher_is_better=False,
    )  # fmt: skip
    record(
        options.output, benchmark="packed_answers", case=case, metric="speedup", unit="x", device=device,
        value=round(whole / alone, 3), peer="by FLOPs", peer_value=round(of_flops, 3),
    )  # fmt: skip


if __name__ == "__main__":
    main()
