"""How the pages of the shell command's view look: themes, contrast, focus, wide and narrow windows."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest

from safetensors_torch.cli import view
from view_pages import HOSTILE

# Says which visible text is cut off or covered, or lies outside of the page.
CLIPPED = """() => {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (!node.data.trim() || parent.closest("script, style, noscript, select, .hidden, .skip")) continue;
    if (!parent.checkVisibility()) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects()) {
      if (box.left < -0.5 || box.right > innerWidth + 0.5) found.push(`outside: ${node.data.slice(0, 60)}`);
      for (let at = parent; at && at !== document.body; at = at.parentElement) {
        if (getComputedStyle(at).overflowX === "visible") continue;
        const outer = at.getBoundingClientRect();
        const isInside = box.left >= outer.left - 0.5 && box.right <= outer.right + 0.5;
        if (!isInside) found.push(`cut off: ${node.data.slice(0, 60)}`);
      }
    }
  }
  for (const row of document.querySelectorAll("#table .row")) {
    const boxes = Array.from(row.children, (cell) => {
      const range = document.createRange();
      range.selectNodeContents(cell);
      return [range.getBoundingClientRect(), cell.textContent];
    }).filter(([box]) => box.width > 0);
    for (const [a, text] of boxes) for (const [b, other] of boxes) {
      const beside = a.left >= b.right - 0.5 || b.left >= a.right - 0.5;
      const below = a.top >= b.bottom - 0.5 || b.top >= a.bottom - 0.5;
      if (a !== b && !beside && !below) found.push(`overlap: ${text} and ${other}`);
    }
  }
  if (document.documentElement.scrollWidth > innerWidth) found.push("the page is wider than the window");
  return found;
}"""


def test_every_control_takes_the_focus_visibly(open_page: Any) -> None:
    page = open_page("stats")
    seen: list[str] = []
    for _ in range(60):
        page.page.keyboard.press("Tab")
        found = page.page.evaluate("""() => {
          const { activeElement: at } = document;
          if (at === document.body) return null;
          const { outlineStyle, outlineWidth } = getComputedStyle(at);
          const label = at.getAttribute("aria-label") ?? at.labels?.[0]?.textContent ?? at.textContent;
          return [at.id || at.textContent, outlineStyle !== "none" && outlineWidth !== "0px", label.trim() !== ""];
        }""")
        if found is None:
            break
        control, is_visible, has_label = found
        assert is_visible and has_label, control
        seen.append(control)
    for control in ("theme", "query", "treemap", "tab-tensors", "table", "F32", "⚠ NaN, Inf", "Storage", "Name ↑"):
        assert control in seen, (control, seen)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(scheme: str, open_page: Any) -> None:
    page = open_page("model", color_scheme=scheme)

    def ground() -> int:
        """Returns how light the page is, from 0 to 765."""
        color = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(", ")))

    def corner() -> int:
        return sum(
            page.page.evaluate("""() => {
          const copy = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
          copy.drawImage(canvas, -3, -8);
          return Array.from(copy.getImageData(0, 0, 1, 1).data.slice(0, 3));
        }""")
        )

    light = scheme == "light"
    assert (ground() > 600) == light and (corner() > 400) == light
    page.page.click("#theme")
    assert (ground() < 200) == light and (corner() < 400) == light
    page.page.emulate_media(color_scheme=scheme)
    assert (ground() < 200) == light


CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const light = (color) => {
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = Array.from(canvas.getImageData(0, 0, 1, 1).data, (value) => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const style = getComputedStyle(document.documentElement);
  const contrast = (a, b) => {
    const [x, y] = [a, b].map((name) => light(style.getPropertyValue(`--${name}`))).sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  };
  const fills = ["blue", "green", "sky", "orange", "purple", "red", "yellow", "grey"];
  const pairs = [...fills, "calm", "blue-1", "blue-2", "blue-3"].map((fill) => ["on-fill", fill]);
  for (const ground of ["paper", "card", "hover", "chosen"]) pairs.push(["text", ground], ["muted", ground]);
  for (const ground of ["paper", "card"]) pairs.push(["accent", ground], ["alarm", ground]);
  for (const frame of [0, 1, 2, 3]) pairs.push(["frame-text", `frame-${frame}`]);
  return pairs.map(([a, b]) => [`${a} on ${b}`, contrast(a, b)]);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(scheme: str, open_page: Any) -> None:
    page = open_page("model", color_scheme=scheme)
    low = [(pair, ratio) for pair, ratio in page.page.evaluate(CONTRASTS) if ratio < 4.5]
    assert low == []


# What people see without one kind of cones, by Machado et al. (2009): a row for each of R, G, B.
NO_CONES = {
    "none": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.1523, 1.0526, -0.2049), (0.1145, 0.7863, 0.0992), (-0.0039, -0.0481, 1.0520)),
    "deuteranopia": ((0.3673, 0.8606, -0.2280), (0.2801, 0.6725, 0.0474), (-0.0118, 0.0429, 0.9689)),
    "tritanopia": ((1.2555, -0.0767, -0.1788), (-0.0784, 0.9308, 0.1476), (0.0047, 0.6914, 0.3039)),
}
DTYPE_FILLS = ("blue", "green", "sky", "orange", "purple", "red", "yellow", "grey")
CHANGE_FILLS = ("calm", "blue-1", "blue-2", "blue-3", "yellow", "red", "green")


def lab(color: str, seen: tuple[tuple[float, ...], ...]) -> tuple[float, float, float]:
    """Returns a colour in CIELAB, in which distances are those that people see."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    r, g, b = (min(max(sum(map(float.__mul__, map(float, row), linear)), 0.0), 1.0) for row in seen)
    x = (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505
    y = 0.2126 * r + 0.7152 * g + 0.0722 * b
    z = (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089
    x, y, z = (value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116 for value in (x, y, z))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("cones", NO_CONES)
@pytest.mark.parametrize("fills", [DTYPE_FILLS, CHANGE_FILLS], ids=["dtypes", "changes"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_differ_for_everybody(theme: str, fills: tuple[str, ...], cones: str) -> None:
    style = (view.PARTS / "page.css").read_text(encoding="utf-8")
    light, dark = style.split(':root[data-theme="dark"]', 1)
    part = light if theme == "light" else dark
    found = {fill: re.search(rf"--{fill}: (#[0-9a-f]{{6}});", part)[1] for fill in fills}
    for a, b in itertools.combinations(fills, 2):
        assert math.dist(lab(found[a], NO_CONES[cones]), lab(found[b], NO_CONES[cones])) > 10, (a, b)


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["model", "stats", "diff", "shards", "hostile"])
def test_nothing_is_cut_off(name: str, width: int, open_page: Any) -> None:
    page = open_page(name, width=width)
    for tab in ("tensors", "metadata", "files"):
        page.page.click(f"#tab-{tab}")
        assert page.page.evaluate(CLIPPED) == [], tab
    page.page.click("#tab-tensors")
    # In the hostile page, the longest names too.
    page.page.focus("#table")
    for row in range(len(HOSTILE) if name == "hostile" else 3):
        page.page.keyboard.press("ArrowDown")
        assert page.page.evaluate(CLIPPED) == [], row
    if name == "stats":
        page.page.click("text=Values >> nth=0")
        assert page.page.evaluate(CLIPPED) == []
    page.page.focus("#treemap")
    page.page.keyboard.press("Enter")
    assert page.page.evaluate(CLIPPED) == []


def test_a_narrow_page_sorts(open_page: Any) -> None:
    page = open_page("model", width=390)
    page.page.select_option("#sort", "size")
    assert page.names()[0] == "model.embed_tokens.weight"
