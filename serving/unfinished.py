"""A training run that is not finished: where it stands, in a file beside its weights, so that it can go on."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras  # type: ignore[import-untyped]
import numpy as np
from keras import ops

from herald.errors import ConfigError


class UnfinishedRun:
    """The state of one run, NAME.state.npz beside NAME.weights.h5: every variable, the steps done and the recipe."""

    def __init__(self, weights: Path, recipe: Mapping[str, object], variables: Sequence[keras.Variable]) -> None:
        """`recipe` is all that the weights follow from; `variables` are all that a step reads and changes."""
        self.path = weights.with_name(weights.name.removesuffix(".weights.h5") + ".state.npz")
        self.recipe = {name: repr(value) for name, value in recipe.items()}
        self.variables = variables
        self.done = 0  # steps
        self.loss: float | None = None
        weights.parent.mkdir(parents=True, exist_ok=True)

    def save(self, done: int, loss: float) -> None:
        """Write the state after `done` steps."""
        partly = self.path.with_suffix(".partly.npz")
        values: dict[str, Any] = {f"v{i}": ops.convert_to_numpy(variable) for i, variable in enumerate(self.variables)}
        np.savez(partly, done=done, loss=loss, recipe=json.dumps(self.recipe), **values)
        partly.replace(self.path)
        self.done, self.loss = done, loss

    def resume(self) -> bool:
        """Set the variables, `done` and `loss` to what was saved; False where nothing was.

        Raises ConfigError where the state is of another recipe, which would be lost.
        """
        if not self.path.exists():
            return False
        with np.load(self.path) as saved:
            former = json.loads(str(saved["recipe"]))
            if differ := [name for name in self.recipe if former.get(name) != self.recipe[name]]:
                raise ConfigError(
                    f"{self.path} is of a run with another {', '.join(differ)}; give the same again, or remove the file"
                    " to begin anew"
                )
            for i, variable in enumerate(self.variables):
                variable.assign(saved[f"v{i}"])
            self.done, self.loss = int(saved["done"]), float(saved["loss"])
        return True

    def finish(self) -> None:
        """Forget the state: the weights are written."""
        self.path.unlink(missing_ok=True)
