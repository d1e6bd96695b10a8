"""The heads of `cae-fast classify --head NAME` that are trained; k-NN is none."""

from cae_fast.evaluation.attentive import AttentiveProbe
from cae_fast.evaluation.classifier import Head
from cae_fast.evaluation.finetune import FinetuneHead
from cae_fast.evaluation.linear import LinearProbe

HEADS: dict[str, type[Head]] = {
    "linear": LinearProbe,
    "attentive": AttentiveProbe,
    "finetune": FinetuneHead,
}
SETTINGS = {name: head.settings for name, head in HEADS.items()} | {"knn": ("features", "k")}
"""The fields of HeadConfig that each of them reads."""
