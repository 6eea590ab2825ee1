"""The typed config: YAML and `key=value` overrides in, `Experiment` out, and the resolved config back to YAML."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, field_validator, model_validator

from fedsim.config import sections as s
from fedsim.config import yaml_text
from fedsim.config.keys import document
from fedsim.core.errors import UserError, shown
from fedsim.core.inductor import without_folder
from fedsim.core.section import Natural, Text, defaults_of, hints_of, one_of, plain, section, wrong
from fedsim.core.user_code import UserCode, is_user_code
from fedsim.data.memory import hold
from fedsim.data.partitioners import Iid

_NOT_IN_ID = ("seeds", "rounds", "results", "executor", "tracking", "checkpoint", "aggregation")
# What ids of the first version hold at its defaults, too; a key that came later is in an id where it is set.
_FIRST = ("modes", "model", "adapter", "data", "partition", "cohort", "local", "central", "algorithm", "best", "evaluate", "training")  # fmt: skip
_PATHS = (("model", "path"), ("data", "path"), ("data", "validation"), ("data", "test"), ("results",))
_SOURCES = ("data", "sources")  # a list of sections with a `path` each, which may itself be a list
Section = Mapping[str, Any]
_Path = tuple[str | int, ...]  # keys and places in lists that lead to a value


def _unknown_key(path: str, known: Sequence[str]) -> str:
    from fedsim.config.reference import unknown_key  # reads the whole config, and is needed for this message alone

    return unknown_key(path, known)


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", name):
        raise wrong("", name, "is not a folder's name: use letters, digits, . _ + -")
    if len(name) > 200:
        raise wrong("", name, "is longer than a folder's name can be; give a shorter one")
    return name


def _each_once(values: list[Any]) -> list[Any]:
    twice = next((v for v in values if values.count(v) > 1), None)
    if twice is not None:
        raise wrong("", values, f"names {twice} twice")
    return values


@functools.partial(section, unknown=_unknown_key)
class Experiment:
    """One experiment: what goes in. Sections may be given as dataclasses or as plain dicts.

    Raises:
        UserError: for an unknown key, a wrong type or an impossible value, with the key's full path.
    """

    name: Annotated[str, AfterValidator(_folder_name)] = "experiment"
    """Name of the experiment, and of the folder of its runs under `results`."""
    seed: Natural = 0
    """Random seed; every random draw depends on it."""
    seeds: Annotated[list[Natural], Field(min_length=1), AfterValidator(_each_once)] | None = None
    """Random seeds in the place of `seed`: one run for each, with their mean and interval."""
    modes: Annotated[
        list[Literal["local", "federated", "central"]], Field(min_length=1), AfterValidator(_each_once)
    ] = Field(default_factory=lambda: ["local", "federated", "central"])
    """Which models to train: a local-only model per client, the federated one, the centralized one."""
    rounds: int = Field(5, ge=1, le=10**6)
    """Number of federated rounds; the other modes do the same amount of work, evaluated at the same points."""
    results: Text = "results"
    """The root folder of all runs; a run lies in results/NAME/ID."""
    model: s.Model = Field(default_factory=s.Model)
    """The base model."""
    adapter: s.Adapter = Field(default_factory=s.Lora)
    """Fine-tuning method."""
    data: s.Data = Field(default_factory=s.Headlines)
    """Data set; in Python also a DataFrame, a `datasets.Dataset` or a `DatasetDict`."""
    partition: s.Partitioner = Field(default_factory=Iid)
    """How the training examples are divided among the clients."""
    cohort: s.CohortKeys = Field(default_factory=s.CohortKeys)
    """Client sampling per round."""
    local: s.LocalWork = Field(default_factory=s.LocalWork)
    """Local training: what a client does in one round."""
    central: s.Central = Field(default_factory=s.Central)
    """How the budget of centralized training is matched to federated training."""
    algorithm: s.Algorithm = Field(default_factory=s.FedAvgKeys)
    """Aggregation algorithm."""
    best: s.Best = Field(default_factory=s.Best)
    """How the best model is chosen."""
    checkpoint: s.Checkpoint = Field(default_factory=s.Checkpoint)
    """How often the state of the run is saved."""
    evaluate: s.Evaluate = Field(default_factory=s.Evaluate)
    """When and how models are evaluated."""
    training: s.Training = Field(default_factory=s.Training)
    """How clients share a device."""
    aggregation: s.Aggregation = Field(default_factory=s.Aggregation)
    """How updates are summed; the results do not depend on it."""
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
            model: s.Model | Section = ...,
            adapter: s.Adapter | Section | Any = ...,  # or a PEFT config
            data: s.Data | Section | Any = ...,  # or examples in memory
            partition: s.Partitioner | Section = ...,
            cohort: s.CohortKeys | Section = ...,
            local: s.LocalWork | Section = ...,
            central: s.Central | Section = ...,
            algorithm: s.Algorithm | Section = ...,
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
    def _check_together(self) -> Experiment:
        whole, dtype = self.adapter.name == "none", self.model.dtype
        if self.seeds is not None and self.seed != 0:
            raise wrong("seeds", self.seeds, f"and seed={self.seed} are both given; leave one of them out")
        if self.model.task == "sequence_classification":
            if self.evaluate.generate:
                raise wrong("evaluate.generate", True, "goes with model.task=causal_lm; a head writes no text")
            if self.best.metric == "perplexity":
                raise wrong("best.metric", "perplexity", "goes with model.task=causal_lm; of a head use loss")
        if whole and dtype == "float16":
            way = "cannot train a whole model without loss scaling; use bfloat16 or float32"
            raise wrong("model.dtype", dtype, way)
        if self.training.packing and not whole:
            way = "is for whole models (adapter.name=none); adapters in lanes are always packed, see training.lanes"
            raise wrong("training.packing", True, way)
        if not self.training.master_weights and not (whole and dtype == "bfloat16"):
            way = "is for whole models (adapter.name=none) under model.dtype=bfloat16; leave it out"
            raise wrong("training.master_weights", False, way)
        if self.messages.error_feedback and self.messages.up == "fp32" and dtype != "float64":
            way = "needs a type that loses something, and updates are float32 as it is; set messages.up, e.g. nf4"
            raise wrong("messages.error_feedback", True, way)
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
        tree = copy.deepcopy(tree)
        given = [(str(key).split("."), copy.deepcopy(value)) for key, value in (settings or {}).items()]
        for changes in ([_parse_override(text) for text in overrides], given):
            named = {path[0] for path, _ in changes} & {"seed", "seeds"}
            if len(named) == 1:  # over whichever of the two the file has
                tree.pop("seeds" if named == {"seed"} else "seed", None)
            # Whole sections first, then names: neither drops a key that stands beside it on the command line.
            for path, value in sorted(changes, key=_rank):
                _override(tree, path, value)
        tree = _interpolate(tree)
        _absolute_paths(tree, folder)
        return cls.from_dict(tree)

    @classmethod
    @without_folder()  # PEFT is asked for the keys of its methods
    def from_dict(cls, tree: dict[str, Any]) -> Experiment:
        """The experiment of a nested dict, as YAML gives it."""
        if tree.get("seeds") is not None and tree.get("seed") is not None:
            both = f"and seed={shown(tree['seed'])} are both given; leave one of them out"
            raise UserError(f"seeds: {shown(tree['seeds'])} {both}")
        return cls(**tree)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, lists and scalars; `Experiment.from_dict` takes them back."""
        tree = plain(self)
        tree.pop("seeds" if self.seeds is None else "seed")
        return tree

    def to_yaml(self) -> str:
        """The resolved config; `fedsim run` takes it as it is."""
        return yaml_text.dump(_escape(self.to_dict(), ()))

    def identity(self) -> dict[str, Any]:
        """The part of the config that the numbers depend on: the run's id hashes it, with content hashes for paths.

        Values at their defaults are left out, so that a key that a later version adds does not change the id.
        """
        tree: dict[str, Any] = {}
        for key, default in defaults_of(Experiment).items():
            held = getattr(self, key)
            value = plain(held)
            if isinstance(value, dict):
                default = defaults_of(type(held))
                value = {k: v for k, v in value.items() if k == "name" or k not in default or v != default[k]}
                if isinstance(name := value.get("name"), UserCode):
                    value["name"] = name.identity
            if key not in _NOT_IN_ID and (key in _FIRST or value not in ({}, default)):
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


def read_yaml(path: Path) -> dict[str, Any]:
    """What a YAML file holds, interpolations unresolved.

    Raises:
        UserError: for a missing file, or one that is no YAML mapping in UTF-8.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; give the YAML file of an experiment, e.g. experiments/lora_sentiment/tiny.yaml"
        )
    try:
        tree = yaml_text.parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save the YAML file as UTF-8"
        ) from None
    except RecursionError:
        raise UserError(f"{path}: values nested too deep; an experiment has sections of keys and lists") from None
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise UserError(f"{path}: invalid YAML{yaml_text.problem(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds {type(tree).__name__}, not sections with keys; see experiments/ for examples")
    return tree


def _escape(value: Any, path: tuple[str, ...]) -> Any:
    """Protect `${` in text from being taken for an interpolation, but leave the environment variables of paths."""
    if isinstance(value, dict):
        return {k: _escape(v, (*path, k)) for k, v in value.items()}
    if isinstance(value, list):
        return [_escape(v, path) for v in value]
    if isinstance(value, str) and path not in (*_PATHS, (*_SOURCES, "path")):
        return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", value)
    return value


def _rank(override: tuple[list[str], Any]) -> int:
    path = override[0]
    return 0 if len(path) == 1 else 1 if path[1:] == ["name"] else 2


def _parse_override(text: str) -> tuple[list[str], Any]:
    """`key=value` -> (the key's parts, the value)."""
    key, equals, value = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(re.fullmatch(r"[^\s\[\]{}.]+", part) for part in path):
        raise UserError(f"{shown(text)}: not an override; write key=value with a dotted key, e.g. local.lr=1e-3")
    try:
        return path, yaml_text.parse(value)
    except (yaml.YAMLError, RecursionError, ValueError):
        way = "quote a value that holds braces, colons or commas"
        example = "'data.template=\"{sentence} topic: {label}\"'"
        raise UserError(f"{shown(text)}: not readable as key=value; {way}, e.g. {example}") from None


def _override(tree: dict[str, Any], path: list[str], value: Any) -> None:
    section = tree.get(path[0])
    renames = len(path) == 2 and path[1] == "name" and one_of(hints_of(Experiment).get(path[0])) is not None
    if renames and isinstance(section, dict) and section.get("name") != value:
        tree[path[0]] = {"name": value}
        return
    target = tree
    for depth, part in enumerate(path[:-1]):
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            raise UserError(
                f"{'.'.join(path[: depth + 1])}: {shown(target)} is no section, so {'.'.join(path)} cannot be set"
            )
    target[path[-1]] = value


def _interpolate(tree: dict[str, Any]) -> dict[str, Any]:
    """Resolve ${...}, but leave environment variables in paths as they are: the resolved config then runs elsewhere."""
    if "${" not in repr(tree):
        return tree
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    kept = {}
    for path in _paths_in(tree):
        text = _get(tree, path)
        if isinstance(text, str) and "${" in text:
            kept[path] = text
            expand_path(text, _key(path))
            _set(tree, path, "")
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except RecursionError:
        raise UserError("config: nested too deep; an experiment has sections of keys and lists") from None
    except OmegaConfBaseException as error:
        way = "interpolations are ${oc.env:NAME} and ${section.key}; write \\${ for plain text"
        raise UserError(
            f"{getattr(error, 'full_key', None) or 'config'}: {str(error).splitlines()[0]}; {way}"
        ) from None
    for path, text in kept.items():
        _set(resolved, path, text)
    return resolved


def _paths_in(tree: dict[str, Any]) -> list[_Path]:
    """Where paths stand in a config: at the same keys always, and in the data sets that it lists."""
    found: list[_Path] = list(_PATHS)
    sources = _get(tree, _SOURCES)
    for i, source in enumerate(sources if isinstance(sources, list) else []):
        text = source.get("path") if isinstance(source, dict) else None
        several = [(*_SOURCES, i, "path", j) for j in range(len(text))] if isinstance(text, list) else None
        found += [(*_SOURCES, i, "path")] if several is None else several
    return found


def _key(path: _Path) -> str:
    """`data.sources[0].path`."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)[1:]


def _get(tree: dict[str, Any], path: _Path) -> Any:
    value: Any = tree
    for part in path:
        if isinstance(part, int) and isinstance(value, list):
            value = value[part]
        elif isinstance(value, dict):
            value = value.get(part)
        else:
            return None
    return value


def _set(tree: dict[str, Any], path: _Path, value: Any) -> None:
    at: Any = tree
    for part in path[:-1]:
        at = at[part]
    at[path[-1]] = value


def expand_path(text: str, key: str) -> str:
    """Put environment variables (`${oc.env:NAME}`) and `~` into a path.

    Raises:
        UserError: for an empty path, if a variable is not set, or the user of `~user` is not known.
    """
    if not text.strip():
        raise UserError(f"{key}: {text!r} is empty; give a path")
    if "${" in text:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            text = str(OmegaConf.create({"value": text}).value)
        except OmegaConfBaseException as error:
            name = re.search(r"oc\.env:(\w+)", text)
            way = (
                f"set {name[1]} to the folder that holds it, or give {key}=PATH" if name else str(error).split("\n")[0]
            )
            raise UserError(f"{key}: {text!r} cannot be resolved; {way}") from None
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        raise UserError(f"{key}: {text!r} is of a user who is not known here; give the whole path") from None


def results_of(exp: Experiment) -> Path:
    """The root of an experiment's run folders.

    Raises:
        UserError: if a variable in it is not set.
    """
    return Path(expand_path(exp.results, "results"))


def _absolute_paths(tree: dict[str, Any], folder: Path) -> None:
    """A relative path that exists from here or from the YAML's folder becomes absolute: the resolved config stands alone."""
    for held in tree.values():
        if isinstance(held, dict) and is_user_code(name := held.get("name")) and not isinstance(name, UserCode):
            file, _, wanted = name.rpartition(":")
            if not _exists(Path(file).expanduser()) and _exists(folder / file):
                held["name"] = f"{(folder / file).resolve()}:{wanted}"
    for path in _paths_in(tree):
        text = _get(tree, path) if path != ("results",) else None
        if not isinstance(text, str) or not text or "${" in text or text == "tiny" or text.startswith("package:"):
            continue
        for candidate in (Path(expand_path(text, _key(path))), folder / text):
            if _exists(candidate):
                _set(tree, path, str(candidate.resolve()))
                break


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or no path at all: an error where it is read
        return False
