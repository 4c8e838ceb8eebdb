"""Transfers from elsewhere: bounded in time, tried again, and told of when they fail.

Whatever `webdataset.gopen` opens can be fetched: http and https (through curl), ``pipe:COMMAND``,
gs, hf, sftp ... A transfer that fails for a reason that may pass (a 503, a connection that breaks
or stands still, a file that comes short or damaged, a command that ends with an error) is tried
again after 1, 2, 4, 8 and 16 s; what a server refuses for good (401, 403, 404, 410) is not.
"""

import contextlib
import itertools
import os
import random
import re
import select
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar
from urllib.parse import urlparse

import webdataset
from webdataset.gopen import Pipe, gopen_curl, gopen_schemes, rewrite_url

from selfdistill.data.errors import BrokenData, UserError

Report = Callable[[str], None]  # takes a line that the user should see
T = TypeVar("T")

#: Tries of one transfer, and seconds before the second; each further wait is twice as long.
TRIES = 6
FIRST_WAIT = 1.0
#: Seconds that a transfer may be silent, or crawl; the variable SELFDISTILL_FETCH_TIMEOUT.
TIMEOUT = 30
#: Bytes a second below which a transfer crawls.
SLOWEST = 1000
# Commands may think for longer before they say something: so many times TIMEOUT.
_PATIENCE = 10
# From so many first retries on, a process tells only of transfers that fail twice in a row.
_TOLD = 20
_CHUNK = 2**20

# What curl's exit status means, where a user can do something with it.
_SAID = {
    5: "the proxy's name is not known",
    6: "the host's name is not known",
    7: "no connection",
    18: "cut off",
    35: "no secure connection",
    52: "no answer",
    56: "the connection broke",
    60: "the certificate is not trusted",
    67: "the login is refused",
    78: "no such file",
}
# Of these no second try is better: bad addresses, logins, certificates; a file that is not there.
_FINAL = {1, 2, 3, 4, 9, 47, 60, 67, 77, 78}
# What a server says of its own state; other 4xx are about the request.
_PASSING = {408, 425, 429}
_GONE = {404, 410}

_told = itertools.count(1)
# Not the global generator: it is seeded, and a training run may draw from it.
_jitter = random.SystemRandom()

# A worker forked while another thread starts curl would inherit curl's pipes, whose end then never
# comes: no fork while a command is being started.
_STARTING = threading.Lock()
os.register_at_fork(
    before=_STARTING.acquire,
    after_in_parent=_STARTING.release,
    after_in_child=_STARTING.release,
)


class NotThere(BrokenData):
    """A URL at which there is nothing, as its server says."""


class Retrying(Warning):
    """A transfer failed and is tried again. No UserWarning: these are often hidden."""


class Failure(Exception):
    """One try of a transfer that failed.

    Args:
        reason: In a few words.
        again: Whether another try may succeed.
        absent: Whether it means that there is no such file.
        damaged: Whether all of it came, and is not what it must be.
    """

    def __init__(
        self, reason: str, *, again: bool = True, absent: bool = False, damaged: bool = False
    ) -> None:
        super().__init__(reason)
        self.again, self.absent, self.damaged = again, absent, damaged

    def error(self, url: str, tries: int) -> BrokenData:
        """The line for the user, after so many tries."""
        count = f" in {tries} tries" if tries > 1 else ""
        if self.damaged and self.again:  # never twice the same: not the file, but its way
            return BrokenData(
                f"{url} comes damaged, each time otherwise ({self}{count}): check the server's disk"
                " and memory, and the proxies on the way"
            )
        if self.damaged:
            return BrokenData(
                f"{url} is not the file that its manifest names ({self}{count}): upload shards and"
                " manifest.json of the same packing again"
            )
        kind = NotThere if self.absent else BrokenData
        return kind(
            f"cannot fetch {url} ({self}{count}): check the address and that this node reaches it"
            " (schemes without a handler go through pipe:, e.g. 'pipe:aws s3 cp s3://... -')"
        )


def as_retrying(line: str) -> None:
    """The report of who names no other: a Python warning."""
    warnings.warn(line, Retrying, stacklevel=3)


def timeout() -> int:
    """Seconds that a transfer may be silent (connecting, at its start, in its midst), or crawl.

    Raises:
        UserError: SELFDISTILL_FETCH_TIMEOUT is no whole number above 0.
    """
    given = os.environ.get("SELFDISTILL_FETCH_TIMEOUT", "")
    if not given:
        return TIMEOUT
    if not re.fullmatch(r"[1-9][0-9]{0,6}", given):
        raise UserError(
            f"the variable SELFDISTILL_FETCH_TIMEOUT is {given!r}: give whole seconds, e.g. 30"
        )
    return int(given)


def _output(process: "subprocess.Popen[bytes]", patience: float) -> Iterator[bytes]:
    """What a command writes; it has ended when this has, killed if need be."""
    assert process.stdout is not None
    # The descriptor itself: a buffered reader would wait for a whole chunk.
    fd = process.stdout.fileno()
    ready = select.poll()
    ready.register(fd, select.POLLIN)
    try:
        while True:
            if not ready.poll(patience * 1000):
                raise Failure(f"nothing came for {patience:g} s")
            chunk = os.read(fd, _CHUNK)
            if not chunk:
                break
            yield chunk
        process.wait()
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def _curl(url: str, fresh: bool) -> Iterator[bytes]:
    """Through curl: its proxies, its .curlrc and with it .netrc."""
    limit = timeout()
    words = ["curl", "-f", "-sS", "-L", "--connect-timeout", str(limit)]
    words += ["--speed-limit", str(SLOWEST), "--speed-time", str(limit)]
    if fresh:  # a proxy that keeps a damaged copy would give it again
        words += ["-H", "Cache-Control: no-cache"]
    # Its messages go to memory: a pipe that nobody reads could fill up and stop it.
    with os.fdopen(os.memfd_create("curl"), "w+b") as said:
        try:
            with _STARTING:
                process = subprocess.Popen([*words, url], stdout=subprocess.PIPE, stderr=said)
        except FileNotFoundError:
            raise Failure("curl is not installed", again=False) from None
        except OSError as error:  # no memory or no number for another process
            raise Failure(f"curl does not start: {error.strerror}") from None
        # Its own limits say more, so they come first; but it averages its speed over 5 s and more.
        yield from _output(process, limit + 0.5)
        if process.returncode:
            said.seek(0)
            raise _curl_failure(process.returncode, said.read().decode(errors="replace"), limit)


def _curl_failure(code: int, said: str, limit: int) -> Failure:
    # All refusals are exit 22; the text tells 404 from 403 and 503.
    status = re.search(r"returned error: (\d{3})", said) if code == 22 else None
    if status:
        number = int(status[1])
        return Failure(
            f"the server said {number}",
            again=number >= 500 or number in _PASSING,
            absent=number in _GONE,
        )
    if code == 28:
        return Failure(f"no answer, or less than {SLOWEST / 1000:g} kB/s, for {limit} s")
    what = f"{_SAID[code]}, exit {code}" if code in _SAID else f"exit {code}"
    return Failure(what, again=code not in _FINAL, absent=code == 78)


def _other(url: str) -> Iterator[bytes]:
    """Through webdataset's handler for it: a command, or a file."""
    try:
        with _STARTING:
            stream = webdataset.gopen(url, "rb")
        if not isinstance(stream, Pipe):
            with stream:
                while chunk := stream.read(_CHUNK):
                    yield chunk
            return
    except (ValueError, ImportError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())
        absent = url.startswith("file:") and isinstance(error, FileNotFoundError)
        raise Failure(reason, again=False, absent=absent) from None
    except OSError as error:
        raise Failure(" ".join(str(error).split()), again=not url.startswith("file:")) from None
    yield from _output(stream.proc, _PATIENCE * timeout())
    code = stream.proc.returncode
    if code not in stream.ignore_status:
        # Commands have no status for a file that is not there. `cat`, also through ssh,
        # `aws s3 cp` and `gsutil` end with 1 (ssh itself with 255), curl for hf with 22.
        raise Failure(f"exit {code}", absent=code in (1, 22, 78))


def chunks(url: str, fresh: bool = False) -> Generator[bytes, None, None]:
    """The bytes of a URL, in one try.

    Args:
        url: What `webdataset.gopen` opens.
        fresh: Whether caches on the way should ask for it anew.

    Yields:
        Pieces of at most 1 MiB.

    Raises:
        Failure: It cannot be fetched.
        UserError: See `timeout`.
    """
    real = rewrite_url(url)
    # Whoever gave a scheme another handler gets that one.
    own = gopen_schemes.get(urlparse(real).scheme) is gopen_curl
    yield from _curl(real, fresh) if own else _other(url)


def retry(
    url: str,
    once: Callable[[int], T],
    report: Report | None = None,
    tries_if_absent: int | None = None,
) -> T:
    """Does a transfer until it succeeds.

    Args:
        url: For the messages.
        once: Does it once; it gets the number of the try, from 1 on.
        report: Told of each further try in a line; by default `as_retrying`.
        tries_if_absent: Tries where a failure looks like a file that is not there; by default all.

    Returns:
        What `once` returned.

    Raises:
        BrokenData: The last failure is final, or the tries are used up.
    """
    for attempt in itertools.count(1):
        try:
            return once(attempt)
        except Failure as failure:
            tries = TRIES
            if failure.absent and tries_if_absent is not None:
                tries = min(TRIES, tries_if_absent)
            if not failure.again or attempt >= tries:
                raise failure.error(url, attempt) from None
            reason = str(failure)
        # Many nodes that lost the same server must not all come back in the same moment.
        wait = FIRST_WAIT * 2 ** (attempt - 1) * _jitter.uniform(0.75, 1.25)
        if attempt > 1 or next(_told) <= _TOLD:
            (report or as_retrying)(
                f"{url}: {reason}; trying again in {wait:.2g} s ({attempt + 1} of {tries})"
            )
        time.sleep(wait)
    raise AssertionError("unreachable")


def fetch_bytes(url: str, report: Report | None = None) -> bytes:
    """A small remote file, such as a manifest, whole.

    Args:
        url: What `webdataset.gopen` opens.
        report: See `retry`.

    Returns:
        Its bytes. Nothing says what they should be: a connection that damages them is noticed only
        by what they then mean.

    Raises:
        NotThere: There is no such file.
        BrokenData: It cannot be fetched.
    """

    def once(attempt: int) -> bytes:
        with contextlib.closing(chunks(url, fresh=attempt > 1)) as stream:
            content = b"".join(stream)
        if not content:
            raise Failure("nothing came")
        return content

    # The exit status by which commands say that a file is not there may mean anything: once more.
    return retry(url, once, report, tries_if_absent=2)
