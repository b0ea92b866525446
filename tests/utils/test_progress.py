"""Progress where standard error is a file: lines, and none of short work."""

import io
import time

from yoco_megatron.utils import progress


def test_lines_in_a_log(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    with progress.progress(total=100, desc="merge", unit="B") as bar:
        bar.update(100)
    assert log.getvalue() == ""
    monkeypatch.setattr(progress, "SECONDS", 0.01)
    for _ in progress.progress(range(4), desc="gather", unit="file"):
        time.sleep(0.03)
    lines = log.getvalue().splitlines()
    assert len(lines) >= 2 and lines[-1].startswith("gather: 100%, 4 of 4 in ")
    assert "\r" not in log.getvalue() and all(line.startswith("gather: ") for line in lines)
