"""What is trained with alignment: a network and its projectors in one module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffrep.backbones import Backbone
from diffrep.backbones.conditioning import Condition
from diffrep.backbones.dit import LabelEmbedder
from diffrep.taps import Recorder

# Of each term, by layer: maps (B, D, h, w).
Projected = dict[str, dict[str, torch.Tensor]]


class AlignedModel(nn.Module):
    """A network whose forward also gives what projectors make of its layers.

    One module, so that DDP, FSDP and torch.compile see the projectors' gradients like all others.

    Args:
        network: What is trained.
        template: Says how the network is called and what its layers are; no submodule.
        projectors: For each alignment term its projectors, by layer (`AlignmentTerm.projectors`).
        layers: For each term the addresses of its layers, in the order of its projectors.
    """

    def __init__(
        self,
        network: nn.Module,
        template: Backbone,
        projectors: Mapping[str, nn.ModuleDict],
        layers: Mapping[str, list[str]],
    ):
        super().__init__()
        self.network = network
        self.projectors = nn.ModuleDict(projectors)
        self.layers = {name: list(mine) for name, mine in layers.items()}
        self.template = template
        read = list(dict.fromkeys(layer for mine in layers.values() for layer in mine))
        self._addresses = template.addresses(read) if read else {}
        # torch.compile ignores hooks that come after it.
        self._recorder = Recorder(network, self._addresses.values(), detach=False).register()

    def forward(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> tuple[torch.Tensor, Projected]:
        """Predicts.

        Args:
            x: Noised input (B, C, h, w).
            time: Native time (B,).
            cond: Named tensors, a row for each sample.

        Returns:
            The network's raw output, and of each term the projected features by layer.
        """
        if not self._addresses:
            return self.template.call(self.network, x, time, cond), {}
        outputs: list[torch.Tensor] = []
        found = self._recorder.run(lambda: outputs.append(self.template.call(self.network, x, time, cond)), stop=False)
        size = tuple(x.shape[-2:])
        maps = {
            name: self.template._as_map(address, found[address], size) for name, address in self._addresses.items()
        }
        projected = {
            term: {
                layer: project(maps[layer]) for layer, project in zip(self.layers[term], mine.values(), strict=True)
            }
            for term, mine in self.projectors.items()
        }
        return outputs[0], projected

    def train(self, mode: bool = True) -> AlignedModel:
        """Sets the mode; official networks never drop labels by themselves, for which the objective draws."""
        super().train(mode)
        for module in self.network.modules():
            if isinstance(module, LabelEmbedder):
                module.eval()
        return self


def recompute(network: nn.Module, blocks: Iterable[str]) -> None:
    """Makes blocks keep nothing but their input for the backward pass, which runs them once more.

    Args:
        network: What is trained; its blocks' `forward` is wrapped, and hooks on them fire once a step as before.
        blocks: Addresses.
    """
    for name in blocks:
        block = network.get_submodule(name)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
