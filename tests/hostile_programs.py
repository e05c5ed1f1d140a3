"""Programs that attack the sandbox, and functions to check that the host is unchanged."""

from __future__ import annotations

import os
import socket
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil

# Each prints "escaped" if its attack succeeds, and may end in any way.
_SOURCES = {
    "fork bomb": """
        import os
        while True:
            try: os.fork()
            except OSError: pass
        """,
    "thread bomb": """
        import threading, time
        while True:
            try: threading.Thread(target=time.sleep, args=(100,)).start()
            except RuntimeError: pass
        """,
    "daemon": """
        import os, time
        for _ in range(2):
            if os.fork(): os._exit(0)
            os.setsid()
        while True: time.sleep(0.01)
        """,
    "memory bomb": """
        hoard = []
        while True: hoard.append(bytearray(1 << 20))
        """,
    "one huge block": "x = b'x' * (1 << 40)",
    "shared memory": """
        import mmap
        hoard = []
        while True: hoard.append(mmap.mmap(-1, 1 << 22)); hoard[-1][::4096] = b'x' * 1024
        """,
    "endless output": """
        while True: print('x' * 10000)
        """,
    "endless stderr": """
        import sys
        while True: print('x' * 10000, file=sys.stderr)
        """,
    "kill all": """
        import os, signal
        os.kill(-1, signal.SIGKILL)
        """,
    "kill the parent": """
        import os, signal
        for victim in (os.getppid(), 1):
            for number in range(1, 32): os.kill(victim, number)
        """,
    "kill the group": "import os\nos.killpg(0, 9)",
    "stop the parent": "import os, signal, time\nos.kill(1, signal.SIGSTOP)\ntime.sleep(100)",
    "ignore signals": """
        import signal, time
        for number in range(1, 64):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: pass
        """,
    "memory of others": """
        import os
        for pid in range(1, 400):
            for name in ('environ', 'mem', 'maps', 'root/etc/shadow', 'cwd'):
                if pid == os.getpid(): continue
                try: open(f'/proc/{pid}/{name}', 'rb').read(10)
                except OSError: continue
                print('escaped')
        """,
    "kernel settings": """
        for path in ('/proc/sys/kernel/core_pattern', '/proc/sysrq-trigger', '/sys/kernel/uevent_helper'):
            try: open(path, 'w').write('-1')
            except OSError: continue
            print('escaped')
        """,
    "write outside": """
        import os, sys
        folders = ('/', '/usr/lib', '/etc', '/dev', '/proc', '/packages', '/root', os.path.dirname(os.__file__))
        for folder in folders:
            try: open(os.path.join(folder, 'x'), 'w')
            except OSError: continue
            print('escaped')
        """,
    "links": """
        import os
        os.symlink('/', 'root'); os.symlink('../../../../..', 'up'); os.symlink('/proc/1/root', 'init')
        for link in ('root', 'up', 'init'):
            for path in ('etc/shadow', 'etc/passwd', 'home', 'var'):
                if os.path.exists(f'{link}/{path}'): print('escaped')
        os.makedirs('a/b'); os.symlink('/usr/lib', 'a/b/c'); os.symlink('loop', 'loop')
        """,
    "device": """
        import os
        os.mknod('disk', 0o60666, os.makedev(254, 0))
        open('disk', 'rb').read(1); print('escaped')
        """,
    "huge file": """
        with open('big', 'wb') as file:
            while True: file.write(b'x' * (1 << 20))
        """,
    "full tmp": """
        for i in range(1 << 20):
            with open(f'f{i}', 'wb') as file: file.write(b'x' * (1 << 20))
        """,
    "many files": "for i in range(1 << 20): open(f'f{i}', 'w').close()",
    "many open files": """
        import os
        while True: os.open('/dev/null', os.O_RDONLY)
        """,
    "deep folders": """
        import os
        while True: os.mkdir('d'); os.chdir('d')
        """,
    "unreadable folders": """
        import os
        os.makedirs('a/b'); os.chmod('a/b', 0); os.chmod('a', 0)
        """,
    "close everything": "import os\nos.closerange(0, 100)\nprint('x')",
    "exit without cleanup": "import os\nos._exit(0)",
    "crash": "import ctypes\nctypes.string_at(1)",
    "abort": "import os\nos.abort()",
    "huge recursion": """
        import sys
        sys.setrecursionlimit(10**9)
        class A:
            def __repr__(self): return repr(self)
        repr(A())
        """,
    "parser": "eval('(' * 100000)",
    "sleep": "import time\ntime.sleep(10**6)",
    "busy": "while True: pass",
    "other interpreter": """
        import os, sys
        for path in ('/bin/sh', '/usr/bin/env', '/bin/bash'):
            try: os.execv(path, [path])
            except OSError: pass
        os.execv(sys.executable, [sys.executable, '-c', 'import socket; socket.socket(); print("escaped")'])
        """,
    "become root": """
        import os
        for call in (os.setuid, os.setgid, os.seteuid):
            try: call(0)
            except OSError: continue
            print('escaped')
        """,
    "system calls": """
        import ctypes, platform
        libc = ctypes.CDLL(None, use_errno=True)
        calls = {
            'unshare': (0x10000000,), 'mount': (b'none', b'/tmp', b'tmpfs', 0, None), 'umount2': (b'/tmp', 2),
            'ptrace': (16, 1, 0, 0), 'chroot': (b'/tmp',), 'setns': (0, 0), 'personality': (0,), 'acct': (b'/tmp/x',),
            'sethostname': (b'x', 1), 'shmget': (0, 4096, 0o1600), 'memfd_create': (b'x', 0), 'swapon': (b'/tmp', 0),
        }
        for name, arguments in calls.items():
            if getattr(libc, name)(*arguments) >= 0: print('escaped', name)
        number = {'x86_64': (321, 250, 425, 323), 'aarch64': (280, 219, 425, 282)}[platform.machine()]
        for call in number:
            if libc.syscall(call, 0, 0, 0, 0, 0) >= 0 or ctypes.get_errno() != 1: print('escaped', call)
        """,
    "clone": """
        import ctypes, platform
        libc = ctypes.CDLL(None, use_errno=True)
        pid = libc.syscall({'x86_64': 56, 'aarch64': 220}[platform.machine()], 0x10000000 | 17, 0, 0, 0, 0)
        if pid >= 0: print('escaped')
        """,
    "system calls of others": """
        import ctypes, fcntl, os, platform, resource, socket, sys, time
        libc = ctypes.CDLL(None, use_errno=True)
        def denied(name, call, *arguments):
            try:
                if call(*arguments) == -1 and ctypes.get_errno() == 1: return
            except PermissionError: return
            except OSError as error: print(name, error)
            print('escaped', name)
        denied('inotify', libc.inotify_init1, 0)
        denied('fanotify', libc.fanotify_init, 0, 0)
        io_setup, mmap = {'x86_64': (206, 9), 'aarch64': (0, 222)}[platform.machine()]
        denied('aio', libc.syscall, io_setup, 1, ctypes.byref(ctypes.c_ulong(0)))
        denied('limits', resource.prlimit, 1, resource.RLIMIT_CPU)
        denied('priority', os.setpriority, os.PRIO_PROCESS, 1, 5)
        denied('own priority', os.nice, 1)
        denied('scheduler', os.sched_setscheduler, 1, os.SCHED_IDLE, os.sched_param(0))
        denied('affinity', os.sched_setaffinity, 1, {0})
        denied('dumpable', libc.prctl, 4, 1, 0, 0, 0)
        denied('seccomp', libc.prctl, 22, 2, 0, 0, 0)
        denied('exec', os.execv, sys.executable, [sys.executable])
        one, two = os.pipe()
        denied('pipe size', fcntl.fcntl, one, 1031, 1 << 20)
        denied('splice', libc.splice, one, None, two, None, 1, 0)
        denied('tee', libc.tee, one, two, 1, 0)
        denied('vmsplice', libc.vmsplice, two, None, 0, 0)
        denied('sendfile', os.sendfile, two, os.open(os.__file__, os.O_RDONLY), 0, 1)
        denied('file lock', fcntl.flock, os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_SH)
        denied('lease', fcntl.fcntl, os.open('x', os.O_RDONLY | os.O_CREAT), fcntl.F_SETLEASE, fcntl.F_RDLCK)
        denied('record lock', fcntl.lockf, os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_SH)
        denied('notify', fcntl.fcntl, os.open('/usr/lib', os.O_RDONLY), fcntl.F_NOTIFY, fcntl.DN_ACCESS)
        denied('socket', socket.socket, socket.AF_UNIX)
        denied('huge pages', libc.syscall, mmap, 0, 1 << 21, 3, 0x40022, -1, 0)
        pair = socket.socketpair()
        denied('listen', libc.listen, pair[0].fileno(), 1)
        denied('connect', libc.connect, pair[0].fileno(), b'', 0)
        denied('message', pair[0].sendmsg, [b'x'])
        denied('buffer', pair[0].setsockopt, socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        denied('timer', libc.timer_create, 0, None, ctypes.byref(ctypes.c_long()))
        """,
    "devices": """
        import os
        for path in ('/dev/null', '/dev/zero', '/dev/random', '/dev/full', '/dev/urandom'):
            for call in (os.utime, lambda p: os.utime(p, (1, 1)), lambda p: os.chmod(p, 0o600), os.unlink):
                try: call(path)
                except OSError: continue
                print('escaped', path)
        open('/dev/null', 'w').write('x')
        """,
    "raise limits": """
        import resource
        for kind in (resource.RLIMIT_AS, resource.RLIMIT_NOFILE, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):
            try: resource.setrlimit(kind, (resource.RLIM_INFINITY,) * 2)
            except (OSError, ValueError): continue
            print('escaped')
        """,
    "raw sockets": """
        import socket
        for family in range(46):
            for kind in (1, 2, 3):
                try: socket.socket(family, kind)
                except OSError: continue
                if family != socket.AF_UNIX: print('escaped', family)
        """,
    "write to the runner": """
        import os, socket
        for fd in range(3, 200):
            try: os.write(fd, b'\\x00' * 64 + b'{"status": "finished"}')
            except OSError: continue
            print('escaped', fd)
        """,
    "read frames of the runner": """
        import gc, sys
        frame, seen = sys._getframe(), []
        while frame: seen.append(repr(frame.f_locals)[:100000]); frame = frame.f_back
        if 'expected' in ''.join(seen) and 'planted' in ''.join(seen): print('escaped')
        """,
}
HOSTILE = {name: textwrap.dedent(source) for name, source in _SOURCES.items()}
# Programs that do not end before a time limit.
ENDLESS = {"fork bomb", "thread bomb", "daemon", "stop the parent", "ignore signals", "sleep", "busy"}


def descendants(pid: int) -> set[int]:
    """Return the ids of all descendants of a process."""
    try:
        return {child.pid for child in psutil.Process(pid).children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


def wait_until(condition: Callable[[], object], timeout_s: float = 60.0) -> bool:
    """Wait for a condition, and return whether it became true in time."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def host_state() -> dict[str, object]:
    """Return the processes, descriptors, mounts, ports and shared memory that a program might leave behind."""
    return {
        "processes": descendants(os.getpid()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mounts": Path("/proc/self/mounts").read_text(),
        "ports": {c.laddr.port for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN},
        "shared memory": sorted(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else [],
    }


def listener() -> socket.socket:
    """Return a listening TCP socket of this machine."""
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)
    return server
