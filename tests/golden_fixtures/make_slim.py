"""Cut the committed slim set out of the full reference fixtures.

    python -m tests.golden_fixtures.make_slim FULL_DIR tests/golden

Small files are taken (nearly) whole; of the large ones the cases below. The four component files
whose weights alone exceed the budget (transformer, wan_vae, geo_adapter, vggt) are left out: the
same code is compared, stage by stage, through the end-to-end case, whose weights hold all six
components.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

BUDGET = 10_000_000  # bytes in all

# file -> names that are kept
KEPT = {
    "clip": r".*",
    "control_layout": r".*",
    "dataset": r"(in|stride2|stride2_start1|broken_frame4|dir_mode)/.*",
    "e2e": r"(shared_F5|2view)/.*",
    "e2e_weights": r"(?!clip_image_encoder/model\.textual).*",
    "geometry": r"(?!resize/up_landscape).*",
    "losses": r".*",
    "pointcloud": r".*",
    "schedulers": r".*",
    "text_encoder": r".*",
    "train_stage1": r".*",
    "vggt_bootstrap": r"1view/.*",
}
STRIDED = {"2view/latents_step2": 2}  # kept whole in the full set: sampled like its siblings


def cut(source: Path, target: Path, pattern: str) -> None:
    """Write the tensors of `source` that match, with its metadata."""
    tensors = {}
    with safe_open(source, "pt") as handle:
        metadata, names = handle.metadata(), handle.keys()
        for name in names:
            if re.fullmatch(pattern, name):
                tensor = handle.get_tensor(name)
                if (stride := STRIDED.get(name)) is not None:
                    name, tensor = f"{name}_s{stride}", tensor[..., ::stride, ::stride].contiguous()
                tensors[name] = tensor
    save_file(tensors, target, metadata)


def cut_manifest(source: Path, target: Path) -> None:
    """Names, shapes and constants of the checkpoint manifest, compressed."""
    components = json.loads(source.read_text())["components"]
    kept = {
        name: {key: component[key] for key in ("tensors", "constants") if key in component}
        for name, component in components.items()
    }
    text = json.dumps({"components": kept}, separators=(",", ":")).encode()
    target.write_bytes(gzip.compress(text, 9, mtime=0))


def main(full: str, slim: str) -> None:
    """Write the slim set and check its size."""
    target = Path(slim)
    target.mkdir(parents=True, exist_ok=True)
    for kind, pattern in KEPT.items():
        cut(Path(full) / f"{kind}.safetensors", target / f"{kind}.safetensors", pattern)
    manifest = "checkpoint_manifest.json"
    cut_manifest(Path(full).parent / manifest, target / f"{manifest}.gz")
    shutil.copytree(Path(full) / "e2e_tokenizer", target / "e2e_tokenizer", dirs_exist_ok=True)
    total = sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
    print(f"{target}: {total:,} bytes")
    if total > BUDGET:
        raise SystemExit(f"{total:,} bytes exceed the budget of {BUDGET:,}")


if __name__ == "__main__":
    main(*sys.argv[1:])
