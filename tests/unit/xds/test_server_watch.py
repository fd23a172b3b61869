"""Changes of a directory are noticed, named and dated."""

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest
from watchfiles._rust_notify import WatchfilesRustInternalError
from xds_server.sources.source import Change
from xds_server.watch import changes, compare, listing, unsettled

PATIENCE_S = 20.0


async def after(directory: Path, action: Callable[[], object]) -> Change:
    """The first change noticed when `action` is done."""
    seen = listing(directory)
    async with aclosing(changes(directory, seen)) as found:
        waiting = asyncio.ensure_future(anext(found))
        # Usually the watch stands by then; when not, the comparison every second finds it.
        await asyncio.sleep(0.1)
        action()
        return await asyncio.wait_for(waiting, PATIENCE_S)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "manifests"
    made.mkdir()
    (made / "a.yaml").write_text("a")
    (made / "b.yaml").write_text("b")
    return made


def _replace(directory: Path) -> None:
    """As many editors save: write beside it, move over it."""
    temporary = directory / ".a.yaml.swp"
    temporary.write_text("changed")
    temporary.rename(directory / "a.yaml")


def _refuse(*_: object, **__: object) -> None:
    raise WatchfilesRustInternalError("Too many open files (os error 24)")


def _unlink_and_write(directory: Path) -> None:
    """As other editors save."""
    (directory / "a.yaml").unlink()
    (directory / "a.yaml").write_text("changed")


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        (lambda d: (d / "a.yaml").write_text("changed"), "changed a.yaml"),
        (lambda d: (d / "c.json").write_text("c"), "added c.json"),
        (lambda d: (d / "b.yaml").unlink(), "removed b.yaml"),
        (lambda d: (d / "b.yaml").rename(d / "c.yml"), "added c.yml, removed b.yaml"),
        (_replace, "changed a.yaml"),
        (_unlink_and_write, "changed a.yaml"),
    ],
)
async def test_change_is_noticed_and_named(
    directory: Path, action: Callable[[Path], object], reason: str
) -> None:
    before = time.time()
    change = await after(directory, lambda: action(directory))
    assert change.reason == reason
    # The kernel's clock for files lags behind by up to one tick.
    assert before - 0.1 <= change.at <= time.time()


async def test_directory_that_vanishes_and_comes_back(directory: Path) -> None:
    aside = directory.with_name("aside")
    async with aclosing(changes(directory, listing(directory))) as found:
        directory.rename(aside)
        gone = await asyncio.wait_for(anext(found), PATIENCE_S)
        aside.rename(directory)
        back = await asyncio.wait_for(anext(found), PATIENCE_S)
        (directory / "c.yaml").write_text("c")
        more = await asyncio.wait_for(anext(found), PATIENCE_S)
    assert [gone.reason, back.reason] == ["directory vanished", "added a.yaml b.yaml"]
    assert more.reason == "added c.yaml"


@pytest.mark.parametrize("watched", [True, False])
async def test_what_comes_back_file_by_file_is_not_taken_for_less(
    directory: Path, monkeypatch: pytest.MonkeyPatch, watched: bool
) -> None:
    """A server that took each for all there is would drop policies for a while."""
    monkeypatch.setattr("xds_server.watch._SETTLE_S", 1.0)
    if not watched:
        monkeypatch.setattr("xds_server.watch.awatch", _refuse)
    async with aclosing(changes(directory, listing(directory))) as found:
        directory.rename(directory.with_name("aside"))
        assert (await asyncio.wait_for(anext(found), PATIENCE_S)).reason == "directory vanished"
        directory.mkdir()
        back = asyncio.ensure_future(anext(found))
        for name in ("c.yaml", "d.yaml", "b.yaml", "e.yaml", "a.yaml"):
            (directory / name).write_text(name)
            await asyncio.sleep(0.1)
        change = await asyncio.wait_for(back, PATIENCE_S)
    assert change.reason == "added a.yaml b.yaml c.yaml d.yaml e.yaml"


async def test_a_link_that_leads_nowhere_hides_no_change_of_the_others(directory: Path) -> None:
    (directory / "loop.yaml").symlink_to("loop.yaml")
    (directory / "nowhere.yaml").symlink_to("nowhere")
    change = await after(directory, lambda: (directory / "c.yaml").write_text("c"))
    assert change.reason == "added c.yaml"
    before = listing(directory)
    (directory / "nowhere").write_text("here")
    changed = compare(before, listing(directory), time.time())
    assert changed is not None
    assert changed.reason == "changed nowhere.yaml"


def test_what_is_no_manifest_is_not_looked_at(directory: Path) -> None:
    before = listing(directory)
    (directory / "notes.txt").write_text("x")
    (directory / ".a.yaml.swp").write_text("x")
    assert compare(before, listing(directory), time.time()) is None


def test_rewritten_with_the_same_time_and_size_is_still_a_change(directory: Path) -> None:
    before = listing(directory)
    path = directory / "a.yaml"
    found = path.stat()
    path.write_text("x")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    change = compare(before, listing(directory), time.time())
    assert change is not None
    assert change.reason == "changed a.yaml"


def test_shorter_or_missing_file_may_be_in_the_middle_of_a_save(directory: Path) -> None:
    (directory / "a.yaml").write_text("a: 1")
    before = listing(directory)
    (directory / "c.yaml").write_text("c")
    assert not unsettled(before, listing(directory))
    for half in ("", "a: "):
        (directory / "a.yaml").write_text(half)
        assert unsettled(before, listing(directory))
    (directory / "a.yaml").write_text("a: 2")
    (directory / "b.yaml").unlink()
    assert unsettled(before, listing(directory))


def test_new_mount_of_the_files_by_a_link_is_a_change(tmp_path: Path) -> None:
    """As Kubernetes swaps a ConfigMap: the names stay, what they lead to moves."""
    for version in ("one", "two"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "a.yaml").write_text("same")
    current, shown = tmp_path / "..data", tmp_path / "shown"
    current.symlink_to("one")
    shown.mkdir()
    (shown / "a.yaml").symlink_to(current / "a.yaml")
    time.sleep(0.05)
    looked = time.time()
    before = listing(shown)
    current.unlink()
    current.symlink_to("two")
    change = compare(before, listing(shown), time.time())
    assert change is not None
    assert change.reason == "changed a.yaml"
    # The files are older than the swap.
    assert change.at >= looked


async def test_without_a_watch_to_be_had_changes_are_still_noticed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xds_server.watch.awatch", _refuse)
    change = await after(directory, lambda: (directory / "c.yaml").write_text("c"))
    assert change.reason == "added c.yaml"
