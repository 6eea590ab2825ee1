"""What is trained on a base: PEFT's methods, fedsim's bottleneck adapters, or the whole model; saving and loading it.

PEFT is the source of names, target rules and file formats: what is trained is written as a PEFT folder that
`PeftModel.from_pretrained(base, folder)` loads. Where PEFT cannot hold the method - `adapter` is ours, and of the prompt
methods PEFT saves the virtual tokens only - the trained state stands beside it, and `load_adapter` loads it.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedsim.core.errors import UserError, is_out_of_memory, nearest_first
from fedsim.core.params import Params
from fedsim.core.section import near_key
from fedsim.core.seeding import stream_seed
from fedsim.models import bottleneck
from fedsim.models.base import quiet

STATE = "fedsim_state.safetensors"
_QKV = {
    *("q_proj", "k_proj", "v_proj", "query", "key", "value", "q_lin", "k_lin", "v_lin"),
    *("query_proj", "key_proj", "value_proj", "c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv"),
}
_PEFT_NAMES = {"prefix": "prefix_tuning", "prompt": "prompt_tuning"}  # where fedsim's names are others than PEFT's
_OWN_KEYS = {  # PEFT's key -> fedsim's
    "lora": {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout"},
    "p_tuning": {"num_virtual_tokens": "num_virtual_tokens", "encoder_hidden_size": "hidden"},
    "prefix": {
        **{"num_virtual_tokens": "num_virtual_tokens", "encoder_hidden_size": "hidden"},
        "prefix_projection": "projection",
    },
    "prompt": {"num_virtual_tokens": "num_virtual_tokens", "prompt_tuning_init_text": "init_text"},
    "ia3": {},
}
_NOT_OPTIONS = {
    "task_type",
    "peft_type",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
}
_STARTS = ("gaussian", "orthogonal")  # of LoRA's, those that need the base alone and leave it as it is
_SAVED_BY_PEFT = {"classifier", "score"}  # for sequence classification
_HEADS = ("classifier", "score", "classification_head")


def attach(
    base: nn.Module, name: str, settings: dict[str, Any], *, task: str, seed: int, masters: bool = True
) -> tuple[nn.Module, list[nn.Module]]:
    """Put an adapter on a frozen base (in place) and mark what is trained.

    Args:
        base: frozen; 16-bit, float32 or float64.
        name: lora | p_tuning | adapter | prefix | prompt | ia3 | none | any PEFT method.
        settings: the component's keys.
        task: causal_lm | sequence_classification; the head of the latter is trained too, and what else starts anew.
        seed: the adapter starts from the stream `init` of this seed, the same in every process.
        masters: whether a whole 16-bit model is trained in float32; an adapter always is.

    Returns:
        The model to call - a `PeftModel`, or the base itself for `adapter` and `none` - and the modules that are the
        adapter's own: those whose dropout acts in training while the base's does not.

    Raises:
        UserError: if the base cannot take the adapter, or a target module does not exist.
    """
    dtype = torch.float64 if next(base.parameters()).dtype == torch.float64 else torch.float32
    if name == "none" and not masters:
        dtype = next(base.parameters()).dtype
    of_base = set(map(id, base.modules()))
    try:
        model = _attach(base, name, settings, task=task, seed=seed, dtype=dtype)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        size = ", ".join(f"{k}={v}" for k, v in settings.items() if isinstance(v, int) and not isinstance(v, bool))
        raise UserError(f"adapter: {name} with {size} needs more memory than there is; give smaller numbers") from None
    if not trained(model):
        raise UserError(
            f"adapter.name: {name!r} finds nothing to train on this base ({base.config.model_type}); name layers by adapter.target_modules, or use lora"
        )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    own = [m for n, m in model.named_modules() if id(m) not in of_base and "modules_to_save" not in n]
    return model, own


def _attach(
    base: nn.Module, name: str, settings: dict[str, Any], *, task: str, seed: int, dtype: torch.dtype
) -> nn.Module:
    """The model with its adapter; see `attach`."""
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(stream_seed(seed, "init", "adapter"))
        if name == "none":
            base.requires_grad_(True)  # 16-bit compute comes from autocast over float32 weights
            model = base
        elif name == "adapter":
            bottleneck.attach_bottleneck(base, **settings, dtype=dtype)
            for full, parameter in base.named_parameters():
                head = task == "sequence_classification" and any(h in full.split(".") for h in _HEADS)
                parameter.requires_grad_(head or ".adapter_" in full or full in getattr(base, "starts_anew", ()))
            model = base
        else:
            model = _attach_peft(base, name, settings, task)
    return model


def trained(model: nn.Module) -> Params:
    """Name -> trained parameter; a tensor that is used twice (a tied head) is there once."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def _attach_peft(base: nn.Module, name: str, settings: dict[str, Any], task: str) -> nn.Module:
    import peft

    try:
        config = _peft_config(base, name, settings, task)
        if getattr(config, "target_modules", None):
            _check_targets(base, config.target_modules)
        anew = {_head_of(n) for n in getattr(base, "starts_anew", ())} - _SAVED_BY_PEFT
        if anew:
            config.modules_to_save = sorted(anew.union(config.modules_to_save or ()))
        takes = [signature(m.forward).parameters for m in (base, getattr(base, base.base_model_prefix, base))]
        if config.peft_type.value == "PREFIX_TUNING" and not any("past_key_values" in keys for keys in takes):
            raise ValueError(
                "its layers take no keys and values in front of a text's own"
            )  # PEFT says so while it trains
        if config.is_prompt_learning and config.peft_type.value != "PREFIX_TUNING" and config.token_dim is None:
            # PEFT takes the width of the layers, which is not that of the embeddings in ALBERT, ELECTRA, or some OPT.
            config.token_dim = base.get_input_embeddings().weight.shape[1]
        model = peft.get_peft_model(base, config)
    except UserError:
        raise
    except Exception as error:  # PEFT's methods refuse bases and settings in many ways
        if is_out_of_memory(error):
            raise
        text = " ".join(str(error).split())[:240]
        kind = base.config.model_type
        raise UserError(
            f"adapter.name: {name!r} cannot be put on this base ({kind}): {text or type(error).__name__}; change its keys, or use another method"
        ) from None
    if name == "lora" and settings["init"] == "xavier" and "init_lora_weights" not in settings.get("peft", {}):
        for full, parameter in model.named_parameters():
            if ".lora_A." in full:
                nn.init.xavier_normal_(parameter)
    return model


def _head_of(parameter: str) -> str:
    """The module of a head or pooler that a parameter is in, by its full name: PEFT trains and saves modules."""
    parts = parameter.split(".")
    return ".".join(parts[: parts.index("pooler") + 1 if "pooler" in parts else 1])


def _peft_config(base: nn.Module, name: str, settings: dict[str, Any], task: str) -> Any:

    s = copy.deepcopy(settings)  # PEFT appends to lists it is given
    keys: dict[str, Any] = {"task_type": {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS"}[task]}
    more = s.pop("peft", {})
    if name == "lora":
        keys |= {"r": s["r"], "lora_alpha": s["alpha"], "lora_dropout": s["dropout"]}
        keys["init_lora_weights"] = "gaussian" if s["init"] == "gaussian" else True
        keys["fan_in_fan_out"] = _is_conv1d(base)
        if "target_modules" not in more:
            keys["target_modules"] = _auto_qkv(base) if s["target_modules"] == "auto" else s["target_modules"]
    elif name == "ia3":
        keys["fan_in_fan_out"] = _is_conv1d(base)
        if s["target_modules"] != "auto":
            keys |= {"target_modules": s["target_modules"], "feedforward_modules": s["feedforward_modules"]}
    elif name == "p_tuning":
        keys |= {"num_virtual_tokens": s["num_virtual_tokens"], "encoder_hidden_size": s["hidden"]}
        keys["encoder_reparameterization_type"] = "MLP"
    elif name == "prefix":
        keys |= {"num_virtual_tokens": s["num_virtual_tokens"], "encoder_hidden_size": s["hidden"]}
        keys["prefix_projection"] = s["projection"]
    elif name == "prompt":
        keys["num_virtual_tokens"] = s["num_virtual_tokens"]
        if s["init_text"] is not None:
            keys |= {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": s["init_text"]}
            keys["tokenizer_name_or_path"] = base.config._name_or_path
    else:
        more = s
    return _peft_classes()[_PEFT_NAMES.get(name, name.lower())](**{**keys, **more})


def _peft_classes() -> dict[str, type]:
    import peft

    return {kind.value.lower(): cls for kind, cls in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def check_peft_settings(name: str, settings: dict[str, Any], path: str) -> None:
    """Check a PEFT method's name and keys before any model is loaded.

    Raises:
        UserError: for a name PEFT does not know, a method that cannot be federated, or a key its config class does not take.
    """
    known = _peft_classes()
    ours = [*_PEFT_NAMES, "lora", "p_tuning", "ia3", "adapter", "none"]
    if name.lower() not in known:
        near = difflib.get_close_matches(name, [*ours, *known], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"{path}.name: {name!r} is not known; {hint}fedsim's own: {', '.join(ours)}; or a PEFT method: {', '.join(sorted(known))}"
        )
    if name.lower() in ("multitask_prompt_tuning", "poly", "xlora"):
        raise UserError(f"{path}.name: {name!r} needs task ids or other adapters with every row; use another method")
    if name.lower() == "adalora":
        why = "prunes ranks by scores that each client keeps for itself, and masks of unlike ranks have no mean"
        raise UserError(f"{path}.name: {name!r} {why}; use lora, with peft: {{rank_pattern: ...}} for unequal ranks")
    _check_options(known[name.lower()], settings, path)


def check_peft_options(name: str, options: dict[str, Any], path: str) -> None:
    """Check the section `peft` of one of fedsim's own names for a method.

    Raises:
        UserError: for a key that PEFT's config class does not take, or that has a name of its own here.
    """
    for key, own in _OWN_KEYS[name].items():
        if key in options:
            raise UserError(f"{path}.peft.{key}: {options[key]!r} has a key of its own here; write {path}.{own}")
    _check_options(_peft_classes()[_PEFT_NAMES.get(name, name)], options, f"{path}.peft")


def _check_options(cls: type, options: dict[str, Any], path: str) -> None:
    fields = {f.name for f in dataclasses.fields(cls)} - _NOT_OPTIONS
    for key in options:
        if key not in fields:
            raise UserError(near_key(f"{path}.{key}", sorted(fields)))
    for f in dataclasses.fields(cls):
        wanted = {"bool": bool, "int": int}.get(getattr(f.type, "__name__", str(f.type)))
        if wanted and f.name in options and type(options[f.name]) is not wanted:
            way = "true or false" if wanted is bool else "a whole number"
            raise UserError(f"{path}.{f.name}: {options[f.name]!r} is not {way}")
    start = options.get("init_lora_weights", True)
    if "init_lora_weights" in fields and not isinstance(start, bool) and start not in _STARTS:
        why = "writes into the base's weights, which the export does not hold, or needs data of its own"
        raise UserError(f"{path}.init_lora_weights: {start!r} {why}; give true or one of {', '.join(_STARTS)}")


def section_of(config: Any) -> dict[str, Any]:
    """The section `adapter` that says what a `peft.PeftConfig` says: its PEFT name, and what is not at its default.

    Raises:
        UserError: for a class in place of a config, a config of no method, or a value that YAML cannot hold.
    """
    if isinstance(config, type) or config.peft_type is None:
        name = config.__name__ if isinstance(config, type) else type(config).__name__
        raise UserError(f"adapter: {name} is not the config of one method; give an instance, e.g. peft.LoraConfig(r=8)")
    out = {"name": config.peft_type.value}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if f.name in _NOT_OPTIONS or value == default:
            continue
        try:
            out[f.name] = json.loads(json.dumps(value, default=_plain_value))
        except (TypeError, ValueError):
            way = "give a number, text, a list or a mapping"
            raise UserError(f"adapter.{f.name}: {value!r} cannot be written into config.yaml; {way}") from None
    return out


def _plain_value(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else dataclasses.asdict(value)


def _auto_qkv(base: nn.Module) -> list[str]:
    leaves = sorted({name.rsplit(".", 1)[-1] for name in bottleneck.projections(base)})
    found = [leaf for leaf in leaves if leaf in _QKV]
    if not found:
        raise UserError(
            f"adapter.target_modules: 'auto' finds no attention input projection in this base; name some of {', '.join(leaves)}"
        )
    return found


def _is_conv1d(base: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(m, Conv1D) for m in base.modules())


def _check_targets(base: nn.Module, targets: Any) -> None:
    if isinstance(targets, str):
        return  # "all-linear" or a regular expression: PEFT's own rule and message
    names = [name for name, _ in base.named_modules()]
    leaves = sorted({name.rsplit(".", 1)[-1] for name in bottleneck.projections(base)})
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise UserError(
                f"adapter.target_modules: {target!r} does not exist in this base; it has: {nearest_first(target, leaves)}"
            )


# ------------------------------------------------------------------------------------------------ files


def save(
    model: nn.Module,
    folder: Path,
    *,
    name: str,
    settings: dict[str, Any],
    base_name: str,
    tokenizer: Any,
    shard_mb: int = 1024,
) -> None:
    """Write what the model has been trained to, and read it back to be sure that it is there.

    Args:
        model: from `attach`.
        folder: a PEFT folder afterwards; for `none` a transformers folder with its tokenizer.
        name: the adapter's name.
        settings: its keys.
        base_name: where a loader finds the base, put into the adapter's config.
        tokenizer: saved beside the model; None leaves it out.
        shard_mb: largest file of a whole model, in MiB, but for a tensor that is larger by itself.

    Raises:
        OSError: if what was written is not what is in memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    params = trained(model)
    with quiet():
        if name == "none":
            for old in folder.glob("model*.safetensors*"):  # of a save that was cut into other files
                old.unlink()
            model.save_pretrained(folder, max_shard_size=shard_mb << 20)
        elif name == "adapter":
            bottleneck.save_bottleneck(folder, params, {**settings, "base_model_name_or_path": base_name})
        else:
            config = model.peft_config["default"]
            config.base_model_name_or_path = base_name
            model.create_or_update_model_card = lambda folder: None  # fedsim.models.card has more to say
            model.save_pretrained(folder, save_embedding_layers=False)
            del model.create_or_update_model_card
            config.inference_mode = False
            if (
                config.is_prompt_learning
            ):  # PEFT keeps the virtual tokens, not what makes them, and trains neither again
                from safetensors.torch import save_file

                save_file({n: p.detach().cpu().contiguous() for n, p in params.items()}, folder / STATE)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if name == "none":
            _verify_whole(model, folder)
        elif name != "adapter":
            _verify_peft(model, folder)


def _verify_whole(model: nn.Module, folder: Path) -> None:
    """Read a transformers folder back piece by piece: each parameter is there, to the bit, and nothing else.

    What a loader of the folder builds has the same names: the config that was written makes a model without memory.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    held = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    loaded_as = _loaded_as(model, held)
    for file in sorted(folder.glob("*.safetensors")):
        for written, start, stop in _places(file):
            name = written if written in held else loaded_as(written)
            if name is None:  # an architecture whose files hold other tensors: experts one by one, say
                return _verify_loaded(model, folder)
            if not _same_bytes(held[name].detach(), file, start, stop):
                raise OSError(f"{file}: {written} does not read back as it was written")
            seen.add(id(held[name]))
    with init_empty_weights():
        made = set(type(model)(AutoConfig.from_pretrained(folder)).state_dict())
    missing = [n for n, p in model.named_parameters() if id(p) not in seen] + sorted(made ^ set(held))
    if missing:
        raise OSError(f"{folder}: {missing[0]} is not as it was written ({len(missing)} such)")
    return None


def _loaded_as(model: nn.Module, held: dict[str, torch.Tensor]) -> Callable[[str], str | None]:
    """Name in a file -> name in the model, as transformers' loader has it; None where a tensor becomes part of another.

    Some architectures' files keep names from before the model's were changed: GPT-NeoX's head is `embed_out` there.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # another version: what it loads is then compared
        return lambda name: None
    ways = get_model_conversion_mapping(model)
    renamings = [w for w in ways if isinstance(w, WeightRenaming)]
    others = [w for w in ways if not isinstance(w, WeightRenaming)]

    def known(written: str) -> str | None:
        name, of_several = rename_source_key(written, renamings, others, model.base_model_prefix, held)
        return name if of_several is None and name in held else None

    return known


def _places(file: Path) -> list[tuple[str, int, int]]:
    """(name, first byte, byte behind the last) of each tensor in a safetensors file: eight bytes of length, JSON, data."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
    header.pop("__metadata__", None)
    return [(n, *(8 + length + o for o in about["data_offsets"])) for n, about in header.items()]


def _same_bytes(tensor: torch.Tensor, file: Path, start: int, stop: int) -> bool:
    """Whether this stretch of a file holds the tensor, read by a few MB at a time: a mapped file counts as memory in use."""
    flat, width = tensor.reshape(-1), tensor.element_size()
    if flat.numel() * width != stop - start:
        return False
    with file.open("rb") as handle:
        handle.seek(start)
        for i in range(0, flat.numel(), 1 << 22):
            piece = flat[i : i + (1 << 22)].cpu().contiguous().view(torch.uint8).numpy()
            if handle.read(piece.nbytes) != piece.tobytes():
                return False
    return True


def _verify_loaded(model: nn.Module, folder: Path) -> None:
    loaded = dict(type(model).from_pretrained(folder, dtype="auto").named_parameters())
    for name, parameter in model.named_parameters():
        if name not in loaded or not torch.equal(loaded[name], parameter.detach().cpu()):
            raise OSError(f"{folder}: {name} does not read back as it was written")


def _verify_peft(model: nn.Module, folder: Path) -> None:
    import peft
    from safetensors.torch import load_file

    written = load_file(folder / "adapter_model.safetensors")
    expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    for key, tensor in expected.items():
        if key not in written or not torch.equal(written[key], tensor.detach().cpu()):
            raise OSError(f"{folder}: {key} was not written as it is in memory; is the disk full?")


def load_adapter(base: nn.Module, folder: str | Path, *, trainable: bool = False) -> nn.Module:
    """Load what `fedsim` saved onto a base model, whatever the method.

    Args:
        base: the base model it was trained on, as transformers loads it; changed in place.
        folder: `global/`, `best/`, `init/`, `local/<client>/` ... of a run.
        trainable: go on training it; for p-tuning and prefix tuning this restores the prompt encoder itself.

    Returns:
        The model to call.

    Raises:
        UserError: if the folder holds no adapter, or one that does not fit the base.
    """
    folder = Path(folder)
    try:
        return _load(base, folder, trainable)
    except UserError:
        raise
    except Exception as error:  # a damaged file, or an adapter of another base: of many kinds, each means the same
        text = " ".join(str(error).split())[:200]
        way = "give a folder that was written whole, and the base it was trained on"
        raise UserError(f"{folder}: its adapter could not be loaded ({type(error).__name__}: {text}); {way}") from None


def _load(base: nn.Module, folder: Path, trainable: bool) -> nn.Module:
    """See `load_adapter`."""
    import peft

    if (folder / bottleneck.CONFIG).is_file():
        model = bottleneck.load_bottleneck(base.requires_grad_(False), folder)
        for name in _tensor_names(folder / bottleneck.WEIGHTS):
            model.get_parameter(name).requires_grad_(trainable)
        return model
    if not (folder / "adapter_config.json").is_file():
        way = (
            "it is a whole model: load it with transformers"
            if (folder / "config.json").is_file()
            else "give global/, best/ or init/ of a run"
        )
        raise UserError(f"{folder}: holds no adapter; {way}")
    if not (folder / "adapter_model.safetensors").is_file():  # PEFT would take a pickle instead, or ask the hub
        pickled = (folder / "adapter_model.bin").is_file()
        why = (
            "only pickled weights (adapter_model.bin), which can run code"
            if pickled
            else "no adapter_model.safetensors"
        )
        raise UserError(f"{folder}: holds {why}; save the adapter anew with save_pretrained")
    if not (trainable and (folder / STATE).is_file()):
        with quiet():
            model = peft.PeftModel.from_pretrained(base, str(folder), is_trainable=trainable)
        return model if trainable else model.requires_grad_(False)
    # PEFT trains no prompt that it has loaded: the method is put on anew and filled with the state that trained.
    from safetensors.torch import load_file

    with quiet():
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False
        for key in ("token_dim", "num_layers", "num_attention_heads"):  # as this base has them
            setattr(config, key, None)
        model = peft.get_peft_model(base.requires_grad_(False), config)
    own = trained(model)
    for name, tensor in load_file(folder / STATE).items():
        if name not in own or own[name].shape != tensor.shape:
            raise UserError(f"{folder}: tensor {name} does not fit this base; load it on the base it was trained on")
        own[name].data = tensor.to(own[name].device)
    return model


def _tensor_names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        return list(handle.keys())


def describe(model: nn.Module, params: Params) -> dict[str, Any]:
    """What is trained and what travels: parameters, per cent of the model, bytes per client, round and direction."""
    total = sum(p.numel() for p in model.parameters())
    count = sum(p.numel() for p in params.values())
    size = sum(p.numel() * p.element_size() for p in params.values())
    return {
        "parameters": total,
        "trained": count,
        "per_cent": 100 * count / total,
        "bytes_up": size,
        "bytes_down": size,
    }
