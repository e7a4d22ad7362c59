"""A short mark of a model folder's files, by which a later start notices that they were replaced."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

NUM_SAMPLES, SAMPLE = 64, 4096  # of a large file so many places are read, so many bytes at each
WEIGHTS = ("config.json", "*.safetensors")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt")


def fingerprint(folder: Path, patterns: Iterable[str]) -> str:
    """Hash the names, sizes and contents of a folder's files, of large ones a sample.

    Args:
      folder: local. patterns: of the files that count.
    Returns: 16 hexadecimal digits.
    """
    # The header alone would not do: weights of another training have the same names, shapes and sizes. But they differ nearly
    # everywhere, so that a few places of each file tell, and tens of gigabytes need not be read.
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    found = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        found.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for i in range(NUM_SAMPLES):
                file.seek(max(size - SAMPLE, 0) * i // (NUM_SAMPLES - 1))
                found.update(file.read(SAMPLE))
                if size <= SAMPLE:
                    break
    return found.hexdigest()[:16]
