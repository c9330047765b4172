"""The names of the floating-point dtypes that tensors can be converted to. Needs no torch."""

from __future__ import annotations

_OTHER_NAMES = {
    "float64": ("double", "fp64", "f64"),
    "float32": ("float", "fp32", "f32"),
    "float16": ("half", "fp16", "f16"),
    "bfloat16": ("bf16",),
    "float8_e4m3fn": ("float8_e4m3", "fp8_e4m3fn", "fp8_e4m3", "f8_e4m3fn", "f8_e4m3"),
    "float8_e5m2": ("fp8_e5m2", "f8_e5m2"),
}
_TORCH_NAMES = {name: torch_name for torch_name, others in _OTHER_NAMES.items() for name in (torch_name, *others)}


def dtype_name(text: str) -> str:
    """Returns the name in torch of the dtype that ``text`` names: "bfloat16" for "bf16", "BF16" or "torch.bfloat16".

    Raises:
        ValueError: it is not the name of a floating-point dtype.
    """
    name = _TORCH_NAMES.get(text.lower().removeprefix("torch."))
    if name is None:
        choices = ", ".join(f"{name} ({others[0]})" for name, others in _OTHER_NAMES.items())
        raise ValueError(f"{text}: not a floating-point dtype; choose from {choices}")
    return name
