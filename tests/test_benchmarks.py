"""What benchmarks work out by themselves: arguments, statistics, and control groups that are always cleaned up."""

import errno
import importlib
import json
import sys
from pathlib import Path

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
    assert load("speed").name_of(options) == "speed-resnet18-64px-100-25-b64"


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
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        load("speed").parse(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


# ---- statistics ----


def test_the_first_steps_of_a_turn_do_not_count():
    assert load("figures").steady([9.0, 5.0, 1.0, 2.0], 2) == [1.0, 2.0]
    with pytest.raises(ValueError, match="leave nothing"):
        load("figures").steady([9.0, 5.0], 2)


def test_a_gain_is_taken_within_rounds():
    """A machine that is half as fast in one round halves both sides; a ratio of overall medians would see a gain."""
    gain = load("figures").gain([[2.0], [4.0], [2.0]], [[1.0], [2.0], [1.0]])
    assert gain == {"median": 2.0, "least": 2.0, "greatest": 2.0}


def test_the_grid_goes_from_equal_to_beyond_proportional():
    splits = load("figures").grid([160.0, 40.0], 64, 2)
    assert splits[0] == (32, 32)
    assert (51, 13) in splits
    assert splits[-1][1] == 2
    assert all(sum(split) == 64 for split in splits)


def test_neighbours_keep_the_sum_and_the_minimum():
    figures = load("figures")
    assert figures.neighbours((61, 3), 1, 2) == [(60, 4), (62, 2)]
    assert figures.neighbours((62, 2), 1, 2) == [(61, 3)]
    assert len(figures.neighbours((10, 10, 10), 1, 2)) == 6


def test_settled_is_the_step_from_which_the_split_stays_good():
    figures = load("figures")
    times = {(32, 32): 1.2, (56, 8): 0.52, (60, 4): 0.43}
    plans = figures.changes([(0, (32, 32)), (1, (32, 32)), (2, (60, 4)), (3, (56, 8)), (4, (60, 4)), (5, (60, 4))])
    assert plans == [(0, (32, 32)), (2, (60, 4)), (3, (56, 8)), (4, (60, 4))]
    assert figures.settled(plans, times) == 4
    assert figures.settled(plans[:3], times) is None
    assert figures.settled([(0, (59, 5))], times) is None  # interpolated: 0.4525, more than 5% above 0.43


def test_an_unmeasured_split_is_interpolated_for_two_ranks_only():
    figures = load("figures")
    assert figures.between({(32, 32): 1.0, (48, 16): 0.5}, (40, 24)) == pytest.approx(0.75)
    assert figures.between({(32, 32): 1.0, (48, 16): 0.5}, (50, 14)) is None
    assert figures.between({(4, 4, 4): 1.0}, (5, 4, 3)) is None


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


# ---- reports ----


def a_report():
    sides = {name: {"split": [60, 4], "seconds": 0.5, "rounds": [0.4, 0.6]} for name in ("equal", "hetero", "best")}
    sides |= {"proportional": {"split": [51, 13], "seconds": 0.7, "rounds": [0.7, 0.7]}}
    sides |= {name: {"split": None, "seconds": 1.0, "rounds": [1.0, 1.0]} for name in ("ddp", "alone")}
    return {
        "configuration": {"global_batch": 64, "model": "resnet18", "size": 64, "quotas": [100, 25]},
        "sides": sides,
        "gains": {"hetero/ddp": {"median": 2.0, "least": 1.9, "greatest": 2.1}},
        "disturbance": {"median": 0.01, "greatest": 0.2},
        "quotas_enforced_by": "nothing",
        "hetero": {
            "plans": [[0, [32, 32]], [4, [60, 4]]],
            "settled_after_steps": 4,
            "steps": [{"step": 0, "seconds": 1.23456789}],
        },
    }


def test_a_report_is_written_shown_and_drawn(tmp_path):
    speed, plot = load("speed"), load("plot_speed")
    path = tmp_path / "results" / "speed.json"
    speed.write(a_report(), path)
    report = json.loads(path.read_text())
    assert report["hetero"]["steps"] == [{"step": 0, "seconds": 1.234568}]
    assert "2.00x (1.90 to 2.10)" in speed.table(report)
    assert "32/32 from 0, 60/4 from 4" in speed.table(report)
    assert plot.draw(path).stat().st_size > 5000


def test_the_scripts_can_be_imported_without_torch():
    """Help has to come at once; processes import torch where they train."""
    assert "torch" not in vars(load("speed"))
    assert str(BENCHMARKS) in sys.path
