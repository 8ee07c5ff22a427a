"""Arrays as one .npz file, in C++ where it is built (`native`), else through numpy."""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from gen3r_engine.native import native

LEVEL = 4  # of zlib's nine; beyond it depth maps hardly shrink and take twice the time


def write_npz(
    path: str | Path, arrays: Mapping[str, np.ndarray], *, compress: bool = False, threads: int = 0
) -> None:
    """Write arrays under their names, readable by `numpy.load` without pickles.

    Compressed, blocks of 1 MiB are deflated on several threads. Without the extension, or where it
    was built without zlib, numpy writes the same arrays on one thread. A file that could not be
    written whole is removed.

    Parameters
    ----------
    path : overwritten if it exists.
    threads : of the C++ path; 0 takes what OMP_NUM_THREADS allows.

    Raises
    ------
    OSError : the file can not be written; its `filename` is the path.
    ValueError : an array of objects.
    """
    whole = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in whole.items():
        if array.dtype.hasobject:
            raise ValueError(f"array '{name}' holds objects; an .npz file takes plain numbers")
    module = native()
    # Unbuffered: the descriptor is written to behind the file object's back.
    with _removed_on_error(Path(path)), open(path, "wb", buffering=0) as file:
        if module is None or (compress and not module.DEFLATE):
            save = np.savez_compressed if compress else np.savez
            try:
                save(file, allow_pickle=False, **whole)
            except OSError as error:
                error.filename = error.filename or str(path)
                raise
            return
        entries = [(f"{name}.npy", *_npy(array)) for name, array in whole.items()]
        module.npz(file.fileno(), entries, LEVEL if compress else 0, threads, str(path))


def _npy(array: np.ndarray) -> tuple[bytes, np.ndarray]:
    """The .npy header of an array, and the array as it lies behind it."""
    # `ascontiguousarray` alone would make a scalar one-dimensional.
    packed = np.ascontiguousarray(array).reshape(array.shape)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(packed))
    return header.getvalue(), packed


@contextlib.contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    """Nothing half-written stays; a device (/dev/full) is not ours to remove."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.lstat(path).st_mode):
                path.unlink()
        raise
