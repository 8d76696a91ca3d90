"""Reading checkpoint files. Nothing here runs code that a file brings along."""

import argparse
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlparse
from urllib.request import Request, urlopen
from uuid import uuid4

import numpy as np
import torch

_TENSORFLOW = re.compile(r"\.(tar\.gz|tgz|index|data-\d+-of-\d+)$")
_HASH = re.compile(r"-([0-9a-f]{8,64})\.[^-]*$")

_CONVERT_TENSORFLOW = """\
{name} is a TensorFlow checkpoint; make an .npz of it first, where TensorFlow is installed (unpack a .tar.gz before):
    reader = tf.train.load_checkpoint("path/of/the/checkpoint")  # the path without .index
    np.savez("moat.npz", **{{name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}})"""


def read_checkpoint(
    source: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None
) -> tuple[Mapping[str, Any], str]:
    """What the file or URL holds, and its file name. The ending decides: .safetensors, .npz, else torch.save's format.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another kind, or its pickle asks for more than tensors and plain values.
    """
    address = os.fspath(source)
    url = address if isinstance(address, str) and urlparse(address).scheme in ("http", "https") else None
    name = PurePosixPath(urlparse(address).path).name if url else Path(address).name
    if is_tensorflow(name):
        raise ValueError(_CONVERT_TENSORFLOW.format(name=name))
    path = _download(url, name, cache_dir) if url else Path(address)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {str(path)!r}")
    try:
        contents = _READERS.get(path.suffix, _read_torch)(path)
    except (ImportError, MemoryError, PermissionError):  # these say what is wrong, and it is not the contents
        raise
    except Exception as error:  # a damaged file may fail in any way
        where = f" (from {url}; delete the file to download it again)" if url else ""
        raise ValueError(f"cannot read checkpoint {str(path)!r}{where}: {_reason(error, path)}") from error
    if not isinstance(contents, Mapping):
        raise ValueError(f"checkpoint {str(path)!r} holds a {type(contents).__name__}, not a state dict")
    return contents, name


def is_tensorflow(name: str) -> bool:
    return _TENSORFLOW.search(name) is not None


def _download(url: str, name: str, cache_dir: str | os.PathLike[str] | None) -> Path:
    """The file in the cache, downloaded if it is not there.

    Many addresses end with the same name, as model.safetensors: a hash of the whole address keeps them apart.
    """
    folder = Path(torch.hub.get_dir(), "checkpoints") if cache_dir is None else Path(cache_dir)
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"vision_ops: downloading {url} to {path}", file=sys.stderr)
        part = path.with_name(f"{path.name}.{uuid4().hex}.part")
        try:
            _fetch(url, part)
            _check_hash(part, url, name)
            part.replace(path)
        except (OSError, HTTPException) as error:
            raise OSError(
                f"cannot download {url}: {error}. Without a network, fetch it elsewhere and give load_checkpoint its "
                f"path, or put it at {str(path)!r}"
            ) from error
        finally:
            part.unlink(missing_ok=True)
    return path


def _fetch(url: str, path: Path) -> None:
    with urlopen(Request(url, headers={"User-Agent": "vision_ops"}), timeout=60) as response, path.open("wb") as file:
        length = response.length  # None where the server does not say
        shutil.copyfileobj(response, file, 1 << 20)
        if length is not None and file.tell() != length:
            raise OSError(f"the connection ended after {file.tell()} of {length} bytes")


def _check_hash(path: Path, url: str, name: str) -> None:
    """Publishers put the first digits of the SHA-256 at the end of a name; what has no letter may be a date."""
    published = _HASH.search(name)
    if published and not published[1].isdigit():
        with path.open("rb") as file:
            found = _sha256(file)
        if not found.startswith(published[1]):
            raise ValueError(
                f"{url} is not the file that was published: its SHA-256 begins with {found[: len(published[1])]}, "
                f"and by its name with {published[1]}"
            )


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"reading {str(path)!r} needs the package safetensors: pip install safetensors") from error
    return load_file(path)


def _read_npz(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _read_torch(path: Path) -> Mapping[str, Any]:
    with torch.serialization.safe_globals(_safe_globals()):
        return torch.load(path, map_location="cpu", weights_only=True)


_READERS = {".safetensors": _read_safetensors, ".npz": _read_npz}


def _safe_globals() -> list[Any]:
    """What training scripts store beside the weights: their arguments, and metrics that are numpy scalars.

    numpy 1 and 2 write one function under two names.
    """
    scalar = np.float64(0).__reduce__()[0]
    types: set[Any] = {type(np.dtype(code)) for code in "?SU" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]}
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [argparse.Namespace, np.dtype, *types, *((scalar, name) for name in names)]


def _reason(error: Exception, path: Path) -> str:
    """The own texts of torch and numpy advise to switch the safety off, which is not passed on as lightly."""
    text = str(error)
    if "allow_pickle" in text:
        return "no .npz of plain arrays; what is pickled is not read, since it could run code"
    refused = re.search(r"GLOBAL (\S+)", text)
    if refused:
        return (
            f"its pickle asks for {refused[1]}; only tensors, plain containers, argparse.Namespace and numpy scalars "
            "are read, since anything else could run code. If you trust whoever made the file, let it, and get at the "
            "state dict with\n"
            f'    load_checkpoint(model, torch.load({str(path)!r}, map_location="cpu", weights_only=False))'
        )
    lines = text.rpartition("WeightsUnpickler error:")[2].strip().splitlines()
    return f"damaged, or no checkpoint ({type(error).__name__}{': ' + lines[0][:200] if lines else ''})"
