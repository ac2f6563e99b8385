import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.mp
@pytest.mark.slow
def test_nothing_is_lost_or_doubled_when_processes_are_killed():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/chaos.py", "--short"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "every store equal to the undisturbed one" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()[2:4]] == ["kills", "terms"]
