"""Clients that train by a user's script: the sections `client` and `clients`, which take the place of model, data and partition."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from fedsim.core.section import Text, section, wrong
from fedsim.core.user_code import UserCode, read

ABSENT = ("model", "adapter", "data", "partition", "local", "central", "training")  # the script has these
Clients = Annotated[int, Field(ge=1, le=10**5)] | list[str] | dict[str, str]


@section
class ClientScript:
    """A script that trains each client, by `fedsim.client`."""

    script: Text
    """The script, FILE.py; its content and that of the modules beside it belong to the run's id."""
    args: str = ""
    """Arguments of the script, as on a command line."""
    launch: Literal["once", "each_round"] = "once"
    """once: a script lives for all rounds, in a loop; each_round: it is started for each task."""
    exchange: Literal["numpy", "torch"] = "numpy"
    """What scripts receive parameters as."""
    transfer: Literal["full", "diff"] = "full"
    """NVFlare's transfer type: with diff an answer that is a model is turned into its difference from the model received. What comes out is the same; an answer of `ParamsType.DIFF` is a difference under both."""
    init: Text = "script"
    """Initial parameters: FILE.safetensors, FILE.npz, FILE.py:FUNCTION (returns a module or a dict of arrays), or script: what the first client's script sends when it receives none."""
    metric: Text | None = None
    """Metric of the script's by which the best model is chosen, the higher the better unless its name ends in loss or perplexity, or best.mode says otherwise; null = best.metric."""
    compat: bool = False
    """Put the client API under NVFlare's module names, so that scripts written for it run unchanged."""
    spawn: bool = False
    """A process for each client: for scripts that set devices, or whose data loaders have workers."""
    share_base: bool = False
    """Models that scripts load by `from_pretrained` with the same arguments share their weights: only for weights that nobody trains, since training would leak from client to client."""

    @field_validator("script", mode="after")
    @classmethod
    def _read(cls, value: str) -> str:
        if isinstance(value, UserCode):
            return value
        if not value.endswith(".py") or not Path(value).expanduser().is_file():
            what = "is not a Python file" if not value.endswith(".py") else "is not there"
            raise wrong("script", value, f"{what}; give FILE.py")
        return read(f"{value}:", "client.script")  # a file's content; nothing in it is named

    @field_validator("init", mode="after")
    @classmethod
    def _known(cls, value: str) -> str:
        if isinstance(value, UserCode) or value == "script" or value.endswith((".safetensors", ".npz")):
            return value
        if ".py:" in value:
            return read(value, "client.init")
        raise wrong("init", value, "is none of FILE.safetensors, FILE.npz, FILE.py:FUNCTION and script")


def names_of(clients: Any) -> dict[str, str]:
    """Client -> its own arguments."""
    if isinstance(clients, int):
        return {f"site-{i + 1}": "" for i in range(clients)}
    return dict.fromkeys(clients, "") if isinstance(clients, list) else dict(clients)
