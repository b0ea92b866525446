"""Does this mesh train the model that one process trains? Compares every parameter's gradient, on this machine's CPUs.

    python tools/check_gradients.py --config configs/model/yoco_70b.yaml --mesh TP2 SP PP2 CP2
    python tools/check_gradients.py --config MODEL RECIPE --mesh TP2 EP2 DP2 --recompute-granularity selective

The model keeps its layers, their kinds and their places on the mesh, and gets tiny widths. The trainer takes a step of
random tokens in fp32, with every mode that the flags name (all are those of pretrain_yoco.py), and one more in one
process without any. A mesh with a wrong gradient trains, and its loss looks right. Exit code 1: a gradient differs.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from yoco_megatron.gradient_check.mesh import mesh_flags


def main(argv: list[str]) -> bool:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--mesh", nargs="+", default=[], metavar="TP2", help="and SP, PP2, VP2, CP2, EP2, ETP1, DP2")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for a step on the mesh")
    own, rest = parser.parse_known_args(argv)
    flags, data_parallel = mesh_flags(own.mesh)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # fp32 on the CPU: gloo's sums, torch's kernels
    import pretrain_yoco  # here, because torch and Megatron take seconds
    from yoco_megatron.gradient_check.check import check
    from yoco_megatron.gradient_check.report import report

    found = check(pretrain_yoco.main, [*rest, *flags], data_parallel, own.timeout)
    print(report(found, " ".join(own.mesh) or "this mesh"))
    return not any(one.is_wrong for one in found)


if __name__ == "__main__":
    try:
        sys.exit(0 if main(sys.argv[1:]) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"check_gradients.py: error: {error}")
