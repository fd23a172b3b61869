"""A folder for what stands outside of the containers, and a clean machine after them."""

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trustme
from apiserver import ApiServer
from certificates import serving
from containers import PODMAN
from deployments import Site
from folders import open_folder

from redirector.datapath.pins import Datapath
from redirector.lab import Node

CGROUPS = Path("/sys/fs/cgroup")


@pytest.fixture(scope="session", autouse=True)
def _machine() -> Iterator[None]:
    """podman leaves the cgroups that its containers' were in."""
    assert PODMAN.exists(), f"{PODMAN} is not there: make test-images"
    yield
    for pattern in ("libpod_parent/conmon", "libpod_parent"):
        for left in [*CGROUPS.glob(pattern), *CGROUPS.glob(f"*/{pattern}")]:
            # Others' containers may be in it.
            with contextlib.suppress(OSError):
                left.rmdir()


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that any user may enter."""
    with open_folder("/var/tmp") as path:
        yield path


@pytest.fixture
def account(place: Path) -> Path:
    """A service account's token and the API server's authority, as they are mounted."""
    path = place / "account"
    path.mkdir()
    (path / "token").write_text("secret")
    return path


@pytest.fixture
def cluster(account: Path) -> Iterator[ApiServer]:
    """Not up yet: it is to listen in the network of whom it serves."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(account / "ca.crt"))
    made = ApiServer(tls=serving(authority))
    yield made
    made.down()


@pytest.fixture
def site(node: Node, cluster: ApiServer, place: Path, account: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        made = Site(node, cluster, place, account)
        stack.callback(Datapath(made.ground.pins).unload)
        stack.enter_context(made.ground.stack)
        yield made
