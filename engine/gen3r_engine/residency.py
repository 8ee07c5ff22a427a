"""Which weights are on the GPU when.

    resident   all of them, all the time
    24gb       the text encoder and the image encoder visit the GPU while they encode
    12gb       both autoencoders and VGGT visit too; only the transformer stays

A visitor lives in pinned host memory. It comes whole, in one copy, and goes when the last user
leaves; nothing is copied back, for weights are read only. The text encoder, larger than all others
together, streams: its blocks pass through two slots on the GPU, the next one copied while one
computes, and its embedding table is read on the host. So its visit takes two blocks of memory.

    with residency.use("text_encoder") as encoder:
        features = tokenize_and_encode(tokenizer, encoder, texts, length)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn

from gen3r.video_autoencoder import VideoAutoencoder, arrange_weights
from gen3r_engine.config import TIERS
from gen3r_engine.transfers import CudaTransfer, Transfer
from gen3r_engine.visitors import StreamedVisitor, Visitor, WholeVisitor

VISITORS: dict[str, tuple[str, ...]] = {
    "resident": (),
    "24gb": ("text_encoder", "clip_image_encoder"),
    "12gb": ("text_encoder", "clip_image_encoder", "wan_vae", "geo_adapter", "vggt"),
}
STREAMED = ("text_encoder",)
# Stages and the visitors that are on the GPU in them together.
TOGETHER = (("text_encoder",), ("clip_image_encoder",), ("wan_vae",), ("geo_adapter", "vggt"))


class LazyModule:
    """A module that is made when it is first used.

    It answers to calls and attributes as the module itself, so it may stand where a module is
    expected. `size`: bytes that it will have.
    """

    def __init__(self, make: Callable[[], nn.Module], size: int = 0) -> None:
        self._make = make
        self.size = size
        self._module: nn.Module | None = None
        self._lock = threading.Lock()

    @property
    def loaded(self) -> bool:
        """Whether the module is there."""
        return self._module is not None

    def get(self) -> nn.Module:
        """The module; the first call makes it and raises what that raises."""
        with self._lock:
            if self._module is None:
                self._module = self._make()
            return self._module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.get()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.get(), name)


class Residency:
    """Which of a pipeline's modules are on the GPU when, by tier.

    Parameters
    ----------
    modules : by name; lazy ones are made on their first use.
    tier : ``resident``, ``24gb`` or ``12gb``.
    device : of the computation. On a CPU every tier does nothing.
    transfer : how weights get there; None takes copies on a stream of their own. Given with a CPU
        device, the tiers do their work there too (tests).

    Visitors must be on the host, the others on `device`, as `loading` puts them.

    Raises
    ------
    ValueError : an unknown tier.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module | LazyModule],
        tier: str,
        device: torch.device | str,
        transfer: Transfer | None = None,
    ) -> None:
        if tier not in TIERS:
            raise ValueError(f"residency '{tier}' is unknown; known: {', '.join(TIERS)}")
        self.tier = tier
        self.device = torch.device(device)
        self._modules = dict(modules)
        if transfer is None and self.device.type == "cuda":
            transfer = CudaTransfer(self.device)
        self._transfer = transfer
        self._visitors: dict[str, Visitor] = {}
        self._lock = threading.Lock()

    def visits(self, name: str) -> bool:
        """Whether the module of this name comes and goes. ValueError for an unknown name."""
        if name not in self._modules:
            raise ValueError(f"module '{name}' is unknown; known: {', '.join(self._modules)}")
        return self._transfer is not None and name in VISITORS[self.tier]

    @contextmanager
    def use(self, *names: str) -> Iterator[Any]:
        """Modules on the GPU: one as it is, several as a tuple. They leave as the tier says.

        A block that raises leaves as well.
        """
        if len(names) == 1:
            with self._visit(names[0]) as module:
                yield module
            return
        with ExitStack() as stack:
            yield tuple(stack.enter_context(self._visit(name)) for name in names)

    def weights_gib(self) -> float:
        """GiB of weights on the GPU at most: those that stay and the largest set of visitors.

        Lazy modules count with the size they will have.
        """
        stay = 0
        visiting: dict[str, int] = {}
        for name, module in self._modules.items():
            if isinstance(module, LazyModule):
                waiting = not module.loaded
                size = module.size if waiting else module_bytes(module.get())
            else:
                waiting, size = False, module_bytes(module)
            if not self.visits(name):
                stay += size
            elif name not in STREAMED:
                visiting[name] = size
            elif not waiting:
                visiting[name] = self._visitor(name).size
        return (stay + max(sum(visiting.get(n, 0) for n in group) for group in TOGETHER)) / 2**30

    def _visit(self, name: str) -> AbstractContextManager[nn.Module]:
        if self.visits(name):
            return self._visitor(name).visit()
        return _present(self._module(name))

    def _module(self, name: str) -> nn.Module:
        module = self._modules[name]
        return module.get() if isinstance(module, LazyModule) else module

    def _visitor(self, name: str) -> Visitor:
        with self._lock:
            if name not in self._visitors:
                transfer = cast(Transfer, self._transfer)
                module = self._module(name)
                if name in STREAMED:
                    # UMT5EncoderModel: `shared` is the table, encoder.block the blocks.
                    blocks = list(cast(Any, module).encoder.block)
                    table = cast(Any, module).encoder.embed_tokens
                    self._visitors[name] = StreamedVisitor(
                        module, blocks, table, self.device, transfer
                    )
                else:
                    if isinstance(module, VideoAutoencoder):
                        arrange_weights(module, self.device)
                    self._visitors[name] = WholeVisitor(module, transfer)
            return self._visitors[name]


@contextmanager
def _present(module: nn.Module) -> Iterator[nn.Module]:
    yield module


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, shared ones once."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
