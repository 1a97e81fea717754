"""nbgrader's settings for this course. Run nbgrader and JupyterLab (formgrader) from this folder."""

from pathlib import Path

from nbconvert.preprocessors import CSSHTMLHeaderPreprocessor as CSSHTMLHeader
from nbgrader.preprocessors import ClearHiddenTests, GetGrades

from lecturekit.grading.autograde import install
from lecturekit.grading.course import put_environment_on_path

c = get_config()  # noqa: F821  (traitlets puts it there when it reads this file)
root = Path(__file__).resolve().parent
course = root / "course"
# SQLite makes the gradebook but not the folder it lies in; nbgrader complains about an exchange it cannot write to,
# although this course hands notebooks out and in by other ways
(course / "exchange").mkdir(parents=True, exist_ok=True)

put_environment_on_path()

# --- where things are -----------------------------------------------------------------------------------------------
c.CourseDirectory.course_id = "lecturekit"
c.CourseDirectory.root = str(root)  # so that nbgrader may be started from any folder below
c.CourseDirectory.source_directory = "solutions"  # the notebooks here are made by `lecturekit release`
c.CourseDirectory.release_directory = "labs"  # what students get, committed
c.CourseDirectory.submitted_directory = "course/submitted"  # course/ holds all that must never be committed
c.CourseDirectory.autograded_directory = "course/autograded"
c.CourseDirectory.feedback_directory = "course/feedback"
c.CourseDirectory.db_url = f"sqlite:///{course / 'gradebook.db'}"
c.Exchange.root = str(course / "exchange")
# *.py: the labs' sources hold the solutions, and a submitted torch.py must not shadow torch
c.CourseDirectory.ignore = [".ipynb_checkpoints", "*.pyc", "__pycache__", "feedback", "*.py"]

# --- making the release ---------------------------------------------------------------------------------------------
# the stub is what lecturekit.checking knows as "not attempted"
c.ClearSolutions.code_stub = {"python": "# YOUR CODE HERE\nraise NotImplementedError"}
c.ClearSolutions.text_stub = "*Your answer here.*"

# --- grading --------------------------------------------------------------------------------------------------------
install()  # `nbgrader autograde` and formgrader's button grade as `lecturekit grade` does, in the sandbox
c.Grader.cell_seconds = 120  # for one cell; in the smoke profile it takes a few
c.Grader.notebook_seconds = 900  # for one pass over the cells of a notebook
c.GenerateFeedback.preprocessors = [GetGrades, ClearHiddenTests, CSSHTMLHeader]  # hidden tests stay hidden
