"""A process that a warm Python runs, as its parent sees it; see server.py.

    python -IS client.py SOCKET PYTHON WORD ...

It imports little, since it starts for each process.
"""

import json
import os
import signal
import socket
import sys

#: Sent on. Others do what they do to any process.
FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def main(address: str, python: str, *words: str) -> None:
    """Has the words run, and ends as what they started ended.

    The real Python runs what is no script and no module, and what inherits more than three streams.
    """
    name = words[1:2] if words[:1] == ("-u",) else words[:1]
    known = name and (name[0] == "-m" or not name[0].startswith("-"))
    if known and len(os.listdir("/proc/self/fd")) == 4:  # the streams, and what lists them
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(address)
            told = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
            content = json.dumps(told).encode()
            socket.send_fds(server, [len(content).to_bytes(8, "big")], [0, 1, 2])
            server.sendall(content)
            for number in FORWARDED:  # those that this process was born to ignore, too
                signal.signal(number, lambda n, _: server.sendall(bytes([n])))
            answer = server.recv(16).decode()
        if answer != "cold":
            end(int(answer))
    os.execv(python, [python, *words])


def end(code: int) -> None:
    """Ends with an exit code, or by the signal of a negative one."""
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
