"""Run the notebooks of docs/tutorials from top to bottom and save their outputs.

    python docs/site/notebooks.py                      # all of them
    python docs/site/notebooks.py multi_turn.ipynb     # one of them

Each notebook runs in a fresh kernel and in an empty folder. Progress bars and log lines go to the standard error and
are not saved. The last lines say how many minutes of one core each notebook took.
"""

import os
import resource
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "tutorials"
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(path: Path) -> nbformat.NotebookNode:
    """Execute a notebook in a fresh kernel.

    Args:
        path: The notebook, which stays as it is.

    Returns:
        The notebook with its new outputs.
    """
    notebook = nbformat.read(path, as_version=4)
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    environment.pop("MPLBACKEND", None)  # the kernel draws into the notebook
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": folder}})
        client.execute(env=environment)
    return notebook


def without_noise(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Drop what would change in every run: times, versions, and the standard error."""
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data = {"image/png": output.data["image/png"], "text/plain": "<Figure>"}
                if "metadata" in output:
                    output.metadata = {}
    return notebook


def core_seconds() -> float:
    """Seconds of processors that the kernels so far have taken."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(names: list[str]) -> None:
    """Run the notebooks with these names, or all of them."""
    lines = []
    for path in [FOLDER / name for name in names] or sorted(FOLDER.glob("*.ipynb")):
        before = core_seconds()
        nbformat.write(without_noise(run(path)), path)
        lines.append(f"{path.name:24} {(core_seconds() - before) / 60:.1f} minutes of one core")
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
