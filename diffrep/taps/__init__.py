"""Where to look in a network: addresses, capture with early exit, dry run. Works on any `nn.Module`."""

from diffrep.taps.address import Address, parse_address
from diffrep.taps.capture import capture
from diffrep.taps.dryrun import Call, dry_run, to_meta

__all__ = ["Address", "Call", "capture", "dry_run", "parse_address", "to_meta"]
