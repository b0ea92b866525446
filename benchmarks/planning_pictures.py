"""The pictures of docs/planning.md: a run of 10T tokens of YOCO 70B by its number of GPUs, and its goodput.

python benchmarks/planning_pictures.py         # writes docs/planning.svg, in half a minute, on no GPU; needs matplotlib
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from yoco_megatron.costs.card import H100
from yoco_megatron.costs.memory import GIB
from yoco_megatron.planning import flags
from yoco_megatron.planning.mesh import Plan
from yoco_megatron.planning.run import DAY, Site, plan_run
from yoco_megatron.planning.search import search

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "--config configs/model/yoco_70b.yaml configs/recipe/70b_10t.yaml --vocab-size 100288"
GPUS = (256, 512, 1024, 2048, 4096, 8192)
TOKENS = 10**13
SITES = {
    "save 2 s, restart 3 min": Site(save_stall=2, restart=180),
    "save 10 s, restart 10 min": Site(),
    "save 2 min, restart 20 min": Site(save_stall=120, restart=1200),
}


def main() -> None:
    plans: dict[int, Plan] = {}
    for gpus in GPUS:
        args, own = flags.parse(CONFIG.split(), gpus)
        plans[gpus] = search(args, own, H100).best
        print(f"{gpus:,}: {plans[gpus].mesh}, MFU {plans[gpus].mfu:.1%}", flush=True)
    pyplot.rcParams.update({"svg.hashsalt": "planning", "svg.fonttype": "none", "font.size": 8})
    figure, (days, goodput, memory) = pyplot.subplots(1, 3, figsize=(11, 3))
    runs = {name: [plan_run(plans[gpus], TOKENS, site) for gpus in GPUS] for name, site in SITES.items()}
    default = runs["save 10 s, restart 10 min"]
    days.loglog(GPUS, [run.seconds / DAY for run in default], marker="o", markersize=3, label="days")
    days.loglog(GPUS, [run.compute / DAY for run in default], linestyle="--", label="without failures")
    for gpus in GPUS:
        days.annotate(
            f"{plans[gpus].mfu:.0%}",
            (gpus, default[GPUS.index(gpus)].seconds / DAY),
            (2, 5),
            textcoords="offset points",
        )
    days.set(
        title="days for 10T tokens, with each MFU", xlabel="GPUs", xticks=GPUS, xticklabels=[f"{n:,}" for n in GPUS]
    )
    days.minorticks_off()
    days.margins(0.12)
    days.set_yticks(ticks := (12.5, 25, 50, 100, 200, 400), [f"{tick:g}" for tick in ticks])
    days.legend()
    for name, of_site in runs.items():
        goodput.semilogx(GPUS, [run.goodput * 100 for run in of_site], marker="o", markersize=3, label=name)
    goodput.set(title="goodput, %", xlabel="GPUs", xticks=GPUS, xticklabels=[f"{n:,}" for n in GPUS])
    goodput.minorticks_off()
    goodput.legend()
    plan = plans[2048]
    floor = [0.0] * len(plan.memories)
    for name in plan.memories[0].parts:
        sizes = [each.parts.get(name, 0.0) / GIB for each in plan.memories]
        memory.bar(range(len(sizes)), sizes, bottom=floor, label=name)
        floor = [low + size for low, size in zip(floor, sizes)]
    memory.axhline(plan.card.memory_gib, color="black", linestyle="--", linewidth=0.8)
    memory.set(title=f"GiB by pipeline rank, {plan.mesh}", xticks=range(len(floor)), xlim=(-0.6, len(floor) + 3.4))
    memory.legend(fontsize=6, loc="upper right")
    figure.tight_layout()
    figure.savefig(ROOT / "docs/planning.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
