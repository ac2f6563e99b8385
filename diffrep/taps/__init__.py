"""Where to look in a network: addresses, capture with early exit, dry run. Works on any `nn.Module`."""

from diffrep.taps.address import Address, parse_address, site_of
from diffrep.taps.capture import Recorder, capture
from diffrep.taps.dryrun import Call, dry_run, to_meta
from diffrep.taps.points import POINTS, Site

__all__ = [
    "POINTS",
    "Address",
    "Call",
    "Recorder",
    "Site",
    "capture",
    "dry_run",
    "parse_address",
    "site_of",
    "to_meta",
]
