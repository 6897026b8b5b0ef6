"""A model of the first blocks of another one: servers whose computing hardly counts, as on GPUs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_BLOCK = re.compile(r"\.layers\.(\d+)\.")


def write_first_blocks(model: Path, blocks: int, folder: Path) -> None:
    """Write a model of the first `blocks` blocks of the one in `model`, with its embedding, norm and head."""
    folder.mkdir()
    config = json.loads((model / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"num_hidden_layers": blocks}))
    for path in model.iterdir():
        if path.name.startswith("tokenizer") or path.name == "generation_config.json":
            shutil.copy(path, folder)
    kept = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no mapping
                found = _BLOCK.search(name)
                if found is None or int(found[1]) < blocks:
                    kept[name] = tensors.get_tensor(name)
    save_file(kept, folder / WEIGHTS, {"format": "pt"})
