"""What a plan runs: kernels, the ONNX layers fused into each, and the types of its tensors.

`inspect_plan` reads the program that TensorRT-RTX writes as text into its plans (at detailed
profiling verbosity), because a plan opens on a GPU only; the text is no interface of NVIDIA's and
was read in version 1.7. `inspect_engine` asks TensorRT itself, on a GPU.
"""

from __future__ import annotations

import json
import mmap
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gen3r_export.tensorrt_inspect import PRODUCT_TYPE, onnx_names
from gen3r_export.tensorrt_library import Library

# Words of the text program in a plan of TensorRT-RTX.
HEADER = b"header {\n"
PROGRAM = re.compile(rb"accelerators=\{sm\d+ ?\}")
TENSOR = re.compile(rb'\n *(?:sub_)?tensor=\{[^\n]*? name="([^"\n]+)"[^\n]*? type=(\w+) \}')
STEP = re.compile(rb"\n *([a-z_]+)=\{ name=")
OPERANDS = re.compile(rb'(?:input|input_args)=\{ ?((?:"[^"\n]*" ?)*)\}')
LAYERS = re.compile(rb'layers="([^"]*)"')
PLAN_FLOATS = ("float", "half", "bf16", "fp8_e4m3")
STEP_PRODUCTS = ("corrltn", "fully_connected")


@dataclass(frozen=True)
class PlanInspection:
    """The steps of a plan.

    Parameters
    ----------
    groups : number of steps that carry ONNX layers: a kernel, or a library's product.
    fused : number of those that carry more than one.
    onnx_layers : number of ONNX layers in them.
    steps : number of steps by kind (TensorRT-RTX: ``corrltn`` is a convolution,
        ``fully_connected`` a matrix product, ``runtime_fusion`` a product compiled together with
        what follows it, ``function`` a generated kernel).
    tensors : number of tensors by element type.
    products : number of products by the element type that they multiply.
    """

    groups: int
    fused: int
    onnx_layers: int
    steps: Mapping[str, int]
    tensors: Mapping[str, int]
    products: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def problems(self, precision: str, float32: int = 0) -> list[str]:
        """As `Inspection.problems`, of what was compiled. In fp8 some products stay in half."""
        wanted = ("half", "fp8_e4m3") if precision == "fp8" else (PRODUCT_TYPE[precision],)
        found = [
            f"{count} products take {kind}, not {wanted[-1]}"
            for kind, count in self.products.items()
            if kind not in wanted and not (kind == "float" and count <= float32)
        ]
        if precision == "fp8" and not self.products.get("fp8_e4m3"):
            found.append("no product of the plan takes fp8")
        return found


def _counted(
    groups: Sequence[Sequence[str]],  # ONNX layers of each step that has some
    steps: Counter[str],
    tensors: Counter[str],
    products: Counter[str],
) -> PlanInspection:
    return PlanInspection(
        groups=len(groups),
        fused=sum(len(group) > 1 for group in groups),
        onnx_layers=len({name for group in groups for name in group}),
        steps=dict(steps),
        tensors=dict(tensors),
        products=dict(products),
    )


def inspect_plan(plan: Path) -> PlanInspection:
    """Reads the text programs in a plan of TensorRT-RTX, built at detailed verbosity.

    Raises
    ------
    ValueError : an empty file, or no program in it.
    """
    if not plan.stat().st_size:
        raise ValueError(f"{plan} is empty; build it again")
    # Mapped, because a plan holds the weights too and may be larger than the free memory.
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as bytes_:
        programs = list(_programs(bytes_))
    steps: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    products: Counter[str] = Counter()
    groups = []
    for program in programs:
        types = {name: kind.decode() for name, kind in TENSOR.findall(program)}
        tensors.update(types.values())
        for kind, text in _steps(program):
            steps[kind] += 1
            if found := LAYERS.search(text):
                groups.append(onnx_names(found[1].decode("utf-8", "replace")))
            if kind in STEP_PRODUCTS or b"backbone=" in text:
                products[_product_type(kind, text, types)] += 1
    if not steps:
        raise ValueError(
            f"{plan} holds no text program: it is not of TensorRT-RTX, or not built at detailed "
            "profiling verbosity"
        )
    return _counted(groups, steps, tensors, products)


def _product_type(kind: str, step: bytes, types: Mapping[bytes, str]) -> str:
    """Of a library's product the first operand's type. A fused product names its operands in any
    order, residuals, biases and lengths among them: the commonest type of floating-point numbers,
    of two as common the narrower."""
    operands = OPERANDS.search(step)
    names = re.findall(rb'"([^"]*)"', operands[1]) if operands else []
    found = [types.get(name, "unknown") for name in names]
    found = [kind for kind in found if kind in PLAN_FLOATS] or ["unknown"]
    if kind in STEP_PRODUCTS:
        return found[0]
    return max(found, key=lambda name: (found.count(name), name != "float"))


def _programs(plan: mmap.mmap) -> Iterator[bytes]:
    """The main programs; those of kernels to be compiled on the user's machine name no GPU."""
    start = plan.find(HEADER)
    while start >= 0:
        after = plan.find(HEADER, start + len(HEADER))
        # A program's text ends with the first zero byte.
        end = min(found for found in (plan.find(b"\0", start), after, len(plan)) if found >= 0)
        text = plan[start:end]
        if PROGRAM.search(text[: text.find(b"descriptors {")]):
            # What follows `shape_main` only computes shapes.
            yield text.split(b"\nshape_main {", 1)[0]
        start = after


def _steps(program: bytes) -> Iterator[tuple[str, bytes]]:
    """Kind and text of every step of a program."""
    starts = list(STEP.finditer(program, program.find(b"main {")))
    ends = [start.start() for start in starts[1:]] + [len(program)]
    for start, end in zip(starts, ends, strict=True):
        yield start[1].decode(), program[start.start() : end]


# -------------------------------------------------------------------------- engine on a GPU


def inspect_engine(
    library: Library,
    engine: Any,  # ICudaEngine, built at detailed verbosity
) -> PlanInspection:
    """Asks TensorRT's EngineInspector (TensorRT 10 and 11 name the fields differently)."""
    form = library.module.LayerInformationFormat.JSON
    text = engine.create_engine_inspector().get_engine_information(form)
    steps: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    products: Counter[str] = Counter()
    groups = []
    for layer in json.loads(text)["Layers"]:
        if isinstance(layer, str):
            raise ValueError("the plan was not built at detailed profiling verbosity; build again")
        kind = str(layer.get("LayerType", "unknown"))
        steps[kind] += 1
        tensors.update(map(_engine_type, layer.get("Outputs", [])))
        if names := onnx_names(str(layer.get("Metadata", ""))):
            groups.append(names)
        inputs = layer.get("Inputs", [])
        if inputs and any(word in kind.lower() for word in ("conv", "gemm", "matmul", "multiply")):
            products[_engine_type(inputs[0])] += 1
    return _counted(groups, steps, tensors, products)


def _engine_type(tensor: Mapping[str, Any]) -> str:
    """Element type of a tensor of the inspector: ``DataType`` (11) or in ``Format/Datatype``."""
    text = str(tensor.get("DataType") or tensor.get("Format/Datatype") or "").lower()
    words = {
        "fp8": "fp8_e4m3",
        "bf16": "bf16",
        "bfloat16": "bf16",
        "half": "half",
        "fp16": "half",
        "float": "float",
        "fp32": "float",
        "int64": "int64",
        "int32": "int32",
        "int8": "int8",
        "bool": "bool",
    }
    return next((name for word, name in words.items() if word in text), "unknown")
