"""The notebook of the documentation runs as it is, with fewer pictures and steps."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.kit.launches import ROOT, environment

PAGE = ROOT / "docs" / "notebook.ipynb"

#: What stands in it -> what is run.
SHORTER = {"pictures, steps = 600, 60": "pictures, steps = 90, 2"}


@pytest.mark.multi
def test_every_cell_of_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(PAGE, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell for cell in cells if cell.outputs or cell.execution_count]
    for old, new in SHORTER.items():
        (cell,) = [cell for cell in cells if old in cell.source]
        cell.source = cell.source.replace(old, new)
    # The kernel finds the package as an installed copy's would, from another folder.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    said = json.dumps(notebook.cells)
    for piece in ("finetune: done in", "self-distillation", "image/png", "probability"):
        assert piece in said, piece
