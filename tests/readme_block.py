"""Prints the code blocks of one language in README.md.

Run: python tests/readme_block.py LANGUAGE
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

text = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
blocks = re.findall(rf"^```{re.escape(sys.argv[1])}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
if not blocks:
    raise SystemExit(f"README.md has no {sys.argv[1]} block")
print("\n".join(blocks))
