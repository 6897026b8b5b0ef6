"""Pictures as SVG text: shapes, a chart's frame, and the colours of all pictures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

INK, SOFT, GRID, PAPER = "#24292f", "#6e7781", "#d8dee4", "#ffffff"
BLUE, RED, YELLOW, GREY, SAND = "#1b6ca8", "#d1495b", "#edae49", "#8d96a3", "#c9ada7"


def picture(width: float, height: float, shapes: Sequence[str], title: str) -> str:
    """A whole file.  title: read out in place of the picture."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(width)} {_n(height)}" width="{_n(width)}"'
        f' height="{_n(height)}" font-family="system-ui, sans-serif" role="img">'
    )
    paper = rect(0, 0, width, height, PAPER)
    return "\n".join([head, f"<title>{escape(title)}</title>", paper, *shapes, "</svg>"]) + "\n"


def rect(
    x: float, y: float, width: float, height: float, fill: str, *, line: str = "none", round_by: float = 0
) -> str:
    """A rectangle."""
    return (
        f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" rx="{_n(round_by)}"'
        f' fill="{fill}" stroke="{line}"/>'
    )


def line(points: Sequence[tuple[float, float]], colour: str, *, width: float = 1, dash: str = "") -> str:
    """Straight lines from point to point."""
    path = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{_n(width)}"{dashed}/>'


def arrow(begin: tuple[float, float], end: tuple[float, float], colour: str) -> str:
    """A straight arrow."""
    (x, y), (x2, y2) = begin, end
    length = ((x2 - x) ** 2 + (y2 - y) ** 2) ** 0.5
    dx, dy = (x2 - x) / length, (y2 - y) / length
    left = (x2 - 9 * dx - 4 * dy, y2 - 9 * dy + 4 * dx)
    right = (x2 - 9 * dx + 4 * dy, y2 - 9 * dy - 4 * dx)
    head = " ".join(f"{_n(a)},{_n(b)}" for a, b in ((x2, y2), left, right))
    shaft = line([begin, (x2 - 6 * dx, y2 - 6 * dy)], colour, width=2)
    return f'{shaft}\n<polygon points="{head}" fill="{colour}"/>'


def dot(x: float, y: float, colour: str) -> str:
    """A point of a chart."""
    return f'<circle cx="{_n(x)}" cy="{_n(y)}" r="3" fill="{colour}"/>'


def text(
    x: float, y: float, words: str, *, size: float = 12, anchor: str = "start", colour: str = INK
) -> str:
    """A line of text.  anchor: start, middle or end."""
    return (
        f'<text x="{_n(x)}" y="{_n(y)}" font-size="{_n(size)}" text-anchor="{anchor}" fill="{colour}">'
        f"{escape(words)}</text>"
    )


def _n(value: float) -> str:
    """A number in few digits, so that a picture is equal on all machines."""
    return f"{value:.1f}".removesuffix(".0")
