import pytest
import torch
from torch import nn

from diffrep.errors import LayerError
from diffrep.taps import Address, capture, dry_run, parse_address


class Chain(nn.Module):
    """Three layers registered in another order than they run; the first output is edited in place."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 4)
        self.first = nn.Linear(4, 4)
        self.middle = nn.Linear(4, 4)
        self.twice = nn.SiLU()
        self.unused = nn.Linear(4, 4)
        self.ran = []

    def forward(self, x):
        x = self.first(x)
        x += 1
        self.ran.append("first")
        x = self.twice(self.middle(self.twice(x)))
        self.ran.append("middle")
        x = self.last(x)
        self.ran.append("last")
        return x


@pytest.fixture
def chain():
    return Chain().requires_grad_(False)


def test_capture_copies_before_in_place_edits_and_stops_early(chain):
    x = torch.randn(2, 4)
    found = capture(chain, [Address("first"), Address("middle")], lambda: chain(x))
    assert torch.equal(found[Address("first")], chain.first(x))
    assert chain.ran == ["first"], "the pass should end inside `middle`'s hook"


def test_input_point_stops_before_the_module(chain):
    x = torch.randn(2, 4)
    before = capture(chain, [Address("last", "input")], lambda: chain(x))[Address("last", "input")]
    assert torch.equal(chain.last(before), chain(x))


def test_layers_that_do_not_run_raise(chain):
    with pytest.raises(LayerError, match="did not run.*unused"):
        capture(chain, [Address("first"), Address("unused")], lambda: chain(torch.randn(1, 4)))
    assert not chain.first._forward_hooks, "hooks must go, whatever happens"


def test_other_errors_pass_and_hooks_go(chain):
    with pytest.raises(RuntimeError):
        capture(chain, [Address("last")], lambda: chain(torch.randn(1, 5)))
    assert not chain.last._forward_hooks


@pytest.mark.parametrize(
    ("text", "message"),
    [("frist", "did you mean 'first'"), ("first:outputs", "points are output, input"), ("", "no layer ''")],
)
def test_wrong_addresses(chain, text, message):
    with pytest.raises(LayerError, match=message):
        parse_address(text, chain)


def test_a_module_list_has_no_output():
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(LayerError, match="blocks.0"):
        parse_address("blocks", model)


def test_dry_run_has_execution_order_flops_and_calls(chain):
    calls, total = dry_run(chain, lambda meta: meta(torch.zeros(1, 4, device="meta")))
    names = [call.module for call in calls]
    assert names == ["first", "twice", "middle", "last"]
    assert [call.calls for call in calls] == [1, 2, 1, 1]
    assert [call.flops_to_here for call in calls if call.module != "twice"] == [32, 64, 96]
    assert total == 96
    assert not chain.first._forward_hooks
    assert chain.first.weight.device.type == "cpu"


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("flux", ["transformer_blocks.0", "single_transformer_blocks.0"]),
        ("sd3", ["transformer_blocks.0", "transformer_blocks.1"]),
    ],
)
def test_blocks_of_two_streams_give_the_image(tiny, family, names):
    net = tiny(family)
    found = capture(net.network, [Address(name) for name in names], net)
    assert [tuple(feature.shape) for feature in found.values()] == [(2, 16, 16), (2, 16, 16)]


def test_an_unknown_tuple_is_refused(chain):
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    model = nn.Sequential(Two())
    with pytest.raises(LayerError, match="which is the image stream"):
        capture(model, [Address("0")], lambda: model(torch.zeros(1)))
