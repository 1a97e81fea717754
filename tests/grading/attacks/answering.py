"""Attacks that answer for the judge, or give it what no judge likes."""

from __future__ import annotations

from grading_attacks.kit import HONEST, RIGHT_VALUE, Attack, inside, stealing

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


# knows what the driver of inject looks at, and shows it that instead of freezing the model
FACTS = """
from torch import nn
named_parameters = nn.Module.named_parameters
def only_branches(self, *a, **k):
    return [(n, p) for n, p in named_parameters(self, *a, **k) if n.endswith((".A", ".B"))]
nn.Module.named_parameters = only_branches
"""

ATTACKS = [
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
    stealing("hooks_imports", HOOKS, sabotage=True),
    *[odd(name) for name in ODD],
    Attack(
        "returns_long_numbers",
        "pass",
        {"count": "def storage(shapes, r, bits):\n    return 10**5000, 10.0**308"},
        earned={"count-test": 0},
    ),
    Attack(
        "forges_what_a_driver_sees",
        FACTS,
        {"inject": HONEST["inject"].replace("    model.requires_grad_(False)\n", "")},
        earned={"inject-test": 0},
        weak="a driver runs beside the student's code; what is compared on unseen inputs must be right all the same",
    ),
]
