"""Text on one side, requests on the other: what every door needs before and beside an engine.

Opening it checks options, plugins, files, tokenizer and chat template; torch is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from quire.config import EngineConfig
from quire.constraints import GrammarSource, StructuredOutputsParams
from quire.errors import ConfigError
from quire.phases import Phases
from quire.pooling_setup import PoolingSetup
from quire.preparation import Prepared, prepare
from quire.request import SamplingParams
from quire.structured.checker import GrammarChecker, num_processes
from quire.structured.compiler import GrammarSetup
from quire.text.chat_template import DEFAULT, ChatTemplate
from quire.text.generation_config import GenerationDefaults
from quire.text.input_processor import (
    InputProcessor,
    RenderedChat,
    RequestLimits,
    generates_nothing,
    gives_no_vectors,
)
from quire.text.pooling_input import PoolingInputs
from quire.text.tokenizer import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
BeginGrammar = Callable[[GrammarSource, frozenset[int]], object]


class Frontend:
    """One model's checked files, tokenizer, chat template and sampling defaults."""

    def __init__(self, config: EngineConfig, phases: Phases | None = None) -> None:
        """Check everything that can be checked without torch.

        Raises: ConfigError, CheckpointError or PluginError, each in one line.
        """
        self.prepared: Prepared = prepare(config, phases)
        self.config = self.prepared.config
        self.defaults = GenerationDefaults.from_folder(self.prepared.folder)
        self.warnings = [*self.prepared.warnings, *self.defaults.warnings]
        with self.prepared.phases.timed("tokenizer"):
            self._tokenizer_folder = self.prepared.tokenizer_folder()
            self.tokenizer = self._open_tokenizer()
            self.template = self._open_template()
        self._callers_template: ChatTemplate | None = None
        # Tokenizing needs a limit before the engine knows the real one; `serve` replaces it.
        wanted = self.config.model.max_model_len
        own = self.prepared.model_config.max_model_len
        self.max_model_len = wanted if isinstance(wanted, int) else own
        self._eos = self._end_tokens()
        self._grammars = self._grammar_checker()
        self.inputs = self._input_processor(self.max_model_len)

    def _open_tokenizer(self) -> Tokenizer | None:
        options = self.config.model
        if options.skip_tokenizer_init:
            return None
        if options.tokenizer is None and not (self._tokenizer_folder / TOKENIZER_FILE).is_file():
            # Prompts of token ids need none; a text will be refused, saying so.
            self.warnings.append(
                f"{self._tokenizer_folder / TOKENIZER_FILE}: no such file; only prompts of token "
                "ids can be served, and outputs have no text. --tokenizer names another folder."
            )
            return None
        tokenizer = Tokenizer.from_folder(self._tokenizer_folder)
        try:
            tokenizer.check_fits(self.prepared.model_config.vocab_size)
        except ConfigError as error:
            raise ConfigError(f"{self._tokenizer_folder}/{error}") from None
        return tokenizer

    def _open_template(self) -> ChatTemplate | None:
        if self.tokenizer is None:
            return None
        special = self.tokenizer.special_tokens
        given = self.config.model.chat_template
        if given is not None:
            template: ChatTemplate | None = ChatTemplate.from_file(
                Path(given), special_tokens=special
            )
        else:
            template = ChatTemplate.from_folder(self._tokenizer_folder, special_tokens=special)
        if template is not None:
            template.probe()
        return template

    def require_tokenizer(self) -> Tokenizer:
        """Return the tokenizer. Raises: ConfigError where the checkpoint has none."""
        if self.tokenizer is None:
            raise ConfigError(
                f"{self._tokenizer_folder / TOKENIZER_FILE}: no such file, and a text needs it; "
                "give --tokenizer FOLDER, or prompts of token ids."
            )
        return self.tokenizer

    def require_template(self) -> ChatTemplate:
        """Return the chat template. Raises: ConfigError where the checkpoint has none."""
        self.require_tokenizer()
        if self.template is None:
            raise ConfigError(
                f"{self._tokenizer_folder}: the checkpoint has no chat template; give one with "
                "--chat-template FILE, or use `quire generate`."
            )
        return self.template

    def _end_tokens(self) -> frozenset[int]:
        model_config = self.prepared.model_config
        found = self.defaults.all_eos_token_ids(
            config_eos=model_config.eos_token_ids,
            tokenizer_eos=None if self.tokenizer is None else self.tokenizer.eos_token_id,
        )
        # generation_config.json may name ids that the model does not have: they never come.
        return frozenset(i for i in found if 0 <= i < model_config.vocab_size)

    def _grammar_checker(self) -> GrammarChecker | str:
        """Return what checks grammars, or why there is nothing."""
        plugin = self.prepared.grammar
        if plugin is None:
            return f"no grammar engine can be used: {self.prepared.why_no_grammar}"
        if self.tokenizer is None or not self._eos:
            return "the checkpoint has no tokenizer, or no end token"
        setup = GrammarSetup(
            backend=plugin.name,
            folder=self._tokenizer_folder,
            vocab_size=self.prepared.model_config.vocab_size,
            eos_token_ids=tuple(sorted(self._eos)),
        )
        return GrammarChecker(setup, self.prepared.registry.disabled)

    def _input_processor(self, max_model_len: int) -> InputProcessor:
        limits = RequestLimits(
            max_model_len=max_model_len,
            vocab_size=self.prepared.model_config.vocab_size,
            eos_token_ids=self._eos,
            has_priorities=self.config.scheduler.scheduling_policy == "priority",
        )
        return InputProcessor(
            limits,
            tokenizer=self.tokenizer,
            seed=self.config.device.seed,
            check_grammar=self._check_grammar,
            pooling=self._pooling_inputs(max_model_len),
        )

    def _pooling_inputs(self, max_model_len: int) -> PoolingInputs | None:
        setup = self.prepared.pooling
        if setup is None:
            return None
        size = setup.size(self.prepared.model_config.hidden_size)
        return PoolingInputs(
            setup=setup, tokenizer=self.tokenizer, max_model_len=max_model_len, size=size
        )

    def check_generates(self) -> None:
        """Refuse a model that gives vectors or scores. Raises: RequestError."""
        if self.prepared.pooling is not None:
            raise generates_nothing(self.prepared.pooling.task)

    def pooling_setup(self, *tasks: str) -> PoolingSetup:
        """Return how vectors or scores are made.

        Raises: RequestError where the model is served for none of the tasks.
        """
        setup = self.prepared.pooling
        if setup is None:
            raise gives_no_vectors()
        if setup.task not in tasks:
            raise generates_nothing(setup.task)
        return setup

    def _check_grammar(self, asked: StructuredOutputsParams) -> None:
        if isinstance(self._grammars, str):
            raise asked.error(f"cannot be honoured: {self._grammars.rstrip('.')}")
        self._grammars.check(asked)

    @property
    def num_form_checks(self) -> int:
        """How many threads ask children for forms: two each, so that one has the next ready."""
        return 2 * num_processes()

    def prepare_for_forms(self) -> None:
        """Begin to start a child that compiles grammars, so that no request waits for it."""
        if isinstance(self._grammars, GrammarChecker):
            self._grammars.prepare()

    def knows_form(self, params: Any) -> bool:
        """Whether a request's form was checked before."""
        asked = params.structured_outputs if isinstance(params, SamplingParams) else None
        if asked is None or not isinstance(self._grammars, GrammarChecker):
            return False
        return self._grammars.knows(asked)

    def check_forms(self, params: Iterable[Any], begin: BeginGrammar) -> None:
        """Check the forms of several requests side by side; what is wrong is said one by one.

        `begin` is the engine's `begin_grammar`, called for each that can be honoured.
        """
        given = [one for one in params if isinstance(one, SamplingParams)]
        asked = [one.structured_outputs for one in given if one.structured_outputs is not None]
        if isinstance(self._grammars, GrammarChecker) and len(asked) > 1:
            self._grammars.check_all(asked, lambda source: begin(source, self._eos))

    def serve(self, max_model_len: int) -> None:
        """Take over the context length that the engine settled on."""
        self.max_model_len = max_model_len
        self.inputs = self._input_processor(max_model_len)

    def sampling_params(self, given: Mapping[str, Any] | None = None) -> SamplingParams:
        """Return generation_config.json's defaults, overridden by what is given."""
        return SamplingParams(**{**self.defaults.sampling_defaults(), **(given or {})})

    def render(self, messages: Any, *, template: str | None = None, **options: Any) -> RenderedChat:
        """Return the prompt of a conversation, by its own `template` where one is given.

        Raises: RequestError, ConfigError.
        """
        if template is not None:
            return RenderedChat(self._own_template(template).render(messages, **options))
        return RenderedChat(self.require_template().render(messages, **options))

    def _own_template(self, source: str) -> ChatTemplate:
        """Return the template of a caller, which is kept for its next conversation."""
        special = self.require_tokenizer().special_tokens
        if self._callers_template is None or self._callers_template.templates != {DEFAULT: source}:
            if self._callers_template is not None:
                self._callers_template.close()
            self._callers_template = ChatTemplate(
                {DEFAULT: source}, origin="chat_template", special_tokens=special
            )
        return self._callers_template

    def close(self) -> None:
        """End the child processes of templates and grammars."""
        if isinstance(self._grammars, GrammarChecker):
            self._grammars.close()
        for template in (self.template, self._callers_template):
            if template is not None:
                template.close()
