"""The model client of test_stream_property.py, in the state-of-the-world variant."""

from collections import deque

from envoy.service.discovery.v3.discovery_pb2 import DiscoveryRequest, DiscoveryResponse
from google.protobuf.message import Message
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from test_stream_property import MESSAGES, NAMED, REST, SMALL, Client, Config, is_bad, worlds
from worlds import Resources, world
from xds_server.references import CLUSTER, LISTENER
from xds_server.sotw import SotwStream
from xds_server.stream import MAX_RESPONSE_BYTES, ORDER, WHOLE_TYPES


class SotwClient(Client):
    """Messages wait in both directions until a rule moves them."""

    stream: SotwStream

    @initialize(first=worlds(bad=False), names_it=st.booleans(), small=st.booleans())
    def start(self, first: Resources, names_it: bool, small: bool) -> None:
        self.resources = first
        #: Whether the words of a refusal name what was bad.
        self.names_it = names_it
        self.limit = SMALL if small else MAX_RESPONSE_BYTES
        self.reconnected = False
        self.config = Config()
        self.versions = dict.fromkeys(ORDER, "")
        self.connect()

    def connect(self) -> None:
        #: A new stream knows nothing of clusters that the client had and that are to go.
        self.steady = False
        self.resources_sent = 0
        self.stream = SotwStream(self.limit)
        self.stream.offer(self.snapshot())
        self.to_server: deque[DiscoveryRequest] = deque()
        self.to_client: deque[DiscoveryResponse] = deque()
        self.nonces = dict.fromkeys(ORDER, "")
        self.names: dict[str, set[str]] = {url: set() for url in ORDER}
        for type_url in (CLUSTER, LISTENER):
            self.request(type_url)
        self.subscribe()

    def request(self, type_url: str, error: str = "") -> None:
        request = DiscoveryRequest(
            type_url=type_url,
            resource_names=sorted(self.names[type_url]),
            version_info=self.versions[type_url],
            response_nonce=self.nonces[type_url],
        )
        if error:
            request.error_detail.message = error
        self.to_server.append(request)

    def subscribe(self) -> None:
        for type_url in NAMED:
            wanted = self.config.wanted(type_url)
            if wanted != self.names[type_url]:
                for name in self.names[type_url] - wanted:
                    self.config.drop(type_url, name)
                self.names[type_url] = wanted
                self.request(type_url)

    @rule()
    def reconnect(self) -> None:
        self.reconnected = True
        self.connect()

    @rule()
    def come_back_to_the_same(self) -> None:
        """Whatever happened before: who has everything is sent nothing again."""
        self.rest()
        if any(is_bad(m) for named in self.resources.values() for m in named.values()):
            return
        self.reconnect()
        self.rest()
        assert self.resources_sent == 0

    def deliver(self) -> None:
        request = self.to_server.popleft().SerializeToString()
        if self.stream.take_plain_ack(request) is None:
            self.stream.receive(self.stream.parse(request))

    @rule(moves=st.lists(st.sampled_from(["deliver", "send", "handle"]), min_size=1, max_size=12))
    def move(self, moves: list[str]) -> None:
        """Let some messages go their way, in any order between the two directions."""
        for each in moves:
            if each == "deliver" and self.to_server:
                self.deliver()
            elif each == "send":
                self.send()
            elif each == "handle" and self.to_client:
                self.handle()

    @rule()
    def rest(self) -> None:
        """Move messages until none is left."""
        for _ in range(REST):
            if self.to_server:
                self.deliver()
            elif self.to_client:
                self.handle()
            elif not self.send():
                assert self.stream.settled
                self.steady = True
                return
        raise AssertionError("never comes to rest")

    def send(self) -> bool:
        response = self.stream.next_response()
        if response is not None:
            whole = response.type_url in WHOLE_TYPES
            assert whole or len(response.body) <= self.limit or len(response.resources) == 1
            self.resources_sent += len(response.resources)
            self.to_client.append(DiscoveryResponse.FromString(response.body))
        return response is not None

    def handle(self) -> None:
        response = self.to_client.popleft()
        type_url = response.type_url
        self.nonces[type_url] = response.nonce
        messages = [MESSAGES[type_url].FromString(each.value) for each in response.resources]
        refused = [self.config.name(message) for message in messages if is_bad(message)]
        if refused:
            self.request(type_url, f"refused {refused}" if self.names_it else "refused")
            return
        self.take(type_url, messages)
        self.versions[type_url] = response.version_info
        self.subscribe()
        self.request(type_url)
        self.check_config()

    def take(self, type_url: str, messages: list[Message]) -> None:
        for message in messages:
            if type_url in WHOLE_TYPES or self.config.name(message) in self.names[type_url]:
                self.config.take(type_url, message)
        if type_url in WHOLE_TYPES:
            names = {self.config.name(message) for message in messages}
            for name in self.config.has[type_url].keys() - names:
                self.config.drop(type_url, name)

    def check_config(self) -> None:
        """What must hold after each message that the client takes in."""

    def teardown(self) -> None:
        if not hasattr(self, "stream"):
            return
        self.rest()
        if any(is_bad(m) for named in self.resources.values() for m in named.values()):
            if not self.reconnected:
                self.config.check(self.resources)
                found = {(q.type_url, q.name) for q in self.stream.quarantined}
                assert all(is_bad(self.resources[type_url][name]) for type_url, name in found)
            self.resources = world()
            self.stream.offer(self.snapshot())
            self.rest()
        assert not self.stream.rejected
        assert self.stream.level
        for type_url in (CLUSTER, LISTENER):
            assert self.config.has[type_url] == self.resources[type_url]
        for type_url in NAMED:
            named = self.resources[type_url]
            wanted = {name: named[name] for name in self.config.wanted(type_url)}
            assert {name: self.config.has[type_url].get(name) for name in wanted} == wanted
        assert self.config.warm_clusters == self.resources[CLUSTER]


class GoodSotwClient(SotwClient):
    """Without refusals, live traffic never has a cluster taken away from under it."""

    bad = False

    def check_config(self) -> None:
        assert not self.steady or self.config.holes() == []


TestSotwClient = SotwClient.TestCase
TestSotwClient.settings = settings(max_examples=80, stateful_step_count=20, deadline=None)
TestGoodSotwClient = GoodSotwClient.TestCase
TestGoodSotwClient.settings = settings(max_examples=80, stateful_step_count=20, deadline=None)
