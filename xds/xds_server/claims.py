"""What a client keeps for us, behind the version of a complete response: what it refused. Pure.

A version is opaque to clients, which say the last one that they took when they come back
(`DiscoveryRequest.version_info`). So a server that has restarted, or another one, learns what was
refused and what the client has instead, which is nowhere else by then.
"""

import binascii
import json
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterable
from dataclasses import dataclass

from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.listener.v3.listener_pb2 import Listener
from google.protobuf.message import DecodeError

from xds_server.quarantine import Quarantined
from xds_server.references import CLUSTER, LISTENER, references
from xds_server.snapshot import Encoded, content_version

#: Every request of the type says it: beyond this a restart may forget what was refused.
MAX_CLAIM = 16 << 10
#: What is unpacked at most, however well it is packed.
_MAX_UNPACKED = 256 << 10
_MARK = "+"
_MESSAGES = {CLUSTER: Cluster, LISTENER: Listener}


@dataclass(frozen=True)
class Refused:
    """What a client refused, alone or (not `alone`) together with others, and what it has in its
    place: the version that it took before, if it took one."""

    what: Quarantined
    alone: bool
    has: Encoded | None


def suffix(refused: Iterable[Refused]) -> str:
    """What stands behind a version for these; "" for none, and for too many."""
    rows = [
        [
            each.what.name,
            each.what.version,
            each.what.error,
            each.alone,
            each.has and each.has.version,
            each.has and b64encode(each.has.body).decode(),
        ]
        for each in refused
    ]
    if not rows:
        return ""
    text = _MARK + b64encode(zlib.compress(json.dumps(rows).encode())).decode()
    return text if len(text) <= MAX_CLAIM else ""


def parse(type_url: str, claim: str) -> tuple[str, tuple[Refused, ...]]:
    """A version and what stood behind it. What is none of ours is a version that we do not know."""
    version, mark, packed = claim.partition(_MARK)
    if not mark or type_url not in _MESSAGES or len(claim) > MAX_CLAIM + 1024:
        return claim, ()
    try:
        unpacked = zlib.decompressobj().decompress(b64decode(packed, validate=True), _MAX_UNPACKED)
        return version, tuple(_refused(type_url, *row) for row in json.loads(unpacked))
    except (binascii.Error, zlib.error, DecodeError, ValueError, TypeError, RecursionError):
        return claim, ()


def _refused(
    type_url: str,
    name: str,
    version: str,
    error: str,
    alone: bool,
    has: str | None,
    body: str | None,
) -> Refused:
    if not (isinstance(alone, bool) and all(isinstance(t, str) for t in (name, version, error))):
        raise TypeError
    return Refused(
        Quarantined(type_url, name, version, error),
        alone,
        None if has is None or body is None else _encoded(type_url, name, has, b64decode(body)),
    )


def _encoded(type_url: str, name: str, version: str, body: bytes) -> Encoded:
    if content_version(body) != version:
        raise ValueError(version)
    refers = references(_MESSAGES[type_url].FromString(body))
    return Encoded(type_url, name, version, body, refers)
