"""The pages of the shell command's view and of diff --view in a browser: what a person sees, clicks and types."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from browser import OpenPage
from safetensors_torch import cli, save_file
from view_pages import HOSTILE

# The centre of the ring around the child of the module that has the focus.
RING = """() => {
  const box = document.getElementById("ring-active").getBoundingClientRect();
  return [box.left + box.width / 2, box.top + box.height / 2, box.width];
}"""


def test_the_page_shows_the_checkpoint(open_page: Any) -> None:
    page = open_page("model")
    assert page.page.title() == "model.safetensors – safetensors"
    totals = page.page.locator("#totals div").all_inner_texts()
    assert [sorted(text.split("\n")) for text in totals] == [
        ["14", "tensors"],
        ["50.8 K", "parameters"],
        ["118.0 KiB", "of data"],
        ["1", "file"],
    ]
    groups = page.page.locator(".groups tbody tr").all_inner_texts()
    assert [row.split() for row in groups] == [
        ["F16", "4", "32.8", "K", "64.0", "KiB", "54%"],
        ["F32", "1", "9.6", "K", "37.5", "KiB", "32%"],
        ["BF16", "8", "8.4", "K", "16.5", "KiB", "14%"],
        ["I64", "1", "1", "8", "B", "<0.1%"],
    ]
    names = page.names()
    assert names[:2] == ["model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"] and len(names) == 14
    # The canvas has more than one colour.
    colors = page.page.evaluate("""() => {
      const { width, height } = canvas;
      const pixels = new Uint32Array(canvas.getContext("2d").getImageData(0, 0, width, height).data.buffer);
      return new Set(pixels).size;
    }""")
    assert colors > 10


def test_search(open_page: Any) -> None:
    page = open_page("model")
    page.page.keyboard.press("/")
    page.page.keyboard.type("BIAS layers.2")
    assert page.names() == ["model.layers.2.self_attn.q_proj.bias"]
    assert page.text("#found").startswith("1 of 14 tensors, 128 B")
    # A screen reader would read them again.
    page.page.evaluate("document.querySelector('#details .facts').id = 'before'")
    page.page.fill("#query", "layers.*.weight")
    assert len(page.names()) == 8 and page.page.is_visible("#before")
    page.page.fill("#query", "nothing has this name")
    assert page.names() == [] and page.text("#table-body") == "No tensor matches."
    page.page.keyboard.press("Escape")
    assert len(page.names()) == 14 and page.page.input_value("#query") == ""


def test_search_highlights_the_treemap(open_page: Any) -> None:
    page = open_page("model")
    before = page.page.evaluate("canvas.toDataURL()")
    page.page.fill("#query", "embed")
    assert page.page.evaluate("canvas.toDataURL()") != before


def test_dtypes_filter(open_page: Any) -> None:
    page = open_page("model")
    page.page.click(".groups button >> text=I64")
    assert page.names() == ["steps"]
    page.page.click(".groups button >> text=F32")
    assert page.names() == ["model.embed_tokens.weight", "steps"]
    page.page.click("#found >> text=Clear")
    assert len(page.names()) == 14


def test_clicks_walk_in_and_out(open_page: Any) -> None:
    page = open_page("model")
    # All but a few bytes are in one module.
    page.page.click("#treemap", position={"x": 200, "y": 200})
    assert page.crumbs() == ["All", "model"]
    assert "13 tensors in this module" in page.text("#found")
    page.page.click("#treemap", position={"x": 100, "y": 200})
    assert page.crumbs() == ["All", "model", "layers"] and len(page.names()) == 12
    page.page.go_back()
    assert page.crumbs() == ["All", "model"]
    page.page.go_forward()
    assert page.crumbs() == ["All", "model", "layers"]
    # Neither the link to the table nor a reload walks out.
    page.page.focus(".skip")
    page.page.keyboard.press("Enter")
    assert page.crumbs() == ["All", "model", "layers"]
    assert page.page.evaluate("document.activeElement.id") == "table"
    page.faults.clear()
    page.page.reload()
    assert page.crumbs() == ["All", "model", "layers"] and len(page.names()) == 12
    # An entry of another page at this address.
    page.page.evaluate("history.replaceState({ path: [0, 0, 99, 5] }, '')")
    page.page.reload()
    assert page.crumbs() == ["All", "model"]
    page.page.click("#crumbs >> text=All")
    assert page.crumbs() == ["All"] and len(page.names()) == 14
    page.page.click("#treemap", position={"x": 200, "y": 200})
    page.page.click("#up")
    assert page.crumbs() == ["All"]


def test_keys_walk_in_and_out(open_page: Any) -> None:
    page = open_page("model")
    page.page.focus("#treemap")
    page.page.keyboard.press("Home")
    option = page.page.locator("#treemap [role=option]")
    assert option.inner_text().startswith("model, 13 tensors")
    assert page.page.get_attribute("#treemap", "aria-activedescendant") == option.get_attribute("id")
    page.page.keyboard.press("Enter")
    page.page.keyboard.press("Enter")
    assert page.crumbs() == ["All", "model", "layers"]
    # Layers have one size, and are in rows.
    x, y, width = page.page.evaluate(RING)
    page.page.keyboard.press("ArrowRight")
    right, below, _ = page.page.evaluate(RING)
    assert right == pytest.approx(x + width, abs=1) and below == pytest.approx(y, abs=1)
    assert option.inner_text().startswith("model.layers.1, 3 tensors")
    page.page.keyboard.press("Space")
    assert page.crumbs()[-1] == "1"
    page.page.keyboard.press("Backspace")
    assert page.crumbs() == ["All", "model", "layers"]
    assert option.inner_text().startswith("model.layers.1, ")
    page.page.keyboard.press("Escape")
    page.page.keyboard.press("Escape")
    page.page.keyboard.press("Escape")
    assert page.crumbs() == ["All"]


def test_selection_is_linked(open_page: Any) -> None:
    page = open_page("model")
    page.page.click("#table-body .row >> text=layers.3.mlp")
    assert "model.layers.3.mlp.down_proj.weight" in page.text("#details")
    assert "[64, 128]" in page.text("#details") and page.page.is_visible("#ring-selected")
    page.page.focus("#table")
    page.page.keyboard.press("Home")
    assert page.text("#details .subject") == "model.embed_tokens.weight"
    page.page.keyboard.press("ArrowDown")
    page.page.keyboard.press("ArrowDown")
    assert page.text("#details .subject") == "model.layers.0.self_attn.q_proj.bias"
    page.page.keyboard.press("Enter")
    assert page.crumbs()[:4] == ["All", "model", "layers", "0"]
    assert page.text("#details .subject") == "model.layers.0.self_attn.q_proj.bias"
    # From the treemap to the table.
    page.page.click("#deselect")
    page.page.keyboard.press("Home")
    page.page.keyboard.press("Enter")
    selected = page.page.locator("#table-body .row.selected bdi").all_inner_texts()
    assert selected == [page.text("#details .subject")]


def test_sorting(open_page: Any) -> None:
    page = open_page("model")
    page.page.click("#table-head >> text=Size")
    assert page.names()[0] == "model.embed_tokens.weight" and page.names()[-1] == "steps"
    assert page.page.get_attribute("#table-head [aria-sort=descending]", "aria-sort") == "descending"
    page.page.keyboard.press("Enter")
    assert page.names()[0] == "steps"
    page.page.click("#table-head >> text=Dtype")
    dtypes = page.page.locator("#table-body .cell.dtype").all_inner_texts()
    assert dtypes == sorted(dtypes) and len(set(dtypes)) == 4
    page.page.click("#table-head >> text=Offset")
    offsets = page.page.locator("#table-body .row > :last-child").all_inner_texts()
    assert offsets == sorted(offsets, key=lambda text: int(text.replace(",", "")))


def test_metadata(open_page: Any) -> None:
    page = open_page("model")
    page.page.click("#tab-metadata")
    assert page.page.locator(".metadata dt").all_inner_texts() == ["config", "empty", "format"]
    lines = ["{", '  "layers": 4,', '  "big": 12345678901234567890,', '  "ids": [', "    1,", "    {}", "  ]", "}"]
    assert page.text(".metadata pre >> nth=0").split("\n") == lines
    page.page.click(".metadata >> text=As in the file")
    assert page.text(".metadata pre >> nth=0") == '{"layers": 4, "big": 12345678901234567890, "ids": [1, {}]}'
    page.page.keyboard.press("Shift+Tab")
    page.page.focus("#tab-metadata")
    page.page.keyboard.press("ArrowRight")
    assert page.page.is_visible("#panel-files") and page.page.evaluate("document.activeElement.id") == "tab-files"


def test_long_metadata(chromium: Any, tmp_path: Path) -> None:
    metadata = {
        "a": '{"text": "' + "x" * 900_000 + '"}',
        "b": "[" + "1," * 100_000 + "1]",
        "c": "[" * 2_000_000 + "]" * 2_000_000,
        "d": '{"text": "' + "x" * 9_000_000 + '"}',
    }
    save_file({"w": torch.ones(1)}, tmp_path / "long.safetensors", metadata)
    assert cli.main(["view", str(tmp_path / "long.safetensors"), "-o", str(tmp_path / "long.html")]) == 0
    page = OpenPage(chromium, tmp_path / "long.html")
    page.page.click("#tab-metadata")
    texts = page.page.locator(".metadata pre").all_inner_texts()
    assert [text[:7] for text in texts] == ['{\n  "te', "[\n  1,\n", "[[[[[[[", '{"text"']
    assert all(len(text) == 4001 for text in texts)
    assert page.faults == []
    page.close()


def test_much_metadata(chromium: Any, tmp_path: Path) -> None:
    """They are drawn in parts, because a browser takes 9 s for all of them."""
    metadata = {f"key {number:05}": "value" for number in range(80_000)}
    save_file({"w": torch.ones(1)}, tmp_path / "much.safetensors", metadata)
    assert cli.main(["view", str(tmp_path / "much.safetensors"), "-o", str(tmp_path / "much.html")]) == 0
    page = OpenPage(chromium, tmp_path / "much.html")
    page.page.click("#tab-metadata")
    assert page.page.locator(".metadata dt").count() == 1000
    assert page.text("#panel-metadata .button") == "Show 1,000 more of 79,000"
    page.page.click("#panel-metadata .button")
    assert page.page.locator(".metadata dt").all_inner_texts() == list(metadata)[:2000]
    assert page.faults == []
    page.close()


def test_last_metadata(chromium: Any, tmp_path: Path) -> None:
    metadata = {f"key {number:05}": "value" for number in range(1001)}
    save_file({"w": torch.ones(1)}, tmp_path / "last.safetensors", metadata)
    assert cli.main(["view", str(tmp_path / "last.safetensors"), "-o", str(tmp_path / "last.html")]) == 0
    page = OpenPage(chromium, tmp_path / "last.html")
    page.page.click("#tab-metadata")
    page.page.click("text=Show 1 more of 1")
    assert page.page.locator(".metadata dt").all_inner_texts() == list(metadata)
    assert page.page.locator("#panel-metadata .button").count() == 0
    assert page.faults == []
    page.close()


def test_small_tensors_are_drawn(chromium: Any, tmp_path: Path) -> None:
    """So many that each has less than a pixel."""
    save_file({f"w{i}": torch.ones(1) for i in range(5000)}, tmp_path / "many.safetensors")
    assert cli.main(["view", str(tmp_path / "many.safetensors"), "-o", str(tmp_path / "many.html")]) == 0
    page = OpenPage(chromium, tmp_path / "many.html", width=390)
    page.page.evaluate("document.getElementById('treemap').style.height = '10px'")
    shown = """() => {
      const { width, height } = canvas;
      const [red, , blue] = canvas.getContext("2d").getImageData(width / 2, height / 2, 1, 1).data;
      return height < 20 && blue - red > 60;
    }"""
    page.page.wait_for_function(shown)
    assert page.faults == []
    page.close()


def test_layout(open_page: Any) -> None:
    page = open_page("shards")
    page.page.click("#tab-files")
    files = page.page.locator(".file").all_inner_texts()
    assert len(files) > 1 and files[0].startswith("model-00001-of-0000")
    assert all("no gaps · offsets aligned to" in text for text in files)
    page.page.click(".strip >> nth=1", position={"x": 600, "y": 10})
    assert "model-00002-of" in page.text("#details")
    page.page.click("text=List tensors in file order")
    assert page.page.input_value("#sort") == "file"
    files = page.page.locator("#table-body .cell.file").all_inner_texts()
    assert files == sorted(files) and len(set(files)) > 1


def test_statistics(open_page: Any) -> None:
    page = open_page("stats")
    page.page.click(".groups button >> text=NaN")
    assert page.names() == ["⚠ model.layers.1.mlp.down_proj.weight"]
    page.page.click("text=Values >> nth=0")
    assert page.text("#table-head").split("\n")[3:] == ["Min", "Max", "Mean", "Std", "Zeros", "NaN", "Inf"]
    assert page.page.locator("#table-body .row > *").all_inner_texts()[-2:] == ["⚠ 1", "0"]
    page.page.click("#table-body .row")
    assert "NaN\n⚠ 1 (<0.1%)" in page.text("#details")
    heights = page.page.locator(".histogram rect").evaluate_all(
        "(bars) => bars.map((bar) => Number(bar.getAttribute('height')))"
    )
    assert 10 < len(heights) <= 64 and max(heights) == pytest.approx(38)
    # The treemap marks the tensor, and the module around it.
    page.page.focus("#treemap")
    assert "⚠ NaN or Inf in 1 tensor" in page.text("#treemap [role=option]")
    page.page.click("#found >> text=Clear")
    page.page.click("#table-head >> text=Max")
    assert page.names()[0] == "⚠ model.layers.1.mlp.down_proj.weight"


def test_a_comparison(open_page: Any) -> None:
    page = open_page("diff")
    groups = [row.split("\t")[:2] for row in page.page.locator(".groups tbody tr").all_inner_texts()]
    assert [(title.strip(), count) for title, count in groups] == [
        ("equal", "11"),
        ("values differ", "1"),
        ("dtype or shape", "1"),
        ("only left", "1"),
        ("only right", "1"),
    ]
    page.page.click("#table-head >> text=Relative")
    row = page.page.locator("#table-body .row >> nth=0 >> > *").all_inner_texts()
    name, status, left, right, differing, most, relative, _ = row
    assert (name, status) == ("model.layers.2.self_attn.q_proj.weight", "≠ values differ")
    assert (left, right, differing, most) == ("BF16 [32, 64]", "BF16 [32, 64]", "2,048", "0.0078125")
    assert float(relative) == pytest.approx(0.0078125 / 1.0078125, rel=1e-3)
    page.page.click("#table-body .row >> nth=0")
    assert "2,048 of 2,048 (100%)" in page.text("#details")
    page.page.click(".groups button >> text=only right")
    assert page.names() == ["new.weight"]
    page.page.click("#tab-metadata")
    assert page.page.locator(".metadata dt").all_inner_texts() == [
        "config\n\n≠ differs",
        "empty\n\n≠ differs",
        "epoch\n\n≠ differs",
        "format\n\n= equal",
    ]
    page.page.click("#tab-files")
    assert page.page.locator(".file").count() == 2


def test_hostile_names_run_nothing_and_are_legible(open_page: Any) -> None:
    page = open_page("hostile", height=3000)
    assert page.page.title() == "hostile.safetensors – safetensors"
    names: list[str] = []
    page.page.focus("#table")
    for _ in HOSTILE:
        page.page.keyboard.press("ArrowDown")
        names.append(page.text("#details .subject"))
    for name in ("</script><script>document.title = 'hacked'</script>", "__proto__", "constructor.prototype.x", "a.b"):
        assert name in names
    for name in (
        "a\\u202egnp.exe",
        "nul\\x00name",
        "line\\u2028separator\\n",
        '""',
        "..",
        "back\\\\slash",
        "\\x20lead",
    ):
        assert name in names
    assert "x" * 10_000 in names and "." * 3_000 in names and len(set(names)) == len(HOSTILE)
    page.page.fill("#query", "__proto__")
    assert page.names() == ["__proto__", "__proto__.polluted"]
    page.page.fill("#query", "")
    page.page.click("#tab-metadata")
    page.page.click("#tab-files")
    # Walks into every module.
    page.page.focus("#treemap")
    for _ in range(40):
        page.page.keyboard.press("Enter")
        page.page.keyboard.press("ArrowRight")
        page.page.hover("#treemap", position={"x": 40, "y": 40})
    assert page.page.evaluate("document.querySelectorAll('script, style, img, base, iframe, a').length") == 4
    assert page.page.evaluate("[{}.polluted, {}.x]") == [None, None]


def test_the_page_forbids_html_from_text(chromium: Any, view_pages: Path) -> None:
    page = OpenPage(chromium, view_pages / "model.html")
    for attack in (
        "document.body.innerHTML = '<img src=x>'",
        "document.body.append(Object.assign(document.createElement('script'), { textContent: 'document.title = 1' }))",
    ):
        with pytest.raises(Exception, match="TrustedHTML|TrustedScript"):
            page.page.evaluate(attack)
    page.page.evaluate("document.body.append(Object.assign(new Image(), { src: 'https://example.com/x.png' }))")
    page.page.wait_for_timeout(50)
    assert "csp: https://example.com/x.png" in page.faults
    page.close()


def test_a_checkpoint_without_tensors(chromium: Any, tmp_path: Path) -> None:
    save_file({}, tmp_path / "none.safetensors")
    save_file({"empty": torch.zeros(0, 3)}, tmp_path / "empty.safetensors")
    for name in ("none", "empty"):
        assert cli.main(["view", str(tmp_path / f"{name}.safetensors"), "-o", str(tmp_path / f"{name}.html")]) == 0
        page = OpenPage(chromium, tmp_path / f"{name}.html")
        page.page.focus("#treemap")
        page.page.keyboard.press("ArrowRight")
        page.page.keyboard.press("Enter")
        page.page.click("#tab-files")
        page.page.click("#tab-metadata")
        assert page.text("#panel-metadata") == "The checkpoint has no metadata."
        assert page.faults == []
        page.close()


@pytest.mark.alone
def test_twenty_thousand_tensors_open_in_a_second(chromium: Any, tmp_path: Path) -> None:
    tensors = {
        f"model.layers.{i // 200}.mlp.experts.{i % 200}.w{i % 3}": torch.zeros(i % 7 + 1, 8) for i in range(20_000)
    }
    save_file(tensors, tmp_path / "many.safetensors")
    assert cli.main(["view", str(tmp_path / "many.safetensors"), "-o", str(tmp_path / "many.html")]) == 0
    assert (tmp_path / "many.html").stat().st_size < 2_000_000
    seconds = []
    for _ in range(4):
        page = OpenPage(chromium, tmp_path / "many.html")
        # Two frames later, the first one is on the screen.
        milliseconds = page.page.evaluate(
            "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now()))))"
        )
        seconds.append(milliseconds / 1000)
        if seconds[-1] >= 1:
            page.close()
            continue
        assert "20,000" in page.text("#totals") and page.page.locator("#table-body .row").count() < 60
        began = time.monotonic()
        page.page.fill("#query", "experts.199.")
        assert page.text("#found").startswith("100 of 20,000 tensors")
        page.page.evaluate("document.getElementById('table').scrollTop = 1e9")
        assert time.monotonic() - began < 1
        page.page.wait_for_selector("#table-body .row >> text=layers.99.mlp.experts.199.")
        assert page.faults == []
        page.close()
        break
    assert min(seconds) < 1, seconds
