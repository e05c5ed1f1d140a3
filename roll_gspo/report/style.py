"""Colors and plot style shared by a run's report and by comparisons."""

from __future__ import annotations

# Colors that readers with any common color blindness can tell apart (Okabe and Ito, 2008). Their yellow is left out: it
# is too light for lines.
SERIES_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#3c4450")
_DARK_SERIES_COLORS = ("#4ea8e8", "#ff8a45", "#2fc79b", "#e7a0c8", "#f2bd45", "#8fd0f7", "#c3c9d2")
OTHER_COLOR = "#a3a9b2"
INK, SOFT, LINE, CARD = "#16191d", "#626a75", "#e3e6ea", "#fefefe"

THEME: dict[str, tuple[str, str]] = {  # CSS variable: color on a light and on a dark background
    "page": ("#f6f7f9", "#101317"),
    "card": (CARD, "#191d23"),
    "ink": (INK, "#e8eaed"),
    "soft": (SOFT, "#9aa3ae"),
    "line": (LINE, "#2b313a"),
    "sunk": ("#f1f3f5", "#12161b"),
    "good": ("#0b7a3e", "#6fd69a"),
    "good-bg": ("#e2f4e9", "#15301f"),
    "bad": ("#b3261e", "#ff8f86"),
    "bad-bg": ("#fbe7e5", "#3a1b19"),
    "warn": ("#b26a00", "#f0b14a"),
    "other": (OTHER_COLOR, "#6d7580"),
    **{f"c{i}": pair for i, pair in enumerate(zip(SERIES_COLORS, _DARK_SERIES_COLORS, strict=True))},
}


def theme_css() -> str:
    """Return the style sheet that defines the variables of `THEME`, and a class per series color."""
    light, dark = ("".join(f" --{name}: {pair[i]};" for name, pair in THEME.items()) for i in (0, 1))
    names = [*(f"c{i}" for i in range(len(SERIES_COLORS))), "other"]
    classes = "".join(f".{name} {{ color: var(--{name}); }}\n" for name in names)
    return (
        f":root {{ color-scheme: light dark;{light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{{dark} }} }}\n{classes}"
    )


def series_class(index: int) -> str:
    """Return the CSS class of the color of series `index`; colors repeat after the last."""
    return f"c{index % len(SERIES_COLORS)}"
