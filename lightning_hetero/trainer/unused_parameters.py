"""What DDP's error about unused parameters means under this strategy."""

from lightning.pytorch.utilities.exceptions import _augment_message


def explain_unused_parameters(exception: BaseException) -> None:
    """Add advice to DDP's error about unused parameters, on what to do; other errors stay as they are."""
    _augment_message(
        exception,
        pattern=".*Expected to have finished reduction in the prior iteration.*",
        new_message=(
            "Your LightningModule has parameters that were not used in producing the loss returned by"
            " training_step. If this is intentional, use strategy='hetero_find_unused_parameters_true' or"
            " HeteroStrategy(find_unused_parameters=True)."
        ),
    )
