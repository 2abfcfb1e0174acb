"""The network with its objective and its sampler, as one component of a diffusers pipeline."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from training.network.config import DiTConfig
from training.network.dit import MicroDiT
from training.objectives.edm import EDM
from training.objectives.flow import Flow
from training.objectives.sampler import Solver, sample

OBJECTIVES = {"edm": EDM, "flow": Flow}  # what is imported by a table could not be bundled


class MicroDiTModel(ModelMixin, ConfigMixin):
    """A MicroDiT under the key "dit", as in the released project's checkpoints.

    Args:
        network: fields of DiTConfig.
        objective: its name, and its fields.
    """

    @register_to_config
    def __init__(self, network: dict[str, Any], objective: dict[str, Any]) -> None:
        super().__init__()
        self.dit = MicroDiT(DiTConfig(**network))
        fields = {key: value for key, value in objective.items() if key != "name"}
        self.denoiser = OBJECTIVES[objective["name"]](**fields)

    def forward(self, x: Tensor, c_noise: Tensor, y: Any, y_mask: Tensor | None = None) -> Tensor:
        """The raw network F; see `MicroDiT.forward`."""
        return self.dit(x, c_noise, y, y_mask)

    def latent_shape(self) -> tuple[int, int, int]:
        """(C, S, S)."""
        config = self.dit.config
        return config.in_channels, config.input_size, config.input_size

    def sample(
        self,
        noise: Tensor,
        y: Tensor,
        y_mask: Tensor | None,
        steps: int,
        guidance: float,
        progress: Callable[[int, int], None] | None = None,
        solver: Solver = "heun",
    ) -> Tensor:
        """Unit noise (B, C, S, S) -> latents at training's scale; see training.objectives.sampler.

        Weights in half precision, and any on a GPU, compute through autocast.
        """
        kind, own = noise.device.type, self.dit.pos_embed.dtype
        half = own if own != torch.float32 else torch.bfloat16
        with torch.autocast(kind, half, enabled=kind == "cuda" or own != torch.float32):
            return sample(
                self.dit,
                self.denoiser,
                noise,
                y,
                y_mask,
                steps=steps,
                guidance=guidance,
                progress=progress,
                solver=solver,
            )
