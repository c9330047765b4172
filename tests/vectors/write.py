"""Writes malformed/ from the table of malformed files.

Run: python tests/vectors/write.py

Which status each file must get stands in malformed.tsv, which is written by hand: a reader under test must not say it.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "python"))

from malformed_files import MALFORMED  # noqa: E402

directory = HERE / "malformed"
directory.mkdir(exist_ok=True)
for old in directory.glob("*.safetensors"):
    old.unlink()
for case in MALFORMED:
    (directory / f"{case.id}.safetensors").write_bytes(case.data)
listed = {line.split("\t")[0] for line in (HERE / "malformed.tsv").read_text().splitlines()}
for name in sorted({case.id for case in MALFORMED} ^ listed):
    print(f"malformed.tsv and the table do not agree on {name}")
