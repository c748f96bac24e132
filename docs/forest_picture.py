"""Draws docs/forest.png, the README's picture: `python docs/forest_picture.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# node: (x = layer, y, label); edges by name; the drafts of each layer in draw order
NODES = {
    "a": (0, 2.0, "b₁"), "b": (0, -1.0, "b₂"),
    "c": (1, 3.0, "x₁"), "d": (1, 1.6, "x₂"), "e": (1, 0.2, "x₃"), "f": (1, -1.2, "x₄"),
    "g": (2, 3.5, "y₁"), "h": (2, 2.4, "y₂"), "i": (2, 1.3, "y₃"), "j": (2, -1.2, "y₄"),
    "k": (2, 0.2, "new"),
}  # fmt: skip
EDGES = ["ac", "ad", "be", "bf", "cg", "ch", "di", "fj"]
ACCEPTED, REJECTED, DRAWN = set("cdg"), set("efhij"), set("k")
GREEN, RED, BLUE, GREY = "#2a9d5c", "#c8553d", "#2f6fb3", "#8a8f98"


def draw_panel(axis: plt.Axes, title: str, below: str, stage: int) -> None:
    """One stage: 0 the drafted forest, 1 the judged forest, 2 what goes on."""
    edges = EDGES + (["dk"] if stage else [])
    for start, end in edges:
        if stage == 0 or stage == 1 or {start, end} <= ACCEPTED | DRAWN | {"a"}:
            xs, ys = zip(NODES[start][:2], NODES[end][:2], strict=True)
            axis.plot(xs, ys, color=GREY, linewidth=1.2, zorder=1)
    for name, (x, y, label) in NODES.items():
        if name in DRAWN and stage == 0:
            continue
        if stage == 2 and name in REJECTED | {"b"}:
            continue
        colour = GREY
        if stage:
            colour = GREEN if name in ACCEPTED else RED if name in REJECTED else BLUE if name in DRAWN else GREY
        axis.scatter([x], [y], s=640, color="white", edgecolor=colour, linewidth=2.2, zorder=2)
        axis.text(x, y, label, ha="center", va="center", fontsize=8, zorder=3)
        if stage == 1 and x > 0:
            axis.text(x + 0.13, y + 0.42, {GREEN: "✓", RED: "✗", BLUE: "+"}[colour], color=colour, fontsize=13,
                      va="center", fontname="DejaVu Sans")  # fmt: skip
    axis.set_title(title, fontsize=11, loc="left")
    axis.text(-0.3, -2.6, below, fontsize=8.5, va="top")
    axis.set_xlim(-0.4, 2.6)
    axis.set_ylim(-3.8, 4.2)
    axis.axis("off")


def main() -> None:
    """Write the picture."""
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 4.1))
    draw_panel(
        axes[0],
        "1  Draft",
        "The small model draws w = 4 beams a layer\nfrom its joint distribution Q, γ = 2 layers deep.",
        0,
    )
    draw_panel(
        axes[1],
        "2  Verify",
        "One pass of the large model scores every node.\nEach draft is accepted with min(1, R / Qᵢ); a layer with\n"
        "M = 2 accepted passes; the second one here\nfailed and is refilled.",
        1,
    )
    draw_panel(
        axes[2],
        "3  Go on",
        "Accepted and drawn beams are the input of the\nnext iteration; the slots of the others are free.",
        2,
    )
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("forest.png"), dpi=110)


if __name__ == "__main__":
    main()
