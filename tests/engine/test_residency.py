"""Weights that visit: the same results, the right order, nothing left behind."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gen3r.encoders import tokenize_and_encode
from gen3r.nano import build_nano
from gen3r.pipeline import MODULES, Gen3RPipeline
from gen3r_engine.residency import VISITORS, LazyModule, Residency, module_bytes
from gen3r_engine.transfers import ALIGNMENT, HostTransfer, Pack, pinned_bytes
from gen3r_engine.visitors import SLOTS, StreamedVisitor, WholeVisitor

CPU = torch.device("cpu")


class Watched(HostTransfer):
    """Notes what happens. Buffers start as NaN bytes, and a copy is done only when waited for."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.pending: dict[int, tuple[Tensor, Tensor]] = {}
        self.made = 0
        self.alive = 0

    def empty(self, size: int) -> Tensor:
        self.made += 1
        return torch.full((size,), 255, dtype=torch.uint8)

    def start(self, host: Tensor, device: Tensor, after: object | None) -> object:
        number = len(self.log)
        self.log.append(f"start {host.numel()} after {after}")
        self.pending[number] = (host, device)
        # What the slot held is gone from here on, as on a device.
        device.fill_(255)
        return number

    def wait(self, copied: Any, device: Tensor) -> None:
        self.log.append(f"wait {copied}")
        if copied in self.pending:
            host, target = self.pending.pop(copied)
            target.copy_(host)

    def mark(self) -> object:
        self.log.append("mark")
        return f"mark {len(self.log) - 1}"


class Toy(nn.Module):
    """An encoder in UMT5's form: a table, blocks, a final norm; one weight has two names."""

    def __init__(self, blocks: int = 5) -> None:
        super().__init__()
        self.shared = nn.Embedding(20, 8)
        self.encoder = nn.Module()
        self.encoder.embed_tokens = nn.Embedding(20, 8)
        self.encoder.embed_tokens.weight = self.shared.weight
        self.encoder.block = nn.ModuleList(nn.Linear(8, 8) for _ in range(blocks))
        self.encoder.norm = nn.LayerNorm(8)
        self.encoder.register_buffer("offset", torch.randn(8), persistent=False)
        self.requires_grad_(False)

    def forward(self, ids: Tensor, broken_at: int = -1) -> Tensor:
        x = self.encoder.embed_tokens(ids)
        for index, block in enumerate(self.encoder.block):
            if index == broken_at:
                raise KeyError("broken off")
            x = torch.tanh(block(x))
        return self.encoder.norm(x) + self.encoder.offset


IDS = torch.tensor([[1, 5, 7]])


def streamed(toy: Toy, transfer: HostTransfer) -> StreamedVisitor:
    return StreamedVisitor(toy, list(toy.encoder.block), toy.encoder.embed_tokens, CPU, transfer)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(module: nn.Module, before: dict[str, Tensor]) -> bool:
    after = module.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


def test_pack_keeps_values_sharing_and_alignment() -> None:
    toy = Toy()
    before = state(toy)
    pack = Pack(toy, HostTransfer())
    assert same(toy, before) and toy.shared.weight is toy.encoder.embed_tokens.weight
    assert pack.size % ALIGNMENT == 0
    device = pack.host.clone()
    pack.point(device)
    start = device.data_ptr()
    for tensor in (*toy.parameters(), *toy.buffers()):
        offset = tensor.data_ptr() - start
        assert 0 <= offset < pack.size and offset % ALIGNMENT == 0
    assert same(toy, before)


def test_pack_of_mixed_dtypes_scalars_and_nothing() -> None:
    module = nn.Module()
    module.a = nn.Parameter(torch.randn(3).bfloat16(), requires_grad=False)
    module.register_buffer("b", torch.tensor(7))
    module.register_buffer("c", torch.empty(0, 4))
    before = state(module)
    Pack(module, HostTransfer())
    assert same(module, before)
    assert Pack(nn.Identity(), HostTransfer()).size == 0


class Runtime:
    """CUDA's calls that pin memory, noted."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.pinned[address] = size
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        # The pages must still be there.
        ctypes.string_at(address, self.pinned.pop(address))
        return 0


def test_memory_is_unpinned_when_its_last_view_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    buffer = pinned_bytes(5000)
    assert list(runtime.pinned.values()) == [5000] and buffer.data_ptr() % 4096 == 0
    view = buffer[100:200].view(torch.float32)
    parameter = nn.Parameter(torch.zeros(1), requires_grad=False)
    parameter.data = view
    del buffer, view
    gc.collect()
    assert len(runtime.pinned) == 1 and parameter.sum() == 0
    del parameter
    gc.collect()
    assert not runtime.pinned
    assert pinned_bytes(0).numel() == 0


def test_memory_that_can_not_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(status=2))
    with pytest.raises(RuntimeError, match=r"could not be pinned.*residency 'resident'"):
        pinned_bytes(2**20)


def test_whole_visitor_comes_and_goes() -> None:
    toy, transfer = Toy(), Watched()
    expected, before = toy(IDS), state(toy)
    visitor = WholeVisitor(toy, transfer)
    for _ in range(2):
        with visitor.visit() as module:
            assert torch.equal(module(IDS), expected) and same(toy, before)
        assert same(toy, before)
    assert transfer.made == 2


def test_whole_visitor_leaves_after_an_error() -> None:
    toy, transfer = Toy(), Watched()
    visitor = WholeVisitor(toy, transfer)
    home = toy.shared.weight.data_ptr()
    with pytest.raises(KeyError), visitor.visit() as module:
        assert toy.shared.weight.data_ptr() != home
        module(IDS, broken_at=2)
    assert toy.shared.weight.data_ptr() == home


def test_two_users_share_one_copy() -> None:
    toy, transfer = Toy(), Watched()
    expected = toy(IDS)
    visitor = WholeVisitor(toy, transfer)
    first_in, second_out = threading.Event(), threading.Event()
    results: list[bool] = []

    def first() -> None:
        with visitor.visit() as module:
            first_in.set()
            second_out.wait(30)
            results.append(torch.equal(module(IDS), expected))

    thread = threading.Thread(target=first)
    thread.start()
    first_in.wait(30)
    with visitor.visit() as module:
        results.append(torch.equal(module(IDS), expected))
    second_out.set()
    thread.join()
    assert results == [True, True] and transfer.made == 1


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_streamed_blocks_give_the_same_result(blocks: int) -> None:
    toy, transfer = Toy(blocks), Watched()
    expected, before = toy(IDS), state(toy)
    visitor = streamed(toy, transfer)
    with visitor.visit() as module:
        assert torch.equal(module(IDS), expected)
        assert torch.equal(module(ids=IDS), expected)  # a second forward in one visit
    assert same(toy, before)
    assert transfer.made == SLOTS + 1  # two blocks and the rest, however many there are
    assert visitor.size < module_bytes(toy) or blocks < 5


def test_next_block_is_under_way_while_one_computes_and_no_slot_is_overwritten_early() -> None:
    toy, transfer = Toy(4), Watched()
    with streamed(toy, transfer).visit() as module:
        transfer.log.clear()
        transfer.pending = {}
        module(IDS)
    kinds = " ".join(entry.split()[0] for entry in transfer.log)
    # The forward's start, then for each block: wait for it, start the next one, compute, mark.
    assert kinds == "mark wait start mark wait start mark wait start mark wait mark"
    starts = [entry.rsplit("after ", 1)[1] for entry in transfer.log if entry.startswith("start")]
    # Block 1 goes into a slot that is free at the start; 2 waits for block 0, 3 for block 1.
    assert starts == ["mark 0", "mark 3", "mark 6"]


def test_streaming_recovers_from_a_forward_that_broke_off() -> None:
    toy, transfer = Toy(5), Watched()
    expected, before = toy(IDS), state(toy)
    visitor = streamed(toy, transfer)
    with visitor.visit() as module:
        for broken_at in range(5):
            with pytest.raises(KeyError):
                module(IDS, broken_at=broken_at)
            assert torch.equal(module(IDS), expected)
    with pytest.raises(KeyError), visitor.visit() as module:
        module(IDS, broken_at=3)
    assert same(toy, before) and torch.equal(toy(IDS), expected)  # no hook is left


@pytest.fixture(scope="module")
def nano() -> Iterator[Gen3RPipeline]:
    yield build_nano()


def parts(pipeline: Gen3RPipeline) -> dict[str, Any]:
    return {name: getattr(pipeline, name) for name in MODULES}


def test_on_a_cpu_every_tier_does_nothing(nano: Gen3RPipeline) -> None:
    for tier in VISITORS:
        residency = Residency(parts(nano), tier, "cpu")
        homes = {n: next(m.parameters()).data_ptr() for n, m in parts(nano).items()}
        with residency.use("text_encoder") as text, residency.use("geo_adapter", "vggt") as pair:
            assert text is nano.text_encoder and pair == (nano.geo_adapter, nano.vggt)
        assert homes == {n: next(m.parameters()).data_ptr() for n, m in parts(nano).items()}


def test_the_real_text_encoder_streams(nano: Gen3RPipeline) -> None:
    texts = ["a red room", "a courtyard of white stone with four arches"]
    expected = tokenize_and_encode(nano.tokenizer, nano.text_encoder, texts, 64)
    pipeline = build_nano()
    residency = Residency(parts(pipeline), "24gb", CPU, Watched())
    before = state(pipeline.text_encoder)
    for _ in range(2):
        with residency.use("text_encoder") as encoder:
            found = tokenize_and_encode(pipeline.tokenizer, encoder, texts, 64)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert same(pipeline.text_encoder, before)


def test_tiers_say_who_visits(nano: Gen3RPipeline) -> None:
    resident, middle, small = (
        Residency(parts(build_nano()), tier, CPU, Watched()) for tier in VISITORS
    )
    assert not any(resident.visits(name) for name in MODULES)
    assert middle.visits("text_encoder") and not middle.visits("vggt")
    assert small.visits("vggt") and not small.visits("transformer")
    sizes = [r.weights_gib() for r in (resident, middle, small)]
    assert sizes[0] > sizes[1] > sizes[2]
    with pytest.raises(ValueError, match="known: transformer"):
        middle.visits("vae")
    with pytest.raises(ValueError, match="known: resident, 24gb, 12gb"):
        Residency({}, "8gb", CPU)


def test_lazy_module_is_made_once_and_stands_in() -> None:
    made: list[Toy] = []

    def make() -> Toy:
        made.append(Toy())
        return made[-1]

    lazy = LazyModule(make, size=3 * 2**30)
    residency = Residency({"text_encoder": lazy, "other": nn.Identity()}, "resident", CPU)
    assert not lazy.loaded and residency.weights_gib() == 3
    with residency.use("text_encoder") as module:
        assert module is made[0]
    assert torch.equal(lazy(IDS), made[0](IDS)) and lazy.shared is made[0].shared
    assert len(made) == 1 and residency.weights_gib() < 0.1


def test_lazy_module_that_can_not_be_made_says_so_at_every_use() -> None:
    def fail() -> nn.Module:
        raise OSError("the disk is gone")

    lazy = LazyModule(fail)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            lazy.get()
    with pytest.raises(AttributeError):
        lazy.__deepcopy__  # noqa: B018


def test_channels_last_weights_stay_so() -> None:
    layer = torch.nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    weight = layer.weight.detach().clone(memory_format=torch.preserve_format)
    pack = Pack(layer, HostTransfer())
    pack.point(pack.host.clone())
    assert layer.weight.stride() == weight.stride() and torch.equal(layer.weight, weight)
