"""lm-evaluation-harness on a run's checkpoints or an exported model: its own command line, with the model `yoco`.

    tools/run_lm_eval.py run --model yoco --model_args load=RUN/checkpoints --tasks TASKS --include_path FOLDER

Further model arguments: yoco_megatron/evaluation/lm_eval_model.py.
"""

import sys


def main() -> None:
    from yoco_megatron.startup.prepare import prepare

    prepare()
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        if {"-h", "--help"} & {*sys.argv}:  # lm-eval's own help comes with it
            print(__doc__ + "\nIt needs the package lm-eval: pip install lm-eval")
            return
        sys.exit("run_lm_eval.py: error: the package lm-eval is missing: pip install lm-eval")
    import yoco_megatron.evaluation.lm_eval_model  # noqa: F401

    try:
        cli_evaluate()
    except ValueError as error:
        sys.exit(f"run_lm_eval.py: error: {error}")


if __name__ == "__main__":
    main()
