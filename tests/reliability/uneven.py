"""Run by `test_distributed_faults.py` on two ranks: runs whose work or whose rewards are not the same on both."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from test_trainer import rows, trainer_of, weights

from mmft.training.config import A2CConfig
from mmft.training.trainer import A2CTrainer
from reward_models import RewardPart, WeightedRewards
from reward_models.credit import shaped_ok if False else None  # noqa
