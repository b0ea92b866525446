"""Imported once by the fork server, so that every test process starts with Megatron in memory."""

from yoco_megatron import runtime

runtime.prepare()

import torch

import pretrain_yoco  # noqa: F401
from support import models  # noqa: F401

torch.set_num_threads(1)
