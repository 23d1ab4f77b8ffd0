"""Weights in files: reading safely, writing whole, other spellings of the key names, and models put together.

reading, writing, runs      files and folders; original key names, whatever the format
pickles, configs            what a pickle may do, and what configurations may say
spelling, diffusers_folder  the names and configurations that diffusers and transformers use
detect, kinds               which model this is, and what it is if it is none
original, clients           what the original and other programs expect
source                      `load_model(ModelSource(...))`: which model this is, put together from which files
control                     `load_control(path, model)`: a further ControlNet for a model that is loaded
"""

from weights.control import load_control, load_controls
from weights.reading import CheckpointError, load_state_dict
from weights.source import ModelSource, load_model

__all__ = ["CheckpointError", "ModelSource", "load_control", "load_controls", "load_model", "load_state_dict"]
