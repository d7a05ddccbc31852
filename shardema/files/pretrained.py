"""File names and configs that ``from_pretrained`` of the model's own library reads.

::

    transformers   model.safetensors                    config.json, generation_config.json
    diffusers      diffusion_pytorch_model.safetensors  config.json
    PEFT           adapter_model.safetensors            adapter_config.json, for each adapter
    any other      model.safetensors                    the files of its own config.save_pretrained

A config is written only if the tensors have the names that the class in it expects. A library is
imported only for its own models.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from shardema.backends.tree import original_class, unwrap
from shardema.errors import abbreviate, logger
from shardema.files.safetensors import ADAPTER, DIFFUSERS, MODEL
from shardema.model.own_state import Skeletons
from shardema.shards.shard import Shard

log = logger(__name__)

_LIBRARIES = {"diffusers", "peft", "transformers"}
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# keys that diffusers' EMAModel adds to the model's config
EMA_MODEL = (
    "decay",
    "min_decay",
    "optimization_step",
    "update_after_step",
    "use_ema_warmup",
    "inv_gamma",
    "power",
)


@dataclass(frozen=True)
class Form:
    """File and tensor names of an export.

    Attributes:
        stem: of its files, ``<stem>.safetensors``; may have a folder.
        files: of adapters, ``{fqn: (stem, name)}`` of the tensors to write; None to write every
            tensor under its state dict key.
        refusal: why the model cannot be exported, else "".
        pending: ``files`` are not known yet.
    """

    stem: str = MODEL
    files: Mapping[str, tuple[str, str]] | None = field(default=None)
    refusal: str = ""
    pending: bool = False


def form_of(
    models: Sequence[nn.Module],
    shards: Sequence[Shard],
    averaged: Collection[str],
    *,
    written: bool,
) -> Form:
    """The names of an export of this rank's model. Local.

    Args:
        averaged: fqns of averaged tensors.
        written: an export follows. Only then the names of adapters are computed, for which PEFT
            may query the Hub about the base model.
    """
    module = unwrap(models[0])
    if len(models) == 1 and _adapters(module):
        if not written:
            return Form(ADAPTER, {}, pending=True)
        return _adapter_form(module, models, shards, averaged)
    return Form(DIFFUSERS if _of_diffusers(module) else MODEL)


def write_config(module: nn.Module, folder: str, dtype: torch.dtype | None) -> None:
    """Writes the configs that ``from_pretrained`` needs, if the model's library has any. Local.

    Args:
        module: the unwrapped model.
        dtype: of the written weights, noted in the config.
    """
    if _adapters(module):
        _write_adapter_configs(module, folder)
    elif _of_diffusers(module):
        if not _altered(module):
            _write_diffusers_config(module, folder)
    elif (_of_transformers(module) or _has_own_config(module)) and not _altered(module):
        _write_model_config(module, folder, dtype)


def dropped_names(models: Sequence[nn.Module]) -> set[str]:
    """Names of tied weights that transformers omits from files that have them by another name."""
    keys = (getattr(unwrap(model), "_tied_weights_keys", None) or () for model in models)
    return {name for names in keys for name in names}


# ---- the model's library ----------------------------------------------------------------------


def _is_a(module: nn.Module, home: str, name: str) -> bool:
    """Whether the module is a ``home.name``, without importing ``home``."""
    cls = getattr(sys.modules.get(home), name, None)
    return cls is not None and isinstance(module, cls)


def _of_transformers(module: nn.Module) -> bool:
    return _is_a(module, "transformers.modeling_utils", "PreTrainedModel")


def _of_diffusers(module: nn.Module) -> bool:
    """By its attributes: a diffusers model has the config and the name of its file."""
    named = isinstance(getattr(module, "config_name", None), str)
    return named and callable(getattr(module, "save_config", None))


def _has_own_config(module: nn.Module) -> bool:
    """Whether a model of no known library has a config with ``save_pretrained``.

    A config of one of these libraries in any other model describes only a part of it.
    """
    config: Any = getattr(module, "config", None)
    homes = {cls.__module__.partition(".")[0] for cls in type(config).__mro__}
    return hasattr(config, "save_pretrained") and homes.isdisjoint(_LIBRARIES)


def _adapters(module: nn.Module) -> dict[str, Any]:
    """``{name: config}`` of the model's PEFT adapters, if PEFT saves this model."""
    whole = _is_a(module, "peft.peft_model", "PeftModel")
    injected = getattr(module, "_hf_peft_config_loaded", False) and _of_transformers(module)
    return dict(module.peft_config) if whole or injected else {}  # type: ignore[arg-type]


def _altered(module: nn.Module) -> bool:
    """Whether inserted modules changed the names of its tensors; logs a warning if so."""
    layer = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", ())
    kinds = (ParametrizationList, *((layer,) if layer else ()))
    odd = [name for name, child in module.named_modules() if isinstance(child, kinds)]
    if odd:
        log.warning(
            "no config.json beside the weights of %s: %s was inserted into it, so its parameter "
            "names differ",
            type(module).__name__,
            abbreviate(odd),
        )
    return bool(odd)


# ---- configs ----------------------------------------------------------------------------------


def _write_model_config(module: nn.Module, folder: str, dtype: torch.dtype | None) -> None:
    config: Any = copy.deepcopy(module.config)
    if getattr(config, "architectures", False) is None:
        config.architectures = [original_class(module).__name__]
    if dtype is not None and hasattr(config, "dtype"):
        config.dtype = dtype
    config.save_pretrained(folder)
    generation: Any = getattr(module, "generation_config", None)
    if hasattr(generation, "save_pretrained"):
        generation.save_pretrained(folder)


def _write_diffusers_config(module: nn.Module, folder: str) -> None:
    model: Any = module
    config = json.loads(model.to_json_string())
    config["_class_name"] = original_class(module).__name__
    for key in EMA_MODEL:  # a model loaded from a folder of EMAModel has these keys too
        if key not in _arguments(original_class(module)):
            config.pop(key, None)
    with open(os.path.join(folder, model.config_name), "w", encoding="utf-8") as file:
        file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _arguments(cls: Any) -> Collection[str]:
    code = getattr(getattr(cls.__init__, "__wrapped__", cls.__init__), "__code__", None)
    return () if code is None else code.co_varnames


# ---- adapters of PEFT -------------------------------------------------------------------------


def _stem(adapter: str) -> str:
    return ADAPTER if adapter == "default" else f"{adapter}/{ADAPTER}"


def _adapter_form(
    module: nn.Module, models: Sequence[nn.Module], shards: Sequence[Shard], averaged: Any
) -> Form:
    """The names that PEFT's own code gives to the tensors of each adapter.

    It runs on a skeleton of the model: each stand-in in its result identifies a tensor.
    """
    from peft.utils.save_and_load import get_peft_model_state_dict

    made = Skeletons(models, shards, averaged)
    skeleton: Any = made.models[0]
    own = made.state_dict()
    prefix = "" if _is_a(module, "peft.peft_model", "PeftModel") else "base_model.model."
    files: dict[str, tuple[str, str]] = {}
    for adapter in _adapters(module):
        try:
            kept = get_peft_model_state_dict(skeleton, state_dict=own, adapter_name=adapter)
        except (NotImplementedError, RuntimeError) as error:  # a stand-in has no values
            return Form(ADAPTER, {}, _refused(adapter, f"them ({error})", True, False))
        for name, value in kept.items():
            shard = made.shard_of(value)
            place = _stem(adapter), f"{prefix}{name}"
            twice = shard is not None and files.get(shard.fqn, place) != place
            if shard is None or twice or not _ADAPTER_NAME.fullmatch(adapter):
                return Form(ADAPTER, {}, _refused(adapter, name, shard is None, twice))
            files[shard.fqn] = place
    return Form(ADAPTER, files)


def _refused(adapter: str, name: str, computed: bool, twice: bool) -> str:
    why = "its name is not a folder name" if not twice else f"{name} belongs to several adapters"
    if computed:
        why = f"PEFT computes {name} from the weights"
    return (
        f"adapter {adapter!r} cannot be exported: {why}; use ema.full_state_dict(), or "
        "save_pretrained() of the model inside ema.swap()"
    )


def _write_adapter_configs(module: nn.Module, folder: str) -> None:
    whole = _is_a(module, "peft.peft_model", "PeftModel")
    base: Any = module
    if whole:
        base = module.get_base_model()  # type: ignore[operator]
    for adapter, given in _adapters(module).items():
        config = copy.deepcopy(given)
        config.inference_mode = True
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = base.__dict__.get("name_or_path") or None
        mapping = None
        if whole and config.task_type is None:
            cls = original_class(unwrap(base))
            mapping = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
        place = os.path.join(folder, os.path.dirname(_stem(adapter)))
        os.makedirs(place, exist_ok=True)
        config.save_pretrained(place, auto_mapping_dict=mapping)
