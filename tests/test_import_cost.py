"""Importing the package costs next to nothing beyond Lightning."""

import json
import subprocess
import sys

PROBE = """
import json, sys
import lightning.pytorch
before = set(sys.modules)
import lightning_hetero
print(json.dumps([sorted(before), sorted(sys.modules)]))
"""


def test_import_loads_nothing_beyond_lightning_but_itself():
    """Counted in modules, not in seconds, so that it holds on a busy machine too.

    Fails when a file imports torchgeo, matplotlib or the like at its top, instead of where it is used.
    """
    output = subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True, text=True).stdout
    before, after = json.loads(output.splitlines()[-1])

    tops = {name.partition(".")[0] for name in after}
    assert tops.isdisjoint({"torchgeo", "kornia", "rasterio", "segmentation_models_pytorch", "timm"})
    # torchmetrics, which Lightning imports, loads matplotlib where it is installed: that is not ours
    added = {name for name in set(after) - set(before) if name.partition(".")[0] not in sys.stdlib_module_names}
    foreign = {name for name in added if name.partition(".")[0] != "lightning_hetero"}
    assert foreign == set()
    assert "lightning_hetero" in added
