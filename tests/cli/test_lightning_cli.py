"""`lightning-hetero fit|validate|test|predict`, the configurations in docs/examples, and plain LightningCLI."""

import csv
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, Regression, parameters_of, relative_error
from tests.trainer.loading import once

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
SHARED = ROOT.parent / "shared" / "data"
SCENE = ROOT / "lightning_hetero" / "demo" / "data"
SENTINEL2 = SHARED / "s2_osm" if (SHARED / "s2_osm").is_dir() else SCENE

QUIET = (
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false", "--trainer.log_every_n_steps", "1"),
    *("--trainer.limit_val_batches", "2", "--trainer.num_sanity_val_steps", "0", "--trainer.max_epochs", "1"),
)
SMALL = {
    "ucmerced": (
        *("--data.dict_kwargs.root", str(SHARED / "ucmerced"), "--data.batch_size", "2", "--data.num_workers", "0"),
        *("--trainer.limit_train_batches", "2"),
    ),
    "landsat": (
        *("--data.root", str(SHARED / "zion_landsat_nlcd"), "--data.batch_size", "2", "--data.patch_size", "32"),
        *("--data.length", "12"),
    ),
    "sentinel2": (
        *("--data.root", str(SENTINEL2), "--data.batch_size", "4", "--data.patch_size", "16", "--data.length", "24"),
        *("--trainer.strategy.global_batch", "8"),
    ),
}


def command(folder: str, *arguments: str) -> Any:
    """A command in this process, which is one of two ranks that have met already."""
    from lightning_hetero.cli.lightning_cli import main

    # Kornia and GDAL's Python side; Lightning, of a checkpoint that was moved
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=PendingDeprecationWarning)
    os.chdir(EXAMPLES)
    sys.argv = ["lightning-hetero"]
    root = ("--trainer.default_root_dir", folder, "--trainer.plugins", "tests.trainer.fits.Joined")
    return main([*arguments, *QUIET, *root])


def config(name: str) -> tuple[str, ...]:
    return ("--config", f"{name}.yaml", *SMALL[name])


def examples(folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    names = {"sentinel2": SENTINEL2, "ucmerced": SHARED / "ucmerced", "landsat": SHARED / "zion_landsat_nlcd"}
    for name, data in names.items():
        if data.is_dir():
            cli = command(f"{folder}/{name}", "fit", *config(name))
            results[name] = {
                "strategy": type(cli.trainer.strategy).__name__,
                "model": type(cli.model).__name__,
                "step": cli.trainer.global_step,
                "plan": cli.trainer.strategy.plan.local_batches,
                "metrics": {key: float(value) for key, value in cli.trainer.callback_metrics.items()},
                "parameters": parameters_of(cli.model),
                "checkpoint": cli.trainer.checkpoint_callback.best_model_path,
                "log_dir": cli.trainer.log_dir,
            }
    first = results["sentinel2"]
    for which in ("validate", "test", "predict"):
        limits = (
            "--trainer.limit_test_batches",
            "1",
            "--trainer.limit_predict_batches",
            "1",
            "--data.patch_size",
            "64",
        )
        saved = ("--config", f"{first['log_dir']}/config.yaml") if which == "validate" else config("sentinel2")
        cli = command(f"{folder}/{which}", which, *saved, *limits, "--ckpt_path", first["checkpoint"])
        results[which] = {
            "parameters": parameters_of(cli.model),
            "metrics": {key: float(value) for key, value in cli.trainer.callback_metrics.items()},
        }
    return results


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, examples, str(tmp_path_factory.mktemp("runs")))


@pytest.mark.parametrize(
    ("name", "model", "steps", "batch"),
    [
        ("sentinel2", "SemanticSegmentationTask", 3, 8),
        ("ucmerced", "ClassificationTask", 2, 4),
        ("landsat", "SemanticSegmentationTask", 3, 4),
    ],
)
def test_an_example_trains(name: str, model: str, steps: int, batch: int, ran: list[dict[str, Any]]) -> None:
    if name not in ran[0]:
        pytest.skip(f"{SHARED} has no data for {name}")
    first, second = (result[name] for result in ran)
    for result in (first, second):
        assert (result["strategy"], result["model"], result["step"]) == ("HeteroStrategy", model, steps)
        assert sum(result["plan"]) == batch
    assert torch.equal(first["parameters"], second["parameters"])
    assert first["metrics"]["train_loss"] > 0


def test_the_saved_configuration_and_checkpoint_serve_the_other_commands(ran: list[dict[str, Any]]) -> None:
    for result in ran:
        for which in ("validate", "test", "predict"):
            assert torch.equal(result[which]["parameters"], result["sentinel2"]["parameters"])
        assert result["validate"]["metrics"]["val_MulticlassJaccardIndex"] >= 0
        assert result["test"]["metrics"]["test_MulticlassJaccardIndex"] >= 0


def as_a_script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As the console script that installers write."""
    script = folder / "lightning-hetero"
    script.write_text(
        "import sys\nfrom lightning_hetero.cli.main import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
    )
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=EXAMPLES,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_lightnings_launcher_runs_the_console_script_again(tmp_path: Path) -> None:
    small = ("--data.root", str(SCENE), "--data.patch_size", "16", "--data.length", "12", "--data.batch_size", "2")
    knobs = ("--trainer.strategy.global_batch", "4", "--trainer.strategy.shares", "[3, 1]")
    root = ("--trainer.default_root_dir", str(tmp_path))
    run = as_a_script(tmp_path, "fit", "--config", "sentinel2.yaml", *small, *knobs, *root, *QUIET)
    assert run.returncode == 0, run.stderr
    plans = [json.loads(line) for line in next(tmp_path.rglob("plan.jsonl")).read_text().splitlines()]
    assert plans[0]["local_batches"] == [3, 1]
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        assert max(int(row["step"]) for row in csv.DictReader(file)) == 2


# ---- help, defaults, mistakes ----


def says(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    from lightning_hetero.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def words(text: str) -> str:
    return " ".join(text.split())


BORING = "model: {class_path: BoringModel}"
OPTIONS = ("shares", "global_batch", "loss_count", "memory_limit", "granularity", "gradient_as_bucket_view")


def test_the_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = says(capsys, "--help")
    assert all(f"    {name} " in out for name in ("fit", "validate", "test", "predict", "demo"))


def test_the_help_of_a_command_shows_the_options_and_their_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = says(capsys, "fit", "--help")
    assert status == 0
    assert all(f"--trainer.strategy.{option} " in out for option in OPTIONS)
    assert "local batches are multiples of it, except in the last global batch of an epoch." in words(out)
    assert "--trainer.max_epochs" in out


def test_the_strategys_own_help_shows_ddps_options(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = says(capsys, "fit", "--trainer.strategy.help", "lightning_hetero.HeteroStrategy")
    assert all(f"--trainer.strategy.{option} " in out for option in (*OPTIONS, "timeout", "find_unused_parameters"))
    assert "Traverse the autograd graph" in words(out)


def test_the_printed_configuration_has_the_options_and_their_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    _, out, _ = says(capsys, "fit", "--print_config=comments")
    assert "# local batches are multiples of it, except in the last global batch of an epoch." in words(out)
    strategy = yaml.safe_load(out)["trainer"]["strategy"]
    assert strategy["class_path"] == "lightning_hetero.HeteroStrategy"
    assert strategy["init_args"].items() >= {"shares": "auto", "gradient_as_bucket_view": True}.items()


@pytest.mark.parametrize(
    ("yaml", "sentence"),
    [
        ("trainer: {strategie: hetero}", "does not accept option 'trainer.strategie'"),
        (f"trainer: {{strategy: hetro}}\n{BORING}", "invalid strategy name: `strategy='hetro'`"),
        (
            "trainer: {strategy: {class_path: lightning_hetero.HeteroStrategy, init_args: {granularity: two}}}",
            "granularity",
        ),
        (
            "trainer: {strategy: {class_path: lightning_hetero.HeteroStrategy, init_args: {find: 1}}}",
            "'find' is not accepted",
        ),
        (
            f"trainer: {{strategy: {{class_path: HeteroStrategy, init_args: {{shares: fast}}}}}}\n{BORING}",
            "shares='fast'",
        ),
        ("trainer: [", "Problems parsing config"),
    ],
)
def test_a_mistake_in_a_configuration_is_one_sentence(
    yaml: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import lightning.pytorch.demos.boring_classes  # noqa: F401 - so that the short name is known

    (tmp_path / "bad.yaml").write_text(yaml)
    status, _, err = says(capsys, "fit", "--config", str(tmp_path / "bad.yaml"))
    last = err.strip().splitlines()[-1]
    assert status == 2
    assert last.startswith(("lightning-hetero fit: ", "lightning-hetero: "))
    assert sentence in last
    assert "Traceback" not in err


def test_what_torchgeos_command_sets_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from TorchGeo's own main, so that a change there is noticed here."""
    import torchgeo.main

    from lightning_hetero.cli import lightning_cli

    monkeypatch.setattr(os, "environ", {})
    theirs: dict[str, Any] = {}
    monkeypatch.setattr(torchgeo.main, "LightningCLI", lambda **options: theirs.update(options))
    torchgeo.main.main()
    assert os.environ == lightning_cli.GDAL
    ours: dict[str, Any] = {}
    monkeypatch.setattr(lightning_cli, "HeteroCLI", lambda _, **options: ours.update(options))
    os.environ.clear()
    os.environ["VSI_CURL_CACHE_SIZE"] = "1"
    lightning_cli.main(["fit"])
    assert os.environ == lightning_cli.GDAL | {"VSI_CURL_CACHE_SIZE": "1"}, "the user's own stays"
    for name in ("seed_everything_default", "save_config_kwargs"):
        assert ours[name] == theirs[name]


# ---- LightningCLI in a script of the user's own ----


class NumbersModule(Regression):
    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(Numbers(61), batch_size=6)


def samples(module, batch):
    """As users write it, without annotations."""
    module.counted = True
    return len(batch["y"])


def own_script(strategy: str) -> dict[str, Any]:
    from lightning.pytorch.cli import LightningCLI

    sys.argv = ["train.py"]
    quiet = ("--trainer.logger", "false", "--trainer.enable_checkpointing", "false", *QUIET[:6])
    joined = ("--trainer.devices", "2", "--trainer.plugins", "tests.trainer.fits.Joined")
    args = ["fit", "--trainer.strategy", strategy, "--trainer.max_epochs", "2", *quiet, *joined]
    if "." in strategy:
        args += ["--trainer.strategy.shares", "[3, 1]"]
        args += ["--trainer.strategy.loss_count", "tests.cli.test_lightning_cli.samples"]
    cli = LightningCLI(NumbersModule, args=args, save_config_callback=None)
    assert getattr(cli.model, "counted", False) == ("." in strategy), "the function named in the configuration counts"
    return {"parameters": parameters_of(cli.model), "plan": cli.trainer.strategy.plan.local_batches}


@once
def scripts() -> list[dict[str, Any]]:
    return run_ranks(2, both_scripts)


def both_scripts() -> dict[str, Any]:
    return {name: own_script(name) for name in ("lightning_hetero.HeteroStrategy", "hetero")}


def test_plain_lightningcli_takes_the_class_path_and_the_name() -> None:
    from tests.trainer.fits import Recipe, plain_fit

    alone = plain_fit(Recipe(), 12)
    for result in scripts():
        assert result["lightning_hetero.HeteroStrategy"]["plan"] == (9, 3)
        for ran in result.values():
            assert relative_error(ran["parameters"], alone["parameters"]) <= 1e-12
