"""What benchmarks do beside measuring: arguments, reports, and control groups that are always cleaned up."""

import ast
import errno
import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _in_benchmarks(monkeypatch):
    """The scripts import each other as they do when they are run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def load(name):
    return importlib.import_module(name)


# ---- arguments ----


def test_the_defaults_are_the_headline_comparison():
    options = load("speed").parse([])
    assert (options.quotas, options.global_batch, options.model, options.size) == ([100, 25], 64, "resnet18", 64)
    assert options.splits is None
    assert options.allocator == "kept"
    name_of = load("command_line").name_of
    assert name_of("speed", options) == "speed-resnet18-64px-100-25-b64"
    options.allocator = "default"
    assert name_of("speed", options) == "speed-resnet18-64px-100-25-b64-allocator-default"


def test_splits_are_read_as_they_are_written():
    assert load("speed").parse(["--splits", "48/16,60/4"]).splits == [(48, 16), (60, 4)]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--quotas", "25,100"],
        ["--quotas", "100,5"],
        ["--quotas", "100,x"],
        ["--global-batch", "63"],
        ["--splits", "60/5"],
        ["--splits", "30/30/4"],
        ["--splits", "64/0"],
        ["--warm-up", "0"],
        ["--rounds", "0"],
        ["--rounds", "2", "--choosing", "2"],
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        load("speed").parse(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("limit", ["--split", "60/5"]),
        ("limit", ["--rounds", "0"]),
        ("settling", ["--split", "60/5"]),
        ("settling", ["--steps", "30", "--turn", "25"]),
        ("settling", ["--turn", "2", "--warm-up", "2"]),
        ("drift", ["--quotas", "100,100"]),
        ("drift", ["--changes", "60,5"]),
        ("drift", ["--steps", "20"]),
        ("tax", ["--global-batch", "63"]),
        ("cpu", ["--quotas", "100,50"]),
        ("cpu", ["--steps", "2", "--warm-up", "2"]),
        ("evaluation", ["--samples", "0"]),
        ("allocation", ["--samples", "1"]),
    ],
)
def test_other_scripts_refuse_what_they_cannot_measure(script, arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        load(script).parse(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_three_ranks_can_be_compared():
    options = load("speed").parse(["--quotas", "100,50,25", "--global-batch", "96", "--splits", "64/22/10"])
    assert options.splits == [(64, 22, 10)]


def test_help_comes_without_torch():
    """Processes import torch where they train; nobody waits for it to read a command line."""
    scripts = (
        "speed, limit, settling, drift, evaluation, tax, cpu, allocation, overview, "
        "plot_speed, plot_drift, plot_overview"
    )
    probe = f"import sys, {scripts}; print([name for name in ('torch', 'lightning_hetero') if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True, cwd=BENCHMARKS)
    assert output.stdout == "[]\n"


def test_the_scripts_offer_the_models_that_can_be_trained():
    assert set(load("command_line").MODELS) == set(load("tasks").MODELS) == set(load("sides")._LIBRARIES)


def test_with_the_allocator_as_it_is_the_strategy_leaves_it_alone_too(monkeypatch):
    """Also where a module has imported the function by its name."""
    from lightning_hetero.device import allocator

    original = allocator.keep_freed_memory
    user = SimpleNamespace(keep_freed_memory=original)
    monkeypatch.setitem(sys.modules, "lightning_hetero.some_user", user)
    for name, module in list(sys.modules.items()):
        if name.startswith("lightning_hetero") and getattr(module, "keep_freed_memory", None) is original:
            monkeypatch.setattr(module, "keep_freed_memory", original)  # to be put back
    assert load("sides").set_allocator("default") is False
    assert user.keep_freed_memory() is False
    assert allocator.keep_freed_memory is not original


# ---- quotas ----


def test_no_core_is_promised_twice():
    place = load("quotas").place
    assert place([100, 25], [0, 1]) == [0, 1]
    assert place([100, 50, 25], [4, 7]) == [4, 7, 7]
    with pytest.raises(ValueError, match="do not fit"):
        place([100, 100, 25], [0, 1])


@pytest.mark.parametrize(
    ("lines", "version"),
    [
        ("tmpfs / tmpfs rw 0 0\ncgroup {root} cgroup rw,relatime,cpu,cpuacct 0 0\n", 1),
        ("cgroup {root} cgroup rw,relatime,cpuacct 0 0\ncgroup2 {root} cgroup2 rw 0 0\n", 2),
        ("cgroup {root} cgroup rw,memory 0 0\n", None),
    ],
)
def test_finds_the_hierarchy_that_has_quotas(tmp_path, lines, version):
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io\n")
    mounts = tmp_path / "mounts"
    mounts.write_text(lines.format(root=tmp_path))
    found = load("quotas").Hierarchy.find(mounts)
    assert (found.version if found else None) == version


class Kernel:
    """Stands for the kernel in a folder of plain files: takes a group away only when no process is left in it."""

    def __init__(self, root, monkeypatch):
        self.root = root
        (root / "cgroup.procs").write_text("")
        (root / "cgroup.subtree_control").write_text("")
        self.refusals = 0
        self.forbidden = ()
        make, write = Path.mkdir, Path.write_text

        def mkdir(folder, *args, **kwargs):
            make(folder, *args, **kwargs)
            write(folder / "cgroup.procs", "")

        def write_text(file, text, *args, **kwargs):
            if file.name in self.forbidden:
                raise PermissionError(errno.EPERM, "not permitted", str(file))
            if file.name == "cgroup.procs":
                for other in root.glob("**/cgroup.procs"):
                    write(other, "".join(f"{pid}\n" for pid in other.read_text().split() if pid != text))
                text = f"{file.read_text()}{text}\n"
            return write(file, text, *args, **kwargs)

        def rmdir(folder):
            if not folder.exists():
                raise FileNotFoundError(errno.ENOENT, "gone", str(folder))
            if self.refusals or (folder / "cgroup.procs").read_text().split():
                self.refusals -= 1
                raise OSError(errno.EBUSY, "busy", str(folder))
            for file in folder.iterdir():
                file.unlink()
            folder.rename(folder.with_suffix(".removed"))

        monkeypatch.setattr(Path, "mkdir", mkdir)
        monkeypatch.setattr(Path, "write_text", write_text)
        monkeypatch.setattr(Path, "rmdir", rmdir)

    @property
    def groups(self):
        return [path for path in self.root.iterdir() if path.is_dir() and path.suffix != ".removed"]


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    return Kernel(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("version", "files"),
    [(1, {"cpu.cfs_period_us": "10000", "cpu.cfs_quota_us": "2500"}), (2, {"cpu.max": "2500 10000"})],
)
def test_a_group_gets_its_quota_and_goes_away(kernel, version, files):
    quotas = load("quotas")
    with quotas.Quotas([100, 25], [0, 1], quotas.Hierarchy(kernel.root, version)) as held:
        (group,) = kernel.groups
        assert {name: (group / name).read_text() for name in files} == files
        held.join(0, 11)  # the fast rank is not limited
        held.join(1, 12)
        assert (group / "cgroup.procs").read_text().split() == ["12"]
        assert held.means == f"control groups (version {version}), period 10 ms"
        kernel.refusals = 1  # a process that is just ending
    assert kernel.groups == []
    assert (kernel.root / "cgroup.procs").read_text().split() == ["12"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_groups_go_away_when_the_run_fails(kernel, error):
    quotas = load("quotas")

    def run():
        with quotas.Quotas([100, 50, 25], [0, 1, 1], quotas.Hierarchy(kernel.root, 1)):
            assert len(kernel.groups) == 2
            raise error

    with pytest.raises(error):
        run()
    assert kernel.groups == []


def test_a_quota_changes_while_the_group_is_in_use(kernel):
    quotas = load("quotas")
    with quotas.Quotas([100, 25], [0, 1], quotas.Hierarchy(kernel.root, 1)) as held:
        (group,) = kernel.groups
        held.join(1, 12)
        held.change(1, 60)
        assert (group / "cpu.cfs_quota_us").read_text() == "6000"
        assert (group / "cgroup.procs").read_text().split() == ["12"]
        with pytest.raises(ValueError, match="rank 0 has a whole core"):
            held.change(0, 50)


def test_without_groups_a_changed_quota_is_another_number_of_competitors(monkeypatch):
    quotas = load("quotas")
    started, ended = [], []
    process = SimpleNamespace(start=lambda: started.append(1), kill=lambda: ended.append(1), join=lambda: None)
    monkeypatch.setattr(quotas.multiprocessing, "get_context", lambda _: SimpleNamespace(Process=lambda **_: process))
    with quotas.Quotas([100, 25], [0, 1], None) as held:
        assert (len(started), held.taken) == (3, {1: 0.75})
        held.change(1, 50)
        assert (len(started), len(ended), held.taken) == (4, 3, {1: 0.5})
    assert len(ended) == 4


def test_a_group_that_is_interrupted_while_it_is_made_goes_away(kernel, monkeypatch):
    quotas = load("quotas")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(quotas.Hierarchy, "limit", interrupt)
    with pytest.raises(KeyboardInterrupt), quotas.Quotas([100, 25], [0, 1], quotas.Hierarchy(kernel.root, 1)):
        pass
    assert kernel.groups == []


def test_without_the_right_to_make_groups_others_compete(kernel, monkeypatch):
    quotas = load("quotas")
    kernel.forbidden = ("cpu.cfs_quota_us",)
    monkeypatch.setattr(quotas.Quotas, "_start_competitors", lambda self, ranks: None)
    with quotas.Quotas([100, 25], [0, 1], quotas.Hierarchy(kernel.root, 1)) as held:
        assert "competing processes" in held.means
        assert "not permitted" in held.means
        assert kernel.groups == []  # not even the one that was begun


def test_groups_of_killed_runs_are_swept_away(kernel):
    quotas = load("quotas")
    hierarchy = quotas.Hierarchy(kernel.root, 1)
    dead = hierarchy.make(f"{quotas._PREFIX}_{2**22 + 1}_1", 25)  # beyond the largest process number
    alive = hierarchy.make(f"{quotas._PREFIX}_1_1", 25)
    other = hierarchy.make("somebody_else", 25)
    hierarchy.sweep()
    assert sorted(kernel.groups) == sorted([alive, other])
    assert dead not in kernel.groups


def test_what_is_not_idle_is_work(tmp_path):
    """The kernel's own figures of work are sampled, and under a quota several times too much."""
    stat = tmp_path / "stat"
    stat.write_text("cpu  1 1 1 1 1 1 1 1 0 0\ncpu0 100 0 50 900 10 5 5 40 0 0\ncpu1 0 0 0 9 0 0 0 0 0 0\nintr 1\n")
    quotas = load("quotas")
    ticks = quotas.os.sysconf("SC_CLK_TCK")
    assert quotas.idle_seconds(stat) == {0: 910 / ticks, 1: 9 / ticks}


def test_no_script_imports_itself_through_others():
    """Functions' own imports count too: they hide a circle, and do not break it."""
    names = {path.stem for path in BENCHMARKS.glob("*.py")}
    imports = {}
    for name in names:
        tree = ast.parse((BENCHMARKS / f"{name}.py").read_text())
        plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imports[name] = names & (plain | {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)})
    free = set()
    while ready := {name for name in names - free if imports[name] <= free}:
        free |= ready
    assert names - free == set()


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_every_script_can_be_imported(name):
    """Those for GPUs too, which no test runs where there is none."""
    load(name)
