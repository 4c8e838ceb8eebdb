"""Self-distillation for further pre-training: the package under which every folder is imported.

In a clone its folders are links to those of the top level; an installed copy holds them themselves.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
if not (_HERE / "engine").is_dir():  # a copy of the clone in which links were not kept
    __path__.append(str(_HERE.parent))
