"""SDXL's UNet, trained to remove noise from the latents of captioned images."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from settings import Recipe, dtype, processes, render

from . import Task, first, lora_config, read_rows


class Denoiser(nn.Module):
    """Predicts the noise that a random step of the diffusion has added to an image."""

    def __init__(self, unet: nn.Module, scheduler: DDPMScheduler, latent_scale: float) -> None:
        super().__init__()
        self.unet = unet
        self.scheduler = scheduler
        self.latent_scale = latent_scale

    def forward(self, moments: Tensor, prompt: Tensor, pooled: Tensor, time_ids: Tensor) -> dict[str, Tensor]:
        latents = DiagonalGaussianDistribution(moments).sample() * self.latent_scale
        noise = torch.randn_like(latents)
        steps = torch.randint(
            self.scheduler.config.num_train_timesteps, (len(latents),), device=latents.device
        )
        noisy = self.scheduler.add_noise(latents, noise, steps)
        predicted = self.unet(
            noisy.to(prompt.dtype),
            steps,
            encoder_hidden_states=prompt,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
        ).sample
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        wanted = self.scheduler.get_velocity(latents, noise, steps) if velocity else noise
        return {"loss": F.mse_loss(predicted.float(), wanted.float())}


def build(recipe: Recipe) -> Task:
    pipeline = StableDiffusionXLPipeline.from_pretrained(recipe["model"], dtype=dtype(recipe))
    rows = _encode_rows(recipe, pipeline)
    unet = get_peft_model(pipeline.unet, lora_config(recipe))
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    return Task(Denoiser(unet, scheduler, pipeline.vae.config.scaling_factor), unet, rows)


@torch.no_grad()
def _encode_rows(recipe: Recipe, pipeline: Any) -> list[dict[str, Tensor]]:
    """Runs VAE and text encoders once over the few images, so that training needs the UNet alone."""
    data, device = recipe["data"], processes().device
    side = data["resolution"]
    processor = VaeImageProcessor(vae_scale_factor=pipeline.vae_scale_factor)
    frozen = [pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2]
    for module in frozen:
        module.to(device).requires_grad_(False)
    pipeline.vae.float()  # SDXL's VAE overflows in float16
    encoded = []
    for row in first(read_rows(recipe), recipe):
        pixels = processor.preprocess(row[data["image"]].convert("RGB"), height=side, width=side)
        prompt, _, pooled, _ = pipeline.encode_prompt(
            render(data["prompt"], row), device=device, do_classifier_free_guidance=False
        )
        encoded.append(
            {
                "moments": pipeline.vae.encode(pixels.to(device)).latent_dist.parameters[0].cpu(),
                "prompt": prompt[0].cpu(),
                "pooled": pooled[0].cpu(),
                # original size, corner of the crop, size of the crop
                "time_ids": torch.tensor([side, side, 0, 0, side, side], dtype=prompt.dtype),
            }
        )
    for module in frozen:
        module.cpu()
    return encoded
