"""What the model of tools/plan.py says of runs that others published, on thousands of GPUs that we do not have.

    python benchmarks/published_runs.py            # the table of docs/planning.md, in a second, on no GPU

All are Transformers. Where the publication does not say the mesh, it is the fastest that fits by the model. A GPT-3 has
two matrices of four times the hidden size in its FFN, here three of 8/3: as many weights and FLOPs.
"""

import itertools
from dataclasses import dataclass, replace

from yoco_megatron.costs.card import H100, Card
from yoco_megatron.planning import flags
from yoco_megatron.planning.mesh import Plan

# Assumed: an A100 at 400 W holds its clock better than an H100 at 700 W, so that its rates are a larger share of its
# peak (85% instead of 70% for matrix products); bandwidths are the data sheets', the network 200 Gbit/s a GPU.
SHARE = 312 / 989 * 85 / 70
A100 = replace(
    H100,
    name="A100",
    peak_tflops=312.0,
    linear_tflops=H100.linear_tflops * SHARE,
    head_in_chunks_tflops=H100.head_in_chunks_tflops * SHARE,
    head_at_once_tflops=H100.head_at_once_tflops * SHARE,
    attention_tflops={length: rate * SHARE for length, rate in H100.attention_tflops.items()},
    elementwise_ps=H100.elementwise_ps * 3.35 / 2.04,
    optimizer_ps=H100.optimizer_ps * 3.35 / 2.04,
    node_gb_per_s=H100.node_gb_per_s * 600 / 900,
    network_gb_per_s=20.0,
)
GPT3 = (
    "--architecture transformer --num-layers 96 --hidden-size 12288 --ffn-hidden-size 32768 --num-attention-heads 96 "
    "--untie-embeddings-and-output-weights"
)
LLAMA = "--config configs/model/transformer_405b.yaml --vocab-size 128256"
ENDS = "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split"
COMMON = "--bf16 --use-distributed-optimizer --sequence-parallel --tp-comm-overlap --micro-batch-size 1"


@dataclass(frozen=True)
class Published:
    """A run, and the MFU that its authors say."""

    name: str
    gpus: int
    flags: str
    mfu: float
    source: str
    card: Card = H100
    mesh: str = ""

    def plan(self) -> Plan:
        """Of its mesh, or of the fastest."""
        meshes = [self.mesh] if self.mesh else list(self._meshes())
        plans = []
        for mesh in meshes:
            try:
                plan = Plan.of(flags.parse(f"{self.flags} {COMMON} {mesh}".split(), self.gpus)[0], self.card)
            except ValueError:  # does not divide
                continue
            if self.mesh or plan.fits:
                plans.append(plan)
        return min(plans, key=lambda plan: plan.time.seconds)

    @staticmethod
    def _meshes():
        for tp, pp, vp in itertools.product((4, 8), (1, 2, 4, 6, 8, 12, 16), (1, 2, 3, 4, 6, 8)):
            chunks = f"--num-virtual-stages-per-pipeline-rank {vp}" if vp > 1 else ""
            if vp == 1 or (pp > 1 and 96 % (pp * vp) == 0):
                yield f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp} {chunks}"


LLAMA_MESH = f"--tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 {ENDS}"
LLAMA_MESH += " --num-virtual-stages-per-pipeline-rank 4"  # how many is not published
SHORT = f"{LLAMA} --global-batch-size 2048"
LLAMA_3, MEGATRON = "arXiv 2407.21783, Table 4", "Megatron-LM's README"
RUNS = (
    Published("Llama 3 405B, 8K", 8192, SHORT, 0.43, LLAMA_3, mesh=LLAMA_MESH),
    Published("Llama 3 405B, 8K", 16384, SHORT, 0.41, LLAMA_3, mesh=LLAMA_MESH),
    Published(
        "Llama 3 405B, 131K",
        16384,
        f"{LLAMA} --global-batch-size 128 --seq-length 131072 --max-position-embeddings 131072",
        0.38,
        LLAMA_3,
        mesh=f"{LLAMA_MESH} --context-parallel-size 16",
    ),
    *(
        Published(
            "GPT-3 177B, 4K",
            gpus,
            f"{GPT3} --seq-length 4096 --vocab-size 131072 --global-batch-size 1152",
            mfu,
            MEGATRON,
        )
        for gpus, mfu in ((96, 0.47), (4608, 0.42))
    ),
    Published(
        "MegaScale 175B, 2K",
        12288,
        f"{GPT3} --seq-length 2048 --vocab-size 51200 --global-batch-size 6144",
        0.552,
        "arXiv 2402.15627",
        A100,
        "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 8 --num-virtual-stages-per-pipeline-rank 6",
    ),
)  # fmt: skip


def table() -> str:
    """In Markdown."""
    lines = [
        "| run | GPUs | mesh | MFU, published | model | off | bubble | communication |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in RUNS:
        plan = run.plan()
        sent = sum(plan.time.share(part) for part in ("tensor", "context", "pipeline", "data"))
        lines.append(
            f"| {run.name} ({run.source}) | {run.gpus:,} {run.card.name} | {plan.mesh} | {run.mfu:.1%} | "
            f"{plan.mfu:.1%} | {plan.mfu / run.mfu - 1:+.0%} | {plan.time.share('bubble'):.1%} | {sent:.1%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
