"""Writing a run folder: configs and reports written whole, metrics appended, checkpoints that are complete or absent.

A file is written beside its place, synced and renamed; a checkpoint counts once its small JSON file is there, which names
its mode's rows in `metrics.jsonl`, with their hash, and the hashes of its tensors and of the records it refers to, and ends
with its own. Nothing in a run folder is a pickle.

Rows of a mode are one stretch of `metrics.jsonl`, those of the next mode follow. Where an earlier mode has to be done again
(its files are damaged, or the run gets more rounds), the stretches behind it are put aside and come back in their turn.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.core.errors import UserError
from fedsim.core.files import check_own, follow_umask, read_checked, read_json, sync_folder, write_atomic, write_checked
from fedsim.core.numerics import promise
from fedsim.core.types import Row

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO)


def _open_own(file: Path, how: int) -> int:
    return os.open(file, how | os.O_CREAT | os.O_NOFOLLOW, 0o666)


def _missing(path: Path) -> list[Path]:
    """Which folders there are to make, the innermost first."""
    return [p for p in (path, *path.parents) if not p.exists()]


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # not made after all, or somebody else has put something into it
            folder.rmdir()


class RunFolder:
    """One run's folder, `results/<experiment>/<run id>/`.

    Args:
        path: the folder; made if it is not there.
        root: the folder of all results, which may be a link; those between it and `path` may not.

    Raises:
        UserError: if it cannot be written to, or is or holds a link or a special file.
    """

    def __init__(self, path: Path, root: Path | None = None) -> None:
        check_own(path, root)
        self.path = path
        self._made = _missing(path)
        self._lock: int | None = None
        self._ours = False  # whether nobody else may run it now
        self._begin, self._sum = 0, hashlib.sha256()  # where the rows of the mode begin, and the hash of those so far
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._metrics = os.fdopen(_open_own(path / "metrics.jsonl", os.O_WRONLY | os.O_APPEND), "ab")
        except OSError as error:
            _remove_empty(self._made)
            raise UserError(
                f"results: {str(path)!r} cannot be written to ({error.strerror}); give results=FOLDER"
            ) from None

    def lock(self) -> str | None:
        """Keep others from running this folder until `close`, or until this process is gone: the system frees the lock.

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
                    return f"{self.path}: no locks on this file system ({error.strerror}); see that no other process runs this"
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                who = f"process {holder}" if holder.isdigit() else "another process"
                raise UserError(f"{self.path} is being run by {who}; wait for it, or stop it") from None
            try:  # who held it before may have removed the file since it was opened here
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

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file whole."""
        write_atomic(self.path / name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def read_json(self, name: str) -> Any:
        """The object in a JSON file, or None where there is none that can be read."""
        try:
            return read_json(self.path / name)
        except (OSError, UserError):
            return None

    def write_text(self, name: str, text: str) -> None:
        """Write a text file whole."""
        write_atomic(self.path / name, text.encode())

    # ---------------------------------------------------------------------------------------- metrics

    def log(self, rows: Iterable[Row], seconds: float) -> None:
        """Append metrics rows; they count once a checkpoint is committed after them."""
        lines = [json.dumps({**vars(row), "seconds": round(seconds, 3)}, ensure_ascii=False) + "\n" for row in rows]
        data = "".join(lines).encode()
        self._metrics.write(data)
        self._sum.update(data)

    def rows_of(self, split: str) -> Iterator[dict[str, Any]]:
        """The rows of a split that were logged so far, in order."""
        self._metrics.flush()
        mark = f'"split": "{split}"'
        with (self.path / "metrics.jsonl").open(encoding="utf-8") as file:
            for line in file:
                if mark in line:
                    row = json.loads(line)
                    if row["split"] == split:
                        yield row

    def sync_metrics(self) -> int:
        """Wait until all rows are on the disk; returns the file's length in bytes."""
        self._metrics.flush()
        os.fsync(self._metrics.fileno())
        return self._metrics.tell()

    def stretch(self) -> dict[str, Any]:
        """The mode's rows so far, all on the disk: where they begin and end, and their hash."""
        end = self.sync_metrics()
        return {"metrics_begin": self._begin, "metrics_bytes": end, "metrics_sha256": self._sum.hexdigest()}

    def rows(self, begin: int, end: int) -> bytes:
        """A stretch of the metrics file."""
        self._metrics.flush()
        return _stretch(self.path / "metrics.jsonl", begin, end)

    def where_rows(self, mode: str, info: dict[str, Any], begin: int) -> str | None:
        """Where the rows of a checkpoint, or of a finished mode, are whole: here (in the metrics file, from `begin` on) | aside."""
        rows = self._found(mode, info, begin)
        if rows is None:
            return None
        return "here" if self.rows(begin, begin + len(rows)) == rows else "aside"

    def begin_mode(self, mode: str, begin: int, info: dict[str, Any] | None) -> str | None:
        """Let the metrics file end with the rows that `info` names, those from `begin` on; None = with none of this mode.

        Returns:
            A line on what was wrong with what is cut off, if anything was.
        """
        found = None if info is None else self._found(mode, info, begin)
        assert info is None or found is not None, "rows that are not whole"
        rows = found or b""
        here = self.rows(begin, begin + len(rows))
        end = begin + (len(rows) if here == rows else 0)
        self._metrics.flush()
        size = os.fstat(self._metrics.fileno()).st_size
        tail = self.rows(max(end, size - 1), size)
        self._metrics.truncate(end)
        self._metrics.seek(end)
        if here != rows:
            self._metrics.write(rows)
        self._begin, self._sum = begin, hashlib.sha256(rows)
        return None if tail in (b"", b"\n") else "metrics.jsonl: its last line was torn, and is cut off"

    def cut_metrics(self, length: int) -> None:
        """Drop what is behind the last mode's rows."""
        self._metrics.flush()
        self._metrics.truncate(length)
        self._metrics.seek(length)

    def put_aside(self, mode: str) -> None:
        """Keep a mode's whole rows apart, before rows that lie ahead of them change."""
        for info in (*filter(None, [self.done(mode)]), *reversed([i for _, i in self.checkpoints(mode) if i])):
            if self._aside(mode, info) is not None:
                return
            rows = self.rows(info["metrics_begin"], info["metrics_bytes"])
            if hashlib.sha256(rows).hexdigest() == info["metrics_sha256"]:
                write_atomic(self._place_aside(mode), rows)
                return

    def _found(self, mode: str, info: dict[str, Any], begin: int) -> bytes | None:
        if info["metrics_begin"] == begin:
            rows = self.rows(begin, info["metrics_bytes"])
            if hashlib.sha256(rows).hexdigest() == info["metrics_sha256"]:
                return rows
        return self._aside(mode, info)

    def _place_aside(self, mode: str) -> Path:
        return self.path / "checkpoints" / mode / "rows.jsonl"

    def _aside(self, mode: str, info: dict[str, Any]) -> bytes | None:
        file = self._place_aside(mode)
        if not file.is_file():
            return None
        rows = _stretch(file, 0, info["metrics_bytes"] - info["metrics_begin"])
        return rows if hashlib.sha256(rows).hexdigest() == info["metrics_sha256"] else None

    # ---------------------------------------------------------------------------------------- begin and end

    def clear(self) -> None:
        """Remove what processes that are gone have left half-written."""
        for file in (*self.path.rglob(".*"),):
            pid = file.name.rpartition(".")[2]
            if pid.isdigit() and (self._lock is not None or not _alive(int(pid))):
                if file.is_dir():
                    shutil.rmtree(file)
                else:
                    file.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the metrics file and let others run the folder; may be called twice."""
        with contextlib.suppress(OSError):  # rows that a full disk had no room for: no checkpoint refers to them
            self._metrics.close()
        if self._lock is not None:
            (self.path / ".lock").unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def discard_new(self) -> None:
        """Remove the folder, with those around it that were made for it, if it is new, no metrics row is in it, and nobody else
        runs it."""
        if not self._ours:
            return
        self._metrics.flush()
        if self.path in self._made and (self.path / "metrics.jsonl").stat().st_size == 0:
            shutil.rmtree(self.path, ignore_errors=True)
            _remove_empty(self._made)

    # ---------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(
        self,
        mode: str,
        round: int,
        tensors: dict[str, Tensor],
        info: dict[str, Any],
        keep: int,
        shard: int = 1 << 30,
        began: float | None = None,
    ) -> None:
        """Commit a round: its tensors, then the JSON file that makes it count; those before the last `keep` go.

        Args:
            mode, round: what it is of.
            tensors: by name; of those on a GPU one shard at a time is copied to the host's memory.
            info: JSON, kept beside them.
            keep: checkpoints of the mode that stay.
            shard: bytes of a file, at most, but for a tensor that is larger by itself.
            began: when the work for it began (`time.monotonic`); the seconds since go into the file as `seconds`.
        """
        folder = self.path / "checkpoints" / mode
        folder.mkdir(parents=True, exist_ok=True)
        parts = _shards(tensors, shard)
        stem, files = f"round-{round:05d}", {}
        for i, names in enumerate(parts):
            name = stem if len(parts) == 1 else f"{stem}-{i + 1:05d}-of-{len(parts):05d}"
            files[f"{name}.safetensors"] = _write_shard(
                folder / f"{name}.safetensors", {n: tensors[n].detach().cpu().contiguous() for n in names}
            )
        info = {**info, "round": round, "files": files, **self.stretch()}
        if began is not None:
            info["seconds"] = time.monotonic() - began
        write_checked(folder / f"{stem}.json", info)
        for old in _by_round(folder.glob("round-*.json"))[:-keep]:
            old.unlink()
        stems = {_round_of(f) for f in folder.glob("round-*.json")}
        for file in folder.glob("round-*.safetensors"):
            if _round_of(file) not in stems or (_round_of(file) == round and file.name not in files):
                file.unlink()

    def checkpoints(self, mode: str) -> list[tuple[int, dict[str, Any] | None]]:
        """(round, what the checkpoint says of itself, or None where that is damaged), oldest first."""
        folder = self.path / "checkpoints" / mode
        return [(_round_of(file), read_checked(file)) for file in _by_round(folder.glob("round-*.json"))]

    def has_tensors(self, mode: str, info: dict[str, Any]) -> bool:
        """Whether a checkpoint's tensors are what they were."""
        folder = self.path / "checkpoints" / mode
        _check_inside(folder / f"round-{info['round']:05d}.json", info["files"])
        try:
            return all(_sha256(folder / name) == found for name, found in info["files"].items())
        except OSError:
            return False

    def drop_checkpoint(self, mode: str, round: int) -> None:
        """Remove one checkpoint of a mode that is done."""
        folder = self.path / "checkpoints" / mode
        for kind in ("json", "safetensors"):  # what makes it count goes first
            for file in folder.glob(f"round-{round:05d}*.{kind}"):
                file.unlink()

    def drop_checkpoints(self, mode: str, after: int) -> None:
        """Remove a mode's checkpoints of rounds after this one: they are damaged, or their rounds are done again."""
        folder = self.path / "checkpoints" / mode
        (folder / "done.json").unlink(missing_ok=True)
        for kind in ("json", "safetensors"):  # what makes them count goes first
            for file in _by_round(folder.glob(f"round-*.{kind}")):
                if _round_of(file) > after:
                    file.unlink()

    def done(self, mode: str) -> dict[str, Any] | None:
        """What was kept of a mode that came to its end; None where it did not, or the file is damaged."""
        return read_checked(self.path / "checkpoints" / mode / "done.json")

    def end_mode(self, mode: str, info: dict[str, Any]) -> None:
        """The mode came to its end: its rows, exports and scores are all there."""
        write_checked(self.path / "checkpoints" / mode / "done.json", info)
        self._place_aside(mode).unlink(missing_ok=True)

    def load_tensors(self, mode: str, info: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of a checkpoint by name, one at a time; `info` is what it says of itself."""
        from safetensors import safe_open

        for name in info["files"]:
            with safe_open(self.path / "checkpoints" / mode / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    yield key, file.get_tensor(key)


def _check_inside(file: Path, names: Iterable[str]) -> None:
    """Refuse a checkpoint whose files do not lie beside it.

    Raises:
        UserError: for a name that is a path.
    """
    for name in names:
        if name != Path(name).name:
            way = "it was not written by fedsim; delete it to go on from the checkpoint before"
            raise UserError(f"{file}: {name!r} is no file of its own folder; {way}")


def disk_error(error: BaseException, path: Path) -> UserError | None:
    """What to tell the user where an error says that something under `path` could not be written; None for other errors.

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
    way = "the last complete round is kept: make room or let it be written, and the same command goes on"
    return UserError(f"{path}: cannot be written to ({os.strerror(number)}); {way}")


def replace_folder(beside: Path, place: Path) -> None:
    """Files of a folder take the place of those in another, each at once; folders inside it stay."""
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


def _stretch(file: Path, begin: int, end: int) -> bytes:
    with file.open("rb") as handle:
        handle.seek(begin)
        return handle.read(max(0, end - begin))


def _round_of(file: Path) -> int:
    found = re.match(r"round-(\d+)", file.name)
    return int(found[1]) if found else -1


def _by_round(files: Iterable[Path]) -> list[Path]:
    return sorted(files, key=_round_of)


def _shards(tensors: dict[str, Tensor], most: int) -> list[list[str]]:
    """Names in files of at most `most` bytes."""
    out: list[list[str]] = []
    held = 0
    for name, tensor in tensors.items():
        if not out or held + tensor.nbytes > most:
            out.append([])
            held = 0
        out[-1].append(name)
        held += tensor.nbytes
    return out


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a safetensors file so that a reader sees all of it or nothing; returns its hash."""
    from safetensors.torch import save_file

    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, beside)
        follow_umask(beside)
        with beside.open("rb") as handle:
            os.fsync(handle.fileno())
        found = _sha256(beside)
        beside.replace(path)
        sync_folder(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return found


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def save_arrays(folder: RunFolder, name: str, arrays: dict[str, np.ndarray]) -> None:
    """Write a `.npz` file whole."""
    import io

    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(folder.path / name, buffer.getvalue())


_PACKAGES = (
    "fedsim-llm torch transformers peft accelerate datasets numpy scipy pandas matplotlib omegaconf safetensors gguf"
)


def versions() -> dict[str, str | None]:
    """Package -> installed version, or None, of those that a run's numbers or files can depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for name in _PACKAGES.split():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def environment(devices: list[str], threads: int) -> dict[str, Any]:
    """Where a run ran: commit, versions, devices, and whether they give the same bits twice; no host names and no paths."""
    import platform
    import subprocess

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "devices": devices,
        "threads": threads,
        "versions": {name: found for name, found in versions().items() if found is not None},
        "deterministic": promise(devices),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
