"""The networks as they are written: the model and nothing else."""

from minpaint.models.config import UNetConfig, VAEConfig
from minpaint.models.unet import UNet
from minpaint.models.vae import VAE

__all__ = ["VAE", "UNet", "UNetConfig", "VAEConfig"]
