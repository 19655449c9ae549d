from __future__ import annotations

import subprocess
import sys

from tests.ports import BUS, PORTS, free_port


def test_ports_are_below_those_of_outgoing_connections_and_no_bus_meets_a_server() -> None:
    port = free_port()
    assert port in PORTS
    assert port + BUS not in PORTS
    assert PORTS.stop + BUS < 32768
    assert free_port() != port


def test_another_process_does_not_get_a_reserved_port() -> None:
    port = free_port()
    program = f"from tests import ports; print(ports._reserve({port}), ports._reserve({PORTS.stop}))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False True\n"
