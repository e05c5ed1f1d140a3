"""Namespaces of sandboxed programs: a read-only root file system, a private network, and no privileges."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from roll_gspo.sandbox import syscalls
from roll_gspo.sandbox.syscalls import MS_BIND, MS_MOVE, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_PRIVATE, MS_RDONLY, MS_REC

PACKAGES = "/packages"
USER = 1000  # user id inside the namespace
_NOBODY = 65534  # user id outside if root starts the sandbox, because files of the kernel belong to root
_DEVICES = ("null", "zero", "full", "random", "urandom")
_OLD, _NEW = "/old", "/new"


@dataclass(frozen=True)
class VisibleFiles:
    """Files of the host that are visible in the sandbox, read-only.

    Attributes:
        folders: absolute paths of folders and files, visible at the same path.
        hidden: folders within them that appear empty.
        links: symbolic links in the root of the host, as (path, target).
        packages: Python packages as (folder or file, name), visible below `PACKAGES`.
    """

    folders: tuple[str, ...]
    hidden: tuple[str, ...]
    links: tuple[tuple[str, str], ...]
    packages: tuple[tuple[str, str], ...]


def enter(files: VisibleFiles) -> None:
    """Move this process into new namespaces whose root contains only the visible files.

    Raises:
        OSError: the kernel or the settings of the host do not allow it; the message has the system call.
    """
    _unshare_and_map_users()
    syscalls.mount("none", "/", flags=MS_REC | MS_PRIVATE)
    syscalls.mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID, "mode=755,size=1m")
    os.mkdir("/tmp" + _OLD)
    os.mkdir("/tmp" + _NEW)
    syscalls.pivot_root("/tmp", "/tmp" + _OLD)
    os.chdir("/")
    syscalls.mount("tmpfs", _NEW, "tmpfs", MS_NOSUID, "mode=755,size=1m")
    _populate_root(files)
    syscalls.unmount(_OLD)
    os.chdir(_NEW)
    syscalls.pivot_root(".", ".")
    syscalls.unmount(".")
    os.chdir("/")
    syscalls.mount("none", "/", flags=syscalls.MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID)


def enter_program_namespaces(tmp_mb: int) -> None:
    """Give this process a private /tmp, and its children a new PID namespace. Call it after `enter`.

    Raises:
        OSError: see `enter`.
    """
    syscalls.unshare(syscalls.NEW_NS | syscalls.NEW_PID | syscalls.NEW_IPC)
    syscalls.mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"mode=777,size={tmp_mb}m,nr_inodes=4096")


def mount_own_proc() -> None:
    """Replace the /proc of the host by that of the PID namespace. Call it in the first process of the namespace.

    The kernel allows this only while a complete /proc is mounted. If it does not, the sandbox has no /proc, which few
    programs need.
    """
    with contextlib.suppress(OSError):
        syscalls.mount("proc", "/.proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "subset=pid,hidepid=2")
    syscalls.unmount("/proc")
    if os.path.exists("/.proc/self"):
        syscalls.mount("/.proc", "/proc", flags=MS_MOVE)


def drop_privileges() -> None:
    """Permanently become an ordinary user without capabilities.

    Raises:
        OSError: a privilege could not be dropped.
    """
    changes_user = os.getuid() != USER
    if changes_user:
        os.setgroups([])
    syscalls.drop_capabilities(USER if changes_user else None)
    syscalls.set_no_new_privs()
    syscalls.make_undumpable()


def _unshare_and_map_users() -> None:
    """Enter new namespaces of all kinds except PID.

    If root starts the sandbox, a second user is mapped, which programs run as. Other users map only themselves.
    """
    flags = (
        syscalls.NEW_USER
        | syscalls.NEW_NS
        | syscalls.NEW_NET
        | syscalls.NEW_IPC
        | syscalls.NEW_UTS
        | syscalls.NEW_CGROUP
    )
    user, group = os.getuid(), os.getgid()
    if user:
        syscalls.unshare(flags)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{USER} {user} 1")
        _write("/proc/self/gid_map", f"{USER} {group} 1")
        return
    read_end, write_end = os.pipe()
    helper = os.fork()  # only a process outside the namespace may map several users
    if not helper:
        os.close(write_end)
        os.read(read_end, 1)
        code = 0
        try:
            _write(f"/proc/{os.getppid()}/uid_map", f"0 0 1\n{USER} {_NOBODY} 1")
            _write(f"/proc/{os.getppid()}/gid_map", f"0 0 1\n{USER} {_NOBODY} 1")
        except OSError as error:
            code = error.errno or 1
        os._exit(code)
    os.close(read_end)
    try:
        syscalls.unshare(flags)
    finally:
        os.close(write_end)
        _, status = os.waitpid(helper, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise OSError(code, f"mapping user {_NOBODY} into a user namespace: {os.strerror(abs(code))}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _populate_root(files: VisibleFiles) -> None:
    for path in files.folders:
        _bind_into_root(path, path)
    for path, name in files.packages:
        _bind_into_root(path, f"{PACKAGES}/{name}")
    for path in files.hidden:
        syscalls.mount("tmpfs", _NEW + path, "tmpfs", MS_NOSUID | MS_RDONLY, "mode=555,size=4k")
    for path, target in files.links:
        os.symlink(target, _NEW + path)
    os.makedirs(_NEW + "/dev")
    for device in _DEVICES:
        _touch(f"{_NEW}/dev/{device}")
        # A read-only mount protects the mode and the times of a device; it can still be written.
        syscalls.bind_mount(f"{_OLD}/dev/{device}", f"{_NEW}/dev/{device}")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"{_NEW}/dev/{name}")
    os.symlink("/proc/self/fd", _NEW + "/dev/fd")
    for folder in ("/tmp", "/.proc", "/proc"):
        os.mkdir(_NEW + folder)
    syscalls.mount(_OLD + "/proc", _NEW + "/proc", flags=MS_BIND | MS_REC)  # see `mount_own_proc`


def _bind_into_root(source: str, target: str) -> None:
    if os.path.isdir(_OLD + source):
        os.makedirs(_NEW + target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(_NEW + target), exist_ok=True)
        _touch(_NEW + target)
    syscalls.bind_mount(_OLD + source, _NEW + target)


def _touch(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
