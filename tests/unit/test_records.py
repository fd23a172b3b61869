"""Records of enrolled pods: found again by what no two pods may share."""

import json
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from redirector.errors import DatapathError
from redirector.model import Mode, Pod
from redirector.records import Records


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path / "pods")


def pod(records: Records, name: str, cookie: int, cgroup: str) -> Pod:
    """A pod whose cgroup, a mere directory here, exists."""
    path = records.directory.parent / "cgroups" / cgroup
    path.mkdir(parents=True, exist_ok=True)
    return Pod(name, Path("/run/netns/a"), path, Mode.EBPF, netns_cookie=cookie)


def near(records: Records, asked: Pod) -> set[str]:
    return {found.name for found in records.near(asked)}


def test_only_pods_that_share_something_are_near(records: Records) -> None:
    for name, cookie, cgroup in (("a", 1, "x/a"), ("b", 2, "x/b"), ("ns/c", 3, "y")):
        records.put(pod(records, name, cookie, cgroup))
    assert near(records, pod(records, "new", 9, "x/new")) == set()
    assert near(records, pod(records, "ns/c", 9, "z")) == {"ns/c"}
    assert near(records, pod(records, "new", 2, "z")) == {"b"}
    assert near(records, pod(records, "new", 9, "x/a/app")) == {"a"}
    assert near(records, pod(records, "new", 9, "x")) == {"a", "b"}
    records.delete("b")
    assert near(records, pod(records, "new", 2, "x")) == {"a"}


def test_pods_are_found_by_the_addresses_that_they_have_now(records: Records) -> None:
    first, second = ip_address("10.0.0.1"), ip_address("fd00::1")
    known = replace(pod(records, "a", 1, "x"), addresses=(first, second))
    asked = replace(pod(records, "new", 2, "y"), addresses=(second,))
    records.put(known)
    assert records.at_addresses(asked) == [known]
    assert records.at_addresses(known) == []
    records.put(replace(known, addresses=(first,)))
    assert records.at_addresses(asked) == []
    records.delete("a")
    assert list((records.directory / "index").iterdir()) == []


def test_a_pod_that_takes_anothers_place_keeps_its_own_entries(records: Records) -> None:
    """The record of the former one is deleted later, as its agent finds out later."""
    old, new = pod(records, "old", 1, "x"), pod(records, "new", 2, "x")
    records.put(old)
    records.put(new)
    records.delete("old")
    assert near(records, replace(new, name="other", netns_cookie=9)) == {"new"}


def test_records_without_an_index_are_indexed(records: Records) -> None:
    records.put(pod(records, "a", 1, "x"))
    for entry in (records.directory / "index").iterdir():
        entry.unlink()
    (records.directory / "index").rmdir()
    assert near(records, pod(records, "new", 1, "y")) == {"a"}


def test_how_many_others_there_are_does_not_matter(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reads() -> int:
        count = 0
        read = Records.read

        def counted(path: Path) -> Pod:
            nonlocal count
            count += 1
            return read(path)

        with monkeypatch.context() as patched:
            patched.setattr(Records, "read", staticmethod(counted))
            assert near(records, pod(records, "new", 999, "all/new")) == set()
            records.put(pod(records, "another", 998, "all/another"))
        return count

    records.put(pod(records, "first", 1, "all/first"))
    records.put(pod(records, "another", 998, "all/another"))
    few = reads()
    for n in range(2, 60):
        records.put(pod(records, f"p{n}", n, f"all/p{n}"))
    assert reads() == few


def test_clearing_leaves_nothing(records: Records) -> None:
    with records.locked():
        records.put(pod(records, "a", 1, "x"))
        records.clear()
    assert not records.directory.exists()


def edited(records: Records, name: str, **members: object) -> None:
    path = records.directory / f"{name}.json"
    data = json.loads(path.read_text())
    data["steering"] |= members
    path.write_text(json.dumps(data))


def test_a_newer_versions_record_is_read_where_what_is_new_does_not_matter(
    records: Records,
) -> None:
    known = pod(records, "a", 1, "x")
    records.put(known)
    edited(records, "a", new_option=[1])
    with pytest.raises(DatapathError, match="is not a record of this version"):
        records.get("a")
    path = records.directory / "a.json"
    data = json.loads(path.read_text())
    data["steering_defaults"].append("new_option")
    path.write_text(json.dumps(data))
    assert records.get("a") == known
    assert records.had("a") == (known,)


def test_an_older_versions_record_is_read_with_defaults(records: Records) -> None:
    known = pod(records, "a", 1, "x")
    records.put(known)
    path = records.directory / "a.json"
    data = json.loads(path.read_text())
    for name in ("changing", "defaults", "steering_defaults", "uid"):
        del data[name]
    del data["steering"]["exclude_inbound_ports"]
    path.write_text(json.dumps(data))
    assert records.get("a") == known


def test_what_another_versions_record_tells_is_enough_to_take_the_pod_off(records: Records) -> None:
    known = pod(records, "ns/a", 7, "x")
    records.put(known)
    (path,) = records.paths()
    data = json.loads(path.read_text())
    data["steering"] = "as nobody writes it"
    path.write_text(json.dumps(data))
    with pytest.raises(DatapathError):
        records.read(path)
    guess = records.guess("ns/a")
    assert guess is not None
    assert (guess.name, guess.netns, guess.netns_cookie) == ("ns/a", known.netns, 7)
    assert list(records.sorted_out()[1]) == records.names() == ["ns/a"]
    path.write_text("{}")
    assert records.cookies("ns/a") == [7]
    assert records.guess("ns/a") is None
    records.delete("ns/a")
    assert (records.paths(), records.cookies("ns/a")) == ([], [])


def test_what_could_not_be_done_goes_with_the_record(records: Records) -> None:
    records.put(pod(records, "ns/a", 1, "x"))
    records.keep_problems({"ns/a": "is too large", "b": "is too small"})
    records.delete("ns/a")
    assert records.problems() == {"b": "is too small"}
