"""What an S3T system serves, as PEFT adapters that load without pymape."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from pymape.losses import task_of
from pymape.s3t.adapters import SlicedAdapters
from pymape.s3t.config import Combination, S3TConfig
from pymape.s3t.ensemble import LANGUAGE_TASKS, Chain, live_chains, merge_chain, shard_weights
from pymape.s3t.erasure import INDEX, erase_folder
from pymape.s3t.frozen_base import load_base
from pymape.s3t.ledger.exports import PARTIAL
from pymape.storage.files import sync_tree, umask
from pymape.storage.store import file_hash

__all__ = ["export_ensemble"]

FORMAT = "pymape.s3t-export.1"
README = "README.md"

_TEXT = """\
# {count} LoRA adapters, one model

Every `shard-*` folder is a PEFT adapter of the same frozen base model. `ensemble.json` names the base with its sha256
and says what each adapter counts for. Run in this folder, this needs transformers and peft only:

```python
import json, torch, transformers
from peft import PeftModel

index = json.load(open("ensemble.json"))
base = getattr(transformers, index["base"]["class"]).from_pretrained(index["base"]["folder"]{options})
names = [shard["folder"] for shard in index["shards"]]
weights = torch.tensor([shard["weight"] for shard in index["shards"]])
model = PeftModel.from_pretrained(base, names[0], adapter_name=names[0])
for name in names[1:]:
    model.load_adapter(name, adapter_name=name)

@torch.inference_mode()
def predict(**inputs):
    logits = [(model.set_adapter(name), model(**inputs).logits)[1] for name in names]
    return {combine}
```

A deletion makes these files out of date: the system that wrote them erases them then, but not copies made of them.
"""

_COMBINE = {
    "logits": 'torch.einsum("s,s...->...", weights, torch.stack(logits))',
    "tokens": 'torch.einsum("s,s...->...", weights, torch.stack(logits).softmax(-1)).log()',
    "vote": "torch.nn.functional.one_hot(torch.stack(logits).argmax(-1), logits[0].shape[-1]).sum(0)  # votes",
}


def export_ensemble(
    folder: str | os.PathLike[str],
    config: S3TConfig,
    chains: Mapping[int, Chain],
    *,
    sha256: str | None = None,
    combination: Combination = "mean",
    sizes: Mapping[int, int] | None = None,
    begin: Callable[[Path], AbstractContextManager[object]] | None = None,
    place: Callable[[list[dict[str, str]]], AbstractContextManager[object]] | None = None,
) -> list[dict[str, str]]:
    """Write the live shards as PEFT adapters, whole or not at all.

    For every live shard there is a folder `shard-NN` with `adapter_config.json` and `adapter_model.safetensors`, as
    `PeftModel.from_pretrained` loads it; beside them an index, `ensemble.json`, and a README with the lines of Python
    that use them.

    Args:
        folder: a new folder, or one without files.
        config: of the system; its base model is named to those who load the export.
        chains: shard -> tensors of its served stages, root first; a shard without stages is left out.
        sha256: `base_hash` that the base model must have.
        combination: as `Ensemble`.
        sizes: as `Ensemble`.
        begin: makes a context, entered with the temporary folder before anything is in it, left when it is gone.
        place: makes a context from the result, entered once all is written, in which it is moved to `folder`. An error
            on the way in or out leaves nothing there.

    Returns:
        {"file": path inside the folder, "sha256": of the file} of each, with the index also its "export": a random name
        of this export, which tells it from others in the same place.

    Raises:
        ValueError: no live shard, another base, chains that do not fit it, or a folder that has files or cannot be
            written.
    """
    target = Path(folder).resolve()
    live = live_chains(chains)
    weights = shard_weights(list(live), combination, sizes)
    _check_free(target)
    adapters = SlicedAdapters(load_base(config.model, config.labels, sha256), config)
    ancestor = next(parent for parent in target.parents if os.path.lexists(parent))
    try:
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=PARTIAL, dir=ancestor))
    except OSError as error:
        raise ValueError(f"folder must be one that can be written, got {str(folder)!r}: {error.strerror}") from error
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(shutil.rmtree, stage, ignore_errors=True)
        if begin is not None:
            cleanup.enter_context(begin(stage))
        cleanup.callback(_erase, stage)
        shards = []
        for (shard, chain), weight in zip(live.items(), weights, strict=True):
            own = stage / f"shard-{shard:02d}"
            _write_adapter(own, adapters, chain, config.model)
            layers = list(range(adapters.first_layer(len(chain)), adapters.layers))
            facts = {"folder": own.name, "shard": shard, "depth": len(chain), "layers": layers, "weight": weight}
            shards.append(facts)
        base = {"folder": config.model, "class": type(adapters.base).__name__, "sha256": adapters.base_hash()}
        export = secrets.token_hex(16)
        index = {"format": FORMAT, "export": export, "base": base, "combination": combination, "shards": shards}
        (stage / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        (stage / README).write_text(_readme(adapters, config, combination, len(shards)), encoding="utf-8")
        paths = sorted(path for path in stage.rglob("*") if path.is_file())
        files = [{"file": path.relative_to(stage).as_posix(), "sha256": file_hash(path)} for path in paths]
        next(entry for entry in files if entry["file"] == INDEX)["export"] = export
        stage.chmod(0o777 & ~umask())
        sync_tree(stage)
        moved = False
        try:
            with contextlib.nullcontext() if place is None else place(files):
                _move(stage, target)
                moved = True
        except BaseException:
            if moved:
                _erase(target)
            raise
    return files


def _move(stage: Path, target: Path) -> None:
    """Move an export to where it belongs; an error leaves nothing of it there, and what others have put there."""
    _check_free(target)
    for left in sorted(target.rglob("*"), reverse=True):  # an erased export leaves folders without files
        left.rmdir()
    target.parent.mkdir(parents=True, exist_ok=True)
    stage.rename(target)
    try:
        sync_tree(target.parent, deep=False)
    except BaseException:
        _erase(target)
        raise


def _erase(folder: Path) -> None:
    """Erase a folder; what cannot be overwritten is deleted at least."""
    with contextlib.suppress(OSError):
        erase_folder(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _write_adapter(folder: Path, adapters: SlicedAdapters, chain: Chain, base_folder: str) -> None:
    adapters.load(chain)  # refuses what does not fit the base
    settings: Any = adapters.export_config(len(chain))
    settings.base_model_name_or_path = base_folder
    settings.target_modules = sorted(settings.target_modules)  # a set, which PEFT would write in any order
    settings.save_pretrained(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in merge_chain(chain).items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def _readme(adapters: SlicedAdapters, config: S3TConfig, combination: Combination, count: int) -> str:
    means = "tokens" if task_of(adapters.base) in LANGUAGE_TASKS else "logits"
    options = "" if config.labels is None else f", num_labels={config.labels}, ignore_mismatched_sizes=True"
    return _TEXT.format(count=count, options=options, combine=_COMBINE["vote" if combination == "vote" else means])


def _check_free(folder: Path) -> None:
    if os.path.ismount(folder):
        raise ValueError(
            f"folder must be one that can be replaced, got the mount point {str(folder)!r}: name one in it"
        )
    if folder.is_dir():
        found = next((path for path in sorted(folder.rglob("*")) if not path.is_dir()), None)
    else:
        found = folder if os.path.lexists(folder) else None
    if found is not None:
        raise ValueError(f"folder must be new or without files, got {str(folder)!r} with {found.name!r}")
