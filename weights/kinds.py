"""What is this file, and which of its tensors does this project not know?

A file may hold more tensors than the networks here have. Some have no effect on what a network computes (counters of a
moving average, the numbers of the positions, the half of CLIP that reads images), and pass. Every other unknown tensor
under the prefix of a network belongs to a network of another kind, and leaving it out would change the numbers without
a word: the file is refused, with the tensor's name, and the name of the kind where it is known.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from weights.configs import CheckpointError
from weights.spelling import COMPONENTS, CONTROL, DIFFERENCE, TEXT, TEXT_1, TEXT_2, UNET, VAE

# Tensors under the prefix of a network that have no effect on its results.
HARMLESS = re.compile(
    r"(?:.*\.)?(?:position_ids|num_updates|decay|num_batches_tracked)"
    rf"|{re.escape(VAE)}(?:loss|model_ema|discriminator)\..*"
    rf"|{re.escape(TEXT)}(?:.*\.)?(?:logit_scale|logit_bias|text_projection(?:\.weight)?|attn_mask|causal_attention_mask)"
    rf"|{re.escape(TEXT)}(?:.*\.)?(?:visual|vision_model|visual_projection)(?:\..*)?"
    rf"|{re.escape(TEXT_1)}(?:.*\.)?text_projection(?:\.weight)?|{re.escape(TEXT_2)}(?:logit_scale|attn_mask)"
    rf"|{re.escape(CONTROL)}{DIFFERENCE}"
)
# What the names of tensors tell: words in a key, and what has such tensors. The first row that fits counts.
KINDS = {
    r"\blora_controlnet$": "a Control-LoRA, which holds differences of low rank and no whole ControlNet",
    r"\b(task_embedding|transformer_layes|spatial_ch_projs|control_type_proj|control_add_embedding)\b":
        "a union ControlNet, which takes several kinds of hints",
    r"\bmotion_modules?\b|\bcontrolnet_cond_embedding\.(weight|bias)$":
        "a part of SparseCtrl or AnimateDiff, which make films",
    r"\bcontrolnet_cond_embedding\.|\binput_hint_block\.(1[5-9]|[2-9][0-9]|[0-9]{3,})\.":
        "a hint encoder with further layers",
    r"\b(cond_proj|time_embed_cond)\b": "a latent consistency model, whose time embedding takes the guidance scale",
    r"(_ip\b|\bip_adapter\b|\bimage_proj\b|\bencoder_hid_proj\b|\bip_layers\b|\.processor\.)": "an IP-Adapter",
    r"(\blora|lora_|_lora\b|\bhada_|\blokr_)": "a LoRA, which changes a model but is none",
    r"\b(label_emb|add_embedding|class_embedding)\b": "",  # see `_with_class_embedding`
    r"\b(position_net|fuser)\b": "a part of GLIGEN, which places objects",
    r"(scaled_fp8|scale_weight|weight_scale|scale_input|absmax|quant_map|quant_state|\bqweight\b|\bqzeros\b)":
        "quantized weights",
}  # fmt: skip


def kind_of_tensor(key: str, state: Mapping[str, Tensor]) -> str:
    """In words, what has a tensor of this name; empty if the name says nothing."""
    for words, kind in KINDS.items():
        if re.search(words, key):
            return kind + (_family(state) if "lora_controlnet" in words else "") or _with_class_embedding(state)
    return ""


def _with_class_embedding(state: Mapping[str, Tensor]) -> str:
    unclip = _prompt_width(state) == 1024 or any(k.startswith(("noise_augmentor.", "embedder.")) for k in state)
    return "a network of SD 2.1 unCLIP, which is steered by images too" if unclip else "a network of the SDXL kind"


def _is_label_of_sdxl(key: str, state: Mapping[str, Tensor]) -> bool:
    """Whether `key` is of SDXL's embedding of y (and not of unCLIP's, nor of something else with this name)."""
    first = state.get(key.split("label_emb.")[0] + "label_emb.0.0.weight")
    return "label_emb.0." in key and first is not None and first.ndim == 2 and "SDXL" in _with_class_embedding(state)


def _family(state: Mapping[str, Tensor]) -> str:
    """Of a Control-LoRA: the model to which it belongs."""
    sdxl = any(".label_emb." in k for k in state) or not any(".input_blocks.11." in k for k in state)
    return f" (for {'SDXL' if sdxl else {768: 'SD 1.x', 1024: 'SD 2.x'}.get(_prompt_width(state), 'SD')})"


def _prompt_width(state: Mapping[str, Tensor]) -> int:
    """The width of the prompts that a UNet or ControlNet reads; 0 if no tensor tells."""
    ends = ("attn2.to_k.weight", "attn2.to_k.down")
    return next((v.shape[-1] for k, v in state.items() if k.endswith(ends) and v.ndim == 2), 0)


def refuse_other_kinds(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if the names of tensors in `state`, from `path`, tell that a network is of another kind."""
    keys = [k for k in state if k.startswith(tuple(COMPONENTS.values())) and not HARMLESS.fullmatch(k)]
    for words in KINDS:
        if key := next((k for k in keys if re.search(words, k) and not _is_label_of_sdxl(k, state)), ""):
            raise CheckpointError(
                f"{path}: holds {kind_of_tensor(key, state)}, to judge by {key}; this is not supported"
            )


def refuse_unknown(path: str | Path, prefix: str, unknown: Collection[str], state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if one of the keys `unknown` (without `prefix`), which a network does not have, may change
    what the network computes. `state`: all tensors of the network, from `path`."""
    strange = sorted(key for key in unknown if not HARMLESS.fullmatch(prefix + key))
    if prefix == TEXT:  # layers after the last that is used have the names of the first
        first = lambda key: re.sub(r"^(text_model\.encoder\.layers\.)[0-9]+\.", r"\g<1>0.", key)
        strange = [key for key in strange if first(key) not in state or first(key) in unknown]
    if strange:
        name = next(name for name, known in COMPONENTS.items() if known == prefix)
        kind = kind_of_tensor(prefix + strange[0], state)
        raise CheckpointError(
            f"{path}: {len(strange)} tensor{'s' * (len(strange) > 1)} that this {name} does not have, as "
            f"{prefix}{strange[0]}{f' ({kind})' if kind else ''}; without them it would compute something else"
        )


def describe(state: Mapping[str, Tensor]) -> str:
    """In words, what kind of file has the keys of `state`; for messages about a file that lacks what is needed."""
    has = lambda *words: any(word in k for k in state for word in words)
    if any(k.startswith(UNET + "input_blocks.") for k in state):
        with_control = any(k.startswith(CONTROL) for k in state)
        return "a Stable Diffusion model" + ("" if with_control else " without a ControlNet")
    if named := next((kind for k in state if re.search(r"lora_controlnet|motion_module", k) and
                      (kind := kind_of_tensor(k, state))), ""):  # fmt: skip
        return named
    kinds = {
        "a LoRA, which changes a model but is none": ("lora_", ".lora.", "hada_", "lokr_"),
        "an IP-Adapter, which changes a model but is none": ("ip_adapter", "image_proj."),
        "a ControlNet-LLLite, which is no ControlNet": ("lllite",),
        "a T2I-Adapter, which is no ControlNet": ("body.0.", "style_embedding"),
        "a textual inversion, which is no model": ("emb_params", "string_to_param"),
        "an SDXL model": ("conditioner.embedders.", "add_embedding."),
        "a diffusion transformer (as SD 3 and Flux are)": (
            "joint_blocks.", "double_blocks.", "transformer_blocks.0.attn.add_q_proj",
        ),
        "a ControlNet alone, without a base model": (CONTROL,),
        "a VAE alone": (VAE,),
        "a text encoder alone": (TEXT,),
    }  # fmt: skip
    for kind, words in kinds.items():
        if has(*words):
            return kind
    example = min(state, default="nothing")
    return f"no Stable Diffusion UNet in it (keys like {UNET}input_blocks.0.0.weight), but {example} and others"
