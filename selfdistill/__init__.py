"""Self-distillation for further pre-training: the package under which every folder is imported.

In a clone its folders are links to those of the top level; an installed copy holds them themselves.

From Python (docs/python.md)::

    import selfdistill as sd

    sd.pack("images", "shards/mine", size=224)
    run = sd.train(recipe="vit_base", data="shards/mine", output="runs/mine")
    labels = sd.predict(run, "new pictures")
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfdistill.data.errors import TryAgain, UserError
    from selfdistill.launcher.api.calls import embed, evaluate, load, pack, predict, train
    from selfdistill.launcher.api.run import Run

__all__ = [
    "Run",
    "TryAgain",
    "UserError",
    "embed",
    "evaluate",
    "load",
    "pack",
    "predict",
    "train",
]

_HERE = Path(__file__).resolve().parent
if not (_HERE / "engine").is_dir():  # a copy of the clone in which links were not kept
    __path__.append(str(_HERE.parent))

#: Where the names of `__all__` are; imported when first asked for, since every command imports this
#: package.
_PLACES = {
    "Run": "launcher.api.run",
    "TryAgain": "data.errors",
    "UserError": "data.errors",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PLACES.get(name, 'launcher.api.calls')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
