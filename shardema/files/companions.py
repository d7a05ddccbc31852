"""What lies beside the weights of a published model: its tokenizer, the rest of its pipeline."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, Literal

from torch import nn

from shardema.errors import ArgumentError, ArgumentTypeError, CheckpointError
from shardema.files.safetensors import reporting

# of tokenizers and processors in the layout of transformers
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".ckpt", ".pt")
Tokenizer = Literal[False] | str | os.PathLike[str] | None  # or an object with save_pretrained


def write_tokenizer(module: nn.Module, tokenizer: Any, place: str) -> None:
    """Writes a tokenizer to the folder of an export. Local.

    Args:
        module: the unwrapped model; if ``tokenizer`` is None, that of the local folder that it was
            loaded from is copied.
        tokenizer: an object with ``save_pretrained``, the folder of one, None, or False: none.
    """
    if tokenizer is False:
        return
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(place)
        return
    found = tokenizer if tokenizer is not None else module.__dict__.get("name_or_path")
    if isinstance(found, str | os.PathLike) and os.path.isdir(found):
        copy_tokenizer(found, place)


def copy_tokenizer(folder: str | os.PathLike[str], place: str) -> list[str]:
    """Copies the files of a tokenizer that are in ``folder``; returns their names."""
    names = [name for name in _TOKENIZER if os.path.isfile(os.path.join(folder, name))]
    for name in names:
        path = os.path.join(folder, name)
        with reporting(path, "copying"):
            shutil.copyfile(path, os.path.join(place, name))
    return names


def check_tokenizer(tokenizer: Any) -> None:
    """Raises TypeError or ValueError for what is no tokenizer."""
    if tokenizer is None or tokenizer is False or hasattr(tokenizer, "save_pretrained"):
        return
    if not isinstance(tokenizer, str | os.PathLike):
        raise ArgumentTypeError(
            f"tokenizer: got {type(tokenizer).__name__}, expected an object with save_pretrained, "
            "a folder, or False"
        )
    if not any(os.path.isfile(os.path.join(tokenizer, name)) for name in _TOKENIZER):
        raise ArgumentError(
            f"tokenizer: {os.fspath(tokenizer)} has none of a tokenizer's files, expected the "
            "folder of tokenizer.save_pretrained"
        )


def into_pipeline(pipeline: str, component: str, out: str, export: Callable[[str], object]) -> None:
    """Writes a copy of a diffusers pipeline with other weights of one component.

    Args:
        pipeline: a folder with a ``model_index.json``.
        component: one of its folders, such as ``"unet"``.
        out: the new folder; appears when it is complete.
        export: writes the component to the new folder that it is given.

    Raises:
        CheckpointError: ``out`` exists, or a file cannot be read or written.
        ValueError: no pipeline, or it has no such component.
    """
    inside = os.path.join(pipeline, component)
    if not os.path.isfile(os.path.join(pipeline, "model_index.json")):
        raise ArgumentError(f"{pipeline} has no model_index.json, expected a pipeline of diffusers")
    if not os.path.isfile(os.path.join(inside, "config.json")):
        known = sorted(_components(pipeline))
        raise ArgumentError(f"{pipeline} has no component {component!r}, expected one of {known}")
    if os.path.lexists(out):
        raise CheckpointError(f"export: {out} exists; give a new folder", path=out)
    parent = os.path.dirname(os.path.abspath(out))
    with reporting(out, "writing"), tempfile.TemporaryDirectory(dir=parent) as place:
        new = os.path.join(place, "pipeline")
        skipped = os.path.abspath(inside)
        shutil.copytree(
            pipeline, new, ignore=lambda at, names: names if os.path.abspath(at) == skipped else ()
        )
        os.rmdir(os.path.join(new, component))
        export(os.path.join(new, component))
        for name in os.listdir(inside):  # its own config, if the export has none
            target = os.path.join(new, component, name)
            if not name.endswith(_WEIGHTS) and not os.path.lexists(target):
                shutil.copyfile(os.path.join(inside, name), target)
        os.rename(new, out)


def _components(pipeline: str) -> Iterator[str]:
    for name in os.listdir(pipeline):
        if os.path.isfile(os.path.join(pipeline, name, "config.json")):
            yield name
