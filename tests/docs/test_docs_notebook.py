"""The notebook of the documentation runs from its first cell to its last, and is kept without outputs."""

from __future__ import annotations

import os
import sys
import time

import nbformat
import pytest
from doc_blocks import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "docs" / "first_run.ipynb"


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A kernel of this Python, wherever Jupyter looks for others; it sees the checkout and not the network."""
    folder = tmp_path / "jupyter" / "kernels" / "python3"
    folder.mkdir(parents=True)
    command = f'["{sys.executable}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"]'
    (folder / "kernel.json").write_text(f'{{"argv": {command}, "display_name": "Python 3", "language": "python"}}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))


def test_the_notebook_runs_and_shows_a_gain(tmp_path, kernel):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    began = time.monotonic()
    NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert time.monotonic() - began < 300
    shown = {cell["id"]: cell["outputs"] for cell in notebook.cells if cell["cell_type"] == "code"}
    assert not [output for outputs in shown.values() for output in outputs if output["output_type"] == "error"]
    assert (tmp_path / "runs" / "notebook" / "adapter" / "adapter_model.safetensors").is_file()


def test_no_outputs_are_kept():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None, cell["id"]
