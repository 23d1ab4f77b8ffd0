"""Attaching, extracting, and what the tool says."""

import pytest
import torch

import checkpoint
import merge
from checkpoint import CheckpointError
from controlnet import ControlLDM


def test_attach_equals_attaching_on_the_fly(base, tmp_path, capsys):
    out = tmp_path / "merged.safetensors"
    merge.main([str(base), str(out), "--seed", "3"])
    said = capsys.readouterr().out
    assert "are new (input_hint_block, middle_block_out, zero_convs)" in said
    merged, fly = ControlLDM.from_file(out), ControlLDM.from_file(base, attach=True, seed=3)
    assert all(torch.equal(v, fly.state_dict()[k]) for k, v in merged.state_dict().items())
    with pytest.raises(CheckpointError, match="exists; --force"):
        merge.main(["attach", str(base), str(out)])
    with pytest.raises(CheckpointError, match="already has a ControlNet"):
        merge.main([str(out), str(out), "--force"])
    with pytest.raises(CheckpointError, match="no such folder"):
        merge.main([str(base), str(tmp_path / "no" / "x.safetensors")])
    with pytest.raises(CheckpointError, match="no such file"):
        merge.main([str(tmp_path / "no.safetensors"), str(tmp_path / "x.safetensors")])


def test_extract_half_ckpt_and_info(base, tmp_path, capsys):
    merged, alone = tmp_path / "merged.ckpt", tmp_path / "control.safetensors"
    merge.main(["attach", str(base), str(merged), "--half", "--hint-channels", "1"])
    assert torch.load(merged, weights_only=True)["state_dict"]
    merge.main(["extract", str(merged), str(alone)])
    control = checkpoint.load_state_dict(alone)
    assert all(k.startswith("control_model.") and v.dtype == torch.float16 for k, v in control.items())
    assert control["control_model.input_hint_block.0.weight"].shape[1] == 1
    with pytest.raises(CheckpointError, match="no ControlNet"):
        merge.main(["extract", str(base), str(tmp_path / "x.safetensors")])
    capsys.readouterr()
    merge.main(["info", str(base)])
    said = capsys.readouterr().out
    assert "ControlNet  none" in said and "model       tiny" in said and "float32" in said
