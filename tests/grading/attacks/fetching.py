"""Attacks that look for the right answer: the reference, its source, the cases, the seed."""

from __future__ import annotations

from grading_attacks.kit import WRONG, Attack, stealing

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
SEEDS = """
from lecturekit.checking import notebook as _n
leak("the seed", [value for key, value in os.environ.items() if "SEED" in key and value not in ("0", "x")])
for path in ("/proc/self/environ", "/proc/1/environ", f"/proc/{os.getppid()}/environ"):
    text = attempt(lambda: open(path, "rb").read()) or b""
    leak("the seed in " + path, [word for word in text.split(b"\\0") if b"SEED=" in word and len(word) > 30])
"""


def without_passing(notebook):
    """The cell that asks for the reference is open to edit; a thief who wants it later empties it."""
    for cell in notebook.cells:
        if cell.source.startswith("merge = passing"):
            cell.source = "pass"
    return notebook


ATTACKS = [
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
]
