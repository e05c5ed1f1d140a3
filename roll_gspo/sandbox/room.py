"""The file system and the identity of sandboxed programs: namespaces, a root of read-only parts, no privileges."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from roll_gspo.sandbox import kernel
from roll_gspo.sandbox.kernel import MS_BIND, MS_MOVE, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_PRIVATE, MS_RDONLY, MS_REC

PACKAGES = "/packages"
USER = 1000  # inside
_NOBODY = 65534  # outside, where root starts us: root's own id would own the kernel's files
_DEVICES = ("null", "zero", "full", "random", "urandom")
_OLD, _NEW = "/old", "/new"


@dataclass(frozen=True)
class Contents:
    """What of the host is to be seen, read-only.

    Attributes:
        folders: absolute paths (files, too), shown at the same place.
        hidden: folders within these that are shown empty.
        links: symbolic links of the host's root, (path, target).
        packages: (folder or file of a Python package, its name), shown below `PACKAGES`.
    """

    folders: tuple[str, ...]
    hidden: tuple[str, ...]
    links: tuple[tuple[str, str], ...]
    packages: tuple[tuple[str, str], ...]


def enter(contents: Contents) -> None:
    """Move this process into namespaces of its own, whose root holds the contents and no more.

    Raises:
        OSError: the kernel or the host's settings do not allow it; the text says what was tried.
    """
    _become_root_of_nothing()
    kernel.mount("none", "/", flags=MS_REC | MS_PRIVATE)
    kernel.mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID, "mode=755,size=1m")
    os.mkdir("/tmp" + _OLD)
    os.mkdir("/tmp" + _NEW)
    kernel.pivot_root("/tmp", "/tmp" + _OLD)
    os.chdir("/")
    kernel.mount("tmpfs", _NEW, "tmpfs", MS_NOSUID, "mode=755,size=1m")
    _furnish(contents)
    kernel.unmount(_OLD)
    os.chdir(_NEW)
    kernel.pivot_root(".", ".")
    kernel.unmount(".")
    os.chdir("/")
    kernel.mount("none", "/", flags=kernel.MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID)


def enter_own_part(tmp_mb: int) -> None:
    """Give this process, already in the room, a /tmp and a /proc of its own; the process namespace is its children's.

    Raises:
        OSError: as in `enter`.
    """
    kernel.unshare(kernel.NEW_NS | kernel.NEW_PID | kernel.NEW_IPC)
    kernel.mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"mode=777,size={tmp_mb}m,nr_inodes=4096")


def show_own_processes() -> None:
    """In the first process of a process namespace: put its own /proc in the place of the host's.

    The kernel allows that only while a complete /proc is still mounted. Where it does not, there is no /proc at all,
    which few programs miss.
    """
    with contextlib.suppress(OSError):
        kernel.mount("proc", "/.proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "subset=pid,hidepid=2")
    kernel.unmount("/proc")
    if os.path.exists("/.proc/self"):
        kernel.mount("/.proc", "/proc", flags=MS_MOVE)


def give_up_privileges() -> None:
    """Become an ordinary user without capabilities, for good.

    Raises:
        OSError: something could not be given up.
    """
    changes_user = os.getuid() != USER
    if changes_user:
        os.setgroups([])
    kernel.drop_capabilities(USER if changes_user else None)
    kernel.no_new_privileges()
    kernel.close_to_others()


def _become_root_of_nothing() -> None:
    """Unshare everything but processes. Root maps a second user, whom programs will be; others are mapped alone."""
    flags = kernel.NEW_USER | kernel.NEW_NS | kernel.NEW_NET | kernel.NEW_IPC | kernel.NEW_UTS | kernel.NEW_CGROUP
    user, group = os.getuid(), os.getgid()
    if user:
        kernel.unshare(flags)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{USER} {user} 1")
        _write("/proc/self/gid_map", f"{USER} {group} 1")
        return
    unshared_there, unshared_here = os.pipe()
    helper = os.fork()  # only a process that stays outside may map several users
    if not helper:
        os.close(unshared_here)
        os.read(unshared_there, 1)
        code = 0
        try:
            _write(f"/proc/{os.getppid()}/uid_map", f"0 0 1\n{USER} {_NOBODY} 1")
            _write(f"/proc/{os.getppid()}/gid_map", f"0 0 1\n{USER} {_NOBODY} 1")
        except OSError as error:
            code = error.errno or 1
        os._exit(code)
    os.close(unshared_there)
    try:
        kernel.unshare(flags)
    finally:
        os.close(unshared_here)
        _, status = os.waitpid(helper, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise OSError(code, f"mapping user {_NOBODY} into a user namespace: {os.strerror(abs(code))}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _furnish(contents: Contents) -> None:
    for path in contents.folders:
        _show(path, path)
    for path, name in contents.packages:
        _show(path, f"{PACKAGES}/{name}")
    for path in contents.hidden:
        kernel.mount("tmpfs", _NEW + path, "tmpfs", MS_NOSUID | MS_RDONLY, "mode=555,size=4k")
    for path, target in contents.links:
        os.symlink(target, _NEW + path)
    os.makedirs(_NEW + "/dev")
    for device in _DEVICES:
        _touch(f"{_NEW}/dev/{device}")
        kernel.mount(f"{_OLD}/dev/{device}", f"{_NEW}/dev/{device}", flags=MS_BIND)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"{_NEW}/dev/{name}")
    os.symlink("/proc/self/fd", _NEW + "/dev/fd")
    for folder in ("/tmp", "/.proc", "/proc"):
        os.mkdir(_NEW + folder)
    kernel.mount(_OLD + "/proc", _NEW + "/proc", flags=MS_BIND | MS_REC)  # see `show_own_processes`


def _show(source: str, at: str) -> None:
    if os.path.isdir(_OLD + source):
        os.makedirs(_NEW + at, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(_NEW + at), exist_ok=True)
        _touch(_NEW + at)
    kernel.bind(_OLD + source, _NEW + at)


def _touch(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
