"""The files of a trained model: written as PEFT and transformers write theirs, read back at once, and loaded again.

An adapter is a PEFT folder that `PeftModel.from_pretrained(base, folder)` loads, a whole model a transformers folder. Where
PEFT cannot hold the method - `adapter` is ours, and of the prompt methods PEFT saves the virtual tokens only - the trained
state lies beside it, and `load_adapter` loads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedsim.core.errors import UserError
from fedsim.core.params import Params
from fedsim.models.adapters import prompt_of, trained
from fedsim.models.base import quiet
from fedsim.models.bottleneck import attach_bottleneck
from fedsim.models.locate import first_line

STATE = "fedsim_state.safetensors"
BOTTLENECK, BOTTLENECK_STATE = "fedsim_adapter.json", "fedsim_adapter.safetensors"
_PIECE = 1 << 22  # elements that are read back at a time


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
        shard_mb: largest file of a whole model, in MiB, except for a tensor that is larger by itself.

    Raises:
        OSError: if what was written is not what is in memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        if name == "none":
            for old in folder.glob("model*.safetensors*"):  # of a save that was cut into other files
                old.unlink()
            model.save_pretrained(folder, max_shard_size=shard_mb << 20)
        elif name == "adapter":
            about = {"adapter": "bottleneck", **settings, "base_model_name_or_path": base_name}
            (folder / BOTTLENECK).write_text(json.dumps(about, indent=2) + "\n")
            _write(trained(model), folder / BOTTLENECK_STATE)
        else:
            config = model.peft_config["default"]
            config.base_model_name_or_path = base_name
            model.create_or_update_model_card = lambda folder: None  # fedsim.models.card has more to say
            model.save_pretrained(folder, save_embedding_layers=False)
            del model.create_or_update_model_card
            config.inference_mode = False
            if prompt_of(model):  # PEFT keeps the virtual tokens, not what makes them, and trains neither again
                _write(trained(model), folder / STATE)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if name == "none":
            _verify_whole(model, folder)
        elif name != "adapter":
            _verify_peft(model, folder)


def _write(params: Params, file: Path) -> None:
    from safetensors.torch import save_file

    save_file({n: p.detach().cpu().contiguous() for n, p in params.items()}, file)


# ----------------------------------------------------------------------------------------------- reading back


def _verify_whole(model: nn.Module, folder: Path) -> None:
    """Read a transformers folder back piece by piece: each parameter is there, to the bit, and nothing else.

    What a loader of the folder builds has the same names: the config that was written makes a model without memory.
    """
    from transformers import AutoConfig

    held = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    loaded_as = _loaded_as(model, held)
    for file in sorted(folder.glob("*.safetensors")):
        for written, start, stop in _places(file):
            name = written if written in held else loaded_as(written)
            if name is None:  # an architecture whose files hold other tensors, such as experts one by one
                _verify_loaded(model, folder)
                return
            if not _same_bytes(held[name].detach(), file, start, stop):
                raise OSError(f"{file}: {written} does not read back as it was written")
            seen.add(id(held[name]))
    with torch.device("meta"):
        made = set(type(model)(AutoConfig.from_pretrained(folder)).state_dict())
    missing = [n for n, p in model.named_parameters() if id(p) not in seen] + sorted(made ^ set(held))
    if missing:
        raise OSError(f"{folder}: {missing[0]} is not as it was written ({len(missing)} such)")


def _loaded_as(model: nn.Module, held: Params) -> Callable[[str], str | None]:
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
    """(name, first byte, byte after the last) of each tensor in a safetensors file: eight bytes of length, JSON, data."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
    header.pop("__metadata__", None)
    return [(n, *(8 + length + o for o in about["data_offsets"])) for n, about in header.items()]


def _same_bytes(tensor: torch.Tensor, file: Path, start: int, stop: int) -> bool:
    """Whether these bytes of a file are the tensor, read by a few MB at a time: a mapped file counts as memory in use."""
    if tensor.nbytes != stop - start:
        return False
    for piece in tensor.reshape(-1).split(_PIECE):
        expected = piece.cpu().contiguous().view(torch.uint8).numpy()
        if not np.array_equal(np.fromfile(file, np.uint8, expected.size, offset=start), expected):
            return False
        start += expected.size
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
    for key, tensor in peft.get_peft_model_state_dict(model, save_embedding_layers=False).items():
        if key not in written or not torch.equal(written[key], tensor.detach().cpu()):
            raise OSError(f"{folder}: {key} was not written as it is in memory; is the disk full?")


# --------------------------------------------------------------------------------------------------- loading


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
        with quiet():
            return _load(base, folder, trainable)
    except UserError:
        raise
    except Exception as error:  # a damaged file, or an adapter of another base: of many kinds
        way = "give a folder that was written whole, and the base it was trained on"
        raise UserError(f"{folder}: its adapter could not be loaded ({first_line(error)}); {way}") from None


def _load(base: nn.Module, folder: Path, trainable: bool) -> nn.Module:
    import peft

    if (folder / BOTTLENECK).is_file():
        settings = json.loads((folder / BOTTLENECK).read_text(encoding="utf-8"))
        keys = {k: settings[k] for k in ("bottleneck", "dropout", "activation", "target_modules")}
        attach_bottleneck(base.requires_grad_(False), **keys, dtype=torch.float32)
        _fill(base.eval(), folder / BOTTLENECK_STATE, trainable)
        return base
    if not (folder / "adapter_config.json").is_file():
        whole = (folder / "config.json").is_file()
        way = "it is a whole model: load it with transformers" if whole else "give global/, best/ or init/ of a run"
        raise UserError(f"{folder}: holds no adapter; {way}")
    if not (folder / "adapter_model.safetensors").is_file():  # PEFT would take a pickle instead, or ask the hub
        pickled = (folder / "adapter_model.bin").is_file()
        only = "only pickled weights (adapter_model.bin), which can run code"
        why = only if pickled else "no adapter_model.safetensors"
        raise UserError(f"{folder}: holds {why}; save the adapter anew with save_pretrained")
    if not (trainable and (folder / STATE).is_file()):
        model = peft.PeftModel.from_pretrained(base, str(folder), is_trainable=trainable)
        return model if trainable else model.requires_grad_(False)
    # PEFT trains no prompt that it has loaded: the method is attached again and filled with the state that trained.
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    for key in ("token_dim", "num_layers", "num_attention_heads"):  # as this base has them
        setattr(config, key, None)
    model = peft.get_peft_model(base.requires_grad_(False), config)
    _fill(model, folder / STATE, True)
    return model


def _fill(model: nn.Module, file: Path, trainable: bool) -> None:
    """Give the parameters of these names the tensors of a file, in their type.

    Raises:
        UserError: if a tensor does not fit.
    """
    from safetensors.torch import load_file

    own = dict(model.named_parameters())
    for name, tensor in load_file(file).items():
        if name not in own or own[name].shape != tensor.shape:
            why = f"tensor {name} {list(tensor.shape)} does not fit this base"
            raise UserError(f"{file.parent}: {why}; load it on the base it was trained on")
        own[name].data = tensor.to(own[name].device)
        own[name].requires_grad_(trainable)
