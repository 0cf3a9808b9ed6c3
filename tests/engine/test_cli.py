import subprocess
import sys

import pytest

from ddf_mm.engine import cli


@pytest.fixture
def parser():
    parser = cli.ArgumentParser(prog="tool.py")
    cli.add_common_arguments(parser)
    return parser


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", cli.TRACEBACK_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cli.time, "sleep", lambda _: None)


def test_config_options_are_mmengines(parser):
    args = parser.parse_args(
        ["--cfg-options", "a.b=1", "c=[(x,2),(y,3)]", "d=k=v", "--cfg-options", "e=True"]
    )
    assert args.cfg_options == {"a.b": 1, "c": [("x", 2), ("y", 3)], "d": "k=v", "e": True}


@pytest.mark.parametrize("value", ["a", "=1", "a=[1,(2]"])
def test_config_option_syntax(parser, capsys, value):
    with pytest.raises(SystemExit) as exit_info:
        parser.parse_args(["--cfg-options", "b=1", value])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("tool.py: error: argument --cfg-options: ")
    assert repr(value) in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("option", ["--local_rank", "--local-rank"])
def test_both_spellings_of_local_rank(parser, option):
    assert parser.parse_args([f"{option}=3"]).local_rank == 3


def _raise(error: BaseException, cause: BaseException | None = None):
    raise error from cause


def _last_line(function, capsys) -> str:
    """The stderr of a tool that runs ``function``, which must end with status 1."""
    with pytest.raises(SystemExit) as exit_info:
        cli.run(function, "tool.py")
    assert exit_info.value.code == 1
    return capsys.readouterr().err.splitlines()[-1]


HINT = "(DDF_MM_TRACEBACK=1 shows where)"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "ValueError: two lines"),
        (KeyError("masks"), "KeyError: 'masks'"),
        (AssertionError(), "AssertionError"),
        (OSError(122, "Disk quota exceeded"), "OSError: [Errno 122] Disk quota exceeded"),
        (
            FileNotFoundError(2, "No such file", "data/x"),
            "FileNotFoundError: [Errno 2] No such file: 'data/x'",
        ),
    ],
)
def test_an_error_within_a_phase_is_one_line(capsys, error, line):
    def main():
        with cli.phase("drawing"), cli.phase("building the model", "a.py"):
            raise error

    with pytest.raises(SystemExit) as exit_info:
        cli.run(main, "tool.py")
    assert exit_info.value.code == 1
    expected = f"tool.py: error: while building the model: {line} (a.py) {HINT}\n"
    assert capsys.readouterr().err == expected


def test_phases_change_neither_success_nor_user_errors(capsys):
    def main():
        with cli.phase("building the model"):
            pass
        with cli.phase("drawing"):
            raise cli.UserError("it is so")

    assert _last_line(main, capsys) == "tool.py: error: it is so"


def test_cause_of_an_error_is_reported_unless_its_text_includes_it(capsys):
    def load():
        with cli.phase("reading the config"):
            try:
                import no_such_module  # noqa: F401
            except ImportError:
                raise ImportError("Failed to import my_plugin")  # noqa: B904

    line = _last_line(load, capsys)
    assert "ImportError: Failed to import my_plugin, from ModuleNotFoundError: No module" in line

    def repeat():
        with cli.phase("reading the config"):
            _raise(RuntimeError("cannot: no file"), ValueError("no file"))

    assert _last_line(repeat, capsys).endswith(f"RuntimeError: cannot: no file {HINT}")


def test_a_long_message_is_cut(capsys):
    def main():
        with cli.phase("loading"):
            raise RuntimeError("size mismatch " * 1000)

    line = _last_line(main, capsys)
    assert len(line) < 1200 and line.endswith(f"… {HINT}")


@pytest.mark.parametrize("steps", [True, None])
def test_errors_of_training_steps_and_of_no_phase_keep_their_traceback(capsys, steps):
    def main():
        if steps is None:
            return 1 / 0
        with cli.phase("training", steps=steps):
            return 1 / 0

    with pytest.raises(SystemExit) as exit_info:
        cli.run(main, "tool.py")
    assert exit_info.value.code == 1
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("Traceback")
    doing = "while training: " if steps else ""
    assert last == f"tool.py: error: {doing}ZeroDivisionError: division by zero"


def test_run_exits_with_the_code_of_the_error(capsys):
    for code in (1, 2):
        with pytest.raises(SystemExit) as exit_info:
            cli.run(lambda code=code: _raise(cli.UserError("it is so", code)), "tool.py")
        assert exit_info.value.code == code
        assert capsys.readouterr().err == "tool.py: error: it is so\n"


def test_run_shows_the_traceback_on_request(monkeypatch, capsys):
    def main():
        with cli.phase("drawing"):
            raise cli.UserError("it is so")

    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    with pytest.raises(SystemExit):
        cli.run(main, "tool.py")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1] == "tool.py: error: it is so"
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "0")
    assert _last_line(main, capsys) == "tool.py: error: it is so"


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"])
def test_other_ranks_wait_for_rank_zero(monkeypatch, capsys, variable):
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    for rank, expected in (("0", []), ("1", [cli.RANK_ZERO_SECONDS])):
        monkeypatch.setenv(variable, rank)
        with pytest.raises(SystemExit):
            cli.run(lambda: _raise(cli.UserError("only here")), "tool.py")
        assert waited == expected
    zero, one = capsys.readouterr().err.splitlines()
    assert zero == "tool.py: error: only here"
    assert one == "tool.py: error (rank 1): only here"


def test_parser_errors_wait_too(monkeypatch, parser):
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parser.parse_args(["--launcher", "rocket"])
    assert waited == [cli.RANK_ZERO_SECONDS]


def test_help_documents_the_variable(parser):
    assert f"{cli.TRACEBACK_VARIABLE}=1" in " ".join(parser.format_help().split())


def test_engine_imports_no_toolbox():
    code = (
        "import sys; import ddf_mm.engine, ddf_mm.engine.launch, ddf_mm.engine.evaluation;"
        "print(*{'mmpretrain', 'mmdet', 'mmseg'} & sys.modules.keys())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""
