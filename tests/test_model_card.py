"""The card of an exported model, and its way to the hub."""

import json

import huggingface_hub
import pytest

from grpo_jax.errors import UserError
from grpo_jax.tools.model_card import card, hub_id_of, push_to_hub
from tests import tiny


def test_a_folder_of_the_hubs_cache_is_named_by_its_hub_id():
    cached = "/home/me/.cache/huggingface/hub/models--Qwen--Qwen2.5-0.5B-Instruct/snapshots/7ae5576"
    assert hub_id_of(cached) == "Qwen/Qwen2.5-0.5B-Instruct"
    for path in ("Qwen/Qwen2.5-0.5B-Instruct", "runs/my--model", "/data/models--of--mine"):
        assert hub_id_of(path) == path


def test_the_card_says_what_was_trained_and_what_it_reached():
    config = tiny.config_of("gtpo", {"model.path": "Qwen/Qwen2.5-0.5B", "lora.rank": 4, "seed": 7})
    summary = {"steps": 3, "success_before": 0.25, "success_after": None, "version": "0.1.0", "commit": "abc1234"}
    text = card(config, summary, 3, is_adapter=True)
    header = text.split("---")[1]
    assert "base_model: Qwen/Qwen2.5-0.5B\n" in header and "library_name: peft\n" in header
    for row in ("| steps | 3 of 3 |", "| LoRA rank | 4 |", "| seed | 7 |", "| held-out greedy success before | 0.250 |"):
        assert row in text
    assert "| held-out greedy success after | unknown |" in text and "grpo_jax abc1234." in text
    earlier = card(config, summary, 2, is_adapter=False)
    assert "held-out" not in earlier and "library_name: transformers\n" in earlier, "the summary is of step 3"


def test_pushing_says_what_went_wrong_and_where_the_folder_is(tmp_path, monkeypatch):
    told = []

    class Api:
        def create_repo(self, repo, exist_ok):
            told.append((repo, exist_ok))

        def upload_folder(self, **given):
            told.append(given)
            if given["repo_id"] == "me/bad":
                raise OSError("the hub is away\nsecond line")
            return "https://hub/me/model"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert push_to_hub(tmp_path, "me/model") == "https://hub/me/model"
    assert told[0] == ("me/model", True) and told[1]["folder_path"] == str(tmp_path)
    with pytest.raises(UserError, match=r"^--push_to_hub=me/bad: the hub is away; .* is written \(log in"):
        push_to_hub(tmp_path, "me/bad")
    assert json.dumps(told[2])
