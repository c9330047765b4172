"""Valid but unusual safetensors files.

It has the bytes and the expected tensors, opens no file, and imports no library under test.
"""

from __future__ import annotations

import dataclasses
import struct

from malformed_files import entry, framed, one


@dataclasses.dataclass(frozen=True)
class Oddity:
    """A valid but unusual file. `expected`: name -> (dtype code, shape, bytes)."""

    id: str
    data: bytes
    expected: dict[str, tuple[str, list[int], bytes]]
    metadata: dict[str, str] | None = None


def oddities() -> list[Oddity]:
    body = struct.pack("<f", 1.5)
    weight = {"weight": ("F32", [1], body)}
    plain = f'{{"weight":{entry()}}}'
    spaced = '{ "weight" :\n\t{ "dtype" : "F32" ,\r\n "shape" : [ 1 ] , "data_offsets" : [ 0 , 4 ] } }'
    reordered = '{"weight":{"data_offsets":[0,4],"shape":[1],"dtype":"F32"}}'
    escaped = '{"\\u0077ei\\u0067ht":{"d\\u0074ype":"\\u004632","shape":[1],"data_offsets":[0,4]}}'
    note = '[{"a":[1.5e3,-0,null,true,"\\u0000"]}]'
    unknown = f'{{"weight":{{"note":{note},"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":{{}}}}}}'
    late = f'{{"late":{entry(offsets="[4,8]")},"early":{entry()}}}'
    flag = entry('"BOOL"', "[1]", "[0,1]")
    surrogates = f'{{"\\ud83d\\ude00":{entry()}}}'
    return [
        Oddity("leading-spaces", framed(" " * 5 + plain, body), weight),
        Oddity("leading-tab-and-newline", framed("\t\r\n" + plain, body), weight),
        Oddity("not-padded", framed(plain, body), weight),
        Oddity("trailing-whitespace", framed(plain + " \n\t\r ", body), weight),
        Oddity("padded-by-a-page", framed(plain + " " * 4096, body), weight),
        Oddity("spaces-and-newlines", framed(spaced, body), weight),
        Oddity("fields-in-another-order", framed(reordered, body), weight),
        Oddity("escaped-names", framed(escaped, body), weight),
        Oddity("unknown-field-100-deep", one('{"note":' + "[" * 100 + "]" * 100 + "," + entry()[1:], body), weight),
        Oddity("unknown-fields", framed(unknown, body), weight),
        Oddity("null-metadata", framed(f'{{"__metadata__":null,"weight":{entry()}}}', body), weight),
        Oddity("empty-metadata", framed(f'{{"__metadata__":{{}},"weight":{entry()}}}', body), weight, {}),
        Oddity("metadata-last", framed(f'{plain[:-1]},"__metadata__":{{"a":"b"}}}}', body), weight, {"a": "b"}),
        Oddity("escaped-metadata", framed('{"\\u005f_metadata__":{"\\t":"\\u00e9\\/"}}'), {}, {"\t": "é/"}),
        Oddity(
            "later-tensor-first",
            framed(late, body + bytes(4)),
            {"early": ("F32", [1], body), "late": ("F32", [1], bytes(4))},
        ),
        Oddity("surrogate-pair", framed(surrogates, body), {"\U0001f600": ("F32", [1], body)}),
        Oddity("length-that-begins-like-a-pickle", framed(plain.ljust(640), body), weight),
        Oddity("length-that-begins-like-a-gzip", framed("\t" + plain.ljust(35_614), body), weight),
        Oddity("no-tensor", framed("{}"), {}),
        Oddity("empty-name", framed(f'{{"":{entry()}}}', body), {"": ("F32", [1], body)}),
        Oddity("scalar", one(entry(shape="[]"), body), {"weight": ("F32", [], body)}),
        Oddity("zero-size", one(entry(shape="[3,0,2]", offsets="[0,0]"), b""), {"weight": ("F32", [3, 0, 2], b"")}),
        Oddity(
            "zero-size-and-huge",
            one(entry(shape=f"[{2**62},0,8]", offsets="[0,0]"), b""),
            {"weight": ("F32", [2**62, 0, 8], b"")},
        ),
        Oddity(
            "zero-size-and-2-to-63-minus-1",
            one(entry(shape=f"[{2**63 - 1},0]", offsets="[0,0]"), b""),
            {"weight": ("F32", [2**63 - 1, 0], b"")},
        ),
        Oddity(
            "misaligned",
            framed(f'{{"flag":{flag},"weight":{entry(offsets="[1,5]")}}}', b"\1" + body),
            {"flag": ("BOOL", [1], b"\1"), "weight": ("F32", [1], body)},
        ),
    ]


ODDITIES = oddities()
