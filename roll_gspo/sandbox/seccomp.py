"""Seccomp filter of sandboxed programs.

The isolation comes from namespaces. The filter also denies system calls that test programs do not need, but attacks on
the kernel and on other processes do. Denied calls fail with EPERM, so that a program gets a PermissionError.
"""

from __future__ import annotations

import errno
import os
import struct

from roll_gspo.sandbox import syscalls

# Numbers on (x86_64, aarch64), from Linux's unistd_64.h and asm-generic/unistd.h; -1 if the call does not exist.
_DENIED = {
    # Memory of other processes
    **{"ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272)},
    **{"process_madvise": (440, 440), "pidfd_getfd": (438, 438), "pidfd_open": (434, 434)},
    "pidfd_send_signal": (424, 424),
    # Mounts and namespaces
    **{"mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "setns": (308, 268)},
    **{"unshare": (272, 97), "fsopen": (430, 430), "fsmount": (432, 432), "fspick": (433, 433), "fsconfig": (431, 431)},
    **{"move_mount": (429, 429), "open_tree": (428, 428), "open_tree_attr": (467, 467), "mount_setattr": (442, 442)},
    **{"name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262)},
    **{
        "quotactl": (179, 60),
        "quotactl_fd": (443, 443),
        "swapon": (167, 224),
        "swapoff": (168, 225),
        "acct": (163, 89),
    },
    # Programs and queues in the kernel
    **{"bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425)},
    **{"io_uring_enter": (426, 426), "io_uring_register": (427, 427)},
    **{"keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218)},
    # The machine
    **{"kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273)},
    **{"delete_module": (176, 106), "reboot": (169, 142), "syslog": (103, 116), "personality": (135, 92)},
    **{"settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171)},
    **{"sethostname": (170, 161), "setdomainname": (171, 162), "iopl": (172, -1), "ioperm": (173, -1)},
    **{"modify_ldt": (154, -1), "lookup_dcookie": (212, 18), "nfsservctl": (180, 42), "vhangup": (153, 58)},
    **{"mbind": (237, 235), "set_mempolicy": (238, 237), "migrate_pages": (256, 238), "move_pages": (279, 239)},
    # Memory that is not counted by the limits of a process
    **{"memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196)},
    **{"shmctl": (31, 195), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "semget": (64, 190)},
    **{"mq_open": (240, 180)},
}
_SIGNALS = {
    **{"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131)},
    **{"rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240)},
}
_FORKS = {"fork": (57, -1), "vfork": (58, -1)}
_CLONE, _CLONE3 = (56, 220), (435, 435)
_SOCKETS = {"socket": (41, 198), "socketpair": (53, 199)}

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
_X32 = 0x40000000  # first number of the x32 calls of x86_64
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_OFFSET, _ARCH_OFFSET, _ARGUMENT_OFFSETS = 0, 4, (16, 24, 32)  # low halves; both architectures are little-endian
_ALLOW, _KILL_PROCESS, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_AF_UNIX = 1
_CLONE_THREAD = 0x00010000
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEW*


def is_supported() -> bool:
    """Return whether the tables have the system calls of this architecture."""
    return syscalls.architecture() in _ARCHITECTURES


def build_filter(forks: bool = True, signals_to_others: bool = True) -> bytes:
    """Return the instructions of the filter, for `syscalls.install_seccomp_filter`.

    Args:
        forks: if True, the program may start processes. It may always start threads.
        signals_to_others: if False, the program may signal only itself, which is needed without PID namespaces. Then
            the filter must be built in the process that installs it.
    """
    column = list(_ARCHITECTURES).index(syscalls.architecture())
    code = [
        _instruction(_LOAD, _ARCH_OFFSET),
        _instruction(_EQUAL, _ARCHITECTURES[syscalls.architecture()], 1, 0),
        _instruction(_RETURN, _KILL_PROCESS),
        _instruction(_LOAD, _NUMBER_OFFSET),
    ]
    if column == 0:
        code += [_instruction(_AT_LEAST, _X32, 0, 1), _deny()]
    denied = [*_DENIED.values(), *(() if forks else _FORKS.values())]
    for number in (numbers[column] for numbers in denied):
        if number >= 0:
            code += [_instruction(_EQUAL, number, 0, 1), _deny()]
    # The flags of clone3 are in memory, which a filter cannot read. On ENOSYS, glibc falls back to clone.
    code += [_instruction(_EQUAL, _CLONE3[column], 0, 1), _deny(errno.ENOSYS)]
    clone = [_instruction(_LOAD, _ARGUMENT_OFFSETS[0]), _instruction(_ANY_BIT, _NEW_NAMESPACES, 0, 1), _deny()]
    if not forks:
        clone += [_instruction(_ANY_BIT, _CLONE_THREAD, 1, 0), _deny()]
    code += _if_syscall(_CLONE[column], clone)
    unix_only = [_instruction(_LOAD, _ARGUMENT_OFFSETS[0]), _instruction(_EQUAL, _AF_UNIX, 1, 0), _deny()]
    for numbers in _SOCKETS.values():
        code += _if_syscall(numbers[column], unix_only)
    if not signals_to_others:
        only_self = [_instruction(_LOAD, _ARGUMENT_OFFSETS[0]), _instruction(_EQUAL, os.getpid(), 1, 0), _deny()]
        for numbers in _SIGNALS.values():
            code += _if_syscall(numbers[column], only_self)
    return b"".join([*code, _instruction(_RETURN, _ALLOW)])


def _if_syscall(number: int, instructions: list[bytes]) -> list[bytes]:
    """Return instructions that apply to one system call, and allow it at their end."""
    instructions = [*instructions, _instruction(_RETURN, _ALLOW)]
    return [_instruction(_EQUAL, number, 0, len(instructions)), *instructions]


def _deny(number: int = errno.EPERM) -> bytes:
    return _instruction(_RETURN, _ERROR | number)


def _instruction(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", operation, if_true, if_false, value)
