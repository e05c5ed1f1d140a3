"""The system calls that a sandboxed program is refused: a seccomp filter, assembled here.

Namespaces are the wall; this takes away what a program of tests never needs and attackers of kernels and neighbours do.
Refused calls fail with EPERM, so that a program gets a PermissionError instead of a mysterious death.
"""

from __future__ import annotations

import errno
import os
import struct

from roll_gspo.sandbox import kernel

# name: number on (x86_64, aarch64), from Linux's unistd_64.h and asm-generic/unistd.h; -1: there is none.
_REFUSED = {
    # Other processes' memory
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
    # The kernel's own programs and queues
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
    # Memory that no limit of a process counts
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
_X32 = 0x40000000  # x86_64's second table of calls
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCH_AT, _ARGUMENT_AT = 0, 4, (16, 24, 32)  # low halves; both machines are little-endian
_ALLOW, _KILL_PROCESS, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_AF_UNIX = 1
_CLONE_THREAD = 0x00010000
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEW*


def supported() -> bool:
    """Whether this machine's calls are in the tables."""
    return kernel.machine() in _ARCHITECTURES


def refusing(forks: bool = True, signals_to_others: bool = True) -> bytes:
    """The filter's instructions, for `kernel.set_filter`.

    Args:
        forks: let it start processes (threads it may always).
        signals_to_others: let it signal whom it sees; else itself only (for hosts without process namespaces), for
            which the filter must be made in the process that it is for.
    """
    column = list(_ARCHITECTURES).index(kernel.machine())
    code = [
        _step(_LOAD, _ARCH_AT),
        _step(_EQUAL, _ARCHITECTURES[kernel.machine()], 1, 0),
        _step(_RETURN, _KILL_PROCESS),
        _step(_LOAD, _NUMBER_AT),
    ]
    if column == 0:
        code += [_step(_AT_LEAST, _X32, 0, 1), _refuse()]
    refused = [*_REFUSED.values(), *(() if forks else _FORKS.values())]
    for number in (numbers[column] for numbers in refused):
        if number >= 0:
            code += [_step(_EQUAL, number, 0, 1), _refuse()]
    # glibc falls back to clone, whose flags can be read here; those of clone3 lie in memory.
    code += [_step(_EQUAL, _CLONE3[column], 0, 1), _refuse(errno.ENOSYS)]
    clone = [_step(_LOAD, _ARGUMENT_AT[0]), _step(_ANY_BIT, _NEW_NAMESPACES, 0, 1), _refuse()]
    if not forks:
        clone += [_step(_ANY_BIT, _CLONE_THREAD, 1, 0), _refuse()]
    code += _only_for(_CLONE[column], clone)
    unix_only = [_step(_LOAD, _ARGUMENT_AT[0]), _step(_EQUAL, _AF_UNIX, 1, 0), _refuse()]
    for numbers in _SOCKETS.values():
        code += _only_for(numbers[column], unix_only)
    if not signals_to_others:
        to_itself = [_step(_LOAD, _ARGUMENT_AT[0]), _step(_EQUAL, os.getpid(), 1, 0), _refuse()]
        for numbers in _SIGNALS.values():
            code += _only_for(numbers[column], to_itself)
    return b"".join([*code, _step(_RETURN, _ALLOW)])


def _only_for(number: int, steps: list[bytes]) -> list[bytes]:
    """These steps for one call, which is allowed if they do not refuse it."""
    steps = [*steps, _step(_RETURN, _ALLOW)]
    return [_step(_EQUAL, number, 0, len(steps)), *steps]


def _refuse(number: int = errno.EPERM) -> bytes:
    return _step(_RETURN, _ERROR | number)


def _step(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", operation, if_true, if_false, value)
