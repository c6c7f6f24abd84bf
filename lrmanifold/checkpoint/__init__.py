"""Checkpoints of models with low-rank layers, as safetensors or by ``torch.save``.

Every file has a version, a seal over all its bytes and a checksum of each tensor, is written whole
or not at all, and is read without running code from it. Loading checks everything before it changes
anything, and an error names the key. What could not be loaded again is not saved.
"""

from ._file import VERSION, CheckpointError
from ._load import Loaded, load, peek
from ._save import save

__all__ = ["VERSION", "CheckpointError", "Loaded", "load", "peek", "save"]
