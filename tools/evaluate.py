"""Evaluate a trained model: needles, RULER, Phonebook, the paper's Table 3, loss by position; docs/evaluation.md.

    tools/evaluate.py --load RUN/checkpoints --suite configs/evaluation/quick.yaml
    tools/evaluate.py --hf MODEL --suite configs/evaluation/table3.yaml
    torchrun --nproc-per-node 8 tools/evaluate.py --load RUN/checkpoints --suite configs/evaluation/ruler.yaml \\
        --tensor-model-parallel-size 2 --context-parallel-size 4

Prints a table. --output (by default RUN/evaluation/SUITE/iter_ITERATION, or MODEL/evaluation/SUITE) gets results.json,
and of each task, as it ends, a JSON file, its records and pictures. Repeat the command to go on where it was stopped.
"""

import argparse
import contextlib
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

SIZES = ("tensor-model-parallel-size", "pipeline-model-parallel-size", "context-parallel-size")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--load", help="a run's --save")
    model.add_argument("--hf", help="the folder of an exported model")
    parser.add_argument("--suite", type=Path, required=True, help="YAML file of tasks (configs/evaluation)")
    parser.add_argument("--output", type=Path, help="folder for results")
    parser.add_argument("--overwrite", action="store_true", help="replace results of another model or other settings")
    parser.add_argument("--iteration", type=int, help="training checkpoint to load (default: the latest)")
    parser.add_argument("--tokenizer", help="folder of a Hugging Face tokenizer to use instead of the model's own")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N requests of each task, to try it")
    parser.add_argument("--tokens-per-batch", type=int, default=32768, help="memory and speed only")
    parser.add_argument(
        "--kv-cache-dtype", choices=["auto", "int8", "fp8"], default="auto", help="of the shared K,V; auto: the model's"
    )
    parser.add_argument("--format", choices=["svg", "png"], default="svg", help="of pictures")
    mesh = parser.add_argument_group("mesh", "under torchrun; what processes are left share the requests")
    for name in SIZES:
        mesh.add_argument(f"--{name}", type=int)
    mesh.add_argument("--sequence-parallel", action="store_true")
    options = parser.parse_args()
    for name in ("limit", "tokens_per_batch", *(name.replace("-", "_") for name in SIZES)):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value} must be at least 1")
    try:
        run(options)
    except ValueError as error:
        from yoco_megatron.startup import agreement

        sys.exit(f"evaluate.py: error: {error}" if agreement.tells_error() else 1)
    except OSError as error:
        sys.exit(f"evaluate.py: error: {error}")


def is_first() -> bool:
    """Whether this process shows progress and writes the results."""
    return os.environ.get("RANK", "0") == "0"


def run(options: argparse.Namespace) -> None:
    """Check all input, load, evaluate, print the table."""
    # Slow imports, after --help and after mistyped flags.
    from yoco_megatron.startup.prepare import prepare

    prepare()
    logging.getLogger("megatron").setLevel(logging.WARNING)  # its readers of data tell each step
    warnings.filterwarnings("ignore", module="megatron")
    from yoco_megatron.evaluation import driver, pictures, results
    from yoco_megatron.evaluation.backends.load import close, open_backend
    from yoco_megatron.evaluation.model_files import look
    from yoco_megatron.evaluation.suite import read_suite
    from yoco_megatron.ops.attention import quantized

    tasks = read_suite(options.suite)
    folder = options.hf or options.load
    if options.hf and not (Path(folder) / "config.json").exists():
        raise ValueError(f"--hf {folder} holds no exported model (config.json is missing): a run is given as --load")
    files = look(folder, options.iteration, options.tokenizer)
    driver.check(tasks, files.tokenizer, files.max_length)
    mesh: dict[str, Any] = {name: getattr(options, name.replace("-", "_")) for name in (*SIZES, "sequence-parallel")}
    mesh = {name: value for name, value in mesh.items() if value}
    kv_cache_dtype = None if options.kv_cache_dtype == "auto" else options.kv_cache_dtype
    quantized.check(kv_cache_dtype)
    output = options.output or default_output(options, files.identity["iteration"])
    identity = files.identity | ({"kv_cache_dtype": kv_cache_dtype} if kv_cache_dtype else {})
    target = results.Folder(output, identity, options.overwrite, options.format)
    if is_first():
        target.hold()
        pictures.require_matplotlib()
    # Another's results are told before a model is loaded; and where all is there, none is.
    contents = [one for task in tasks if is_first() and (one := target.finished(task, options.limit))]
    if len(contents) < len(tasks) or os.environ.get("WORLD_SIZE", "1") != "1":
        with contextlib.redirect_stdout(sys.stderr):  # Megatron tells there what it loads; here only the table belongs
            backend = open_backend(
                folder,
                options.iteration,
                files.tokenizer,
                mesh or None,
                options.tokens_per_batch,
                kv_cache_dtype=kv_cache_dtype,
            )
        contents = driver.evaluate(tasks, backend, target, str(options.suite), options.limit, is_first())
    else:
        print(f"{output}: all tasks are done already, kept", file=sys.stderr)
        target.write_all(str(options.suite), contents)
    if is_first():
        print(results.table(contents))
        print(f"\n{output}/results.json")
    close()


def default_output(options: argparse.Namespace, iteration: int | None) -> Path:
    """In the folder of the run or of the exported model; what --limit left or --kv-cache-dtype changed apart."""
    from yoco_megatron.evaluation.results import run_folder

    suite = options.suite.stem + ("" if options.limit is None else f"_limit_{options.limit}")
    suite += "" if options.kv_cache_dtype == "auto" else f"_{options.kv_cache_dtype}"
    if iteration is None and Path(options.hf or options.load, "config.json").exists():
        return Path(options.hf or options.load, "evaluation", suite)
    name = "release" if iteration is None else f"iter_{iteration:07d}"
    return run_folder(options.load) / "evaluation" / suite / name


if __name__ == "__main__":
    main()
