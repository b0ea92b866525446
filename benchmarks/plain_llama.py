"""A Llama of plain PyTorch as a peer from outside Megatron: SDPA, torch.compile, fused AdamW, FSDP2 on several GPUs.

benchmarks/training.py --plain-llama runs it by turns with the others. It takes the flags of pretrain_yoco.py, of which
sizes, batch, AdamW, --fp8-format (torchao's tensorwise scaling) and full recompute have a meaning here, and prints the
same lines. Weights are fp32 and products bf16, by autocast on one GPU and by FSDP2's copies on several.
"""

import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from yoco_megatron import runtime
from yoco_megatron.startup.prepare import prepare

prepare()

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from yoco_megatron.costs.flops import train_flops
from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.startup import arguments

BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
LOSS_CHUNK = 4096  # tokens whose logits exist at once, with full recompute


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        hidden, self.width = shape.hidden_size, shape.kv_channels
        heads, groups = shape.num_attention_heads * self.width, shape.num_query_groups * self.width
        self.sizes = [heads, groups, groups]
        linear = partial(nn.Linear, bias=False)
        self.qkv, self.out = linear(hidden, sum(self.sizes)), linear(heads, hidden)
        self.gate_up, self.down = linear(hidden, 2 * shape.ffn_hidden_size), linear(shape.ffn_hidden_size, hidden)
        self.norm, self.ffn_norm = nn.RMSNorm(hidden, 1e-5), nn.RMSNorm(hidden, 1e-5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, self.width)) for t in self.qkv(self.norm(x)).split(self.sizes, -1))
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    """Token ids and labels [B, T] to the mean loss."""

    def __init__(self, shape: ModelShape, rotary_base: float, recompute: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_rows, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, 1e-5)
        self.output = nn.Linear(shape.hidden_size, shape.vocab_rows, bias=False)
        self.recompute = recompute
        half = torch.arange(0, shape.kv_channels, 2) / shape.kv_channels
        angles = torch.outer(torch.arange(shape.seq_length), rotary_base**-half)[:, None]
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        call = partial(checkpoint, use_reentrant=False) if self.recompute else lambda part, *inputs: part(*inputs)
        x = self.embedding(ids).bfloat16()
        for layer in self.layers:
            x = call(layer, x, self.cos, self.sin)
        chunk = LOSS_CHUNK if self.recompute else labels.numel()
        parts = zip(self.norm(x).flatten(0, 1).split(chunk), labels.flatten().split(chunk))
        return torch.stack([call(self.loss, *part) for part in parts]).sum() / labels.numel()

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.output(x).float(), labels, reduction="sum")


def build(args: Any, shape: ModelShape, device: torch.device) -> nn.Module:
    torch.manual_seed(args.seed)
    with torch.device(device):
        model = Llama(shape, args.rotary_base, args.recompute_granularity == "full")
        for weight in model.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)
    several = dist.get_world_size() > 1
    if args.fp8:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = Float8LinearConfig(enable_fsdp_float8_all_gather=several)
        convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name.startswith("layers."))
    for layer in model.layers:
        layer.compile(fullgraph=True)
    model.loss = torch.compile(model.loss, fullgraph=True)
    for part in (*model.layers, model) if several else ():
        fully_shard(part, reshard_after_forward=False, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    return model


def main(argv: list[str]) -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = runtime.device()
    dist.init_process_group("nccl" if runtime.has_gpu() else "gloo")
    args = arguments.parse(argv)
    args.padded_vocab_size = args.vocab_size + -args.vocab_size % args.make_vocab_size_divisible_by
    world, rank = dist.get_world_size(), dist.get_rank()
    if args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size > 1:
        sys.exit("plain_llama.py: error: built for data parallelism alone")
    shape = ModelShape.from_args(args)
    model = build(args, shape, device)
    if rank == 0:
        print(f"{train_flops(shape, 1) / shape.seq_length / 1e9:.3f} GFLOP a token to train, causal", flush=True)
    betas = args.adam_beta1, args.adam_beta2
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas, args.adam_eps, args.weight_decay, fused=True)
    size, count = args.micro_batch_size, args.global_batch_size // args.micro_batch_size // world
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=world == 1)
    for step in range(1, args.exit_interval + 1):
        batch = torch.randint(args.vocab_size, (count, size, args.seq_length + 1), device=device)
        start, total = time.perf_counter(), torch.zeros((), device=device)
        for tokens in batch:
            with sdpa_kernel(BACKENDS, set_priority=True):  # for what backward recomputes, too
                with autocast:
                    loss = model(tokens[:, :-1], tokens[:, 1:]) / count
                loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        milliseconds, mib = 1e3 * (time.perf_counter() - start), torch.cuda.max_memory_allocated() / 2**20
        if rank == 0:
            print(f"iteration {step} | elapsed time per iteration (ms): {milliseconds:.1f} | ", end="")
            print(f"lm loss: {total.item():.6E} | max allocated: {mib:.1f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
