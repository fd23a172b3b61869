"""The modes that root tests run in."""

import pytest

from redirector.datapath.pins import Datapath
from redirector.model import Mode
from redirector.modes.base import ModeDriver
from redirector.modes.ebpf import EbpfMode
from redirector.modes.iptables.driver import IptablesMode


@pytest.fixture(params=list(Mode))
def driver(request: pytest.FixtureRequest, datapath: Datapath) -> ModeDriver:
    """Each mode that must follow the decision rules."""
    return EbpfMode(datapath) if request.param is Mode.EBPF else IptablesMode()
