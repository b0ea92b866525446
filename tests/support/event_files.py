"""TensorBoard event files with times of choice, as Megatron's writer makes them."""

from collections.abc import Iterable
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.summary.writer.record_writer import RecordWriter

TRANSFORMER = dict(
    architecture="transformer", num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=2,
    num_query_groups=None, group_query_attention=False, kv_channels=32, seq_length=32, padded_vocab_size=256,
    untie_embeddings_and_output_weights=False, world_size=2, self_decoder="gated_retention",
)  # fmt: skip


def write(
    folder: Path, start: float, points: Iterable[tuple[str, int, float, float]], flags: dict | None = None
) -> Path:
    """An event file of an attempt; points are (tag, step, seconds after `start`, value)."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"events.out.tfevents.{start:.0f}.host.1.0"
    with path.open("wb") as file:
        writer = RecordWriter(file)
        events = [Event(wall_time=start, file_version="brain.Event:2")]
        for name, value in (TRANSFORMER if flags is None else flags).items():
            tensor = TensorProto(string_val=[str(value).encode()])
            summary = Summary(value=[Summary.Value(tag=f"{name}/text_summary", tensor=tensor)])
            events.append(Event(wall_time=start, summary=summary))
        for tag, step, seconds, value in points:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            events.append(Event(wall_time=start + seconds, step=step, summary=summary))
        for event in events:
            writer.write(event.SerializeToString())
    return path


def losses(first: int, last: int, value: float = 0.0, batch: int = 4) -> list[tuple[str, int, float, float]]:
    """A training loss of value + 1/step at each step, one a second, on batches of so many sequences."""
    steps = range(first, last + 1)
    found = []
    for step in steps:
        seconds, loss = float(step - first + 1), value + 1 / step
        found += [("lm loss", step, seconds, loss), ("lm loss vs samples", batch * step, seconds, loss)]
    return found
