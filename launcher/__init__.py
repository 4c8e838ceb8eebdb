"""How a run is started, shown and compared."""

import sys

# Looks for the packages, which the commands import first; doctor has a line of its own for it.
if "launcher.doctor" not in sys.orig_argv:
    import selfdistill.data  # noqa: F401
