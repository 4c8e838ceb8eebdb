"""Transfers from elsewhere: bounded in time, repeated, and reported when they fail.

http and https go through httpx, s3, gs, az, hf, file and the like through fsspec, and
``pipe:COMMAND`` through a shell. A transfer that fails for a reason that may pass (a 503, a
connection that breaks or stands still, a file that comes short or damaged, a command that ends with
an error) is repeated after 1, 2, 4, 8 and 16 s; what a server refuses for good (401, 403, 404, 410)
is not.
"""

import contextlib
import itertools
import os
import random
import re
import select
import signal
import ssl
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

import fsspec

from selfdistill.data.errors import BrokenData, UserError, redacted
from selfdistill.data.files import LARGEST

Report = Callable[[str], None]  # takes a line that the user should see
T = TypeVar("T")

#: Tries of one transfer, and seconds before the second; each further wait is twice as long.
TRIES = 6
FIRST_WAIT = 1.0
#: Seconds that a transfer may be silent, or crawl; the variable SELFDISTILL_FETCH_TIMEOUT.
TIMEOUT = 30
#: Bytes a second below which a transfer crawls.
SLOWEST = 1000
# A command may take longer before its first byte: so many times TIMEOUT.
_PATIENCE = 10
# From so many first retries on, a process tells only of transfers that fail twice in a row.
_TOLD = 20
_CHUNK = 2**20
# What a server says of its own state; other 4xx are about the request.
_PASSING = {408, 425, 429}
_GONE = {404, 410}
# The extra of this program that brings what a scheme needs.
_EXTRAS = {"s3": "s3", "gs": "gs", "az": "az", "hf": "hub"}

_told = itertools.count(1)
# Not the global generator: it is seeded, and a training run may draw from it.
_jitter = random.SystemRandom()

# A worker forked while another thread starts a command would inherit the command's pipe, whose end
# then never comes: no fork while a command is being started.
_STARTING = threading.Lock()
os.register_at_fork(
    before=_STARTING.acquire,
    after_in_parent=_STARTING.release,
    after_in_child=_STARTING.release,
)


class NotThere(BrokenData):
    """A URL at which there is nothing, as its server says."""


class Away(BrokenData):
    """A URL that did not come in all tries, and may at another time: an outage, not its file."""


class Retrying(Warning):
    """A transfer failed and is tried again. No UserWarning: these are often hidden."""


class Failure(Exception):
    """One try of a transfer that failed.

    Args:
        reason: In a few words.
        again: Whether another try may succeed.
        absent: Whether it means that there is no such file.
        damaged: Whether all of it came, and is not what it must be.
        cure: What the user can do, where that is known.
    """

    def __init__(
        self,
        reason: str,
        *,
        again: bool = True,
        absent: bool = False,
        damaged: bool = False,
        cure: str = "",
    ) -> None:
        super().__init__(reason)
        self.again, self.absent, self.damaged, self.cure = again, absent, damaged, cure

    def error(self, url: str, tries: int, verb: str = "fetch") -> BrokenData:
        """The line for the user, after so many tries."""
        count, url = f" in {tries} tries" if tries > 1 else "", redacted(url)
        reason = redacted(str(self))
        if self.damaged and self.again:  # never twice the same: not the file, but its way
            return BrokenData(
                f"{url} comes damaged, each time otherwise ({reason}{count}): check the server's"
                " disk and memory, and the proxies on the way"
            )
        if self.damaged:
            return BrokenData(
                f"{url} is not the file that its manifest names ({reason}{count}): upload shards"
                " and manifest.json of the same packing again"
            )
        kind = NotThere if self.absent else Away if self.again else BrokenData
        cure = self.cure or "check the address and that this node reaches it"
        if verb == "fetch":
            cure += " (or take a command: 'pipe:aws s3 cp s3://... -')"
        return kind(f"cannot {verb} {url} ({reason}{count}): {cure}")


def as_retrying(line: str) -> None:
    """The report of who names no other: a Python warning."""
    warnings.warn(line, Retrying, stacklevel=3)


def timeout() -> int:
    """Seconds that a transfer may be silent or slow, from the connection to its end.

    Raises:
        UserError: SELFDISTILL_FETCH_TIMEOUT is no whole number above 0.
    """
    return _variable("SELFDISTILL_FETCH_TIMEOUT", TIMEOUT, "seconds", 30)


def _variable(name: str, default: int, unit: str, example: int) -> int:
    """A whole number above 0 from the environment."""
    given = os.environ.get(name, "")
    if not given:
        return default
    if not re.fullmatch(r"[1-9][0-9]{0,6}", given):
        raise UserError(f"the variable {name} is {given!r}: give whole {unit}, e.g. {example}")
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
        # What the shell started, too: it may go on without it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()


def _http(url: str, fresh: bool) -> Iterator[bytes]:
    """Through httpx: proxies of the environment, logins of ~/.netrc, the system's certificates."""
    import httpx2 as httpx  # a tenth of a second, which local sets need not wait for

    limit = timeout()
    slow = Failure(f"no answer, or less than {SLOWEST / 1000:g} kB/s, for {limit} s")
    headers = {"Accept-Encoding": "identity"}
    if fresh:  # a proxy that keeps a damaged copy would give it again
        headers["Cache-Control"] = "no-cache"
    try:
        with httpx.stream(
            "GET",
            url,
            headers=headers,
            timeout=limit,
            follow_redirects=True,
            verify=ssl.create_default_context(),
        ) as response:
            status = response.status_code
            if response.is_error:
                again = status >= 500 or status in _PASSING
                raise Failure(f"the server said {status}", again=again, absent=status in _GONE)
            count, since = 0, time.monotonic()
            coded = "content-encoding" in response.headers  # though it was asked for none
            for chunk in response.iter_bytes() if coded else response.iter_raw():
                count += len(chunk)
                passed = time.monotonic() - since
                if passed >= limit:
                    if count < SLOWEST * passed:
                        raise slow
                    count, since = 0, time.monotonic()
                yield chunk
    except httpx.TimeoutException:
        raise slow from None
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.TooManyRedirects) as error:
        raise Failure(" ".join(str(error).split()), again=False) from None
    except httpx.ConnectError as error:
        text = " ".join(str(error).split())
        if "CERTIFICATE" in text:  # of a server that signs its own, say
            text += "; SSL_CERT_FILE=ca.pem names one to be trusted"
        raise Failure(f"no connection: {text}", again="CERTIFICATE" not in text) from None
    except httpx.DecodingError as error:
        raise Failure(f"its Content-Encoding is broken: {' '.join(str(error).split())}") from None
    except httpx.RemoteProtocolError as error:
        cut = "incomplete" in str(error) or "complete message" in str(error)
        raise Failure("cut off" if cut else "no answer") from None
    except httpx.TransportError as error:
        text = " ".join(str(error).split())
        raise Failure(f"the connection broke{f': {text}' if text else ''}") from None


def _command(command: str) -> Iterator[bytes]:
    """What a shell command writes."""
    try:
        with _STARTING:
            process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, process_group=0)
    except OSError as error:  # no memory or no number for another process
        raise Failure(" ".join(str(error).split())) from None
    yield from _output(process, _PATIENCE * timeout())
    code = process.returncode
    if code:
        # Commands have no status for a file that is not there. `cat`, also through ssh,
        # `aws s3 cp` and `gsutil` end with 1 (ssh itself with 255), curl with 22.
        raise Failure(f"exit {code}", absent=code in (1, 22, 78))


def _filesystem(url: str) -> Iterator[bytes]:
    """Through fsspec's file system for the scheme."""
    try:
        with fsspec.open(url, "rb") as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
    except Exception as error:  # each file system has its own
        raise of_store(error, url) from None


def of_store(error: Exception, url: str) -> Failure:
    """What an error of one of fsspec's file systems means.

    Args:
        error: Any. Its text is shown: libraries put addresses and names into it, and no keys.
        url: That was asked for.
    """
    scheme, _, rest = url.partition("://")
    text, kind = " ".join(str(error).split()), type(error).__name__
    if "NoSuchBucket" in f"{text} {error.__cause__!r}" or "bucket does not exist" in text:
        bucket = f"{scheme}://{rest.partition('/')[0].rpartition('@')[2]}"
        cure = f"check the name, and the variable AWS_ENDPOINT_URL, or make it (aws s3 mb {bucket})"
        return Failure("there is no such bucket", again=False, cure=cure)
    if isinstance(error, FileNotFoundError):
        return Failure(text, again=False, absent=True)
    if isinstance(error, ImportError):  # fsspec names the package
        cure = f"pip install selfdistill[{_EXTRAS[scheme]}]" if scheme in _EXTRAS else ""
        return Failure(f"{scheme}: {text}", again=False, cure=cure)
    if kind in ("NoCredentialsError", "PartialCredentialsError"):
        cure = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile (AWS_PROFILE)"
        return Failure("there are no credentials", again=False, cure=cure)
    if isinstance(error, PermissionError) and scheme != "file":
        cure = "check the credentials of the environment, and what they may do"
        return Failure(f"refused: {text}", again=False, cure=cure)
    if isinstance(error, ValueError | PermissionError):
        return Failure(f"{scheme}: {text}", again=False)
    return Failure(f"{kind}: {text}", again=scheme != "file")


def chunks(url: str, fresh: bool = False) -> Generator[bytes, None, None]:
    """The bytes of a URL, in one try.

    Args:
        url: http, https, what fsspec opens, or ``pipe:COMMAND``.
        fresh: Whether caches on the way should ask for it anew.

    Yields:
        Pieces of at most 1 MiB.

    Raises:
        Failure: It cannot be fetched.
        UserError: See `timeout`.
    """
    if url.startswith("pipe:"):
        yield from _command(url.removeprefix("pipe:"))
    elif url.lower().startswith(("http://", "https://")):
        yield from _http(url, fresh)
    else:
        yield from _filesystem(url)


def retry(
    url: str,
    once: Callable[[int], T],
    report: Report | None = None,
    tries_if_absent: int | None = None,
    verb: str = "fetch",
) -> T:
    """Does a transfer until it succeeds.

    Args:
        url: For the messages.
        once: Does it once; it gets the number of the try, from 1 on.
        report: Told of each further try in a line; by default `as_retrying`.
        tries_if_absent: Tries where a failure looks like a file that is not there; by default all.
        verb: What is done, for the message of its failure.

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
                raise failure.error(url, attempt, verb) from None
            reason = str(failure)
        # Many nodes that lost the same server must not all come back in the same moment.
        wait = FIRST_WAIT * 2 ** (attempt - 1) * _jitter.uniform(0.75, 1.25)
        if attempt > 1 or next(_told) <= _TOLD:
            following = f"trying again in {wait:.2g} s ({attempt + 1} of {tries})"
            # The reason, too: libraries put the address into their errors.
            (report or as_retrying)(redacted(f"{url}: {reason}; {following}"))
        time.sleep(wait)
    raise AssertionError("unreachable")


def fetch_bytes(url: str, report: Report | None = None) -> bytes:
    """A small remote file, such as a manifest, whole.

    Args:
        url: See `chunks`.
        report: See `retry`.

    Returns:
        Its bytes. Nothing says what they should be: a connection that damages them is noticed only
        by what they then mean.

    Raises:
        NotThere: There is no such file.
        BrokenData: It cannot be fetched.
    """
    most = _variable("SELFDISTILL_FETCH_LARGEST", LARGEST >> 20, "MiB", 4096) << 20

    def once(attempt: int) -> bytes:
        content = bytearray()
        with contextlib.closing(chunks(url, fresh=attempt > 1)) as stream:
            for chunk in stream:
                content += chunk
                if len(content) > most:
                    raise Failure(
                        f"more than {most >> 20} MiB; SELFDISTILL_FETCH_LARGEST=MIB allows more",
                        again=False,
                    )
        if not content:
            raise Failure("nothing came")
        return bytes(content)

    # The exit status by which commands say that a file is not there may mean anything: once more.
    return retry(url, once, report, tries_if_absent=2)
