"""Arguments and options of the command line that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedsim.config.tree import expand_path
from fedsim.core.errors import UserError


def _expanded(param: typer.CallbackParam, value: Any) -> Any:
    """`~` and environment variables in a path, as in a config."""
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return [_expanded(param, one) for one in value]
    name = param.opts[0] if param.opts[0].startswith("-") else param.metavar or str(param.name).upper()
    return type(value)(expand_path(str(value), name))


def _keys(incomplete: str) -> list[str]:
    """Keys that a shell may complete."""
    from fedsim.config.reference import every_key

    return sorted({f"{k.path}=" for k in every_key() if k.path.startswith(incomplete)})


def _formats(given: list[str] | None) -> list[str]:
    """File formats of figures, several in one option with commas between them."""
    from fedsim.analysis.plots import FORMATS

    formats = [name.strip().lower() for text in given or ["png"] for name in text.split(",")]
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"--format: {name!r} is not available; use {', '.join(FORMATS)}, several with commas")
    return formats


def path_argument(help: str, metavar: str | None = None) -> Any:
    """An argument that is a path, or a list of them."""
    return typer.Argument(help=help, metavar=metavar, callback=_expanded, show_default=False)


def path_option(help: str, *names: str) -> Any:
    """An option that is a path; `names` where that of the parameter is another."""
    return typer.Option(*names, help=help, callback=_expanded, show_default=False)


_FILE = typer.Argument(help="YAML file of an experiment; a run's own config.yaml works too.", show_default=False)
File = Annotated[Path, _FILE]
OptionalFile = Annotated[Path | None, _FILE]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Overrides with dotted keys, e.g. local.lr=1e-3 cohort.size=5 adapter.name=ia3.",
        show_default=False,
        autocompletion=_keys,
    ),
]
_FORMATS = "File formats of figures: png (default), pdf, svg; several with commas, or repeated."
Formats = Annotated[list[str] | None, typer.Option("--format", metavar="FORMAT", help=_FORMATS, callback=_formats)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only the results.")]
_WORKERS = "Number of concurrent runs (default: one per CUDA device; one per core on CPU)."
Workers = Annotated[int | None, typer.Option(help=_WORKERS, min=1, max=1024)]
