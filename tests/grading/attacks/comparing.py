"""Attacks on what compares: patched functions and builtins, IPython, objects equal to everything, plain asserts.

Unless said otherwise an attack wants the 15 points of `merge`, whose answer is wrong, and answers the rest honestly.
"""

from __future__ import annotations

from grading_attacks.kit import WRONG, Attack, stealing

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
        sabotage=True,
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
    *[
        Attack(
            name,
            top or "pass",
            {"rows": answer},
            earned={"rows-test": 0},
            weak=PLAIN,
            sabotage=bool(top),
            **(
                {"plain": "earns 5 points", "plain_marks": {"rows-test": 5}}
                if name in ("patches_what_asserts_use", "shows_a_number_in_a_plain_test")
                else {}
            ),
        )
        for name, (top, answer) in WEAK.items()
    ],
    *[
        Attack(name, "pass", {"rows": f"def rows(x):\n    {body}"}, earned={"rows-test": 0}, weak=PLAIN)
        for name, body in ROWS_LEAKS.items()
    ],
]
