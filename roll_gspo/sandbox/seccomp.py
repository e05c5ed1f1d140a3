"""Seccomp filter of sandboxed programs.

The isolation comes from namespaces. The filter allows only the system calls that computing needs. Others fail with
EPERM, so that a program gets a PermissionError. Some of them reach the kernel's less tested parts. Others use memory
that no limit of a process counts, change the runner, or show or lock files of the host.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence

from roll_gspo.sandbox import syscalls

# Numbers on (x86_64, aarch64), from Linux's unistd_64.h and asm-generic/unistd.h; -1 if the call does not exist.
_ALLOWED = {
    # Memory
    **{"mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216)},
    **{"madvise": (28, 233), "msync": (26, 227), "pkey_alloc": (330, 289), "pkey_free": (331, 290)},
    **{"pkey_mprotect": (329, 288)},
    # Files
    **{"read": (0, 63), "write": (1, 64), "open": (2, -1), "openat": (257, 56), "creat": (85, -1)},
    **{"close": (3, 57), "close_range": (436, 436), "stat": (4, -1), "fstat": (5, 80), "lstat": (6, -1)},
    **{"newfstatat": (262, 79), "statx": (332, 291), "lseek": (8, 62), "pread64": (17, 67), "pwrite64": (18, 68)},
    **{"readv": (19, 65), "writev": (20, 66), "preadv": (295, 69), "pwritev": (296, 70), "preadv2": (327, 286)},
    **{"pwritev2": (328, 287), "access": (21, -1), "faccessat": (269, 48), "faccessat2": (439, 439)},
    **{"ftruncate": (77, 46), "truncate": (76, 45), "fallocate": (285, 47), "fsync": (74, 82)},
    **{"fdatasync": (75, 83), "getdents": (78, -1), "getdents64": (217, 61), "getcwd": (79, 17)},
    **{"chdir": (80, 49), "fchdir": (81, 50), "rename": (82, -1), "renameat": (264, 38), "renameat2": (316, 276)},
    **{"mkdir": (83, -1), "mkdirat": (258, 34), "rmdir": (84, -1), "unlink": (87, -1), "unlinkat": (263, 35)},
    **{"link": (86, -1), "linkat": (265, 37), "symlink": (88, -1), "symlinkat": (266, 36), "readlink": (89, -1)},
    **{"readlinkat": (267, 78), "chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53)},
    **{"fchmodat2": (452, 452), "utime": (132, -1), "utimes": (235, -1), "utimensat": (280, 88)},
    **{"futimesat": (261, -1), "umask": (95, 166), "statfs": (137, 43), "fstatfs": (138, 44), "dup": (32, 23)},
    **{"dup2": (33, -1), "dup3": (292, 24), "pipe": (22, -1), "pipe2": (293, 59), "getxattr": (191, 8)},
    **{"lgetxattr": (192, 9), "fgetxattr": (193, 10), "listxattr": (194, 11), "llistxattr": (195, 12)},
    **{"flistxattr": (196, 13)},
    # Waiting
    **{"select": (23, -1), "pselect6": (270, 72), "poll": (7, -1), "ppoll": (271, 73), "epoll_create": (213, -1)},
    **{"epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, -1), "epoll_pwait": (281, 22)},
    **{"epoll_pwait2": (441, 441), "eventfd": (284, -1), "eventfd2": (290, 19), "nanosleep": (35, 101)},
    **{"clock_nanosleep": (230, 115), "pause": (34, -1), "alarm": (37, -1), "setitimer": (38, 103)},
    **{"getitimer": (36, 102), "restart_syscall": (219, 128), "wait4": (61, 260), "waitid": (247, 95)},
    # Connected pairs of sockets
    **{"sendto": (44, 206), "recvfrom": (45, 207), "getsockopt": (55, 209), "getsockname": (51, 204)},
    **{"getpeername": (52, 205), "shutdown": (48, 210)},
    # Signals and threads
    **{"rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139)},
    **{"rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133)},
    **{"sigaltstack": (131, 132), "futex": (202, 98), "futex_waitv": (449, 449), "set_robust_list": (273, 99)},
    **{"rseq": (334, 293), "set_tid_address": (218, 96), "gettid": (186, 178), "exit": (60, 93)},
    **{"exit_group": (231, 94), "arch_prctl": (158, -1), "sched_yield": (24, 124), "getcpu": (309, 168)},
    # Questions about the process and the machine
    **{"sched_getaffinity": (204, 123), "sched_getparam": (143, 121), "sched_getscheduler": (145, 120)},
    **{"sched_get_priority_max": (146, 125), "sched_get_priority_min": (147, 126)},
    **{"sched_rr_get_interval": (148, 127), "get_mempolicy": (239, 236), "getpid": (39, 172)},
    **{"getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176)},
    **{"getegid": (108, 177), "getresuid": (118, 148), "getresgid": (120, 150), "getgroups": (115, 158)},
    **{"getpgid": (121, 155), "getpgrp": (111, -1), "getsid": (124, 156), "getpriority": (140, 141)},
    **{"getrlimit": (97, 163), "getrusage": (98, 165), "times": (100, 153), "sysinfo": (99, 179)},
    **{"uname": (63, 160), "capget": (125, 90), "time": (201, -1), "gettimeofday": (96, 169)},
    **{"clock_gettime": (228, 113), "clock_getres": (229, 114), "getrandom": (318, 278)},
    # The process itself
    **{"setsid": (112, 157), "setpgid": (109, 154), "setrlimit": (160, 164)},
}
# The runner receives descriptors.
_ALLOWED_TO_RUNNER = {"recvmsg": (47, 212)}
_FORKS = {"fork": (57, -1), "vfork": (58, -1), "execve": (59, 221), "execveat": (322, 281)}
_SIGNALS = {
    **{"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131)},
    **{"rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240)},
}
_CLONE, _CLONE3 = (56, 220), (435, 435)
_MMAP, _PRLIMIT, _SOCKETPAIR = (9, 222), (302, 261), (53, 199)
_PRCTL, _FCNTL, _IOCTL = (157, 167), (72, 25), (16, 29)

_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_GET_NAME, _PR_SET_SECCOMP, _PR_SET_VMA = 1, 15, 16, 22, 0x53564D41
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC
# TCGETS, TIOCGPGRP, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
_IOCTL_REQUESTS = (0x5401, 0x540F, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
_AF_UNIX = 1
_CLONE_THREAD = 0x00010000
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEW*
_MAP_HUGETLB = 0x40000

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER_OFFSET, _ARCH_OFFSET = 0, 4
_ARGUMENT_OFFSETS = (16, 24, 32, 40)  # low halves; both architectures are little-endian
_ALLOW, _KILL_PROCESS, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000


def is_supported() -> bool:
    """Return whether the tables have the system calls of this architecture."""
    return syscalls.architecture() in _ARCHITECTURES


def build_filter(is_runner: bool = False, forks: bool = True, signals_to_others: bool = True) -> bytes:
    """Return the instructions of the filter, for `syscalls.install_seccomp_filter`.

    Args:
        is_runner: if True, the filter is that of the runner, which installs a stricter one in each program.
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
    allowed = [*_ALLOWED.values(), *(_ALLOWED_TO_RUNNER.values() if is_runner else ())]
    allowed += [*(_FORKS.values() if forks else ()), *(_SIGNALS.values() if signals_to_others else ())]
    for number in (numbers[column] for numbers in allowed):
        if number >= 0:
            code += [_instruction(_EQUAL, number, 0, 1), _instruction(_RETURN, _ALLOW)]
    # The flags of clone3 are in memory, which a filter cannot read. On ENOSYS, glibc falls back to clone.
    code += [_instruction(_EQUAL, _CLONE3[column], 0, 1), _deny(errno.ENOSYS)]
    clone = [_load(0), _instruction(_ANY_BIT, _NEW_NAMESPACES, 0, 1), _deny()]
    if not forks:
        clone += [_instruction(_ANY_BIT, _CLONE_THREAD, 1, 0), _deny()]
    code += _if_syscall(_CLONE[column], clone)
    code += _if_syscall(_MMAP[column], [_load(3), _instruction(_ANY_BIT, _MAP_HUGETLB, 0, 1), _deny()])
    code += _if_syscall(_PRLIMIT[column], _only(0, (0,)))
    code += _if_syscall(_SOCKETPAIR[column], _only(0, (_AF_UNIX,)))
    runner = (_PR_SET_PDEATHSIG, _PR_SET_SECCOMP) if is_runner else ()
    code += _if_syscall(_PRCTL[column], _only(0, (_PR_SET_NAME, _PR_GET_NAME, _PR_SET_VMA, *runner)))
    code += _if_syscall(_FCNTL[column], _only(1, _FCNTL_COMMANDS))
    code += _if_syscall(_IOCTL[column], _only(1, _IOCTL_REQUESTS))
    if not signals_to_others:
        for numbers in _SIGNALS.values():
            code += _if_syscall(numbers[column], _only(0, (os.getpid(),)))
    return b"".join([*code, _deny()])


def _only(argument: int, values: Sequence[int]) -> list[bytes]:
    """Return instructions that deny the call unless an argument has one of the values."""
    checks = [_instruction(_EQUAL, value, len(values) - i, 0) for i, value in enumerate(values)]
    return [_load(argument), *checks, _deny()]


def _load(argument: int) -> bytes:
    return _instruction(_LOAD, _ARGUMENT_OFFSETS[argument])


def _if_syscall(number: int, instructions: list[bytes]) -> list[bytes]:
    """Return instructions that apply to one system call, and allow it at their end."""
    instructions = [*instructions, _instruction(_RETURN, _ALLOW)]
    return [_instruction(_EQUAL, number, 0, len(instructions)), *instructions]


def _deny(number: int = errno.EPERM) -> bytes:
    return _instruction(_RETURN, _ERROR | number)


def _instruction(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", operation, if_true, if_false, value)
