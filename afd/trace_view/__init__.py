"""Where a decode step's time went, drawn from the spans that the services append to a file.

Everything is placed on the attention host's clock; `flights` says how. Times are nanoseconds since the step's start
unless a name says otherwise.

`terminal` draws for a terminal, with rich; who does not need that needs no rich.
"""

from afd.trace_view.chrome import to_chrome
from afd.trace_view.steps import Handoff, Interval, Step, load_steps, pick
from afd.trace_view.svg import to_svg
from afd.trace_view.view import verdict

__all__ = ["Handoff", "Interval", "Step", "load_steps", "pick", "to_chrome", "to_svg", "verdict"]
