"""Imported once by the fork server, so that every test process starts with Megatron in memory."""

from yoco_megatron.startup.prepare import prepare

prepare()

import megatron.core.tokenizers.text  # noqa: F401  (every run builds a tokenizer, which imports transformers)
import torch
from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset

import pretrain_yoco  # noqa: F401
from support import models  # noqa: F401
from support.cli import TINY
from yoco_megatron.startup import arguments

arguments.parse([*TINY])  # the parsers and the table of flags are built once
MockGPTLowLevelDataset.size = 500  # documents of --mock-data; Megatron's 100,000 are indexed in a quarter of a second
torch.set_num_threads(1)
