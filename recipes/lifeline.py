"""Processes that work together end together, also where no launcher watches over them.

Each holds a connection to the first process. When one dies, the system closes its connection; when a machine is lost,
unanswered probes tell within half a minute. A process that is busy for an hour, or stopped in a debugger, keeps its
connection: nobody is dead because he is slow.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import socket
import sys
import threading

from accelerate.utils import broadcast_object_list

GRACE = 10.0  # seconds in which a survivor may end with an error of its own, which says more
PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a lost machine is noticed after 25 s
JOINING = 60.0  # seconds to connect
RELEASED = b"."
SECRET = 16  # bytes that tell our processes from whoever else connects


class Lifeline:
    """Ends this process, with exit code 1 and a message, soon after another one has died; until `release`.

    Must be made by all ``processes``, in a process group of theirs; does nothing for one process. The first one sees
    every death, the others see the first one end. Raises OSError if the first process cannot be reached.
    """

    def __init__(self, rank: int, processes: int, grace: float = GRACE) -> None:
        self.rank, self.grace, self.released = rank, grace, threading.Event()
        self.others: dict[int, socket.socket] = {}
        if processes > 1:
            self.others = _accept(processes) if rank == 0 else {0: _connect(rank)}
        for other, connection in self.others.items():
            os.register_at_fork(after_in_child=connection.close)  # loader processes may outlive this one
            threading.Thread(target=self._watch, args=(other, connection), daemon=True).start()

    def release(self) -> None:
        """Tell the others that this process ends because its work is done."""
        self.released.set()
        for connection in self.others.values():
            with contextlib.suppress(OSError):  # that one has ended already
                connection.sendall(RELEASED)

    def _watch(self, other: int, connection: socket.socket) -> None:
        try:
            done = connection.recv(1) == RELEASED
        except OSError:  # no answer to the probes
            done = False
        if done or self.released.wait(self.grace):
            return
        print(
            f"process {self.rank} ends, because process {other} was killed, has failed or is out of reach; the same "
            "command goes on from what is saved",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # the main thread may be waiting for the dead one


def _accept(processes: int) -> dict[int, socket.socket]:
    """The first process's connections by rank."""
    secret = secrets.token_bytes(SECRET)
    others: dict[int, socket.socket] = {}
    with _listen(os.environ["MASTER_ADDR"], processes) as server:
        server.settimeout(JOINING)
        broadcast_object_list([(server.getsockname()[1], secret)])
        while len(others) < processes - 1:
            connection, _ = server.accept()
            connection.settimeout(JOINING)
            greeting = b""
            with contextlib.suppress(OSError):  # of a stranger who says nothing
                greeting = connection.recv(SECRET + 4, socket.MSG_WAITALL)
            if greeting[:SECRET] == secret:
                others[int.from_bytes(greeting[SECRET:], "big")] = _probed(connection)
            else:
                connection.close()
    return others


def _listen(address: str, processes: int) -> socket.socket:
    """Where the processes meet: on this machine alone if all of them are here, else wherever others can reach it."""
    known = socket.gethostbyname(address)
    if ipaddress.ip_address(known).is_loopback:
        return socket.create_server((known, 0), backlog=processes)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=processes, dualstack_ipv6=both)


def _connect(rank: int) -> socket.socket:
    """Another process's connection to the first."""
    (known,) = broadcast_object_list([None])
    port, secret = known
    connection = socket.create_connection((os.environ["MASTER_ADDR"], port), JOINING)
    connection.sendall(secret + rank.to_bytes(4, "big"))
    return _probed(connection)


def _probed(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        if hasattr(socket, name):  # not everywhere
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection
