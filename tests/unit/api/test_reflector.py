"""The table of objects follows the API server, and survives whatever it does wrong."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import trustme
from apiserver import ApiServer, Fault, namespace, pod
from certificates import serving

from redirector.apiserver.client import Access, ApiError, Client, elsewhere, in_cluster
from redirector.apiserver.reflector import Backoff, Reflector, Resource
from redirector.errors import ClusterError
from redirector.kubernetes.objects import PodObject, read_namespace, read_pod

PODS = Resource("/api/v1/pods", read_pod, {"fieldSelector": "spec.nodeName=node-1"})
PATIENCE_S = 10.0


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as made:
        yield made


class Followed:
    """A reflector that runs, and what it said."""

    def __init__(self, server: ApiServer, resource: Resource[PodObject] = PODS) -> None:
        self.complaints: list[str] = []
        self.later = 0.0
        self.news = threading.Event()
        self.reflector: Reflector[PodObject] = Reflector(
            Client(Access(server.url)),
            resource,
            self.news.set,
            self.complaints.append,
            Backoff(0.02, 0.1),
            lambda: time.monotonic() + self.later,
        )

    def until(self, names: set[str]) -> None:
        """Wait until the table holds just these."""
        deadline = time.monotonic() + PATIENCE_S
        while set(self.reflector.objects() or {}) != names:
            assert time.monotonic() < deadline, (self.reflector.objects(), self.complaints)
            self.news.wait(0.05)
            self.news.clear()


@pytest.fixture
def followed(server: ApiServer) -> Iterator[Followed]:
    made = Followed(server)
    yield made
    made.reflector.stop()


def add(server: ApiServer, *names: str) -> None:
    for name in names:
        server.put("pods", pod(name, f"uid-{name}"))


def test_the_table_follows(server: ApiServer, followed: Followed) -> None:
    add(server, "a", "b")
    server.put("pods", pod("elsewhere", "uid-e", node="node-2"))
    assert followed.reflector.objects() is None
    followed.reflector.start()
    followed.until({"default/a", "default/b"})
    add(server, "c")
    followed.until({"default/a", "default/b", "default/c"})
    server.delete("pods", "default/a")
    followed.until({"default/b", "default/c"})
    server.put("pods", pod("b", "uid-new", annotations={"mode": "ebpf"}))
    server.delete("pods", "default/c")
    followed.until({"default/b"})
    found = (followed.reflector.objects() or {})["default/b"]
    assert (found.uid, found.annotations) == ("uid-new", {"mode": "ebpf"})
    assert server.seen("list", "pods") == 1
    assert followed.complaints == []


def test_a_long_list_comes_in_pages(server: ApiServer) -> None:
    followed = Followed(server, replace(PODS, page=3))
    add(server, *"abcdefgh")
    followed.reflector.start()
    followed.until({f"default/{name}" for name in "abcdefgh"})
    assert server.seen("list", "pods") == 3
    followed.reflector.stop()


def test_nothing_is_known_before_the_last_page(server: ApiServer) -> None:
    followed = Followed(server, replace(PODS, page=2))
    add(server, *"abcd")
    server.slow = 0.2
    tables: list[object] = []
    followed.reflector.start()
    while server.seen("list", "pods") < 2:
        tables.append(followed.reflector.objects())
        time.sleep(0.01)
    assert set(tables) == {None}
    followed.until({f"default/{name}" for name in "abcd"})
    followed.reflector.stop()


@pytest.mark.parametrize("fault", list(Fault))
def test_a_first_list_that_goes_wrong_tells_nothing(
    server: ApiServer, followed: Followed, fault: Fault
) -> None:
    add(server, "a")
    server.fail("list", "pods", fault, fault)
    followed.reflector.start()
    followed.until({"default/a"})
    assert server.seen("list", "pods") == 3
    # The same complaint once.
    assert len(followed.complaints) == 1
    assert followed.reflector.problem is None


@pytest.mark.parametrize("fault", list(Fault))
def test_a_watch_that_goes_wrong_removes_nothing(
    server: ApiServer, followed: Followed, fault: Fault
) -> None:
    add(server, "a", "b")
    server.fail("watch", "pods", fault, fault, fault, fault)
    lost: list[object] = []
    followed.reflector.start()
    followed.until({"default/a", "default/b"})
    add(server, "c")
    deadline = time.monotonic() + PATIENCE_S
    while "default/c" not in (table := followed.reflector.objects() or {}):
        lost += {"default/a", "default/b"} - set(table)
        assert time.monotonic() < deadline, followed.complaints
        time.sleep(0.005)
    assert lost == []
    server.delete("pods", "default/a")
    followed.until({"default/b", "default/c"})


def test_a_list_that_goes_wrong_later_removes_nothing(
    server: ApiServer, followed: Followed
) -> None:
    add(server, "a", "b")
    followed.reflector.start()
    followed.until({"default/a", "default/b"})
    server.fail("list", "pods", *Fault)
    server.delete("pods", "default/a")
    server.forget()
    server.wait_for(lambda: server.seen("list", "pods") == 4)
    assert set(followed.reflector.objects() or {}) >= {"default/b"}
    followed.until({"default/b"})
    assert server.seen("list", "pods") == 2 + len(Fault)


def test_forgotten_versions_are_listed_anew(server: ApiServer, followed: Followed) -> None:
    add(server, "a")
    followed.reflector.start()
    followed.until({"default/a"})
    server.wait_for(lambda: server.seen("watch", "pods") == 1)
    server.delete("pods", "default/a")
    server.history.clear()
    server.forget()
    add(server, "b")
    followed.until({"default/b"})
    assert followed.complaints == []


def test_a_server_that_restarts(server: ApiServer, followed: Followed) -> None:
    add(server, "a")
    followed.reflector.start()
    followed.until({"default/a"})
    server.wait_for(lambda: server.seen("watch", "pods") == 1)
    server.down()
    time.sleep(0.2)
    assert set(followed.reflector.objects() or {}) == {"default/a"}
    assert followed.reflector.problem
    server.up()
    add(server, "b")
    followed.until({"default/a", "default/b"})


def test_a_watch_goes_on_where_it_broke(server: ApiServer, followed: Followed) -> None:
    add(server, "a")
    followed.reflector.start()
    followed.until({"default/a"})
    add(server, "b")
    followed.until({"default/a", "default/b"})
    server.down()
    server.up()
    add(server, "c")
    followed.until({f"default/{name}" for name in "abc"})
    assert server.seen("list", "pods") == 1
    versions = [r.query["resourceVersion"] for r in server.requests if r.verb == "watch"]
    assert int(versions[-1]) >= 102


def test_an_object_that_is_none_does_not_stop_the_rest(
    server: ApiServer, followed: Followed
) -> None:
    add(server, "a")
    followed.reflector.start()
    followed.until({"default/a"})
    broken = pod("b", "uid-b")
    broken["status"] = "fine"
    server.put("pods", broken)
    server.wait_for(lambda: server.seen("list", "pods") >= 2)
    assert set(followed.reflector.objects() or {}) == {"default/a"}
    server.put("pods", pod("b", "uid-b"))
    followed.until({"default/a", "default/b"})


def test_a_kind_that_the_server_does_not_have_yet(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redirector.apiserver.reflector.MISSING_SECONDS", 0.05)
    server.undefined.add("pods")
    strict, followed = Followed(server), Followed(server, replace(PODS, optional=True))
    followed.reflector.start()
    server.wait_for(lambda: server.seen("list", "pods") > 1)
    assert followed.reflector.objects() == {}
    assert followed.reflector.problem is None
    assert strict.reflector.step() > 0
    assert strict.reflector.objects() is None
    server.wait_for(lambda: server.seen("list", "pods") > 5)
    assert len(followed.complaints) == 1
    server.undefined.clear()
    add(server, "a")
    followed.until({"default/a"})
    followed.reflector.stop()


@pytest.mark.parametrize("undefined", [False, True])
def test_a_server_that_lost_everything_is_not_believed_at_once(
    server: ApiServer, undefined: bool
) -> None:
    followed = Followed(server, replace(PODS, hold=3600, optional=True))
    add(server, "a", "b")
    followed.reflector.start()
    followed.until({"default/a", "default/b"})
    server.objects["pods"].clear()
    if undefined:
        server.undefined.add("pods")
    server.forget()
    lists = server.seen("list", "pods")
    server.wait_for(lambda: server.seen("list", "pods") >= lists + 3)
    assert set(followed.reflector.objects() or {}) == {"default/a", "default/b"}
    assert "none of the 2 objects" in followed.complaints[-1]
    followed.later = 3600
    followed.until(set())
    followed.reflector.stop()


def test_who_is_told_that_the_last_object_went_believes_it(server: ApiServer) -> None:
    followed = Followed(server, replace(PODS, hold=3600))
    add(server, "a")
    followed.reflector.start()
    followed.until({"default/a"})
    server.delete("pods", "default/a")
    followed.until(set())
    followed.reflector.stop()


def test_an_unchanged_object_of_a_new_list_is_the_old_one(
    server: ApiServer, followed: Followed
) -> None:
    add(server, "a")
    followed.reflector.start()
    followed.until({"default/a"})
    before = (followed.reflector.objects() or {})["default/a"]
    server.forget()
    add(server, "b")
    followed.until({"default/a", "default/b"})
    assert server.seen("list", "pods") == 2
    assert (followed.reflector.objects() or {})["default/a"] is before


def test_namespaces_come_without_their_insides(server: ApiServer) -> None:
    server.put("namespaces", namespace("default", mode="ebpf"))
    resource = Resource("/api/v1/namespaces", read_namespace, {}, metadata_only=True)
    made = Reflector(Client(Access(server.url)), resource, lambda: None, print)
    made.start()
    deadline = time.monotonic() + PATIENCE_S
    while not made.objects():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    made.stop()
    assert (made.objects() or {})["default"].annotations == {"mode": "ebpf"}
    assert "PartialObjectMetadataList;" in server.requests[0].accept


def test_the_token_is_read_anew_and_kept_to_safe_places(server: ApiServer, tmp_path: Path) -> None:
    token = tmp_path / "token"
    client = Client(Access(server.url, token))
    with pytest.raises(ClusterError, match=f"{token}: No such file"):
        client.get("/api/v1/pods", {})
    for text in ("one\n", "two\n"):
        token.write_text(text)
        client.get("/api/v1/pods", {})
    assert [r.authorization for r in server.requests] == ["Bearer one", "Bearer two"]
    (tmp_path / "ca.crt").touch()
    assert elsewhere("http://10.0.0.1/", tmp_path) == Access("http://10.0.0.1")
    assert elsewhere("https://10.0.0.1", tmp_path).token_file == token
    environment = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}
    assert in_cluster(environment, "", tmp_path).url == "https://[fd00::1]:6443"
    with pytest.raises(ClusterError, match=r"is not a pod of a cluster.*; do this"):
        in_cluster({}, "do this", tmp_path)


@pytest.mark.parametrize(
    ("said", "seconds"),
    [("7", 7.0), ("1e300", 300.0), ("inf", 300.0), ("nan", 0.0), ("-1", 0.0), ("Monday", 0.0)],
)
def test_a_server_is_left_alone_for_a_time_that_can_be_waited(said: str, seconds: float) -> None:
    class Busy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.send_header("Retry-After", said)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with HTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(ApiError) as refused:
            Client(Access(f"http://127.0.0.1:{server.server_port}")).get("/", {})
    assert refused.value.retry_after == seconds


def test_only_the_clusters_own_authority_is_believed(tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    (tmp_path / "token").write_text("secret")
    with ApiServer(tls=serving(authority)) as server:
        access = Access(server.url, tmp_path / "token", tmp_path / "ca.crt")
        client = Client(access)
        stranger.cert_pem.write_to_path(str(tmp_path / "ca.crt"))
        with pytest.raises(ApiError, match="CERTIFICATE_VERIFY_FAILED"):
            client.get("/api/v1/pods", {})
        assert server.requests == []
        # The authority changes while the agent runs.
        authority.cert_pem.write_to_path(str(tmp_path / "ca.crt"))
        assert client.get("/api/v1/pods", {})["kind"] == "PodList"
        assert server.requests[0].authorization == "Bearer secret"


def test_what_the_server_says_is_told(server: ApiServer) -> None:
    client = Client(Access(server.url))
    server.fail("list", "pods", Fault.FORBIDDEN)
    with pytest.raises(ApiError, match="GET /api/v1/pods: 403 forbidden: User cannot") as caught:
        client.get("/api/v1/pods", {})
    assert caught.value.status == 403
    server.down()
    with pytest.raises(ApiError, match=f"{server.url}/api/v1/pods: .*refused"):
        client.get("/api/v1/pods", {})
