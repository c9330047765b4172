"""``python -m safetensors_torch``: runs the shell command of the package cli."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
