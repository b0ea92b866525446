"""TensorBoard's event files, without TensorFlow: the scalars and the flags that one process wrote."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

FLAG = "/text_summary"  # what Megatron's writer of flags is given, ends so


class Point(NamedTuple):
    """A scalar: its step, the time of writing (seconds since 1970), its value."""

    step: int
    time: float
    value: float


@dataclass
class EventFile:
    """What one attempt wrote; `start` is when it opened the file."""

    start: float
    scalars: dict[str, list[Point]] = field(default_factory=dict)
    flags: dict[str, str] = field(default_factory=dict)


def read(path: Path) -> EventFile:
    """Scalars in the order of writing, and flags by name.

    A killed process leaves half a record at the end, which is passed over.

    Raises:
        ValueError: the package tensorboard is missing, or the file is damaged.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.tensorflow_stub import errors
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New
    except ImportError:
        raise ValueError("event files are read with the package tensorboard: pip install tensorboard") from None
    from google.protobuf.message import DecodeError

    found = None
    reader = PyRecordReader_New(str(path))
    try:
        while True:
            reader.GetNext()
            event = Event.FromString(reader.curr_event)
            if found is None:
                found = EventFile(event.wall_time)
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    point = Point(event.step, event.wall_time, value.simple_value)
                    found.scalars.setdefault(value.tag, []).append(point)
                elif value.tag.endswith(FLAG) and value.tensor.string_val:
                    found.flags[value.tag.removesuffix(FLAG)] = value.tensor.string_val[0].decode(errors="replace")
    except errors.OutOfRangeError:
        pass
    except (errors.DataLossError, DecodeError) as error:
        if "truncated" not in str(error):
            raise ValueError(f"{path} is damaged: {str(error) or 'no event'}") from None
    return found or EventFile(path.stat().st_mtime)
