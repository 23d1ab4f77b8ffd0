"""Where do the seconds of a step go, and how fast could this machine be?"""

import contextlib
import functools
import statistics
import time
from collections.abc import Iterator

import torch
from torch import nn

import train
from benchmarks.tasks import OurStep
from config import Config
from ldm import compute_dtype_for


def matmul_rate(config: Config) -> float:
    """Operations a second in products of large matrices, in the precision of the run: the limit of the machine."""
    side, dtype = 8192 if "cuda" in config.device else 2048, compute_dtype_for(config.precision, config.device)
    a, b = (torch.randn(side, side, device=config.device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        synchronize(config.device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(seconds[1:])


def synchronize(device: str) -> None:
    if "cuda" in device:
        torch.cuda.synchronize(device)


def breakdown(step: OurStep) -> dict[str, float]:
    """Seconds of the parts of our step, which is then not recorded as a CUDA graph any more. Waiting for the GPU after
    each part makes the step a little slower."""
    step.trainer.graph, step.trainer.config.cuda_graph = None, False
    trainer, model, device = step.trainer, step.trainer.model, step.trainer.config.device
    parts = {
        "batch to the device": [(train, "prepare_batch")], "of which VAE": [(model.vae, "moments")],
        "of which text encoder": [(model.text, "forward")], "ControlNet": [(model.control_model, "forward")],
        "UNet, encoder": [(model.unet, "encode")], "UNet, decoder": [(model.unet, "decode")],
        "backward": [(torch.Tensor, "backward")],
        "optimizer and clipping": [
            (trainer.home, "wait_for_grads"), (trainer.scaler, "unscale_"), (nn.utils, "get_total_norm"),
            (nn.utils, "clip_grads_with_norm_"), (trainer.scaler, "step"), (trainer.home, "upload_weights"),
        ],
    }  # fmt: skip
    spent = dict.fromkeys(parts, 0.0)
    with contextlib.ExitStack() as stack:
        for label, functions in parts.items():
            for owner, name in functions:
                stack.enter_context(timed(owner, name, label, spent, device))
        start = time.perf_counter()
        step()
        synchronize(device)
        total = time.perf_counter() - start
    return spent | {"everything else": total - sum(v for k, v in spent.items() if not k.startswith("of which"))}


@contextlib.contextmanager
def timed(owner: object, name: str, label: str, spent: dict[str, float], device: str) -> Iterator[None]:
    """While entered, the seconds of calls of `owner.name` are added to `spent[label]`."""
    function, is_own = getattr(owner, name), name in vars(owner)

    @functools.wraps(function)
    def timed_function(*args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        out = function(*args, **kwargs)
        synchronize(device)
        spent[label] += time.perf_counter() - start
        return out

    setattr(owner, name, timed_function)
    yield
    setattr(owner, name, function) if is_own else delattr(owner, name)
