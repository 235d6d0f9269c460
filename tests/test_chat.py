"""Talking to models of the pipeline."""

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks import chat, models
from tasks.params import UserError
from tests.conftest import LORA, ROOT


def test_a_question_is_put_to_one_model_after_the_other(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three models of which one fits are compared; in a conversation all of them must fit, which the error says."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    there: list[weakref.ref[Any]] = []
    real = chat._load

    def load(folder: Path, quantization: dict[str, Any] | None) -> tuple[Any, Any]:
        if any(model() is not None for model in there):
            raise torch.OutOfMemoryError("CUDA out of memory")
        model, reader = real(folder, quantization)
        there.append(weakref.ref(model))
        return model, reader

    monkeypatch.setattr(chat, "_load", load)
    adapter = tmp_path / "adapter"
    models.save_adapter(models.new_adapter(models.load(tiny, None), LORA, 0), adapter)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(tiny)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    compared = [str(tiny), "--compare", str(adapter), "--compare", str(tiny), "--max-new-tokens", "2"]
    chat.main([*compared, "--ask", "thumb"])
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("--- ")] == [
        f"--- {folder}" for folder in (tiny, adapter, tiny)
    ]
    assert len(there) == 3
    with pytest.raises(UserError, match="with --ask they answer one after the other"):
        chat.main(compared)
    with pytest.raises(UserError, match="no model there"):
        chat.main([str(tiny), "--compare", "nothing", "--ask", "thumb"])
    assert not capsys.readouterr().out


@pytest.mark.parametrize("folder", ["model", "adapter"])
def test_talking_to_a_pickle_is_refused(tmp_path: Path, folder: str) -> None:
    config = {"model": "config.json", "adapter": "adapter_config.json"}[folder]
    (tmp_path / config).write_text("{}")
    (tmp_path / "other.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(UserError, match=r"pickled ones \(\.bin, \.pt\) are never loaded"):
        chat._load(tmp_path, None)
