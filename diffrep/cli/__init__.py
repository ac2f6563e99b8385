"""The `diffrep` command: one module a verb, each with `add_arguments` and `run`; torch is imported inside `run`."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module

from diffrep._version import __version__
from diffrep.errors import DiffrepError, Stopped, printable

VERBS = {
    "demo": "the whole path on the bundled network and images, ending in report.html",
    "layers": "table of a backbone's layers: order, shape, stride, cost",
    "extract": "images -> feature store",
    "probe": "judge every layer and level of a store by classification",
    "search": "successive halving over layers and levels, extracting only what is still in the race",
    "vtab": "extract, probe and average the 19 tasks of VTAB-1k",
    "feedback": "train DifFeed, which back-propagates through the frozen U-Net",
    "correspond": "match key points between images: evaluate, train, match, warp",
    "convert": "checkpoint -> safetensors and JSON that every verb opens",
    "train": "train a diffusion model, with representation alignment (REPA) or without; or a student of a backbone",
    "sample": "make images with a diffusion model: PNG files, the .npz that evaluators read, a grid",
    "report": "write report.html again from a run folder",
    "store": "list, verify, repair, merge and export feature stores",
    "slurm": "submit a verb to a SLURM cluster, from where it comes back when it is preempted",
    "ls": "list bundled backbones and data sets",
    "validate": "check a config and print it resolved",
    "env": "versions, devices and threads, for bug reports",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 2 a mistake to mend, 130 interrupted, 143 stopped."""
    parser = argparse.ArgumentParser(
        prog="diffrep",
        description="Read representations out of frozen diffusion models.",
        epilog="Configs: diffrep VERB [config.yaml ...] [key=value ...]. 'diffrep VERB --help' has examples.",
    )
    parser.add_argument("--version", action="version", version=f"diffrep {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, text in VERBS.items():
        module = import_module(f"diffrep.cli.{name}")
        verb = verbs.add_parser(
            name, help=text, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "words") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # config words behind an option, which argparse leaves over
        arguments.words += rest
    try:
        return arguments.run(arguments) or 0
    except Stopped as error:
        print(printable(f"diffrep {arguments.verb}: {error}"), file=sys.stderr)
        return 143  # what a shell reports of a process that SIGTERM ended
    except DiffrepError as error:
        print(printable(f"diffrep {arguments.verb}: error: {error}"), file=sys.stderr)
        return 2
    except BrokenPipeError:  # as under `| head`; Python would complain again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted; what was finished stays", file=sys.stderr)
        return 130
