"""``python -m safetensors_torch``: the shell command, as ``safetensors-torch``."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
