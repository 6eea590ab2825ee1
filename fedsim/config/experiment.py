"""The typed config: YAML and `key=value` overrides in, `Experiment` out, and the resolved config back to YAML."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from fedsim.config import yaml_text
from fedsim.config.keys import document
from fedsim.config.schema import check_keys, components_of, convert, hints_of, keys_of, plain
from fedsim.config.sections import (
    Adapter,
    Aggregation,
    AlgorithmKeys,
    AutoExecutor,
    Best,
    Bottleneck,
    ByColumn,
    Central,
    Checkpoint,
    ClassCounts,
    CohortKeys,
    Data,
    Dirichlet,
    DirichletFedma,
    Evaluate,
    Executor,
    Faults,
    FedAvgKeys,
    FinancialPhraseBank,
    Headlines,
    Hub,
    Ia3,
    Iid,
    Instructions,
    LocalWork,
    Lora,
    Messages,
    Model,
    OtherPeft,
    PartitionKeys,
    Pool,
    Prefix,
    Prompt,
    PTuning,
    Quantity,
    Serial,
    Shards,
    Simulation,
    Table,
    Tracking,
    Training,
    Virtual,
    Whole,
    check_that,
)
from fedsim.core.errors import UserError, shown
from fedsim.core.inductor import without_folder
from fedsim.core.user_code import digest, is_user_code
from fedsim.data.memory import hold

__all__ = [
    "Aggregation",
    "AutoExecutor",
    "Best",
    "Bottleneck",
    "ByColumn",
    "Central",
    "Checkpoint",
    "ClassCounts",
    "CohortKeys",
    "Dirichlet",
    "DirichletFedma",
    "Evaluate",
    "Experiment",
    "Faults",
    "FedAvgKeys",
    "FinancialPhraseBank",
    "Headlines",
    "Hub",
    "Ia3",
    "Iid",
    "Instructions",
    "LocalWork",
    "Lora",
    "Messages",
    "Model",
    "OtherPeft",
    "PTuning",
    "Pool",
    "Prefix",
    "Prompt",
    "Quantity",
    "Serial",
    "Shards",
    "Simulation",
    "Table",
    "Tracking",
    "Training",
    "Virtual",
    "Whole",
    "components",
    "expand_path",
    "keys_of",
    "results_of",
]

_NOT_IN_ID = ("seeds", "rounds", "results", "executor", "tracking", "checkpoint", "aggregation")
_NEWER = (
    "messages",
    "faults",
    "simulation",
)  # ids of older runs do not hold them: left out where nothing in them is set
_PATHS = (("model", "path"), ("data", "path"), ("data", "validation"), ("data", "test"), ("results",))
_SOURCES = ("data", "sources")  # a list of sections with a `path` each, which may itself be a list
Section = Mapping[str, Any]
_Path = tuple[str | int, ...]  # keys and places in lists that lead to a value


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment: what goes in. Sections may be given as dataclasses or as plain dicts.

    Raises:
        UserError: for an unknown key, a wrong type or an impossible value, with the key's full path.
    """

    name: str = "experiment"
    """Name of the experiment, and of the folder of its runs under `results`."""
    seed: int = 0
    """Random seed; every random draw depends on it."""
    seeds: list[int] | None = None
    """Instead of `seed`: one run for each of these, with their mean and interval."""
    modes: list[Literal["local", "federated", "central"]] = field(
        default_factory=lambda: ["local", "federated", "central"]
    )
    """Which models to train: a local-only model per client, the federated one, the centralized one."""
    rounds: int = 5
    """Number of federated rounds; the other modes do the same amount of work, evaluated at the same points."""
    results: str = "results"
    """Root folder of all runs; a run lies in results/NAME/ID."""
    model: Model = field(default_factory=Model)
    """The base model."""
    adapter: Adapter = field(default_factory=Lora)
    """Fine-tuning method."""
    data: Data = field(default_factory=Headlines)
    """Data set; in Python also a DataFrame, a `datasets.Dataset` or a `DatasetDict`."""
    partition: PartitionKeys = field(default_factory=Iid)
    """How the training examples are divided among the clients."""
    cohort: CohortKeys = field(default_factory=CohortKeys)
    """Client sampling per round."""
    local: LocalWork = field(default_factory=LocalWork)
    """Local training: what a client does in one round."""
    central: Central = field(default_factory=Central)
    """How the budget of centralized training is matched to federated training."""
    algorithm: AlgorithmKeys = field(default_factory=FedAvgKeys)
    """Aggregation algorithm."""
    best: Best = field(default_factory=Best)
    """How the best model is chosen."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """How often the state of the run is saved."""
    evaluate: Evaluate = field(default_factory=Evaluate)
    """When and how models are evaluated."""
    training: Training = field(default_factory=Training)
    """How clients share a device."""
    aggregation: Aggregation = field(default_factory=Aggregation)
    """How updates are summed; the results do not depend on it."""
    messages: Messages = field(default_factory=Messages)
    """Compression of the updates and of the global parameters that are sent."""
    faults: Faults = field(default_factory=Faults)
    """Clients whose loss or update is not finite or too large."""
    simulation: Simulation = field(default_factory=Simulation)
    """Client availability, dropout and stragglers."""
    executor: Executor = field(default_factory=AutoExecutor)
    """Execution backend."""
    tracking: Tracking = field(default_factory=Tracking)
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
            model: Model | Section = ...,
            adapter: Adapter | Section | Any = ...,  # or a PEFT config
            data: Data | Section | Any = ...,  # or examples in memory
            partition: PartitionKeys | Section = ...,
            cohort: CohortKeys | Section = ...,
            local: LocalWork | Section = ...,
            central: Central | Section = ...,
            algorithm: Section = ...,
            best: Best | Section = ...,
            checkpoint: Checkpoint | Section = ...,
            evaluate: Evaluate | Section = ...,
            training: Training | Section = ...,
            aggregation: Aggregation | Section = ...,
            messages: Messages | Section = ...,
            faults: Faults | Section = ...,
            simulation: Simulation | Section = ...,
            executor: Executor | Section = ...,
            tracking: Tracking | Section = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        if hasattr(self.adapter, "peft_type"):  # a config of PEFT's, which has imported torch by then
            from fedsim.models.adapters import section_of

            object.__setattr__(self, "adapter", section_of(self.adapter))
        for f in dataclasses.fields(self):
            value = plain(getattr(self, f.name))
            value = convert(hints_of(Experiment)[f.name], hold(value) if f.name == "data" else value, f.name)
            object.__setattr__(self, f.name, value)
        check_that(
            re.fullmatch(r"[\w.+-]*\w[\w.+-]*", self.name) is not None,
            "name",
            self.name,
            "is not a folder's name: use letters, digits, . _ + -",
        )
        check_that(
            len(self.name) <= 200, "name", self.name, "is longer than a folder's name can be; give a shorter one"
        )
        check_that(self.seed >= 0, "seed", self.seed, "is negative")
        if self.seeds is not None:
            _check_one_of_seed_and_seeds(self.seeds, self.seed if self.seed != 0 else None)
            check_that(len(self.seeds) > 0, "seeds", self.seeds, "is empty; give one seed or more, e.g. [0, 1, 2]")
            check_that(min(self.seeds) >= 0, "seeds", self.seeds, "holds a negative seed")
            check_that(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "names a seed twice")
        check_that(self.rounds >= 1, "rounds", self.rounds, "is below 1")
        check_that(self.rounds <= 10**6, "rounds", self.rounds, "is above 1000000, more than any run can finish")
        check_that(bool(self.results.strip()), "results", self.results, "is empty; give a folder, or . for this one")
        check_that(len(self.modes) > 0, "modes", self.modes, "is empty; name some of local, federated, central")
        check_that(len(set(self.modes)) == len(self.modes), "modes", self.modes, "names a mode twice")
        for f in dataclasses.fields(self):
            section = getattr(self, f.name)
            if dataclasses.is_dataclass(section):
                section.check(f.name)
        if self.local.steps is None and self.local.epochs is None:
            object.__setattr__(self, "local", dataclasses.replace(self.local, epochs=1))
        self._check_together()

    def _check_together(self) -> None:
        if self.model.task == "sequence_classification":
            check_that(
                not self.evaluate.generate,
                "evaluate.generate",
                True,
                "goes with model.task=causal_lm; a head writes no text",
            )
            way = "goes with model.task=causal_lm; of a head use loss"
            check_that(self.best.metric != "perplexity", "best.metric", "perplexity", way)
        if self.adapter.name == "none":
            way = "cannot train a whole model without loss scaling; use bfloat16 or float32"
            check_that(self.model.dtype != "float16", "model.dtype", self.model.dtype, way)
        if self.training.packing and self.adapter.name != "none":
            way = "is for whole models (adapter.name=none); adapters in lanes are always packed, see training.lanes"
            check_that(False, "training.packing", True, way)
        if not self.training.master_weights:
            way = "is for whole models (adapter.name=none) under model.dtype=bfloat16; leave it out"
            whole = self.adapter.name == "none" and self.model.dtype == "bfloat16"
            check_that(whole, "training.master_weights", False, way)
        if self.messages.error_feedback and self.messages.up == "fp32" and self.model.dtype != "float64":
            way = "needs a type that loses something, and updates are float32 as it is; set messages.up, e.g. nf4"
            check_that(False, "messages.error_feedback", True, way)
        if self.best.metric == "exact_match":
            check_that(self.evaluate.generate, "best.metric", "exact_match", "needs evaluate.generate=true")

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
        check_keys(cls, tree, "")
        if tree.get("seeds") is not None:
            _check_one_of_seed_and_seeds(tree["seeds"], tree.get("seed"))
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
        for f in dataclasses.fields(self):
            section, value = getattr(self, f.name), plain(getattr(self, f.name))
            if f.name in _NOT_IN_ID:
                continue
            if dataclasses.is_dataclass(section):
                default = plain(type(section)())
                tree[f.name] = {k: v for k, v in value.items() if k == "name" or k not in default or v != default[k]}
                if f.name in _NEWER and not tree[f.name]:
                    del tree[f.name]
                if f.name == "algorithm" and is_user_code(section.name):  # what the file holds, wherever it lies
                    tree[f.name]["name"] = f"{section.name.rpartition(':')[2]}@{digest(type(section).of)}"
            elif f.default is dataclasses.MISSING or value != f.default:
                tree[f.name] = value
        return tree


def _check_one_of_seed_and_seeds(seeds: Any, seed: Any) -> None:
    check_that(seed is None, "seeds", seeds, f"and seed={seed} are both given; leave one of them out")


def _with_known_keys(init: Callable[..., None]) -> Callable[..., None]:
    """Name the nearest known key where Python would raise a TypeError."""

    @functools.wraps(init)
    def checked(self: Experiment, *values: Any, **keys: Any) -> None:
        check_keys(Experiment, keys, "")
        init(self, *values, **keys)

    return checked


Experiment.__init__ = _with_known_keys(Experiment.__init__)
Experiment.__doc__ = document(Experiment)  # for help() and editors: a field's sentence is no part of it otherwise


def components(section: str) -> dict[str, type]:
    """name -> dataclass of the components a section can hold; `""` stands for any PEFT method.

    Raises:
        KeyError: if the section holds no components.
    """
    table = components_of(hints_of(Experiment)[section])
    if table is None:
        raise KeyError(section)
    return table


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
    renames = (
        len(path) == 2 and path[1] == "name" and path[0] in ("adapter", "data", "partition", "algorithm", "executor")
    )
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
    name = _get(tree, ("algorithm", "name"))
    if isinstance(name, str) and is_user_code(name):
        file, _, wanted = name.rpartition(":")
        if not _exists(Path(file).expanduser()) and _exists(folder / file):
            tree["algorithm"]["name"] = f"{(folder / file).resolve()}:{wanted}"
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
