"""Loading the base model: its config, its tokenizer, its weights, and the checks that tell a damaged folder."""

from __future__ import annotations

import copy
import io
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedsim.core.errors import UserError, is_out_of_memory
from fedsim.models import gguf, heads
from fedsim.models.attention import use_padded
from fedsim.models.locate import Source, first_line, wrong


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' load reports and progress bars inside the block; fedsim reports what a user must know."""
    import transformers

    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # Some progress bars have no switch; they write to the standard error at hand when they are made.
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
    except Exception as error:  # of a dozen kinds, by tokenizer and transport
        why = f"no tokenizer could be loaded from {source.name!r} ({first_line(error)})"
        raise UserError(f"model.path: {why}; {_way_out(source)}") from None
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            why = f"the tokenizer of {source.name!r} has neither a pad nor an end-of-text token"
            raise UserError(f"model.path: {why}; add pad_token to its tokenizer_config.json")
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def load_config(source: Source) -> Any:
    """The transformers config of the base.

    Raises:
        UserError: if it cannot be read, or its weights are quantized.
    """
    from transformers import AutoConfig

    try:
        with quiet():
            config = AutoConfig.from_pretrained(source.location, trust_remote_code=False, **source.load_args())
    except Exception as error:
        raise wrong(source.name, f"could not be read ({first_line(error)}); {_way_out(source)}") from None
    if source.gguf:  # its weights are ordinary tensors once they are loaded
        gguf.scale_rotary(config, Path(source.location) / source.gguf)
    else:
        _refuse_quantized(source, config)
    return config


def _refuse_quantized(source: Source, config: Any) -> None:
    """No optimizer step, lane or export has been checked on weights that only a quantizer's kernels can read."""
    for part in (config, config.get_text_config()):
        held = getattr(part, "quantization_config", None) or getattr(part, "compression_config", None)
        if not held:
            continue
        held = held if isinstance(held, dict) else held.to_dict()
        method = held.get("quant_method") or "an unnamed method"
        bits = held.get("bits") or (4 if held.get("load_in_4bit") else 8 if held.get("load_in_8bit") else None)
        why = f"has quantized weights ({method}{f', {bits} bits' if bits else ''}), which fedsim does not train"
        way = "give the base it was made from, or write it again by from_pretrained(...).dequantize()"
        raise wrong(source.name, f"{why}; {way} and save_pretrained")


def check_task(source: Source, task: str) -> None:
    """Check whether the architecture can do the task.

    Raises:
        UserError: for an encoder-decoder, an encoder that is to write text, or a config with more blocks than its weights.
    """
    from transformers.models.auto import modeling_auto

    config = load_config(source)
    kind, cannot = config.model_type, f"model.task: {task!r} cannot be done by {source.name!r}"
    if config.is_encoder_decoder:
        way = "give a decoder, or an encoder with model.task=sequence_classification"
        raise wrong(source.name, f"is an encoder-decoder ({kind}); {way}")
    if task == "sequence_classification" and kind not in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        way = "use model.task=causal_lm, or another base"
        raise UserError(f"{cannot}, for whose type ({kind}) transformers has no such head; {way}")
    encoder = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if task == "causal_lm" and (encoder or kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        raise UserError(f"{cannot}, which is no causal model ({kind}); use model.task=sequence_classification")
    _check_blocks(source, config)


def _check_blocks(source: Source, config: Any) -> None:
    """Refuse a config with more blocks than the weights' files, before a model is built, which can take minutes.

    Not every architecture has separate weights for each block. One that has them gets another block when its config asks
    for one more than the files hold, which is tried without memory. Whatever this cannot tell, the load reports.

    Raises:
        UserError: for such a config.
    """
    import transformers

    asked, held = getattr(config, "num_hidden_layers", None), 0
    fewer = copy.deepcopy(config)
    try:
        held = _blocks(_names_of_weights(source))
        if not isinstance(asked, int) or not 0 < held < asked:
            return
        fewer.num_hidden_layers = held + 1
        if isinstance(vars(fewer).get("layer_types"), list):  # a property in some configs
            fewer.layer_types = fewer.layer_types[: held + 1]
        with quiet(), torch.device("meta"):
            made = _blocks(transformers.AutoModel.from_config(fewer, trust_remote_code=False).state_dict())
    except Exception:  # weights and configs can be wrong in any way; the load reports it
        return
    if made > held:
        what = f"the weights of {source.name!r} hold {held} blocks, its config asks for {asked} (num_hidden_layers)"
        raise UserError(f"model.path: {what}; give the config that belongs to them")


def _names_of_weights(source: Source) -> list[str]:
    """Names in the weights' files of a folder, from their headers alone."""
    from safetensors import safe_open

    names: list[str] = []
    for file in [] if source.gguf or source.is_hub else sorted(Path(source.location).glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            names += handle.keys()
    return names


def _blocks(names: Iterable[str]) -> int:
    """Number of blocks in weights' names: of all prefixes, the most numbers that follow one."""
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
        they are trained and saved, since a loader of the folder would start them at other values. Its `head_note` is
        what a user should know of a head that the folder holds, or None.

    Raises:
        UserError: if the weights cannot be loaded.
    """
    import transformers

    args: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": False, **source.load_args()}
    args["ignore_mismatched_sizes"] = True  # they are reported, and named below
    auto = transformers.AutoModelForCausalLM
    if task == "sequence_classification":
        auto = transformers.AutoModelForSequenceClassification
        with quiet():
            config, _ = transformers.PretrainedConfig.get_config_dict(source.location, **source.load_args())
        held = heads.class_names(config)
        args["num_labels"] = len(labels if heads.rows_of(held, labels) is None else held)
    if source.gguf:
        args["config"] = load_config(source)
        if "num_labels" in args:
            args["config"].num_labels = args.pop("num_labels")
    else:
        args["use_safetensors"] = True  # pickled weights can run code
    try:
        with quiet(), heads.start(seed):
            model, report = auto.from_pretrained(source.location, output_loading_info=True, **args)
    except Exception as error:  # weights and configs can be wrong in any way
        if is_out_of_memory(error):
            way = "give a smaller base, or model.dtype=bfloat16"
            raise wrong(source.name, f"needs more memory than there is; {way}") from None
        raise wrong(source.name, f"could not be loaded ({first_line(error)}); {_way_out(source)}") from None
    _check_whole(source, model, task, report)
    model.starts_anew = sorted({*report["missing_keys"], *(k[0] for k in report["mismatched_keys"])})
    model.head_note = None
    if labels is not None:
        model.head_note = heads.fit(model, held, labels, report, base=source.name, seed=seed)
    if source.gguf:
        _forget_gguf(model)
    use_padded(model)
    model.config.use_cache = False
    model.config.pad_token_id = pad_token_id
    return model.requires_grad_(False).eval()


def _check_whole(source: Source, model: nn.Module, task: str, report: dict[str, Any]) -> None:
    """Refuse weights that do not fit their config, and weights that are not numbers: transformers loads both in silence.

    Raises:
        UserError: for either.
    """
    weights, fits = f"model.path: the weights of {source.name!r}", "give the config that belongs to them"
    other = sorted(k for k in report["mismatched_keys"] if not heads.owns(model, task, k[0]))
    if other:
        name, held, wanted = other[0]
        what = f"hold {name} as {list(held)}, its config makes it {list(wanted)} ({len(other)} such)"
        raise UserError(f"{weights} {what}; {fits}")
    missing = sorted(k for k in report["missing_keys"] if not heads.owns(model, task, k))
    if missing:
        raise UserError(f"{weights} lack {missing[0]} ({len(missing)} such); {_way_out(source)}")
    blocks = {_in_block(name) for name in model.state_dict()} - {None}
    spare = [name for name in sorted(report["unexpected_keys"]) if _in_block(name) in blocks]
    if spare:
        raise UserError(f"{weights} hold {spare[0]}, for which its config has no place ({len(spare)} such); {fits}")
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}  # no example may hold the token
    for name, parameter in model.named_parameters():
        if not parameter.numel() or id(parameter) in tables:
            continue
        if not all(bool(edge.isfinite()) for edge in parameter.aminmax()):
            raise UserError(f"{weights} hold NaN or infinite values in {name}; {_way_out(source)}")


def _in_block(name: str) -> str | None:
    """A weight's name after its block's number, other numbers left out; None = in no block."""
    _, number, inside = re.sub(r"\.\d+\.", ".N.", name).partition(".N.")
    return inside if number else None


def _forget_gguf(model: nn.Module) -> None:
    """Weights of a GGUF file are ordinary tensors once they are loaded; transformers still takes the model for quantized,
    and refuses to save it."""
    for owner, names in ((model, ("hf_quantizer", "quantization_method")), (model.config, ("quantization_config",))):
        for name in names:
            if hasattr(owner, name):
                delattr(owner, name)
    model.is_quantized = False


def _way_out(source: Source) -> str:
    if source.is_hub:
        return "it is not a local path, so it was looked up on the model hub: check the id, the network, or give a local folder"
    return "check that the folder is complete, as save_pretrained writes it"
