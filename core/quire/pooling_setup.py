"""What a checkpoint does with a model's hidden states: nothing, one vector, or scores.

Reads the folders of Sentence-Transformers. Never imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import Factory, evolve, frozen

from quire.errors import ConfigError

GENERATE, EMBED, CLASSIFY = "generate", "embed", "classify"
MODULES_FILE = "modules.json"
PROMPTS_FILE = "config_sentence_transformers.json"
# Its name depends on the model that the folder was made with.
_LENGTH_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# In the order in which Sentence-Transformers puts several side by side.
_ALIASES = {"mean_sqrt_len_tokens": "mean_sqrt_len"}
KINDS = ("cls", "max", "mean", "mean_sqrt_len", "weightedmean", "lasttoken")
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
DENSE_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")
SCORE_ACTIVATIONS = {"Identity": "identity", "Sigmoid": "sigmoid", "Softmax": "softmax"}
_FEATURES = "feature-extraction"
_COUNTED_LABELS = 2  # as Transformers has it where config.json names none
_SIMILARITIES = ("cosine", "dot")


def shown(value: Any) -> str:
    """Return a value as JSON spells it, cut to 60 characters."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


@frozen(kw_only=True)
class DenseModule:
    """A layer after pooling: its folder, sizes, bias and activation."""

    folder: Path
    in_features: int
    out_features: int
    bias: bool
    activation: str


@frozen(kw_only=True)
class Normalisation:
    """Vectors of length one, before another module."""


@frozen(kw_only=True)
class PoolingSetup:
    """How hidden states become one vector a sequence, and what is made of it.

    `kinds` of vectors are put side by side. `modules` follow on the device, and last of all
    vectors are made to have length one where `normalizes`. `max_seq_len` counts tokens.
    """

    task: str
    why: str
    kinds: tuple[str, ...]
    include_prompt: bool = True
    modules: tuple[DenseModule | Normalisation, ...] = ()
    normalizes: bool = False
    max_seq_len: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = Factory(dict)
    default_prompt: str | None = None
    similarity: str = "cosine"
    labels: tuple[str, ...] = ()
    activation: str = "identity"

    @property
    def needs_whole(self) -> bool:
        """Whether all tokens of a sequence must be computed in one step."""
        return self.kinds != ("lasttoken",)

    def size(self, hidden_size: int) -> int:
        """Return how many numbers an embedding has, or how many scores there are."""
        if self.task == CLASSIFY:
            return len(self.labels)
        dense = [m.out_features for m in self.modules if isinstance(m, DenseModule)]
        return dense[-1] if dense else len(self.kinds) * hidden_size

    def describe(self, hidden_size: int) -> str:
        """Return what comes out, in a few words."""
        if self.task == CLASSIFY:
            return f"{len(self.labels)} scores of the {self.kinds[0]} vector, {self.activation}"
        words = [f"{' and '.join(self.kinds)} of the tokens' vectors"]
        words += [
            f"dense to {m.out_features}" if isinstance(m, DenseModule) else "normalised"
            for m in self.modules
        ]
        words += ["normalised"] if self.normalizes else []
        return f"{', '.join(words)}: {self.size(hidden_size)} numbers"


def transformer_folder(folder: Path) -> Path:
    """Return where the model itself lies: older folders have it in one of their own."""
    if (folder / "config.json").exists() or not (folder / MODULES_FILE).is_file():
        return folder
    modules = _modules(folder)
    return folder / modules[0][1]


def module_files(folder: Path) -> list[Path]:
    """Return the files of those modules that lie in folders of their own."""
    if not (folder / MODULES_FILE).is_file():
        return []
    folders = [folder / where for _, where in _modules(folder) if where]
    return [file for one in folders for file in sorted(one.glob("*")) if file.is_file()]


def find_setup(
    options: tuple[str, str],
    *,
    served: str,
    folder: Path,
    raw_config: Mapping[str, Any],
    is_encoder: bool,
) -> PoolingSetup | None:
    """Return how vectors are made, None where tokens are generated.

    `options` are --task and --pooling, `served` is what the plugin's architectures are for.
    Raises: ConfigError for a task that the model does not have, or a folder that cannot be read.
    """
    asked, pooled_by = options
    either = EMBED if served == GENERATE else served
    asked = {"score": CLASSIFY, "pooling": either}.get(asked, asked)
    has_pooling = (folder / MODULES_FILE).is_file() and served != CLASSIFY
    task, why = asked, "asked for"
    if asked == "auto":
        task, why = served, "the architecture is made for it"
        if served == GENERATE and has_pooling:
            task, why = EMBED, f"the folder has {MODULES_FILE}"
    _check_task(task, served)
    if task == GENERATE:
        return None
    if task == CLASSIFY:
        if pooled_by != "auto":
            raise ConfigError("--pooling is for embeddings, and this model gives scores.")
        return _classifier(why, raw_config, folder, "cls" if is_encoder else "lasttoken")
    if has_pooling:
        found = _from_modules(why, folder)
    else:
        kinds = ("mean",) if is_encoder else ("lasttoken",)
        found = PoolingSetup(task=EMBED, why=why, kinds=kinds, normalizes=True)
    return _with_kinds(found, pooled_by)


def _check_task(task: str, served: str) -> None:
    allowed = {GENERATE: (GENERATE, EMBED), EMBED: (EMBED,), CLASSIFY: (CLASSIFY,)}[served]
    if task not in allowed:
        raise ConfigError(
            f"--task is {task}; this architecture allows {' and '.join(allowed)}, or auto."
        )


def _with_kinds(found: PoolingSetup, pooled_by: str) -> PoolingSetup:
    """Replace what the folder says by the option, where it is given."""
    if pooled_by == "auto":
        return found
    kinds = tuple(pooled_by.split(","))
    if not set(kinds) <= set(KINDS) or len(set(kinds)) < len(kinds):
        raise ConfigError(
            f"--pooling is {shown(pooled_by)}; allowed: auto, or some of {', '.join(KINDS)}, "
            "with commas between them."
        )
    return evolve(found, kinds=kinds)


def read_object(path: Path) -> dict[str, Any]:
    """Return a file's JSON object, {} where there is no file. Raises: ConfigError."""
    found = _read(path, {})
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: holds a {type(found).__name__}; it must hold a JSON object.")
    return found


def _read(path: Path, default: Any) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return default
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error}).") from None


def _modules(folder: Path) -> list[tuple[str, str]]:
    """Return class name and folder of each module, in order."""
    path = folder / MODULES_FILE
    found = _read(path, [])
    if not isinstance(found, list) or not found:
        raise ConfigError(f"{path}: holds {shown(found)}; it must hold a list of modules.")
    modules = []
    for entry in found:
        kind = entry.get("type") if isinstance(entry, dict) else None
        where = entry.get("path", "") if isinstance(entry, dict) else None
        if not isinstance(kind, str) or not isinstance(where, str):
            raise ConfigError(f"{path}: has {shown(entry)}; a module has `type` and `path`.")
        if Path(where).is_absolute() or ".." in Path(where).parts:
            raise ConfigError(f"{path}: path is {shown(where)}; allowed: folders below its own.")
        modules.append((kind.rpartition(".")[2], where))
    if modules[0][0] != "Transformer":
        raise ConfigError(f"{path}: begins with {modules[0][0]}; allowed: Transformer.")
    return modules


def _from_modules(why: str, folder: Path) -> PoolingSetup:
    path = folder / MODULES_FILE
    (_, first), *rest = _modules(folder)
    if not rest or rest[0][0] != "Pooling":
        second = rest[0][0] if rest else "nothing"
        raise ConfigError(f"{path}: after Transformer comes {second}; Pooling is wanted.")
    kinds, include_prompt = _pooling(folder / rest[0][1] / "config.json")
    modules: list[DenseModule | Normalisation] = []
    for kind, where in rest[1:]:
        if kind == "Normalize":
            _check_names(read_object(folder / where / "config.json"), folder / where)
            modules.append(Normalisation())
        elif kind == "Dense":
            modules.append(_dense(folder / where))
        elif kind != "Dropout":
            raise ConfigError(
                f"{path}: module {shown(kind)} is not known; allowed after Pooling: Dense, "
                "Normalize, Dropout."
            )
    normalizes = bool(modules) and isinstance(modules[-1], Normalisation)
    lengths = [folder / first / name for name in _LENGTH_FILES]
    length_file = next((file for file in lengths if file.is_file()), lengths[0])
    prompts_file = folder / PROMPTS_FILE
    prompts = read_object(prompts_file)
    return PoolingSetup(
        task=EMBED,
        why=why,
        kinds=kinds,
        include_prompt=include_prompt,
        modules=tuple(modules[:-1] if normalizes else modules),
        normalizes=normalizes,
        **_lengths(length_file),
        **_prompts(prompts, prompts_file),
    )


def _module_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; {MODULES_FILE} names its folder.")
    return read_object(path)


def _pooling(path: Path) -> tuple[tuple[str, ...], bool]:
    """Return the kinds, in their order, and whether a prompt's tokens count."""
    given = _module_config(path)
    mode = given.get("pooling_mode")
    asked: Any = [mode] if isinstance(mode, str) else mode
    if not asked:
        asked = [kind for flag, kind in _FLAGS.items() if given.get(flag) is True] or ["mean"]
    named = isinstance(asked, list) and all(isinstance(kind, str) for kind in asked)
    kinds = [_ALIASES.get(kind, kind) for kind in asked] if named else [""]
    if not set(kinds) <= set(KINDS) or len(set(kinds)) < len(kinds):
        raise ConfigError(
            f"{path}: pooling_mode is {shown(asked)}; allowed: some of {', '.join(KINDS)}."
        )
    return tuple(kinds), given.get("include_prompt") is not False


def _check_names(given: Mapping[str, Any], path: Path) -> None:
    """Refuse a module that reads or writes something else than the embedding."""
    for name in ("module_input_name", "module_output_name"):
        value = given.get(name)
        if value not in (None, "sentence_embedding"):
            raise ConfigError(f"{path}: {name} is {shown(value)}; allowed: sentence_embedding.")


def _dense(folder: Path) -> DenseModule:
    path = folder / "config.json"
    given = _module_config(path)
    _check_names(given, path)
    if given.get("use_residual"):
        raise ConfigError(f"{path}: use_residual is true; allowed: false.")
    sizes = [given.get("in_features"), given.get("out_features")]
    if not all(type(size) is int and 0 < size <= 2**17 for size in sizes):
        raise ConfigError(f"{path}: in_features and out_features are {shown(sizes)}; two sizes.")
    activation = str(given.get("activation_function", "Tanh")).rpartition(".")[2]
    if activation not in DENSE_ACTIVATIONS:
        raise ConfigError(
            f"{path}: activation_function is {shown(activation)}; allowed: "
            f"{', '.join(DENSE_ACTIVATIONS)}."
        )
    return DenseModule(
        folder=folder,
        in_features=given["in_features"],
        out_features=given["out_features"],
        bias=given.get("bias") is not False,
        activation=activation,
    )


def _lengths(path: Path) -> dict[str, Any]:
    given = read_object(path)
    task = given.get("transformer_task", _FEATURES)
    if task not in (_FEATURES, "sequence-classification"):
        raise ConfigError(f"{path}: transformer_task is {shown(task)}; allowed: {_FEATURES}.")
    longest = given.get("max_seq_length")
    if longest is not None and (type(longest) is not int or longest < 1):
        raise ConfigError(f"{path}: max_seq_length is {shown(longest)}; whole numbers from 1.")
    return {"max_seq_len": longest, "lower_case": given.get("do_lower_case") is True}


def _prompts(given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    prompts = given.get("prompts") or {}
    is_table = isinstance(prompts, dict) and all(isinstance(v, str) for v in prompts.values())
    if not is_table:
        raise ConfigError(f"{path}: prompts is {shown(prompts)}; texts by name are wanted.")
    default = given.get("default_prompt_name")
    if default is not None and default not in prompts:
        names = ", ".join(prompts) or "none"
        raise ConfigError(f"{path}: default_prompt_name is {shown(default)}; prompts has: {names}.")
    similarity = given.get("similarity_fn_name") or "cosine"
    # Others order pairs otherwise; they are for whoever compares the vectors.
    known = similarity if similarity in _SIMILARITIES else "cosine"
    return {"prompts": prompts, "default_prompt": default, "similarity": known}


def _classifier(why: str, raw: Mapping[str, Any], folder: Path, kind: str) -> PoolingSetup:
    names = _labels(raw, folder / "config.json")
    return PoolingSetup(
        task=CLASSIFY,
        why=why,
        kinds=(kind,),
        labels=names,
        activation=_score_activation(raw, len(names), folder / "config.json"),
        **_lengths(folder / _LENGTH_FILES[0]),
    )


def _labels(raw: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    found = raw.get("id2label")
    if found is None:
        count = raw.get("num_labels", _COUNTED_LABELS)
        if type(count) is not int or not 1 <= count <= 2**17:
            raise ConfigError(f"{path}: num_labels is {shown(count)}; whole numbers from 1.")
        return tuple(f"LABEL_{i}" for i in range(count))
    numbers = sorted(found, key=_number) if isinstance(found, dict) else []
    if not numbers or [_number(n) for n in numbers] != list(range(len(numbers))):
        raise ConfigError(f"{path}: id2label is {shown(found)}; names by number from 0.")
    return tuple(str(found[number]) for number in numbers)


def _number(key: Any) -> int:
    return int(key) if str(key).isdecimal() else -1


def _score_activation(raw: Mapping[str, Any], num_labels: int, path: Path) -> str:
    """Return what is done with scores: as the file says, else as Transformers' pipelines do."""
    own = raw.get("sentence_transformers")
    named = own.get("activation_fn") if isinstance(own, dict) else None
    named = named or raw.get("sbert_ce_default_activation_function")
    if named is not None:
        short = str(named).rpartition(".")[2]
        if short not in SCORE_ACTIVATIONS:
            allowed = ", ".join(SCORE_ACTIVATIONS)
            raise ConfigError(f"{path}: the scores' activation is {shown(named)}; {allowed}.")
        return SCORE_ACTIVATIONS[short]
    if raw.get("problem_type") == "regression":
        return "identity"
    several = num_labels > 1 and raw.get("problem_type") != "multi_label_classification"
    return "softmax" if several else "sigmoid"
