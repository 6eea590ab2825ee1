"""Writing a run folder: configs and reports written whole, metrics appended, checkpoints that are complete or absent.

A file is written beside its place, synced and renamed; a checkpoint counts once its small JSON file is there, which names
the bytes of `metrics.jsonl` that belong to it and the hash of its tensors. Nothing in a run folder is a pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import UserError
from fedsim.numerics import promise
from fedsim.types import Row


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    beside.replace(path)


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

    Raises:
        UserError: if it cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made = _missing(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._metrics = (path / "metrics.jsonl").open("ab")
        except OSError as error:
            _remove_empty(self._made)
            raise UserError(
                f"results: {str(path)!r} cannot be written to ({error.strerror}); give results=FOLDER"
            ) from None

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file whole."""
        write_atomic(self.path / name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def read_json(self, name: str) -> Any:
        """A JSON file's content, or None where there is none."""
        file = self.path / name
        if not file.is_file():
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            way = "put it back, or delete the run folder to start anew"
            raise UserError(f"{file}: damaged, not JSON ({error}); {way}") from None

    def write_text(self, name: str, text: str) -> None:
        """Write a text file whole."""
        write_atomic(self.path / name, text.encode())

    def log(self, rows: Iterable[Row], seconds: float) -> None:
        """Append metrics rows; they count once a checkpoint is committed after them."""
        lines = [json.dumps({**vars(row), "seconds": round(seconds, 3)}, ensure_ascii=False) + "\n" for row in rows]
        self._metrics.write("".join(lines).encode())

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
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

    def cut_metrics(self, length: int) -> None:
        """Drop rows after the last commit.

        Raises:
            UserError: if committed rows are missing: no state fits what is left.
        """
        self._metrics.flush()
        size = (self.path / "metrics.jsonl").stat().st_size
        if size < length:
            way = "put the file back, or delete the run folder to start anew"
            raise UserError(f"{self.path / 'metrics.jsonl'}: {size} bytes, but {length} were committed; {way}")
        os.truncate(self.path / "metrics.jsonl", length)
        self._metrics.seek(length)

    def clear(self) -> None:
        """Remove what processes that are gone have left half-written."""
        for file in (*self.path.rglob(".*"),):
            pid = file.name.rpartition(".")[2]
            if pid.isdigit() and not _alive(int(pid)):
                shutil.rmtree(file) if file.is_dir() else file.unlink()

    def close(self) -> None:
        """Close the metrics file."""
        self._metrics.close()

    def discard_new(self) -> None:
        """Remove the folder, with those around it that were made for it, if it is new and no metrics row is in it."""
        self._metrics.flush()
        if self.path in self._made and (self.path / "metrics.jsonl").stat().st_size == 0:
            shutil.rmtree(self.path, ignore_errors=True)
            _remove_empty(self._made)

    # ---------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(
        self, mode: str, round: int, tensors: dict[str, Tensor], info: dict[str, Any], keep: int, shard: int = 1 << 30
    ) -> None:
        """Commit a round: its tensors, then the JSON file that makes it count; those before the last `keep` go.

        Args:
            mode, round: what it is of.
            tensors: by name; of those on a GPU one shard at a time is copied to the host's memory.
            info: JSON, kept beside them.
            keep: checkpoints of the mode that stay.
            shard: bytes of a file, at most, but for a tensor that is larger by itself.
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
        info = {**info, "round": round, "files": files, "metrics_bytes": self.sync_metrics()}
        write_atomic(folder / f"{stem}.json", json.dumps(info).encode())
        for old in sorted(folder.glob("round-*.json"))[:-keep]:
            old.unlink()
        stems = {f.stem for f in folder.glob("round-*.json")}
        for file in folder.glob("round-*.safetensors"):
            if file.name[: len(stem)] not in stems:
                file.unlink()

    def checkpoints(self, mode: str) -> list[dict[str, Any]]:
        """What the mode's committed checkpoints say of themselves, oldest first; those that are damaged, or whose rows are
        no longer all there, are left out."""
        out = []
        self._metrics.flush()
        rows = (self.path / "metrics.jsonl").stat().st_size
        for file in sorted((self.path / "checkpoints" / mode).glob("round-*.json")):
            try:
                info = json.loads(file.read_text())
                _check_inside(file, info["files"])
                whole = all(_sha256(file.with_name(name)) == found for name, found in info["files"].items())
                whole = whole and info["metrics_bytes"] <= rows
            except UserError:
                raise
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                whole = False
            if whole:
                out.append(info)
        return out

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
        UserError: for a name that is a path, or a link that leads elsewhere.
    """
    for name in names:
        inside = name == Path(name).name and (file.parent / name).resolve().parent == file.parent.resolve()
        if not inside:
            way = "it was not written by fedsim; delete it to go on from the checkpoint before"
            raise UserError(f"{file}: {name!r} is no file of its own folder; {way}")


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
    save_file(tensors, beside)
    with beside.open("rb") as handle:
        os.fsync(handle.fileno())
    found = _sha256(beside)
    beside.replace(path)
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
