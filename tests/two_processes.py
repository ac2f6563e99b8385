"""Runs the command, or a script, in several ranks that are forked from one process which has imported everything.

A test on two processes would otherwise import torch and its friends four times: the command, torchrun and both ranks.
`conftest.py` starts this file once a session, when the first test needs it, and speaks to it in lines of JSON:

    {"ranks": 2, "words": ["probe", "store=..."], "source": null, "folder": "..."}  ->  {"codes": [0, 0]}

Without a source the words are those of `diffrep`; else they are the arguments of the script. Rank r leaves what it
prints in `folder/out-r` and `folder/err-r`. Each rank sees the variables that `diffrep.dist.launch` and torchrun set,
meets the others over the network, and ends as any interpreter does. Two things differ from a launch by torchrun: the
ranks hash strings alike, and rank 0 holds the store, which torchrun's agent holds otherwise.

Nothing here may compute a gradient: autograd refuses to work in a fork of a process that has.
"""

import gc
import json
import os
import random
import signal
import socket
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

ROOMS = (
    "diffrep.cli", "diffrep.correspond.aggregate", "diffrep.correspond.evaluate", "diffrep.extract.job",
    "diffrep.probe.feedback", "diffrep.probe.run", "diffrep.probe.search", "diffrep.probe.trained_loop",
    "diffrep.probe.vtab", "diffrep.train", "diffusers", "lightning", "sklearn.linear_model",
)  # fmt: skip
GRACE = 5  # seconds that the other ranks have when one has failed


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def torchrun_environment(rank, ranks, port):
    """Returns what torchrun sets, which is nothing for a process that is alone."""
    if ranks == 1:
        return {}
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_WORLD_SIZE": 1, "ROLE_WORLD_SIZE": ranks}
    own = {"RANK": rank, "LOCAL_RANK": rank, "ROLE_RANK": rank, "GROUP_RANK": 0, "ROLE_NAME": "default"}
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": port}
    restarts = {"TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0}
    return {key: str(value) for key, value in (shared | own | address | restarts).items()}


def become(rank, port, request):
    """Makes this fork a rank and returns its exit status."""
    import numpy as np

    for number, name in enumerate((os.devnull, f"out-{rank}", f"err-{rank}")):
        file = os.open(Path(request["folder"], name), os.O_RDWR | os.O_CREAT, 0o600)  # an absolute name replaces
        os.dup2(file, number)
        os.close(file)
    os.environ.update(torchrun_environment(rank, request["ranks"], port))
    random.seed()  # as in processes of their own, which share no random state
    np.random.seed()
    if request["source"] is None:
        from diffrep.cli import main

        return main(request["words"])
    sys.argv = ["script", *request["words"]]
    exec(compile(request["source"], "script", "exec"), {"__name__": "__main__"})
    return 0


def wait(children):
    """Returns the exit statuses; when a rank fails, the others are ended, as torchrun does."""
    codes, deadline = {}, None
    while len(codes) < len(children):
        for pid in set(children) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if deadline is None and any(codes.values()):
            deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            for pid in set(children) - set(codes):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in children]


def serve():
    """Answers one request after another until there are no more."""
    for room in ROOMS:
        import_module(room)
    gc.collect()
    gc.freeze()  # or each fork visits, and so copies, all these objects when it ends
    assert threading.active_count() == 1, f"a fork would lose these threads: {threading.enumerate()}"
    while line := sys.stdin.readline():
        request, port, children = json.loads(line), free_port(), []
        for rank in range(request["ranks"]):
            pid = os.fork()
            if not pid:
                sys.exit(become(rank, port, request))
            children.append(pid)
        print(json.dumps({"codes": wait(children)}), flush=True)


if __name__ == "__main__":
    serve()
