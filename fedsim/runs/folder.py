"""A run folder: its lock, its files, and the metrics of each mode.

A file is written beside its place, synced and renamed, so a reader sees all of it or nothing; `metrics/<mode>.jsonl` is
appended. Nothing in a run folder is a pickle.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.core.errors import UserError
from fedsim.core.files import RUN_RECORD, check_own, follow_umask, read_checked, read_json, write_atomic, write_checked
from fedsim.core.types import Row

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO)


def _open_own(file: Path, how: int) -> int:
    return os.open(file, how | os.O_CREAT | os.O_NOFOLLOW, 0o666)


class RunFolder:
    """One run's folder, `results/<experiment>/<run id>/`.

    Args:
        path: the folder; created if it does not exist.
        root: the folder of all results, which may be a link; the folders between it and `path` may not.

    Raises:
        UserError: if it cannot be written to, or is or holds a link or a special file.
    """

    def __init__(self, path: Path, root: Path | None = None) -> None:
        check_own(path, root)
        self.path = path
        self._made = [p for p in (path, *path.parents) if not p.exists()]  # innermost first
        self._lock: int | None = None
        self._ours = False  # whether no other process may run it now
        try:
            path.mkdir(parents=True, exist_ok=True)
            handle = _open_own(path / ".lock", os.O_RDWR)
        except OSError as error:
            self._remove_empty()
            raise UserError(
                f"results: {str(path)!r} cannot be written to ({error.strerror}); give results=FOLDER"
            ) from None
        os.close(handle)

    # ------------------------------------------------------------------------------------------- one process

    def lock(self) -> str | None:
        """Keep other processes from running this folder until `close`, or until this process ends.

        Returns:
            None, or why there is no lock: some network file systems have none.

        Raises:
            UserError: if it is being run, by another process or in another thread of this one.
        """
        file = self.path / ".lock"
        while True:
            handle = _open_own(file, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(handle, 32, 0).decode(errors="replace").strip()
                os.close(handle)
                if error.errno in _NO_LOCKS:
                    self._ours = True
                    return f"{self.path}: no locks on this file system ({error.strerror}); make sure that no other process runs this"
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                who = f"process {holder}" if holder.isdigit() else "another process"
                raise UserError(f"{self.path} is being run by {who}; wait for it, or stop it") from None
            try:  # the former holder may have removed the file since it was opened here
                here = os.stat(file)
            except FileNotFoundError:
                here = None
            if here is not None and os.path.samestat(here, os.fstat(handle)):
                break
            os.close(handle)
        self._lock, self._ours = handle, True
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        return None

    def close(self) -> None:
        """Let other processes run the folder; may be called twice."""
        if self._lock is not None:
            (self.path / ".lock").unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def clear(self) -> None:
        """Remove what ended processes have left half-written."""
        for file in (*self.path.rglob(".*"),):
            pid = file.name.rpartition(".")[2]
            if pid.isdigit() and (self._lock is not None or not _alive(int(pid))):
                if file.is_dir():
                    shutil.rmtree(file)
                else:
                    file.unlink(missing_ok=True)

    def discard_new(self) -> None:
        """Remove the folder, with the parents made for it, if it is new, has no metrics, and no other process runs it."""
        has_metrics = any(f.stat().st_size for f in self.path.glob("metrics/*.jsonl"))
        if self._ours and self.path in self._made and not has_metrics:
            shutil.rmtree(self.path, ignore_errors=True)
            self._remove_empty()

    def _remove_empty(self) -> None:
        for folder in self._made:
            with contextlib.suppress(OSError):  # not created after all, or no longer empty
                folder.rmdir()

    # ------------------------------------------------------------------------------------------------- files

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file atomically."""
        write_atomic(self.path / name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def read_json(self, name: str) -> Any:
        """The object in a JSON file, or None if it cannot be read."""
        try:
            return read_json(self.path / name)
        except (OSError, UserError):
            return None

    def write_text(self, name: str, text: str) -> None:
        """Write a text file atomically."""
        write_atomic(self.path / name, text.encode())

    def write_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Write an `.npz` file atomically."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_atomic(self.path / name, buffer.getvalue())

    def record(self, **values: Any) -> dict[str, Any]:
        """What the run records of itself under a checksum, after adding these values; {} if it is missing or damaged."""
        found = read_checked(self.path / RUN_RECORD) or {}
        if values:
            found = {k: v for k, v in (found | values).items() if k != "check" and v is not None}
            write_checked(self.path / RUN_RECORD, found)
        return found

    def replace(self, name: str, beside: Path) -> None:
        """The files of a folder beside `name` take the place of those in it, each atomically; folders inside it stay."""
        place = self.path / name
        follow_umask(*(file for file in beside.rglob("*") if file.is_file()))
        if not place.exists():
            beside.rename(place)
            return
        names = set()
        for file in sorted(beside.iterdir()):
            names.add(file.name)
            if file.is_dir() and (place / file.name).exists():
                shutil.rmtree(place / file.name)
            file.replace(place / file.name)
        for old in place.iterdir():
            if old.is_file() and old.name not in names:
                old.unlink()
        beside.rmdir()


class Metrics:
    """The metrics of one mode, `metrics/<mode>.jsonl`, continued after what a checkpoint has of them.

    Args:
        folder: the run folder.
        mode: whose.
        mark: what `mark` gave, to continue from there; None = from the start.

    Attributes:
        torn: whether the last line was incomplete, and was cut off.
    """

    def __init__(self, folder: Path, mode: str, mark: dict[str, Any] | None) -> None:
        self.file = folder / "metrics" / f"{mode}.jsonl"
        self.file.parent.mkdir(exist_ok=True)
        self._out = os.fdopen(_open_own(self.file, os.O_RDWR), "r+b")
        kept = self._out.read(mark["bytes"] if mark else 0)
        self._sum = hashlib.sha256(kept)
        rest = self._out.read()
        self.torn = bool(rest) and not rest.endswith(b"\n")
        self._out.truncate(len(kept))
        self._out.seek(len(kept))

    @staticmethod
    def holds(folder: Path, mode: str, mark: dict[str, Any]) -> bool:
        """Whether a mode's file begins with what it had at a mark."""
        try:
            with (folder / "metrics" / f"{mode}.jsonl").open("rb") as file:
                return hashlib.sha256(file.read(mark["bytes"])).hexdigest() == mark["sha256"]
        except OSError:
            return False

    def log(self, metrics: Iterable[Row], seconds: float) -> None:
        """Append metrics; they count once a checkpoint or the end of the mode has marked them."""
        lines = [json.dumps({**vars(m), "seconds": round(seconds, 3)}, ensure_ascii=False) + "\n" for m in metrics]
        data = "".join(lines).encode()
        self._out.write(data)
        self._sum.update(data)

    def mark(self) -> dict[str, Any]:
        """Length and hash of the metrics so far, all of them on the disk."""
        self._out.flush()
        os.fsync(self._out.fileno())
        return {"bytes": self._out.tell(), "sha256": self._sum.hexdigest()}

    def of_split(self, split: str) -> Iterator[dict[str, Any]]:
        """The metrics of a split that were logged so far, in order."""
        self._out.flush()
        wanted = f'"split": "{split}"'
        with self.file.open(encoding="utf-8") as file:
            yield from (m for line in file if wanted in line and (m := json.loads(line))["split"] == split)

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # metrics that a full disk had no room for: no checkpoint refers to them
            self._out.close()


def disk_error(error: BaseException, path: Path) -> UserError | None:
    """The user's error for something under `path` that could not be written; None for other errors.

    Some come as text, from another process or another language.
    """
    text = str(error).strip().split("\n")[-1]
    if isinstance(error, OSError) and error.errno is not None:
        number, where = error.errno, error.filename
        if where is not None and not Path(os.fsdecode(where)).absolute().is_relative_to(path.absolute()):
            return None
    else:
        found = re.search(r"\[Errno (\d+)\] .*: '(.*)'|\(os error (\d+)\)", text)
        if found is None:
            return None
        number = int(found[1] or found[3])
        if found[2] and not Path(found[2]).absolute().is_relative_to(path.absolute()):
            return None
    if number not in _DISK:
        return None
    way = "the last complete round is kept: free space or permit writing, and run the same command to resume"
    return UserError(f"{path}: cannot be written to ({os.strerror(number)}); {way}")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
