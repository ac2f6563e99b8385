import os
import resource
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from diffrep.errors import StoreError
from diffrep.store import open_place
from diffrep.store.place import LocalPlace, is_temporary, temporary_name


@pytest.fixture(params=["local", "memory", "file"])
def place(request, tmp_path):
    target = {"local": tmp_path / "store", "memory": f"memory://{tmp_path}/store", "file": f"file://{tmp_path}/store"}
    place = open_place(target[request.param])
    place.make()
    place.make("units")
    return place


def test_files_are_written_read_listed_and_removed(place):
    assert place.name == "store"
    assert place.write("units/0000/a.json", [b"one", memoryview(b"two")])
    assert place.write("units/0000/a.json", [b"three", b"", b"four"])
    assert place.read("units/0000/a.json") == b"threefour"
    assert place.read("units/0000/a.json", 5) == b"four"
    assert place.read("units/0000/a.json", 1, 4) == b"hre"
    assert place.read("units/0000/a.json", 7, 99) == b"ur"
    assert place.read("units/0000/a.json", 3, 3) == b""
    place.write("b", [b""])
    assert (place.list(), place.folders(), place.folders("units")) == (["b"], ["units"], ["0000"])
    assert place.sizes("units/0000") == {"a.json": 9}
    assert (place.size("units/0000/a.json"), place.size("b"), place.size("c")) == (9, 0, None)
    assert (place.list("claims"), place.sizes("claims"), place.folders("claims")) == ([], {}, [])
    place.remove("b")
    place.remove("b")
    place.remove_folder("units")
    place.remove_folder("units")
    assert (place.list(), place.folders(), place.size("units/0000/a.json")) == ([], [], None)
    with pytest.raises(StoreError, match=r"store/b is missing"):
        place.read("b")


def test_stamps_change_with_writes_and_touches(place):
    assert place.stamp("claims/1") is None
    place.touch("claims/1")
    assert place.list("claims") == []
    stamps = [place.create("claims/1", b'{"token": "x"}') and place.stamp("claims/1")]
    for change in (place.touch, place.touch, lambda name: place.write(name, [b'{"token": "y"}'])):
        time.sleep(0.02)
        change("claims/1")
        stamps.append(place.stamp("claims/1"))
    assert len(set(stamps)) == 4
    assert place.read("claims/1").strip() == b'{"token": "y"}'


def test_a_file_is_not_seen_before_its_end(place):
    def parts():
        yield b"begun"
        assert [name for name in place.list() if not is_temporary(name)] == ["old"]
        assert place.read("old") == b"before"
        yield b"ended"

    def broken():
        yield b"begun"
        raise StoreError("a reader failed")

    place.write("old", [b"before"])
    place.write("old", parts())
    assert place.read("old") == b"begunended"
    with pytest.raises(StoreError, match="^a reader failed"):
        place.write("old", broken(), token="0123456789abcdef")
    assert not place.write("old", [b"of a zombie"], still=lambda: False)
    assert (place.list(), place.read("old")) == (["old"], b"begunended")


@pytest.mark.parametrize("whole", [False, True])
def test_of_several_that_create_a_file_one_does(place, whole):
    for name in ("meta.json", "claims/0000001"):
        with ThreadPoolExecutor(8) as threads:
            made = list(threads.map(lambda i, name=name: place.create(name, b"%d" % i, whole), range(8)))
        assert sum(made) == 1
        assert place.read(name) == b"%d" % made.index(True)
    assert (place.list(), place.list("claims")) == (["meta.json"], ["0000001"])


@pytest.mark.parametrize("name", ["../x", "units/../../x", "/etc/passwd"])
def test_names_stay_inside(place, name):
    for call in (
        place.read,
        place.remove,
        place.list,
        place.stamp,
        place.touch,
        lambda name: place.write(name, [b""]),
    ):
        with pytest.raises(StoreError, match="points outside"):
            call(name)


def test_temporary_names(place):
    assert temporary_name("units/0000/1.json", "0123456789abcdef") == "units/0000/.1.json.0123456789abcdef"
    assert is_temporary(temporary_name("index.json"))
    assert not any(map(is_temporary, ["index.json", ".nfs000000000c5a3b0200000001", ".hidden", "..0123456789abcdef"]))


def test_a_store_that_vanished_is_not_made_anew(tmp_path):
    place = open_place(tmp_path / "store")
    place.make("units")
    shutil.rmtree(place.path)
    for name in ("units/0000/a", "claims/1", "config.yaml"):
        with pytest.raises(StoreError, match="the store is not there any more"):
            place.write(name, [b"x"])
    assert not place.path.exists()
    place.path.mkdir()  # the mount point of what was unmounted
    with pytest.raises(StoreError, match="cannot write"):
        place.write("units/0000/a", [b"x"])
    assert place.list() == place.folders() == []


@pytest.mark.parametrize("kind", ["local", "file"])
def test_a_full_disk_leaves_nothing(tmp_path, kind):
    place = open_place(tmp_path if kind == "local" else f"file://{tmp_path}")
    place.write("kept", [b"before"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        for write in (lambda: place.write("kept", [bytes(600), bytes(600)]), lambda: place.create("new", bytes(1200))):
            with pytest.raises(StoreError, match="cannot write .*: File too large; finished units stay"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert place.read("kept") == b"before"
    assert place.list() == ["kept"]


def test_targets_that_cannot_be(tmp_path):
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(StoreError, match="cannot make .*letter/store"):
        open_place(tmp_path / "letter" / "store").make()
    with pytest.raises(StoreError, match="cannot make /sys/diffrep"):
        open_place("/sys/diffrep").make()
    with pytest.raises(StoreError, match="cannot open nonsense://x"):
        open_place("nonsense://x")


def test_a_swept_temporary_file_is_written_again(tmp_path):
    place = open_place(tmp_path)

    def sweep():  # as the end of a job does, once
        left = [name for name in place.list() if is_temporary(name)]
        for name in left[: not swept]:
            place.remove(name)
            swept.append(name)
        return True

    swept = []
    assert place.write("config.yaml", [b"a: 1"], still=sweep)
    assert (len(swept), place.list(), place.read("config.yaml")) == (1, ["config.yaml"], b"a: 1")


def test_local_places_map_and_count(tmp_path):
    place = open_place(tmp_path / "not" / "there")
    assert place.file("a") == tmp_path / "not" / "there" / "a"
    assert place.free() > 0
    assert open_place("memory://x").file("a") is open_place("memory://x").free() is None


class Plain(LocalFileSystem):
    """A file system whose exclusive creation is two steps."""

    protocol = "plain"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("plain://"))


class Drawer(MemoryFileSystem):
    """One that neither moves files nor is known to put them whole."""

    protocol = "drawer"
    store = {}


class Deaf(MemoryFileSystem):
    """One whose server ignores the condition."""

    protocol = "deaf"
    store = {}

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        super().pipe_file(path, value, **kwargs)


def test_file_systems_that_promise_too_little(tmp_path):
    for kind in (Plain, Drawer, Deaf):
        fsspec.register_implementation(kind.protocol, kind, clobber=True)
    (tmp_path / "store").mkdir()
    plain = open_place(f"plain://{tmp_path}/store")
    assert plain.write("a", [b"moved"])
    for place in (plain, open_place("deaf://store")):
        with pytest.raises(StoreError, match="creates no file exclusively.*extract into a local folder"):
            place.create("claims/1", b"x")
        assert place.list("claims") == []
    with pytest.raises(StoreError, match="not known that a file appears whole; allowed are"):
        open_place("drawer://store").write("a", [b"x"])


def test_a_place_goes_through_a_fork(tmp_path):
    place = open_place(f"file://{tmp_path}")
    place.write("a", [b"parent"])
    child = os.fork()
    if not child:
        os._exit(0 if place._fs is not None and place._pid == os.getpid() and place.read("a") == b"parent" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert isinstance(open_place(tmp_path), LocalPlace)
