"""Which settings make a run fit a GPU? The presets of `--memory`, from the most memory to the least.

A preset gives a value to every setting about memory that is not given one by one (`config.Config`, where such a setting
is None). `exact` is the tutorial's fp32; the others are named after a GPU that trains SD 1.5 with them at 512 px.
`5gb` is there for SDXL, whose frozen weights are most of what `6gb` takes.
`lowvram/estimate.py` predicts what a preset takes and chooses one. PyTorch is imported where a GPU is asked, so that
`--help` need not wait for it.
"""

import dataclasses
from typing import Any

_EXACT = dict(
    precision="fp32", gradient_checkpointing=False, trained_weights="fp32", optimizer_bits=32, optimizer_on_cpu=False,
    stream=False, encode_batch_size=8,
)  # fmt: skip
_RECOMPUTED = _EXACT | dict(precision="bf16", gradient_checkpointing=True)
PRESETS: dict[str, dict[str, Any]] = {
    "exact": _EXACT,
    "fast": _EXACT,  # the name that `exact` had before there were faster ones
    "16gb": _EXACT | dict(precision="bf16"),
    "12gb": _EXACT | dict(precision="bf16", optimizer_bits=16),
    "8gb": _RECOMPUTED | dict(optimizer_bits=8, encode_batch_size=2),
    "6gb": _RECOMPUTED | dict(trained_weights="bf16", optimizer_bits=8, encode_batch_size=1),
    "5gb": _RECOMPUTED | dict(trained_weights="bf16", optimizer_bits=8, stream=True, encode_batch_size=1),
    "4gb": _RECOMPUTED | dict(trained_weights="bf16", optimizer_on_cpu=True, stream=True, encode_batch_size=1),
}
GPU_PRESETS = tuple(name for name in PRESETS if name not in ("exact", "fast"))  # the choice of `auto`, fastest first


def resolve(config: Any, preset: str) -> Any:
    """`config` (a `config.Config`) with every setting that is None filled in from `preset`, as far as it agrees with
    those that are given.

    GPUs that do not know bf16 compute in fp16; trained weights can then be fp16 where the optimizer is on the CPU.
    """
    import torch

    filled = {k: v for k, v in PRESETS[preset].items() if getattr(config, k) is None}
    gpu = "cuda" in config.device and torch.cuda.is_available()
    if filled.get("precision") == "bf16" and gpu and not torch.cuda.is_bf16_supported(False):
        filled["precision"] = "fp16"
    whole = dataclasses.replace(config, **filled, memory=preset)
    if "trained_weights" in filled and whole.trained_weights not in allowed_weight_dtypes(whole.precision):
        half = whole.precision == "fp16" and whole.optimizer_on_cpu
        whole.trained_weights = "fp16" if half else "fp32"
    if "stream" in filled and (config.compile or not whole.gradient_checkpointing):
        whole.stream = False
    return whole


def allowed_weight_dtypes(precision: str) -> tuple[str, ...]:
    """The number formats that trained weights can have when a step is computed in `precision`."""
    return ("fp32", "fp16") if precision == "fp16" else ("fp32", "bf16")
