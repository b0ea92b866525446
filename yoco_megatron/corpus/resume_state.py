"""Partial output and progress of a preprocessing run, in a folder from which a killed run resumes.

    OUTPUT_PREFIX.unfinished/
        KEY.bin, KEY.lengths    token ids, and int32 tokens of each document
        problems.jsonl          records that were skipped, or used but suspicious
        state.json              synced sizes of the files above, position in the input, counts

state.json is replaced atomically, and only after the data it describes are on disk; bytes beyond the sizes in it were
written later and are cut off on resume.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, TypedDict

from yoco_megatron.corpus.idx_writer import sync
from yoco_megatron.utils.files import write_atomically
from yoco_megatron.utils.small_files import BadFile, read_json


class _Content(TypedDict):
    """Of state.json. Every number in it decides where the output goes on, so it says whether it is whole."""

    sha256: str
    state: dict[str, Any]


def _sha256(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any] | None:
    """The state; None without a file. Raises BadFile for one that is not as it was written."""
    content = read_json(path, _Content, missing=None)
    if content is not None and content["sha256"] != _sha256(content["state"]):
        raise BadFile(f"{path} is not as it was written")
    return content and content["state"]


class ResumeState:
    """The folder, opened and locked. `state` is what was saved last, or None at a first start."""

    def __init__(self, folder: Path, names: list[str], job: dict[str, Any], restart: bool = False) -> None:
        """Open the folder; make it if it does not exist.

        Args:
            names: files to append to.
            job: everything that decides the output; JSON.
            restart: discard what an unfinished run of another job wrote.
        Raises:
            ValueError: another process writes here, or the folder belongs to another job.
        """
        self.folder, self.job = folder, json.loads(json.dumps(job))
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--output-prefix: another process is writing {folder}; wait for it, or name another prefix"
            ) from None
        self.state = self._saved(restart)
        sizes = self.state["sizes"] if self.state else {}
        # Files of a finished state are no longer written; they are being moved into place.
        names = [] if self.state and self.state.get("finished") else names
        self.files = {name: self._reopen(folder / name, sizes.get(name, 0)) for name in names}

    def _saved(self, restart: bool) -> dict[str, Any] | None:
        path = self.folder / "state.json"
        try:
            saved = _read(path)
        except BadFile as error:
            if not restart:
                raise ValueError(f"--output-prefix: {error}; start over with --overwrite") from None
            path.unlink()
            return None
        if saved is None:
            return None
        changed = [name for name in self.job if saved["job"].get(name) != self.job[name]]
        if changed and restart:
            path.unlink()
            return None
        if changed:
            raise ValueError(
                f"--output-prefix: {self.folder} holds an unfinished run whose {', '.join(changed)} differed; "
                "repeat that command to finish it, or start over with --overwrite"
            )
        return saved

    @staticmethod
    def _reopen(path: Path, size: int) -> Any:
        stream = path.open("r+b" if path.exists() else "w+b")
        if os.fstat(stream.fileno()).st_size < size:
            raise ValueError(f"--output-prefix: {path} is shorter than state.json says; remove the folder")
        stream.truncate(size)
        stream.seek(size)
        return stream

    def save(self, **progress: Any) -> None:
        """Sync all files, then store their sizes and `progress`."""
        for stream in self.files.values():
            sync(stream)
        sizes = {name: stream.tell() for name, stream in self.files.items()}
        self.state = {"job": self.job, "sizes": sizes, **progress}
        content = {"sha256": _sha256(self.state), "state": self.state}
        write_atomically(self.folder / "state.json", json.dumps(content))

    def close(self, keep: bool) -> None:
        """Unlock the folder, and remove it unless a later run should resume from it."""
        for stream in self.files.values():
            # On a full disk the buffer cannot be flushed; it is beyond the saved sizes, so resuming cuts it off.
            with contextlib.suppress(OSError):
                stream.close()
        if not keep:
            shutil.rmtree(self.folder)
        self.lock.close()
