"""HTTP servers and their clients: nginx, Apache, curl, wget, h2load."""

import http.client
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from mesh import Mesh
from programs import MB, Route, noise, own_folder, program, serve, sha256

pytestmark = pytest.mark.root

NGINX, NGINX_H2, APACHE = 8080, 8081, 8090
BIG, SMALL = 24 * MB, 1000
FILES = 60

_NGINX = """
daemon off;
worker_processes 1;
pid {root}/pid;
error_log stderr;
events {{ worker_connections 512; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    client_max_body_size 0;
    keepalive_requests 1000000;
    client_body_temp_path {root}/body;
    proxy_temp_path {root}/proxy;
    fastcgi_temp_path {root}/fastcgi;
    uwsgi_temp_path {root}/uwsgi;
    scgi_temp_path {root}/scgi;
    server {{
        listen {http};
        listen {h2} http2;
        root {root}/www;
        location /up/ {{ dav_methods PUT; create_full_put_path on; }}
    }}
}}
"""

# One process for one connection at a time: whoever comes meanwhile is accepted late. Apache defers
# accept by itself (AcceptFilter http data).
_APACHE = """
ServerRoot {root}
ServerName server
Listen {port}
PidFile {root}/pid
Mutex posixsem
ErrorLog {root}/error.log
LoadModule mpm_prefork_module {modules}/mod_mpm_prefork.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule dav_module {modules}/mod_dav.so
LoadModule dav_fs_module {modules}/mod_dav_fs.so
StartServers 1
MinSpareServers 1
MaxSpareServers 1
ServerLimit 1
MaxRequestWorkers 1
DavLockDB {root}/lock
DocumentRoot {root}/www
EnableSendfile On
<Directory {root}/www>
    Require all granted
    Dav On
</Directory>
"""


@pytest.fixture(scope="module")
def nginx(pods: Mesh, folder: Path) -> Path:
    """nginx's document root."""
    root = own_folder(folder / "nginx")
    www = own_folder(root / "www")
    config = root / "nginx.conf"
    config.write_text(_NGINX.format(root=root, http=NGINX, h2=NGINX_H2))
    argv = [program("nginx"), "-p", root, "-e", "stderr", "-c", config]
    serve(pods.server, argv, folder / "nginx.log", NGINX)
    noise(www / "big", BIG, 1)
    noise(www / "small", SMALL, 2)
    for n in range(FILES):
        noise(www / f"{n}", 1 + n**3, n)
    return www


@pytest.fixture(scope="module")
def apache(pods: Mesh, folder: Path) -> Path:
    """Apache's document root."""
    root = own_folder(folder / "apache")
    www = own_folder(root / "www")
    config = root / "httpd.conf"
    modules = program("apache2").parents[1] / "lib/apache2/modules"
    config.write_text(_APACHE.format(root=root, modules=modules, port=APACHE))
    argv = [program("apache2"), "-D", "FOREGROUND", "-f", config]
    serve(pods.server, argv, folder / "apache.log", APACHE)
    noise(www / "big", BIG, 3)
    return www


@pytest.fixture
def got(route: Route) -> Iterator[Path]:
    """A place for what a client has fetched."""
    path = route.folder / "got"
    path.unlink(missing_ok=True)
    yield path
    path.unlink(missing_ok=True)


def curl(route: Route, *arguments: str | Path) -> str:
    argv = [program("curl"), "--silent", "--show-error", "--fail", "--max-time", "30"]
    return route.client.run([*argv, *arguments], check=True).stdout


@pytest.mark.parametrize("port", [NGINX, NGINX_H2])
def test_curl_from_nginx_by_sendfile(route: Route, nginx: Path, got: Path, port: int) -> None:
    version = "--http2-prior-knowledge" if port == NGINX_H2 else "--http1.1"
    with route.carries(BIG):
        curl(route, version, "-o", got, f"http://{route.server.ip}:{port}/big")
    assert sha256(got) == sha256(nginx / "big")


def test_curl_to_nginx_in_chunks(route: Route, nginx: Path) -> None:
    """Of unknown length, hence in chunks (RFC 9112, 7.1); nginx asks FIONREAD."""
    stored = nginx / "up" / "chunked"
    stored.unlink(missing_ok=True)
    url = f"http://{route.server.ip}:{NGINX}/up/chunked"
    argv = ["sh", "-c", 'cat "$1" | "$2" -sSf --max-time 30 -H Expect: -T - "$3"', "sh"]
    with route.carries(BIG):
        done = route.client.run([*argv, nginx / "big", program("curl"), url])
        log = (route.folder / "nginx.log").read_text()
        assert done.returncode == 0, f"{done.stderr}{log}"
    assert sha256(stored) == sha256(nginx / "big")


def test_wget_many_files_on_one_connection(route: Route, nginx: Path) -> None:
    place = own_folder(route.folder / "wget")
    urls = [f"http://{route.server.ip}:{NGINX}/{n}" for n in range(FILES)]
    argv = [program("wget"), "-q", "--tries=1", "--timeout=30", "-P", place, *urls]
    with route.carries(sum(1 + n**3 for n in range(FILES))):
        route.client.run(argv, check=True)
    for n in range(FILES):
        assert sha256(place / f"{n}") == sha256(nginx / f"{n}")
        (place / f"{n}").unlink()
    place.rmdir()


@pytest.mark.parametrize(("port", "options"), [(NGINX, ["--h1"]), (NGINX_H2, [])])
def test_h2load_pipelines_and_multiplexes(
    route: Route, nginx: Path, port: int, options: list[str]
) -> None:
    count = 3000
    url = f"http://{route.server.ip}:{port}/small"
    argv = [program("h2load"), *options, "-n", str(count), "-c", "10", "-m", "10", url]
    with route.carries(count * SMALL, connections=10):
        told = route.client.run(argv, check=True).stdout
    assert f"{count} succeeded, 0 failed, 0 errored, 0 timeout" in told
    (data,) = re.findall(r"\((\d+)\) data", told)
    assert int(data) == count * (nginx / "small").stat().st_size


def test_curl_to_and_from_apache(route: Route, apache: Path, got: Path) -> None:
    url = f"http://{route.server.ip}:{APACHE}"
    with route.carries(2 * BIG, deferred=True):
        curl(route, "-H", "Expect:", "-T", apache / "big", f"{url}/up")
        curl(route, "-o", got, f"{url}/up")
    assert sha256(got) == sha256(apache / "big")


def test_apache_accepts_late_what_came_in_pieces(route: Route, apache: Path) -> None:
    """Its only process is busy with one request while the other arrives, piece by piece."""
    pieces = [b"%04d" % n * 1000 for n in range(20)]

    def begin(name: str, size: int) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(route.server.ip)
        connection.sock = route.mesh.connect(APACHE)
        connection.putrequest("PUT", f"/{name}")
        connection.putheader("Content-Length", str(size))
        connection.putheader("Connection", "close")
        connection.endheaders()
        return connection

    with route.carries(80_000, connections=2, deferred=True):
        first = begin("first", 8)
        first.send(b"half")
        late = begin("late", sum(map(len, pieces)))
        for piece in pieces:
            late.send(piece)
        first.send(b"half")
        for connection in (first, late):
            answer = connection.getresponse()
            assert answer.status in (201, 204)
            answer.read()
            connection.close()
    assert (apache / "first").read_bytes() == b"halfhalf"
    assert (apache / "late").read_bytes() == b"".join(pieces)
