"""A plugin for vLLM: the load format ``safetensors_torch``, which reads weights with this library.

vLLM calls register, an entry point of the group ``vllm.general_plugins``, in each of its processes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

LOAD_FORMAT = "safetensors_torch"


def register() -> None:
    """Registers the load format: ``vllm serve MODEL --load-format safetensors_torch``."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class SafetensorsTorchModelLoader(DefaultModelLoader):  # type: ignore[misc]
        """vLLM's loader, which finds and downloads the files, with the iterator of this library.

        Files that are not safetensors are read by vLLM. On network filesystems each process of a distributed engine
        begins with another file.
        """

        def __init__(self, load_config: Any) -> None:
            # vLLM's loader refuses formats that it does not know.
            known = copy.copy(load_config)
            known.load_format = "safetensors"
            super().__init__(known)
            self._found: tuple[list[str], bool] = [], False

        def _prepare_weights(self, *args: Any, **kwargs: Any) -> Any:
            # The directory, its files, whether they are safetensors, and more in later versions.
            result = super()._prepare_weights(*args, **kwargs)
            self._found = list(result[1]), bool(result[2])
            return result

        def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, torch.Tensor]]:
            # A generator that has not read anything yet.
            theirs = super()._get_weights_iterator(source)
            files, are_safetensors = self._found
            if not are_safetensors:
                return theirs
            from .distributed import weights_iterator

            tensors = weights_iterator(sorted(files), progress=bool(self.load_config.use_tqdm_on_load) or None)
            return ((source.prefix + name, tensor) for name, tensor in tensors)

    register_model_loader(LOAD_FORMAT)(SafetensorsTorchModelLoader)
