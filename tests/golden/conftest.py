import pytest

from diffrep.backbones.codec import Codec, Posterior


class StoredPosterior(Codec):
    """Gives the posterior that the published VAE call gave; the photos behind it are not in the repository."""

    image_channels, latent_channels, downscale, random = 3, 4, 8, True

    def __init__(self, mean, logvar, scale=0.18215):
        self.posterior = Posterior(mean * scale, (logvar / 2).exp() * scale)

    def encode(self, images):
        return self.posterior

    def describe(self):
        return {"kind": "stored"}


@pytest.fixture(scope="session")
def stored_posterior():
    """Makes a codec of the mean and the log-variance that a published call gave."""
    return StoredPosterior
