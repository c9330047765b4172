"""The names of ``safetensors.torch``, for programs that import them from a module of that name."""

from __future__ import annotations

from . import load, load_file, load_model, save, save_file, save_model

__all__ = ["load", "load_file", "load_model", "save", "save_file", "save_model"]
