"""Names of a CAE's weights in other code bases: the original's two, mmpretrain's, timm's.

D width.
"""

import re

import torch
from torch import Tensor


def _block(ours: str, theirs: str, parts: dict[str, str]) -> dict[str, str]:
    return {f"{ours}.#.{ours_part}": f"{theirs}.#.{part}" for ours_part, part in parts.items()}


_GAMMAS = {"gamma_1": "gamma_1_cross", "gamma_2": "gamma_2_cross", "norm2": "norm2_cross", "attn": "cross_attn"}
_CROSS = _GAMMAS | {"norm_q": "norm1_q", "norm_k": "norm1_k", "norm_v": "norm1_v", "mlp": "mlp_cross"}
_MM_MLP = {"mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}
_MM_CROSS = _GAMMAS | _MM_MLP | {f"norm_{part}": f"norm1_{part}_cross" for part in "qkv"}
_MM_BLOCK = _MM_MLP | {"norm1": "ln1", "norm2": "ln2", "attn": "attn", "gamma_": "gamma_"}

# Beginnings of names, ours: theirs; # is a block's number. The longest that fits counts, what fits none is the same.
LAYOUTS: dict[str, dict[str, str]] = {
    "Atten4Vis/CAE": {
        "regressor_pos_embed": "rd_pos_embed",
        "encoder_to_regressor": "encoder_to_regresser",
        "regressor.norm": "regresser.norm",
        "decoder.blocks": "decoder.decoder_blocks",
        **_block("regressor.blocks", "regresser.regressor_blocks", _CROSS),
    },
    "lxtGH/CAE": {
        "encoder_to_regressor": "encoder_to_decoder",
        "regressor.norm": "pretext_neck.norm",
        "decoder.blocks": "pretext_neck.decoder_blocks",
        "decoder.norm": "pretext_neck.norm2",
        "decoder.head": "pretext_neck.head",
        **_block("regressor.blocks", "pretext_neck.regressor_blocks", _CROSS),
    },
    "mmpretrain": {
        "encoder": "backbone",
        "encoder.norm": "backbone.ln1",
        "encoder.patch_embed.proj": "backbone.patch_embed.projection",
        "mask_token": "neck.mask_token",
        "regressor.norm": "neck.norm_regressor",
        "decoder.norm": "neck.norm_decoder",
        "decoder.head": "neck.head",
        **_block("encoder.blocks", "backbone.layers", _MM_BLOCK),
        **_block("decoder.blocks", "neck.decoders", _MM_BLOCK),
        **_block("regressor.blocks", "neck.regressors", _MM_CROSS),
    },
}
_MARKS = {
    "regressor.": "cae_fast",
    "regresser.": "Atten4Vis/CAE",
    "pretext_neck.": "lxtGH/CAE",
    "backbone.": "mmpretrain",
}
# Copies of the encoder that make the alignment's targets, the tokenizer, normalization, classification heads.
LEFT_OUT = ("alignment_encoder.", "teacher.", "target_generator.", "data_preprocessor.", "head.", "fc_norm.")


def _renamed(name: str, beginnings: dict[str, str]) -> str:
    number = re.search(r"\.(\d+)\.", name)
    pattern = name.replace(number[0], ".#.", 1) if number else name
    fitting = max((old for old in beginnings if pattern.startswith(old)), key=len, default="")
    pattern = beginnings.get(fitting, "") + pattern.removeprefix(fitting)
    return pattern.replace("#", number[1], 1) if number else pattern


def to_layout(state: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Our weights under the names of `layout`; positions that it computes anew are left out."""
    computed = () if layout == "Atten4Vis/CAE" else ("regressor_pos_embed",)
    return {_renamed(name, LAYOUTS[layout]): tensor for name, tensor in state.items() if name not in computed}


def to_ours(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Weights of a whole CAE or of an encoder alone under our names, and whose names they had.

    An encoder alone may be in timm's names, the original's without prefix or mmpretrain's without prefix.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if not name.startswith(LEFT_OUT)}
    if any(name.startswith("layers.") for name in state):
        state = {f"backbone.{name}": tensor for name, tensor in state.items()}
    encoder = "timm" if any(name.endswith("attn.qkv.bias") for name in state) else "Atten4Vis/CAE"
    layout = next((layout for mark, layout in _MARKS.items() if any(n.startswith(mark) for n in state)), encoder)
    theirs = {theirs: ours for ours, theirs in LAYOUTS.get(layout, {}).items()}
    state = {_renamed(name, theirs): tensor for name, tensor in state.items()}
    if "cls_token" in state:
        state = {f"encoder.{name}": tensor for name, tensor in state.items()}
    return _from_timm(state), layout


def _from_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Splits biases and renames LayerScale, which is 1 where there is none.

    Biases of keys are left out: softmax does not see what all its logits have in common.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith("attn.qkv.bias"):
            query, _, value = tensor.chunk(3)
            renamed[name.replace("qkv.bias", "q_bias")] = query
            renamed[name.replace("qkv.bias", "v_bias")] = value
        else:
            renamed[re.sub(r"ls([12])\.gamma$", r"gamma_\1", name)] = tensor
    for name in [name for name in renamed if name.endswith("attn.qkv.weight")]:
        for gamma in ("gamma_1", "gamma_2"):
            renamed.setdefault(name.replace("attn.qkv.weight", gamma), torch.ones(renamed[name].shape[1]))
    return renamed


def encoder_part(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder of a whole model, its names without prefix: what timm's Beit and Eva call them, too."""
    return {name.removeprefix("encoder."): tensor for name, tensor in state.items() if name.startswith("encoder.")}


def encoder_for_timm(model_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder under the names of timm's VisionTransformer(init_values=...), qkv.bias = [q_bias, 0, v_bias]."""
    encoder = encoder_part(model_state)
    renamed: dict[str, Tensor] = {}
    for name, tensor in encoder.items():
        if name.endswith("attn.q_bias"):
            value = encoder[name.replace("q_bias", "v_bias")]
            renamed[name.replace("q_bias", "qkv.bias")] = torch.cat((tensor, torch.zeros_like(tensor), value))
        elif not name.endswith("attn.v_bias"):
            renamed[re.sub(r"gamma_([12])$", r"ls\1.gamma", name)] = tensor
    return renamed
