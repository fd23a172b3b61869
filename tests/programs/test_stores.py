"""Redis and PostgreSQL with their own clients."""

import hashlib
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mesh import Mesh
from programs import MB, USER, Route, noise, own_folder, program, serve, sha256

pytestmark = pytest.mark.root

REDIS, POSTGRES = 6379, 5432
VALUE = 8 * MB
#: Commands sent without waiting for an answer.
PIPELINE = 10_000
ROWS = 150_000


@pytest.fixture(scope="module")
def redis(pods: Mesh, folder: Path) -> None:
    root = own_folder(folder / "redis")
    argv: list[str | Path] = ["redis-server", "--port", str(REDIS), "--save", "", "--dir", root]
    argv += ["--bind", "0.0.0.0", "--protected-mode", "no"]
    # The server itself, which asks by what name it was called.
    binary = program("redis-check-rdb")
    serve(pods.server, argv, folder / "redis.log", REDIS, executable=binary)


@pytest.fixture(scope="module")
def postgres(pods: Mesh, folder: Path) -> Iterator[None]:
    root = own_folder(folder / "postgres")
    data = root / "data"
    argv = [program("initdb"), "-D", data, "-U", "test", "-A", "trust", "--no-sync", "--locale=C"]
    pods.server.run([*argv, "-E", "UTF8"], uid=USER, gid=USER, cwd=root, check=True)
    # A sidecar calls from an address of its own.
    (data / "pg_hba.conf").write_text("host all all all trust\n")
    argv = [program("postgres"), "-D", data, "-F", "-p", str(POSTGRES)]
    argv += ["-c", "listen_addresses=*", "-c", "unix_socket_directories="]
    process = serve(pods.server, argv, folder / "postgres.log", POSTGRES, cwd=root)
    yield
    # Killed, it would leave its shared memory behind.
    process.send_signal(signal.SIGINT)
    process.wait(30)


def redis_cli(route: Route, *arguments: str, **options: object) -> str:
    argv = [program("redis-cli"), "-h", route.server.ip, "-p", str(REDIS), *arguments]
    return route.client.run(argv, check=True, **options).stdout


def psql(route: Route, *arguments: str, **options: object) -> str:
    argv = [*_psql(route), *arguments]
    return route.client.run(argv, check=True, **options).stdout


def _psql(route: Route) -> list[str | Path]:
    address = f"host={route.server.ip} port={POSTGRES} user=test dbname=postgres"
    return [program("psql"), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", address]


@pytest.mark.usefixtures("redis")
def test_redis_large_value(route: Route) -> None:
    source, got = noise(route.folder / "value", VALUE, 4), route.folder / "value-back"
    with route.carries(2 * VALUE, connections=3):
        with source.open("rb") as file:
            assert redis_cli(route, "-x", "SET", "large", stdin=file) == "OK\n"
        stored = redis_cli(route, "EVAL", "return redis.sha1hex(redis.call('GET', 'large'))", "0")
        with got.open("wb") as file:
            redis_cli(route, "--raw", "GET", "large", stdout=file)
    content = source.read_bytes()
    assert stored.strip() == hashlib.sha1(content).hexdigest()
    # redis-cli ends what it prints with a newline.
    assert got.read_bytes() == content + b"\n"


@pytest.mark.usefixtures("redis")
def test_redis_pipeline(route: Route) -> None:
    """Thousands of commands at once, thousands of answers at once."""
    redis_cli(route, "FLUSHALL")
    values = [hashlib.sha256(b"%d" % n).hexdigest() for n in range(PIPELINE)]
    commands = "".join(f"SET key:{n} {value}\r\n" for n, value in enumerate(values))
    questions = "".join(f"GET key:{n}\n" for n in range(PIPELINE))
    with route.carries(2 * len(commands), connections=2):
        told = redis_cli(route, "--pipe", input=commands)
        assert f"errors: 0, replies: {PIPELINE}" in told
        assert redis_cli(route, "--raw", input=questions).split() == values


@pytest.mark.usefixtures("redis")
def test_redis_benchmark(route: Route) -> None:
    """20 connections, 16 commands in flight on each; it ends at the first error."""
    argv = [program("redis-benchmark"), "-h", route.server.ip, "-p", str(REDIS), "--csv"]
    argv += ["-n", "10000", "-c", "20", "-P", "16", "-d", "1000", "-t", "set,get"]
    with route.carries(2 * 10_000 * 1000, connections=40):
        told = route.client.run(argv, check=True).stdout
    assert [line.split(",")[0] for line in told.splitlines()[1:]] == ['"SET"', '"GET"']


@pytest.mark.usefixtures("redis")
def test_redis_pushes_to_a_subscriber(route: Route) -> None:
    """The server speaks without being asked, in the order in which it was told."""
    count = 2000
    argv = [program("redis-cli"), "-h", route.server.ip, "-p", str(REDIS), "SUBSCRIBE", "news"]
    with route.carries(count * 10, connections=2):
        reader = route.client.popen(argv, stdout=subprocess.PIPE, text=True)
        try:
            assert [reader.stdout.readline() for _ in range(3)] == ["subscribe\n", "news\n", "1\n"]
            redis_cli(route, input="".join(f"PUBLISH news {n}\n" for n in range(count)))
            lines = [reader.stdout.readline() for _ in range(3 * count)]
        finally:
            reader.kill()
            reader.wait()
    assert lines[2::3] == [f"{n}\n" for n in range(count)]


@pytest.mark.usefixtures("postgres")
def test_postgres_copies_in_and_out(route: Route) -> None:
    table, got = route.folder / "table", route.folder / "table-back"
    with table.open("w") as file:
        for n in range(ROWS):
            file.write(f"{n}\t{hashlib.sha256(b'%d' % n).hexdigest()}\n")
    psql(route, "-c", "DROP TABLE IF EXISTS copied", "-c", "CREATE TABLE copied (n int, t text)")
    with route.carries(2 * table.stat().st_size, connections=2):
        with table.open() as file:
            psql(route, "-c", "COPY copied FROM STDIN", stdin=file)
        with got.open("w") as file:
            psql(route, "-c", "COPY copied TO STDOUT", stdout=file)
    assert sha256(got) == sha256(table)


@pytest.mark.usefixtures("postgres")
def test_postgres_many_small_queries(route: Route) -> None:
    """A conversation: each answer before the next question."""
    count = 3000
    questions = "".join(f"SELECT {n} * 2;\n" for n in range(count))
    with route.carries(len(questions)):
        told = psql(route, input=questions)
    assert told.split() == [str(2 * n) for n in range(count)]


@pytest.mark.usefixtures("postgres")
def test_postgres_notifies(route: Route) -> None:
    """The listener's connection is idle while the notification comes."""
    with route.carries(100, connections=2):
        listener = route.client.popen(
            _psql(route), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            ask = _asking(listener)
            ask("LISTEN news; SELECT 'listening';", "listening")
            psql(route, "-c", "NOTIFY news, 'hello'")
            ask("SELECT 'asked';", "asked")
            notice = listener.stdout.readline()
        finally:
            listener.kill()
            listener.wait()
    assert 'Asynchronous notification "news" with payload "hello"' in notice


def _asking(client: "subprocess.Popen[str]") -> Callable[[str, str], None]:
    def ask(question: str, answer: str) -> None:
        client.stdin.write(f"{question}\n")
        client.stdin.flush()
        assert client.stdout.readline() == f"{answer}\n"

    return ask
