"""The API server's REST interface, as much of it as is spoken here: list, watch, create, patch.

urllib3 is what the official client stands on; that client's models cost 40 MiB of memory, more
than all the rest of the agent.
"""

import json
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import urllib3

from redirector.errors import ClusterError

#: Where the kubelet puts a pod's identity.
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
JSON = "application/json"
#: RFC 7386.
_MERGE_PATCH = "application/merge-patch+json"
#: An object has at most 1.5 MiB in etcd; a page of a list a few of the largest.
MAX_LINE = 8 << 20
MAX_BODY = 48 << 20
#: Kept open for the next request; watches have theirs for themselves.
_CONNECTIONS = 16
_CONNECT_SECONDS = 10.0
_ANSWER_SECONDS = 60.0
#: A server may ask to be left alone for so long; what is beyond is no time to sleep for, or none
#: that a thread can.
_MOST_PATIENCE_SECONDS = 300.0
#: A peer that vanished without a FIN is noticed after a minute (tcp(7)).
_KEEPALIVE = [
    *urllib3.connection.HTTPConnection.default_socket_options,
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]


class ApiError(ClusterError):
    """An answer that is none, or says no."""

    def __init__(self, text: str, status: int = 0, retry_after: float = 0.0) -> None:
        super().__init__(text)
        #: The HTTP status, or that of a Status object; 0 when there was no answer.
        self.status = status
        #: Seconds that the server asks to wait.
        self.retry_after = retry_after


@dataclass(frozen=True)
class Access:
    """Where the API server is and who we are to it; the files are read anew when they are used."""

    url: str
    token_file: Path | None = None
    ca_file: Path | None = None
    #: A certificate of ours, in place of a token, and its key.
    certificate_file: Path | None = None
    key_file: Path | None = None


def in_cluster(
    environment: Mapping[str, str], way_out: str, files: Path = SERVICE_ACCOUNT
) -> Access:
    """Return what every pod is given. ClusterError outside of a cluster, naming the way out."""
    host = environment.get("KUBERNETES_SERVICE_HOST")
    port = environment.get("KUBERNETES_SERVICE_PORT", "443")
    token, authority = files / "token", files / "ca.crt"
    if not host or not token.is_file() or not authority.is_file():
        raise ClusterError(
            f"this is not a pod of a cluster (KUBERNETES_SERVICE_HOST or {files} is missing); "
            f"{way_out}"
        )
    host = f"[{host}]" if ":" in host else host
    return Access(f"https://{host}:{port}", token, authority)


def elsewhere(url: str, files: Path = SERVICE_ACCOUNT) -> Access:
    """Return the server at a URL, with the pod's identity if there is one and it is safe there."""
    token, authority = files / "token", files / "ca.crt"
    safe = url.startswith("https://")
    return Access(
        url.rstrip("/"),
        token if safe and token.is_file() else None,
        authority if safe and authority.is_file() else None,
    )


class Client:
    """One API server. Every method may raise ApiError; threads may share it."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._pool = self._new_pool()

    def get(self, path: str, query: Mapping[str, str], accept: str = JSON) -> dict[str, Any]:
        """Return the JSON object at a path."""
        response = self._request("GET", path, query, accept)
        try:
            body = response.read(MAX_BODY + 1)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self._broken(path, error) from error
        finally:
            response.release_conn()
        if len(body) > MAX_BODY:
            response.close()
            raise ApiError(f"GET {path}: the answer has more than {MAX_BODY >> 20} MiB")
        return _object(f"GET {path}", body)

    def watch(
        self, path: str, query: Mapping[str, str], seconds: float, accept: str = JSON
    ) -> Iterator[dict[str, Any]]:
        """Yield the events of a watch as they come, until the server ends it.

        It is told to do so after `seconds`; one that is silent for longer is left.
        """
        query = {**query, "watch": "1", "timeoutSeconds": str(int(seconds))}
        response = self._request("GET", path, query, accept, silence=seconds + 30)
        rest = b""
        try:
            for chunk in response.stream(1 << 16):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line.strip():
                        yield _object(f"watch {path}", line)
                if len(rest) > MAX_LINE:
                    raise ApiError(f"watch {path}: a line has more than {MAX_LINE >> 20} MiB")
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self._broken(path, error) from error
        finally:
            # Half an answer may be left in it: this connection serves nobody else.
            response.close()
        if rest.strip():
            raise ApiError(f"watch {path}: ended in the middle of a line")

    def create(self, path: str, body: Mapping[str, object]) -> None:
        """Create an object below a path."""
        self._send("POST", path, JSON, body)

    def patch(self, path: str, body: Mapping[str, object]) -> None:
        """Merge into the object at a path; a resourceVersion in it must be the object's."""
        self._send("PATCH", path, _MERGE_PATCH, body)

    def _send(self, method: str, path: str, kind: str, body: Mapping[str, object]) -> None:
        response = self._request(method, path, {}, JSON, json.dumps(body).encode(), kind)
        response.drain_conn()
        response.release_conn()

    def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        accept: str,
        body: bytes | None = None,
        kind: str = JSON,
        silence: float = _ANSWER_SECONDS,
    ) -> urllib3.BaseHTTPResponse:
        headers = {"Accept": accept, "User-Agent": "redirector"}
        if body is not None:
            headers["Content-Type"] = kind
        if self._access.token_file is not None:
            headers["Authorization"] = f"Bearer {self._token()}"
        try:
            response = self._pool.request(
                method,
                self._access.url + path,
                fields=None if body is not None else dict(query),
                body=body,
                headers=headers,
                timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=silence),
                retries=False,
                redirect=False,
                preload_content=False,
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            # The next request reads the certificate authority anew.
            self._pool = self._new_pool()
            raise self._broken(path, error) from error
        if 200 <= response.status < 300:
            return response
        raise _refused(f"{method} {path}", response)

    def _token(self) -> str:
        assert self._access.token_file is not None
        try:
            return self._access.token_file.read_text().strip()
        except OSError as error:
            raise ApiError(f"{self._access.token_file}: {error.strerror}") from error

    def _new_pool(self) -> urllib3.PoolManager:
        access = self._access
        return urllib3.PoolManager(
            maxsize=_CONNECTIONS,
            cert_reqs="CERT_REQUIRED",
            ca_certs=str(access.ca_file) if access.ca_file else None,
            cert_file=str(access.certificate_file) if access.certificate_file else None,
            key_file=str(access.key_file) if access.key_file else None,
            socket_options=_KEEPALIVE,
        )

    def _broken(self, path: str, error: Exception) -> ApiError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return ApiError(f"{self._access.url}{path}: {reason}")


def _object(what: str, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ApiError(f"{what}: the answer is not a JSON object: {text[:60]!r}")
    return value


def _refused(what: str, response: urllib3.BaseHTTPResponse) -> ApiError:
    try:
        told = json.loads(response.read(1 << 16)).get("message", "")
    except (urllib3.exceptions.HTTPError, OSError, ValueError, AttributeError):
        told = ""
    finally:
        response.close()
    try:
        wait = float(response.headers.get("Retry-After", "0"))
    except ValueError:
        wait = 0.0
    detail = " ".join(f"{told or response.reason or ''}".split())[:300]
    wait = min(max(0.0, wait), _MOST_PATIENCE_SECONDS)
    return ApiError(f"{what}: {response.status} {detail}", response.status, wait)
