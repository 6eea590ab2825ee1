"""Checkpoints of a mode: `checkpoints/<mode>/round-N/`, each with a manifest; the newest valid one is resumed.

A checkpoint is written beside its place, synced and renamed. `manifest.json` holds the state that is not tensors, the hash
of each tensor file, of the metrics so far and of the records of client state, and a checksum of its own. `done.json` says
that the mode has come to its end, and what it left.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsim.core.errors import UserError
from fedsim.core.files import differing, follow_umask, read_checked, sync_folder, write_checked
from fedsim.core.params import Layout
from fedsim.core.store import Store
from fedsim.runs.folder import Metrics
from fedsim.simulate.state import State


class Checkpoints:
    """The checkpoints of one mode.

    Args:
        run: the run folder.
        mode: whose.
        store, best: records of client state, and of best models.
        keep: how many checkpoints stay.
        shard: bytes of a tensor file, at most, unless one tensor is larger.
    """

    def __init__(self, run: Path, mode: str, store: Store, best: Store, keep: int = 1, shard: int = 1 << 30) -> None:
        self.run, self.mode, self.path = run, mode, run / "checkpoints" / mode
        self.store, self.best, self.keep, self.shard = store, best, keep, shard

    # ------------------------------------------------------------------------------------------------ writing

    def save(self, state: State, tensors: dict[str, Tensor], metrics: Metrics, **more: Any) -> dict[str, Any]:
        """Commit a round.

        Args:
            state: after the round.
            tensors: by name; of those on a GPU one file at a time is copied to the host's memory.
            metrics: of the mode.
            more: JSON that is kept with it.

        Returns:
            Its manifest, with the seconds and bytes that it took.
        """
        began = time.monotonic()
        for store in (self.store, self.best):
            store.sync()
        digests, read = _digests(state, self.store, self.best)
        self.path.mkdir(parents=True, exist_ok=True)
        place = self.path / f"round-{state.round:05d}"
        beside = place.with_name(f".{place.name}.{os.getpid()}")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        try:
            files, parts = {}, _shards(tensors, self.shard)
            for i, names in enumerate(parts):
                name = "tensors" if len(parts) == 1 else f"tensors-{i + 1:05d}-of-{len(parts):05d}"
                part = {n: tensors[n].detach().cpu().contiguous() for n in names}
                files[f"{name}.safetensors"] = _write_shard(beside / f"{name}.safetensors", part)
            info = {**state.info(), **more, "records": digests, "files": files, "metrics": metrics.mark()}
            info["bytes"] = read + sum(t.nbytes for t in tensors.values())
            info["seconds"] = time.monotonic() - began
            write_checked(beside / "manifest.json", info)
            _remove(place)
            beside.rename(place)
            sync_folder(self.path)
        except BaseException:  # a full disk gets its space back
            shutil.rmtree(beside, ignore_errors=True)
            raise
        for old in self._folders()[: -self.keep]:
            _remove(old)
        for records in (state.records, state.best_records):
            records.commit(self.keep)
        return {**info, "seconds": time.monotonic() - began}

    def end(self, **info: Any) -> None:
        """The mode has come to its end: metrics, exports and scores are complete."""
        write_checked(self.path / "done.json", info)

    # ------------------------------------------------------------------------------------------------ reading

    def done(self, rounds: int) -> tuple[dict[str, Any] | None, str | None]:
        """What the mode left at its end after so many rounds, or None; and why it is not used although it is there."""
        file = self.path / "done.json"
        found = read_checked(file)
        if found is None:
            return None, "done.json is damaged" if file.is_file() else None
        if found["rounds"] != rounds:
            return None, None
        if not Metrics.holds(self.run, self.mode, found["metrics"]):
            return None, f"metrics/{self.mode}.jsonl is damaged or missing"
        damaged = differing(self.run, found["files"])
        return (None, f"damaged or missing: {', '.join(damaged)}") if damaged else (found, None)

    def kept(self) -> list[tuple[int, dict[str, Any] | None]]:
        """(round, its manifest, or None if that is damaged), oldest first."""
        return [(int(p.name[6:]), read_checked(p / "manifest.json")) for p in self._folders()]

    def why_not(self, info: dict[str, Any] | None) -> str | None:
        """Why a checkpoint cannot be resumed, as far as its files tell; None if it can."""
        if info is None:
            return "damaged"
        if not Metrics.holds(self.run, self.mode, info["metrics"]):
            return f"metrics/{self.mode}.jsonl is damaged or missing"
        place = self.path / f"round-{info['round']:05d}"
        for name in info["files"]:
            if name != Path(name).name:
                way = "it was not written by fedsim; delete it to resume from the checkpoint before"
                raise UserError(f"{place / 'manifest.json'}: {name!r} is not a file of its own folder; {way}")
        try:
            whole = all(_sha256(place / name) == found for name, found in info["files"].items())
        except OSError:
            whole = False
        return None if whole else "its tensors are damaged or missing"

    def restore(self, state: State, layout: Layout, numel: int, round: int) -> str | None:
        """Bring a fresh state to the checkpoint of a round; why it cannot be, or None."""
        kept = [info for r, info in self.kept() if r <= round and info is not None]
        try:
            state.restore(layout, numel, kept, self._tensors(kept[-1]))
            whole = _digests(state, self.store, self.best)[0] == kept[-1]["records"]
        except OSError:
            whole = False
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            return "written by another version"
        return None if whole else "records of client state are damaged or missing"

    def drop_after(self, round: int) -> None:
        """Remove the checkpoints of later rounds, which are trained again."""
        (self.path / "done.json").unlink(missing_ok=True)
        for place in self._folders():
            if int(place.name[6:]) > round:
                _remove(place)

    def _folders(self) -> list[Path]:
        found = [p for p in self.path.glob("round-*") if p.is_dir() and p.name[6:].isdigit()]
        return sorted(found, key=lambda p: int(p.name[6:]))

    def _tensors(self, info: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
        from safetensors import safe_open

        for name in info["files"]:
            with safe_open(self.path / f"round-{info['round']:05d}" / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    yield key, file.get_tensor(key)


def _digests(state: State, store: Store, best: Store) -> tuple[list[str], int]:
    """Hashes of the records that a state refers to; bytes that were read for them."""
    found = [state.records.digest(store), state.best_records.digest(best)]
    return [digest for digest, _ in found], sum(size for _, size in found)


def _remove(place: Path) -> None:
    (place / "manifest.json").unlink(missing_ok=True)  # first what makes it count
    shutil.rmtree(place, ignore_errors=True)


def _shards(tensors: dict[str, Tensor], most: int) -> list[list[str]]:
    """Names by file, of at most `most` bytes."""
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
    """Write a safetensors file to the disk; returns its hash."""
    from safetensors.torch import save_file

    save_file(tensors, path)
    follow_umask(path)
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
    return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
