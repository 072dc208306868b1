"""The loss curve of a run as a picture."""

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlora.files import replace


def draw(entries: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """A PNG with the loss of each step and each evaluation, from the lines of the metrics log. Replaces the file whole."""
    # Takes most of a second to import, and a display to start, were the backend not chosen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot(xlabel="optimizer step", ylabel="loss")
    for name, style in (("loss", "-"), ("eval_loss", "o-")):
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        if points:
            axes.plot(*zip(*points), style, label=name, linewidth=1)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    replace(path, data.getvalue())
