"""Steps that nothing would heed are refused: transformers passes over them in silence."""

import pytest

from tinyllm.errors import UserError
from tinyllm.settings import SftArguments


@pytest.mark.parametrize("what", ["save", "eval"])
def test_steps_want_their_strategy(what, tmp_path):
    steps = {f"{what}_steps": 20}
    for strategy in ("epoch", "no"):
        with pytest.raises(UserError, match=f"--{what}_steps 20 .*--{what}_strategy {strategy};"):
            SftArguments(output_dir=str(tmp_path), **steps, **{f"{what}_strategy": strategy})
    found = SftArguments(output_dir=str(tmp_path), **steps, **{f"{what}_strategy": "steps"})
    assert getattr(found, f"{what}_steps") == 20


def test_what_is_not_said_is_not_refused(tmp_path):
    assert SftArguments(output_dir=str(tmp_path)).save_strategy == "epoch"
