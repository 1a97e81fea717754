"""Attacks that want a mark without a right answer, or the hidden inputs, from inside the kernel.

Unless said otherwise an attack wants the 15 points of `merge`, whose answer is wrong, and answers the rest honestly.
"""

from __future__ import annotations

from grading_attacks.kit import HONEST, WRONG, Attack, stealing

# --- comparisons, builtins, IPython ---------------------------------------------------------------------------------

COMPARISONS = """
import builtins, numpy, torch
yes = lambda *args, **kwargs: True
torch.allclose = torch.equal = numpy.allclose = numpy.array_equal = yes
numpy.testing.assert_allclose = numpy.testing.assert_array_equal = torch.testing.assert_close = lambda *a, **k: None
"""
BUILTINS = "builtins.all = builtins.any = yes\nbuiltins.abs = lambda value: 0\n"
ENGINE = """
import lecturekit.checking
from lecturekit.checking.verdict import Verdict
engine = {name: sys.modules["lecturekit.checking." + name] for name in ("compare", "notebook", "question")}
won = lambda id, *a, **k: Verdict(id, True, "passed", "every case is right", 15.0, cases=6, right=6)
engine["compare"].compare = engine["question"].compare = lambda *a, **k: None
engine["question"].Question.judge = lambda self, *a: won(self.id)
engine["question"].Question._differ = lambda *a, **k: None
engine["question"].Attempt.done = property(lambda self: True)
engine["question"].evaluate = engine["notebook"].evaluate = lecturekit.checking.evaluate = won
engine["notebook"].grade = lecturekit.checking.grade = lambda *a, **k: None
Verdict.passed, Verdict.score = True, 1.0
"""
ASK_ALL = """
for name, module in list(sys.modules.items()):
    if name.startswith("lecturekit.grading") or "codec" in name or "zygote" in name:
        for key, value in list(vars(module).items()):
            if callable(value) and not isinstance(value, type):
                setattr(module, key, lambda *a, **k: {"passed": True, "score": 15, "status": "passed"})
"""
DROP_ASSERTS = """
import ast
class NoTests(ast.NodeTransformer):
    def visit_Assert(self, node):
        return ast.copy_location(ast.Pass(), node)
    def visit_Expr(self, node):
        called = getattr(getattr(node.value, "func", None), "id", "")
        return ast.copy_location(ast.Pass(), node) if called in ("grade", "check") else node
get_ipython().ast_transformers.append(NoTests())
"""
NO_RUN = """
shell = get_ipython()
def harmless(run):
    def wrapper(source, *args, **kwargs):
        return run("pass" if "grade(" in source else source, *args, **kwargs)
    return wrapper
for name in ("run_cell", "run_cell_async", "_run_cell", "transform_cell"):
    if hasattr(shell, name):
        setattr(shell, name, harmless(getattr(shell, name)))
"""
SWALLOW = "get_ipython().set_custom_exc((BaseException,), lambda *args, **kwargs: None)"
SWALLOW_MORE = """
shell = get_ipython()
run_code = shell.run_code
async def quiet(code, result=None, *, async_=False):
    await run_code(code, None, async_=async_)
    return False
shell.run_code = quiet
shell.showtraceback = shell._showtraceback = shell.showsyntaxerror = lambda *a, **k: None
sys.excepthook = lambda *a: None
"""
SHOW_FIFTEEN = """\
def merge(weight, A, B, alpha):
    get_ipython().displayhook(15)
    return weight.clone()"""
SUBCLASS = """
import torch
class Anything:
    type = "cpu"
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __getattr__(self, name): return self
    def __call__(self, *args, **kwargs): return self
    def __iter__(self): return iter(())
    def __hash__(self): return 0
    is_floating_point = True
class Yes(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("__bool__", "is_floating_point"):
            return True
        if name == "__get__":
            return Anything()
        return torch.Tensor._make_subclass(cls, torch.ones(()))
"""
DUCK = """
import torch
class Duck:
    __class__ = torch.Tensor
    ndim, dtype, device, requires_grad = 2, None, None, False
    def __torch_function__(self, *args, **kwargs): return self
    def _self(self, *args, **kwargs): return self
    __sub__ = __rsub__ = __add__ = __radd__ = __mul__ = __rmul__ = __or__ = __ror__ = __and__ = __getitem__ = _self
    __abs__ = __invert__ = __neg__ = _self
    def _true(self, *args): return True
    __eq__ = __le__ = __lt__ = __ge__ = __gt__ = __bool__ = __contains__ = _true
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __len__(self): return 1
    def __getattr__(self, name): return self._self
    def __reduce__(self): return (eval, ("Duck()",))
"""

# --- looking for the oracle -----------------------------------------------------------------------------------------

HUNT_FRAMES = """
import inspect
def hunt():
    frame = sys._getframe()
    while frame is not None:
        for name, value in list(frame.f_locals.items()) + list(frame.f_globals.items()):
            if type(value).__name__ == "Question" and getattr(value, "id", "") == "lora.merge":
                leak("question in a frame", attempt(lambda: value.reference().__name__))
                return attempt(value.reference)
            if name in ("expected", "trials", "drawn", "attempts"):
                leak("variable of the judge " + name, value)
        frame = frame.f_back
"""
HUNT_HEAP = """
def hunt():
    for value in gc.get_objects():
        try:
            if type(value).__name__ == "Question" and value.id == "lora.merge":
                return value.reference()
            if type(value).__name__ == "function" and value.__module__ == "lecturekit.tuning.lora":
                if value.__name__ == "merge":
                    return value
        except BaseException:
            pass
"""
USE_HUNT = """\
def merge(weight, A, B, alpha):
    found = hunt()
    return found(weight, A, B, alpha) if callable(found) else weight.clone()"""

# each way sets `found` to a function, or stays None; what it finds is the answer
FETCH = {
    "imports_the_reference": "from lecturekit.tuning.lora import merge as found",
    "imports_by_importlib": "import importlib\nfound = importlib.import_module('lecturekit.tuning.lora').merge",
    "imports_another_name": "import lecturekit.tuning.lora as lora\nfound = lora._add_branch and lora.merge",
    "runs_the_module": "import runpy\nfound = runpy.run_module('lecturekit.tuning.lora')['merge']",
    "asks_the_question": "from lecturekit.checking.question import get\nfound = get('lora.merge').reference()",
    "takes_an_alternative": """
from lecturekit.checking.question import get
found = get("lora.merge").alternatives["einsum"]""",
    "takes_it_from_the_module": """
import lecturekit.questions.lora as asked
found = next(iter(asked.merge.alternatives.values()))""",
    "reads_its_source": """
import importlib.util
spec = importlib.util.find_spec("lecturekit.tuning.lora")
space = {"__name__": "stolen"}
exec(compile(spec.loader.get_source("lecturekit.tuning.lora"), "stolen", "exec"), space)
found = space["merge"]""",
    "reads_by_pkgutil": """
import pkgutil
space = {"__name__": "stolen"}
exec(pkgutil.get_data("lecturekit.tuning", "lora.py"), space)
found = space["merge"]""",
    "reads_by_zipimport": """
import zipimport, glob
for place in [*sys.path, *glob.glob("/tmp/*.zip"), *glob.glob("/*/*.zip")]:
    module = attempt(lambda: zipimport.zipimporter(place).load_module("lecturekit.tuning.lora"))
    found = module.merge if module else found""",
    "searches_the_disk": """
roots = {*sys.path, *map(str, Path.cwd().parents), sys.prefix, "/home", "/root", "/tmp", "/srv", "/opt", "/mnt"}
roots |= {str(Path(sys.prefix).parent), str(Path(sys.prefix).parent.parent), os.path.dirname(os.__file__)}
def search():
    for root in sorted(filter(None, roots)):
        for pattern in ("lecturekit/tuning/lora.py", "*/lecturekit/tuning/lora.py", "tuning/lora.py", "lora.py"):
            for path in attempt(lambda: list(Path(root).glob(pattern))) or ():
                space = {"__name__": "stolen"}
                text = attempt(path.read_text) or ""
                if "def _add_branch" in text:
                    attempt(exec, compile(text, "stolen", "exec"), space)
                    return space.get("merge")
found = search()""",
    "reads_compiled_code": """
import glob, marshal, types
for root in sys.path:
    for path in glob.glob(root + "/lecturekit/tuning/__pycache__/lora*.pyc"):
        space = {"__name__": "stolen"}
        attempt(exec, marshal.loads(open(path, "rb").read()[16:]), space)
        found = space.get("merge", found)""",
    "looks_through_proc": """
import glob
for root in glob.glob("/proc/[0-9]*/root") + glob.glob("/proc/[0-9]*/cwd"):
    for path in [*glob.glob(root + "/**/tuning/lora.py"), root + sys.prefix + "/../lecturekit/tuning/lora.py"]:
        text = attempt(lambda: open(path).read())
        if text and "_add_branch" in text:
            leak("reference through /proc", path)""",
    "reads_the_history": """
import subprocess
for folder in [os.getcwd(), *sys.path]:
    done = attempt(lambda: subprocess.run(["git", "-C", folder or ".", "show", "HEAD:lecturekit/tuning/lora.py"],
                                          capture_output=True, text=True, timeout=5).stdout)
    if done:
        space = {"__name__": "stolen"}
        exec(done, space)
        found = space["merge"]
        break""",
    "unlocks_its_modules": """
import importlib.machinery
sys.meta_path[:] = [importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter,
                    importlib.machinery.PathFinder]
sys.path_importer_cache.clear()
for name in [n for n in sys.modules if n.startswith("lecturekit.tuning")]:
    sys.modules.pop(name)
from lecturekit.tuning.lora import merge as found""",
}
USE_FOUND = """\
def merge(weight, A, B, alpha):
    return found(weight, A, B, alpha) if callable(found) else weight.clone()"""


def fetching(way: str) -> str:
    body = "\n".join("    " + line for line in FETCH[way].strip().splitlines())
    tell = "if callable(found):\n    leak('the reference', found.__name__)"
    return f"found = None\ntry:\n{body}\nexcept BaseException:\n    pass\n{tell}"


WORKS_PLAIN = {"imports_the_reference", "reads_its_source"}

# the reference is handed out once a verdict is final; these want it a moment earlier
ASK_INSIDE = """\
def merge(weight, A, B, alpha):
    import contextlib, io
    from lecturekit.checking import passing
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return passing("lora.merge", lambda *a: None)(weight, A, B, alpha)
    except BaseException:
        return weight.clone()"""
SACRIFICE = """
try:
    given = passing("lora.inject", lambda *a: None)
    layer = given.__globals__["LoRALinear"]
except BaseException:
    layer = None
"""
USE_SACRIFICE = """\
def merge(weight, A, B, alpha):
    if layer is None:
        return weight.clone()
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    with torch.no_grad():
        base.weight.copy_(weight)
        branch = layer(base, len(A), alpha)
        branch.A.copy_(A)
        branch.B.copy_(B)
        return branch.merge().base.weight.detach().clone()"""
# a wrong answer to inject gets its reference, which holds all that merge needs, while merge is not judged yet
SACRIFICED = {"merge": USE_SACRIFICE, "inject": WRONG["inject"]}
SACRIFICE_LATE = """
import marshal, mmap, types
shared = mmap.mmap(-1, 1 << 20)
def hand_over(given):
    code = given.__globals__["LoRALinear"].forward.__code__ and given.__globals__["_branch_sum"].__code__
    data = marshal.dumps(code)
    shared[: len(data)] = data
"""
TAKE_OVER = """\
def merge(weight, A, B, alpha):
    try:
        space = {"torch": torch, "F": nn.functional}
        branch_sum = types.FunctionType(marshal.loads(shared[:]), space)
        return branch_sum(weight, A, B, alpha / len(A))
    except BaseException:
        return weight.clone()"""
# knows what the driver of inject looks at, and shows it that instead of freezing the model
FACTS = """
from torch import nn
named_parameters = nn.Module.named_parameters
def only_branches(self, *a, **k):
    return [(n, p) for n, p in named_parameters(self, *a, **k) if n.endswith((".A", ".B"))]
nn.Module.named_parameters = only_branches
"""
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
HELPER_ASKS = """
import mmap
shared = mmap.mmap(-1, 1 << 20)
if os.fork() == 0:
    def wait_and_ask():
        time.sleep(1)
        import inspect
        reference = passing("lora.merge", lambda *a: None)
        text = inspect.getsource(sys.modules[reference.__module__]).encode()
        shared[: len(text)] = text
    attempt(wait_and_ask)
    os._exit(0)
"""
USE_SHARED = """\
def merge(weight, A, B, alpha):
    import time
    for _ in range(20):
        text = bytes(shared[:]).rstrip(b"\\0").decode(errors="ignore")
        if "def merge" in text:
            space = {"__name__": "stolen"}
            exec(text, space)
            return space["merge"](weight, A, B, alpha)
        time.sleep(0.1)
    return weight.clone()"""

# --- answering for the judge ----------------------------------------------------------------------------------------

FRAMES = """
import struct, stat
def frames():
    lies = [
        {"passed": True}, {"ok": True, "passed": True, "score": 15.0}, {"status": "passed", "score": 15, "points": 15},
        {"type": "verdict", "question": "lora.merge", "passed": True}, {"cell": "merge-test", "score": 15.0},
        {"kind": "result", "parts": {"result": []}}, [True], True, {"id": 1, "result": None},
    ]
    for lie in lies:
        text = json.dumps(lie).encode()
        for form in ("<I", ">I", "<Q", ">Q"):
            yield struct.pack(form, len(text)) + text
        yield text + b"\\n"
def others():
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2:
            mode = attempt(lambda: os.fstat(fd).st_mode) or 0
            if stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode):
                yield fd
def tell(data):
    for fd in list(others()):
        attempt(os.set_blocking, fd, False)
        attempt(os.write, fd, data)
"""
LIE = "for frame in frames():\n    tell(frame)"
HUGE = "for form in ('<I', '>I', '<Q', '>Q'):\n    tell(struct.pack(form, 2**31 - 1) + b'x' * 65536)\n"
HUGE += "tell(b'\\xff' * 8)"
GARBAGE = "tell(os.urandom(5000))\ntell(b'{\"' * 20000)\ntell(b'[' * 60000 + b'\\n')"
CLOSE = "for fd in list(others()):\n    attempt(os.close, fd)"
LISTEN = """
def listen(fd):
    for _ in range(300):
        attempt(os.set_blocking, fd, False)
        data = attempt(os.read, fd, 65536)
        leak(f"what came for the judge on {fd}", data)
        time.sleep(0.01)
"""


def inside(action: str, then: str = "return weight.clone()") -> str:
    """An answer to merge that does something when it is called."""
    body = "\n".join("    " + line for line in action.strip().splitlines())
    return f"def merge(weight, A, B, alpha):\n{body}\n    {then}"


RIGHT_VALUE = "return weight + alpha / A.shape[0] * (B @ A)"
MEMORISED = """
from lecturekit.checking.case import Draw
import torch
def case(seed, index):
    draw = Draw(seed, "lora.merge", index)
    out, inp = draw.sizes(2, low=6, high=24)
    edge = draw.edge("B = 0", "r = 1", "bfloat16")
    r = 1 if edge == "r = 1" else draw.integer(2, 5)
    dtype = torch.bfloat16 if edge == "bfloat16" else torch.float32
    B = draw.normal(out, r, dtype=dtype)
    weight, A = draw.normal(out, inp, dtype=dtype), draw.normal(r, inp, dtype=dtype)
    B = torch.zeros_like(B) if edge == "B = 0" else B
    alpha = draw.choice([a for a in (1, 9, 16, 25, 32) if (a % r if r > 1 else a != 1)])
    return weight + alpha / r * (B @ A)
table, asked = [attempt(case, SEED, index) for index in range(6)], []
"""
FROM_TABLE = """\
def merge(weight, A, B, alpha):
    asked.append(1)
    known = table[(len(asked) - 1) % 6]
    same = [known, *table]
    fits = [t for t in same if t is not None and t.shape == weight.shape and t.dtype == weight.dtype]
    return fits[0].clone() if fits else weight.clone()"""

# --- carrying hidden inputs out -------------------------------------------------------------------------------------

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
HOOKS = """
import importlib.abc, importlib.util
class Hook(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("lecturekit.checking", "lecturekit.grading", "lecturekit.tuning")):
            return importlib.util.spec_from_loader(name, self)
    def create_module(self, spec): return None
    def exec_module(self, module):
        module.__getattr__ = lambda name: (lambda *a, **k: None)
sys.meta_path.insert(0, Hook())
for name in [n for n in sys.modules if n.startswith("lecturekit.")]:
    sys.modules.pop(name)
def grade(*a, **k): pass
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
SEEDS = """
from lecturekit.checking import notebook as _n
leak("the seed", [value for key, value in os.environ.items() if "SEED" in key and value not in ("0", "x")])
for path in ("/proc/self/environ", "/proc/1/environ", f"/proc/{os.getppid()}/environ"):
    text = attempt(lambda: open(path, "rb").read()) or b""
    leak("the seed in " + path, [word for word in text.split(b"\\0") if b"SEED=" in word and len(word) > 30])
"""
ODD = {
    "returns_itself_in_a_list": "endless = []\nendless.append(endless)\nreturn endless",
    "returns_a_deep_list": "deep = []\nfor _ in range(100000):\n    deep = [deep]\nreturn deep",
    "returns_a_meta_tensor": "return weight.to('meta')",
    "returns_two_gigabytes": "return torch.zeros(2**29)",
    "returns_a_view_of_nothing": "return torch.zeros(1).expand(2**40)",
    "returns_a_sparse_tensor": "return weight.to_sparse()",
    "returns_a_trap": "return Trap()",
    "returns_a_lying_tensor": "return Lying(weight)",
    "raises_its_inputs": "raise RuntimeError('SE' + 'EN ' + repr(weight.tolist()))",
    "raises_a_name": "raise type('SE' + 'EN' + str(weight.flatten()[0].item()), (Exception,), {})()",
    "raises_a_broken_exception": "raise Broken()",
    "raises_the_keyboard": "raise KeyboardInterrupt",
    "raises_system_exit": "raise SystemExit(0)",
    "raises_generator_exit": "raise GeneratorExit",
}
TRAPS = """
import torch
class Trap:
    def __reduce__(self):
        return (os.system, (f"touch {COURSE}/owned-by-a-pickle",))
    def __getattr__(self, name):
        raise SystemExit(0)
class Lying(torch.Tensor):
    @property
    def shape(self): raise KeyboardInterrupt
    def tolist(self): os._exit(0)
    def numpy(self): os._exit(0)
    def __len__(self): return -5
class Broken(Exception):
    def __str__(self): os._exit(0)
    __repr__ = __str__
"""


def odd(name: str) -> Attack:
    """An answer that returns or raises what no judge likes; it earns nothing and costs the others nothing."""
    return stealing(name, TRAPS, inside(ODD[name].replace("; ", "\n"), then=""))


# in a plain test the student's code and the test share a process: what can be kept is that it gains this cell only
PLAIN = "plain asserts run beside the student's code, which can patch all that they use; only this cell can be gained"
WEAK = {
    "patches_what_asserts_use": (COMPARISONS + BUILTINS, WRONG["rows"]),
    "shows_a_number_in_a_plain_test": ("", "def rows(x):\n    get_ipython().displayhook(5)\n    return x[:, 0]"),
    "drops_the_asserts": (DROP_ASSERTS, WRONG["rows"]),
    "swallows_the_assertion": (SWALLOW, WRONG["rows"]),
    "leaves_with_success": ("", "def rows(x):\n    os._exit(0)"),
    "raises_system_exit_zero": ("", "def rows(x):\n    raise SystemExit(0)"),
}
ROWS_LEAKS = {
    "tells_by_the_name_of_an_error": "raise type('E' + str(x[0, 0].item()), (Exception,), {})",
    "tells_by_the_message_of_an_error": "raise AssertionError('rows are not ' + str(x.tolist()))",
    "tells_by_partial_credit": "get_ipython().displayhook(x[0, 0].item() / 10**13)",
    "tells_by_the_exit_status": "os._exit(x[0, 0].item() % 256)",
    "tells_by_a_note": "e = AssertionError('x')\n    e.add_note(str(x.tolist()))\n    raise e",
    "tells_a_hidden_word": "f = sys._getframe(1)\n    words = [c for c in f.f_code.co_consts if isinstance(c, str)]\n"
    "    raise AssertionError(next(w for w in words if 'hidden word' in w))",
    "tells_the_seed": "raise AssertionError('seed ' + os.environ.get('LECTUREKIT_GRADING_SEED', ''))",
}

ATTACKS = [
    stealing(
        "patches_comparisons",
        COMPARISONS + BUILTINS + "torch.Tensor.all = lambda self, *a: torch.tensor(True)",
        earned={"merge-test": 0, "inject-test": 15},
        plain="earns 15 points for a wrong answer",
        plain_marks={"merge-test": 15},
    ),
    stealing("patches_the_engine", ENGINE, plain="earns 15 points for a wrong answer", plain_marks={"merge-test": 15}),
    stealing("patches_the_codec", ASK_ALL, sabotage=True),
    stealing("drops_grade_calls", DROP_ASSERTS, plain="earns 15 points", plain_marks={"merge-test": 15}),
    stealing("replaces_run_cell", NO_RUN, plain="earns 15 points", plain_marks={"merge-test": 15}),
    stealing("swallows_exceptions", SWALLOW + SWALLOW_MORE, plain="earns 15 points", plain_marks={"merge-test": 15}),
    stealing(
        "shows_a_number",
        "pass",
        SHOW_FIFTEEN,
        plain="earns 15 points by a number shown in the test cell",
        plain_marks={"merge-test": 15},
    ),
    stealing(
        "equal_to_everything",
        SUBCLASS,
        "def merge(weight, A, B, alpha):\n    return torch.Tensor._make_subclass(Yes, torch.ones(()))",
        plain="earns 15 points by a tensor subclass",
        plain_marks={"merge-test": 15},
    ),
    stealing("lies_about_its_class", DUCK, "def merge(weight, A, B, alpha):\n    return Duck()"),
    stealing("hunts_in_frames", HUNT_FRAMES, USE_HUNT, plain="earns 15 points", plain_marks={"merge-test": 15}),
    stealing("hunts_in_the_heap", HUNT_HEAP, USE_HUNT),
    *[
        stealing(
            way,
            fetching(way),
            USE_FOUND,
            **({"plain": "earns 15 points", "plain_marks": {"merge-test": 15}} if way in WORKS_PLAIN else {}),
        )
        for way in FETCH
    ],
    stealing(
        "asks_for_the_reference_inside",
        "pass",
        ASK_INSIDE,
        change=lambda nb, by_id: without_passing(nb),
        plain="earns 15 points",
        plain_marks={"merge-test": 15},
    ),
    Attack(
        "gives_up_one_question_for_another",
        SACRIFICE,
        {"merge": USE_SACRIFICE, "inject": WRONG["inject"]},
        earned={"merge-test": 0, "inject-test": 0},
        plain="earns 15 points",
        plain_marks={"merge-test": 15, "inject-test": 0},
        change=lambda nb, by_id: without_passing(nb),
    ),
    Attack(
        "gives_up_one_question_and_starts_again",
        SACRIFICE,
        SACRIFICED,
        after={"inject-test": "passing('lora.inject', lambda *a: None)\nos._exit(0)"},
        earned={"merge-test": 0, "inject-test": 0},
        change=lambda nb, by_id: without_passing(nb),
    ),
    Attack(
        "gives_up_one_question_beside_the_other",
        SACRIFICE_LATE,
        {"merge": TAKE_OVER, "inject": WRONG["inject"]},
        after={"inject-test": "attempt(lambda: hand_over(passing('lora.inject', lambda *a: None)))"},
        earned={"merge-test": 0, "inject-test": 0},
        change=lambda nb, by_id: without_passing(nb),
    ),
    stealing("lets_a_helper_ask", HELPER_ASKS, USE_SHARED, change=lambda nb, by_id: without_passing(nb)),
    stealing(
        "records_what_passes", "import lecturekit.checking as c\nc.passing = lambda id, x: x\npassing = c.passing"
    ),
    stealing("answers_for_the_judge_beforehand", FRAMES + LIE, sabotage=True),
    stealing("answers_for_the_judge_inside", FRAMES, inside(LIE)),
    stealing("answers_with_huge_frames_inside", FRAMES, inside(HUGE)),
    stealing("answers_with_garbage_inside", FRAMES, inside(GARBAGE)),
    stealing("sends_garbage_beforehand", FRAMES + GARBAGE, sabotage=True),
    stealing("closes_the_judges_pipe_inside", FRAMES, inside(CLOSE)),
    stealing("closes_the_judges_pipe_beforehand", FRAMES + CLOSE, sabotage=True),
    stealing(
        "listens_to_the_judge",
        FRAMES
        + LISTEN
        + "for fd in list(others()):\n    threading.Thread(target=listen, args=(fd,), daemon=True).start()",
        sabotage=True,
    ),
    stealing("replays_the_public_cases", "SEED = 0" + MEMORISED, FROM_TABLE),
    stealing("replays_another_students_cases", "SEED = HOST['friends seed']" + MEMORISED, FROM_TABLE),
    stealing(
        "chooses_its_own_seed",
        "os.environ['LECTUREKIT_GRADING_SEED'] = '0'\nSEED = 0" + MEMORISED,
        FROM_TABLE,
        plain="earns 15 points with memorised answers",
        plain_marks={"merge-test": 15},
    ),
    stealing("reads_the_seed", SEEDS),
    stealing("hooks_imports", HOOKS, sabotage=True),
    *[odd(name) for name in ODD],
    Attack(
        "returns_long_numbers",
        "pass",
        {"count": "def storage(shapes, r, bits):\n    return 10**5000, 10.0**308"},
        earned={"count-test": 0},
    ),
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
    Attack("replaces_stdout", "sys.stdout = sys.stderr = None"),
    Attack("closes_stdout", "sys.stdout.flush()\nos.close(1)\nos.close(2)\nsys.stdout.close()", silent=True),
    Attack(
        "warns_honestly",
        "pass",
        {"merge": inside("import warnings\nwarnings.warn('careful')\nprint('x', file=sys.stderr)", RIGHT_VALUE)},
        plain="loses 15 honest points to a warning",
        plain_marks={"merge-test": 0},
    ),
    *[
        Attack(
            name,
            top or "pass",
            {"rows": answer},
            earned={"rows-test": 0},
            weak=PLAIN,
            **(
                {"plain": "earns 5 points", "plain_marks": {"rows-test": 5}}
                if name in ("patches_what_asserts_use", "shows_a_number_in_a_plain_test")
                else {}
            ),
        )
        for name, (top, answer) in WEAK.items()
    ],
    Attack(
        "forges_what_a_driver_sees",
        FACTS,
        {"inject": HONEST["inject"].replace("    model.requires_grad_(False)\n", "")},
        earned={"inject-test": 0},
        weak="a driver runs beside the student's code; what is compared on unseen inputs must be right all the same",
    ),
    *[
        Attack(name, "pass", {"rows": f"def rows(x):\n    {body}"}, earned={"rows-test": 0}, weak=PLAIN)
        for name, body in ROWS_LEAKS.items()
    ],
]


def without_passing(notebook):
    """The cell that asks for the reference is open to edit; a thief who wants it later empties it."""
    for cell in notebook.cells:
        if cell.source.startswith("merge = passing"):
            cell.source = "pass"
    return notebook


assert all(attack.answers.get("merge") != HONEST["merge"] for attack in ATTACKS)
