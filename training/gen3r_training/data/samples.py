"""What one training sample is: `Ticket` (which one), `Sample` (its data), `CachedClip` (encoded).

A sample's randomness comes from generators seeded by ``derive_seed(sample.seed, PURPOSE)``, one
purpose for each thing drawn, so that no two draws are the same numbers. This package uses the
purposes ``clip``, ``caption``, ``cached`` and ``replacement N``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

from torch import Tensor

from gen3r.causal_video import Posterior

SEED_BITS = 63  # torch.Generator takes them all


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a fixed function of its parts, on every platform and version."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - SEED_BITS)


@dataclass(frozen=True)
class Ticket:
    """Which sample comes at place `index` of a run.

    dataset, scene : positions in `SceneDataset.scenes`
    seed : 63 bits, from which everything random about the sample is derived
    index : place in the run's stream of samples, from 0
    """

    dataset: int
    scene: int
    seed: int
    index: int


@dataclass(frozen=True)
class CachedClip:
    """What the frozen encoders make of one clip; everything has a batch axis of 1.

    In the dtype in which it was encoded, on the CPU when it comes from a `LatentCache`.

    appearance, geometry : posteriors of the target video, each of [1, 16, f, h, w] with
        f = (F - 1) / 4 + 1, h = H / 8, w = W / 8
    control_appearance : by task (``1view``, ``2view``), posterior of the video whose frames outside
        the task are black; ``allview`` is the target's and not in here
    control_geometry : the same of the geometry adapter; empty unless the control's geometry half is
        encoded as upstream trains it (``upstream_control_geometry``)
    image : [1, 257, clip_dim] CLIP features of the first frame
    text : [n, text_dim] features of the sample's prompt without padding; None where this prompt is
        not cached (encode it with `encode_prompt`)
    tokens : [1, 10 C, F, H / 14, W / 14] VGGT's token maps; None unless asked for (stage 1)
    """

    appearance: Posterior
    geometry: Posterior
    control_appearance: dict[str, Posterior]
    control_geometry: dict[str, Posterior]
    image: Tensor
    text: Tensor | None = None
    tokens: Tensor | None = None

    def control(self, task: str) -> tuple[Posterior, Posterior | None]:
        """Posteriors of a task's control video: appearance, and geometry or None where it is zero.

        For ``allview`` the geometry is the target's; whether it is used is the caller's choice.

        Raises
        ------
        ValueError : a task that was not encoded.
        """
        if task == "allview":
            return self.appearance, self.geometry
        if task not in self.control_appearance:
            known = ", ".join([*self.control_appearance, "allview"])
            raise ValueError(f"task '{task}' of this clip is not encoded; encoded: {known}")
        return self.control_appearance[task], self.control_geometry.get(task)

    def map(self, function: Any) -> CachedClip:
        """The clip with ``function(tensor)`` in the place of every tensor."""
        return CachedClip(**{f.name: _map(getattr(self, f.name), function) for f in fields(self)})

    def to(self, *args: Any, **kwargs: Any) -> CachedClip:
        """Every tensor moved or converted as by ``torch.Tensor.to``."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))


@dataclass(frozen=True)
class Sample:
    """One training sample, before any model has seen it.

    frames : [F, 3, H, W] float32 in [0, 1]; [0, 3, H, W] (nothing was read) when `cached` is there
    c2w : [F, 4, 4] float32, relative to the clip's first frame
    intrinsics : [F, 3, 3] float32, pixels of the cropped frames
    prompt : a cleaned caption, maybe empty
    scene : name for messages, ROOT/SPLIT/SCENE
    seed, index : of the ticket
    cached : the encoded clip, where a latent cache holds it
    """

    frames: Tensor
    c2w: Tensor
    intrinsics: Tensor
    prompt: str
    scene: str
    seed: int
    index: int
    cached: CachedClip | None = None

    def pin_memory(self) -> Self:
        """The sample in page-locked memory (`torch.utils.data` calls this)."""
        changed = {name: getattr(self, name).pin_memory() for name in TENSORS}
        if self.cached is not None:
            changed["cached"] = self.cached.map(lambda tensor: tensor.pin_memory())
        return replace(self, **changed)


TENSORS = ("frames", "c2w", "intrinsics")


@dataclass(frozen=True)
class Notice:
    """Something about a scene that the person who trains should hear of once.

    kind : ``replaced`` (another scene took its place), ``frames`` (unreadable frames were left
        out), ``cache`` (its latents were not usable, so it is encoded anew)
    """

    kind: Literal["replaced", "frames", "cache"]
    scene: str
    reason: str

    def __str__(self) -> str:
        return f"scene {self.scene}: {self.reason}"


def _map(value: Any, function: Any) -> Any:
    """`function` on the tensors of one of `CachedClip`'s fields."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Posterior):
        return Posterior(function(value.mean), function(value.logvar))
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    return value
