"""Schemas of what a diffusion model is trained to predict: flows, DDPM, EDM."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from diffrep.config.schema import NotNegative, Positive, Section


class FlowConfig(Section):
    """Training along an interpolant between data and noise: flow matching, SiT (Ma et al., 2024), REPA.

    Which way time runs is the network's own convention: from the data in REPA, to the data in SiT.

    Attributes:
        kind: "flow".
        path: "linear", "cosine" (SiT's GVP) or "vp".
        prediction: "velocity" (v), "epsilon", "sample" (x) or "score".
        weighting: SiT's weights of the squared error: "none", "velocity" or "likelihood"; they are for "epsilon" and
            "score".
        density: Where times are drawn: "uniform", or "logit-normal": sigma = exp(N(mean, std)), which REPA calls
            lognormal.
        mean: Of log sigma, for "logit-normal".
        std: Likewise.
    """

    main_field: ClassVar[str] = "kind"

    kind: Literal["flow"] = "flow"
    path: Literal["linear", "cosine", "vp"] = "linear"
    prediction: Literal["velocity", "epsilon", "sample", "score"] = "velocity"
    weighting: Literal["none", "velocity", "likelihood"] = "none"
    density: Literal["uniform", "logit-normal"] = "uniform"
    mean: float = 0.0
    std: Positive = 1.0


class DDPMConfig(Section):
    """Training on the timesteps of a discrete schedule (Ho et al., 2020); arguments of diffusers' `DDPMScheduler`.

    A network with twice as many output channels as inputs learns its variance too, with the variational bound of
    Nichol and Dhariwal (2021).

    Attributes:
        kind: "ddpm".
        num_train_timesteps: Length of the schedule.
        beta_start: First beta of "linear" and "scaled_linear".
        beta_end: Last beta of them.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        prediction_type: "epsilon", "v_prediction" or "sample".
        density: "uniform" over the timesteps, or "low": t = T u^2, which spends more steps on little noise, where
            features are read.
        vlb_weight: Weight of the variational bound of a learned variance.
    """

    main_field: ClassVar[str] = "kind"

    kind: Literal["ddpm"] = "ddpm"
    num_train_timesteps: PositiveInt = 1000
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    density: Literal["uniform", "low"] = "uniform"
    vlb_weight: NotNegative = 1.0


class EDMConfig(Section):
    """EDM's training (Karras et al., 2022): ln sigma is Gaussian, the weight is (sigma^2 + s^2) / (sigma s)^2.

    Attributes:
        kind: "edm".
        mean: Mean of ln sigma.
        std: Its standard deviation.
        sigma_data: s, the standard deviation of the data.
    """

    main_field: ClassVar[str] = "kind"

    kind: Literal["edm"] = "edm"
    mean: float = -1.2
    std: Positive = 1.2
    sigma_data: Positive = 0.5


def _bare_kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


# A bare string is the `kind`.
ObjectiveConfig = Annotated[
    FlowConfig | DDPMConfig | EDMConfig, Field(discriminator="kind"), BeforeValidator(_bare_kind)
]
