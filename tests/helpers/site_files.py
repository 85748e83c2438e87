"""Files of docs/site, whose folder is no package."""

import importlib.util
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / "docs" / "site"


def load_site_file(name: str) -> ModuleType:
    """Import a file of docs/site."""
    spec = importlib.util.spec_from_file_location(f"docs_site_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
