"""Linux system calls that Python does not wrap, through ctypes. Each raises OSError with the name of the call."""

from __future__ import annotations

import ctypes
import os
import platform

NEW_NS, NEW_CGROUP, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = (
    *(0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000),
)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = (
    *(1, 2, 4, 8, 32, 4096, 8192, 16384, 1 << 18),
)
MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_SECUREBITS, _PR_SET_NO_NEW_PRIVS = (
    *(1, 4, 22, 24, 28, 38),
)
_PR_SET_CHILD_SUBREAPER = 36
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_SECCOMP_MODE_FILTER = 2
# Root gets no capabilities: noroot, no_setuid_fixup, keep_caps off and no_cap_ambient_raise, each locked.
_SECUREBITS = 0b11101111
_MOUNT_SETATTR = 442  # on every architecture
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}
_AT_RECURSIVE, _AT_FDCWD = 0x8000, -100
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)


def architecture() -> str:
    """Return the architecture by its name in the system call tables."""
    return {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())


def unshare(flags: int) -> None:
    """Move this process into new namespaces; a new PID namespace applies to its children."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Call mount(2)."""
    _check(
        _libc.mount(source.encode(), os.fsencode(target), kind.encode() or None, flags, options.encode() or None),
        f"mount {kind or 'bind'} at {target}",
    )


def bind_mount(source: str, target: str) -> None:
    """Bind-mount `source` and all mounts below it at `target`, read-only and nosuid."""
    mount(source, target, flags=MS_BIND | MS_REC)
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID, 0, 0, 0)  # set, clear, propagation, userns_fd
    _check(
        _libc.syscall(
            *(_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(target), _AT_RECURSIVE),
            *(ctypes.byref(attributes), ctypes.sizeof(attributes)),
        ),
        f"mount_setattr read-only at {target}",
    )


def unmount(target: str) -> None:
    """Unmount lazily."""
    _check(_libc.umount2(os.fsencode(target), MNT_DETACH), f"umount {target}")


def pivot_root(new: str, old: str) -> None:
    """Make `new` the root, and mount the former root at `old`."""
    _check(_libc.syscall(_PIVOT_ROOT[architecture()], os.fsencode(new), os.fsencode(old)), "pivot_root")


def set_parent_death_signal() -> None:
    """Let the kernel kill this process when its parent ends.

    Call it after changes of the user or the capabilities, which reset it.
    """
    _check(_libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0), "prctl PDEATHSIG")


def become_subreaper() -> None:
    """Become the parent of descendants whose parents have ended."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl CHILD_SUBREAPER")


def make_undumpable() -> None:
    """Prevent other processes of this user from reading or tracing this process and its children."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl DUMPABLE")


def drop_capabilities(user: int | None) -> None:
    """Permanently drop all capabilities from all sets.

    Args:
        user: user and group id to switch to before the capabilities are dropped, or None.
    """
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0):
            break  # the kernel has no further capabilities
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    _check(_libc.prctl(_PR_SET_SECUREBITS, _SECUREBITS, 0, 0, 0), "prctl SECUREBITS")
    if user is not None:
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _check(_libc.syscall(_CAPSET[architecture()], header, (ctypes.c_uint32 * 6)()), "capset")


def set_no_new_privs() -> None:
    """Set no_new_privs, so that executed programs gain no privileges."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl NO_NEW_PRIVS")


def install_seccomp_filter(instructions: bytes) -> None:
    """Install a seccomp filter.

    Args:
        instructions: BPF instructions of eight bytes each.
    """

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    program = Program(len(instructions) // 8, instructions)
    _check(
        _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program), 0, 0),
        "prctl SECCOMP",
    )


def _check(result: int, call: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
