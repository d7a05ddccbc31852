"""An export on the Hugging Face Hub: its model card, and its upload.

::

    safetensors metadata, config.json of an export  -card_of->  README.md
    folder                                          -push->     org/name
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from glob import escape, glob
from typing import Any

from safetensors import safe_open

from shardema.errors import CheckpointError, linked
from shardema.files.export import ABOUT
from shardema.files.manifest import NAME
from shardema.files.safetensors import reporting, write_file

try:
    import huggingface_hub
except ImportError as error:
    raise linked(
        ImportError(
            "a model card and a push need huggingface_hub: pip install 'shardema[hub]'",
            name=error.name,
        )
    ) from error

_CARD = "README.md"
_BLOCK = 1 << 24  # bytes that are hashed at a time

_TEXT = """
# {title}

The weights in this repository are an exponential moving average of the weights of a training run,
written by [shardema](https://github.com/shardema/shardema).

| | |
|---|---|
| average | {average} |
| schedule | `{schedule}` |
| updates | {num_updates} |
| progress | {t} {unit}s |
| base model | {base} |

## Load it

```python
{loading}
```

## Fingerprint

| file | sha256 |
|---|---|
{files}
"""


def write_card(
    folder: str | os.PathLike[str], *, title: str | None = None, base_model: str | None = None
) -> None:
    """Writes the README.md of an export. Local: call it on one rank, after the export.

    Args:
        folder: what `ShardedEMA.export` or `export_checkpoint` wrote, complete.
        title: the name of the repository; None: that of the folder.
        base_model: what the run started from: a repository, or any words.

    Raises:
        CheckpointError: no export, or it has a card already.
    """
    folder = os.fspath(folder)
    title = title or os.path.basename(os.path.abspath(folder))
    if os.path.exists(os.path.join(folder, NAME)):
        raise CheckpointError(
            f"card: {folder} is a checkpoint of ema.save; push what ema.export wrote", path=folder
        )
    files = sorted(glob(os.path.join(escape(folder), "*.safetensors")))
    if not files:
        raise CheckpointError(f"card: {folder} has no safetensors file", path=folder)
    about = _about(files[0])
    config = _config(folder)
    base = base_model or config.get("_name_or_path") or None
    rows = (f"| `{os.path.basename(path)}` | `{_sha256(path)}` |" for path in files)
    data = huggingface_hub.ModelCardData(
        library_name=_library(config),
        tags=["shardema", "ema"],
        # the Hub wants the name of a repository there
        base_model=base if base is not None and base.count("/") == 1 and base[0] != "/" else None,
    )
    text = _TEXT.format(
        title=title.rsplit("/", 1)[-1],
        base=f"`{base}`" if base else "not known",
        loading=_loading(config, title),
        files="\n".join(rows),
        **about,
    )
    card = huggingface_hub.ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")
    write_file(os.path.join(folder, _CARD), f"{card}\n".encode())


def push(
    folder: str | os.PathLike[str],
    repository: str,
    *,
    base_model: str | None = None,
    private: bool = False,
) -> str:
    """Uploads an export with its card as one commit; returns its address. Local, as `write_card`.

    The token is that of ``hf auth login`` or ``HF_TOKEN``.

    Args:
        folder: as for `write_card`, which writes the card if there is none.
        repository: ``"org/name"``, new or existing.
        base_model: for the card.
        private: a new repository is private.

    Raises:
        CheckpointError: no export; the Hub refused it, or cannot be reached.
    """
    folder = os.fspath(folder)
    if not os.path.exists(os.path.join(folder, _CARD)):
        write_card(folder, title=repository, base_model=base_model)
    api = huggingface_hub.HfApi()
    try:
        created = api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=created.repo_id,
            folder_path=folder,
            commit_message="An average written by shardema",
        )
    except Exception as error:  # of the network, of the Hub: of many classes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"push to {repository}: {reason}", path=folder) from error
    return str(done.commit_url)


def _about(path: str) -> dict[str, Any]:
    """What the file says of itself; words where it says nothing."""
    unknown = {"average": "", "schedule": "not known", "num_updates": "", "t": "", "unit": "step"}
    with reporting(path, "reading"), safe_open(path, "pt") as file:
        found: dict[str, Any] = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
    rule = found.get("schedule")
    if isinstance(rule, Mapping):
        given = rule.get("params", {})
        params = ", ".join(f"{k}={v}" for k, v in given.items() if k not in ("unit", "samples"))
        found |= {"schedule": f"{rule['name']}({params})", "unit": given.get("unit", "step")}
    return {**unknown, **found}


def _config(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        return {}
    with reporting(path, "reading"), open(path, encoding="utf-8") as file:
        found: dict[str, Any] = json.load(file)
    return found


def _library(config: Mapping[str, Any]) -> str | None:
    if "_class_name" in config:
        return "diffusers"
    return "transformers" if "model_type" in config else None


def _loading(config: Mapping[str, Any], where: str) -> str:
    """The code that loads the export."""
    library, architectures = _library(config), config.get("architectures") or ["AutoModel"]
    name = config["_class_name"] if library == "diffusers" else architectures[0]
    if library is not None:
        return f'from {library} import {name}\n\nmodel = {name}.from_pretrained("{where}")'
    return (
        "from safetensors.torch import load_model\n\n"
        'load_model(model, "model.safetensors")  # a file of this repository; also tied weights'
    )


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with reporting(path, "reading"), open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
