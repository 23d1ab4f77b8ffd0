"""What the configurations in files may say. A field that is read from a file is checked here and nowhere else.

A table of rules stands for each kind of configuration: which type a field has, and which range or which choices. A
field that its table does not name has no effect here and may hold anything.

    RUN           config.json in the folder of a run: the settings that loading needs (`config.validate`: the others)
    STATE         state.json of a checkpoint
    CHECKSUMS     checksums.json of a checkpoint, an entry
    MODEL         the shape of a model, in the metadata of files that this project wrote
    SCHEDULER     scheduler_config.json of a diffusers folder
    NETWORKS      config.json of a diffusers folder's UNet, ControlNet, VAE and text encoder
    INDEX         the index of weights that lie in several files

The bounds of MODEL are far beyond every model of this kind, and small enough that building its modules (without
memory for weights) takes seconds.
"""

import dataclasses
import json
import math
import re
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from conditioning import SIZE_WIDTH, SIZES
from ldm import ModelConfig
from unet import UNetConfig


class CheckpointError(ValueError):
    """A file that cannot be used; the message names the file and says why, in one line."""


# -------------------------------------------------------------------------------------------------------------- rules
class Rule(NamedTuple):
    """What a field may hold: a value of type `kind` in a range or one of `choices`, or (`items`) a list of those."""

    kind: type
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    items: tuple[int, int] = (0, 0)  # fewest and most values of a list; (0, 0): no list but one value
    none: bool = False  # null is allowed too

    def accepts(self, value: Any) -> bool:
        if value is None:
            return self.none or self.kind is type(None)
        if not self.items[1]:
            return self._accepts_one(value)
        fits = isinstance(value, list) and self.items[0] <= len(value) <= self.items[1]
        return fits and all(self._accepts_one(v) for v in value)

    def _accepts_one(self, value: Any) -> bool:
        if isinstance(value, bool) != (self.kind is bool):  # True is an int in Python
            return False
        if not isinstance(value, (int, float) if self.kind is float else self.kind):
            return False
        if self.kind in (int, float):
            return self.low <= value <= self.high
        if self.choices:
            return value in self.choices
        # Lone surrogates and NUL can neither be printed nor be part of a path.
        return self.kind is not str or (len(value) <= 4096 and not re.search("[\0\ud800-\udfff]", value))

    def __str__(self) -> str:
        names = {int: "an integer", float: "a number", bool: "true or false", str: "a text", dict: "an object"}
        words = ", ".join(self.choices) or names.get(self.kind, "null")
        words = f"one of {words}" if len(self.choices) > 1 else words
        if self.kind in (int, float):
            words += f" from {self.low:g} to {self.high:g}"
        if self.items[1]:
            words = f"a list of {self.items[0]} to {self.items[1]} values, each {words}"
        return words + (" (or null)" if self.none else "")


class Nullable(NamedTuple):
    """The rules of an object that may be missing: null, or fields that keep to `rules`."""

    rules: Mapping[str, "Rule"]


Rules = Mapping[str, "Rule | Nullable | Rules"]
TEXT, FLAG, OBJECT, COUNT = Rule(str), Rule(bool), Rule(dict), Rule(int, 0, 1e15)
PREDICTION = ("auto", "eps", "v")
RUN: Rules = {
    "base": TEXT, "vae": Rule(str, none=True), "ema": FLAG, "clip_skip": Rule(int, 1, 64),
    "prediction": Rule(str, choices=PREDICTION), "zero_terminal_snr": FLAG, "only_mid_control": FLAG,
    "hint_resample": Rule(str, choices=("area", "nearest")), "resolution": TEXT,
}  # fmt: skip
STATE: Rules = {
    "step": COUNT, "samples": COUNT, "config": OBJECT, "scaler": OBJECT, "ranks": Rule(int, 1, 1e6),
    "base": TEXT, "vae": TEXT, "data": TEXT,
}  # fmt: skip
CHECKSUMS: Rules = {"bytes": COUNT, "crc32": TEXT}
INDEX: Rules = {"weight_map": OBJECT}
SCHEDULER: Rules = {
    "prediction_type": Rule(str, choices=("epsilon", "v_prediction")),
    "beta_start": Rule(float, 1e-9, 0.5), "beta_end": Rule(float, 1e-9, 0.999),
    "beta_schedule": Rule(str, choices=("scaled_linear",)), "trained_betas": Rule(type(None)),
    "num_train_timesteps": Rule(int, 10, 10_000), "rescale_betas_zero_snr": FLAG,
}  # fmt: skip
# Of each network: its class, and for each field the values with which this project computes alike.
_BLOCKS = {
    "act_fn": ("silu", "swish"), "norm_eps": (1e-5,), "flip_sin_to_cos": (True,), "freq_shift": (0,),
    "downsample_padding": (1,), "mid_block_scale_factor": (1,), "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,), "resnet_time_scale_shift": ("default",),
    "class_embed_type": (None,), "num_class_embeds": (None,), "addition_embed_type": (None, "text_time"),
    "encoder_hid_dim": (None,), "encoder_hid_dim_type": (None,),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
NETWORKS: Mapping[str, tuple[tuple[str, ...], Mapping[str, tuple]]] = {
    "ControlNet": (
        ("ControlNetModel",),
        _BLOCKS | {"controlnet_conditioning_channel_order": ("rgb", "bgr"), "global_pool_conditions": (False, True)},
    ),
    "UNet": (
        ("UNet2DConditionModel",),
        _BLOCKS | {
            "center_input_sample": (False,), "dual_cross_attention": (False,), "time_embedding_type": ("positional",),
            "time_embedding_act_fn": (None,), "timestep_post_act": (None,), "time_cond_proj_dim": (None,),
            "conv_in_kernel": (3,), "conv_out_kernel": (3,), "attention_type": ("default",),
            "resnet_out_scale_factor": (1,), "resnet_skip_time_act": (False,), "cross_attention_norm": (None,),
        },
    ),
    "VAE": (
        ("AutoencoderKL",),
        {
            "act_fn": ("silu", "swish"), "mid_block_add_attention": (True,), "use_quant_conv": (True,),
            "use_post_quant_conv": (True,), "shift_factor": (None, 0), "latents_mean": (None,), "latents_std": (None,),
        },
    ),
} | dict.fromkeys(
    ("text encoder", "text encoder 1", "text encoder 2"),
    (
        ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel"),
        {"hidden_act": ("quick_gelu", "gelu"), "layer_norm_eps": (1e-5,), "max_position_embeddings": (77,)},
    ),
)  # fmt: skip
# Further fields of a ControlNet's configuration; they agree with its tensors, are compared with the model, or have no
# effect without a field of `_BLOCKS`.
CONTROLNET_FIELDS = {
    "in_channels", "conditioning_channels", "conditioning_embedding_out_channels", "block_out_channels",
    "layers_per_block", "norm_num_groups", "cross_attention_dim", "attention_head_dim", "num_attention_heads",
    "use_linear_projection", "upcast_attention", "addition_time_embed_dim", "projection_class_embeddings_input_dim",
    "addition_embed_type_num_heads", "sample_size", "transformer_layers_per_block",
}  # fmt: skip
SCALING = Rule(float, 1e-6, 1e6)
LEVELS, WIDTH = (1, 8), Rule(int, 1, 65536)
_TEXT_ENCODER = {
    "width": WIDTH, "layers": Rule(int, 1, 64), "heads": Rule(int, 1, 1024), "mlp_width": WIDTH,
    "activation": Rule(str, choices=("quick_gelu", "gelu")), "penultimate": FLAG, "final_norm": FLAG,
    "projection": Rule(int, 1, 65536, none=True),
}  # fmt: skip
MODEL: Rules = {
    "name": TEXT,
    "unet": {
        "in_channels": Rule(int, 1, 64), "out_channels": Rule(int, 1, 64), "model_channels": Rule(int, 2, 4096),
        "channel_mult": Rule(int, 1, 64, items=LEVELS), "num_res_blocks": Rule(int, 1, 8),
        "attention_resolutions": Rule(int, 1, 128, items=(0, 8)), "context_dim": WIDTH,
        "num_heads": Rule(int, 1, 1024, none=True), "num_head_channels": Rule(int, 1, 4096, none=True),
        "use_linear_in_transformer": FLAG, "norm_groups": Rule(int, 1, 1024),
        "transformer_depth": Rule(int, 0, 24, items=LEVELS), "adm_in_channels": Rule(int, 1, 65536, none=True),
    },
    "vae": {
        "ch": Rule(int, 1, 4096), "ch_mult": Rule(int, 1, 64, items=LEVELS), "num_res_blocks": Rule(int, 1, 8),
        "z_channels": Rule(int, 1, 64), "norm_groups": Rule(int, 1, 1024),
    },
    "text": _TEXT_ENCODER, "text2": Nullable(_TEXT_ENCODER),
    "pad": Rule(str, choices=("end", "zero")), "pad2": Rule(str, choices=("end", "zero")),
    "zero_empty_negative": FLAG, "vae_fp16_safe": FLAG, "prediction": Rule(str, choices=("eps", "v")),
    "scale_factor": Rule(float, 1e-6, 1e6), "linear_start": Rule(float, 1e-9, 0.5),
    "linear_end": Rule(float, 1e-9, 0.999), "zero_terminal_snr": FLAG, "timesteps": Rule(int, 10, 10_000),
    "control_depth": Rule(int, 0, 24, items=LEVELS, none=True),
    "hint_widths": Rule(int, 1, 4096, items=(4, 4)), "hint_gain": Rule(float, 0, 1e6), "global_pool": FLAG,
    "guidance": Rule(float, 0, 1e6), "resolution": Rule(int, 8, 4096),
}  # fmt: skip


def check_fields(
    path: str | Path, fields: Any, rules: Rules, required: Collection[str] = (), section: str = ""
) -> dict[str, Any]:
    """Return `fields`, the content of the file `path`, if they are an object that keeps to the rules.

    Raises CheckpointError that names the file, the field, its value, and what it should be. `section`: what stands
    before the names of the fields in messages ("unet.").
    """
    if not isinstance(fields, dict):
        raise CheckpointError(
            f"{path}: {(section.rstrip('.') + ' is').lstrip()} {reprlib.repr(fields)}, should be an object"
        )
    if missing := [name for name in required if name not in fields]:
        raise CheckpointError(f"{path}: has no {section}{missing[0]}")
    for name, rule in rules.items():
        if name not in fields:
            continue
        if isinstance(rule, Nullable):
            if fields[name] is None:
                continue
            rule = rule.rules
        if not isinstance(rule, Rule):
            check_fields(path, fields[name], rule, section=f"{section}{name}.")
        elif not rule.accepts(fields[name]):
            raise CheckpointError(f"{path}: {section}{name} is {reprlib.repr(fields[name])}, should be {rule}")
    return fields


# -------------------------------------------------------------------------------------------------------------- files
MAX_JSON = 64 << 20  # bytes; the index of Stable Diffusion's weights has some 100 thousand


def load_json(path: str | Path) -> Any:
    """The content of a JSON file; CheckpointError if the file is not readable as JSON, or larger than MAX_JSON."""
    path = Path(path)
    try:
        if not path.is_file():
            raise OSError("no such file" if not path.exists() else "not a regular file")
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"{path.stat().st_size} bytes, more than {MAX_JSON}")
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not readable as JSON ({e})") from e


def is_run(path: str | Path) -> bool:
    """Whether `path` is the folder of a training run. (A diffusers folder has a `config.json` too, of another kind.)"""
    file = Path(path) / "config.json"
    if not file.is_file():
        return False
    fields = load_json(file)
    return isinstance(fields, dict) and "base" in fields


def scheduler_settings(folder: str | Path) -> dict[str, Any]:
    """What the scheduler of a diffusers folder says, as fields of `ModelConfig`; empty without a scheduler.

    How diffusers draws (spacing, solver, clipping) is its own matter; what the model was trained with is followed.
    Raises CheckpointError for training that this project does not know: other schedules of the betas, other targets.
    """
    file = Path(folder) / "scheduler" / "scheduler_config.json"
    if not file.exists():
        return {}
    fields = check_fields(file, load_json(file), SCHEDULER | {"_class_name": TEXT})
    if any(word in fields.get("_class_name", "") for word in ("Flow", "EDM", "KarrasVe", "ScoreSde", "CMStochastic")):
        raise CheckpointError(f"{file}: {fields['_class_name']} is of another kind than Stable Diffusion's schedulers")
    names = {
        "beta_start": "linear_start", "beta_end": "linear_end", "num_train_timesteps": "timesteps",
        "rescale_betas_zero_snr": "zero_terminal_snr",
    }  # fmt: skip
    settings = {ours: fields[theirs] for theirs, ours in names.items() if theirs in fields}
    if "prediction_type" in fields:
        settings["prediction"] = {"epsilon": "eps", "v_prediction": "v"}[fields["prediction_type"]]
    return settings


def pipeline_settings(folder: str | Path) -> dict[str, Any]:
    """What `model_index.json` of a diffusers folder says, as fields of `ModelConfig`; empty without one."""
    file = Path(folder) / "model_index.json"
    if not file.is_file():
        return {}
    names = {"force_zeros_for_empty_prompt": "zero_empty_negative"}
    fields = check_fields(file, load_json(file), dict.fromkeys(names, FLAG))
    return {ours: fields[theirs] for theirs, ours in names.items() if theirs in fields}


def network_settings(path: str | Path, kind: str) -> dict[str, Any]:
    """The `config.json` of a network of a diffusers folder; empty without one. `kind`: a key of NETWORKS.

    `path`: the network's folder or its file of weights there. Raises CheckpointError for what would compute other
    numbers than the network of this project.
    """
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file() or not (path.is_dir() or path.name.startswith("diffusion_pytorch_model")):
        return {}
    fields = check_fields(file, load_json(file), {"scaling_factor": SCALING} if kind == "VAE" else {})
    classes, known = NETWORKS[kind]
    given = fields.get("_class_name", fields.get("architectures"))
    for name in given if isinstance(given, list) else [given]:
        if name not in (None, *classes):
            raise CheckpointError(f"{file}: a {reprlib.repr(name)} is not supported as {kind}, but {classes[0]}")
    for name, value in fields.items():
        values = value if isinstance(value, list) else [value]
        if name in known and not all(any(_same(v, other) for other in known[name]) for v in values):
            choices = " or ".join(map(json.dumps, known[name]))
            raise CheckpointError(f"{file}: {name} is {reprlib.repr(value)}; supported is {choices}")
        strange = name not in known and name not in CONTROLNET_FIELDS and not name.startswith("_")
        if kind == "ControlNet" and strange and value not in (None, False):
            raise CheckpointError(f"{file}: {reprlib.repr(name)} is not known, and may change what the ControlNet does")
    return fields


def _same(a: Any, b: Any) -> bool:
    """Equality of two values of JSON, in which true is not 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def check_network(path: str | Path, kind: str, config: ModelConfig) -> None:
    """Raise CheckpointError where the `config.json` of a network contradicts the model `config` in what tensors do not
    show: attention heads, groups of norms, activation, scale of the latents. See `network_settings`."""
    fields, levels = network_settings(path, kind), len(config.unet.channel_mult)
    text = (config.text2 if kind == "text encoder 2" else None) or config.text
    wanted: dict[str, Any] = {"norm_num_groups": config.vae.norm_groups, "scaling_factor": config.scale_factor}
    if kind.startswith("text encoder"):
        wanted = {"num_attention_heads": text.heads, "hidden_act": text.activation}
    elif kind != "VAE":
        wanted = _wanted_of_unet(fields, config.control_unet if kind == "ControlNet" else config.unet)
    for name, value in wanted.items():
        given = fields.get(name, value)
        given = [given] * levels if isinstance(value, list) and not isinstance(given, list) else given
        if given != value:
            file = (Path(path) if Path(path).is_dir() else Path(path).parent) / "config.json"
            raise CheckpointError(f"{file}: {name} is {reprlib.repr(fields[name])}, that of {config.name} is {value}")


def _wanted_of_unet(fields: dict[str, Any], unet: UNetConfig) -> dict[str, Any]:
    """What the `config.json` of a UNet or ControlNet should say; `fields`: what it says."""
    levels = range(len(unet.channel_mult))
    depth = fields.get("transformer_layers_per_block", 1)
    depth = depth if isinstance(depth, list) and len(depth) == len(levels) else [depth for _ in levels]
    depth = [unet.depth(level) or depth[level] for level in levels]  # without attention the number says nothing
    sizes = {"projection_class_embeddings_input_dim": unet.adm_in_channels, "addition_time_embed_dim": SIZE_WIDTH}
    return {
        "num_attention_heads" if fields.get("num_attention_heads") else "attention_head_dim": [
            unet.heads(unet.model_channels * m) for m in unet.channel_mult
        ],
        "norm_num_groups": unet.norm_groups,
        "transformer_layers_per_block": [*depth[:-1], unet.transformer_depth[-1]],
        "addition_embed_type": "text_time" if unet.adm_in_channels else None,
    } | (sizes if unet.adm_in_channels else {})


def metadata_config(path: str | Path, text: str) -> ModelConfig | None:
    """The configuration in a file's metadata, as `ModelConfig.to_json` wrote it; None if another program wrote `text`.

    Raises CheckpointError for a configuration of which no model can be built.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or "name" not in fields:
        return None
    if fields.keys() - {f.name for f in dataclasses.fields(ModelConfig)}:
        return None
    where = f"{path}: its metadata's configuration"
    check_fields(where, fields, MODEL)
    try:
        config = ModelConfig.from_json(text)
    except (TypeError, ValueError) as e:  # a field that this version does not know, or two that exclude each other
        raise CheckpointError(f"{where}: {e}") from e
    if misfit := _misfit(config):
        raise CheckpointError(f"{where}: {misfit}")
    return config


def _misfit(config: ModelConfig) -> str:
    """What in a configuration contradicts the rest of it, in words; empty if a model can be built."""
    unet, vae, text = config.unet, config.vae, config.text
    if unet.model_channels % 2:
        return f"unet.model_channels is {unet.model_channels}, should be even"
    for name, network, first, factors in (
        ("unet", unet, unet.model_channels, unet.channel_mult), ("vae", vae, vae.ch, vae.ch_mult),
    ):  # fmt: skip
        for width in (first, *(first * m for m in factors)):
            if width % network.norm_groups or width > WIDTH.high:
                return f"{name}: {width} channels cannot be normed in {network.norm_groups} groups"
    if any(a > b for a, b in zip(config.control_unet.depths, unet.depths, strict=True)):
        return f"control_depth is {config.control_unet.depths}, more than the UNet's {unet.depths}"
    for width in (unet.model_channels * m for m in unet.channel_mult):
        heads = unet.heads(width)
        if not heads or width % heads or (unet.num_head_channels and width % unet.num_head_channels):
            return f"unet: {width} channels cannot be cut into heads"
    for name, encoder in {"text": text, "text2": config.text2}.items():
        if encoder and encoder.width % encoder.heads:
            return f"{name}.width is {encoder.width}, which {encoder.heads} heads do not divide"
        if encoder and encoder.layers <= encoder.penultimate:
            return f"{name}.layers is 1, and the last layer is left out"
    widths = [encoder.width for encoder in (text, config.text2) if encoder]
    if sum(widths) != unet.context_dim:
        return f"unet.context_dim is {unet.context_dim}, text.width {' + text2.width '.join(map(str, widths))}"
    pooled = (config.text2.projection or config.text2.width) if config.text2 else None
    if unet.adm_in_channels != (wanted := pooled and pooled + len(SIZES) * SIZE_WIDTH):
        return f"unet.adm_in_channels is {unet.adm_in_channels}, of text2 and sizes it would be {wanted}"
    if not unet.in_channels == unet.out_channels == vae.z_channels:
        return f"the UNet has {unet.in_channels} and {unet.out_channels} channels, the VAE's latents {vae.z_channels}"
    return ""
