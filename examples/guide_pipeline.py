"""A diffusers pipeline with and without a negative, from the same noise: plain | guided, in one picture.

python examples/guide_pipeline.py MODEL NEGATIVE "a lighthouse in a storm"
"""

import argparse

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import make_image_grid

from selfnpo import guide

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="Stable Diffusion: a folder or a Hugging Face id")
parser.add_argument("negative", help="the folder negative/ of a training run, full weights or LoRA")
parser.add_argument("prompt")
parser.add_argument("--guidance_scale", type=float, default=7.5)
parser.add_argument("--num_inference_steps", type=int, default=25)
parser.add_argument("--output", default="guided.png")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = StableDiffusionPipeline.from_pretrained(args.model).to(device)


def picture():
    noise = torch.Generator(device).manual_seed(0)
    steps, scale = args.num_inference_steps, args.guidance_scale
    return pipe(args.prompt, num_inference_steps=steps, guidance_scale=scale, generator=noise).images[0]


plain = picture()
with guide(pipe, args.negative):
    guided = picture()
make_image_grid([plain, guided], rows=1, cols=2).save(args.output)
print(f"plain | guided: {args.output}")
