"""Templates: the choice, the file formats, the errors and the stop strings."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from modules.errors import DataFileNotFoundError, SettingsError, TemplateError, TemplateLimitError
from modules.instruction_templates import (
    MAX_TEMPLATE_CHARS,
    TEMPLATES_FOLDER,
    ChatTemplate,
    TemplateSource,
    TurnOverrides,
    build_request_template,
    choose_template,
    derive_stop_strings,
    match_model_config,
    override_template,
    reads_only_parts,
    render_template,
)
from modules.template_sandbox import RenderClock

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


def make_template(text: str, **tokens: str) -> ChatTemplate:
    return build_request_template(text, "instruction_template_str", tokens)


def render(text: str, **variables: object) -> str:
    return render_template(
        make_template(text),
        HISTORY,
        add_generation_prompt=True,
        variables=variables,
        clock=RenderClock(),
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project folder with two templates and no model settings."""
    for folder in (TEMPLATES_FOLDER, "models"):
        (tmp_path / folder).mkdir()
    for name in ("ChatML", "Alpaca", "Mistral"):
        write_template(tmp_path, name, {"instruction_template": f"{name} text"})
    return tmp_path


def write_template(root: Path, name: str, data: object) -> None:
    (root / TEMPLATES_FOLDER / f"{name}.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")


def write_config(root: Path, text: str, name: str = "config") -> None:
    (root / "models" / f"{name}.yaml").write_text(text, encoding="utf-8")


class TestChoice:
    def test_settings_come_before_the_models_own(self, root: Path) -> None:
        chosen = choose_template(
            root=root, model_name="m", model_chat_template="own", settings_name="Mistral"
        )
        assert (chosen.name, chosen.text) == ("Mistral", "Mistral text")
        assert chosen.source is TemplateSource.SETTINGS

    def test_a_written_out_setting_comes_before_a_named_one(self, root: Path) -> None:
        chosen = choose_template(
            root=root, model_name="m", settings_text="written", settings_name="Mistral"
        )
        assert chosen.text == "written"
        assert "instruction_template_str" in chosen.reason

    def test_the_models_own_comes_before_its_name(self, root: Path) -> None:
        write_config(root, ".*: {instruction_template: Mistral}")
        chosen = choose_template(root=root, model_name="m", model_chat_template="own")
        assert (chosen.text, chosen.source) == ("own", TemplateSource.MODEL)

    def test_of_several_own_templates_the_default_counts(self, root: Path) -> None:
        own = {"tool_use": "tools", "default": "usual"}
        assert choose_template(root=root, model_name="m", model_chat_template=own).text == "usual"

    def test_an_own_template_that_does_not_compile_is_left_aside_and_said_so(
        self, root: Path
    ) -> None:
        chosen = choose_template(root=root, model_name="m", model_chat_template="{% if %}")
        assert chosen.name == "Alpaca"
        assert "does not compile" in chosen.reason

    def test_later_patterns_and_the_users_file_win(self, root: Path) -> None:
        write_config(root, ".*: {instruction_template: Alpaca, a: 1}\n.*X: {a: 2}")
        assert match_model_config(root, "org_x-7b") == {"instruction_template": "Alpaca", "a": 2}
        write_config(root, "org_\\S: {instruction_template: Mistral}", "config-user")
        chosen = choose_template(root=root, model_name="ORG_x-7b")
        assert (chosen.name, chosen.source) == ("Mistral", TemplateSource.CONFIG)
        assert choose_template(root=root, model_name="my-org_x").name == "Alpaca"

    def test_without_any_hint_the_vocabulary_decides(self, root: Path) -> None:
        chatml = choose_template(root=root, model_name="m", vocabulary={"<|im_start|>": 1})
        assert (chatml.name, chatml.source) == ("ChatML", TemplateSource.DEFAULT)
        alpaca = choose_template(root=root, model_name="m", vocabulary={"a": 1})
        assert alpaca.name == "Alpaca"
        assert alpaca.reason

    @pytest.mark.parametrize("text", ["'(': {a: 1}", "a: [", "a: {b: }}"])
    def test_broken_model_settings_are_a_settings_error(self, root: Path, text: str) -> None:
        write_config(root, text)
        with pytest.raises(SettingsError, match="config"):
            match_model_config(root, "m")

    def test_a_request_overrides_the_models_template(self, root: Path) -> None:
        model = choose_template(
            root=root, model_name="m", model_chat_template="own", special_tokens=TOKENS
        )
        named = override_template(model, root=root, name="Mistral")
        assert (named.text, named.special_tokens) == ("Mistral text", TOKENS)
        assert override_template(model, root=root, name="Mistral", text="mine").text == "mine"
        for nothing in (None, "", "None"):
            assert override_template(model, root=root, name=nothing) is model

    def test_an_unknown_name_is_an_error_of_its_field(self, root: Path) -> None:
        model = choose_template(root=root, model_name="m")
        with pytest.raises(DataFileNotFoundError, match="Mistral") as caught:
            override_template(model, root=root, name="Mistrall")
        assert caught.value.param == "instruction_template"


class TestFiles:
    def test_a_file_without_a_template_is_refused(self, root: Path) -> None:
        model = choose_template(root=root, model_name="m")
        for data in ({"context": "x"}, [], None):
            write_template(root, "Empty", data)
            with pytest.raises(TemplateError, match="Empty") as caught:
                override_template(model, root=root, name="Empty")
            assert caught.value.param == "instruction_template"


ALPACA_TURNS = {
    "user": "### Instruction:",
    "bot": "### Response:",
    "turn_template": "<|user|>\n<|user-message|>\n\n<|bot|>\n<|bot-message|>\n\n",
    "context": "<|system-message|>\n\n",
    "system_message": 'Say "\u00fc" \U0001f642.',
}
ALPACA_TEXT = (
    "### Instruction:\nHi\n\n### Response:\nHello\n\n### Instruction:\nBye\n\n### Response:\n"
)


@pytest.fixture
def model(root: Path) -> ChatTemplate:
    return choose_template(
        root=root, model_name="m", model_chat_template="own", special_tokens=TOKENS
    )


class TestOlderFiles:
    @pytest.fixture
    def load(self, root: Path, model: ChatTemplate) -> Callable[..., ChatTemplate]:
        def load(**data: str) -> ChatTemplate:
            write_template(root, "Old", data)
            return override_template(model, root=root, name="Old")

        return load

    def test_names_for_the_roles(self, load: Callable[..., ChatTemplate]) -> None:
        template = load(**ALPACA_TURNS)
        assert ask(template) == "Be brief.\n\n" + ALPACA_TEXT
        assert ask(template, HISTORY[1:]) == 'Say "\u00fc" \U0001f642.\n\n' + ALPACA_TEXT
        assert derive_stop_strings(template) == ("\n### Instruction:",)

    def test_no_names_and_special_tokens_written_out(
        self, load: Callable[..., ChatTemplate]
    ) -> None:
        template = load(
            turn_template="<|user-message|> [/INST] <|bot-message|> </s><s>[INST] ",
            context="[INST] <<SYS>>\n<|system-message|>\n<</SYS>>\n\n",
        )
        assert ask(template) == (
            "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] Bye [/INST] "
        )
        assert derive_stop_strings(template) == ("[INST]",)

    def test_a_fixed_context_gives_way_to_a_system_message(
        self, load: Callable[..., ChatTemplate]
    ) -> None:
        template = load(**ALPACA_TURNS | {"context": "A quiz.\n"})
        assert ask(template, HISTORY[1:]) == "A quiz.\n" + ALPACA_TEXT
        assert ask(template) == "Be brief.\n" + ALPACA_TEXT

    def test_nothing_but_turns(self, load: Callable[..., ChatTemplate]) -> None:
        template = load(turn_template="Q: <|user-message|>\nA: <|bot-message|>\n")
        turns = "Q: Hi\nA: Hello\nQ: Bye\nA: "
        assert ask(template, HISTORY[1:]) == turns
        assert ask(template) == "Be brief.\n\n" + turns

    def test_no_empty_lines_for_a_system_message_that_is_not_there(
        self, load: Callable[..., ChatTemplate]
    ) -> None:
        template = load(**ALPACA_TURNS | {"system_message": ""})
        assert ask(template, HISTORY[1:]) == ALPACA_TEXT

    def test_rounds_are_counted_by_questions(self, load: Callable[..., ChatTemplate]) -> None:
        template = load(
            user="[Round <|round|>]\nQ:",
            bot="A<|round|>:",
            turn_template="<|user|><|user-message|>\n<|bot|><|bot-message|>\n",
        )
        turns = "[Round 1]\nQ:Hi\nA1:Hello\n[Round 2]\nQ:Bye\nA2:"
        assert ask(template, HISTORY[1:]) == turns
        assert ask(template) == "Be brief.\n\n" + turns
        greeted = [{"role": "assistant", "content": "Welcome"}, *HISTORY[1:]]
        assert ask(template, greeted) == "A0:Welcome\n" + turns

    def test_jinja_in_it_is_only_text(self, load: Callable[..., ChatTemplate]) -> None:
        written = "\"'\\ {{ 7 * 7 }} {% if %} {# a #} \\n"
        template = load(turn_template=f"<|user-message|>{written}\n<|bot-message|>{written}")
        assert ask(template, HISTORY[1:]) == f"Hi{written}\nHello{written}Bye{written}\n"

    @pytest.mark.parametrize(
        "turn_template",
        ["", "<|user|>", "<|user-message|>", "<|bot-message|>", "<|bot-message|><|user-message|>"],
    )
    def test_turns_that_leave_a_message_out_are_refused(
        self, load: Callable[..., ChatTemplate], turn_template: str
    ) -> None:
        with pytest.raises(TemplateError, match=r"\(Old\).*<\|user-message\|>") as caught:
            load(turn_template=turn_template)
        assert caught.value.param == "instruction_template"

    def test_keys_without_value(self, root: Path, model: ChatTemplate) -> None:
        turns = {"turn_template": "<|user|><|user-message|><|bot-message|>", "user": 7, "bot": None}
        write_template(root, "Old", turns)
        assert ask(override_template(model, root=root, name="Old")) == "Be brief.\n\n7HiHello7Bye"


class TestTurnOverrides:
    @pytest.fixture
    def old(self, root: Path) -> ChatTemplate:
        write_template(root, "Old", ALPACA_TURNS)
        return choose_template(root=root, model_name="m", settings_name="Old")

    def test_a_whole_template(self, root: Path, model: ChatTemplate) -> None:
        turns = TurnOverrides(
            turn_template="<|user|> <|user-message|>\n<|bot|> <|bot-message|>\n",
            user="Q:",
            bot="A:",
            context="<|system-message|>\n",
        )
        template = override_template(model, root=root, turns=turns)
        assert ask(template) == "Be brief.\nQ: Hi\nA: Hello\nQ: Bye\nA: "
        assert template.source is TemplateSource.REQUEST
        assert template.special_tokens == TOKENS
        assert derive_stop_strings(template) == ("\nQ:",)

    def test_what_a_whole_template_leaves_out_is_empty(
        self, root: Path, model: ChatTemplate
    ) -> None:
        turns = TurnOverrides(turn_template="<|user|><|user-message|>\n<|bot|><|bot-message|>\n")
        template = override_template(model, root=root, name="Mistral", turns=turns)
        assert ask(template, HISTORY[1:]) == "Hi\nHello\nBye\n"

    @pytest.mark.parametrize("is_named", [True, False])
    def test_or_comes_from_an_older_template(
        self, root: Path, model: ChatTemplate, old: ChatTemplate, is_named: bool
    ) -> None:
        turns = TurnOverrides(turn_template="<|user|><|user-message|><|bot|><|bot-message|>")
        given = (model, "Old") if is_named else (old, None)
        template = override_template(given[0], root=root, name=given[1], turns=turns)
        assert ask(template) == (
            "Be brief.\n\n### Instruction:Hi### Response:Hello### Instruction:Bye### Response:"
        )

    @pytest.mark.parametrize("is_named", [True, False])
    def test_single_fields_of_an_older_template(
        self, root: Path, model: ChatTemplate, old: ChatTemplate, is_named: bool
    ) -> None:
        turns = TurnOverrides(bot="### Answer:", context="Rules: <|system-message|>\n\n")
        given = (model, "Old") if is_named else (old, None)
        template = override_template(given[0], root=root, name=given[1], turns=turns)
        answer = ALPACA_TEXT.replace("Response", "Answer")
        assert ask(template) == "Rules: Be brief.\n\n" + answer
        assert ask(template, HISTORY[1:]) == 'Rules: Say "\u00fc" \U0001f642.\n\n' + answer

    def test_nothing_is_overridden_by_nothing(self, root: Path, old: ChatTemplate) -> None:
        assert override_template(old, root=root, turns=TurnOverrides()) is old
        assert override_template(old, root=root, turns=TurnOverrides(turn_template="")) is old

    def test_empty_texts_ask_nothing_of_a_template_in_jinja(
        self, root: Path, model: ChatTemplate
    ) -> None:
        turns = TurnOverrides(turn_template="", user="", bot="", context="")
        assert override_template(model, root=root, turns=turns) is model

    def test_an_empty_text_is_a_text(self, root: Path, old: ChatTemplate) -> None:
        template = override_template(old, root=root, turns=TurnOverrides(context=""))
        assert ask(template, HISTORY[1:]) == ALPACA_TEXT

    @pytest.mark.parametrize("name", [None, "Mistral"])
    @pytest.mark.parametrize(
        ("field", "param"),
        [("user", "name1_instruct"), ("bot", "name2_instruct"), ("context", "context_instruct")],
    )
    def test_a_template_in_jinja_has_no_such_fields(
        self, root: Path, model: ChatTemplate, name: str | None, field: str, param: str
    ) -> None:
        with pytest.raises(TemplateError, match=f"{param} needs turn_template") as caught:
            override_template(model, root=root, name=name, turns=TurnOverrides(**{field: "x"}))
        assert caught.value.param == param

    def test_a_template_written_out_wins(self, root: Path, old: ChatTemplate) -> None:
        turns = TurnOverrides(user="x")
        assert override_template(old, root=root, text="mine", turns=turns).text == "mine"

    @pytest.mark.parametrize(
        "turns",
        [
            TurnOverrides(turn_template="<|user-message|>"),
            TurnOverrides(turn_template="<|user-message|><|bot-message|>" + "x" * 99_999),
            TurnOverrides(
                turn_template="<|user-message|>" + "<|user|>" * 4000 + "<|bot-message|>",
                user="x" * 30_000,
            ),
            TurnOverrides(
                turn_template="<|user-message|><|bot-message|>",
                context="<|user|>" * 9999,
                user="x" * 99,
            ),
            TurnOverrides(turn_template="<|user-message|><|bot-message|>" + "<|round|>a" * 5000),
        ],
    )
    def test_what_cannot_be_used_names_its_field(
        self, root: Path, model: ChatTemplate, turns: TurnOverrides
    ) -> None:
        with pytest.raises(TemplateError) as caught:
            override_template(model, root=root, turns=turns)
        assert caught.value.param == "turn_template"
        assert len(str(caught.value)) < 300


def ask(template: ChatTemplate, history: list[dict[str, str]] = HISTORY) -> str:
    return render_template(
        template, history, add_generation_prompt=True, variables={}, clock=RenderClock()
    )


class TestRendering:
    def test_tools_are_none_where_there_are_none(self) -> None:
        assert render("{{ tools is none }} {{ documents is none }}") == "True True"

    def test_variables_do_not_hide_the_messages(self) -> None:
        assert render("{{ messages | length }}", messages=[]) == "4"

    @pytest.mark.parametrize(
        ("text", "kind"),
        [
            ("{{ raise_exception('Roles must alternate') }}", TemplateError),
            ("{{ 'a' * 10 ** 9 }}", TemplateLimitError),
        ],
    )
    def test_an_error_names_the_template_and_its_field(
        self, text: str, kind: type[TemplateError]
    ) -> None:
        with pytest.raises(kind, match="instruction_template_str.*: (Roles|it makes)") as caught:
            render(text)
        assert type(caught.value) is kind
        assert caught.value.param == "instruction_template_str"

    @pytest.mark.parametrize("text", ["{% if %}", "{{ (", "{% for x in %}", "{{ 1 | nofilter }}"])
    def test_a_template_that_does_not_compile_names_its_field(self, text: str) -> None:
        with pytest.raises(TemplateError, match="does not compile") as caught:
            make_template(text)
        assert caught.value.param == "instruction_template_str"

    def test_a_very_long_template_is_refused(self) -> None:
        with pytest.raises(TemplateError, match="characters"):
            make_template("x" * (MAX_TEMPLATE_CHARS + 1))


class TestStopStrings:
    def test_of_several_lines_the_first_counts_up_to_its_number(self) -> None:
        text = (
            "{% for m in messages %}{% if m.role == 'user' %}\n\n[Round {{ loop.index }}]\n\nQ: "
            "{{ m.content }}\nA: {% else %}{{ m.content }}{% endif %}{% endfor %}"
        )
        assert derive_stop_strings(make_template(text)) == ("\n[Round", "\nQ:")

    def test_the_eos_token_is_none(self) -> None:
        text = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        assert derive_stop_strings(make_template(text)) == ("<|end|>", "<|user|>")
        with_eos = make_template(text, eos_token="<|end|>")
        assert derive_stop_strings(with_eos) == ("<|user|>",)

    @pytest.mark.parametrize(
        "text",
        [
            "{{ raise_exception('no') }}",
            "fixed",
            "{% for m in messages %}{{ m.content }}<{{ 'x' * 1000 }}>{% endfor %}",
            "{{ messages[0].content }}",
            "{% for m in messages %}{{ m.content }}\n\n{% endfor %}",
        ],
    )
    def test_templates_without_a_recognisable_end_have_none(self, text: str) -> None:
        assert derive_stop_strings(make_template(text)) == ()


# Contents that are lists of parts

PARTS = (
    "{% for message in messages %}{% for part in message.content | selectattr('type', 'equalto', "
    "'text') %}[{{ part.text }}]{% endfor %}{% endfor %}"
)
BOTH = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in \
m.content if part.type == 'text' %}[{{ part.text }}]{% endfor %}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("text", "only_parts", "expected"),
    [
        (PARTS, True, "[Be brief.][Hi][Hello][Bye]"),
        (BOTH, False, "Be brief.HiHelloBye"),
        ("{# type #}nothing", False, "nothing"),
        ("{# type #}{{ raise_exception('no') }}", False, None),
    ],
)
def test_texts_become_parts_for_templates_that_write_nothing_else(
    text: str, only_parts: bool, expected: str | None
) -> None:
    assert reads_only_parts(make_template(text)) is only_parts
    if expected is not None:
        assert render(text) == expected


def test_stop_strings_of_such_a_template() -> None:
    text = PARTS.replace("{% for part", "{{ '\\n' + message.role | upper }}: {% for part")
    assert derive_stop_strings(make_template(text)) == ("\nUSER: [",)
