"""The shell script by which a rank is started, here or over ssh.

``sh -s`` reads it from standard input. So neither the environment, which may hold tokens, nor
the command's wrapping shows in ``ps``; and standard input, kept open, is the rank's lifeline:
when it ends, because the launcher closed it, was killed, or the network failed, a watcher ends
the rank's process group. That needs no agent on the other host. Before it closes it, the launcher
may write there how many tenths of a second the rank has from SIGTERM to SIGKILL.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from shlex import join, quote

GRACE_SECONDS = 5

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# The braces make sh read everything before it runs anything: what it runs must not eat the rest
# of the script. `kill 0` means the process group, which is the rank's own: the launcher starts
# it in a new session, and so does sshd. $$ is the shell, which becomes the rank or waits for it.
_SCRIPT = """\
{{
{exports}
exec 3<&0 </dev/null
(
  trap '' HUP INT TERM
  tenths=$(cat <&3)
  kill -TERM 0
  tenths=${{tenths:-{tenths}}}
  while [ $tenths -gt 0 ] && kill -0 $$; do sleep 0.1; tenths=$((tenths - 1)); done
  kill -KILL 0
) >/dev/null 2>&1 &
{run}
}}
"""


def local_script(command: Sequence[str]) -> str:
    """Return the script that becomes ``command``; the environment is inherited."""
    tenths = GRACE_SECONDS * 10
    return _SCRIPT.format(exports="", tenths=tenths, run=f"exec {join(command)} 3<&-")


def remote_script(command: Sequence[str], environ: Mapping[str, str], directory: str) -> str:
    """Return the script that runs ``command`` on another host.

    The shell stays: it turns a deadly signal into an exit code that ssh passes on.
    """
    exports = "\n".join(
        f"export {name}={quote(value)}" for name, value in environ.items() if _NAME.fullmatch(name)
    )
    run = f"cd {quote(directory)} || exit 1\ntrap : HUP INT TERM\n{join(command)} 3<&-\nexit $?"
    return _SCRIPT.format(exports=exports, tenths=GRACE_SECONDS * 10, run=run)
