"""What is trained on a base: PEFT's methods, fedsim's bottleneck adapters, or the whole model.

PEFT is the source of names, target rules and defaults; `fedsim.models.export` writes and reads the files.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
from inspect import signature
from typing import Any

import torch
from torch import nn

from fedsim.core.errors import UserError, is_out_of_memory
from fedsim.core.params import Params
from fedsim.core.section import near_key
from fedsim.core.seeding import stream_seed
from fedsim.models import targets
from fedsim.models.base import quiet
from fedsim.models.bottleneck import attach_bottleneck

_PEFT_NAMES = {"prefix": "prefix_tuning", "prompt": "prompt_tuning"}  # where fedsim's names differ from PEFT's
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
    *("task_type", "peft_type", "inference_mode", "auto_mapping", "peft_version"),
    *("base_model_name_or_path", "revision"),
}
_TASKS = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS"}
_STARTS = ("gaussian", "orthogonal")  # of LoRA's, those that need the base alone and leave it as it is
_SAVED_BY_PEFT = {"classifier", "score"}  # for sequence classification
_HEADS = ("classifier", "score", "classification_head")


def base_of(model: nn.Module) -> nn.Module:
    """The base model under PEFT's, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def prompt_of(model: nn.Module) -> Any | None:
    """The config of a prompt method (prompt, prefix or p-tuning), or None for other methods."""
    config = getattr(model, "peft_config", {}).get("default")
    return config if config is not None and config.is_prompt_learning else None


def trained(model: nn.Module) -> Params:
    """Name -> trained parameter; a tensor that is used twice (a tied head) is there once."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def describe(model: nn.Module, params: Params) -> dict[str, Any]:
    """What is trained and sent: parameters, per cent of the model, bytes per client, round and direction."""
    total = sum(p.numel() for p in model.parameters())
    count = sum(p.numel() for p in params.values())
    size = sum(p.nbytes for p in params.values())
    share = {"parameters": total, "trained": count, "per_cent": 100 * count / total}
    return {**share, "bytes_up": size, "bytes_down": size}


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
    held = next(base.parameters()).dtype
    keeps = held == torch.float64 or (name == "none" and not masters)
    dtype = held if keeps else torch.float32
    of_base = set(map(id, base.modules()))
    try:
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(stream_seed(seed, "init", "adapter"))
            if name == "none":  # 16-bit compute comes from autocast over float32 weights
                model = base.requires_grad_(True)
            elif name == "adapter":
                model = base
                attach_bottleneck(base, **settings, dtype=dtype)
                for full, parameter in base.named_parameters():
                    head = task == "sequence_classification" and any(h in full.split(".") for h in _HEADS)
                    parameter.requires_grad_(head or ".adapter_" in full or full in getattr(base, "starts_anew", ()))
            else:
                model = _attach_peft(base, name, settings, task)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        size = ", ".join(f"{k}={v}" for k, v in settings.items() if isinstance(v, int) and not isinstance(v, bool))
        raise UserError(f"adapter: {name} with {size} needs more memory than there is; give smaller numbers") from None
    params = trained(model)
    if not params:
        why = f"finds nothing to train on this base ({base.config.model_type})"
        raise UserError(f"adapter.name: {name!r} {why}; name layers by adapter.target_modules, or use lora")
    for parameter in params.values():
        parameter.data = parameter.data.to(dtype)
    own = [m for n, m in model.named_modules() if id(m) not in of_base and "modules_to_save" not in n]
    return model, own


def _attach_peft(base: nn.Module, name: str, settings: dict[str, Any], task: str) -> nn.Module:
    import peft

    try:
        config = _peft_config(base, name, settings, task)
        wanted = getattr(config, "target_modules", None)
        if wanted and not isinstance(wanted, str):  # "all-linear" or a regular expression: PEFT's own rule and message
            targets.matching(base, (n for n, _ in base.named_modules()), wanted)
        anew = {_head_of(n) for n in getattr(base, "starts_anew", ())} - _SAVED_BY_PEFT
        if anew:
            config.modules_to_save = sorted(anew.union(config.modules_to_save or ()))
        takes = [signature(m.forward).parameters for m in (base, getattr(base, base.base_model_prefix, base))]
        if config.peft_type.value == "PREFIX_TUNING":
            if not any("past_key_values" in keys for keys in takes):  # PEFT would fail in training
                raise ValueError("its layers take no keys and values in front of a text's own")
        elif config.is_prompt_learning and config.token_dim is None:
            # PEFT takes the width of the layers, which is not that of the embeddings in ALBERT, ELECTRA, or some OPT.
            config.token_dim = base.get_input_embeddings().weight.shape[1]
        model = peft.get_peft_model(base, config)
    except UserError:
        raise
    except Exception as error:  # PEFT's methods refuse bases and settings in many ways
        if is_out_of_memory(error):
            raise
        text = " ".join(str(error).split())[:240] or type(error).__name__
        why = f"cannot be put on this base ({base.config.model_type}): {text}"
        raise UserError(f"adapter.name: {name!r} {why}; change its keys, or use another method") from None
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
    options = s.pop("peft", {}) if name in _OWN_KEYS else s
    keys = {theirs: s[ours] for theirs, ours in _OWN_KEYS.get(name, {}).items()}
    if name == "lora":
        keys["init_lora_weights"] = "gaussian" if s["init"] == "gaussian" else True
        if "target_modules" not in options:
            auto = s["target_modules"] == "auto"
            keys["target_modules"] = targets.attention_inputs(base) if auto else s["target_modules"]
    elif name == "ia3" and s["target_modules"] != "auto":
        keys |= {key: s[key] for key in ("target_modules", "feedforward_modules")}
    elif name == "p_tuning":
        keys["encoder_reparameterization_type"] = "MLP"
    elif name == "prompt" and s["init_text"] is not None:
        keys |= {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": base.config._name_or_path}
    cls = _peft_classes()[_PEFT_NAMES.get(name, name.lower())]
    return cls(**{"task_type": _TASKS[task], **keys, **options})


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
        raise UserError(
            f"{path}.name: {name!r} needs task ids or other adapters with every example; use another method"
        )
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
    """A `peft.PeftConfig` as a section `adapter`: its PEFT name, and what is not at its default.

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
