"""Files that are whole or not there."""

import pytest

from yoco_megatron.utils.files import written_atomically


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
def test_nothing_is_left_of_what_was_not_ended(error, tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def interrupted() -> None:
        with written_atomically(path) as stream:
            stream.write(b"half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_text() == "before"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
