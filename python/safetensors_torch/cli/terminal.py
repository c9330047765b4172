"""Text for people: names without control characters, tables that fit the terminal, and colours.

Only a terminal shortens names and has colours; a pipe gets every name as it is.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

# Characters of letters and marks that show nothing. str.isprintable() knows those of the other categories: controls,
# directions, joiners, line ends.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
_AMBIGUOUS = re.compile(r"\\|^ | $")
_SHORT_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_STYLES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "blue": 34, "magenta": 35, "cyan": 36}
_STYLE = re.compile("(\x1b\\[[0-9;]*m)")
_GAP = "  "
_LEAST_WIDTH = 12
"""The cells that a shortened column keeps."""


def printable(name: str) -> str:
    """Returns a name as printable_text does, with escapes also for backslashes and for spaces at its ends.

    So different names stay different. Bash reads the escapes between $' and '.
    """
    return printable_text(_AMBIGUOUS.sub(lambda found: {"\\": "\\\\", " ": "\\x20"}[found[0]], name))


def printable_text(text: str) -> str:
    """Returns ``text`` with escapes for characters that are invisible, control a terminal, or cannot be encoded."""
    if text.isascii() and text.isprintable():
        return text
    encoding = _encoding()
    return "".join(c if _is_visible(c, encoding) else _escape(c) for c in text)


def _encoding() -> str:
    return sys.stdout.encoding or "utf-8"


def _is_visible(character: str, encoding: str) -> bool:
    return character.isprintable() and not _INVISIBLE.match(character) and character.encode(encoding, "ignore") != b""


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return _SHORT_ESCAPES.get(character) or f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class Column(NamedTuple):
    """A column of a table."""

    title: str
    """The text above it. A table without titles has no heading."""
    align: Literal["<", ">"] = "<"
    shrink: bool = False
    """Whether its cells may be shortened, in the middle, if the table is too wide for the terminal."""


def is_terminal() -> bool:
    """Returns whether the standard output is a terminal."""
    return sys.stdout.isatty()


def has_colours() -> bool:
    """Returns whether to print colours: on a terminal, unless the environment says otherwise."""
    if os.environ.get("NO_COLOR"):
        return False
    if any(os.environ.get(name, "0") not in ("", "0") for name in ("FORCE_COLOR", "CLICOLOR_FORCE")):
        return True
    return is_terminal() and os.environ.get("TERM") != "dumb"


def styled(text: str, style: str) -> str:
    """Returns ``text`` in a style, such as ``dim`` or ``bold red``, or as it is without colours."""
    if not text or not has_colours():
        return text
    return f"\x1b[{';'.join(str(_STYLES[word]) for word in style.split())}m{text}\x1b[0m"


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[str] | str]) -> None:
    """Prints a table.

    Args:
        columns: the columns.
        rows: for each line its cells, or one text for the whole line. Texts must be printable; they may be styled.
    """
    rows = list(rows)
    if any(column.title for column in columns):
        rows.insert(0, [styled(column.title, "bold") for column in columns])
    cells = [row for row in rows if not isinstance(row, str)]
    texts = [[row[index] for row in cells] for index in range(len(columns))]
    widths = [max(map(display_width, column), default=0) for column in texts]
    if is_terminal():
        _fit(columns, widths, shutil.get_terminal_size().columns)
    aligned = zip(*map(_aligned, columns, texts, widths), strict=True)
    lines = [row if isinstance(row, str) else _GAP.join(next(aligned)).rstrip(" ") for row in rows]
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def _aligned(column: Column, texts: list[str], width: int) -> list[str]:
    """Returns the texts of a column, each in ``width`` cells."""
    if column.shrink:
        texts = [shortened(text, width) for text in texts]
    if column.align == ">":
        return [" " * (width - display_width(text)) + text for text in texts]
    return [text + " " * (width - display_width(text)) for text in texts]


def _fit(columns: Sequence[Column], widths: list[int], most: int) -> None:
    """Takes cells from the widest columns that may shrink, until the table fits or they are at their least."""
    excess = sum(widths) + len(_GAP) * (len(widths) - 1) - most
    shrinking = [index for index, column in enumerate(columns) if column.shrink]
    while excess > 0 and shrinking:
        widest = max(shrinking, key=widths.__getitem__)
        if widths[widest] <= _LEAST_WIDTH:
            return
        widths[widest] -= 1
        excess -= 1


def display_width(text: str) -> int:
    """Returns how many cells of a terminal ``text`` takes."""
    if "\x1b" in text:
        text = _STYLE.sub("", text)
    return len(text) if text.isascii() else sum(map(_character_width, text))


def _character_width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def shortened(text: str, width: int) -> str:
    """Returns ``text`` with an ellipsis in place of its middle, so that it takes at most ``width`` cells."""
    if display_width(text) <= width:
        return text
    pieces = _pieces(text)
    begin, end = 0, len(pieces)
    behind = (width - 1) // 2
    room = width - 1 - behind
    while pieces[begin][1] <= room:
        room -= pieces[begin][1]
        begin += 1
    room += behind
    while pieces[end - 1][1] <= room:
        room -= pieces[end - 1][1]
        end -= 1
    kept = [piece for piece, _ in pieces]
    styles = [piece for piece in kept[begin:end] if _STYLE.fullmatch(piece)]
    ellipsis = "\u2026" if _is_visible("\u2026", _encoding()) else "~"
    return "".join([*kept[:begin], ellipsis, *styles, *kept[end:]])


def _pieces(text: str) -> list[tuple[str, int]]:
    """Returns the styles, and the characters with their combining marks, of ``text``, and the cells of each."""
    pieces: list[tuple[str, int]] = []
    for part in _STYLE.split(text):
        if _STYLE.fullmatch(part):
            pieces.append((part, 0))
            continue
        for character in part:
            cells = _character_width(character)
            if cells == 0 and pieces and pieces[-1][1]:
                character, cells = pieces[-1][0] + character, pieces[-1][1]
                pieces.pop()
            pieces.append((character, cells))
    return pieces
