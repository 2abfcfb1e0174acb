"""Pictures from prompts with a MicroDiT: the same as `python -m training.generate` paints.

pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
pipe("a red fox", seed=7).images[0]
"""

import html
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from training.randomness import keyed_seed

try:
    import ftfy
except ImportError:  # it mends captions whose characters were decoded wrongly; few are
    ftfy = None


class MicroDiTPipeline(DiffusionPipeline):
    """A MicroDiT with its VAE and text encoder.

    Args:
        text: "full" attends padded captions, as the official code does; "trimmed" real tokens only.
        text_length: tokens of a padded caption.
        pad_id: the token that fills it up.
        text_mask: whether the text encoder is told what is padding (T5).
        clean: what is done to a prompt: "lower", "whitespace" (both as in open_clip) or "".
        latent_scale, latent_shift: model latent = (VAE's latent - shift) * scale.
        attribution: what has to be said beside the pictures.
    """

    transformer: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        transformer: ModelMixin,
        vae: AutoencoderKL,
        text_encoder: PreTrainedModel,
        tokenizer: Any,
        text: str = "full",
        text_length: int = 77,
        pad_id: int = 0,
        text_mask: bool = False,
        clean: str = "",
        latent_scale: float = 1.0,
        latent_shift: float = 0.0,
        attribution: Any = (),
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(
            text=text,
            text_length=text_length,
            pad_id=pad_id,
            text_mask=text_mask,
            clean=clean,
            latent_scale=latent_scale,
            latent_shift=latent_shift,
            attribution=attribution,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = 30,
        guidance_scale: float = 5.0,
        seed: int = 0,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """One picture a prompt.

        Args:
            num_inference_steps: N Heun steps, 2 N - 1 evaluations of the network.
            guidance_scale: 1 is none; the paper's default is 5.
            seed: picture i is a function of (seed, i, its prompt).
            generator: draws the noise instead of `seed`.
            output_type: "pil", "np" (float (N, H, W, 3) in [0, 1]) or "latent".
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        device = self._execution_device
        y, y_mask = self.encode_prompt(prompts)
        noise = self._noise(len(prompts), seed, generator)
        with self.progress_bar(total=num_inference_steps) as bar:
            latents = self.transformer.sample(
                noise.to(device),
                y.to(device),
                None if y_mask is None else y_mask.to(device),
                steps=num_inference_steps,
                guidance=guidance_scale,
                progress=lambda done, steps: bar.update(),
            )
        images: Any = latents
        if output_type != "latent":
            images = self._decode(latents)
            if output_type == "pil":
                images = [Image.fromarray(image) for image in images]
            else:
                images = images.astype(np.float32) / 255
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
        """Token vectors (B, L, W) as training saw them; in a trimmed model their mask (B, L)."""
        config: Any = self.config
        ids = self.tokenizer(
            [_clean(prompt, config.clean) for prompt in prompts],
            max_length=config.text_length,
            truncation=True,
        ).input_ids
        lengths = torch.tensor([len(row) for row in ids])
        padded = torch.full((len(ids), config.text_length), config.pad_id)
        for row, own in zip(padded, ids, strict=True):
            row[: len(own)] = torch.tensor(own)
        device = self._execution_device
        mask = torch.arange(config.text_length) < lengths[:, None]
        extra = {"attention_mask": mask.long().to(device)} if config.text_mask else {}
        tokens = self.text_encoder(padded.to(device), **extra).last_hidden_state
        tokens = tokens.half().float().cpu()  # cached token vectors are float16
        if config.text == "full":
            return tokens, None
        longest = int(lengths.max())
        mask = mask[:, :longest]
        return tokens[:, :longest] * mask[..., None], mask

    def _noise(self, count: int, seed: int, generator: torch.Generator | None) -> Tensor:
        shape = self.transformer.latent_shape()
        if generator is not None:
            return torch.randn(count, *shape, generator=generator, device=generator.device)
        keyed = [
            torch.Generator().manual_seed(keyed_seed(seed, "picture", i)) for i in range(count)
        ]
        return torch.stack([torch.randn(shape, generator=own) for own in keyed])

    def _decode(self, latents: Tensor) -> np.ndarray:
        """Latents of the model -> uint8 (N, H, W, 3)."""
        config: Any = self.config
        raw = latents / config.latent_scale + config.latent_shift
        x = self.vae.decode(raw.to(self.vae.device, self.vae.dtype), return_dict=False)[0].float()
        x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
        return x.permute(0, 2, 3, 1).cpu().numpy()


def _clean(text: str, how: str) -> str:
    if not how:
        return text
    if ftfy is not None:
        text = ftfy.fix_text(text)
    text = " ".join(html.unescape(html.unescape(text)).split())
    return text.lower() if how == "lower" else text
