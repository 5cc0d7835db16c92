"""Plain diffusers pipelines around tiny random models: every way in which diffusers asks a denoiser for two branches."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    CogVideoXImageToVideoPipeline,
    CogVideoXTransformer3DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    ModularPipeline,
    MotionAdapter,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLAutoBlocks,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    T2IAdapter,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)  # fmt: skip
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

import tiny

IMAGE = Image.effect_noise((64, 64), 90).convert("RGB")
MASK = Image.linear_gradient("L").resize((64, 64))
STEPS = 3


def load(folder: Path, kind: type[DiffusionPipeline] = DiffusionPipeline, **components: Any) -> DiffusionPipeline:
    pipe = kind.from_pretrained(folder, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inpainting_of_9_channels(folder: Path) -> DiffusionPipeline:
    unet = UNet2DConditionModel.from_config({**load(folder).unet.config, "in_channels": 9})
    return load(folder, StableDiffusionInpaintPipeline, unet=unet.eval())


def controlled(folder: Path, kind: type[DiffusionPipeline]) -> DiffusionPipeline:
    unet = load(folder).unet
    net = ControlNetModel.from_unet(unet, conditioning_channels=3)
    return load(folder, kind, controlnet=tiny.without_zeros(net).eval())


def adapted(folder: Path) -> DiffusionPipeline:
    adapter = T2IAdapter(in_channels=3, channels=(16, 32), num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter")
    return load(folder, StableDiffusionAdapterPipeline, adapter=adapter)


def image_to_video(folder: Path) -> DiffusionPipeline:
    base = load(folder)
    config = {**base.transformer.config, "in_channels": 8, "use_rotary_positional_embeddings": True}
    transformer = tiny.without_zeros(CogVideoXTransformer3DModel.from_config(config)).eval()
    return CogVideoXImageToVideoPipeline(**{**base.components, "transformer": transformer})


def class_conditional(folder: Path) -> DiffusionPipeline:
    """DiT's pipeline takes 1000 as the null class, whatever the model's."""
    base = load(folder)
    transformer = DiTTransformer2DModel.from_config({**base.transformer.config, "num_embeds_ada_norm": 1000})
    return DiTPipeline(tiny.without_zeros(transformer).eval(), base.vae, base.scheduler)


def ddim(folder: Path) -> DiffusionPipeline:
    return DDIMPipeline(load(folder).unet, DDIMScheduler())


def with_ip_adapter(folder: Path) -> DiffusionPipeline:
    pipe = load(folder)
    width, image_width, keys = tiny.WIDTH, 12, {}
    for number, name in enumerate(name for name in pipe.unet.attn_processors if "attn2" in name):
        size = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
        for layer in ("to_k_ip", "to_v_ip"):
            keys[f"{2 * number + 1}.{layer}.weight"] = torch.randn(size, width)
    projection = {
        "proj.weight": torch.randn(4 * width, image_width), "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
    }  # fmt: skip
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": keys}])
    return pipe


def modular(folder: Path) -> ModularPipeline:
    """Asks the denoiser twice per step, and its guider what for."""
    base = load(folder)
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(**base.components)
    return pipe


def wan() -> DiffusionPipeline:
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    return WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), tiny.without_zeros(transformer))


def cogview4() -> DiffusionPipeline:
    transformer = CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=4, out_channels=4,
        text_embed_dim=16, time_embed_dim=8, condition_dim=4,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75)
    return CogView4Pipeline(None, None, tiny.autoencoder(), tiny.without_zeros(transformer), scheduler)


def qwen() -> DiffusionPipeline:
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, tiny.without_zeros(transformer))


def stable_diffusion_3() -> DiffusionPipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=8, out_channels=4,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        tiny.without_zeros(transformer), FlowMatchEulerDiscreteScheduler(), tiny.autoencoder(), *[None] * 6
    )


def animated(folder: Path) -> DiffusionPipeline:
    adapter = MotionAdapter(block_out_channels=(16, 32), motion_layers_per_block=1, motion_num_attention_heads=2,
                            motion_norm_num_groups=8)  # fmt: skip
    return load(folder, AnimateDiffPipeline, motion_adapter=tiny.without_zeros(adapter))


@dataclass(frozen=True)
class Case:
    build: Callable[..., DiffusionPipeline]
    family: str | None
    call: dict[str, Any]

    def pipe(self, models: Callable[[str], Path]) -> DiffusionPipeline:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe = self.build(models(self.family)) if self.family else self.build()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(self, pipe: DiffusionPipeline, **changes: Any) -> torch.Tensor:
        call = {"num_inference_steps": STEPS, "output_type": "pt", **self.call, **changes}
        output = pipe(**call, generator=torch.Generator().manual_seed(0))
        found = output.images if hasattr(output, "images") else output.frames
        return torch.as_tensor(found)


# The BLAS may sum in another order for one pass over a batch than for two over its halves. Pixels lie in [0, 1].
CLOSE = {"rtol": 0, "atol": 5e-5}

TEXT = {"prompt": ["a cat", "a dog"], "negative_prompt": ["", "blurry"], "guidance_scale": 7.5}
FROM_IMAGE = TEXT | {"image": [IMAGE] * 2}
MASKED = TEXT | {"image": IMAGE, "mask_image": MASK, "height": 64, "width": 64}
VIDEO = {
    "prompt": "a cat", "num_frames": 5, "height": 64, "width": 64, "max_sequence_length": 16, "guidance_scale": 6.0,
}  # fmt: skip
EMBEDS = {
    name: torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(number))
    for number, name in enumerate(("prompt_embeds", "negative_prompt_embeds"))
} | {"output_type": "latent"}
MASKED_EMBEDS = EMBEDS | {name: torch.ones(1, 8).long() for name in ("prompt_embeds_mask", "negative_prompt_embeds_mask")}
POOLED = {"pooled_prompt_embeds": torch.ones(1, 8), "negative_pooled_prompt_embeds": -torch.ones(1, 8)}
SD, XL = "stable_diffusion", "stable_diffusion_xl"
CASES = {
    "text to image": Case(load, SD, TEXT),
    "one image": Case(load, SD, TEXT | {"prompt": "a cat", "negative_prompt": "", "guidance_rescale": 0.7}),
    "image to image": Case(partial(load, kind=StableDiffusionImg2ImgPipeline), SD, FROM_IMAGE),
    "inpainting": Case(partial(load, kind=StableDiffusionInpaintPipeline), SD, MASKED),
    "inpainting of 9 channels": Case(inpainting_of_9_channels, SD, MASKED),
    "ControlNet": Case(partial(controlled, kind=StableDiffusionControlNetPipeline), SD, FROM_IMAGE),
    "ControlNet, guess mode": Case(
        partial(controlled, kind=StableDiffusionControlNetPipeline), SD, FROM_IMAGE | {"guess_mode": True}
    ),
    "T2I-Adapter": Case(adapted, SD, FROM_IMAGE),
    "IP-Adapter": Case(with_ip_adapter, SD, TEXT | {"ip_adapter_image_embeds": [torch.linspace(-1, 1, 24).view(2, 1, 12)]}),
    "SDXL": Case(load, XL, TEXT),
    "SDXL, image to image": Case(partial(load, kind=StableDiffusionXLImg2ImgPipeline), XL, FROM_IMAGE | {"strength": 0.9}),
    "SDXL, inpainting": Case(partial(load, kind=StableDiffusionXLInpaintPipeline), XL, MASKED),
    "SDXL, ControlNet": Case(partial(controlled, kind=StableDiffusionXLControlNetPipeline), XL, FROM_IMAGE),
    "SDXL, modular": Case(modular, XL, {"prompt": "a cat", "negative_prompt": "blurry", "height": 64, "width": 64}),
    "CogVideoX": Case(load, "cogvideox", VIDEO),
    "CogVideoX, rotary, dynamic": Case(load, "cogvideox_rotary", VIDEO | {"use_dynamic_cfg": True}),
    "CogVideoX, image to video": Case(image_to_video, "cogvideox_rotary", VIDEO | {"image": IMAGE}),
    "DiT": Case(class_conditional, "class_conditional", {"class_labels": [1, 2], "output_type": "np"}),
    "DDPM": Case(load, "unconditional", {"batch_size": 2, "output_type": "np"}),
    "DDIM": Case(ddim, "unconditional", {"batch_size": 2, "output_type": "np"}),
    "Wan": Case(wan, None, EMBEDS | {"num_frames": 5, "height": 32, "width": 32}),
    "Qwen-Image": Case(qwen, None, MASKED_EMBEDS | {"height": 64, "width": 64, "true_cfg_scale": 4.0}),
    "Stable Diffusion 3": Case(stable_diffusion_3, None, EMBEDS | POOLED | {"height": 64, "width": 64}),
    "AnimateDiff": Case(animated, SD, {"prompt": "a cat", "num_frames": 3, "output_type": "latent"}),
    "CogView4": Case(cogview4, None, EMBEDS | {"height": 64, "width": 64}),
}


def denoiser_of(pipe: DiffusionPipeline) -> ModelMixin:
    return getattr(pipe, component_of(pipe))


def component_of(pipe: DiffusionPipeline) -> str:
    return "unet" if getattr(pipe, "unet", None) is not None else "transformer"


def save_lora(folder: Path, pipe: DiffusionPipeline, seed: int = 2) -> tuple[Path, ModelMixin]:
    """A random LoRA for the denoiser of a pipeline, as diffusers saves it, and the denoiser into which it is merged."""
    twin, component = deepcopy(denoiser_of(pipe)), component_of(pipe)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "net.2", *(["conv1", "proj_in"] if component == "unet" else [])]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin.add_adapter(LoraConfig(r=2, lora_alpha=1, target_modules=targets, init_lora_weights=False))
    saved = {
        f"{component}_lora_layers": get_peft_model_state_dict(twin),
        f"{component}_lora_adapter_metadata": twin.peft_config["default"].to_dict(),
    }
    kind = type(pipe) if hasattr(pipe, "save_lora_weights") else StableDiffusionPipeline
    kind.save_lora_weights(folder, **saved)
    twin.fuse_lora()
    twin.unload_lora()
    return folder, twin
