"""Loading a model folder's tokenizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

__all__ = ["load_tokenizer"]


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """Load the tokenizer that lies in a model folder.

    Where none of its files is there, transformers makes one of the model's kind with an empty vocabulary, to which
    every word is unknown.

    Args:
        folder: Hugging Face model folder.

    Raises:
        ValueError: no tokenizer there.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"model must be a folder with its tokenizer, got {str(folder)!r}: {error}") from error
    files = tuple(getattr(tokenizer, "vocab_files_names", {}).values())  # none for those that read bytes
    if files and not any((Path(folder) / name).is_file() for name in files):
        raise ValueError(f"model must be a folder with its tokenizer, got {str(folder)!r} without {' or '.join(files)}")
    return tokenizer
