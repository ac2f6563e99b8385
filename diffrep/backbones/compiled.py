"""Capture by compiled code: one graph, the repeated blocks only, or CUDA graphs."""

from __future__ import annotations

import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from diffrep.backbones.layer import CONTAINERS
from diffrep.errors import BackendUnavailable, UnknownNameError
from diffrep.taps import Address, Recorder, site_of

if TYPE_CHECKING:
    from diffrep.backbones.backbone import Backbone
    from diffrep.backbones.conditioning import Condition

Mode = Literal["graph", "regional", "cudagraphs"]
# What a user may write for `compile`, and how the compiler is then used.
MODES: dict[bool | str, Mode | None] = {
    False: None,
    True: "graph",
    "regional": "regional",
    "cudagraphs": "cudagraphs",
}
PLAIN = (bool, int, float, str, type(None))


def compile_mode(given: bool | str, device: torch.device) -> Mode | None:
    """Returns how to compile, or None for not at all.

    Args:
        given: False, True, "regional" or "cudagraphs".
        device: Where the network is.

    Raises:
        UnknownNameError: There is no such mode.
        BackendUnavailable: The device has no CUDA graphs.
    """
    if given not in MODES:
        raise UnknownNameError("compile mode", str(given), [str(mode).lower() for mode in MODES])
    mode = MODES[given]
    if mode == "cudagraphs" and device.type not in ("cuda", "meta"):
        raise BackendUnavailable(
            f"compile=cudagraphs records CUDA graphs, and the device is {device.type}; use compile=true or "
            "compile=regional there"
        )
    return mode


def compiled_capture(backbone: Backbone, addresses: tuple[Address, ...]) -> Callable[..., dict[Address, torch.Tensor]]:
    """Returns the function from what `Backbone.call` takes, x, time and condition, to the features of some layers."""
    if backbone.compile_mode == "regional":
        return RegionalCapture(backbone, addresses)
    return CompiledCapture(backbone, addresses, backbone.compiler, graphs=backbone.compile_mode == "cudagraphs")


class CompiledCapture:
    """The function from a network's arguments to the features of chosen layers, compiled as one graph.

    torch.compile ignores hooks that come after it, so they are in place before the first call; and because it does not
    look at hooks again, other captures of the same network are not disturbed once they are gone.

    Args:
        backbone: The backbone.
        addresses: What to read.
        compiler: Backend of torch.compile.
        graphs: Record CUDA graphs and replay them, one for each shape of the arguments.
    """

    def __init__(self, backbone: Backbone, addresses: tuple[Address, ...], compiler: str, graphs: bool = False):
        self.recorder = Recorder(backbone.network, addresses)
        self.graphs = graphs
        self._looked = False

        def features(x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[Address, torch.Tensor]:
            return self.recorder.run(lambda: backbone.call(backbone.network, x, time, cond))

        how: dict[str, Any] = {"mode": "reduce-overhead", "dynamic": False} if graphs else {}
        self.function = torch.compile(_own_copy(features), fullgraph=True, backend=compiler, **how)

    def __call__(self, *arguments: Any) -> dict[Address, torch.Tensor]:
        """Returns the features for x, time and condition, as `Backbone.call` takes them."""
        x, time, cond = arguments
        if self.graphs:
            return self._replay(*arguments)
        _mark_batch((x, time, *cond.values()), len(x))
        with self.recorder:
            return self.function(*arguments)

    def _replay(self, *arguments: Any) -> dict[Address, torch.Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        skips = torch._dynamo.utils.counters["inductor"]
        before = skips["cudagraph_skips"]
        with self.recorder:
            # The next replay writes where these lie.
            found = {address: tensor.clone() for address, tensor in self.function(*arguments).items()}
        if skips["cudagraph_skips"] > before and not self._looked:
            self._looked = True
            warnings.warn(
                "torch could not record a CUDA graph of this network, which now runs compiled without one; "
                "TORCH_LOGS=perf_hints tells why",
                stacklevel=4,
            )
        return found


class RegionalCapture:
    """Capture with compiled blocks in an eager network: a short compilation, and one for all sets of layers.

    The forward of a block is compiled and not its call, so that hooks on the block itself work as ever. A block that
    holds a wanted layer inside runs as it is: compiled code would not see the hook there.

    Args:
        backbone: The backbone.
        addresses: What to read.
    """

    def __init__(self, backbone: Backbone, addresses: tuple[Address, ...]):
        self.backbone = backbone
        self.recorder = Recorder(backbone.network, addresses)
        inside = [site_of(address, backbone.network).module for address in addresses]
        self.regions = {
            path: region
            for path, region in backbone.regions.items()
            if not any(module.startswith(f"{path}.") for module in inside)
        }

    def __call__(self, *arguments: Any) -> dict[Address, torch.Tensor]:
        """Returns the features for x, time and condition, as `Backbone.call` takes them."""
        network = self.backbone.network
        with self.recorder, _in_place(self.regions.values(), len(arguments[0])):
            return self.recorder.run(lambda: self.backbone.call(network, *arguments))


class Region:
    """One block and its compiled forward.

    Args:
        block: The block.
        function: The forward, compiled, as a function of the block and its arguments; blocks of a kind share it.
    """

    def __init__(self, block: nn.Module, function: Callable[..., Any]):
        self.block, self.function = block, function
        self.batch = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the block."""
        _mark_batch((*args, *kwargs.values()), self.batch)
        return self.function(self.block, *args, **kwargs)


def find_regions(network: nn.Module, compiler: str) -> dict[str, Region]:
    """Finds the blocks that occur several times and compiles one forward for each kind.

    They are the outermost modules, with children of their own, whose class, settings and shapes of weights another
    module has too. Compilation itself comes with the first call.

    Args:
        network: The network.
        compiler: Backend of torch.compile.

    Returns:
        Each block by its path.
    """
    modules = {path: module for path, module in network.named_modules() if path and _is_block(module)}
    kinds = {path: _kind(module) for path, module in modules.items()}
    count = Counter(kinds.values())
    functions: dict[Any, Callable[..., Any]] = {}
    found: dict[str, Region] = {}
    for path, module in modules.items():  # outer ones first
        kind = kinds[path]
        if count[kind] < 2 or any(path.startswith(f"{outer}.") for outer in found):
            continue
        if kind not in functions:
            functions[kind] = torch.compile(_own_copy(type(module).forward), fullgraph=True, backend=compiler)
        found[path] = Region(module, functions[kind])
    return found


def _is_block(module: nn.Module) -> bool:
    if isinstance(module, (*CONTAINERS, nn.Sequential)) or next(module.children(), None) is None:
        return False
    # An instance with a forward of its own, as offloading makes them, or one in TorchScript, is left alone.
    whole = isinstance(type(module).forward, types.FunctionType) and "forward" not in vars(module)
    return whole and next(module.parameters(), None) is not None


def _kind(module: nn.Module) -> Any:
    """Returns what blocks have in common that can share compiled code: it is traced with all plain settings."""
    inner = tuple(
        (path, type(one), tuple((name, value) for name, value in vars(one).items() if isinstance(value, PLAIN)))
        for path, one in module.named_modules()
    )
    return inner, tuple((name, tuple(weight.shape), weight.dtype) for name, weight in module.named_parameters())


@contextmanager
def _in_place(regions: Iterable[Region], batch: int) -> Iterator[None]:
    """Puts regions in the place of their blocks' forwards, for one pass: at other times the network is untouched."""
    regions = list(regions)
    try:
        for region in regions:
            region.batch = batch
            region.block.__dict__["forward"] = region
        yield
    finally:
        for region in regions:
            region.block.__dict__.pop("forward", None)


def _mark_batch(tensors: Iterable[Any], batch: int) -> None:
    # The last batch of a unit is smaller, and would be compiled anew; one row is always a case of its own.
    if batch < 2:
        return
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.ndim and len(tensor) == batch:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def _own_copy(function: types.FunctionType) -> types.FunctionType:
    # torch counts recompilations for each code object; without one of its own, the ninth set of layers, or the ninth
    # kind of block of a class, would fail.
    code, name = function.__code__.replace(), function.__name__
    own = types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own
