"""What a folder says of vectors and scores is read, and a wrong file is named with its key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quire.errors import ConfigError
from quire.pooling_setup import (
    CLASSIFY,
    EMBED,
    GENERATE,
    PoolingSetup,
    find_setup,
    transformer_folder,
)

MODULES = [
    {"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
NORMALIZE = {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}


def write(folder: Path, **files: Any) -> Path:
    if MODULES[1] in list(files.get("modules", ())):
        files.setdefault("1_Pooling__config", {})
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path = path.with_name(path.name + ".json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


def setup_of(folder: Path, **changes: Any) -> PoolingSetup | None:
    given = {"task": "auto", "pooling": "auto", "served": EMBED, "raw": {}, "is_encoder": True}
    given |= changes
    return find_setup(
        (given["task"], given["pooling"]),
        served=given["served"],
        folder=folder,
        raw_config=given["raw"],
        is_encoder=given["is_encoder"],
    )


@pytest.mark.parametrize(
    ("pooling", "kinds"),
    [
        ({}, ("mean",)),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("cls", "mean")),
        ({"pooling_mode": "lasttoken"}, ("lasttoken",)),
        ({"pooling_mode": ["mean_sqrt_len_tokens", "max"]}, ("mean_sqrt_len", "max")),
    ],
)
def test_pooling_is_read_in_its_older_and_newer_form(
    pooling: dict[str, Any], kinds: tuple[str, ...], tmp_path: Path
) -> None:
    found = setup_of(
        write(tmp_path, modules=[*MODULES, NORMALIZE], **{"1_Pooling__config": pooling})
    )

    assert found is not None
    assert (found.kinds, found.normalizes, found.task) == (kinds, True, EMBED)
    assert found.size(10) == 10 * len(kinds)
    assert found.needs_whole == (kinds != ("lasttoken",))


@pytest.mark.parametrize(
    ("task", "served", "expected"),
    [
        ("auto", GENERATE, None),
        ("embed", GENERATE, EMBED),
        ("pooling", GENERATE, EMBED),
        ("auto", EMBED, EMBED),
        ("auto", CLASSIFY, CLASSIFY),
        ("score", CLASSIFY, CLASSIFY),
        ("pooling", CLASSIFY, CLASSIFY),
    ],
)
def test_task_is_what_is_asked_or_what_the_architecture_is_for(
    task: str, served: str, expected: str | None, tmp_path: Path
) -> None:
    found = setup_of(tmp_path, task=task, served=served)

    assert (None if found is None else found.task) == expected


@pytest.mark.parametrize(
    ("task", "served"), [("classify", GENERATE), ("generate", EMBED), ("embed", CLASSIFY)]
)
def test_task_that_the_model_does_not_have_is_refused(
    task: str, served: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"--task is {task}; this architecture allows"):
        setup_of(tmp_path, task=task, served=served)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"modules": {}}, "modules.json: holds {}"),
        ({"modules": [{"type": 3}]}, "a module has `type` and `path`"),
        ({"modules": [NORMALIZE]}, "begins with Normalize"),
        ({"modules": MODULES[:1]}, "after Transformer comes nothing"),
        ({"modules": [{**MODULES[0], "path": "../x"}, MODULES[1]]}, "folders below its own"),
        ({"modules": [*MODULES, {"path": "2", "type": "x.CNN"}]}, 'module "CNN" is not known'),
        ({"modules": MODULES, "1_Pooling__config": {"pooling_mode": "median"}}, "pooling_mode is"),
        ({"modules": MODULES, "1_Pooling__config": {"pooling_mode": [["mean"]]}}, "pooling_mode"),
        ({"modules": MODULES, "1_Pooling__config": []}, "1_Pooling/config.json: holds a list"),
        (
            {"modules": MODULES, "sentence_bert_config": {"max_seq_length": 0}},
            "max_seq_length is 0",
        ),
        (
            {"modules": MODULES, "sentence_bert_config": {"transformer_task": "fill-mask"}},
            "transformer_task",
        ),
        (
            {"modules": MODULES, "config_sentence_transformers": {"prompts": {"q": 1}}},
            "prompts is",
        ),
        (
            {"modules": MODULES, "config_sentence_transformers": {"default_prompt_name": "q"}},
            'default_prompt_name is "q"; prompts has: none',
        ),
        (
            {
                "modules": [*MODULES, {"path": "2_Dense", "type": "x.Dense"}],
                "2_Dense__config": {},
            },
            "in_features and out_features",
        ),
    ],
)
def test_wrong_file_is_named_with_its_key(
    files: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        setup_of(write(tmp_path, **files))
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_module_without_its_config_is_refused(tmp_path: Path) -> None:
    (write(tmp_path, modules=MODULES) / "1_Pooling/config.json").unlink()

    with pytest.raises(ConfigError, match="1_Pooling/config.json: no such file"):
        setup_of(tmp_path)


def test_model_may_lie_in_a_folder_of_its_own(tmp_path: Path) -> None:
    first = {**MODULES[0], "path": "0_Transformer"}
    write(tmp_path, modules=[first, MODULES[1]], **{"0_Transformer__config": {}})

    assert transformer_folder(tmp_path) == tmp_path / "0_Transformer"
    assert transformer_folder(tmp_path / "0_Transformer") == tmp_path / "0_Transformer"


@pytest.mark.parametrize(
    ("raw", "labels", "activation"),
    [
        ({}, 2, "softmax"),
        ({"num_labels": 1}, 1, "sigmoid"),
        ({"id2label": {"0": "no", "1": "yes", "2": "maybe"}}, 3, "softmax"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, 3, "sigmoid"),
        ({"num_labels": 1, "problem_type": "regression"}, 1, "identity"),
        (
            {"num_labels": 1, "sentence_transformers": {"activation_fn": "torch.nn.Identity"}},
            1,
            "identity",
        ),
        ({"num_labels": 1, "sbert_ce_default_activation_function": "a.b.Sigmoid"}, 1, "sigmoid"),
    ],
)
def test_labels_and_activation_come_from_the_config(
    raw: dict[str, Any], labels: int, activation: str, tmp_path: Path
) -> None:
    found = setup_of(tmp_path, served=CLASSIFY, raw=raw)

    assert found is not None
    assert (len(found.labels), found.activation) == (labels, activation)


@pytest.mark.parametrize(
    "raw", [{"num_labels": 0}, {"id2label": {"1": "a"}}, {"id2label": []}, {"num_labels": "2"}]
)
def test_labels_that_cannot_be_counted_are_refused(raw: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=next(iter(raw))):
        setup_of(tmp_path, served=CLASSIFY, raw=raw)
