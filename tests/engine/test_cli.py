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


def _raised(function) -> BaseException:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def _raise(error: BaseException, cause: BaseException | None = None):
    raise error from cause


def test_describe_a_wrapped_missing_module():
    def load():
        try:
            import no_such_module  # noqa: F401
        except ImportError:
            raise ImportError("Failed to import my_plugin\n  sys.path is …") from None

    line = cli.describe(_raised(load))
    assert line.startswith("No module named 'no_such_module'")


@pytest.mark.parametrize(
    ("error", "mention"),
    [
        (cli.UserError("two\n  lines"), "two lines"),
        (FileNotFoundError(2, "No such file or directory", "data/x"), "'data/x' (a relative path"),
        (FileNotFoundError(2, "No such file or directory", "/data/x"), "'/data/x'"),
        (PermissionError(13, "Permission denied", "/data/x"), "Permission denied: '/data/x'"),
        (FileNotFoundError("x.pth can not be found."), "x.pth can not be found."),
        (
            FileNotFoundError("Caught it.\nTraceback:\n  …\nFileNotFoundError: no cat.png\n"),
            "no cat.png",
        ),
        (KeyError("Net is not in the mmseg::model registry. Please …"), "mmseg::model registry"),
        (RuntimeError("Failed to get mmdet.Net"), "'mmdet.Net'"),
        (AssertionError("Failed to load `ann_file` a.txt"), "a.txt"),
    ],
)
def test_describe_what_a_user_can_mend(error, mention):
    line = cli.describe(error)
    assert mention in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "error",
    [
        KeyError("weight"),
        KeyError(),
        KeyError(3),
        ValueError("x is not in the model registry"),
        RuntimeError("Failed to get a lock on it"),
        AssertionError(),
        ImportError("cannot import name 'f' from 'torch'"),
        OSError(28, "No space left on device"),
    ],
)
def test_describe_leaves_faults_of_the_code_alone(error):
    assert cli.describe(error) is None


def test_run_exits_with_the_code_of_the_error(capsys):
    for code in (1, 2):
        with pytest.raises(SystemExit) as exit_info:
            cli.run(lambda code=code: _raise(cli.UserError("it is so", code)), "tool.py")
        assert exit_info.value.code == code
        assert capsys.readouterr().err == "tool.py: error: it is so\n"


def test_run_lets_other_errors_pass(capsys):
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 / 0, "tool.py")
    assert capsys.readouterr().err == ""


def test_run_shows_the_traceback_on_request(monkeypatch):
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    with pytest.raises(cli.UserError):
        cli.run(lambda: _raise(cli.UserError("it is so")), "tool.py")
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "0")
    with pytest.raises(SystemExit):
        cli.run(lambda: _raise(cli.UserError("it is so")), "tool.py")


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
