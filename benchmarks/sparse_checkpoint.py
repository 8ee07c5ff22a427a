"""A checkpoint folder whose tensors are holes: real names, shapes and layout, no disk space.

    python -m benchmarks.sparse_checkpoint DIR      # the published layout, 20 GB apparent, in bf16

Every value reads as zero. It serves to try loading, checking and memory use without the published
weights.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path

from gen3r.checkpoint_save import config_json, write_json
from gen3r.components import COMPONENTS
from gen3r.config import GEN3R, Gen3RConfig
from gen3r.nano_tokenizer import build_tokenizer
from gen3r.schedulers import make_euler_scheduler

BYTES = {"BF16": 2, "F16": 2, "F32": 4}


def write_sparse_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16"
) -> None:
    """A safetensors file with a true header and a hole for its data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * BYTES[dtype]
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def shard(
    shapes: Mapping[str, tuple[int, ...]], limit: int, dtype: str
) -> list[dict[str, tuple[int, ...]]]:
    """Split by name order so that no part exceeds `limit` bytes."""
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * BYTES[dtype]
        if parts[-1] and used + size > limit:
            parts.append({})
            used = 0
        parts[-1][name] = shape
        used += size
    return parts


def write_sparse_checkpoint(
    folder: Path, config: Gen3RConfig = GEN3R, dtype: str = "BF16", limit: int = 10**10
) -> None:
    """Write the published layout with holes for tensors; `limit`: bytes of the largest file."""
    folder.mkdir(parents=True)
    for name, component in COMPONENTS.items():
        target = folder / name
        target.mkdir()
        own = getattr(config, name)
        write_json(target / "config.json", config_json(component, own))
        parts = shard(component.expected(own), limit, dtype)
        for index, shapes in enumerate(parts):
            suffix = f"-{index + 1:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
            write_sparse_file(target / f"{component.file_stem}{suffix}.safetensors", shapes, dtype)
    build_tokenizer().save_pretrained(folder / "tokenizer")
    make_euler_scheduler().save_pretrained(folder / "scheduler")
    write_json(folder / "model_index.json", {"_class_name": "Gen3RPipeline"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    write_sparse_checkpoint(parser.parse_args().directory)
