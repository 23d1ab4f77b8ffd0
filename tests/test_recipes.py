"""`--recipe`: a named row of settings, of which each is a flag too."""

import dataclasses

import pytest

from config import DEMO, RECIPES, Config, ConfigError, parse, parse_flags

REAL = ["--base", "base.safetensors", "--data", "folder"]


def settings(*flags):
    return dataclasses.asdict(parse([*REAL, *flags]).config)


def test_the_tutorial_is_the_default_and_names_every_part():
    assert settings("--recipe", "tutorial") == settings()
    parts = set().union(*RECIPES.values())
    defaults = {f.name: f.default for f in dataclasses.fields(Config)}
    for name, row in RECIPES.items():
        assert parts == row.keys(), name  # a recipe on top of another leaves nothing of it
    assert all(defaults[part] == value for part, value in RECIPES["tutorial"].items())


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_its_parts_and_nothing_else(name):
    plain, changed = settings(), settings("--recipe", name)
    assert {k: v for k, v in changed.items() if v != plain[k]}.items() <= RECIPES[name].items()
    assert RECIPES[name].items() <= changed.items()


def test_flags_win_over_the_recipe_in_any_order():
    for flags in (["--recipe", "fast", "--muon-rate", "0.005"], ["--muon-rate", "0.005", "--recipe", "fast"]):
        config = parse([*REAL, *flags]).config
        assert (config.optimizer, config.muon_rate, config.lr_schedule) == ("muon", 0.005, "cosine")
    config = parse([*REAL, "--recipe", "fast", "--no-even-timesteps", "--optimizer", "adamw"]).config
    assert (config.optimizer, config.even_timesteps) == ("adamw", False)


def test_the_demo_and_a_trial_are_fast():
    assert RECIPES["fast"].items() <= DEMO.items()
    demo, tutorial = parse([]).config, parse(["--recipe", "tutorial"]).config
    assert demo.optimizer == "muon" and demo == parse(["--recipe", "fast"]).config
    assert RECIPES["tutorial"].items() <= dataclasses.asdict(tutorial).items()
    assert tutorial.steps == demo.steps and tutorial.data == demo.data


def test_what_a_recipe_cannot_do(capsys):
    with pytest.raises(ConfigError, match="--recipe belongs to a new run"):
        parse(["--resume", "runs/x", "--recipe", "fast"])
    with pytest.raises(SystemExit):
        parse_flags(["--recipe", "slow"])
    assert "tutorial" in capsys.readouterr().err


def test_help_shows_each_recipe_as_flags_that_parse(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # argparse breaks lines at hyphens
    with pytest.raises(SystemExit):
        parse_flags(["--help"])
    shown = capsys.readouterr().out.split("--recipe NAME")[1].split("\n")[0]
    for name, row in RECIPES.items():
        flags = shown[shown.index(f"{name}: ") + len(name) + 2 :].split("; ")[0].split()
        given = parse_flags(flags)
        assert given == row, name
