"""Files of a run folder: written whole and never through a link, read only if they are regular files, checked for damage.

A run folder may come from somebody else and hold links to other files of the user; `check_own` refuses them before anything
is written. Sizes and checksums of what a run wrote are in its `checkpoints/`; `damage` names what differs. A run folder without
`checkpoints/` has no checksums and is read as it is. This module needs no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import stat
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedsim.core.errors import Notice, UserError

RUN_RECORD = "checkpoints/run.json"  # what a run records of itself: rounds, plan, files
SMALL = 1 << 24  # bytes up to which a file is read to find damage at every start; larger ones are compared by size
_CHECK = re.compile(rb', "check": "([0-9a-f]{64})"\}\s*\Z')


# ------------------------------------------------------------------------------------------------ writing


def check_own(folder: Path, below: Path | None = None, names: Iterable[str] | None = None) -> None:
    """Refuse to write into a folder with links to the outside.

    Args:
        folder: checked as a whole; need not exist.
        below: a folder around it, which may be a link; the folders between the two are checked too.
        names: check only these files and folders in it; None = everything.

    Raises:
        UserError: it is, or holds, a symbolic link, a file with a second name (hard link), a pipe, a socket or a device.
    """
    folder = folder.absolute()
    between = [] if below is None else [p for p in folder.parents if below.absolute() in p.parents]
    tops = [folder] if names is None else [folder / name for name in names]
    for place in [*reversed(between), folder, *tops]:
        _check_plain(place)
    for at, folders, files in (found for top in tops for found in os.walk(top)):
        for name in (*folders, *files):
            _check_plain(Path(at, name))


def _check_plain(place: Path) -> None:
    try:
        about = place.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return  # missing, or just removed by another process
    kind = _special(about.st_mode)
    if stat.S_ISLNK(about.st_mode):
        kind = "a symbolic link"
    elif stat.S_ISREG(about.st_mode) and about.st_nlink > 1:
        kind = "a hard link to another file"
    if kind is not None:
        way = "remove it, replace it by a copy, or use another folder"
        raise UserError(f"{place} is {kind}; fedsim writes only to its own files and folders; {way}")


def _special(mode: int) -> str | None:
    """The kind of a special file, which may have no end; None for regular files and folders."""
    kinds = {
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode))


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file atomically: a reader sees the old or the new one, never a part. A link in its place is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.unlink(missing_ok=True)
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        beside.replace(path)
        sync_folder(path.parent)
    except BaseException:  # free the space on a full disk
        beside.unlink(missing_ok=True)
        raise


def write_figure(path: Path, figure: Any, dpi: int, metadata: dict[str, Any] | None = None) -> Path:
    """Write a matplotlib figure as `write_atomic` does, in the format of the file name extension."""
    data = io.BytesIO()
    figure.savefig(data, dpi=dpi, format=path.suffix[1:], metadata=metadata)
    write_atomic(path, data.getvalue())
    return path


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, so that no file refers to a missing one after a crash."""
    with contextlib.suppress(OSError):  # some file systems cannot
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def follow_umask(*files: Path) -> None:
    """Give files the mode of newly created ones: those of safetensors are readable by their owner alone."""
    for folder in {file.parent for file in files}:
        probe = folder / f".mode.{os.getpid()}"
        handle = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # asking for the umask would change it
        try:
            mode = stat.S_IMODE(os.fstat(handle).st_mode)
        finally:
            os.close(handle)
            probe.unlink()
        for file in files:
            if file.parent == folder:
                file.chmod(mode)


def write_checked(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object atomically, with a hash of its text at the end."""
    text = json.dumps(value).encode()
    check = hashlib.sha256(text).hexdigest()
    write_atomic(path, text[:-1] + f', "check": "{check}"}}'.encode())


# ------------------------------------------------------------------------------------------------ reading

_NUMBER, _NONE = (int, float), type(None)
_HOLDS: dict[str, dict[str, Any]] = {  # file -> key -> type that readers rely on; any key may be missing
    "status.json": {"state": str, "rounds": int, "seconds": _NUMBER},
    "partition.json": {
        **{"num_clients": int, "rows": int, "js_mean": (*_NUMBER, _NONE), "size_gini": (*_NUMBER, _NONE)},
        **{"client_names": [str], "class_names": [str], "class_counts": [[int]], "sizes": [int]},
        **{"js": [(*_NUMBER, _NONE)]},
    },
    "environment.json": {"devices": [str], "gpus": [str], "versions": dict, "commit": (str, _NONE)},
}


def read_file(path: Path) -> bytes:
    """A file's content.

    Raises:
        OSError: there is no such file.
        UserError: it is a pipe, a socket or a device.
    """
    if kind := _special(path.stat().st_mode):
        raise UserError(f"{path} is {kind}, not a regular file; remove it")
    return path.read_bytes()


def read_json(path: Path, kind: type = dict) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: there is no such file.
        UserError: it is not JSON, or not a `kind`.
    """
    way = "restore the file, or do the run again"
    try:
        value = json.loads(read_file(path).decode())
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not JSON ({' '.join(str(error).split())[:200]}); {way}") from None
    if not isinstance(value, kind):
        names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
        found = names.get(type(value), "a number")
        raise UserError(f"{path}: holds {found} instead of {names[kind]}; {way}")
    for key, like in _HOLDS.get(path.name, {}).items():
        if key in value and not _fits(value[key], like):
            raise UserError(f"{path}: {key}: {str(value[key])[:60]!r} is not a valid value; {way}")
    return value


def _fits(value: Any, like: Any) -> bool:
    if isinstance(like, list):
        if not isinstance(value, list) or not all(_fits(one, like[0]) for one in value):
            return False
        return not isinstance(like[0], list) or len({len(row) for row in value}) <= 1  # a table: rows of one length
    return isinstance(value, like)


def read_checked(path: Path) -> dict[str, Any] | None:
    """What `write_checked` wrote; None if it is missing or damaged."""
    try:
        data = read_file(path)
        found = _CHECK.search(data)
        if found is None:
            return None
        text = data[: found.start()] + b"}"
        value = json.loads(text) if hashlib.sha256(text).hexdigest().encode() == found[1] else None
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


# ------------------------------------------------------------------------------------------------ damage

# Raised on reading a damaged `.npz` file; RuntimeError: if it looks encrypted or packed in an unknown way.
DAMAGED_ARRAYS = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)


def record(run: Path, places: Iterable[str]) -> dict[str, list[int]]:
    """Path in the run folder -> size and CRC-32, of these files and of those in these folders."""
    out = {}
    for place in places:
        found = run / place
        for file in sorted(found.iterdir()) if found.is_dir() else [found]:
            if file.is_file():
                out[file.relative_to(run).as_posix()] = [file.stat().st_size, _crc32(file)]
    return out


def differing(run: Path, recorded: dict[str, list[int]], most: int | None = None) -> list[str]:
    """The files that are missing or differ from their record; those of more than `most` bytes are compared by size alone."""
    out = []
    for name, (size, crc) in recorded.items():
        file, large = run / name, most is not None and size > most
        try:
            whole = file.is_file() and file.stat().st_size == size and (large or _crc32(file) == crc)
        except OSError:
            whole = False
        if not whole:
            out.append(name)
    return out


def metrics_files(run: Path) -> list[Path]:
    """The metrics of a run, by mode; of a run of the first layout one file with all modes."""
    names = ("metrics.jsonl", "metrics/local.jsonl", "metrics/federated.jsonl", "metrics/central.jsonl")
    return [run / name for name in names if (run / name).exists()]  # what is no file is refused where it is read


def recorded(run: Path) -> dict[str, list[int]]:
    """What `record` found when the run finished; {} for a run that has not, or that has no such record."""
    return (read_checked(run / RUN_RECORD) or {}).get("files", {})


def damage(run: Path, most: int | None = SMALL) -> list[str]:
    """Files of a finished run that are missing or not what they were, as `differing`; with the record itself."""
    if (run / "checkpoints").is_dir() and read_checked(run / RUN_RECORD) is None:
        return [RUN_RECORD]
    return differing(run, recorded(run), most)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return (folder / "config.yaml").is_file() and bool(metrics_files(folder))


def check_whole(model: Path, other: str) -> None:
    """Refuse a model of a run that is not what the run wrote; `other` is another way out than to make it again."""
    folder = model.resolve()
    for run in filter(is_run, folder.parents):
        own = {name: about for name, about in recorded(run).items() if (run / name).parent == folder}
        if bad := differing(run, own):
            way = f"make it again with fedsim run {run / 'config.yaml'} --resume {run}, or {other}"
            raise UserError(f"{run / bad[0]} was changed or damaged after the run wrote it; {way}")


def warn_of_damage(run: Path, *names: str) -> None:
    """A `Notice` for each of these files of a finished run that is not what the run wrote."""
    if (run / RUN_RECORD).is_file() and read_checked(run / RUN_RECORD) is None:  # nothing else tells what the run wrote
        warn_damaged(run, RUN_RECORD)
    known = recorded(run)
    for name in differing(run, {name: known[name] for name in names if name in known}):
        warn_damaged(run, name)


def warn_damaged(run: Path, name: str) -> None:
    """A `Notice` that a file of a run is damaged."""
    way = "restore it, or delete the folder and run the experiment again"
    warnings.warn(f"{run / name} was changed or damaged after the run wrote it; {way}", Notice, stacklevel=4)


def warn_of_damaged_rows(run: Path) -> None:
    """A `Notice` for each mode whose metrics do not begin with what its last checkpoint, or its end, recorded."""
    for mode in sorted(p for p in (run / "checkpoints").glob("*") if p.is_dir()):
        newest_first = [mode / "done.json", *sorted(mode.glob("round-*/manifest.json"), reverse=True)]
        info = next(filter(None, map(read_checked, newest_first)), None)
        file = run / "metrics" / f"{mode.name}.jsonl"
        if info is not None:
            data = read_file(file)[: info["metrics"]["bytes"]] if file.is_file() else b""
            if hashlib.sha256(data).hexdigest() != info["metrics"]["sha256"]:
                warn_damaged(run, f"metrics/{file.name}")


def _crc32(path: Path) -> int:
    found = 0
    with path.open("rb") as handle:
        while data := handle.read(1 << 22):
            found = zlib.crc32(data, found)
    return found


# ------------------------------------------------------------------------------------------------ clients' folders

OWN = "clients"  # the folder of the models that clients of the federated mode keep for themselves
CROSS = "site:"  # in front of a client's id: the split of metrics of every model on that client's validation examples
CLIENT_FOLDERS = "client_folders.json"  # folder -> client id, if they differ
_LONGEST = 255 - len("..1234567")  # bytes of a name; temporary names have a dot in front and .PID at the end


def folder_names(clients: Iterable[str]) -> dict[str, str]:
    """Client id -> folder name: the id itself if it is a plain name, else its plain characters and a hash.

    Args:
        clients: all ids of a run; no two get the same name.
    """
    clients = list(clients)
    out = {client: client for client in clients if _plain_name(client) == client}
    taken = set(out)
    for client in clients:
        if client in out:
            continue
        digest = hashlib.sha256(client.encode(errors="surrogatepass")).hexdigest()
        start = _plain_name(client)[:60].encode()[:170].decode(errors="ignore")
        name = next(n for length in (8, 64) if (n := f"{start}-{digest[:length]}") not in taken)
        out[client] = name
        taken.add(name)
    return out


def natural(text: str) -> tuple[Any, ...]:
    """For sorting: site-2 before site-10."""
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", text)))


def client_models(run: Path) -> dict[str, str]:
    """Place in the run folder -> client id, of every model of a client's: the local-only ones first."""
    clients, out = client_folders(run), {}
    for top in ("local", OWN):
        folders = [p.name for p in (run / top).glob("*") if p.is_dir() and not p.name.startswith(".")]
        out |= {f"{top}/{name}": clients.get(name, name) for name in sorted(folders, key=natural)}
    return out


def client_folders(run: Path) -> dict[str, str]:
    """Folder of a client's model -> client id, of clients whose folder has another name."""
    try:
        return read_json(run / CLIENT_FOLDERS)
    except FileNotFoundError:
        return {}


def model_name(place: str, clients: dict[str, str]) -> str:
    """The name of a model by its folder in a run: with the client's id, by `client_folders`."""
    top, *rest = place.split("/")
    if top in ("local", OWN) and rest:
        rest[0] = clients.get(rest[0], rest[0])
    return "/".join([top, *rest])


def _plain_name(client: str) -> str:
    """An id reduced to characters that any file system takes, without a dot in front."""
    name = re.sub(r"[^\w.+-]", "_", client).strip(".") or "_"
    return name if len(name.encode()) <= _LONGEST else name.encode()[:_LONGEST].decode(errors="ignore")
