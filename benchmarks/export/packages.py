"""AOTInductor packages beside the engine's own path and eager: decoding a clip, and a step.

gen3r-engine bench --suite export_aoti                  # an H100: 49 frames of 560 x 560
gen3r-engine bench --suite export_aoti -- --case vae_decoder adapter_decoder
gen3r-engine bench --suite export_aoti -- --case denoiser_step --attention cudnn triton
gen3r-engine bench --suite export_aoti -- --model nano --frames 5 --size 56 --device cpu

Providers: eager (separate PyTorch operators and PyTorch's attention), module (the engine's path in
this process: the same modules with our kernels, the denoiser's blocks compiled), aoti (packages of
those), each also as a replayed CUDA graph where the case is a step. Rows: time (ms), first call (s;
of aoti: export and build), size (MB), `from_eager` in a row's config: how far the results lie from
eager's; `from_module` in those of aoti, and `ratio`: its time to the module's (wanted: within 3 %).
Weights are random, of PyTorch's own initial scale.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.engine.common import EAGER, Options, Rows, parser, release, resolve_options
from benchmarks.harness import COMPILE, percentiles
from benchmarks.timing import Stopwatch
from gen3r.components import COMPONENTS
from gen3r.pipeline import Gen3RPipeline
from gen3r_export.aoti import export_aoti, open_aoti
from gen3r_export.aoti_carried import CHOICES
from gen3r_export.compare import largest_error
from gen3r_export.config import PRECISIONS, ExportConfig
from gen3r_export.graph import Graph
from gen3r_export.parts import graphs
from gen3r_kernels import Backends

SUITE = "export_aoti"
SEED = 8
# Case to the part that it is of and the components which that part's graphs and examples run.
CASES = {
    "vae_decoder": ("vae_decoder", ("wan_vae",)),
    "adapter_decoder": ("adapter_decoder", ("geo_adapter",)),
    "denoiser_step": ("denoiser", ("transformer",)),
}
Call = Callable[[], tuple[Tensor, ...]]


def make_pipeline(options: Options, backends: Backends, needed: Sequence[str]) -> Gen3RPipeline:
    """Random weights on the device for what is needed; the other components have no memory."""
    modules: dict[str, Any] = {}
    for name, component in COMPONENTS.items():
        # The pipeline's dtype and device are the transformer's: at least its smallest form is made.
        here = name in needed
        torch.manual_seed(SEED)
        with torch.device(options.device if here else "meta"):
            module = component.build(getattr(options.model, name), backends)
        if not here and name == "transformer":
            module = _on_device(module, options)
        modules[name] = module.to(options.dtype).eval().requires_grad_(False)
    return Gen3RPipeline(config=options.model, **modules, tokenizer=None, scheduler=None)


def _on_device(transformer: torch.nn.Module, options: Options) -> torch.nn.Module:
    """A transformer without memory whose patch embedding alone is on the device."""
    transformer.patch_embedding.to_empty(device=options.device)  # type: ignore[union-attr]
    return transformer


def make_graph(case: str, options: Options, backends: Backends) -> Graph:
    """The graph of a case."""
    part, needed = CASES[case]
    pipeline = make_pipeline(options, backends, needed)
    name = "clip" if case != "denoiser_step" else "step"
    return next(g for g in graphs(pipeline, export_config(part, options)) if g.form == name)


def export_config(part: str, options: Options) -> ExportConfig:
    precision = next(p for p, dtype in PRECISIONS.items() if dtype == options.dtype_name)
    return ExportConfig(
        parts=(part,),
        format="aoti",
        precision=precision,
        height=options.size,
        width=options.size,
        frames=(options.frames, options.frames),
        batch=(options.batch, options.batch),
        form="clip",
        device=options.device.type,
        run=False,
    )


def captured(call: Call) -> Call:
    """The call as a replayed CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()  # loads kernels, chooses algorithms: neither can be captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return outputs

    return replay


class Case:
    """One case: its rows, and what the providers' results are compared with."""

    def __init__(self, name: str, options: Options, rows: Rows, watch: Stopwatch) -> None:
        self.name, self.options, self.rows, self.watch = name, options, rows, watch
        self.results: dict[str, list[Tensor]] = {}
        self.medians: dict[str, float] = {}

    def measure(self, provider: str, call: Call, *, like: str | None = None, **config: Any) -> None:
        """Time a call; results are compared with eager's and with those of `like`."""
        found = [y.float().cpu() for y in call()]
        for other, key in (("eager", "from_eager"), (like, f"from_{like}")):
            if other in self.results:
                config[key] = float(f"{largest_error(found, self.results[other]):.3g}")
        times = self.watch.times(lambda: call)
        self.medians[provider] = percentiles(times)[1]
        if like in self.medians:
            config["ratio"] = round(self.medians[provider] / self.medians[str(like)], 4)
        self.rows.add(self.name, provider, "time", "ms", times, **config)
        self.results.setdefault(provider, found)

    def both(self, provider: str, call: Call, *, like: str | None = None, **config: Any) -> None:
        """The call, and where it is a step on a GPU, its replay."""
        self.measure(provider, call, like=like, **config)
        if self.options.cuda and self.name == "denoiser_step":
            replayed = None if like is None else f"{like}-graph"
            self.measure(f"{provider}-graph", captured(call), like=replayed, **config)

    def run(self, attentions: Sequence[str]) -> None:
        options = self.options
        for provider, backends in (("eager", EAGER), ("module", Backends())):
            graph = make_graph(self.name, options, backends)
            module, inputs = graph.module, graph.examples()
            blocks = getattr(getattr(module, "model", None), "blocks", ())
            if provider == "module" and options.cuda and not options.no_compile:
                for block in blocks if self.name == "denoiser_step" else ():
                    block.compile(fullgraph=True, dynamic=False)
            first = self.watch.first(lambda m=module, x=inputs: lambda: m(*x))  # type: ignore[misc]
            self.both(provider, lambda m=module, x=inputs: m(*x))  # type: ignore[misc]
            self.rows.add(self.name, provider, "time", "s", [first], **COMPILE)
            del graph, module, inputs, blocks
            release(options.device)
        for attention in attentions:
            self.package(attention, len(attentions) > 1)
            release(options.device)

    def package(self, attention: str, several: bool) -> None:
        """Export, open and time the package."""
        options = self.options
        provider = f"aoti-{attention}" if several else "aoti"
        with tempfile.TemporaryDirectory() as scratch:
            graph = make_graph(self.name, options, Backends())
            part, _ = CASES[self.name]
            done = export_aoti(
                graph, Path(scratch), export_config(part, options), print, attention=attention
            )
            inputs = graph.examples()
            del graph
            release(options.device)
            path = Path(scratch) / done.files[0]
            runner = open_aoti(path, options.device.type)
            facts = {"facts": dict(done.facts)}
            self.both(provider, lambda: runner(*inputs), like="module", **facts)
            made = done.seconds["export"] + done.seconds["build"]
            self.rows.add(self.name, provider, "time", "s", [made], **COMPILE)
            self.rows.add(self.name, provider, "size", "MB", [path.stat().st_size / 1e6])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases and write benchmarks/results/<gpu>/export_aoti.jsonl; 1 if one failed."""
    made = parser(SUITE, __doc__, ())
    made.add_argument("--case", nargs="+", choices=tuple(CASES), default=list(CASES))
    made.add_argument("--attention", nargs="+", choices=CHOICES, default=["cudnn"])
    options = resolve_options(made.parse_args(argv))
    rows = Rows(SUITE, options)
    watch = Stopwatch(options.device)
    for name in options.arguments.case:
        try:
            with torch.no_grad():
                Case(name, options, rows, watch).run(options.arguments.attention)
        except Exception as error:  # the next case may work
            rows.failed.append(f"{name}: {type(error).__name__}: {error}")
            print(f"FAILED: {rows.failed[-1]}", flush=True)
        release(options.device)
    return rows.finish()


if __name__ == "__main__":
    sys.exit(main())
