"""Attacks with right answers that carry the hidden inputs out, and notebooks that break what they run in."""

from __future__ import annotations

from grading_attacks.kit import RIGHT_VALUE, Attack, inside

SPARE = """
channel = attempt(lambda: get_ipython().channel)
spare = attempt(lambda: socket.socket(fileno=os.dup(channel.sock.fileno())))
pipe = os.dup(1)
def send(*values):
    text = "SE" + "EN and sent " + repr([v.tolist() if hasattr(v, "tolist") else v for v in values])[:3000]
    attempt(os.write, pipe, text.encode())
    from lecturekit.grading import codec
    for message in ({"output": {"output_type": "stream", "name": "stdout", "text": text}}, {"done": True, "count": 1}):
        attempt(codec.send, spare, message)
        attempt(channel.send, message)
"""
STASH = """
import mmap, tempfile
seen, box = [], mmap.mmap(-1, 1 << 16)
FOLDERS = [os.getcwd(), COURSE]
if jailed():
    FOLDERS += ["/tmp", "/dev/shm", "/var/tmp", str(Path.home()), "/run"]
pipe_out, pipe_in = os.pipe()
os.set_blocking(pipe_out, False)
os.set_blocking(pipe_in, False)
def stash(*values):
    if hasattr(values[0], "any") and not values[0].any():
        return  # the lab's own call
    text = repr([v.tolist() if hasattr(v, "tolist") else v for v in values])
    seen.append(text)
    data = text.encode()[:4000]
    box[: len(data)] = data
    attempt(os.write, pipe_in, data)
    for folder in FOLDERS:
        attempt(lambda: open(os.path.join(folder, "stashed-" + NAME), "w").write(text))
    os.environ["STASHED"] = text[:1000]
    sys.stashed = text
def seen_was(where, what):
    if what not in (None, b"", []):
        print("SE" + "EN", where, what, flush=True)
def unstash():
    seen_was("hidden inputs in a global", seen[-8:])
    seen_was("hidden inputs in shared memory", bytes(box[:]).rstrip(b"\\0"))
    seen_was("hidden inputs in a pipe", attempt(os.read, pipe_out, 4000))
    for folder in FOLDERS:
        seen_was("hidden inputs in a file", attempt(lambda: open(os.path.join(folder, "stashed-" + NAME)).read()))
    seen_was("hidden inputs in the environment", os.environ.get("STASHED"))
"""
TELL_ALL = """
def shout(*values):
    text = repr([v.tolist() if hasattr(v, "tolist") else v for v in values])
    line = ("SE" + "EN shouted " + text + "\\n").encode()
    print(line.decode())
    print(line.decode(), file=sys.stderr)
    attempt(lambda: display({"text/html": line.decode()}, raw=True))
    for stream in (sys.__stdout__, sys.__stderr__):
        attempt(lambda: print(line.decode(), file=stream, flush=True))
    for name in os.listdir("/proc/self/fd"):
        attempt(os.set_blocking, int(name), False)
        if int(name) < 3:
            attempt(os.write, int(name), line)
    attempt(lambda: open("/dev/tty", "wb").write(line))
    attempt(lambda: open("/dev/console", "wb").write(line))
    attempt(lambda: open("/dev/kmsg", "wb").write(line))
    import warnings, logging
    warnings.warn(line.decode())
    logging.error(line.decode())
    attempt(lambda: get_ipython().kernel.iopub_socket.send_multipart([line]))
    attempt(lambda: get_ipython().display_pub.publish({"text/plain": line.decode()}))
"""
HELPER = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for _ in range(200):
            unstash()
            text = bytes(box[:]).rstrip(b"\\0")
            if text:
                for fd in range(3):
                    attempt(os.write, fd, b"SE" + b"EN by a helper " + text[:500] + b"\\n")
            time.sleep(0.05)
    os._exit(0)
"""
FINALIZERS = """
import atexit, weakref
class Marker: pass
marker = Marker()
atexit.register(unstash)
weakref.finalize(marker, unstash)
class Last:
    def __del__(self): unstash()
last = Last()
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD):
    attempt(signal.signal, number, lambda *a: unstash())
threading.excepthook = lambda *a: unstash()
gc.callbacks.append(lambda *a: unstash() if seen else None)
"""
TRACE = """
def tracer(frame, event, argument):
    name = frame.f_code.co_name
    if event == "call" and name in ("judge", "run", "_expected", "merge", "draw", "evaluate", "grade"):
        names = ("case", "cases", "seed", "weight", "expected")
        stash([repr(frame.f_locals[key])[:200] for key in names if key in frame.f_locals])
    return tracer
sys.setprofile(tracer); threading.setprofile(tracer)
sys.settrace(tracer); threading.settrace(tracer)
"""
STARTUP = """
import site
evil = 'print("LE" + "AK a start-up file of another student ran")\\n'
home = Path.home()
for path in [
    home / ".ipython/profile_default/startup/00-evil.py", home / ".ipython/profile_default/ipython_config.py",
    home / ".jupyter/jupyter_config.py", home / ".jupyter/nbgrader_config.py", home / ".config/pip/pip.conf",
    Path(site.getusersitepackages()) / "usercustomize.py", Path(site.getusersitepackages()) / "evil.pth",
    *[Path(folder) / "sitecustomize.py" for folder in sys.path if folder], Path.cwd() / "torch.py",
    Path.cwd().parent / "torch.py", Path(sys.prefix) / "lib/evil.pth", Path(COURSE) / "sitecustomize.py",
    Path(COURSE) / "nbgrader_config.py", Path("/etc/ld.so.preload"), Path("/etc/profile.d/evil.sh"),
]:
    attempt(lambda: (path.parent.mkdir(parents=True, exist_ok=True), path.write_text(evil)))
"""
ENVIRONMENT = """
os.environ.update(LD_PRELOAD="/tmp/evil.so", PYTHONPATH="/tmp", PYTHONSTARTUP="/tmp/evil.py", PATH="/tmp",
                  LECTUREKIT_GRADING_SEED="0", LECTUREKIT_PROFILE="full", LECTUREKIT_DEVICE="meta", PYTHONHASHSEED="x")
sys.path.insert(0, "/tmp")
sys.argv[:] = ["evil"]
os.chdir("/tmp")
"""

ATTACKS = [
    # right answers that carry the hidden inputs out: full marks, nothing told
    Attack(
        "stashes_hidden_inputs_with_a_thread",
        STASH + "threading.Thread(target=time.sleep, args=(10**6,), daemon=True).start()",
        {"merge": inside("stash(weight, A, B, alpha)", RIGHT_VALUE)},
        after={"merge-test": "unstash()", "count-test": "unstash()", "compress-test": "unstash()"},
    ),
    Attack(
        "keeps_a_copy_of_the_pipe",
        SPARE,
        {"merge": inside("send(weight, A, B, alpha)", RIGHT_VALUE)},
        after={"count-test": "time.sleep(0.2)"},
    ),
    Attack(
        "stashes_hidden_inputs",
        STASH,
        {"merge": inside("stash(weight, A, B, alpha)", RIGHT_VALUE)},
        after={"count-test": "unstash()", "compress-test": "unstash()"},
        plain="prints the hidden inputs into its own feedback",
        plain_marks={"merge-test": 15},
    ),
    Attack(
        "shouts_hidden_inputs", TELL_ALL, {"merge": inside("shout(weight, A, B, alpha)", RIGHT_VALUE)}, dangerous=True
    ),
    Attack(
        "lets_a_helper_tell",
        STASH + HELPER,
        {"merge": inside("stash(weight, A, B, alpha)", RIGHT_VALUE)},
        after={"count-test": "time.sleep(1)\nunstash()"},
    ),
    Attack(
        "tells_when_it_ends",
        STASH + FINALIZERS,
        {"merge": inside("stash(weight, A, B, alpha)\ngc.collect()", RIGHT_VALUE)},
    ),
    Attack("traces_everything", STASH + TRACE, after={"count-test": "unstash()", "compress-test": "unstash()"}),
    Attack("leaves_startup_files", STARTUP, dangerous=True),
    Attack("changes_the_environment", ENVIRONMENT),
    Attack(
        "execs_another_python", "sys.stdout.flush()\nos.execv(sys.executable, [sys.executable, '-c', '0'])", silent=True
    ),
    Attack("asks_to_exit", "get_ipython().ask_exit()"),
    Attack("quits", "get_ipython().run_line_magic('quit', '') if False else quit()"),
    Attack(
        "resets",
        "get_ipython().run_line_magic('reset', '-f')\nimport math, numpy, torch\nfrom torch import nn\n"
        "from lecturekit.checking import check, grade, passing",
    ),
    Attack(
        "runs_a_file",
        "open('own.py', 'w').write('print(6 * 7)')\nget_ipython().run_line_magic('run', 'own.py')",
    ),
    Attack("forks_itself", "for _ in range(2):\n    os.fork()\ndisplay(os.getpid())"),
    Attack(
        "writes_and_imports_a_module",
        "open('own_module.py', 'w').write('right = True')\nimport own_module",
        {"merge": inside("assert own_module.right", RIGHT_VALUE)},
    ),
    Attack("replaces_stdout", "sys.stdout = sys.stderr = None"),
    Attack("closes_stdout", "sys.stdout.flush()\nos.close(1)\nos.close(2)\nsys.stdout.close()", silent=True),
    Attack(
        "warns_honestly",
        "pass",
        {"merge": inside("import warnings\nwarnings.warn('careful')\nprint('x', file=sys.stderr)", RIGHT_VALUE)},
        plain="loses 15 honest points to a warning",
        plain_marks={"merge-test": 0},
    ),
]
