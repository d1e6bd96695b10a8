"""Which changes of settings a training state refuses."""

from dataclasses import asdict

from cae_fast.config import PretrainConfig
from cae_fast.training.resume import changed_settings

DEFAULTS = asdict(PretrainConfig())


def test_a_change_that_matters_is_named():
    new = asdict(PretrainConfig())
    new["optim"]["lr"], new["log"]["every_steps"], new["train"]["zero"] = 3.0, 7, 2
    assert changed_settings(DEFAULTS, new, DEFAULTS) == [f"optim.lr was {DEFAULTS['optim']['lr']}, is 3.0"]


def test_a_setting_newer_than_the_state_counts_as_its_default():
    old, new = asdict(PretrainConfig()), asdict(PretrainConfig())
    del old["data"]["shuffle"], old["mask"]
    assert changed_settings(old, new, DEFAULTS) == []
    new["data"]["shuffle"], new["mask"]["ratio"] = "shard", 0.25
    assert changed_settings(old, new, DEFAULTS) == ["mask.ratio was 0.5, is 0.25", "data.shuffle was global, is shard"]
