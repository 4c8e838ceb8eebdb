"""A real SLURM cluster on one machine: real slurmctld, slurmd and munge, each host in namespaces.

Every host has its own network, pids, mounts and hostname; files are shared, as on a cluster.
The hosts' network is a bridge inside the host `login`, with no way out. The namespaces have no
names and end with their processes, so clusters cannot meet each other, and a cluster ends with
the process that made it even when that one is killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LOGIN = "login"
PROGRAMS = ("slurmctld", "slurmd", "munged", "mungekey", "sbatch", "ip", "nsenter", "unshare")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin"
SPACES = ("--net", "--uts", "--mount", "--pid")

#: States of a job that will not change any more.
ENDED = frozenset(("CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "TIMEOUT"))

#: The first process of a host, and the one that reaps its orphans. It ends with its input.
INIT = """
hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount --bind "$2/nothing" /etc/resolv.conf
mount -t tmpfs -o mode=1777 tmpfs /dev/shm; ip link set lo up
if [ "$1" = login ]; then
    ip link add br0 type bridge; ip address add "$3.1/24" dev br0; ip link set br0 up
fi
echo up; read -r _
if [ "$1" = login ]; then
    munged --force --key-file="$2/munge.key" --socket="$2/munge.socket" --pid-file="$2/munge.pid" \
        --log-file="$2/munged.log" --seed-file="$2/munge.seed"
    slurmctld -D >>"$2/slurmctld.log" 2>&1 &
else
    slurmd -D -N "$1" >>"$2/slurmd.$1.log" 2>&1 &
fi
echo started; read -r _
"""

#: Quick for tests: a node is down after SlurmdTimeout, a requeued job waits for cred_expire, what
#: does not end on SIGTERM is killed after KillWait (seconds, all).
SLURM_CONF = """
ClusterName=lab
SlurmctldHost=login({net}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=8
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
MailProg=/bin/true
SlurmdTimeout={patience}
SlurmctldTimeout={patience}
KillWait=5
MinJobAge=3600
BatchStartTimeout={patience}
MessageTimeout={patience}
CompleteWait=0
UnkillableStepTimeout=20
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
EnforcePartLimits=ALL
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=lowgrace Nodes=ALL State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=15
"""


def obstacle() -> str | None:
    """Why no cluster can be made here, or None."""
    if os.geteuid() != 0:
        return "needs root, for namespaces"
    missing = [program for program in PROGRAMS if not shutil.which(program, path=_PATH)]
    if missing:
        return f"not installed: {', '.join(missing)} (make test-cluster installs Debian's SLURM)"
    tried = subprocess.run(
        ["unshare", *SPACES, "--fork", "ip", "link", "add", "br0", "type", "bridge"],
        capture_output=True,
        text=True,
    )
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


class Cluster(contextlib.AbstractContextManager["Cluster"]):
    """Hosts `login`, `node1`, `node2`, ... with SLURM running.

    Attributes:
        folder: run-time state and logs (slurmctld.log, slurmd.NODE.log); removed by `stop`.
        nodes: names of the compute hosts.
    """

    def __init__(
        self,
        nodes: int = 2,
        cpus: int = 8,
        gpus: int = 0,
        prefix: str = "lab",
        net: str = "10.77.0",
        patience: int = 10,
    ) -> None:
        """Starts the cluster and waits until every node is idle, about 2 s.

        Args:
            nodes: compute hosts.
            cpus: that each claims to have; more than the machine has is fine.
            gpus: that each claims to have: device files that nothing answers.
            prefix: of the folder's name.
            net: first three bytes of the hosts' addresses, seen inside the cluster only.
            patience: seconds until SLURM takes a host that does not answer for lost.

        Raises:
            RuntimeError: it did not come up; the message holds the logs' ends.
        """
        self.nodes = [f"node{k + 1}" for k in range(nodes)]
        self.net = net
        self.patience = patience
        # Short: the path of a unix socket has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir="/tmp"))
        self._hosts: dict[str, subprocess.Popen[str]] = {}
        try:
            self._write_files(cpus, gpus)
            for host in (LOGIN, *self.nodes):
                self.power_on(host)
            self.until(lambda: set(self.node_states().values()) == {"idle"}, 30, "all nodes idle")
        except BaseException as error:
            ends = [f"{p.name}: {p.read_text()[-1500:]}" for p in self.folder.glob("*.log")]
            self.stop()
            if isinstance(error, Exception):
                raise RuntimeError("\n".join(["the cluster is not up", *ends])) from error
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()

    def address(self, host: str) -> str:
        """A host's address inside the cluster."""
        return f"{self.net}.{1 if host == LOGIN else 10 + int(host.removeprefix('node'))}"

    def _write_files(self, cpus: int, gpus: int) -> None:
        folder = self.folder
        folder.chmod(0o755)
        (folder / "state").mkdir()
        (folder / "nothing").touch()
        # slurmd 22.05 loads a cgroup plugin although nothing uses it; "autodetect" may fail.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        hosts = "".join(f"{self.address(host)} {host}\n" for host in (LOGIN, *self.nodes))
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + hosts)
        have = f"Gres=gpu:{gpus} " if gpus else ""
        lines = [
            f"NodeName={node} NodeAddr={self.address(node)} CPUs={cpus} {have}State=UNKNOWN\n"
            for node in self.nodes
        ]
        conf = SLURM_CONF.format(net=self.net, folder=folder, patience=self.patience) + "".join(
            lines
        )
        if gpus:
            conf += "GresTypes=gpu\n"
            for number in range(gpus):  # 195: NVIDIA's
                device = os.makedev(195, number)
                os.mknod(folder / f"nvidia{number}", 0o600 | stat.S_IFCHR, device)
            (folder / "gres.conf").write_text(f"Name=gpu File={folder}/nvidia[0-{gpus - 1}]\n")
        (folder / "slurm.conf").write_text(conf)
        key = folder / "munge.key"
        subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True, env=self.env())

    def env(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of a login shell on this cluster, with `more` in it."""
        mine = {k: v for k, v in os.environ.items() if not re.match("SLURM_|SBATCH_|RANK$", k)}
        return mine | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _PATH} | (more or {})

    # --- hosts

    def power_on(self, host: str) -> None:
        """Starts a host that is off."""
        assert host not in self._hosts, f"{host} is on"
        with (self.folder / f"host.{host}.log").open("a") as log:
            self._hosts[host] = process = subprocess.Popen(
                [
                    *("unshare", *SPACES, "--fork", "--kill-child", "--mount-proc"),
                    *("bash", "-c", INIT, "init", host, str(self.folder), self.net),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.env(),
                start_new_session=True,
            )
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline() != "up\n":
            raise RuntimeError(f"{host} does not start")
        if host != LOGIN:
            self._plug(host)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "started\n"

    def power_off(self, host: str) -> None:
        """A power cut: every process of the host dies at once."""
        process = self._hosts.pop(host)
        process.kill()  # --kill-child: the host's first process, and so all of them, go with it
        process.wait()

    def link(self, node: str, up: bool) -> None:
        """Plugs a node's network cable in, or pulls it out."""
        self._outside(LOGIN, "ip", "link", "set", node, "up" if up else "down")

    def _plug(self, node: str) -> None:
        peer = ["peer", "name", "eth0", "netns", str(self._init(node))]
        end = time.monotonic() + 10
        # The old cable goes with the old namespace, which the kernel clears a moment later.
        while True:
            try:
                self._outside(LOGIN, "ip", "link", "add", node, "type", "veth", *peer)
                break
            except subprocess.CalledProcessError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)
        self._outside(LOGIN, "ip", "link", "set", node, "master", "br0", "up")
        self._outside(node, "ip", "address", "add", f"{self.address(node)}/24", "dev", "eth0")
        self._outside(node, "ip", "link", "set", "eth0", "up")

    def _init(self, host: str) -> int:
        pid = self._hosts[host].pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def _outside(self, host: str, *words: str) -> None:
        """Runs a command in a host's network, but with this machine's pids."""
        command = ["nsenter", "-t", str(self._init(host)), "--net", *words]
        subprocess.run(command, check=True, capture_output=True, text=True)

    def run(
        self,
        host: str,
        *words: str | Path,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        check: bool = True,
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on a host; `env` is added to the environment.

        Raises:
            AssertionError: it failed, and `check` is set.
            subprocess.TimeoutExpired: it took longer than `timeout` seconds.
        """
        head = ["nsenter", "-t", str(self._init(host)), *SPACES, f"--wd={cwd or Path.cwd()}", "--"]
        # nsenter passes no signal on: the command ends when nsenter is ended.
        head += ["setpriv", "--pdeathsig", "KILL"]
        done = subprocess.run(
            [*head, *map(str, words)],
            env=self.env(env),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, (words, done.stdout, done.stderr)
        return done

    # --- jobs

    def sbatch(self, *words: str | Path, **options: Any) -> str:
        """Submits a job from the login host; returns its id."""
        return self.run(LOGIN, "sbatch", "--parsable", *words, **options).stdout.strip()

    def jobs(self, job: str = "") -> list[dict[str, str]]:
        """What `scontrol show job` tells of a job, or of each task of an array."""
        words = ["scontrol", "--oneliner", "show", "job", *([job] if job else [])]
        lines = self.run(LOGIN, *words).stdout.splitlines()
        return [dict(w.split("=", 1) for w in line.split() if "=" in w) for line in lines]

    def states(self, job: str) -> list[str]:
        """States of a job: one, or those of an array's tasks."""
        return [one["JobState"] for one in self.jobs(job)]

    def state(self, job: str) -> str:
        """The state of a job that is no array."""
        (state,) = self.states(job)
        return state

    def wait(self, job: str, timeout: float = 120) -> str:
        """Waits until a job, or each task of an array, has ended.

        Returns:
            Its state; several different ones joined by commas.

        Raises:
            TimeoutError: it has not after `timeout` seconds.
        """
        self.until(lambda: ENDED.issuperset(self.states(job)), timeout, f"the end of job {job}")
        return ",".join(sorted(set(self.states(job))))

    def log(self, job: str) -> str:
        """What a job has printed so far, or the tasks of an array one after the other."""
        paths = [Path(one["StdOut"]) for one in self.jobs(job)]
        return "".join(path.read_text() for path in paths if path.exists())

    def node_states(self) -> dict[str, str]:
        """Each node's state, short, such as idle, alloc or down*; empty before slurmctld is up."""
        told = self.run(LOGIN, "sinfo", "-h", "-N", "-p", "main", "-o", "%N %t", check=False)
        return dict(line.split() for line in told.stdout.splitlines())

    def until(self, met: Callable[[], bool], timeout: float, what: str = "it") -> float:
        """Waits for something; returns the seconds that it took.

        Raises:
            TimeoutError: not within `timeout` seconds; the message holds the queue.
        """
        began = time.monotonic()
        while not met():
            if time.monotonic() - began > timeout:
                queue = self.run(LOGIN, "squeue", "-l", check=False).stdout
                raise TimeoutError(f"{what}: not after {timeout} s\n{queue}")
            time.sleep(0.1)
        return time.monotonic() - began

    def stop(self) -> None:
        """Ends the cluster's processes, and removes its folder."""
        for host in list(self._hosts):
            self.power_off(host)
        shutil.rmtree(self.folder, ignore_errors=True)
