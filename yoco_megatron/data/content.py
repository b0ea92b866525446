"""What a dataset holds, whatever its name and place: for data.json and the names of cached indices."""

from pathlib import Path

import numpy as np
import torch

from yoco_megatron.data.check import index_of, read_report
from yoco_megatron.data.token_sample import sample_tokens

BYTES = np.dtype(np.uint8)


def dataset_fingerprint(prefix: str) -> dict[str, object]:
    """Sizes of .bin and .idx, the .idx's SHA-256, that of a sample of the .bin, and the whole .bin's where it is known.

    The last comes from the report beside the dataset, which `check_data_prefixes` compares with the others.
    """
    content = index_of(prefix)
    found: dict[str, object] = {suffix: Path(f"{prefix}.{suffix}").stat().st_size for suffix in ("bin", "idx")}
    found["idx_sha256"] = content.sha256
    found["bin_sampled_sha256"] = sample_tokens(Path(f"{prefix}.bin"), content.header.dtype).sha256
    files = read_report(prefix).get("files") or {}
    return found | ({"sha256": files["bin"]["sha256"]} if "bin" in files else {})


def index_hashes(prefixes: list[str], is_read_here: bool = True) -> dict[str, str]:
    """Prefix -> SHA-256 of its .idx. Rank 0 reads them all and tells the others, which must all call this.

    Raises:
        ValueError: on a rank that reads the data, a copy that differs from rank 0's.
    """
    distributed = torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        told = [{prefix: (index_of(prefix).sha256, _copy(prefix)) for prefix in prefixes}]
    else:
        told = [{}]
    if distributed:
        torch.distributed.broadcast_object_list(told, src=0)
        for prefix in {*prefixes, *told[0]}:  # a loss mask may be on one machine alone
            is_known = prefix in prefixes and prefix in told[0]
            if not is_known or (is_read_here and told[0][prefix][1] != _copy(prefix)):
                raise ValueError(
                    f"--data-path: {prefix} is not the same on this machine as on that of rank 0: copy it again"
                )
    return {prefix: sha256 for prefix, (sha256, _) in told[0].items()}


def _copy(prefix: str) -> list[str]:
    """What tells an old copy from a new one for a few small reads: samples of both files."""
    return [sample_tokens(Path(f"{prefix}.{suffix}"), BYTES).sha256 for suffix in ("bin", "idx")]
