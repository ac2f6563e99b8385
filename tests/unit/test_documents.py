"""The commands that documents, configs and `--help` show: each is parsed, and its config loaded, as a user's would be.

A command is a line of a code block that begins with `diffrep`, with the deeper lines that go on with it, or words in
backticks or quotes; of the latter, one word behind `diffrep` only names the verb.
"""

import argparse
import ast
import pkgutil
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

import diffrep.config
from diffrep.cli import VERBS
from diffrep.cli.validate import SCHEMAS
from diffrep.cli.words import read_config
from diffrep.config import to_yaml
from diffrep.errors import ConfigError

ROOT = Path(__file__).parents[2]
FILES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "diffrep" / "backbones" / "bundled").glob("*/README.md")),
    *sorted((ROOT / "configs").rglob("*.yaml")),
    *sorted((ROOT / "diffrep" / "cli").glob("*.py")),
]
# Not a command, but how commands are made up.
GRAMMAR = "diffrep VERB [config.yaml ...] [key=value ...]"
QUOTED = re.compile(r"`(diffrep\s[^`]+)`|'(diffrep\s[^']+)'")
MENTION = re.compile(rf"\bdiffrep\s+({'|'.join(VERBS)})\b")


def prose_of(file):
    """Returns what a file tells its reader: all of a document, a config's comments, a module's docstrings."""
    text = file.read_text()
    if file.suffix == ".yaml":
        return "\n".join(line.partition("#")[2] for line in text.splitlines())
    if file.suffix == ".py":
        kinds = ast.Module, ast.ClassDef, ast.FunctionDef
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
        return "\n\n".join(ast.get_docstring(node) or "" for node in nodes)
    return text


def commands(text, indent):
    """Lists the commands of a text; lines outside of fences are code from this many spaces on."""
    found, rest, fenced, last = [], [], False, None
    for line in text.splitlines():
        bare, depth = line.strip(), len(line) - len(line.lstrip())
        if bare.startswith("```"):
            fenced, last = not fenced, None
        elif bare.startswith("diffrep ") and (fenced or depth >= indent):
            found.append(bare)
            last = depth
        elif last is not None and bare and depth > last:
            found[-1] = found[-1].removesuffix("\\") + f" {bare}"
        else:
            last = None
            rest.append(line)
    quoted = [" ".join("".join(one).split()) for one in QUOTED.findall("\n".join(rest))]
    return found, [one for one in quoted if one != GRAMMAR]


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def check(command, naming=False):
    """Raises ValueError or ConfigError where `diffrep` would; leaves the config file that a run would leave.

    Args:
        command: The command.
        naming: Whether a verb alone only names it.
    """
    _, verb, *words = shlex.split(command, comments=True)
    if verb not in VERBS:
        raise ValueError(f"there is no verb {verb!r}")
    if naming and not words:
        return
    parser = Parser(prog=verb)
    import_module(f"diffrep.cli.{verb}").add_arguments(parser)
    words = [re.sub(r"\bSIDE\b", "256", word) for word in words]  # stands for a number of the reader's
    arguments, rest = parser.parse_known_args(words)
    if rest and (not hasattr(arguments, "words") or any(word.startswith("-") for word in rest)):
        raise ValueError(f"unrecognized arguments: {rest}")
    action = getattr(arguments, "action", None)
    schema = SCHEMAS.get(getattr(arguments, "schema", verb if action is None else f"{verb}-{action}"))
    if schema is None:
        return
    given = [*arguments.words, *rest]
    if action == "match":
        images = [word for word in given if "=" not in word and not word.endswith(".yaml")]
        assert len(images) == 2
        given = [word for word in given if word not in images]
    config = read_config(getattr(diffrep.config, schema), given)
    folder = config.folder if verb == "probe" else Path(config.out)
    assert not folder.is_absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where the commands run: it has the configs, and what earlier commands of the same document left."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_shown_commands_work(file):
    text = prose_of(file)
    shown, quoted = commands(text, indent=4 if file.suffix == ".md" else 2)
    mistakes = []
    for command in [*shown, *quoted]:
        try:
            check(command, naming=command in quoted)
        except (ValueError, ConfigError) as error:
            mistakes.append(f"{command}\n    {error}")
    assert not mistakes, "\n".join(mistakes)
    # None is overlooked: what names a verb is a command of a block, or in quotes.
    mentioned = sorted(MENTION.findall(text))
    assert mentioned == sorted(verb for one in [*shown, *quoted] for verb in MENTION.findall(one))


def test_names_in_documents_exist():
    unknown = []
    for file in FILES:
        for name in re.findall(r"(?<![\w/.])diffrep((?:\.[A-Za-z_]\w*)+)", prose_of(file)):
            if name.rpartition(".")[2] not in ("html", "git", "md"):
                try:
                    pkgutil.resolve_name(f"diffrep{name}")
                except (AttributeError, ImportError):
                    unknown.append(f"{file.relative_to(ROOT)}: diffrep{name}")
    assert not unknown, "\n".join(unknown)


def test_the_python_example_of_training(capsys):
    code = (ROOT / "docs" / "training.md").read_text().split("```python\n")[1].split("```")[0]
    exec(compile(code, "training.md", "exec"), {})
    assert capsys.readouterr().out.endswith("euler 5 balanced\n")
    assert Path("runs/own-samples/samples.npz").exists() and Path("runs/own/watch.jsonl").exists()


def test_every_verb_shows_how_it_is_called():
    for verb in VERBS.keys() - {"env", "ls"}:
        shown, _ = commands(prose_of(ROOT / "diffrep" / "cli" / f"{verb}.py"), indent=2)
        assert any(command.split()[1] == verb for command in shown), verb
    assert "`diffrep" in prose_of(ROOT / "README.md")


def test_the_readme_lists_the_verbs():
    rows = re.findall(r"^\| `(\w+)[^`]*` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [row for row in rows if row in VERBS] == [verb for verb in rows]
    assert set(VERBS) <= set(rows)


def test_commands_are_found_as_they_are_written():
    text = (
        "diffrep reads, `diffrep\nprobe store=X` judges.\n```bash\nls\ndiffrep demo\n  --limit 5\n"
        "diffrep ls \\\n    backbones\n```\n\n    diffrep env\n    cd\n'diffrep search' or `diffrep VERB "
        "[config.yaml ...] [key=value ...]`\n"
    )
    shown, quoted = commands(text, indent=4)
    assert shown == ["diffrep demo --limit 5", "diffrep ls  backbones", "diffrep env"]
    assert quoted == ["diffrep probe store=X", "diffrep search"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("diffrep serch out=X", "no verb 'serch'"),
        ("diffrep demo --limits 5", "unrecognized arguments"),
        ("diffrep demo store=X", "unrecognized arguments"),
        ("diffrep probe store=X --dry-run", "unrecognized arguments"),
        ("diffrep layers", "arguments are required: source"),
        ("diffrep ls networks", "invalid choice: 'networks'"),
        ("diffrep probe store=X attention.store=Y", "attention: unknown key"),
        ("diffrep search data=PATH backbone=SOURCE out=X", "request: required and not given"),
        ("diffrep extract configs/extract/none.yaml out=X", "no config file"),
        ("diffrep validate train configs/probe/default.yaml store=X", "train_split: unknown key"),
        ("diffrep vtab runs/vtab/config.yaml --dry-run", "no config file"),
    ],
)
def test_mistakes_are_seen(command, message):
    with pytest.raises((ValueError, ConfigError), match=message):
        check(command)


def test_a_command_may_go_on_from_an_earlier_ones_folder():
    check("diffrep vtab configs/vtab/default.yaml backbone=SOURCE data=PATH data.size=SIDE out=runs/vtab --nproc 2")
    check("diffrep vtab runs/vtab/config.yaml --dry-run batch_size=3")
