"""The grader's settings: from nbgrader_config.py, from the command line, and nothing misspelt is let through."""

import pytest
from traitlets.config import Config
from traitlets.config.loader import DeferredConfigString

from lecturekit.grading.options import GradingOptions


def config(**settings):
    made = Config()
    for name, value in settings.items():
        made.Grader[name] = value
    return made


def test_settings_are_taken_and_what_is_asked_for_at_once_comes_before_them():
    options = GradingOptions.from_config(config(cell_seconds=7, gpu=True), cell_seconds=9)
    assert (options.cell_seconds, options.gpu, options.memory) == (9, True, GradingOptions().memory)


def test_words_of_the_command_line_become_numbers():
    words = {"cell_seconds": "2.5", "memory": "1000", "gpu": "True", "isolation": "landlock"}
    options = GradingOptions.from_config(config(**{name: DeferredConfigString(word) for name, word in words.items()}))
    assert (options.cell_seconds, options.memory, options.gpu, options.isolation) == (2.5, 1000, True, "landlock")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cell_second": 3}, "c.Grader.cell_second: there is no such setting; there are .*cell_seconds"),
        ({"memory": "much"}, "c.Grader.memory must be a number, got 'much'"),
        ({"gpu": "perhaps"}, "c.Grader.gpu must be True or False, got 'perhaps'"),
        ({"memory": 0}, "memory must be a positive number, got 0"),
        ({"deaths": True}, "deaths must be a positive number, got True"),
        ({"isolation": "docker"}, "isolation must be one of bubblewrap, landlock, none, or empty, got 'docker'"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        GradingOptions.from_config(config(**settings))
