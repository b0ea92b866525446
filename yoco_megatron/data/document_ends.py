"""The special tokens with which the documents of a run begin and end.

What the tokenizer says may not be what the data were made with. The beginning is read from the data themselves, as
reports are not always there.
"""

import logging
from argparse import Namespace
from itertools import takewhile
from typing import Any

import numpy as np

from yoco_megatron.data.check import data_prefixes_from_args, read_report
from yoco_megatron.data.tokenizer import special_tokens

logger = logging.getLogger(__name__)

# Formats of records that a chat template begins.
TEMPLATED = ("messages", "mixed")
# Documents of a dataset that are looked at, and the tokens of each.
DOCUMENTS, TOKENS = 64, 8


def document_start(args: Namespace, tokenizer: Any) -> list[int] | None:
    """The special tokens that begin every document; None if nothing is known (mock data).

    None of them are those of conversations: their chat template writes these, and will again in a prompt.

    Args:
        tokenizer: as Megatron builds it; its special tokens are looked for.
    """
    prefixes = data_prefixes_from_args(args)
    if not prefixes:
        return None
    special = set(special_tokens(tokenizer))
    starts = {
        prefix: _common([_special_start(ids, special) for ids in _sample(prefix)])
        for prefix in prefixes
        if read_report(prefix).get("format") not in TEMPLATED
    }
    common = _common(list(starts.values()))
    other = next((prefix for prefix, start in starts.items() if start != common), None)
    if other is not None:
        logger.warning(
            "--data-path: the documents of %s begin with the special tokens %s, those of others with %s; generation "
            "will begin with %s",
            *(other, starts[other], common, common),
        )
    return common


def check_document_end(args: Namespace, tokenizer: Any) -> None:
    """Compare the end of document that the tokenizer has now with that of the data.

    Raises:
        ValueError: data whose report names another one, or none in the tokenizer.
    """
    found = getattr(tokenizer, "eod", None)
    if found is None:
        raise ValueError(
            f"--tokenizer-model {args.tokenizer_model} has no end of document (eos_token), for which Megatron's "
            "datasets ask: name one in its tokenizer_config.json"
        )
    for prefix in data_prefixes_from_args(args):
        end = read_report(prefix).get("tokenizer", {}).get("eod")
        if end is not None and end != found:
            raise ValueError(
                f"--tokenizer-model {args.tokenizer_model}: its end of document has the id {found}, that of "
                f"{prefix} is {end} (see {prefix}.json): give the tokenizer as it was, its eos_token too"
            )


def _sample(prefix: str) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    lengths = dataset.sequence_lengths
    places = np.unique(np.linspace(0, len(dataset) - 1, DOCUMENTS).astype(np.int64)).tolist()
    return [dataset.get(place, length=min(int(lengths[place]), TOKENS)).tolist() for place in places]


def _special_start(ids: list[int], special: set[int]) -> list[int]:
    return list(takewhile(special.__contains__, ids))


def _common(rows: list[list[int]]) -> list[int]:
    """The longest beginning that all rows have."""
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*rows))
    return [column[0] for column in columns]
