"""Hosts without machines: network namespaces on one switch, each with its own sshd.

    stranger   h1   h2         each: eth0 with 10.77.0.x, lo, a host name, /etc/hosts, sshd
        |       |    |
        +---- switch           a bridge in a namespace of its own

As on Debian, each host maps its own name to 127.0.1.1 and the others' to their addresses.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

TOOLS = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "unshare": "mount"}
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def missing() -> str | None:
    """Say why there can be no such hosts here, None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [package for tool, package in TOOLS.items() if shutil.which(tool, path=PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    name = f"hvdx{secrets.token_hex(3)}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "the kernel or container forbids network namespaces"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


class Hosts:
    """Hosts on one network; make one with :func:`hosts`."""

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self.folder = folder
        self.prefix = f"hvdx{secrets.token_hex(3)}"
        self.addresses = {name: f"10.77.0.{n}" for n, name in enumerate(names, start=1)}

    def command(self, name: str, *command: str) -> list[str]:
        """Return the command that runs ``command`` on host ``name``."""
        rename = 'hostname "$0" && exec "$@"'
        inside = ["unshare", "--uts", "sh", "-c", rename, name, *command]
        return ["ip", "netns", "exec", self._space(name), *inside]

    def run(self, name: str, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run ``command`` on host ``name`` to its end."""
        settings = {"capture_output": True, "text": True, "timeout": 240, **options}
        return subprocess.run(self.command(name, *command), **settings)

    def start(self, name: str, *command: str, **options: Any) -> subprocess.Popen[str]:
        """Start ``command`` on host ``name``."""
        settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **options}
        return subprocess.Popen(self.command(name, *command), **settings)

    def pids(self, name: str) -> set[int]:
        """Return the processes of host ``name``."""
        listed = _ip("netns", "pids", self._space(name), check=False)
        return {int(pid) for pid in listed.split()}

    def _space(self, name: str) -> str:
        return f"{self.prefix}-{name}"

    def build(self) -> None:
        """Make switch, hosts and keys, and start each sshd."""
        _ip("netns", "add", self._space("switch"))
        _ip("-n", self._space("switch"), "link", "add", "bridge0", "type", "bridge")
        _ip("-n", self._space("switch"), "link", "set", "bridge0", "up")
        for key in ("host_key", "user_key"):
            keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key)]
            subprocess.run(keygen, check=True)
        Path("/run/sshd").mkdir(exist_ok=True)
        for name, address in self.addresses.items():
            self._build_host(name, address)

    def _build_host(self, name: str, address: str) -> None:
        space, switch = self._space(name), self._space("switch")
        known = {**self.addresses, name: "127.0.1.1"}
        etc = Path("/etc/netns", space)
        (etc / "ssh").mkdir(parents=True)
        lines = ["127.0.0.1 localhost", *(f"{where} {who}" for who, where in known.items())]
        (etc / "hosts").write_text("\n".join(lines) + "\n")
        (etc / "ssh" / "ssh_config").write_text(
            f"Host *\n  IdentityFile {self.folder}/user_key\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {self.folder}/known_hosts_{name}\n"
        )
        (etc / "ssh" / "sshd_config").write_text(
            f"HostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/user_key.pub\n"
            "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPidFile none\n"
            "PermitRootLogin prohibit-password\n"
        )
        _ip("netns", "add", space)
        _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", name, "type", "veth", "peer", "eth0", "netns", space)
        _ip("-n", switch, "link", "set", name, "master", "bridge0", "up")
        _ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")

    def add_interface(self, name: str, interface: str) -> None:
        """Give host ``name`` one more interface, which leads nowhere."""
        space = self._space(name)
        _ip("-n", space, "link", "add", interface, "type", "veth", "peer", f"{interface}-end")
        _ip("-n", space, "address", "add", "10.78.0.1/24", "dev", interface)
        _ip("-n", space, "link", "set", interface, "up")

    def link(self, name: str, state: str) -> None:
        """Have the switch cut host ``name`` off (``down``), or connect it again (``up``)."""
        _ip("-n", self._space("switch"), "link", "set", name, state)

    def slow(self, name: str, rate: str | None) -> None:
        """Limit what goes to host ``name``, such as ``256kbit``; None lifts it."""
        tc = ["tc", "-n", self._space("switch"), "qdisc"]
        if rate is None:
            subprocess.run([*tc, "del", "dev", name, "root"], check=True)
        else:
            shaper = ["tbf", "rate", rate, "burst", "4kb", "latency", "500ms"]
            subprocess.run([*tc, "add", "dev", name, "root", *shaper], check=True)

    def serve_ssh(self, name: str) -> None:
        """Start sshd on host ``name``; it listens once this returns, for it forks then."""
        sshd = shutil.which("sshd", path=PATH)
        assert sshd
        self.run(name, sshd, "-f", "/etc/ssh/sshd_config", check=True)

    def destroy(self) -> None:
        """Remove everything, whatever the state."""
        for name in (*self.addresses, "switch"):
            for pid in self.pids(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", self._space(name)], capture_output=True)
            shutil.rmtree(Path("/etc/netns", self._space(name)), ignore_errors=True)


@contextlib.contextmanager
def hosts(*names: str, without_ssh: Sequence[str] = ()) -> Iterator[Hosts]:
    """Provide hosts of these names, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="hvdx-hosts-") as folder:
        made = Hosts(names, Path(folder))
        try:
            made.build()
            for name in names:
                if name not in without_ssh:
                    made.serve_ssh(name)
            yield made
        finally:
            made.destroy()


def _ip(*words: str, check: bool = True) -> str:
    ip = shutil.which("ip", path=PATH)
    assert ip
    return subprocess.run([ip, *words], check=check, capture_output=True, text=True).stdout
