"""Attacks that answer for the judge, or give it what no judge likes."""

from __future__ import annotations

from grading_attacks.kit import HONEST, Attack, inside, stealing

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
        leak(f"a question on {fd}", data if b"nonce" in (data or b"") else None)  # its own next cell is no secret
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
import torch
from torch import nn
named_parameters = nn.Module.named_parameters
def only_branches(self, *a, **k):
    found = named_parameters(self, *a, **k)
    return [(n, p) for n, p in found if type(self).__name__ != "_Model" or n.endswith((".A", ".B"))]
nn.Module.named_parameters = only_branches
"""
# and makes autograd give the gradients that a frozen model would have: what it then shows has been computed in earnest
MATHEMATICS = """
branches = []
gradients = torch.autograd.grad
def of_branches(output, leaves, **k):
    found = gradients(output, leaves, **k)
    return tuple(g if any(p is b for b in branches) else torch.zeros_like(g) for p, g in zip(leaves, found))
torch.autograd.grad = of_branches
"""
NOTE_BRANCHES = """


injected = add_lora
def add_lora(model, *rest):
    model = injected(model, *rest)
    branches[:] = [p for n, p in named_parameters(model) if n.endswith((".A", ".B"))]
    return model"""
# honest but for the one line that freezes
UNFROZEN = HONEST["inject"].replace("    model.requires_grad_(False)\n", "")
# finds the judge's message in the frames above, and answers it on every socket there is
BY_HAND = """
import stat
from lecturekit.grading import codec
def reply(*attempts):
    frame = sys._getframe()
    while frame is not None and "nonce" not in (frame.f_locals.get("message") or ()):
        frame = frame.f_back
    message = frame.f_locals["message"]
    full = list(attempts) * (len(message["cases"]) if len(attempts) == 1 else 1)
    for name in os.listdir("/proc/self/fd"):
        if stat.S_ISSOCK(attempt(lambda: os.fstat(int(name)).st_mode) or 0):
            link = socket.socket(fileno=os.dup(int(name)))
            codec.send(link, {"nonce": message["nonce"], "attempts": full})
def made(**parts):
    return {"parts": parts, "failure": "", "message": ""}
"""
# what a cell may say to the worker, and what it may not
PROTOCOL = """
import torch
from lecturekit.grading import codec
link = get_ipython().channel.sock
def say(**message):
    attempt(codec.send, link, message)
say(output={"output_type": "display_data", "data": {"image/png": "?", "application/json": "{", 5: [], "x" * 5000: "y"}})
say(output={"output_type": "error", "ename": 5, "evalue": None, "traceback": ["x" * 10**6] * 4})
say(output={"output_type": "execute_result", "data": {"text/plain": 10**30}, "execution_count": "many"})
say(output={"output_type": "stream", "name": "stdin", "text": "\\ud800" * 100})
say(output=[[[[]]]] * 5000)
def request(**message):
    say(**message)
    leak("the reference", (attempt(codec.receive, link) or {}).get("source"))
for wanted in ("lora.none", ["lora.merge"], {"lora.merge": 1}, None, 7):
    request(passing=wanted)
for wanted in (["os", "system"], ["lecturekit.tuning.lora", "*"], ["lecturekit.tuning.lora", "no such\\n"],
               ["lecturekit.tuning.lora", ""], ["../lora", "merge"], "merge", [[], {}], 5):
    request(reference=wanted)
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
    Attack("forges_what_a_driver_sees", FACTS, {"inject": UNFROZEN}, earned={"inject-test": 0}),
    Attack(
        "forges_what_a_driver_sees_and_computes",
        FACTS + MATHEMATICS,
        {"inject": UNFROZEN + NOTE_BRANCHES},
        earned={"inject-test": 0},
        weak="a driver runs beside the student's code. To pass without freezing, one must have put the right branches "
        "in the right places and computed a step of training in which nothing else moves",
    ),
    stealing("answers_by_hand", BY_HAND, inside("reply(made(result=weight))")),
    stealing("answers_by_hand_with_a_verdict", BY_HAND, inside("reply({'passed': True, 'score': 15.0})")),
    stealing("answers_by_hand_with_too_many", BY_HAND, inside("reply(*[made(result=weight)] * 9999)")),
    stealing("answers_by_hand_with_much", BY_HAND, inside("reply(made(result=weight.new_zeros(10**7)))")),
    stealing("says_what_it_may_not", PROTOCOL),
    stealing("says_that_it_is_done", PROTOCOL + "say(done=True, count=10**9)\nsay(done=True)", sabotage=True),
    stealing("sends_much", PROTOCOL + "for _ in range(50):\n    say(output=torch.zeros(2**25))", sabotage=True),
]
