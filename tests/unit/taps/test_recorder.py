import pytest
import torch

from diffrep.errors import LayerError
from diffrep.taps import Recorder, capture, parse_address

LAYERS = {
    "unet2d": ["down_blocks.1", "mid_block:input", "mid_block.attentions.0:q"],
    "dit": ["transformer_blocks.0", "transformer_blocks.1:adaln", "transformer_blocks.1.attn1:v"],
    "sd3": ["transformer_blocks.0", "transformer_blocks.1.attn", "transformer_blocks.1"],
    "flux": ["transformer_blocks.0.attn:q", "single_transformer_blocks.0:adaln", "single_transformer_blocks.0.attn"],
}
IMAGE = {"unet2d": "sample", "dit": "hidden_states", "sd3": "hidden_states", "flux": "hidden_states"}


def recorder_of(net, name):
    return Recorder(net.network, [parse_address(layer, net.network) for layer in LAYERS[name]])


@pytest.mark.parametrize("name", LAYERS)
def test_run_gives_what_capture_gives(tiny, name):
    net = tiny(name)
    recorder = recorder_of(net, name)
    expected = capture(net.network, recorder.addresses, net)
    with recorder:
        for _ in range(2):
            found = recorder.run(net)
            assert list(found) == recorder.addresses
            assert all(torch.equal(found[a], expected[a]) for a in expected)


def test_hooks_do_nothing_outside_run(tiny):
    net = tiny("dit")
    expected = net()
    recorder = recorder_of(net, "dit").register().register()
    assert torch.equal(net(), expected)
    assert not recorder._found
    recorder.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.network.modules())


def test_run_needs_the_hooks(tiny):
    net = tiny("dit")
    recorder = recorder_of(net, "dit")
    with pytest.raises(LayerError, match=r"call register\(\) before run\(\)"):
        recorder.run(net)
    with recorder:
        recorder.run(net)
    with pytest.raises(LayerError, match="not on the network"):
        recorder.run(net)


def test_an_error_leaves_nothing_behind(tiny):
    net = tiny("dit")
    with recorder_of(net, "dit") as recorder:
        with pytest.raises(ZeroDivisionError):
            recorder.run(lambda: 1 / 0)
        with pytest.raises(LayerError, match="did not run.*transformer_blocks.0, "):
            recorder.run(lambda: None)
        expected = net()
        assert len(recorder.run(net)) == 3
        assert torch.equal(net(), expected)


def test_no_addresses_run_the_whole_pass(tiny):
    outputs = []
    assert capture(tiny("dit").network, [], lambda: outputs.append(tiny("dit")())) == {}
    assert len(outputs) == 1


@pytest.mark.compile
@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_one_graph_with_and_without_early_exit(tiny, name, stop):
    torch._dynamo.reset()
    net = tiny(name)
    recorder = recorder_of(net, name).register()

    def features(image):
        return recorder.run(lambda: net.network(**net.inputs | {IMAGE[name]: image}, return_dict=False), stop)

    compiled = torch.compile(features, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for image in (net.inputs[IMAGE[name]], net.inputs[IMAGE[name]] + 1):
            found, expected = compiled(image), features(image)
            assert list(found) == recorder.addresses
            for address, tensor in expected.items():
                torch.testing.assert_close(found[address], tensor, rtol=0, atol=1e-6)
    assert not recorder._found, "features should not live on in the recorder"


@pytest.mark.compile
def test_early_exit_leaves_the_rest_out_of_the_graph(tiny):
    net, sizes = tiny("dit"), []

    def count(graph, _):
        sizes.append(len(graph.graph.nodes))
        return graph

    for layer in ("transformer_blocks.0", "transformer_blocks.2"):
        torch._dynamo.reset()
        recorder = Recorder(net.network, [parse_address(layer, net.network)])
        with recorder, torch.no_grad():
            torch.compile(lambda recorder=recorder: recorder.run(net), fullgraph=True, backend=count)()
    assert sizes[0] < sizes[1] * 0.6


@pytest.mark.compile
@pytest.mark.parametrize("name", ["dit", "flux"])
def test_hooks_may_come_and_go_between_compiled_calls(tiny, name):
    torch._dynamo.reset()
    net = tiny(name)
    recorder = recorder_of(net, name)
    expected = capture(net.network, recorder.addresses, net)
    compiled = torch.compile(lambda: recorder.run(net), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        with recorder:
            compiled()
        others = capture(net.network, [parse_address("transformer_blocks.0:input", net.network)], net)
        assert len(others) == 1
        with recorder, torch.compiler.set_stance("fail_on_recompile"):
            found = compiled()
    for address, tensor in expected.items():
        torch.testing.assert_close(found[address], tensor, rtol=0, atol=1e-6)
