"""Laws are compared by two-sample chi-square tests with 200,000 masks of the original implementation, at fixed seeds."""

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from cae_kernels.block_mask import block_mask, random_mask
from cae_kernels.philox import STREAM_MASK, draw, uniform
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parents[1] / "golden" / "block_mask_distribution"
LOWEST_P_VALUE = 1e-4
SAMPLES = 50_000
GRID = {"height": 14, "width": 14, "num_masked": 98}
SMALL = {"height": 7, "width": 7, "num_masked": 24, "min_block": 4}
module = importlib.import_module("cae_kernels.block_mask")  # the package's attribute of this name is the function
