"""Checkpoints of models with low-rank layers, as safetensors or by ``torch.save``.

Every file has a version and a checksum of each tensor, is written whole or not at all, and is read
without running code from it. Loading checks everything before it changes anything, and an error
names the key.
"""

from ._file import VERSION, CheckpointError
from ._load import Loaded, load
from ._save import save

__all__ = ["VERSION", "CheckpointError", "Loaded", "load", "save"]
