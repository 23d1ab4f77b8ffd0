"""From a data set to the samples of a run: what happens once, before the first step.

    open_dataset      every file is decoded once, so that no bad one ends the run later (`training/verify.py`)
    frame_items       the size of the images is chosen, or the bucket of each (`training/buckets.py`)
    build_samples     items are held out for validation, the others put in order; latents and contexts are cached
    fit_hint_encoder  a new ControlNet's hint encoder is scaled to the hints, if that is asked for

What is chosen here (resolution, ground of the hints, length of groups) is written to the run's settings, so that a
resumed run keeps to it.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import data
from config import Config, ConfigError
from controlnet import ControlNet
from ldm import ControlLDM, ModelConfig, compute_dtype_for
from training.buckets import Framings, assign_buckets, bucket_sizes, describe_buckets
from training.cache import build_cache, release_encoders
from training.order import BucketOrder
from training.validation import held_out
from training.verify import remarks, resized_hints, verified


def open_folder(config: Config) -> data.FolderDataset:
    """The data set on disk that `config.data` names, with nothing verified yet; rows that cannot be used are in it."""
    return data.FolderDataset(
        config.data, None, config.hint_channels, config.hint_resample, False, config.hint_ground, config.hint_scale,
        config.follow_links, config.max_megapixels, config.columns, config.hints, Path(config.cache_dir) / "shards",
    )  # fmt: skip


def open_dataset(config: Config, dataset: Sequence | None, run: Path) -> data.FolderDataset | Sequence:
    """The data set of the caller, or the one that `config.data` names, with every file verified. DataError for one with
    bad rows, unless they are to be skipped."""
    if dataset is not None:
        return dataset
    if not config.data:
        raise data.DataError(f"{run} was trained on a data set of your own: train.train(config, dataset, resume=run)")
    folder = verified(open_folder(config), config.cache_dir, config.skip_bad_rows)
    print(folder)
    config.hint_ground = folder.hint_ground  # a resumed run, and drawing, keep to what was chosen
    return folder


def frame_items(
    config: Config, model_config: ModelConfig, dataset: data.FolderDataset | Sequence[dict[str, Any]]
) -> data.FolderDataset | data.ArrayDataset:
    """The data set with the size of its images chosen, or with `config.buckets` the size of each image, and told.

    Writes the size to `config.resolution`; buckets have about the area of this size.
    """
    from_files = isinstance(dataset, data.FolderDataset)
    if from_files:
        hint, native = dataset.sizes(0)
    else:
        first = dataset[0]
        native = np.shape(first["jpg"])[1::-1]
        hint = np.shape(first.get("hint", first["jpg"]))[1::-1]  # an item without a hint is told of later
    wanted = config.resolution or (str(model_config.resolution) if config.buckets else "")
    size = data.choose_size(wanted, native, model_config.multiple)
    config.resolution = f"{size[0]}x{size[1]}"
    buckets = bucket_sizes(size, model_config.multiple) if config.buckets else []
    if size != native and not buckets:
        print(f"images are resized from {native[0]}x{native[1]} to {size[0]}x{size[1]}")
    if from_files:
        dataset.size = size
        lines = remarks(dataset, size, buckets) + resized_hints(dataset)
    else:
        dataset = data.ArrayDataset(dataset, size, config.hint_channels, config.hint_resample)
        lines = [] if hint == native else ["hints have another size than their targets and are resized to it"]
    natives = dataset.native_sizes() if from_files or buckets else []
    if buckets and not from_files:
        lines += describe_buckets(natives, buckets, [f"item {i}" for i in range(len(natives))])
    for line in lines:
        print(line)
    dataset.framings = Framings(
        buckets or [size], assign_buckets(natives, buckets) if buckets else None,
        np.array(natives, dtype=np.int32) if from_files else None, config.crops, config.flip,
    )  # fmt: skip
    if dataset.variants > 1:
        kept = ", each of which is cached" if config.cache else ""
        print(f"an image has up to {dataset.variants} variants, by --crops and --flip{kept}")
    return dataset


def build_samples(
    config: Config, model: ControlLDM, dataset: data.FolderDataset | Sequence[dict[str, Any]]
) -> tuple[data.Samples, list[int], tuple[Tensor, Tensor | None]]:
    """The samples of the run, the validation items, and context (1,77,D) and pooled (1,P) of an empty negative prompt.

    Chooses the size of the images (`frame_items`), holds out the validation items, and fills the cache. VAE and text
    encoder leave the GPU when the cache is filled.
    """
    dataset = frame_items(config, model.config, dataset)
    count, (width, height) = len(dataset), dataset.size
    if count < 2:
        raise data.DataError("the data set has 1 item; it takes 2 to measure whether a hint makes a difference")
    validation_items = held_out(count, config.validation)
    train_items = range(validation_items.start if count > 2 * len(validation_items) else count)  # a handful: all train
    order = None
    if config.buckets:
        config.bucket_batch = config.bucket_batch or config.batch  # a resumed run keeps to it
        order = BucketOrder(config.seed, dataset.framings.bucket[: len(train_items)], config.bucket_batch)
    dtype = compute_dtype_for(config.precision, config.device)
    model.text.to(config.device, dtype)
    model.vae.to(config.device, model.config.vae_dtype(dtype))
    if model.config.vae_dtype(dtype) != dtype:
        print("the VAE computes in fp32: its activations can pass the largest number of fp16")
    encodings = None
    with torch.no_grad():
        uncond = model.encode_negative("")
        if config.cache:
            encodings = build_cache(model, dataset, config.cache_dir, config.encode_batch_size, config.workers)
            release_encoders(model)
    latent_shape = (model.config.unet.in_channels, height // model.vae.factor, width // model.vae.factor)
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(data.SampleRandomness)[1:]}
    randomness = data.SampleRandomness(model.config.timesteps, **settings)
    samples = data.Samples(dataset, train_items, config.seed, latent_shape, randomness, encodings, order)
    return samples, list(validation_items), uncond


def fit_hint_encoder(control_model: ControlNet, samples: data.Samples, count: int = 16) -> None:
    """Scale a new ControlNet's hint encoder by the first `count` hints of the training items (of one size, where there
    are several), as `--normalize-hint-encoder` asks. ConfigError if that cannot be."""
    dataset, items = samples.dataset, samples.indices
    alike = [i for i in items if dataset.size_of(i) == dataset.size_of(items[0])][:count]
    hints = torch.stack([data.to_tensor(dataset.hint(i)) for i in alike])
    try:
        factors = normalize_hint_encoder(control_model, hints)
    except ValueError as e:
        raise ConfigError(f"--normalize-hint-encoder: {e}") from e
    print(f"hint encoder: initial weights are multiplied by {', '.join(f'{factor:g}' for factor in factors)}")


@torch.no_grad()
def normalize_hint_encoder(control_model: ControlNet, hints: Tensor) -> list[float]:
    """Scale each convolution of a new ControlNet's hint encoder, the last one apart, so that its output has variance 1
    for these hints (B,hint_channels,H,W) in [0,1]. Returns the factors of the weights; the biases become 0.

    The hint then reaches the last convolution, which starts at zero, at full strength. Follows Mishkin and Matas 2015
    (arXiv:1511.06422). Factors have three digits, so that computers whose last bits differ make the same ControlNet.
    Raises ValueError if the hint encoder is trained already, or if the hints show nothing.
    """
    if control_model.input_hint_block[-1].weight.any():
        raise ValueError("the hint encoder is trained already; only that of a new ControlNet can be normalized")
    h, factors = hints.float(), []
    for layer in control_model.input_hint_block[:-1]:
        if isinstance(layer, nn.Conv2d):
            layer.bias.zero_()
            deviation = layer(h).std().item()
            if not deviation > 1e-6:
                raise ValueError(f"the first {len(hints)} hints show nothing, or the hint encoder cannot see it")
            factors.append(float(f"{1 / deviation:.3g}"))
            layer.weight *= factors[-1]
        h = layer(h)
    return factors
