"""Any client, any changes, any timing: the client comes to the desired state, and never breaks.

The model of a client follows Envoy: wildcards for clusters and listeners, endpoints and routes by
the names those use, a listener takes over once its routes are there, a cluster once its endpoints
came after it. It refuses resources of variant BAD and keeps what it had: it may apply the rest of
the response or nothing, and name what was wrong or not.
"""

from collections import deque
from dataclasses import dataclass, field

from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.core.v3.extension_pb2 import TypedExtensionConfig
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.config.route.v3.route_pb2 import RouteConfiguration
from envoy.service.discovery.v3.discovery_pb2 import (
    DeltaDiscoveryRequest,
    DeltaDiscoveryResponse,
)
from google.protobuf.message import Message
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
)
from worlds import Resources, endpoints, listener, network_filter, route, world
from xds_server.delta import DeltaStream
from xds_server.exchange import Response
from xds_server.references import CLUSTER, ENDPOINT, FILTER, LISTENER, ROUTE, references
from xds_server.snapshot import Encoder, Snapshot
from xds_server.stream import MAX_RESPONSE_BYTES, ORDER, Stream

BAD = 9
CLUSTERS, ROUTES, LISTENERS, FILTERS = "abcd", "rst", "lm", "fg"
#: Types of which the client asks for what others of its configuration name.
NAMED = (ENDPOINT, ROUTE, FILTER)
#: A message is delivered or handled at most so often before everything must have come to rest.
REST = 1000
#: Room for about two resources in a message.
SMALL = 900

MESSAGES: dict[str, type[Message]] = {
    CLUSTER: Cluster,
    ENDPOINT: ClusterLoadAssignment,
    LISTENER: Listener,
    ROUTE: RouteConfiguration,
    FILTER: TypedExtensionConfig,
}


@st.composite
def worlds(draw: st.DrawFn, *, bad: bool) -> Resources:
    """A consistent world: every route has its cluster, every listener its route and filter."""
    variants = st.sampled_from([0, 1, 2, BAD] if bad else [0, 1, 2])
    clusters = draw(st.dictionaries(st.sampled_from(CLUSTERS), variants, min_size=1))
    targets = st.sampled_from(sorted(clusters))
    routes = draw(
        st.dictionaries(st.sampled_from(ROUTES), st.tuples(targets, variants), min_size=1)
    )
    filters = draw(st.dictionaries(st.sampled_from(FILTERS), variants))
    listeners = draw(
        st.dictionaries(
            st.sampled_from(LISTENERS),
            st.tuples(
                st.sampled_from(sorted(routes)), variants, st.sampled_from(["", *sorted(filters)])
            ),
        )
    )
    ports = {name: draw(st.sampled_from([8000, 9000])) for name in clusters}
    return {
        **world(clusters, ports, routes),
        LISTENER: {n: listener(n, *of) for n, of in sorted(listeners.items())},
        FILTER: {n: network_filter(n, v) for n, v in sorted(filters.items())},
    }


def tweaked(draw: st.DrawFn, before: Resources, *, bad: bool) -> Resources:
    """Other content for some endpoints or some routes, and nothing else: the change that most
    changes are."""
    type_url = draw(st.sampled_from([ENDPOINT, ROUTE]))
    named = dict(before[type_url])
    for name in draw(st.sets(st.sampled_from(sorted(named)), min_size=1)):
        if type_url == ENDPOINT:
            named[name] = endpoints(name, draw(st.integers(7000, 7003)))
        else:
            target = draw(st.sampled_from(sorted(before[CLUSTER])))
            named[name] = route(name, target, draw(st.sampled_from([3, 4, BAD] if bad else [3, 4])))
    return {**before, type_url: named}


def is_bad(message: Message) -> bool:
    """Whether the client refuses it; see the variants in worlds.py."""
    if isinstance(message, Cluster):
        return bool(message.connect_timeout.seconds == 1 + BAD)
    if isinstance(message, RouteConfiguration):
        timeout = message.virtual_hosts[0].routes[0].route.timeout
        return bool(timeout.seconds == 1 + BAD)
    if isinstance(message, Listener):
        return f"{message.name}{BAD}".encode() in message.filter_chains[0].SerializeToString()
    if isinstance(message, TypedExtensionConfig):
        return message == network_filter(message.name, BAD)
    return False


@dataclass
class Config:
    """What the client is configured with: active resources, and those that warm."""

    has: dict[str, dict[str, Message]] = field(default_factory=lambda: {url: {} for url in ORDER})
    warm_clusters: dict[str, Message] = field(default_factory=dict)
    active_listeners: dict[str, Message] = field(default_factory=dict)

    def give_up_warming(self) -> None:
        """A cluster that came just before the connection broke, without its endpoints: nobody can
        know that it warms. Envoy waits 15 s and then takes the endpoints that it has cached."""
        both = self.has[CLUSTER].keys() & self.has[ENDPOINT].keys()
        self.warm_clusters.update((name, self.has[CLUSTER][name]) for name in both)

    def take(self, type_url: str, message: Message) -> None:
        name = self.name(message)
        self.has[type_url][name] = message
        if type_url == ENDPOINT and name in self.has[CLUSTER]:
            self.warm_clusters[name] = self.has[CLUSTER][name]
        self._activate()

    @staticmethod
    def name(message: Message) -> str:
        """The resource's name, which endpoints keep in another field."""
        field_name = "cluster_name" if isinstance(message, ClusterLoadAssignment) else "name"
        return str(getattr(message, field_name))

    def drop(self, type_url: str, name: str) -> None:
        self.has[type_url].pop(name, None)
        if type_url == CLUSTER:
            self.warm_clusters.pop(name, None)
        if type_url == LISTENER:
            self.active_listeners.pop(name, None)

    def _activate(self) -> None:
        for name, entry in self.has[LISTENER].items():
            if all(target.name in self.has[target.type_url] for target in references(entry)):
                self.active_listeners[name] = entry

    def wanted(self, type_url: str) -> set[str]:
        """Names that the configuration needs of endpoints, routes or filters."""
        users = self.has[CLUSTER] if type_url == ENDPOINT else self.has[LISTENER]
        active = {} if type_url == ENDPOINT else self.active_listeners
        messages = [*users.values(), *active.values()]
        return {t.name for m in messages for t in references(m) if t.type_url == type_url}

    def live(self) -> set[str]:
        """Clusters that live traffic is sent to."""
        targets = {t for entry in self.active_listeners.values() for t in references(entry)}
        routes = {target.name for target in targets if target.type_url == ROUTE}
        live = [self.has[ROUTE][name] for name in routes if name in self.has[ROUTE]]
        return {target.name for entry in live for target in references(entry)}

    def filtering(self) -> set[str]:
        """Filters that live traffic goes through."""
        targets = {t for entry in self.active_listeners.values() for t in references(entry)}
        return {target.name for target in targets if target.type_url == FILTER}

    def holes(self) -> list[str]:
        """Clusters that live traffic is sent to and that are not there or not warm."""
        return sorted(self.live() - self.warm_clusters.keys())

    def check(self, resources: Resources) -> None:
        """All that is good was taken, and what is bad hindered nothing else.

        A route whose new version needs a cluster that was refused stays in the one before.
        """
        for type_url in (CLUSTER, LISTENER):
            good = {n: m for n, m in resources[type_url].items() if not is_bad(m)}
            assert {n: self.has[type_url].get(n) for n in good} == good
        assert self.warm_clusters.keys() >= self.has[CLUSTER].keys() & resources[CLUSTER].keys()
        for type_url in NAMED:
            for name in self.wanted(type_url) & resources[type_url].keys():
                message, has = resources[type_url][name], self.has[type_url].get(name)
                # It may have taken one before together with something that it refused.
                doubtful = any(is_bad(resources[t.type_url][t.name]) for t in references(message))
                assert is_bad(message) or has == message or (has and doubtful)


class Client(RuleBasedStateMachine):
    """What changes for a client of either variant."""

    bad = True
    resources: Resources
    stream: Stream

    @rule(data=st.data())
    def change(self, data: st.DataObject) -> None:
        self.resources = data.draw(worlds(bad=self.bad))
        self.stream.offer(self.snapshot())

    @rule(data=st.data(), rested=st.booleans())
    def tweak(self, data: st.DataObject, rested: bool) -> None:
        if rested:
            self.rest()
        self.resources = tweaked(data.draw, self.resources, bad=self.bad)
        self.stream.offer(self.snapshot())

    def snapshot(self) -> Snapshot:
        snapshot = Encoder().snapshot(self.resources)
        assert snapshot.consistent() == ()
        return snapshot

    def rest(self) -> None:
        """Move messages until none is left."""
        raise NotImplementedError


class DeltaClient(Client):
    """The incremental variant. Messages wait in both directions until a rule moves them."""

    stream: DeltaStream

    @initialize(
        first=worlds(bad=False), whole=st.booleans(), names_it=st.booleans(), small=st.booleans()
    )
    def start(self, first: Resources, whole: bool, names_it: bool, small: bool) -> None:
        self.resources = first
        #: Whether the words of a refusal name what was bad.
        self.names_it = names_it
        self.limit = SMALL if small else MAX_RESPONSE_BYTES
        #: Whether one bad resource makes the client refuse all of a response (Envoy does either).
        self.whole = whole
        self.config = Config()
        self.versions: dict[str, dict[str, str]] = {url: {} for url in ORDER}
        self.connect()

    def connect(self) -> None:
        self.stream = DeltaStream(self.limit)
        self.stream.offer(self.snapshot())
        self.config.give_up_warming()
        self.to_server: deque[DeltaDiscoveryRequest] = deque()
        self.to_client: deque[DeltaDiscoveryResponse] = deque()
        #: By nonce, the names in responses that the client refuses.
        self.refusals: dict[str, set[str]] = {}
        #: Names that the server may send although the client has them in this version.
        self.may_repeat: dict[str, set[str]] = {url: set() for url in ORDER}
        self.has_sent = {url: dict(self.versions[url]) for url in ORDER}
        self.subscribed: dict[str, set[str]] = {url: set() for url in NAMED}
        for type_url in (CLUSTER, LISTENER):
            self.to_server.append(
                DeltaDiscoveryRequest(
                    type_url=type_url, initial_resource_versions=self.versions[type_url]
                )
            )
        self.subscribe(first=True)

    def subscribe(self, *, first: bool = False) -> None:
        """Ask for what the configuration came to need, give up what it does not any more."""
        for type_url, names in self.subscribed.items():
            wanted = self.config.wanted(type_url)
            if wanted != names:
                known = {n: v for n, v in self.versions[type_url].items() if n in wanted}
                self.to_server.append(
                    DeltaDiscoveryRequest(
                        type_url=type_url,
                        resource_names_subscribe=sorted(wanted - names),
                        resource_names_unsubscribe=sorted(names - wanted),
                        initial_resource_versions=known if first else {},
                    )
                )
                for name in names - wanted:
                    self.versions[type_url].pop(name, None)
                    self.config.drop(type_url, name)
                self.subscribed[type_url] = wanted

    @rule()
    def reconnect(self) -> None:
        self.connect()

    @rule(type_url=st.sampled_from([ENDPOINT, ROUTE]), name=st.sampled_from("abcrstxyz"))
    def ask_again(self, type_url: str, name: str) -> None:
        """A client may have forgotten what it has, and may ask for what there is not."""
        if not self.subscribed[type_url]:
            # Who asks for a route before the listener that names it may be sent both before the
            # clusters' endpoints, for which it has not asked yet; Envoy asks in this order.
            return
        self.subscribed[type_url].add(name)
        self.to_server.append(
            DeltaDiscoveryRequest(type_url=type_url, resource_names_subscribe=[name])
        )

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
            else:
                self.send()
                if not self.to_client:
                    assert self.stream.settled
                    return
        raise AssertionError("never comes to rest")

    def deliver(self) -> None:
        request = self.to_server.popleft()
        if request.type_url in self.may_repeat:
            new = set(request.resource_names_subscribe) - set(request.initial_resource_versions)
            self.may_repeat[request.type_url] |= new
        # What went with a refused resource may be sent again once that changes; without an end,
        # the client would never come to rest.
        self.may_repeat[request.type_url] |= self.refusals.pop(request.response_nonce, set())
        as_bytes = request.SerializeToString()
        if self.stream.take_plain_ack(as_bytes) is None:
            self.stream.receive(self.stream.parse(as_bytes))

    def send(self) -> None:
        response = self.stream.next_response()
        if response is not None:
            self.check_sent(response)
            self.to_client.append(DeltaDiscoveryResponse.FromString(response.body))

    def check_sent(self, response: Response) -> None:
        """No byte is sent again unless it was asked for, or is due with its cluster."""
        assert len(response.body) <= self.limit or len(response.versions()) == 1
        has_sent, may = self.has_sent[response.type_url], self.may_repeat[response.type_url]
        for entry in response.resources:
            repeated = has_sent.get(entry.name) == entry.version
            assert not repeated or entry.name in may, f"{entry} was sent again"
            has_sent[entry.name] = entry.version
            may.discard(entry.name)
            if response.type_url == CLUSTER:
                self.may_repeat[ENDPOINT] |= {t.name for t in entry.refers}
        for name in response.removed:
            has_sent.pop(name, None)

    def handle(self) -> None:
        response = self.to_client.popleft()
        type_url = response.type_url
        refused = self.refused(response)
        if refused and self.whole:
            self.answer(response, refused)
            return
        for name in response.removed_resources:
            self.versions[type_url].pop(name, None)
            assert type_url != CLUSTER or name not in self.config.live()
            assert type_url != FILTER or name not in self.config.filtering()
            if type_url in (CLUSTER, LISTENER, FILTER):
                self.config.drop(type_url, name)
        for resource in response.resources:
            message = MESSAGES[type_url].FromString(resource.resource.value)
            if type_url in self.subscribed and resource.name not in self.config.wanted(type_url):
                continue
            if resource.name not in refused:
                self.config.take(type_url, message)
                self.versions[type_url][resource.name] = resource.version
        self.subscribe()
        self.check_config()
        self.answer(response, refused)

    def refused(self, response: DeltaDiscoveryResponse) -> list[str]:
        message_type = MESSAGES[response.type_url]
        return [
            resource.name
            for resource in response.resources
            if is_bad(message_type.FromString(resource.resource.value))
        ]

    def answer(self, response: DeltaDiscoveryResponse, refused: list[str]) -> None:
        answer = DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
        if refused:
            answer.error_detail.message = f"refused {refused}" if self.names_it else "refused"
            self.refusals[response.nonce] = {r.name for r in response.resources}
        self.to_server.append(answer)

    def check_config(self) -> None:
        """What must hold after each message that the client takes in."""

    def teardown(self) -> None:
        if not hasattr(self, "stream"):
            return
        self.rest()
        if any(is_bad(m) for named in self.resources.values() for m in named.values()):
            assert self.bad
            self.config.check(self.resources)
            assert all(is_bad(self.resources[q.type_url][q.name]) for q in self.stream.quarantined)
            for type_url in (CLUSTER, LISTENER):
                bad = {n for n, m in self.resources[type_url].items() if is_bad(m)}
                found = {q.name for q in self.stream.quarantined if q.type_url == type_url}
                assert found == bad
            # Repaired, all is well.
            self.resources = world()
            self.stream.offer(self.snapshot())
            self.rest()
        assert self.stream.rejected == ()
        assert self.stream.quarantined == ()
        assert self.stream.level
        for type_url in (CLUSTER, LISTENER):
            assert self.config.has[type_url] == self.resources[type_url]
        for type_url in NAMED:
            wanted = self.config.wanted(type_url)
            named = self.resources[type_url]
            assert {n: self.config.has[type_url][n] for n in wanted} == {
                n: named[n] for n in wanted
            }
        assert self.config.warm_clusters == self.resources[CLUSTER]


class GoodDeltaClient(DeltaClient):
    """Without refusals, live traffic never has a cluster taken away from under it."""

    bad = False

    def check_config(self) -> None:
        assert self.config.holes() == []


TestDeltaClient = DeltaClient.TestCase
TestDeltaClient.settings = settings(max_examples=80, stateful_step_count=20, deadline=None)
TestGoodDeltaClient = GoodDeltaClient.TestCase
TestGoodDeltaClient.settings = settings(max_examples=80, stateful_step_count=20, deadline=None)
