"""--loss-suffix: the last tokens of each sequence, which alone have a loss."""

from yoco_megatron.utils.errors import require

_FORMS = "give a number of tokens (4096), a share (0.25), or one for each length (65536:0.25,262144:4096)"


def suffix_length(flag: str | int | None, seq_length: int) -> int | None:
    """Tokens with a loss at the end of a sequence of `seq_length`; None for all of them.

    Args:
        flag: a number of tokens, a share of the sequence, or a schedule "length:value,..." of which the entry of the
            greatest length that is not above `seq_length` holds.
    Raises:
        ValueError: anything else, or a suffix that is empty or longer than the sequence.
    """
    if flag is None:
        return None
    value = str(flag)
    if ":" in value:
        entries = [entry.partition(":") for entry in value.split(",")]
        reached = [(int(length), chosen) for length, _, chosen in entries if _is_count(length)]
        require(len(reached) == len(entries), f"--loss-suffix {flag}: {_FORMS}")
        reached = [(length, chosen) for length, chosen in reached if length <= seq_length]
        if not reached:
            return None
        value = max(reached)[1]
    tokens = int(value) if _is_count(value) else _tokens_of_share(value, seq_length)
    if tokens is None:
        raise ValueError(f"--loss-suffix {flag}: {_FORMS}")
    require(
        1 <= tokens <= seq_length,
        f"--loss-suffix {flag} is {tokens} tokens: it must lie between 1 and --seq-length {seq_length}",
    )
    return None if tokens == seq_length else tokens


def _is_count(text: str) -> bool:
    return text.strip().isascii() and text.strip().isdigit()


def _tokens_of_share(text: str, seq_length: int) -> int | None:
    try:
        share = float(text)
    except ValueError:
        return None
    return round(share * seq_length) if 0 < share <= 1 else None
