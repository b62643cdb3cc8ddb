"""LoRA on a text-to-image UNet with Flat-LoRA, in the usual loop of diffusers.

The UNet is tiny and random, the images are coloured squares, and the captions random embeddings.
Your own: ``UNet2DConditionModel.from_pretrained(..., subfolder="unet")``, encoded images and text.
"""

import argparse

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig

from flatlora_optim import FlatLoRAOptimizer

COLOURS = torch.eye(4)[:3] * 2 - 1
CAPTIONS = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def examples_of(batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latent images, and the embedded caption of each."""
    label = torch.randint(0, 3, (batch_size,))
    latents = COLOURS[label, :, None, None].expand(-1, -1, 8, 8)
    return latents + 0.1 * torch.randn_like(latents), CAPTIONS[label]


def diffusion_loss(unet: UNet2DConditionModel, scheduler: DDPMScheduler, batch_size: int) -> torch.Tensor:
    latents, captions = (tensor.to(unet.device) for tensor in examples_of(batch_size))
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (batch_size,), device=unet.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    return F.mse_loss(unet(noisy, timesteps, encoder_hidden_states=captions).sample, noise)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    unet, scheduler = tiny_unet(), DDPMScheduler()
    unet.to("cuda" if torch.cuda.is_available() else "cpu")
    unet.requires_grad_(False)
    layers = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_out"]
    unet.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules=layers))

    base = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-2)
    optimizer = FlatLoRAOptimizer(base, unet, sigma=0.05, total_steps=steps, seed=42)
    unet.train()
    for step in range(steps):
        loss = diffusion_loss(unet, scheduler, batch_size=16)
        noise_norm = optimizer.metrics()["noise_norm"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss:.3f}  noise norm {noise_norm:.3f}")

    with torch.no_grad():
        validation = diffusion_loss(unet.eval(), scheduler, batch_size=64)
    unet.save_lora_adapter("outputs/text_to_image")
    print(f"Result: validation loss {validation:.3f}; adapter saved to outputs/text_to_image")


if __name__ == "__main__":
    main()
