"""Files with a seal: a SHA-256 over every byte, so that no damage can load silently.

A sealed file ends in or contains ``lrmanifold-seal:`` and 64 hexadecimal digits: the digest of the
whole file with zeros in the place of those digits. Other programs read the file as before: the seal
is the comment of a zip archive (``torch.save``), or a word in the file's own metadata (safetensors,
JSON). It finds damage; whoever changes a file on purpose can also seal it anew.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ._files import write_atomically

_MARK = b"lrmanifold-seal:"
_SIZE = hashlib.sha256().digest_size * 2
BLANK = (_MARK + b"0" * _SIZE).decode()
"""A seal before it is set: put it into the file once, then call :func:`set_seal`."""

_END = b"PK\x05\x06"  # end record of a zip archive, 22 bytes without a comment


class SealError(ValueError):
    """What is wrong with a file, in words that follow its name."""


def checksum(x: Tensor) -> int:
    """CRC-32 of the bytes of a tensor."""
    flat = x.detach().cpu().contiguous().reshape(-1)
    values: Any = flat.view(torch.uint8).numpy()
    return zlib.crc32(values) if flat.numel() else 0


def set_seal(data: bytes | bytearray) -> bytearray:
    """The same bytes with the digest in the place of their one blank seal."""
    blank = BLANK.encode()
    if data.count(blank) != 1:
        raise SealError("a file must contain exactly one blank seal before it is sealed")
    sealed, at = bytearray(data), data.index(blank) + len(_MARK)
    sealed[at : at + _SIZE] = hashlib.sha256(data).hexdigest().encode()
    return sealed


def check_seal(data: bytes) -> bool:
    """Whether there is a seal.

    Raises
    ------
    SealError
        If there is one and the bytes are not those that were sealed.
    """
    at = data.rfind(_MARK)
    if at < 0:
        return False
    at += len(_MARK)
    digest = hashlib.sha256(memoryview(data)[:at])
    digest.update(b"0" * _SIZE)
    digest.update(memoryview(data)[at + _SIZE :])
    if digest.hexdigest().encode() != data[at : at + _SIZE]:
        raise SealError("is damaged: its bytes are not those that were written")
    return True


def write_torch(path: Path, value: Any) -> None:
    """``torch.save`` with a seal, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    if bytes(buffer.getbuffer()[-22:-18]) != _END:
        raise SealError("torch.save must write zip archives without a comment")
    buffer.seek(-2, os.SEEK_END)  # the length of the comment
    buffer.write(len(BLANK).to_bytes(2, "little") + BLANK.encode())
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    buffer.seek(-_SIZE, os.SEEK_END)
    buffer.write(digest.encode())
    write_atomically(path, buffer.getbuffer())


def read_torch(path: Path, check: bool = True) -> tuple[Any, bool]:
    """What ``torch.load`` reads without running code, on the CPU, and whether it was sealed.

    Files without a seal, of others or of old versions, are checked by the CRCs of the archive.
    ``check=False`` leaves out both, to find out what is damaged.

    Raises
    ------
    SealError
        If the file is damaged, or holds more than tensors, numbers and words.
    OSError
        If it cannot be read.
    """
    with open(path, "rb") as file:
        sealed = check and _check_end(file)
        _check_archive(file, crcs=check and not sealed)
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True), sealed
        except Exception as error:  # bytes that are no pickle raise what they please
            # not torch's own words: they advise to read it without weights_only
            raise SealError(
                "is damaged, or holds more than tensors, numbers and words (a whole model instead "
                "of its state_dict()?)"
            ) from error


def _check_end(file: BinaryIO) -> bool:
    """:func:`check_seal` for a seal at the end, without the whole file in memory."""
    size = file.seek(0, os.SEEK_END)
    start = max(0, size - len(BLANK))
    file.seek(start)
    tail = file.read()
    if not tail.startswith(_MARK):
        return False
    file.seek(0)
    digest, left = hashlib.sha256(), size - _SIZE
    while left and (part := file.read(min(left, 1 << 20))):
        digest.update(part)
        left -= len(part)
    digest.update(b"0" * _SIZE)
    if digest.hexdigest().encode() != tail[len(_MARK) :]:
        raise SealError("is damaged: its bytes are not those that were written")
    return True


def _check_archive(file: BinaryIO, crcs: bool) -> None:
    """Refuse archives that unpack to more than they hold; check the CRC of every member."""
    size = file.seek(0, os.SEEK_END)
    if not zipfile.is_zipfile(file):
        return  # torch's old formats, or no such file: torch.load knows
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            # torch.save compresses nothing, so a member that could be huge in memory is foreign
            if any(m.compress_type for m in members) or sum(m.file_size for m in members) > size:
                raise SealError("holds compressed data, which torch.save does not write")
            bad = archive.testzip() if crcs else None
    except SealError:
        raise
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError) as error:
        raise SealError(f"is damaged: {error}") from error
    if bad is not None:
        raise SealError(f"is damaged: the bytes of {bad} are not those that were written")
