"""Every change of Megatron, torch and Transformer Engine, in one list: see `registry`."""

from argparse import Namespace
from collections.abc import Collection

from yoco_megatron.upstream import registry


def repair() -> None:
    """Install what every process needs, tools and checkpoint writers too. May be the first to import megatron."""
    # An import enters a file's entries.
    from yoco_megatron.upstream import (  # noqa: F401
        background_writer,
        compiled_extension,
        core_fixes,
        index_caches,
        safe_loading,
    )

    registry.install(True, Namespace())
    safe_loading.restrain_weights_only()


def install(args: Namespace, only: Collection[str] | None = None) -> None:
    """Install, in the order of the list, everything that a training run replaces, for this process.

    Args:
        args: Megatron's validated arguments; some entries are for some runs only.
        only: upstream names (`train_step`, `Class.method`): leave out all other entries. For baselines.
    """
    from yoco_megatron.upstream import (  # noqa: F401
        between_steps,
        expert_optimizers,
        matrix_optimizers,
        new_layers,
        optimizer_state,
        resilience_hooks,
        run_without_save,
        step_log,
        training_loop,
        validation,
    )

    registry.install(False, args, only)
    if only is None:
        training_loop.prefer_cudnn_norms(args)
