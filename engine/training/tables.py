"""One rank a node opens a split's table of members, and hands the open file to the others.

The table may have gigabytes and lies on the disk that all nodes share: a thousand ranks that open
it at once are a herd there. A descriptor that is handed over a socket (SCM_RIGHTS) costs that disk
nothing, and all ranks of a node map the same pages.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress

from selfdistill.data.errors import UserError
from selfdistill.data.shards.manifest import Manifest, is_remote
from selfdistill.engine.runtime.distributed import Ranks, gather
from selfdistill.engine.runtime.failures import refused

#: Seconds for a node's ranks to come; who has not got the file then opens it when it is used.
_PATIENCE = 60


def share_tables(ranks: Ranks, manifests: Sequence[Manifest]) -> None:
    """Opens the tables of local splits, once a node. Every rank calls it.

    Those of remote sets come from the node's cache.

    Raises:
        UserError: A table is missing, or is not the one that the manifest names.
    """
    name = f"\0selfdistill-{secrets.token_hex(16)}"  # in the kernel's memory, gone with the process
    known = gather((_node(), name))
    mine = [rank for rank, (node, _) in enumerate(known) if node == known[ranks.rank][0]]
    first = mine[0] == ranks.rank
    sets = [one for joined in manifests for one in joined.sets if not is_remote(one.root)]
    held, server = [], None
    error: UserError | None = None
    if first:
        try:
            for one in sets:
                held.append(one.open_members())
                one.read_members(held[-1])
        except (UserError, OSError) as caught:
            error = refused(caught)
        server = _listening(name, len(mine)) if len(mine) > 1 and not error else None
    try:
        if errors := [found for found in gather(error) if found]:
            raise errors[0]
        if server is not None:
            _hand_over(server, [file.fileno() for file in held], len(mine) - 1)
        elif not first:
            for one, descriptor in zip(sets, _taken(known[mine[0]][1], len(sets)), strict=False):
                with open(descriptor, "rb") as file:
                    one.read_members(file, check=False)
    finally:
        for file in held:
            file.close()
        if server is not None:
            server.close()


def _node() -> tuple[str, int]:
    """Equal for processes that reach each other by the names of sockets."""
    return socket.gethostname(), os.stat("/proc/self/ns/net").st_ino


def _listening(name: str, ranks: int) -> socket.socket | None:
    with suppress(OSError):
        server = socket.socket(socket.AF_UNIX)
        server.bind(name)
        server.listen(ranks)
        return server
    return None


def _own(peer: socket.socket) -> bool:
    """Whether a process of the same user is at the other end."""
    told = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", told)[1]
    return uid == os.geteuid()


def _hand_over(server: socket.socket, descriptors: list[int], peers: int) -> None:
    end = time.monotonic() + _PATIENCE
    with suppress(OSError):  # they open it themselves then
        while peers and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            with server.accept()[0] as peer:
                if _own(peer):
                    socket.send_fds(peer, [b"members"], descriptors)
                    peers -= 1


def _taken(name: str, count: int) -> list[int]:
    with suppress(OSError), socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(_PATIENCE)
        peer.connect(name)
        if _own(peer):
            return list(socket.recv_fds(peer, 64, count)[1])
    return []
