"""What all figures of the planner share: matplotlib, or a sentence where it is missing; their style; their files."""

from __future__ import annotations

import io
from pathlib import Path

from afd.errors import ConfigError

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter, ScalarFormatter
except ModuleNotFoundError:
    raise ConfigError("pictures need matplotlib: pip install 'afd[planner]'") from None

mpl.rcParams.update(
    {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "afd",  # the same picture is the same file
        "figure.constrained_layout.use": True,
    }
)

ATTENTION, FFN, SOFT = "#0969da", "#bc4c00", "#59636e"

__all__ = [
    "ATTENTION",
    "FFN",
    "SOFT",
    "Axes",
    "EngFormatter",
    "Figure",
    "FuncFormatter",
    "NullFormatter",
    "ScalarFormatter",
    "as_svg",
    "mpl",
    "save",
]


def save(folder: Path, name: str, figure: Figure) -> list[Path]:
    """As SVG and as PNG. Raises ConfigError if the folder cannot be written."""
    paths = [folder / f"{name}.{kind}" for kind in ("svg", "png")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from None
    return paths


def as_svg(figure: Figure) -> str:
    """To stand in a page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
