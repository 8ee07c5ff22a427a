"""Exported files, opened and run without the model's code.

    from gen3r_export.runtime import Plans

    plans = Plans("plans")
    decode = plans.open(plans.find("vae_decoder"), device="cuda")
    (frames,) = decode(latents)

Needs torch and the format's library (onnxruntime, TensorRT) and neither gen3r nor its kernels.
An AOTInductor package is a compiled program: open those of people whom you trust.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from gen3r_export.files import file_sha256
from gen3r_export.graph import DimRange, TensorSpec
from gen3r_export.manifest import Entry, Manifest, read_manifest

RETRIES = 3  # replacements of the folder that one reading may meet
ANEW = "copy the folder again, or export again"


class Runner(Protocol):
    """An open file."""

    @property
    def names_in(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        ...

    @property
    def names_out(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        ...

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs of inputs on the runner's device, in the graph's order."""
        ...


class Plans:
    """The plans of one folder.

    Attributes
    ----------
    folder : where they lie. manifest : plans.json, as it was last read.

    Raises
    ------
    ValueError : no plans.json there, or a broken one.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.manifest: Manifest = read_manifest(self.folder)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All entries."""
        return self.manifest.entries

    def find(self, name: str, format: str | None = None, precision: str | None = None) -> Entry:
        """The one entry of a graph's name; format and precision where there are several.

        Raises
        ------
        ValueError : none, or several; the text names them.
        """
        named = [entry for entry in self.entries if entry.name == name]
        found = [
            entry
            for entry in named
            if format in (None, entry.format) and precision in (None, entry.precision)
        ]
        if len(found) == 1:
            return found[0]
        known = sorted({str(entry) for entry in (found or named)}) or sorted(
            {entry.name for entry in self.entries}
        )
        word = "several entries are" if found else "no entry is"
        raise ValueError(f"{word} '{name}' in {self.folder}; there are: {', '.join(known)}")

    def open(self, entry: Entry, device: str = "cpu", *, verify: bool = False) -> Runner:
        """Open an entry; one that an export of the same weights replaced meanwhile is read anew.

        Raises
        ------
        ValueError : as `open_plan`; or what stands in its place now holds other weights.
        """
        for _ in range(RETRIES):
            try:
                return open_plan(entry, self.folder, device, verify=verify)
            except Exception:  # a library's own error where the file goes while it is opened
                current = self.renewed(entry)
                if current is None:
                    raise
                if current.weights != entry.weights:
                    raise ValueError(
                        f"{entry} was replaced by an export of other weights; read the folder again"
                    ) from None
                entry = current
        return open_plan(entry, self.folder, device, verify=verify)

    def renewed(self, entry: Entry) -> Entry | None:
        """What stands in the place of an entry whose files were replaced; None: it is as it was."""
        self.manifest = read_manifest(self.folder)
        current = next((e for e in self.entries if e.key == entry.key), None)
        return None if current is None or current.folder == entry.folder else current


def open_plan(
    entry: Entry, folder: str | Path, device: str = "cpu", *, verify: bool = False
) -> Runner:
    """Open an entry of the manifest of `folder` on ``cpu``, ``cuda`` or ``cuda:1``.

    verify : compare the sha256 of every file as well as its size.

    Raises
    ------
    ValueError : files that are missing or differ from the manifest, a library that is not
        installed, a device that the plan is not for, a file that does not open; one line.
    """
    kind = torch.device(device).type
    if entry.device not in ("any", kind):
        raise ValueError(f"{entry} is for {entry.device}, not for {kind}; export it for {kind}")
    check_files(entry, Path(folder), verify=verify)
    path = Path(folder) / entry.folder / entry.main_file
    # Each format's library is loaded where it is needed only.
    if entry.format == "onnx":
        from gen3r_export.onnx_runner import open_onnx

        return cast(Runner, open_onnx(path, device))
    if entry.format == "tensorrt":
        from gen3r_export.tensorrt_run import open_tensorrt

        return cast(Runner, open_tensorrt(path, device))
    if entry.format == "aoti":
        from gen3r_export.aoti_package import open_aoti

        return cast(Runner, open_aoti(path, device))
    raise ValueError(f"{entry.name} has format '{entry.format}', which this version does not know")


def check_files(entry: Entry, folder: Path, *, verify: bool) -> None:
    """ValueError where a file of the entry is missing or is not what the manifest says."""
    for name, facts in entry.files.items():
        path = folder / entry.folder / name
        try:
            size = path.stat().st_size
            if size != facts.bytes:
                raise ValueError(
                    f"{path} has {size} bytes, plans.json says {facts.bytes}: it was cut short or "
                    f"changed; {ANEW}"
                )
            if verify and file_sha256(path) != facts.sha256:
                raise ValueError(
                    f"{path} was changed: its sha256 is not that of plans.json; {ANEW}"
                )
        except FileNotFoundError:
            raise ValueError(f"{path} is missing; {ANEW}") from None
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); {ANEW}") from None


def axis_lengths(
    specs: Sequence[TensorSpec],
    dims: Mapping[str, DimRange],
    shapes: Mapping[str, Sequence[int]],
) -> dict[str, int]:
    """The lengths of the dynamic axes for these inputs (those that are given).

    Raises
    ------
    ValueError : an unknown input, or a shape that the specs do not allow; the text says what they
        allow.
    """
    known = {spec.name: spec for spec in specs}
    lengths: dict[str, int] = {}
    for name, shape in shapes.items():
        if name not in known:
            raise ValueError(f"there is no input '{name}'; there are: {', '.join(known)}")
        spec = known[name]
        fits = len(shape) == len(spec.shape) and all(
            _axis_fits(axis, int(length), dims, lengths)
            for axis, length in zip(spec.shape, shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"{name} {list(shape)} does not fit [{', '.join(map(str, spec.shape))}]"
                + "".join(f", {n} {d.least} to {d.most}" for n, d in dims.items())
            )
    return lengths


def _axis_fits(
    axis: int | str, length: int, dims: Mapping[str, DimRange], lengths: dict[str, int]
) -> bool:
    """Whether an axis may be so long; what a name then stands for is noted in `lengths`."""
    if isinstance(axis, int):
        return length == axis
    product, _, added = axis.partition("+")
    factor, _, name = product.rpartition("*")
    value, rest = divmod(length - int(added or 0), int(factor or 1))
    dim = dims.get(name)
    within = dim is None or dim.least <= value <= dim.most
    return rest == 0 and within and lengths.setdefault(name, value) == value
