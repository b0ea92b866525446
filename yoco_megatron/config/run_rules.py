"""All rules that the flags of a run obey, whatever machine and files it has: training and plans ask here."""

from argparse import ArgumentParser, Namespace

from yoco_megatron.config import experts, multi_token, rules
from yoco_megatron.config.resolve import resolved
from yoco_megatron.utils.errors import require


def check(args: Namespace, parser: ArgumentParser) -> None:
    """Sizes, mesh, and what does not go together.

    Args:
        parser: that parsed them, whose defaults tell what was set.
    Raises:
        ValueError: a size that does not divide, flags that contradict each other, or one that would have no effect.
    """
    rules.check_length(args)
    rules.check_mesh(args)
    experts.check_run(args)
    rules.check_optimizer(args)
    rules.check_ignored(args, parser)
    require(
        args.group_query_attention or args.num_query_groups == parser.get_default("num_query_groups"),
        f"--num-query-groups {args.num_query_groups} has no effect without --group-query-attention: set both",
    )
    if args.architecture == "yoco":
        rules.check_model(resolved(args))
        experts.check_model(resolved(args))
        multi_token.check_model(args)
        multi_token.check_run(args)
        rules.check_travelling_queries(args)
