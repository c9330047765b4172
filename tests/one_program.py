"""Combines several C++ programs into one, which calls their `main` functions by name. The headers of torch, which take
most of the compiler's time, are then parsed once.

Run: python tests/one_program.py SOURCE... >all.cpp

Each source becomes a namespace, and its includes move to the top. The only argument of the program is the name of a
source without its suffix.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

TOP = re.compile(r"^#include .*$", re.MULTILINE)

sources = [Path(argument) for argument in sys.argv[1:]]
texts = [source.read_text(encoding="utf-8") for source in sources]
includes = dict.fromkeys(line for text in texts for line in TOP.findall(text))
print("\n".join([*includes, "#include <cstring>"]))
for source, text in zip(sources, texts, strict=True):
    if text.count("int main() {\n") != 1 or not text.endswith("\n}\n"):
        raise SystemExit(f"{source} does not end with an `int main()` without arguments")
    # Only a program's own main may end without a return.
    body = TOP.sub("", text).removesuffix("}\n") + "return 0;\n}\n"
    print(f'namespace program_{source.stem} {{\n#line 1 "{source.name}"\n{body}}}')
print("int main(int, char** arguments) {")
for source in sources:
    print(f'if (std::strcmp(arguments[1], "{source.stem}") == 0) return program_{source.stem}::main();')
print("return 2;\n}")
