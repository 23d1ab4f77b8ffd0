"""The two spellings of CLIP's text encoder: the names of its parameters in CLIP's files and in OpenCLIP's.

    CLIP        text_model.encoder.layers.0.self_attn.{q,k,v}_proj.weight    text_model.final_layer_norm.weight
    OpenCLIP    transformer.resblocks.0.attn.in_proj_weight                  ln_final.weight

The numbers are equal; OpenCLIP keeps the matrices of queries, keys and values as one.
"""

import torch
from torch import Tensor

# OpenCLIP's names of a layer's parameters, and CLIP's. The fused `attn.in_proj_*` is q, k, v in one.
OPENCLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
OPENCLIP_TOP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}


def clip_spelling(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give a text encoder's keys CLIP's spelling (`text_model.*`), whatever prefix and spelling they come in."""
    out = {}
    for key, value in state_dict.items():
        key = key.removeprefix("cond_stage_model.").removeprefix("transformer.text_model.").removeprefix("model.")
        if key.startswith("transformer.") and not key.startswith("transformer.resblocks."):
            key = key.removeprefix("transformer.")  # as many merges of SD 1.x have it, without `text_model.`
        if key in OPENCLIP_TOP:
            out["text_model." + OPENCLIP_TOP[key]] = value
        elif key.startswith("transformer.resblocks."):
            number, name = key.removeprefix("transformer.resblocks.").split(".", 1)
            layer = f"text_model.encoder.layers.{number}."
            if name.startswith("attn.in_proj_"):
                kind = name.removeprefix("attn.in_proj_")  # weight or bias
                for part, tensor in zip("qkv", value.chunk(3), strict=True):
                    out[f"{layer}self_attn.{part}_proj.{kind}"] = tensor
            else:
                module, kind = name.rsplit(".", 1)
                out[f"{layer}{OPENCLIP_LAYER[module]}.{kind}"] = value
        else:
            out["text_model." + key.removeprefix("text_model.")] = value
    return out


def openclip_spelling(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's spelling (`text_model.*`) -> OpenCLIP's. A key without a name in OpenCLIP is left out."""
    top = {v: k for k, v in OPENCLIP_TOP.items()}
    layer = {v: k for k, v in OPENCLIP_LAYER.items()}
    out = {}
    for key, value in state_dict.items():
        key = key.removeprefix("text_model.")
        if key in top:
            out[top[key]] = value
        elif key.startswith("encoder.layers."):
            number, name = key.removeprefix("encoder.layers.").split(".", 1)
            there, (module, kind) = f"transformer.resblocks.{number}.", name.rsplit(".", 1)
            if module in layer:
                out[f"{there}{layer[module]}.{kind}"] = value
            elif module == "self_attn.q_proj":  # q, k and v become one
                parts = [state_dict[f"text_model.encoder.layers.{number}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
                out[f"{there}attn.in_proj_{kind}"] = torch.cat(parts)
    return out
