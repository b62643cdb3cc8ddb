"""LoRA on a text-to-image UNet with Flat-LoRA, in the usual loop of diffusers.

The UNet is tiny and random, the images are red, green and blue squares, and the captions random embeddings.
So small a UNet learns fastest to predict the clean image itself (``prediction_type="sample"``). For your
own, take ``UNet2DConditionModel.from_pretrained(..., subfolder="unet")``, encoded images and encoded text.

python examples/text_to_image.py [--steps 100] [--sigma 0.05]      # a quarter of a minute on a CPU
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flatlora_optim import FlatLoRAOptimizer

COLOURS = torch.eye(4)[:3] * 2 - 1
CAPTIONS = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))
FOLDER = Path("outputs/text_to_image")


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


def examples_of(batch_size: int) -> tuple[Tensor, Tensor]:
    """Latent images, and the embedded caption of each."""
    label = torch.randint(0, 3, (batch_size,))
    latents = COLOURS[label, :, None, None].expand(-1, -1, 8, 8)
    return latents + 0.1 * torch.randn_like(latents), CAPTIONS[label]


def diffusion_loss(unet: UNet2DConditionModel, scheduler: DDIMScheduler, batch_size: int) -> Tensor:
    latents, captions = (tensor.to(unet.device) for tensor in examples_of(batch_size))
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (batch_size,), device=unet.device)
    noisy = scheduler.add_noise(latents, torch.randn_like(latents), timesteps)
    return F.mse_loss(unet(noisy, timesteps, encoder_hidden_states=captions).sample, latents)


@torch.no_grad()
def drawn(unet: UNet2DConditionModel, scheduler: DDIMScheduler, each: int = 4) -> Tensor:
    """Images of each caption, one caption a row: shape ``(27, 9 * each, 3)``, from 0 to 1."""
    unet.eval()
    captions = CAPTIONS.repeat_interleave(each, 0).to(unet.device)
    latents = torch.randn(3 * each, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(unet.device)
    scheduler.set_timesteps(10)
    for time in scheduler.timesteps:
        prediction = unet(latents, time, encoder_hidden_states=captions).sample
        latents = scheduler.step(prediction, time, latents).prev_sample
    images = F.pad(latents[:, :3].clamp(-1, 1).add(1).div(2).cpu(), (0, 1, 0, 1), value=1.0)
    return images.unflatten(0, (3, each)).permute(0, 3, 1, 4, 2).reshape(27, 9 * each, 3)


def save_grid(before: Tensor, after: Tensor, path: Path) -> None:
    both = torch.cat([before, torch.ones(27, 3, 3), after], 1)
    pixels = (both * 255).to(torch.uint8)
    image = Image.fromarray(pixels.numpy()).resize((pixels.shape[1] * 8, pixels.shape[0] * 8), Image.NEAREST)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--sigma", type=float, default=0.05, help="strength of the noise")
    args = parser.parse_args()
    torch.manual_seed(0)
    unet, scheduler = tiny_unet(), DDIMScheduler(prediction_type="sample")
    unet.to("cuda" if torch.cuda.is_available() else "cpu")
    unet.requires_grad_(False)
    layers = ["to_q", "to_k", "to_v", "to_out.0", "conv_in", "conv1", "conv2", "conv_out"]
    unet.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules=layers))
    before = drawn(unet, scheduler)

    base = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-2)
    optimizer = FlatLoRAOptimizer(base, unet, sigma=args.sigma, total_steps=args.steps, seed=42)
    print(optimizer)
    unet.train()
    bar = tqdm(range(args.steps), desc="training")
    for _ in bar:
        loss = diffusion_loss(unet, scheduler, batch_size=16)
        bar.set_postfix(loss=f"{loss:.3f}", noise_norm=f"{optimizer.metrics()['noise_norm']:.2f}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    after = drawn(unet, scheduler)
    with torch.no_grad():
        validation = diffusion_loss(unet, scheduler, batch_size=64)
    unet.save_lora_adapter(FOLDER)
    save_grid(before, after, FOLDER / "before_and_after.png")
    print(f"Before training on the left, after on the right, a row a caption: {FOLDER}/before_and_after.png")
    print(f"Result: validation loss {validation:.3f}; adapter saved to {FOLDER}")


if __name__ == "__main__":
    main()
