"""Imported once by the fork server, so that every test process starts with Megatron in memory."""

from yoco_megatron.startup.prepare import prepare

prepare()

import megatron.core.tokenizers.text  # noqa: F401  (every run builds a tokenizer, which imports transformers)
import torch

import pretrain_yoco  # noqa: F401
from support import models  # noqa: F401
from yoco_megatron.startup.parser import build_parser

build_parser()  # the help of nine hundred flags is read from Megatron's source once
torch.set_num_threads(1)
