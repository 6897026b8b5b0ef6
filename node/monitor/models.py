"""The output of `python -m node models`: the models in the cache, their sizes and last uses."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

from node.config import DEFAULT_MODEL
from node.model.checkpoint.disk.plan import in_units
from node.runtime.console import put_line

if TYPE_CHECKING:
    from node.model.checkpoint.source import KnownModel


def fetch_model(name: str, max_disk_bytes: int | None = None) -> None:
    """Fetch a model into the cache, with a progress bar.  Raises ConfigError."""
    from node.model.checkpoint.progress import progress_bar
    from node.model.checkpoint.source import cache_dir, resolve

    with progress_bar(sys.stderr) as progress:
        folder = resolve(name, cache_dir=cache_dir(), progress=progress, max_disk_bytes=max_disk_bytes)
        folder.need({entry.file for entry in folder.tensors.values()}, progress)
    put_line(f"{folder.name} (revision {folder.revision}) is in {folder.path}")


def show_models(*, as_json: bool, max_disk_bytes: int | None = None) -> None:
    """Print the models in the cache, with sizes and last uses, and the default.

    max_disk_bytes: first remove the models unused for longest that are above it.  Raises ConfigError.
    """
    from node.model.checkpoint.disk.model_cache import ModelCache
    from node.model.checkpoint.source import cache_dir, list_models

    cache = ModelCache(cache_dir(), max_disk_bytes)
    cache.trim()
    found = list_models(cache.root)
    if as_json:
        models = [
            {
                "name": model.name,
                "revision": model.revision or None,
                "path": None if model.path is None else str(model.path),
                "bytes": model.size,
                "last_used": model.last_used or None,
                "in_use": model.in_use,
            }
            for model in found
        ]
        facts = {
            "default": DEFAULT_MODEL, "cache": str(cache.root), "bytes": cache.nbytes, "models": models,
        }  # fmt: skip
        put_line(json.dumps(facts, indent=2))
        return
    bound = "" if max_disk_bytes is None else f", of at most {in_units(max_disk_bytes)}"
    put_line(f"cache: {cache.root}, {in_units(cache.nbytes)}{bound}")
    for model in found:
        put_line(f"  {_model_line(model)}{', the default' if model.name == DEFAULT_MODEL else ''}")


def _model_line(model: KnownModel) -> str:
    if model.path is None and not model.size:
        return f"{model.name}: not fetched yet"
    where = f" in {model.path}" if model.path is not None else " of a download that did not end"
    used = "now" if model.in_use else time.strftime("%Y-%m-%d %H:%M", time.localtime(model.last_used))
    revision = f" ({model.revision[:8]})" if model.revision and model.path is not None else ""
    return (
        f"{model.name}{revision}: {in_units(model.size)}{where}, used {used if model.last_used else 'never'}"
    )
