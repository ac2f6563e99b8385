"""The house rules that a machine can check: imports run one way, files stay small, names say something."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "diffrep"
# A room may import rooms to its right; rooms of one group do not import each other.
ORDER = [
    {"cli"},
    {"demo", "cluster"},
    {"train", "correspond"},
    {"probe"},
    {"extract"},
    {"heads", "metrics", "store", "data"},  # heads read features; DifFeed's reads the live network
    {"backbones"},
    {"taps", "noise", "dist"},
    {"processes"},
    {"report"},  # reads run folders only; any room may call it
    {"config"},
    {"errors", "_version"},
]
RANK = {room: rank for rank, group in enumerate(ORDER) for room in group}
EXCEPTIONS = {("backbones/backbone.py", "extract")}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "diffrep" and len(parts) > 1:
                yield parts[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    room = room_of(path)
    if room not in RANK:  # __init__, __main__ and testing may import anything
        assert room in ("__init__", "__main__", "testing"), f"{room} is not in the import order"
        return
    for other in imported_rooms(path):
        assert other != "testing", "only tests import diffrep.testing"
        if other in RANK and other != room and (str(path.relative_to(PACKAGE)), other) not in EXCEPTIONS:
            assert RANK[other] > RANK[room], f"{path.relative_to(PACKAGE)} imports {other}, which runs back"


def test_files_are_small_and_named():
    for path in FILES:
        assert path.name not in ("utils.py", "helpers.py", "common.py", "misc.py")
        assert len(path.read_text().splitlines()) <= 420, path


def test_importing_the_package_and_the_command_does_not_import_torch():
    code = "import sys, diffrep, diffrep.cli, diffrep.config; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist():
    import diffrep

    for name in diffrep.__all__:
        assert getattr(diffrep, name) is not None
    with pytest.raises(AttributeError):
        diffrep.nothing  # noqa: B018
