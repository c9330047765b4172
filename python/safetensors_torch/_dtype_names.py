"""The names that torch, the format and people have for a dtype. Needs no torch."""

from __future__ import annotations

import re

# How the format's codes ("BF16", "I64") and other short names begin, and how torch's do.
_KINDS = {"bf": "bfloat", "f": "float", "fp": "float", "i": "int", "u": "uint", "c": "complex"}
_KIND = re.compile("^(bf|fp|f|i|u|c)(?=[0-9])")
_OTHERS = {
    "half": "float16",
    "float": "float32",
    "double": "float64",
    "float4": "float4_e2m1fn_x2",
    "float8_e4m3": "float8_e4m3fn",
    "float8_e8m0": "float8_e8m0fnu",
}


def dtype_name(text: str) -> str:
    """Returns torch's name for a dtype: "bfloat16" for "bf16", "BF16" or "torch.bfloat16".

    An unknown name is returned as it is, without "torch." and in lower case.
    """
    name = _KIND.sub(lambda kind: _KINDS[kind[1]], text.lower().removeprefix("torch."))
    return _OTHERS.get(name, name)
