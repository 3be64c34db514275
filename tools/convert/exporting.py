"""Phalanx checkpoint -> Hugging Face folder: the same weights under their names, that transformers loads without a warning. [p]

In: a checkpoint, imported or trained under any layout. Out: a folder with config.json, generation_config.json, tokenizer
files, model-*.safetensors and their index. Vocabulary padding is cut off.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import ConfigError, Problem
from configs.files import read_json, write_atomically, write_json
from configs.load import from_dict
from configs.model_schema import Model
from pretrain.tensor_file import DamagedFile
from tools.convert.dtypes import FLOATS, NAMES, Array, convert, widest
from tools.convert.families import family_for, family_named, family_of
from tools.convert.family import Family
from tools.convert.importing import COMPANIONS, KEPT
from tools.convert.links import Links, make_links, width
from tools.convert.stored import CheckpointTensors
from tools.convert.tokenizers import export_tokenizer
from tools.convert.work import Entry, Share, Unit, Workplace, cut_rows, plan_files

FILE_BYTES = 5 << 30
TORCH_NAMES = {"BF16": "bfloat16", "F32": "float32", "F16": "float16", "F64": "float64"}
