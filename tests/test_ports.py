from __future__ import annotations

from tests.ports import BUS, PORTS, _share, free_port


def test_ports_are_below_those_of_outgoing_connections_and_no_bus_meets_a_server() -> None:
    port = free_port()
    assert port in PORTS
    assert port + BUS not in PORTS
    assert PORTS.stop + BUS < 32768
    assert free_port() != port


def test_processes_side_by_side_share_the_ports() -> None:
    assert _share(PORTS, None, 1) == PORTS
    shares = [set(_share(PORTS, f"gw{number}", 3)) for number in range(3)]
    assert set.union(*shares) == set(PORTS)
    assert sum(map(len, shares)) == len(PORTS)
