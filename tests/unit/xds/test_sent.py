"""What a client was sent is kept once for all clients, and tells each one's own truth."""

from hypothesis import given
from hypothesis import strategies as st
from xds_server.sent import Sent

NAMES = [f"n{number}" for number in range(100)]
VERSIONS = dict.fromkeys(NAMES, "1")
NAME = st.sampled_from(NAMES[:8])
STEP = st.one_of(
    st.tuples(st.just("set"), NAME, st.sampled_from(["", "1", "2"])),
    st.tuples(st.just("drop"), NAME, st.none()),
    st.tuples(st.just("share"), st.none(), st.sampled_from(["", "1", "2"])),
)


@given(st.lists(STEP, max_size=30))
def test_it_is_as_a_plain_mapping(steps: list[tuple[str, str | None, str | None]]) -> None:
    sent, plain = Sent(), {}
    sent.update(VERSIONS)
    plain.update(VERSIONS)
    for what, name, version in steps:
        if what == "share":
            sent.share(VERSIONS | dict.fromkeys(NAMES[:1], version))
        elif what == "drop":
            assert sent.pop(name, None) == plain.pop(name, None)
        else:
            sent[name] = plain[name] = version
        assert dict(sent) == plain
        assert len(sent) == len(plain)
        assert [sent.get(n) for n in NAMES] == [plain.get(n) for n in NAMES]
        assert [n in sent for n in NAMES] == [n in plain for n in NAMES]
        assert sent.keys() & {"n0", "n1"} == plain.keys() & {"n0", "n1"}


def test_what_clients_have_in_common_is_kept_once() -> None:
    clients = [Sent() for _ in range(3)]
    for sent in clients:
        sent.update(dict(VERSIONS))
        sent.share(VERSIONS)
        assert sent._shared is VERSIONS
        assert sent._own == {}
    clients[0]["n3"] = "2"
    assert clients[0]._own == {"n3": "2"}
    assert clients[1]["n3"] == "1"
