"""The lowest versions that pyproject.toml allows, as pip's constraints: one `name==version` a line.

    python scripts/floors.py > constraints.txt
    python scripts/floors.py --check     # are they installed?

Dependencies and the extra "dev" with all that it takes in. torch and torchvision are left out: they are gigabytes, and
belong to a driver rather than to diffrep.
"""

import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
LEFT_OUT = {"torch", "torchvision"}
REQUIREMENT = re.compile(r"([\w.-]+)(?:\[([\w,-]+)\])?\s*(.*)")


def floors(project):
    """Returns the floor of each package by name.

    Args:
        project: The table [project] of pyproject.toml.

    Raises:
        ValueError: A requirement without a floor.
    """
    found, left = {}, [*project["dependencies"], f"{project['name']}[dev]"]
    while left:
        name, extras, versions = REQUIREMENT.fullmatch(left.pop(0).strip()).groups()
        if name == project["name"]:
            left += [one for extra in extras.split(",") for one in project["optional-dependencies"][extra]]
        elif name not in LEFT_OUT:
            floor = re.search(r">=\s*([\w.]+)", versions)
            if floor is None:
                raise ValueError(f"{name}{versions}: a floor such as >=1.2 is needed in pyproject.toml")
            found[name] = floor[1]
    return found


def main():
    """Prints the constraints; with --check, fails unless just these versions are installed."""
    with PYPROJECT.open("rb") as file:
        found = floors(tomllib.load(file)["project"])
    if sys.argv[1:] == ["--check"]:
        # Numbers alone count: 2.9 is 2.9.0.
        wrong = [f"{name} {version(name)}, not {floor}" for name, floor in found.items() if not same(name, floor)]
        sys.exit("installed: " + "; ".join(wrong) if wrong else 0)
    print("\n".join(f"{name}=={floor}" for name, floor in found.items()))


def same(name, floor):
    """Tells whether a package is installed at a version."""
    there, wanted = (one.split(".") for one in (version(name), floor))
    return there[: len(wanted)] == wanted and not any(int(rest) for rest in there[len(wanted) :])


if __name__ == "__main__":
    main()
