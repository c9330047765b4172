"""A table of malformed safetensors files.

It has the bytes and the expected messages, opens no file, and imports no library under test.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import pickle
import struct
import zipfile

import numpy as np

U64_MAX = 2**64 - 1


@dataclasses.dataclass(frozen=True)
class Malformed:
    """A malformed file. The reader's message must match the regular expression `says`.

    `stricter` marks the files that the reference accepts.
    """

    id: str
    data: bytes
    says: str
    stricter: bool = False


def framed(header: str | bytes, body: bytes = b"") -> bytes:
    """Returns a file with this header, unpadded, and its true length."""
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw)) + raw + body


def entry(dtype: str = '"F32"', shape: str = "[1]", offsets: str = "[0,4]") -> str:
    """Returns the JSON object of one tensor, from JSON fragments."""
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}'


def one(tensor: str, body: bytes = bytes(4), name: str = "weight") -> bytes:
    """Returns a file with one tensor, from its JSON object."""
    return framed(f'{{"{name}":{tensor}}}', body)


def pair(first: str, second: str, body: bytes) -> bytes:
    """Returns a file with the U8 tensors `early` and `late`, with these data offsets."""
    tensors = []
    for name, offsets in (("early", first), ("late", second)):
        begin, end = json.loads(offsets)
        tensors.append(f'"{name}":' + entry('"U8"', f"[{end - begin}]", offsets))
    return framed("{" + ",".join(tensors) + "}", body)


VALID = one(entry())


def lengths() -> list[Malformed]:
    header = VALID[8:-4]
    cases = [Malformed("empty", b"", r"(?i)\b0 byte|empty")]
    cases += [Malformed(f"only-{n}-bytes", VALID[:n], rf"(?i)\b{n} byte") for n in range(1, 8)]
    cases += [
        Malformed("length-alone", VALID[:8], r"(?i)header"),
        Malformed("length-past-the-end", struct.pack("<Q", len(header) + 5) + header + bytes(4), r"(?i)header"),
        Malformed("length-u64-max", struct.pack("<Q", U64_MAX) + header + bytes(4), str(U64_MAX)),
        Malformed("length-i64-max", struct.pack("<Q", 2**63 - 1) + header + bytes(4), str(2**63 - 1)),
        Malformed("length-that-wraps-with-8", struct.pack("<Q", U64_MAX - 7) + header, str(U64_MAX - 7)),
        Malformed("length-over-the-limit", struct.pack("<Q", 100_000_001) + header, "100000001|100,000,001"),
        Malformed("length-at-the-limit", struct.pack("<Q", 100_000_000) + header, "100000000|100,000,000"),
        Malformed("length-big-endian", struct.pack(">Q", len(header)) + header + bytes(4), r"(?i)header"),
        Malformed("length-zero", bytes(8), r"(?i)header"),
        Malformed("length-zero-with-data", bytes(8) + header, r"(?i)header"),
        Malformed("length-one", framed("{"), r"(?i)header|JSON"),
        Malformed("header-cut-in-the-middle", VALID[: 8 + len(header) // 2], r"(?i)header"),
        Malformed("header-one-byte-short", VALID[: 8 + len(header) - 1], r"(?i)header"),
        # The lengths 640 and 35,615 begin like a pickle and a gzip file, and are valid.
        Malformed("length-640-cut", struct.pack("<Q", 640) + header.ljust(300), "header.*cut short"),
        Malformed("length-35615-cut", struct.pack("<Q", 35_615) + header.ljust(300), "header.*cut short"),
        Malformed("length-one-too-small", struct.pack("<Q", len(header) - 1) + header + bytes(4), r"(?i)header|JSON"),
    ]
    return cases


def documents() -> list[Malformed]:
    """Returns headers that are not one JSON object in UTF-8."""
    good = VALID[8:-4]
    four = bytes(4)
    headers: list[tuple[str, bytes]] = [
        ("array", b'[{"dtype":"F32"}]'),
        ("string", b'"weight"'),
        ("number", b"42"),
        ("null", b"null"),
        ("true", b"true"),
        ("spaces-alone", b" " * 16),
        ("trailing-garbage", good + b" x"),
        ("trailing-comma-in-object", good[:-1] + b",}"),
        ("trailing-comma-in-list", one(entry(shape="[1,]"))[8:-4]),
        ("second-object", good + b"{}"),
        ("second-brace", good + b"}"),
        ("single-quotes", good.replace(b'"', b"'")),
        ("bare-names", b"{weight:" + entry().encode() + b"}"),
        ("comment", good[:-1] + b"/* note */}"),
        ("nan", one(entry(shape="[NaN]"))[8:-4]),
        ("infinity", one(entry(shape="[Infinity]"))[8:-4]),
        ("leading-zero", one(entry(shape="[01]"))[8:-4]),
        ("hexadecimal", one(entry(shape="[0x1]"))[8:-4]),
        ("plus-sign", one(entry(shape="[+1]"))[8:-4]),
        ("unterminated-object", good[:-1]),
        ("unterminated-string", b'{"weight'),
        ("missing-colon", good.replace(b'"weight":', b'"weight" ')),
        ("missing-comma", good.replace(b',"shape"', b' "shape"')),
        ("null-byte-first", bytes(1) + good),
        ("control-character-in-name", good.replace(b"weight", b"wei\nght")),
        ("bad-escape", good.replace(b"weight", b"wei\\qght")),
        ("short-unicode-escape", good.replace(b"weight", b"wei\\u12")),
        ("lone-high-surrogate", good.replace(b"weight", b"\\ud800")),
        ("lone-low-surrogate", good.replace(b"weight", b"\\udc00")),
        ("high-surrogate-twice", good.replace(b"weight", b"\\ud83d\\ud83d")),
        ("nested-10000-at-top-level", b"[" * 10_000 + b"]" * 10_000),
        ("nested-10000-objects-at-top-level", b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
        ("nested-10000-in-a-shape", one(entry(shape="[" * 10_000 + "]" * 10_000))[8:-4]),
        ("nested-10000-in-an-unknown-field", one('{"note":' + "[" * 10_000 + "]" * 10_000 + "," + entry()[1:])[8:-4]),
        (
            "nested-10000-objects-in-an-unknown-field",
            one('{"note":' + '{"a":' * 10_000 + "1" + "}" * 10_000 + "," + entry()[1:])[8:-4],
        ),
        ("nested-10000-unterminated-in-unknown-field", one('{"note":' + "[" * 10_000 + "}")[8:-4]),
    ]
    cases = [Malformed(f"json-{name}", framed(header, four), r"(?i)JSON|header|tensor \"") for name, header in headers]
    cases += [
        Malformed("json-null-padded", framed(good + bytes(8), four), r"padded with NUL bytes.*spaces"),
        Malformed("json-all-null", framed(bytes(len(good)), four), r"all zeros.*never written"),
    ]
    utf8: list[tuple[str, bytes]] = [
        ("invalid-byte", good.replace(b"weight", b"wei\xffght")),
        ("cut-sequence", good.replace(b"weight", b"wei\xe2\x82")),
        ("overlong", good.replace(b"weight", b"wei\xc0\xafght")),
        ("surrogate", good.replace(b"weight", b"wei\xed\xa0\x80ght")),
        ("latin-1", good.replace(b"weight", "größe".encode("latin-1"))),
        ("in-metadata", b'{"__metadata__":{"note":"\xff"},' + good[1:]),
        ("in-unknown-field", good[:-2] + b',"note":"\xff"}}'),
    ]
    cases += [Malformed(f"utf8-{name}", framed(header, four), r"UTF-?8") for name, header in utf8]
    cases += [
        Malformed("utf16", framed(good.decode().encode("utf-16-le"), four), r"(?i)header|JSON"),
        Malformed("utf8-bom", framed(b"\xef\xbb\xbf" + good, four), r"(?i)header|JSON"),
    ]
    return cases


def offsets() -> list[Malformed]:
    cases = [
        Malformed("offsets-reversed", one(entry('"U8"', "[4]", "[4,0]")), "weight"),
        Malformed("offsets-hole", pair("[0,4]", "[8,12]", bytes(12)), "late"),
        Malformed("offsets-overlap", pair("[0,4]", "[2,6]", bytes(6)), "late"),
        Malformed("offsets-same-range-twice", pair("[0,4]", "[0,4]", bytes(4)), "early|late"),
        Malformed("offsets-nested-range", pair("[0,8]", "[2,4]", bytes(8)), "late"),
        Malformed("offsets-gap-at-start", one(entry(offsets="[4,8]"), bytes(8)), "weight"),
        Malformed("offsets-zero-size-beyond-the-rest", pair("[0,4]", "[9,9]", bytes(4)), "late"),
        Malformed("offsets-zero-size-inside-another", pair("[0,4]", "[2,2]", bytes(4)), "late"),
        Malformed("offsets-beyond-the-end", one(entry(shape="[8]", offsets="[0,32]")), r"(?i)\b32\b"),
        Malformed("offsets-huge", one(entry('"U8"', f"[{2**62}]", f"[0,{2**62}]")), str(2**62)),
        Malformed("offsets-u64-max", one(entry('"U8"', f"[{U64_MAX}]", f"[0,{U64_MAX}]")), r"weight|\d{19}"),
        Malformed("offsets-begin-u64-max", one(entry('"U8"', "[0]", f"[{U64_MAX},{U64_MAX}]")), "weight"),
    ]
    for name, text in {
        "none": "[]",
        "one-element": "[0]",
        "three-elements": "[0,4,4]",
        "floats": "[0.0,4.0]",
        "exponent": "[0,4e0]",
        "negative": "[-4,0]",
        "negative-zero": "[-0,4]",
        "strings": '["0","4"]',
        "null": "null",
        "nulls": "[null,null]",
        "booleans": "[false,true]",
        "number": "4",
        "object": '{"begin":0,"end":4}',
        "nested": "[[0,4]]",
        "overflow-u64": f"[0,{2**64}]",
        "overflow-by-far": "[0,1" + "0" * 400 + "]",
    }.items():
        cases.append(Malformed(f"offsets-{name}", one(entry(offsets=text)), "data_offsets|weight"))
    return cases


def shapes() -> list[Malformed]:
    cases = []
    for name, text in {
        "negative": "[-1]",
        "float": "[1.0]",
        "string": '["1"]',
        "null": "null",
        "null-inside": "[null]",
        "nested": "[[1]]",
        "number": "1",
        "object": "{}",
        "true": "[true]",
        "overflow-u64": f"[{2**64}]",
    }.items():
        cases.append(Malformed(f"shape-{name}", one(entry(shape=text)), "shape|weight"))
    cases += [
        Malformed("shape-overflow-product", one(entry(shape=f"[{2**40},{2**40}]")), "weight"),
        Malformed("shape-overflow-bytes", one(entry('"F64"', f"[{2**61}]", "[0,4]")), "weight"),
        Malformed("shape-wraps-to-the-right-size", one(entry('"U8"', f"[{2**32},{2**32}]", "[0,0]"), b""), "weight"),
        Malformed(
            "shape-overflow-before-a-zero", one(entry(shape=f"[{2**40},{2**40},0]", offsets="[0,0]"), b""), "weight"
        ),
        Malformed("shape-zero-and-2-to-63", one(entry(shape=f"[0,{2**63}]", offsets="[0,0]"), b""), "weight", True),
        Malformed("shape-zero-and-u64-max", one(entry(shape=f"[0,{U64_MAX}]", offsets="[0,0]"), b""), "weight", True),
        Malformed("shape-strides-overflow", one(entry(shape=f"[0,{2**62},8]", offsets="[0,0]"), b""), "weight", True),
        Malformed("size-too-many-elements", one(entry(shape="[2]")), "weight"),
        Malformed("size-too-few-elements", one(entry(shape="[1]", offsets="[0,8]"), bytes(8)), "weight"),
        Malformed("size-scalar-of-two", one(entry(shape="[]", offsets="[0,8]"), bytes(8)), "weight"),
        Malformed("size-zero-with-bytes", one(entry(shape="[0]", offsets="[0,4]")), "weight"),
        Malformed("size-of-another-dtype", one(entry('"F16"', "[1]", "[0,4]")), "weight"),
        Malformed("f4-odd-bits", one(entry('"F4"', "[3]", "[0,2]"), bytes(2)), "weight"),
        Malformed("f4-odd-bits-rounded-down", one(entry('"F4"', "[3]", "[0,1]"), bytes(1)), "weight"),
        Malformed("f4-scalar", one(entry('"F4"', "[]", "[0,1]"), bytes(1)), "weight"),
        Malformed("f6-not-byte-aligned", one(entry('"F6_E2M3"', "[3]", "[0,3]"), bytes(3)), "weight"),
        Malformed("f6-e3m2-not-byte-aligned", one(entry('"F6_E3M2"', "[2]", "[0,1]"), bytes(1)), "weight"),
    ]
    return cases


def dtypes() -> list[Malformed]:
    cases = []
    for name, text in {
        "unknown": '"F128"',
        "lower-case": '"f32"',
        "torch-name": '"torch.float32"',
        "empty": '""',
        "spaces": '" F32 "',
        "null-terminated": '"F32\\u0000"',
        "null": "null",
        "number": "32",
        "list": '["F32"]',
        "object": "{}",
    }.items():
        cases.append(Malformed(f"dtype-{name}", one(entry(text)), "dtype|weight"))
    return cases


def entries() -> list[Malformed]:
    """Returns headers with missing fields, entries that are not objects, and duplicates."""
    again = f'"weight":{entry()}'
    small = entry('"U8"', "[2]", "[0,2]")
    cases = [
        Malformed("missing-dtype", one('{"shape":[1],"data_offsets":[0,4]}'), "dtype"),
        Malformed("missing-shape", one('{"dtype":"F32","data_offsets":[0,4]}'), "shape"),
        Malformed("missing-data-offsets", one('{"dtype":"F32","shape":[1]}'), "data_offsets"),
        Malformed("missing-all", one("{}"), "weight|dtype"),
        Malformed("field-in-capitals", one('{"DTYPE":"F32","shape":[1],"data_offsets":[0,4]}'), "dtype"),
        Malformed("entry-null", one("null"), "weight|object"),
        Malformed("entry-number", one("4"), "weight|object"),
        Malformed("entry-string", one('"F32"'), "weight|object"),
        Malformed("entry-list", one('["F32",[1],[0,4]]'), "weight|object", True),
        Malformed("entry-empty-list", one("[]"), "weight|object"),
        Malformed("twice-name", framed("{" + again + "," + again + "}", bytes(4)), "weight", True),
        Malformed(
            "twice-name-disjoint",
            framed('{"weight":' + small + ',"weight":' + entry('"U8"', "[2]", "[2,4]") + "}", bytes(4)),
            "weight",
        ),
        Malformed("twice-name-escaped", framed(f'{{"a":{small},"\\u0061":{small}}}', bytes(2)), '"?a"?', True),
        Malformed("twice-name-empty", framed(f'{{"":{small},"":{small}}}', bytes(2)), 'named ""', True),
        Malformed("twice-dtype", one('{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}'), "dtype"),
        Malformed("twice-shape", one('{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}'), "shape"),
        Malformed(
            "twice-data-offsets",
            one('{"dtype":"F32","shape":[1],"data_offsets":[0,4],"data_offsets":[0,4]}'),
            "data_offsets",
        ),
        Malformed(
            "twice-dtype-escaped", one('{"dtype":"F32","\\u0064type":"F32","shape":[1],"data_offsets":[0,4]}'), "dtype"
        ),
    ]
    for name, text in {
        "list": '["format","pt"]',
        "string": '"pt"',
        "number": "1",
        "value-number": '{"format":1}',
        "value-null": '{"format":null}',
        "value-true": '{"format":true}',
        "value-list": '{"format":["pt"]}',
        "value-object": '{"format":{"name":"pt"}}',
        "value-object-like-a-tensor": entry(),
    }.items():
        cases.append(
            Malformed(f"metadata-{name}", framed(f'{{"__metadata__":{text}}}'), "__metadata__|format|metadata")
        )
    cases += [
        Malformed("metadata-key-twice", framed('{"__metadata__":{"format":"pt","format":"tf"}}'), "format", True),
        Malformed("metadata-key-twice-escaped", framed('{"__metadata__":{"a":"1","\\u0061":"2"}}'), '"?a"?', True),
        Malformed("metadata-twice", framed('{"__metadata__":{},"__metadata__":{}}'), "__metadata__"),
        Malformed("metadata-twice-null", framed('{"__metadata__":null,"__metadata__":null}'), "__metadata__"),
        Malformed("metadata-twice-escaped", framed('{"__metadata__":{},"\\u005f_metadata__":{}}'), "__metadata__"),
    ]
    return cases


def bodies() -> list[Malformed]:
    return [
        Malformed("body-missing", VALID[:-4], r"\b4\b"),
        Malformed("body-one-byte-short", VALID[:-1], r"\b1\b|\b3\b"),
        Malformed("body-one-byte-long", VALID + b"\0", r"\b1\b|\b5\b"),
        Malformed("body-whole-page-long", VALID + bytes(4096), r"\b4096\b|\b4100\b"),
        Malformed("body-without-tensors", framed("{}      ") + bytes(8), r"\b8\b"),
        Malformed("body-file-twice", VALID + VALID, r"\b\d+ bytes?"),
        Malformed("body-behind-zero-size", one(entry(shape="[0]", offsets="[0,0]"), bytes(4)), r"\b4\b"),
    ]


def foreign() -> list[Malformed]:
    """Returns files of other formats, which people rename or download by mistake."""
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 497764120\n"
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        entry_of_1980 = zipfile.ZipInfo("archive/data.pkl")
        writer.writestr(entry_of_1980, pickle.dumps({"weight": 1}, protocol=4))
    array = io.BytesIO()
    np.save(array, np.zeros(64, np.float32))
    state = {"weight": [0.0] * 64}
    error = json.dumps({"error": "Repository not found", "statusCode": 404}, indent=2).encode()
    return [
        Malformed("foreign-git-lfs", lfs, r"(?i)git[ -]lfs pull"),
        Malformed("foreign-html", b"<!DOCTYPE html>\n<html><head><title>401</title></head></html>\n", "HTML"),
        Malformed("foreign-html-lower-case", b"<html lang='en'><body>Not Found</body></html>", "HTML"),
        Malformed("foreign-html-after-newlines", b"\n\n  <!doctype html><title>Sign in</title>", "HTML"),
        Malformed("foreign-entry-not-found", b"Entry not found", "server's answer.*fetch it again"),
        Malformed("foreign-unauthorized", b"Invalid username or password.", "server's answer.*access token"),
        Malformed("foreign-not-found", b"404: Not Found", "server's answer"),
        Malformed("foreign-xml", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "(?i)XML|HTML"),
        Malformed("foreign-zip", archive.getvalue(), r"(?i)\bzip\b.*torch"),
        Malformed("foreign-pickle-protocol-2", pickle.dumps(state, protocol=2), "(?i)pickle"),
        Malformed("foreign-pickle-protocol-4", pickle.dumps(state, protocol=4), "(?i)pickle"),
        Malformed("foreign-gguf", b"GGUF" + struct.pack("<IQQ", 3, 291, 24) + bytes(64), r"GGUF|(?i:header)"),
        Malformed("foreign-gzip", gzip.compress(VALID * 8, mtime=0), r"gzip|(?i:header)"),
        Malformed("foreign-elf", b"\x7fELF\x02\x01\x01" + bytes(57), r"ELF|(?i:header)"),
        Malformed("foreign-npy", array.getvalue(), r"(?i)numpy|npy|header"),
        Malformed("foreign-hdf5", b"\x89HDF\r\n\x1a\n" + bytes(88), r"(?i)HDF5|header"),
        Malformed("foreign-png", b"\x89PNG\r\n\x1a\n" + bytes(88), r"(?i)PNG|header"),
        Malformed("foreign-tar", b"model/".ljust(257, b"\0") + b"ustar\x0000" + bytes(248), r"(?i)tar|header"),
        Malformed("foreign-text", b"Dear reader, this is a letter and no model.\n", r"(?i)text|header"),
        Malformed("foreign-no-repository", b"Repository not found. Please check the name.\n", "server's answer"),
        Malformed("foreign-json-error-page", error, r"(?i)JSON|header"),
        Malformed(
            "foreign-index-json", b'{"metadata": {}, "weight_map": {"weight": "x.safetensors"}}', r"(?i)JSON|header"
        ),
        Malformed("foreign-zeros", bytes(4096), r"(?i)header"),
        Malformed("foreign-ones", b"\xff" * 4096, r"(?i)header"),
    ]


MALFORMED = lengths() + documents() + offsets() + shapes() + dtypes() + entries() + bodies() + foreign()
