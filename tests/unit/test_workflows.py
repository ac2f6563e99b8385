"""What no test run on this machine would notice: the container file, the workflows and the scripts that they name."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

from diffrep.cli import main

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.sh"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def module_of(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# Container file


def instructions():
    """Returns the (keyword, rest) of each instruction."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in joined if line.strip()]


def all_of(keyword):
    return [rest for name, rest in instructions() if name == keyword]


def test_the_image_is_made_of_files_that_are_sent():
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    assert "*" in ignored
    for copy in all_of("COPY"):
        *sources, _ = copy.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source.split('/')[0]}" in ignored, source
    shown = re.findall(r"configs/[\w/]+\.yaml", (ROOT / "Dockerfile").read_text())
    assert shown and all((ROOT / name).exists() for name in shown)


def test_the_image_names_no_index_and_no_root():
    text = (ROOT / "Dockerfile").read_text()
    assert "://" not in text
    defaults = dict(one.split("=", 1) for one in all_of("ARG"))
    assert defaults["PIP_INDEX_URL"] == defaults["TORCH_INDEX"] == '""'
    extras = defaults["EXTRAS"].strip('"').split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    order = [name for name, _ in instructions()]
    assert all_of("USER") == ["user"] and order.index("USER") < order.index("ENTRYPOINT")
    assert not [rest for name, rest in instructions()[order.index("USER") :] if name in ("RUN", "COPY")]
    assert json.loads(all_of("ENTRYPOINT")[0])[-1] in PROJECT["scripts"]


def test_the_shell_of_the_image_is_sound():
    for command in [re.sub(r"^(--\S+ +)+", "", rest) for rest in all_of("RUN")]:
        subprocess.run(["sh", "-n", "-c", command], check=True)


@pytest.mark.parametrize(("content", "status"), [(None, 1), ("diffrep_images_total 1\n", 0)])
def test_the_health_check_is_a_command(content, status, tmp_path, capsys):
    file = tmp_path / "run.prom"
    if content is not None:
        file.write_text(content)
    _, _, command = all_of("HEALTHCHECK")[0].partition("CMD ")
    guard, _, verb = command.partition(" || ")
    assert subprocess.run(["sh", "-c", guard], env={"DIFFREP_MONITOR": ""}).returncode == 0
    assert subprocess.run(["sh", "-c", guard], env={"DIFFREP_MONITOR": str(file)}).returncode == 1
    words = shlex.split(verb.replace("$DIFFREP_MONITOR", str(file)))
    assert words[0] == "diffrep" and main(words[1:]) == status


LISTING = """
import json
from setuptools import Distribution
distribution = Distribution({"script_name": "setup.py"})  # a name it compares with, no file
distribution.parse_config_files()
build = distribution.get_command_obj("build_py")
build.ensure_finalized()
build.manifest_files = {}  # there is no MANIFEST.in; looking for one would write files
data = [file for package in build.packages for file in build.find_data_files(package, build.get_package_dir(package))]
print(json.dumps(data + [file for _, _, file in build.find_all_modules()]))
"""


def test_everything_in_the_package_is_installed():
    """Asks setuptools, as `pip install` does, for the files of the wheel."""
    done = subprocess.run([sys.executable, "-c", LISTING], cwd=ROOT, capture_output=True, text=True, check=True)
    installed = {Path(name) for name in json.loads(done.stdout.splitlines()[-1])}
    files = {one.relative_to(ROOT) for one in (ROOT / "diffrep").rglob("*") if one.is_file()}
    assert {one for one in files if "__pycache__" not in one.parts} == {one for one in installed if one in files}


# Workflows


def jobs():
    return [(file, name, job) for file in WORKFLOWS for name, job in yaml.safe_load(file.read_text())["jobs"].items()]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_a_workflow_is_bounded(file):
    text = file.read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"] and "://" not in text
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 180, name
        uses = [step["uses"] for step in job["steps"] if "uses" in step]
        assert uses and all(re.fullmatch(r"actions/[\w-]+@v\d+", one) for one in uses), name
        pythons = [step["with"] for step in job["steps"] if step.get("uses", "").startswith("actions/setup-python")]
        assert all(one["cache"] == "pip" and (ROOT / one["cache-dependency-path"]).exists() for one in pythons)


def test_workflows_run_what_is_there():
    named = set()
    for _, _, job in jobs():
        for command in [step["run"] for step in job["steps"] if "run" in step]:
            for name in re.findall(r"(?<![\w/])(?:\./)?((?:scripts|configs)/[\w./*-]+)", command):
                found = list(ROOT.glob(name))
                assert found, name
                named |= {one.name for one in found if command.lstrip().startswith("./")}
    assert {"test.sh", "test_floors.sh", "gpu_check.sh"} <= named
    for script in SCRIPTS:
        assert script.stat().st_mode & 0o111 or script.name == "setup.sh", f"{script.name} is not executable"
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_lowest_python_is_tested():
    lowest = PROJECT["requires-python"].removeprefix(">=")
    text = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    matrix = yaml.safe_load(text)["jobs"]["newest"]["strategy"]["matrix"]["python"]
    assert matrix[0] == lowest and set(re.findall(r'python-version: "(.*)"', text)) == {lowest}


# Floors


def test_every_dependency_has_a_floor():
    floors = module_of(ROOT / "scripts" / "floors.py").floors
    found = floors(PROJECT)
    assert {"numpy", "pydantic", "pytest", "transformers"} <= found.keys() and "torch" not in found
    given = {"name": "own", "dependencies": ["torch>=2", "a[x,y]>=1.10,<2"]}
    given["optional-dependencies"] = {"dev": ["own[more]", "b >= 3"], "more": ["c!=1,>=0.5rc1"]}
    assert floors(given) == {"a": "1.10", "b": "3", "c": "0.5rc1"}
    with pytest.raises(ValueError, match="b<3: a floor such as >=1.2 is needed"):
        floors(given | {"dependencies": ["b<3"]})


# GPU checks


def test_the_gpu_check_knows_every_bench():
    check = module_of(ROOT / "scripts" / "gpu_check.py")
    scripts = {file.stem for file in (ROOT / "scripts" / "bench").glob("*.py")} - {"timing"}
    assert {bench.script for bench in check.BENCHES.values()} == scripts
    for bench in check.BENCHES.values():
        options = set(re.findall(r"--[a-z-]+", bench.gpu + " " + bench.cpu)) | {"--json"}
        text = (ROOT / "scripts" / "bench" / f"{bench.script}.py").read_text()
        assert {one for one in options if f'"{one}"' not in text} == set(), bench.script


def test_a_gpu_check_without_a_gpu(tmp_path, monkeypatch, capsys):
    """It goes on behind a bench that fails, and leaves its files all the same."""
    check = module_of(ROOT / "scripts" / "gpu_check.py")
    monkeypatch.setattr(check, "BENCHES", {"gone": check.Bench("gone", "", "--some")} | check.BENCHES)
    words = ["--cpu", "--out", str(tmp_path), "--only", "gone", "layers", "codec"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *words])
    assert check.main() == 1
    found, table = (tmp_path / f"gpu_check.{ending}" for ending in ("json", "md"))
    found, table = json.loads(found.read_text()), table.read_text()
    assert found["failed"] == ["gone"] and found["versions"]["torch"] and str(tmp_path) in capsys.readouterr().out
    gone, layers, codec = found["checks"].values()
    assert gone["status"] == "failed" and gone["error"].startswith("exit status 2: ") and "gone.py" in gone["error"]
    assert layers["status"] == "passed" and layers["rows"][0]["name"] == "edm-cifar10"
    assert codec["status"] == "left out" and codec["error"] == "needs --codec FOLDER and --data FOLDER"
    assert "| layers | passed |" in table and "| layers | | | edm-cifar10, dec.16x16_block1 |" in table


def test_a_check_that_hangs_is_ended_with_its_children(tmp_path):
    check = module_of(ROOT / "scripts" / "gpu_check.py")
    child = f"touch {tmp_path}/begun; sleep 3; touch {tmp_path}/late"
    found = check.run(["bash", "-c", f"({child}) & echo waiting; wait"], tmp_path / "logs" / "some.txt", 1)
    assert found["status"] == "timed out" and found["error"] == "after 1 s: waiting"
    time.sleep(2.5)
    assert (tmp_path / "begun").exists() and not (tmp_path / "late").exists()


def test_outcomes_of_tests_are_read(tmp_path):
    check = module_of(ROOT / "scripts" / "gpu_check.py")
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'one|two'\n"
        "@pytest.mark.skip(reason='no CUDA device')\n"
        "def test_away(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", str(tmp_path), f"--junitxml={tmp_path / 'tests.xml'}"]
    bare = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # plugins take seconds
    subprocess.run([*command, "-c", "/dev/null"], cwd=tmp_path, env=bare, capture_output=True)
    good, bad, away = check.outcomes(tmp_path / "tests.xml")
    assert [one["outcome"] for one in (good, bad, away)] == ["passed", "failed", "skipped"]
    assert good["test"] == "test_some.test_good" and away["message"] == "no CUDA device"
    found = {"devices": [{"name": "Card"}], "versions": {"torch": "2"}, "machine": {"time": "now", "cores": 1}}
    found["checks"] = {"tests": {"status": "failed", "seconds": 1.0, "tests": [good, bad, away]}}
    table = check.table(found)
    assert "| tests | failed | 1.0 | | 1 passed, 1 failed, 1 skipped |" in table
    assert "test_some.test_bad | AssertionError: one\\|two" in table and "test_good" not in table
