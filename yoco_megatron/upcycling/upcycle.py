"""Makes a YOCO of a Transformer: open the teacher, check the layers, write, and say what is exact."""

from yoco_megatron.convert import convert, tokenizer_files
from yoco_megatron.convert.readers import Source
from yoco_megatron.mixers import SLIDING_WINDOW
from yoco_megatron.upcycling import check
from yoco_megatron.upcycling.mapping import kv_layers, readers, student, student_config
from yoco_megatron.upcycling.teacher import Teacher, open_teacher


def upcycle(
    folder: str,
    to: str,
    output: str,
    *,
    self_decoder: str,
    window: int | None,
    num_self_decoder_layers: int | None,
    shared_kv_sets: int,
    shared_kv_from: str,
    tokenizer: str | None = None,
    shard_bytes: int = 2 * 1024**3,
) -> str:
    """Make a YOCO of the teacher in `folder` and write it to `output`, as `convert` does.

    Args:
        to: hf or megatron.
        window, num_self_decoder_layers: None: the configuration's default, and half of the layers.
        shared_kv_from: of upcycling.SHARED_KV_FROM.
    Returns:
        what is exact, what is an approximation and what is new.
    Raises:
        ValueError: bad input, or a result that differs; `output` is not made.
    """
    convert.check_output(output, shard_bytes)
    teacher = open_teacher(folder)
    config = student_config(teacher, self_decoder, window, num_self_decoder_layers, shared_kv_sets)
    source = student(teacher, config, shared_kv_from)
    tokenizer_files.choose(source, tokenizer)
    errors = check.check(teacher, source, shared_kv_from)
    report = convert.write(source, to, output, shard_bytes=shard_bytes)
    return f"{report}\n{table(teacher, source, shared_kv_from, errors)}"


def table(teacher: Teacher, source: Source, rule: str, errors: list[float]) -> str:
    """What is exact, what is an approximation and what is new, one part a line.

    Args:
        errors: of `check.layer_errors`.
    """
    config, sets = source.config, kv_layers(source.config, rule)
    own, cross = config.num_self_decoder_layers, config.num_hidden_layers - config.num_self_decoder_layers
    if config.self_decoder == SLIDING_WINDOW.name:
        window = check.smallest_window(teacher, config)
        mixer = f"q, k, v, o; windows of {config.sliding_window:,}", f"exact up to {window:,} tokens"
    else:
        mixer = (
            "q, k, v, o; retention for softmax",
            "approximation; decay and gate are new: zero, so the output is, too",
        )
    of_each = len(readers(config)[0])
    if of_each == 1:
        made_of = "k, v of its reader"
    elif rule == "mean":
        made_of = "mean k, v of its readers"
    else:
        made_of = f"k, v of layer {', '.join(str(layer) for (layer,) in sets)}"
    shared = "approximation: made from the self-decoder's output" + (f", {of_each} readers each" if of_each > 1 else "")
    limit = "" if teacher.window is None else f"; the teacher's windows of {teacher.window:,} are gone"
    rows = [
        ("embeddings, head, norms, FFNs", "the teacher's", "exact"),
        (f"self-decoder, {own} layers", *mixer),
        (f"shared K,V, {len(sets)} set{'s' * (len(sets) > 1)}", made_of, shared),
        (f"cross-decoder, {cross} layers", "q, o", f"exact{limit}"),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = ["  ".join((row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2])) for row in rows]
    halves = {"self-decoder": errors[:own], "cross-decoder": errors[own:]}
    spans = ", ".join(f"{name} {min(e):.2g} to {max(e):.2g}" for name, e in halves.items() if e)
    return "\n".join([*lines, f"error of single layers, given the teacher's hidden states: {spans}"])
