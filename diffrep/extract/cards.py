"""What named GPUs can do at most, as their makers state it."""

from __future__ import annotations

from dataclasses import dataclass

from diffrep.errors import UnknownNameError


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        half: Peak of dense products in bfloat16, TFLOP/s.
        single: Peak in float32 outside of tensor cores, TFLOP/s: what torch multiplies matrices with unless TF32 is
            switched on.
        memory: GB, 10^9 bytes.
        bfloat16: Whether it has bfloat16; `half` is that of float16 where not.
    """

    half: float
    single: float
    memory: int
    bfloat16: bool = True

    def peak(self, dtype: str) -> float:
        """Returns the peak for networks of a dtype, FLOP/s."""
        return 1e12 * (self.single if dtype == "float32" else self.half)


# Vendors' data sheets print peaks with 2:4 sparsity, twice what a dense network can reach; these are without.
CARDS: dict[str, Card] = {
    "T4": Card(65, 8.1, 16, bfloat16=False),  # NVIDIA T4 data sheet (2019)
    "V100": Card(125, 15.7, 32, bfloat16=False),  # NVIDIA V100 data sheet (2020), SXM2
    "A10": Card(125, 31.2, 24),  # NVIDIA A10 data sheet (2021)
    "RTX4090": Card(165.2, 82.6, 24),  # NVIDIA Ada GPU architecture whitepaper, with float32 accumulation
    "L4": Card(121, 30.3, 24),  # NVIDIA L4 data sheet (2023), 242 with sparsity
    "L40S": Card(362.05, 91.6, 48),  # NVIDIA L40S data sheet (2023)
    "A100": Card(312, 19.5, 80),  # NVIDIA A100 data sheet (2022)
    "H100": Card(989.4, 66.9, 80),  # NVIDIA H100 architecture whitepaper, SXM5
    "H200": Card(989.4, 66.9, 141),  # NVIDIA H200 data sheet (2024), SXM
    "B200": Card(2250, 75, 180),  # NVIDIA Blackwell architecture technical brief and DGX B200 data sheet, HGX board
    "MI300X": Card(1307.4, 163.4, 192),  # AMD Instinct MI300X data sheet (2023)
}
SHOWN = ("L4", "A100", "H100")


def read_cards(text: str) -> tuple[str, ...]:
    """Returns the names in a list such as "A100,h100"; "all" is all of them.

    Raises:
        UnknownNameError: A card is not known.
    """
    if text == "all":
        return tuple(CARDS)
    names = {name.lower(): name for name in CARDS}
    given = [name.strip() for name in text.split(",")]
    for name in given:
        if name.lower() not in names:
            raise UnknownNameError("card", name, CARDS, "'all' takes all of them")
    return tuple(dict.fromkeys(names[name.lower()] for name in given))
