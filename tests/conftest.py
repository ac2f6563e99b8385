import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import diffrep
from diffrep.testing import save_images, save_tiny, tiny_backbone

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items):
    without = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(without)


class Forks:
    """Speaks to `two_processes.py`, which is started with the first request.

    Args:
        folder: An empty folder, for what the processes print.
    """

    def __init__(self, folder):
        self.folder = folder
        self.server = None
        self.requests = 0

    def start(self):
        """Starts a process that has imported this very package, whatever the working folder."""
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(diffrep.__file__).parents[1]), *sys.path[1:]])
        command = [sys.executable, str(Path(__file__).with_name("two_processes.py"))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)

    def run(self, *words, source=None, ranks=2):
        """Runs `diffrep WORDS`, or a script with these arguments, and returns codes, out and err, a value a rank."""
        self.server = self.server or self.start()
        folder = self.folder / str(self.requests)
        self.requests += 1
        folder.mkdir()
        request = {"ranks": ranks, "words": [str(word) for word in words], "source": source, "folder": str(folder)}
        try:
            self.server.stdin.write(json.dumps(request) + "\n")
            self.server.stdin.flush()
            answer = json.loads(self.server.stdout.readline())
        except BaseException:  # a test that ran out of time, say: the next one must not read its answer
            self.stop()
            raise
        out, err = ([(folder / f"{name}-{rank}").read_text() for rank in range(ranks)] for name in ("out", "err"))
        return SimpleNamespace(codes=answer["codes"], out=out, err=err)

    def launch(self, processes, words):
        """Stands in for `diffrep.dist.launch`: prints what all ranks printed and returns torchrun's status."""
        done = self.run(*words, ranks=processes)
        print("".join(done.out), end="")
        print("".join(done.err), end="", file=sys.stderr)
        return int(any(done.codes))

    def stop(self):
        """Ends the process and all that it forked."""
        if self.server is not None:
            os.killpg(self.server.pid, signal.SIGKILL)
            self.server.communicate()
            self.server = None


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    """Runs words or a script in two ranks (`run`), or takes the place of `dist.launch` (`launch`)."""
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.stop()


@pytest.fixture(scope="session")
def golden():
    return GOLDEN


@pytest.fixture(scope="session", params=["unet2d", "unet2d-condition", "dit"])
def kind(request):
    return request.param


@pytest.fixture(scope="session")
def backbone(kind, tmp_path_factory):
    return tiny_backbone(kind, tmp_path_factory.mktemp(kind))


@pytest.fixture(scope="session")
def unet_folder(tmp_path_factory):
    return save_tiny("unet2d", tmp_path_factory.mktemp("unet2d"))


@pytest.fixture(scope="session")
def unet(unet_folder):
    from diffrep import load_backbone

    return load_backbone(unet_folder, device="cpu")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def cond(kind):
    """A condition that the parametrised backbone accepts, for one image."""
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(3)) if kind == "unet2d-condition" else None


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """Folders of tiny backbones, by kind, each made when it is asked for; nothing may be changed in them."""
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = save_tiny(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder
