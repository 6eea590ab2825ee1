"""The typed config: YAML and `key=value` overrides in, `Experiment` out, and the resolved config back to YAML."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from fedsim.config import adapters as a
from fedsim.config import components as c
from fedsim.config import datasets as d
from fedsim.config import privacy as p
from fedsim.config import scripts as u
from fedsim.config import sections as s
from fedsim.config import yaml_text
from fedsim.config.keys import document
from fedsim.config.tree import escape, expand_path, override, read_yaml, resolve
from fedsim.core.errors import UserError, shown
from fedsim.core.inductor import without_folder
from fedsim.core.section import Natural, Text, defaults_of, hints_of, one_of, plain, section, wrong
from fedsim.core.user_code import UserCode
from fedsim.data.memory import hold
from fedsim.data.partitioners import Iid

_NOT_IN_ID = ("seeds", "rounds", "results", "executor", "tracking", "checkpoint", "aggregation")
# Sections that an id holds even at their defaults, as in the first version; later ones only if they are set.
_FIRST = ("modes", "model", "adapter", "data", "partition", "cohort", "local", "central", "algorithm", "best", "evaluate", "training")  # fmt: skip
Section = Mapping[str, Any]


def _unknown_key(path: str, known: Sequence[str]) -> str:
    from fedsim.config.reference import unknown_key  # reads the whole config, and is needed for this message alone

    return unknown_key(path, known)


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", name):
        raise wrong("", name, "is not a valid folder name; use letters, digits, . _ + -")
    if len(name) > 200:
        raise wrong("", name, "is longer than a folder name can be; give a shorter one")
    return name


def _each_once(values: list[Any]) -> list[Any]:
    twice = next((v for v in values if values.count(v) > 1), None)
    if twice is not None:
        raise wrong("", values, f"has {twice} twice; remove one")
    return values


@functools.partial(section, unknown=_unknown_key)
class Experiment:
    """The config of one experiment. Sections may be given as dataclasses or as plain dicts.

    Raises:
        UserError: for an unknown key, a wrong type or an impossible value, with the key's full path.
    """

    name: Annotated[str, AfterValidator(_folder_name)] = "experiment"
    """Name of the experiment, and of the folder of its runs under `results`."""
    seed: Natural = 0
    """Random seed; every random draw depends on it."""
    seeds: Annotated[list[Natural], Field(min_length=1), AfterValidator(_each_once)] | None = None
    """Random seeds instead of `seed`: one run for each, with their mean and interval."""
    modes: Annotated[
        list[Literal["local", "federated", "central"]], Field(min_length=1), AfterValidator(_each_once)
    ] = Field(default_factory=lambda: ["local", "federated", "central"])
    """Which models to train: a local-only model per client, the federated one, the centralized one."""
    rounds: int = Field(5, ge=1, le=10**6)
    """Number of federated rounds; the other modes do the same amount of work, evaluated at the same points."""
    results: Text = "results"
    """The root folder of all runs; a run lies in results/NAME/ID."""
    model: a.Model = Field(default_factory=a.Model)
    """The base model."""
    adapter: a.Adapter = Field(default_factory=a.Lora)
    """Fine-tuning method."""
    data: d.Data = Field(default_factory=d.Headlines)
    """Data set; in Python also a DataFrame, a `datasets.Dataset` or a `DatasetDict`."""
    partition: c.Partitioner = Field(default_factory=Iid)
    """How the training examples are divided among the clients."""
    cohort: s.CohortKeys = Field(default_factory=s.CohortKeys)
    """Client sampling per round."""
    local: s.LocalWork = Field(default_factory=s.LocalWork)
    """Local training: what a client does in one round."""
    central: s.Central = Field(default_factory=s.Central)
    """How the budget of centralized training is matched to federated training."""
    algorithm: c.Algorithm = Field(default_factory=c.FedAvg)
    """Federated algorithm."""
    aggregator: c.Aggregator = Field(default_factory=c.Mean)
    """How the clients' updates become one."""
    privacy: p.Privacy = Field(default_factory=p.NoPrivacy)
    """Differential privacy of the clients."""
    best: s.Best = Field(default_factory=s.Best)
    """How the best model is selected."""
    checkpoint: s.Checkpoint = Field(default_factory=s.Checkpoint)
    """How often the state of the run is saved."""
    evaluate: s.Evaluate = Field(default_factory=s.Evaluate)
    """When and how models are evaluated."""
    training: s.Training = Field(default_factory=s.Training)
    """How clients share a device."""
    aggregation: s.Aggregation = Field(default_factory=s.Aggregation)
    """Memory of aggregation; the results do not depend on it."""
    messages: s.Messages = Field(default_factory=s.Messages)
    """Compression of the updates and of the global parameters that are sent."""
    faults: s.Faults = Field(default_factory=s.Faults)
    """Clients whose loss or update is not finite or too large."""
    simulation: s.Simulation = Field(default_factory=s.Simulation)
    """Client availability, dropout and stragglers."""
    executor: s.Executor = Field(default_factory=s.AutoExecutor)
    """Execution backend."""
    tracking: s.Tracking = Field(default_factory=s.Tracking)
    """Experiment trackers."""
    client: u.ClientScript | None = None
    """A script that trains each client; then model, data and partition are absent."""
    clients: u.Clients = 2
    """Clients of a script: their number, their names, or names with arguments of their own."""

    if TYPE_CHECKING:  # a section may also be a plain dict

        def __init__(
            self,
            *,
            name: str = ...,
            seed: int = ...,
            seeds: Sequence[int] | None = ...,
            modes: Sequence[str] = ...,
            rounds: int = ...,
            results: str = ...,
            model: a.Model | Section = ...,
            adapter: a.Adapter | Section | Any = ...,  # or a PEFT config
            data: d.Data | Section | Any = ...,  # or examples in memory
            partition: c.Partitioner | Section = ...,
            cohort: s.CohortKeys | Section = ...,
            local: s.LocalWork | Section = ...,
            central: s.Central | Section = ...,
            algorithm: c.Algorithm | Section = ...,
            aggregator: c.Aggregator | Section = ...,
            privacy: p.Privacy | Section = ...,
            best: s.Best | Section = ...,
            checkpoint: s.Checkpoint | Section = ...,
            evaluate: s.Evaluate | Section = ...,
            training: s.Training | Section = ...,
            aggregation: s.Aggregation | Section = ...,
            messages: s.Messages | Section = ...,
            faults: s.Faults | Section = ...,
            simulation: s.Simulation | Section = ...,
            executor: s.Executor | Section = ...,
            tracking: s.Tracking | Section = ...,
            client: u.ClientScript | Section | None = ...,
            clients: int | Sequence[str] | Mapping[str, str] = ...,
        ) -> None: ...

    @field_validator("adapter", mode="before")
    @classmethod
    def _of_peft(cls, value: Any) -> Any:
        if not hasattr(value, "peft_type"):
            return value
        from fedsim.models.adapters import section_of  # PEFT has imported torch by then

        return section_of(value)

    @field_validator("data", mode="before")
    @classmethod
    def _in_memory(cls, value: Any) -> Any:
        return hold(value)

    @model_validator(mode="after")
    def _check_scripts(self) -> Experiment:
        if self.client is None:
            if self.clients != 2:
                raise wrong("clients", self.clients, "needs client.script; with data set partition.num_clients")
            return self
        defaults = defaults_of(Experiment)
        for key in u.ABSENT:
            if plain(getattr(self, key)) != defaults[key]:
                raise wrong(key, "...", "has no use where client.script trains; leave the section out")
        if "central" in self.modes:
            raise wrong("modes", self.modes, "holds central, for which a script has no data; use federated and local")
        if not u.names_of(self.clients):
            raise wrong("clients", self.clients, "names no client")
        if isinstance(self.clients, list) and len(set(self.clients)) < len(self.clients):
            twice = next(name for name in self.clients if self.clients.count(name) > 1)
            raise wrong("clients", self.clients, f"has {twice} twice; remove one")
        return self

    @model_validator(mode="after")
    def _check_together(self) -> Experiment:
        whole, dtype = self.adapter.name == "none", self.model.dtype
        if self.seeds is not None and self.seed != 0:
            raise wrong("seeds", self.seeds, f"and seed={self.seed} exclude each other; leave one out")
        if self.model.task == "sequence_classification":
            if self.evaluate.generate:
                raise wrong(
                    "evaluate.generate", True, "needs model.task=causal_lm; a classification head generates no text"
                )
            if self.best.metric == "perplexity":
                raise wrong("best.metric", "perplexity", "needs model.task=causal_lm; of a head use loss")
        if whole and dtype == "float16":
            way = "is not supported for full fine-tuning (adapter.name=none), which needs loss scaling; use bfloat16 or float32"
            raise wrong("model.dtype", dtype, way)
        if self.training.packing and not whole:
            way = "is for full fine-tuning (adapter.name=none); adapters in lanes are always packed, see training.lanes"
            raise wrong("training.packing", True, way)
        if not self.training.master_weights and not (whole and dtype == "bfloat16"):
            way = "is for full fine-tuning (adapter.name=none) under model.dtype=bfloat16; leave it out"
            raise wrong("training.master_weights", False, way)
        if self.messages.error_feedback and self.messages.up == "fp32" and dtype != "float64":
            way = "needs a lossy type, and updates are float32 as it is; set messages.up, e.g. nf4"
            raise wrong("messages.error_feedback", True, way)
        if (how := self.aggregator.name) != "mean":
            aggregates = c.algorithm_of(self.algorithm).aggregates
            if aggregates.get("update") != "mean":
                why = "fixes its aggregator" if "update" in aggregates else "sends no message group update"
                raise wrong(
                    "aggregator.name", how, f"has no use: algorithm.name={self.algorithm.name} {why}; leave it out"
                )
        if self.best.metric == "exact_match" and not self.evaluate.generate:
            raise wrong("best.metric", "exact_match", "needs evaluate.generate=true")
        return self

    @classmethod
    def load(
        cls, file: str | Path, overrides: Sequence[str] = (), settings: Mapping[str, Any] | None = None
    ) -> Experiment:
        """The experiment of a YAML file.

        Args:
            file: the YAML file.
            overrides: `key=value` strings, as on the command line; of two for one key the later holds. One that changes a section's
                `name`, or the whole section, drops the keys that the file gave that section.
            settings: dotted key -> value; they hold over the overrides.

        Raises:
            UserError: for a missing file, bad YAML, an unknown key, a wrong type or an impossible value.
        """
        path = Path(expand_path(str(file), "FILE"))
        return cls.from_tree(read_yaml(path), path.resolve().parent, overrides, settings)

    @classmethod
    def from_tree(
        cls,
        tree: dict[str, Any],
        folder: Path,
        overrides: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> Experiment:
        """The experiment of what a YAML file in `folder` holds; see `load`."""
        return cls.from_dict(resolve(override(tree, overrides, settings), folder))

    @classmethod
    @without_folder()  # PEFT is asked for the keys of its methods
    def from_dict(cls, tree: dict[str, Any]) -> Experiment:
        """The experiment of a nested dict, as YAML gives it."""
        if tree.get("seeds") is not None and tree.get("seed") is not None:
            both = f"and seed={shown(tree['seed'])} exclude each other; leave one out"
            raise UserError(f"seeds: {shown(tree['seeds'])} {both}")
        if tree.get("client") is not None and "modes" not in tree:
            tree = {**tree, "modes": ["federated"]}
        return cls(**tree)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, lists and scalars; `Experiment.from_dict` takes them back."""
        tree = plain(self)
        tree.pop("seeds" if self.seeds is None else "seed")
        for key in ("client", "clients") if self.client is None else u.ABSENT:
            tree.pop(key)
        if self.client is not None:
            tree["client"]["script"] = str(self.client.script).removesuffix(":")
        return tree

    def to_yaml(self) -> str:
        """The resolved config; `fedsim run` takes it as it is."""
        return yaml_text.dump(escape(self.to_dict()))

    def identity(self) -> dict[str, Any]:
        """The part of the config that affects the results: the run id hashes it, with content hashes for paths.

        Values at their defaults are left out: a key that a later version adds does not change the id.
        """
        tree: dict[str, Any] = {}
        for key, default in defaults_of(Experiment).items():
            held = getattr(self, key)
            value = plain(held)
            if isinstance(value, dict):
                own = defaults_of(type(held)) if dataclasses.is_dataclass(held) else {}
                value = {k: v for k, v in value.items() if k == "name" or k not in own or v != own[k]}
                default = {k: v for k, v in default.items() if k == "name"} if isinstance(default, dict) else default
                if isinstance(name := value.get("name"), UserCode):
                    value["name"] = name.identity
            if self.client is not None and key == "client":
                value = {k: v.identity if isinstance(v, UserCode) else v for k, v in value.items()}
            if self.client is not None and key in u.ABSENT:
                continue
            if key not in _NOT_IN_ID and (key in _FIRST or value != default):
                tree[key] = value
        return tree


Experiment.__doc__ = document(Experiment)  # for help() and editors: a field's sentence is no part of it otherwise


def components(section: str) -> dict[str, type]:
    """name -> dataclass of the components a section can hold; `""` stands for any PEFT method.

    Raises:
        KeyError: if the section holds no components.
    """
    held = one_of(hints_of(Experiment)[section])
    if held is None:
        raise KeyError(section)
    return held.choices


def results_of(exp: Experiment) -> Path:
    """The root of an experiment's run folders.

    Raises:
        UserError: if a variable in it is not set.
    """
    return Path(expand_path(exp.results, "results"))
