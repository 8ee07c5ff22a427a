"""Loading and visiting on a GPU: bit for bit the resident result, under streams that race."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gen3r.checkpoint import TensorFile
from gen3r.encoders import tokenize_and_encode
from gen3r.nano import build_nano
from gen3r_engine.config import EngineConfig
from gen3r_engine.loading import load_pipeline
from gen3r_engine.memory import OutOfMemory, guard, limit_process
from gen3r_engine.reading import ParallelReader
from gen3r_engine.transfers import CudaTransfer, Pack
from gen3r_engine.visitors import StreamedVisitor, WholeVisitor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

WIDTH, BLOCKS = 2048, 7
SLOW = 20_000_000  # cycles of an idle kernel: about 10 ms, longer than a block's copy


class Chain(nn.Module):
    """Blocks of 8 MiB in bf16 whose result depends on every weight."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16) for _ in range(BLOCKS)
        )
        for parameter in self.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise / WIDTH**0.5)
        self.requires_grad_(False)

    def forward(self, x: Tensor, slow: bool = False) -> Tensor:
        for block in self.blocks:
            if slow:
                torch.cuda._sleep(SLOW)
            x = torch.tanh(block(x)) + x
        return x


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(64, WIDTH, generator=generator).to(device(), torch.bfloat16)


def expected() -> Tensor:
    return Chain().to(device())(inputs())


@pytest.mark.parametrize("slow", [False, True])
def test_streamed_blocks_are_exact_under_racing_copies(slow: bool) -> None:
    wanted, x, chain = expected(), inputs(), Chain()
    visitor = StreamedVisitor(chain, list(chain.blocks), None, device(), CudaTransfer(device()))
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                with visitor.visit() as module:
                    results = [module(x, slow=slow) for _ in range(2)]
                # Freed slots are handed out again at once: a late copy would be seen here.
                junk = torch.full((4 * 2**20,), float("nan"), device=device())
                assert all(torch.equal(result, wanted) for result in results)
                del junk


def test_a_streamed_visit_takes_two_blocks_of_memory() -> None:
    x, chain = inputs(), Chain()
    visitor = StreamedVisitor(chain, list(chain.blocks), None, device(), CudaTransfer(device()))
    with visitor.visit() as module:
        module(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with visitor.visit() as module:
        module(x)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < visitor.size + 4 * 2**20  # activations are far below
    assert visitor.size < 0.4 * BLOCKS * 2 * WIDTH * WIDTH
    assert torch.cuda.memory_allocated() == before


def test_whole_visits_of_two_threads_on_two_streams() -> None:
    wanted, x, chain = expected(), inputs(), Chain()
    visitor = WholeVisitor(chain, CudaTransfer(device()))
    torch.cuda.synchronize()
    results: list[bool] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                with visitor.visit() as module:
                    result = module(x)
                results.append(torch.equal(result, wanted))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 40
    assert all(not p.is_cuda for p in chain.parameters())


def test_packed_weights_are_pinned() -> None:
    chain = Chain()
    for _ in range(3):  # packed again, the earlier memory is unpinned and unmapped
        pack = Pack(chain, CudaTransfer(device()))
        assert pack.host.is_pinned() and chain.blocks[0].weight.is_pinned()
        assert pack.host.numel() == pack.size


@pytest.mark.parametrize("chunk", [1000, 2**20])
def test_parallel_reading_to_the_gpu(tmp_path: Path, chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        f"t{i}": torch.randn(n, generator=generator).bfloat16()
        for i, n in enumerate((1, 77, 4096, 300_001, 0, 12_345))
    }
    save_file(state, tmp_path / "x.safetensors")
    wanted = load_file(tmp_path / "x.safetensors", device="cuda")
    file = TensorFile(
        tmp_path / "x.safetensors",
        {n: n for n in state},
        {n: tuple(t.shape) for n, t in state.items()},
    )
    with ParallelReader(torch.bfloat16, threads=4, chunk=chunk) as read:
        for _ in range(3):
            found = dict(read(file, file.names, device()))
            assert all(torch.equal(found[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("tier", ["resident", "24gb", "12gb"])
@pytest.mark.parametrize("folder", [False, True])
def test_every_tier_encodes_and_decodes_the_same(tmp_path: Path, tier: str, folder: bool) -> None:
    checkpoint = None
    if folder:
        checkpoint = tmp_path / "nano"
        build_nano().save_pretrained(checkpoint)
    config = EngineConfig(residency=tier, cache_dir=tmp_path / "cache", compiled=False)
    model = load_pipeline(checkpoint, config)
    plain = build_nano(torch.bfloat16, device())
    texts = ["a red room", "a courtyard of white stone"]
    wanted = tokenize_and_encode(plain.tokenizer, plain.text_encoder, texts, 64)
    latents = torch.randn(1, 16, 2, 14, 14, device=device(), dtype=torch.bfloat16)
    for _ in range(2):
        with model.residency.use("text_encoder") as encoder:
            found = tokenize_and_encode(model.pipeline.tokenizer, encoder, texts, 64)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        with model.residency.use("wan_vae") as vae:
            assert torch.equal(vae.decode(latents), plain.wan_vae.decode(latents))
    at_home = next(model.pipeline.wan_vae.parameters()).device.type
    assert at_home == ("cpu" if tier == "12gb" else "cuda")
    assert next(model.pipeline.transformer.parameters()).is_cuda


def test_a_budget_ends_in_a_clear_error() -> None:
    limit_process(torch.cuda.memory_reserved() / 2**30 + 0.5, device())
    try:
        with pytest.raises(OutOfMemory, match="stage 'denoise'"), guard("denoise", 2.0, "resident"):
            torch.empty(2 * 2**30, dtype=torch.uint8, device=device())
    finally:
        limit_process(None, device())
