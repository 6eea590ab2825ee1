"""The model card of an exported model: what it is, how it scores and how it is loaded. No path of this machine is in it.

Its text is `assets/model_card.md.j2`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedsim.models.locate import Source

_ASSETS = Path(__file__).resolve().parent.parent / "assets"
_LOADERS = {
    "causal_lm": ("AutoModelForCausalLM", "text-generation"),
    "sequence_classification": ("AutoModelForSequenceClassification", "text-classification"),
}


def write_card(
    folder: Path,
    config: Mapping[str, Any],
    source: Source,
    *,
    title: str,
    scores: Iterable[tuple[str, str, float]],
    examples: int,
    note: str = "",
) -> None:
    """Write `README.md`.

    Args:
        folder: of the exported model.
        config: the experiment's resolved config.
        source: where the base comes from.
        title: which model of the run this is.
        scores: (split, metric, value).
        examples: in the training split.
        note: a further sentence about the model.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    model, ours = config["model"], config["adapter"]["name"] == "adapter"
    auto, tag = _LOADERS[model["task"]]
    arguments = {**source.load_args(), "dtype": model["dtype"]}
    if model["task"] == "sequence_classification":
        arguments["num_labels"] = len(config["data"]["labels"])
    env = Environment(
        loader=FileSystemLoader(_ASSETS), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    env.filters["settings"] = _settings
    text = env.get_template("model_card.md.j2").render(
        **{"config": config, "source": source, "title": title, "scores": scores, "examples": examples, "note": note},
        **{"auto": auto, "tag": tag, "base": _base(source), "data": _data(config["data"])},
        whole=config["adapter"]["name"] == "none",
        ours=ours,
        by_peft=not ours and not source.gguf,
        arguments="".join(f", {key}={value!r}" for key, value in arguments.items()),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _base(source: Source) -> str:
    if source.is_hub:
        return f"[{source.location}](https://huggingface.co/{source.location})"
    if source.name == "tiny":
        return "tiny, which ships with fedsim"
    if source.name.startswith("package:"):
        return f"`{source.name}`"
    return f"`{source.gguf or Path(source.location).name}`, a local {'file' if source.gguf else 'folder'}"


def _data(data: Mapping[str, Any]) -> str:
    """The data set by its name, and by its file's name or hub id."""
    places = [data["path"]] if isinstance(data.get("path"), str) else []
    for entry in data.get("sources") or ():
        places += entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
    hub = [p.count("/") == 1 and not p.startswith((".", "~", "/")) and not Path(p).exists() for p in places]
    shown = [p if there else Path(p).name for p, there in zip(places, hub, strict=True)]
    return " ".join([str(data["name"]), *(f"`{p}`" for p in shown)])


def _settings(section: Mapping[str, Any]) -> str:
    """`name` and the keys that are set, except for paths."""
    given = {k: v for k, v in section.items() if k != "name" and v not in (None, {}, [])}
    rest = [" ".join(f"{k} {v}".split()) for k, v in given.items() if not Path(str(v)).is_absolute()]
    return ", ".join([*([str(section["name"])] if "name" in section else []), *rest])
