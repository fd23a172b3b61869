"""Cross-origin requests, as Envoy's filter answers them in a client's sidecar."""

from envoy.extensions.filters.http.cors.v3 import cors_pb2
from google.protobuf.any_pb2 import Any

from xds_server.ir import Cors
from xds_server.translate.messages import packed, string_matcher

#: The filter's name.
CORS = "cors"


def cors_config(cors: Cors | None) -> dict[str, Any]:
    """The filter's configuration where requests are routed, by its name; nothing without one."""
    if cors is None:
        return {}
    result = cors_pb2.CorsPolicy(
        allow_origin_string_match=map(string_matcher, cors.origins),
        allow_methods=", ".join(cors.methods),
        allow_headers=", ".join(cors.headers),
        max_age=str(cors.max_age_s),
    )
    if not (cors.credentials and "*" in cors.exposed):
        # With credentials browsers take "*" for a header's name.
        result.expose_headers = ", ".join(cors.exposed)
    result.allow_credentials.value = cors.credentials
    # Who may not is told so here; the application need not know of it.
    result.forward_not_matching_preflights.value = False
    return {CORS: packed(result)}
