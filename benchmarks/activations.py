"""What autograd saves in a forward pass, by layer and module: bytes per token.

    python benchmarks/activations.py --config configs/model/yoco_3b.yaml --bf16         # one GPU, under a minute
    python benchmarks/activations.py --config configs/model/yoco_tiny.yaml              # plain torch on a CPU

Flags are those of pretrain_yoco.py; two layers are built, one of each half. Every storage counts once, whole, where it
is first saved; weights and what is freed again before the forward pass ends do not count. The last lines put the model
together: what a token costs in all its layers, and on a GPU what torch had allocated for these two.
"""

import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from yoco_megatron import runtime
from yoco_megatron.startup.prepare import prepare

prepare()

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from megatron.training import get_args
from megatron.training.initialize import initialize_megatron

from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.model.builder import model_config_from_args
from yoco_megatron.startup import arguments
from yoco_megatron.startup.load_run import set_environment_of_one_process

# Without Megatron's wrapper there is no buffer for gradients that Transformer Engine could add to.
FLAGS = "--no-gradient-accumulation-fusion "
FLAGS += "--mock-data --tokenizer-type NullTokenizer --vocab-size 100350 --micro-batch-size 1 --lr 1e-4"


class SavedTensors:
    """What autograd saves while `watch` runs: (module's path, shape, dtype) of each storage, in order."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._path = [""]
        self._found: dict[int, tuple[str, torch.Tensor]] = {}
        self._weights = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda _, __, name=name: self._path.append(name))
            module.register_forward_hook(self._leave)

    def _leave(self, *_: object) -> None:
        self._path.pop()

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in self._weights:
            self._found.setdefault(storage, (self._path[-1], tensor))
        return tensor

    def watch(self):
        return torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    def rows(self) -> list[tuple[str, str, int]]:
        """(path, description, bytes)."""
        return [
            (path, f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}", t.untyped_storage().nbytes())
            for path, t in self._found.values()
            if t.untyped_storage().nbytes()
        ]


def part_of(path: str, last_self: int) -> str:
    """Which part of the model a module belongs to."""
    if path.startswith("decoder.layers."):
        return "self layer" if int(path.split(".")[2]) <= last_self else "cross layer"
    return "shared K,V" if path.startswith("decoder.shared_kv") else "embedding, head and loss"


def main() -> None:
    set_environment_of_one_process()
    args = arguments.parse([*FLAGS.split(), *sys.argv[1:]])
    shape = ModelShape.from_args(args)
    args.num_layers, args.num_self_decoder_layers = (2, 1) if args.architecture == "yoco" else (2, None)
    arguments.finalize(args)
    initialize_megatron()
    args = get_args()
    config = model_config_from_args(args)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = config.get_builder_cls()(config).build_distributed_models(pg_collection=groups, wrap_with_ddp=False)
    model = unwrap_model(model)[0].train()
    tokens = args.micro_batch_size * args.seq_length
    ids = torch.randint(0, 1000, (args.micro_batch_size, args.seq_length + 1), device=runtime.device())
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    positions = torch.arange(args.seq_length, device=runtime.device())[None].expand_as(inputs)
    model(inputs, positions, None, labels=labels).sum().backward()  # kernels compile, workspaces appear
    model.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated() if runtime.has_gpu() else 0
    saved = SavedTensors(model)
    with saved.watch():
        loss = model(inputs, positions, None, labels=labels).sum()
    allocated = torch.cuda.memory_allocated() - before if runtime.has_gpu() else 0
    last_self = 0 if args.architecture == "yoco" else 1
    totals: dict[str, float] = defaultdict(float)
    for path, what, size in saved.rows():
        part = part_of(path, last_self)
        totals[part] += size / tokens
        print(f"{part:<26}{size / tokens:>12,.1f}  {path or 'model'}: {what}")
    loss.backward()
    print(f"\nbytes a token, {args.seq_length} tokens x {args.micro_batch_size}, {args.transformer_impl}")
    counts = {"self layer": shape.num_self_decoder_layers, "cross layer": shape.num_cross_decoder_layers}
    if args.architecture != "yoco":
        totals["self layer"] /= 2
        counts = {"self layer": shape.num_layers}
    model_bytes = sum(size * counts.get(part, 1) for part, size in totals.items())
    for part, size in totals.items():
        print(f"{part:<26}{size:>12,.0f}  x {counts.get(part, 1)}")
    print(f"{'all of ' + str(shape.num_layers) + ' layers':<26}{model_bytes:>12,.0f}")
    if allocated:
        print(f"torch allocated for these 2 layers {allocated / tokens:,.0f}")


if __name__ == "__main__":
    main()
