"""The plot of the results: speeds relative to the reference.

Owns only the picture: report.py computes the figures.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import report
import works

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

_OURS, _TORCH = "#1b6ca8", "#a9a9a9"
_RIVALS = {works.PRERELEASE: "#e0a030", works.FASTSAFETENSORS: "#7a9e4b", works.STREAMER: "#a05c8c"}


def _color(subject: str) -> str | None:
    """Returns the color of a subject's bar, or None if it has no bar."""
    if subject.startswith("torch."):
        return _TORCH
    return ({works.OURS: _OURS} | _RIVALS).get(subject)


def draw(results: dict, picture: Path) -> None:
    """Draws a group of bars for each work. The raw limit is a mark on our bar."""
    shown = [work for work in results["works"] if report.relative(work, works.REFERENCE, works.OURS)]
    style = {"svg.hashsalt": "bench", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots()
        at, ticks = 0.0, []
        for work in shown:
            raw = report.best(work, report.is_raw)
            bars = [row["subject"] for row in work["rows"] if _color(row["subject"]) and row["seconds"]]
            ticks.append((at + (len(bars) - 1) / 2, work["name"]))
            for subject in bars:
                speed = report.relative(work, works.REFERENCE, subject)
                # Bars start at 1: slower than the reference goes left.
                axes.barh(at, speed - 1, left=1, height=0.85, color=_color(subject))
                limit = report.relative(work, works.REFERENCE, raw) if raw and subject == works.OURS else None
                if limit:
                    axes.plot(limit, at, marker="D", markersize=4, color="black", linestyle="none", zorder=3)
                beside = max(speed, limit or 0, 1)
                text = f"{speed:,.0f}" if speed >= 100 else f"{speed:#.2g}".rstrip(".")
                axes.annotate(text, (beside, at), (5, 0), textcoords="offset points", va="center", fontsize=8)
                at += 1
            at += 0.8
        axes.set_xscale("log")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
        axes.set_ylim(at - 0.5, -1)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        axes.tick_params(axis="x", top=True, labeltop=True)
        axes.margins(x=0.12)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("left", "right", "top"):
            axes.spines[side].set_visible(False)
        axes.set_xlabel(f"speed, {works.REFERENCE} = 1 (logarithmic)")
        handles = [
            Patch(color=_OURS, label="safetensors-torch"),
            *(Patch(color=color, label=rival) for rival, color in _RIVALS.items()),
            Patch(color=_TORCH, label="torch.load, torch.save"),
            Line2D([], [], marker="D", markersize=4, color="black", linestyle="none", label="raw limit"),
        ]
        figure.set_size_inches(9, 1.6 + 0.17 * at)
        figure.legend(handles=handles, loc="upper center", ncols=3, frameon=False)
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.55 / figure.get_figheight()))
        figure.savefig(picture, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
