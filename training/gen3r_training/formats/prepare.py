"""Many scenes of one format: chosen, written by several threads, counted."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from gen3r.folders import whole_folder
from gen3r_training.formats.captions import Captions, caption_of
from gen3r_training.formats.scene import AbsentScene, BadScene, SceneEntry, reading
from gen3r_training.formats.writer import LINKS, Written, write_scene

SPLITS = ("train", "val")


@dataclass(frozen=True)
class PrepareOptions:
    """What is written, and where: destination/SPLIT/SCENE.

    split : the split that is written; the publisher's scenes of the other one are left out
    val_share : instead of `split`, both: the publisher's validation scenes and this share of the
        others (drawn by a hash of their names, so that it never changes) are for validation
    max_scenes : at most so many scenes
    size, link : as `write_scene` takes them
    overwrite : write scenes that exist again

    Raises
    ------
    ValueError : a value out of range.
    """

    destination: Path
    split: str = "train"
    val_share: float | None = None
    max_scenes: int | None = None
    workers: int = 4
    size: int | None = None
    link: str | None = None
    overwrite: bool = False
    captions: Captions = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split {self.split} is neither train nor val")
        if self.val_share is not None and not 0 <= self.val_share <= 1:
            raise ValueError(f"val_share {self.val_share} is outside 0 to 1; use 0.05, say")
        if self.link is not None and self.link not in LINKS:
            raise ValueError(f"link {self.link} is none of {', '.join(LINKS)}")
        for name in ("max_scenes", "workers", "size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} is below 1")

    def split_of(self, entry: SceneEntry) -> str | None:
        """The split a scene goes to; None leaves it out."""
        if self.val_share is None:
            return self.split if entry.split in (None, self.split) else None
        drawn = _share(entry.name) < self.val_share
        return "val" if entry.split == "val" or drawn else "train"


def _share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") / 2**56


@dataclass
class PrepareReport:
    """What became of the scenes.

    written, existing : names. skipped, absent : name -> reason (absent: listed, no file there)
    other_split : left out, as the publisher has them in the other split
    """

    found: int = 0
    written: dict[str, Written] = field(default_factory=dict)
    existing: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    other_split: int = 0
    without_caption: int = 0

    @property
    def done(self) -> int:
        """Scenes that are in the destination now."""
        return len(self.written) + len(self.existing)


class _Stopped(Exception):
    """The preparation was interrupted; the unfinished scene goes."""


def prepare_scenes(
    entries: Iterable[SceneEntry],
    options: PrepareOptions,
    *,
    on_skip: Callable[[str, str], None] = lambda name, reason: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PrepareReport:
    """Write the scenes, several at once; each appears whole or not at all.

    Parameters
    ----------
    on_skip : called with the name and the reason of each corrupt scene
    progress : called with (done, total)

    Raises
    ------
    OSError : the destination cannot be written; what was finished stays.
    """
    found = list(entries)
    report = PrepareReport(found=len(found))
    jobs: list[tuple[SceneEntry, Path]] = []
    taken = set[str]()
    for entry in found:
        split = options.split_of(entry)
        if split is None:
            report.other_split += 1
        elif entry.name in taken:
            report.skipped[entry.name] = "a second scene of this name"
            on_skip(entry.name, report.skipped[entry.name])
        else:
            taken.add(entry.name)
            jobs.append((entry, options.destination / split / entry.name))
    with _folders({target.parent for _, target in jobs}):
        _Run(jobs, options, report, on_skip, progress).run()
    return report


@contextlib.contextmanager
def _folders(folders: set[Path]) -> Iterator[None]:
    """These folders exist inside the block, and after it where something is in them."""
    made = [p for f in folders for p in (f, *f.parents) if not p.exists()]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in sorted(set(made), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()


@dataclass
class _Run:
    jobs: list[tuple[SceneEntry, Path]]
    options: PrepareOptions
    report: PrepareReport
    on_skip: Callable[[str, str], None]
    progress: Callable[[int, int], None]
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        total = min(len(self.jobs), self.options.max_scenes or len(self.jobs))
        waiting = iter(self.jobs)
        pending: dict[Future[Written | None], SceneEntry] = {}
        handled = 0
        with ThreadPoolExecutor(self.options.workers, "gen3r-prepare") as pool:
            try:
                while True:
                    # No more are begun than may still be needed, so that max_scenes is exact.
                    while len(pending) < min(self.options.workers, total - self._counted(handled)):
                        job = next(waiting, None)
                        if job is None:
                            break
                        pending[pool.submit(self._one, *job)] = job[0]
                    if not pending:
                        break
                    ready, _ = wait(pending, return_when=FIRST_COMPLETED)
                    for future in ready:
                        self._record(pending.pop(future), future)
                        handled += 1
                    self.progress(self._counted(handled), total)
            except BaseException:
                self.stop.set()
                raise
        self.progress(total, total)

    def _counted(self, handled: int) -> int:
        """Scenes towards the total: with max_scenes corrupt ones do not count."""
        return self.report.done if self.options.max_scenes else handled

    def _record(self, entry: SceneEntry, future: Future[Written | None]) -> None:
        try:
            written = future.result()
        except AbsentScene as error:
            self.report.absent[entry.name] = str(error)
        except BadScene as error:
            self.report.skipped[entry.name] = str(error)
            self.on_skip(entry.name, str(error))
        else:
            if written is None:
                self.report.existing.append(entry.name)
            else:
                self.report.written[entry.name] = written
                keys = entry.keys or (entry.name,)
                self.report.without_caption += not caption_of(self.options.captions, keys)

    def _one(self, entry: SceneEntry, target: Path) -> Written | None:
        """Write one scene; None when it exists."""
        self._check()
        for split in SPLITS:
            other = self.options.destination / split / entry.name
            if other != target and other.exists():
                raise BadScene(f"it is in {other} already; remove that one to move it")
        if target.exists() and not self.options.overwrite:
            return None
        with reading("scene"):
            scene = entry.load()
        with _new_scene(target) as folder:
            return write_scene(
                folder,
                scene,
                captions=caption_of(self.options.captions, entry.keys or (entry.name,)),
                size=self.options.size,
                link=self.options.link,
                check=self._check,
            )

    def _check(self) -> None:
        if self.stop.is_set():
            raise _Stopped


@contextlib.contextmanager
def _new_scene(target: Path) -> Iterator[Path]:
    """A folder to fill that becomes `target` at the end; an older one is replaced then."""
    if not target.exists():
        with whole_folder(target.parent, target.name) as pending:
            yield pending.path
        return
    with whole_folder(target.parent, f".{target.name}.new", numbered=True) as pending:
        yield pending.path
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    os.rename(target, old)
    os.rename(pending.path, target)
    shutil.rmtree(old, ignore_errors=True)
