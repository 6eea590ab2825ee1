"""The model card of an exported model: what it is, how it scores and how it is loaded. No path of this machine is in it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedsim.models.base import Source

_AUTO = {"causal_lm": "AutoModelForCausalLM", "sequence_classification": "AutoModelForSequenceClassification"}
_TAG = {"AutoModelForCausalLM": "text-generation", "AutoModelForSequenceClassification": "text-classification"}


def write_card(
    folder: Path,
    config: Mapping[str, Any],
    source: Source,
    *,
    title: str,
    scores: Iterable[tuple[str, str, float]],
    examples: int,
) -> None:
    """Write `README.md`.

    Args:
        folder: of the exported model.
        config: the experiment's resolved config.
        source: where the base comes from.
        title: which model of the run this is.
        scores: (split, metric, value).
        examples: in the training split.
    """
    model, auto = config["model"], _AUTO[config["model"]["task"]]
    adapter, base = config["adapter"], _base(source)
    whole, ours = adapter["name"] == "none", adapter["name"] == "adapter"
    head = [
        f"library_name: {'transformers' if whole else 'peft'}",
        f"pipeline_tag: {_TAG[auto]}",
        "tags:",
        "- federated-learning",
    ]
    head += [f"base_model: {source.location}"] if source.is_hub else []
    table = [f"| {split} | {name} | {value:.4f} |" for split, name, value in scores]
    method = "all parameters are trained" if whole else _keys(adapter)
    local = _keys({k: v for k, v in config["local"].items() if v is not None})
    text = f"""\
        ---
        HEAD
        ---

        # {config["name"]}: {title}

        Trained by fedsim, a simulator of federated fine-tuning.

        - **Base**: {base}
        - **Method**: {method}
        - **Data**: {_data(config["data"])}, {examples} training examples
        - **Partition**: {_keys(config["partition"])}
        - **Training**: rounds {config["rounds"]}, algorithm {config["algorithm"]["name"]}, seed {config["seed"]}, {local}

        ## Scores

        | split | metric | value |
        | --- | --- | --- |
        SCORES

        ## How to load it

        `FOLDER` is the folder that holds this file.

        ```python
        LOADING
        ```
        """
    labels = len(config["data"]["labels"]) if model["task"] == "sequence_classification" else None
    loading = _loading(source, auto, model["dtype"], labels, whole=whole, ours=ours)
    text = textwrap.dedent(text)
    for mark, lines in {"HEAD": head, "SCORES": table, "LOADING": loading}.items():
        text = text.replace(f"\n{mark}\n", "\n" + "".join(f"{line}\n" for line in lines), 1)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _loading(source: Source, auto: str, dtype: str, labels: int | None, *, whole: bool, ours: bool) -> list[str]:
    """Python that loads the model and its tokenizer."""
    keys = f", dtype={dtype!r}" + (f", num_labels={labels}" if labels else "")
    if whole:
        imports = [f"from transformers import {auto}, AutoTokenizer, pipeline"]
        model = f"{auto}.from_pretrained(FOLDER)"
    elif not ours and not source.gguf:
        peft = auto.replace("Auto", "AutoPeft")
        imports = [f"from peft import {peft}", "from transformers import AutoTokenizer, pipeline"]
        model = f"{peft}.from_pretrained(FOLDER{keys})"
    else:
        imports = ["import fedsim" if ours else "from peft import PeftModel"]
        imports += [f"from transformers import {auto}, AutoTokenizer, pipeline"]
        file = f", gguf_file={source.gguf!r}" if source.gguf else ""
        name = repr(source.location) if source.is_hub else "BASE"
        load = "fedsim.load_adapter" if ours else "PeftModel.from_pretrained"
        model = f"{load}({auto}.from_pretrained({name}{file}{keys}), FOLDER)"
        model += "" if source.is_hub else "  # BASE: the base's folder"
    last = f'pipe = pipeline("{_TAG[auto]}", model=model, tokenizer=tokenizer)'
    return [*imports, "", "tokenizer = AutoTokenizer.from_pretrained(FOLDER)", f"model = {model}", last]


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


def _keys(section: Mapping[str, Any]) -> str:
    """`name` and the keys that are set, but for paths."""
    said = {k: v for k, v in section.items() if k != "name" and v not in (None, {}, [])}
    rest = [" ".join(f"{k} {v}".split()) for k, v in said.items() if not Path(str(v)).is_absolute()]
    return ", ".join([*([str(section["name"])] if "name" in section else []), *rest])
