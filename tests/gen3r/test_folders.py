"""Folders appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from gen3r.folders import check_writable, whole_folder


def test_the_folder_appears_at_the_end(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "a" / "b", "c") as folder:
        (folder.path / "file").write_text("x")
        assert not (tmp_path / "a" / "b" / "c").exists()
    assert folder.path == tmp_path / "a" / "b" / "c"
    assert [p.name for p in folder.path.parent.iterdir()] == ["c"]
    assert (folder.path / "file").read_text() == "x"
    assert folder.path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_stays_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(error), whole_folder(tmp_path / "old" / "new", "c") as folder:
        (folder.path / "file").write_text("x")
        raise error
    assert [p.name for p in tmp_path.rglob("*")] == ["old"]


def test_taken_names(tmp_path: Path) -> None:
    for _ in range(3):
        with whole_folder(tmp_path, "c", numbered=True) as folder:
            (folder.path / "file").write_text("x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "c-2", "c-3"]
    with pytest.raises(FileExistsError, match="choose another"), whole_folder(tmp_path, "c"):
        pass


def test_a_name_taken_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), whole_folder(tmp_path, "c") as folder:
        (folder.path / "file").write_text("ours")
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "file").write_text("theirs")
    assert (tmp_path / "c" / "file").read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_check_writable_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "x" / "y")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        check_writable(tmp_path / "file" / "y")
